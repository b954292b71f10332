"""Reward terms of turns, and tools and terms that settings name."""

from __future__ import annotations

import asyncio
import pickle
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import gymnasium
import pytest
import yaml
from commands import command

from treegym.agents import (
    ChatRenderer,
    Completion,
    Context,
    GrowingTree,
    RolloutStrategy,
    RolloutTree,
    Run,
    Sample,
    Sampling,
    grow_trees,
)
from treegym.agents.models.nano import build_nano
from treegym.agents.policies import OraclePlayer
from treegym.agents.rollouts import FollowOracle, rescore
from treegym.envs import Exchange, LookupEnv, Task, ToolEnv
from treegym.scenarios import ScenarioError, load_scenario
from treegym.scenarios.build import try_environment
from treegym.scenarios.commands.replay import _term
from treegym.tools import FunctionTool, Tool, ToolError, tool
from treegym.trainers.advantages import AnchorStates, Norm

PAGE = (Path(__file__).parent.parent / "docs" / "environments.md").read_text(encoding="utf-8")
SCRIPTS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
[SHOP] = [script for script in SCRIPTS if "def brevity" in script]
[NAMES] = [text for text in re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL) if "shop.py" in text]


class Doors(ToolEnv):
    """Gold is behind door 2. `found` is known at steps and at the end, `calls` at steps, `exact` at the end."""

    reward_weights: Mapping[str, float] = {"exact": 1.0, "format": 0.1, "found": 0.5, "calls": -0.1}

    def begin(self, options: Mapping[str, Any]) -> str:
        return "What is behind door 2?"

    @tool
    def open_door(self, number: int) -> str:
        """Open a door and see what is behind it."""
        if number not in (1, 2):
            raise ToolError("no such door")
        return ("dust", "gold")[number - 1]

    def score(self, answer: str) -> dict[str, float]:
        return {"exact": float(answer == "gold"), "found": float(answer == "gold")}

    def score_step(self, exchanges: Sequence[Exchange]) -> Mapping[str, float | None]:
        return {"found": float(sum(e.result.text == "gold" for e in exchanges)), "calls": float(len(exchanges))}


gymnasium.register("tests/TermsDoors-v0", Doors)
ONE, TWO = ("<open_door>1</open_door>", "<open_door>2</open_door>")


@dataclass(frozen=True)
class Given:
    """Rollouts of these actions."""

    rollouts: Sequence[Sequence[str]]

    async def grow(self, tree: GrowingTree) -> None:
        for number, actions in enumerate(self.rollouts):
            turn = tree.root
            for text in actions:
                tokens = tree.renderer.reply(text)
                turn = await tree.attach(turn, Sample(Completion(text, tokens), Context(tokens, turn.context)))
            tree.end(number, turn)


def grown(task: Task, strategy: RolloutStrategy) -> RolloutTree:
    renderer = ChatRenderer(build_nano(["gold dust door"])[1])
    [tree] = asyncio.run(grow_trees([task], strategy, OraclePlayer(), renderer, Sampling(max_context=1 << 20)))
    return tree


def played(env: ToolEnv, *actions: str) -> tuple[list[float], list[Mapping[str, float | None]]]:
    """Rewards and terms of the turns."""
    env.reset(seed=0)
    steps = [env.step(action) for action in actions]
    return [step[1] for step in steps], [step[4]["reward_terms"] for step in steps]


def test_terms_of_steps_and_of_the_end_add_up() -> None:
    rewards, terms = played(Doors(), ONE + TWO, "no action", TWO, "<answer>gold</answer>")
    assert terms == [
        {"found": 1.0, "calls": 2.0},
        {"found": 0.0, "calls": 0.0},
        {"found": 1.0, "calls": 1.0},
        {"exact": 1.0, "found": 1.0, "format": 0.0, "calls": 0.0},
    ]
    assert rewards == pytest.approx([0.3, 0.0, 0.4, 1.5], abs=1e-12)
    tree = grown(Task("tests/TermsDoors-v0", 0), Given([(ONE + TWO, "no action", TWO, "<answer>gold</answer>")]))
    assert (tree.term("found"), tree.term("calls"), tree.term("exact")) == ((3.0,), (3.0,), (1.0,))
    assert tree.returns == pytest.approx((2.2,), abs=1e-12)


def test_the_last_turn_of_an_episode_without_an_answer_has_its_step_s_terms_too() -> None:
    rewards, terms = played(Doors(max_turns=1), TWO)
    assert terms == [{"exact": 0.0, "format": 0.0, "found": 1.0, "calls": 1.0}]
    assert rewards == pytest.approx([0.4], abs=1e-12)


def test_a_term_that_has_nothing_to_say_is_recorded_so_and_earns_nothing() -> None:
    class Silent(Doors):
        def score_step(self, exchanges: Sequence[Exchange]) -> Mapping[str, float | None]:
            return {"found": None}

    rewards, terms = played(Silent(), TWO, "<answer>gold</answer>")
    assert terms == [{"found": None}, {"exact": 1.0, "found": 1.0, "format": 1.0}]
    assert rewards == pytest.approx([0.0, 1.6], abs=1e-12)


@pytest.mark.parametrize(
    ("given", "error", "reason"),
    [
        ({"style": 1.0}, ValueError, "no reward weight for ['style']; weights: {'exact': 1.0"),
        ({"found": "much"}, TypeError, "the reward term found gave 'much'; it is a number or None"),
    ],
)
def test_a_wrong_term_of_a_step_is_refused(given: Any, error: type[Exception], reason: str) -> None:
    class Wrong(Doors):
        def score_step(self, exchanges: Sequence[Exchange]) -> Mapping[str, float | None]:
            return given  # type: ignore[no-any-return]

    with pytest.raises(error, match=re.escape(reason)):
        played(Wrong(), TWO)


def test_gigpo_compares_the_returns_of_steps() -> None:
    """By hand, discount 1/2: from the prompt one earns 0.4 + 1.6 / 2 = 1.2, the other -0.1 + 0.1 / 2 = -0.05; their
    mean is 0.575. Their second turns are in states of their own."""
    rollouts = [(TWO, "<answer>gold</answer>"), (ONE, "<answer>dust</answer>")]
    tree = grown(Task("tests/TermsDoors-v0", 0), Given(rollouts))
    [found] = AnchorStates(0.5, Norm(divide=False))([tree])
    assert found[0] == pytest.approx([0.625, 0.0], abs=1e-9)
    assert found[1] == pytest.approx([-0.625, 0.0], abs=1e-9)


# by name


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The page's module, in the current folder."""
    (tmp_path / "shop.py").write_text(SHOP)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "shop", raising=False)
    return tmp_path


def settings() -> dict[str, Any]:
    return dict(yaml.safe_load(NAMES)["environment"]["settings"])


@pytest.mark.usefixtures("shop")
def test_named_tools_are_called_and_named_terms_are_weighed_each_turn() -> None:
    env = Task("treegym/Lookup-v0", 0, settings=settings()).make()
    env.reset(seed=0)
    *_, info = env.fork().step("<shout>moon</shout><spell>moon</spell>")
    assert [message.text for message in info["messages"]] == ["MOON", "m-o-o-n"]
    assert info["reward_terms"] == {"brevity": None}
    _, reward, *_, info = env.fork().step("<answer>nowhere</answer>")
    assert info["reward_terms"] == {"exact": 0.0, "format": 1.0, "brevity": 1.0}
    assert reward == pytest.approx(0.3, abs=1e-12)
    env.step("<lookup>moon</lookup>")
    assert env.fork().step("<answer>nowhere</answer>")[4]["reward_terms"]["brevity"] == 0.5


def test_a_scenario_s_named_parts_are_found_beside_it(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (shop / "some.yaml").write_text(f"{NAMES}\nmodel: {{name: nano}}\n")
    (shop / "elsewhere").mkdir()
    monkeypatch.chdir(shop / "elsewhere")
    env = try_environment(load_scenario(shop / "some.yaml").environment)
    assert isinstance(env, ToolEnv) and [*env.tools] == ["shout", "spell", "lookup"]
    wrong = load_scenario(shop / "some.yaml", ["environment.settings.tools=[shop.py:shuot]"])
    with pytest.raises(ScenarioError, match=r"^environment: tools: no tool 'shop.py:shuot': .*did you mean 'shout'\?"):
        try_environment(wrong.environment)


def test_recorded_episodes_are_rescored_with_the_same_function(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrapped = Task("treegym/Lookup-v0", 0, settings=settings(), wrappers=(("StepPenalty", {}),))
    tree = grown(wrapped, FollowOracle())
    weights = {**settings()["reward_weights"], "turns": -0.01}
    assert rescore(tree, [_term("shop.py:brevity")], weights, live=True) == tree
    (shop / "run").mkdir()
    (shop / "run" / "scenario.yaml").write_text(NAMES)
    Run(shop / "run").trees.append(tree, stage="test", step=0)
    status, said, told = command(capsys, "replay", "rescore", "run", "--term", "shop.py:brevity", "--live")
    assert status == 0 and "+0.000" in said, told


@tool
def whisper(word: str) -> str:
    """Say it softly."""
    return word.lower()


def plain(word: str) -> str:
    return word


def of_no_tool() -> str:
    return "nothing"


@dataclass
class Tally:
    """A tool with a state."""

    step: int = 1
    count: int = 0
    name: str = field(default="tally", init=False)
    description: str = field(default="Counts its calls.", init=False)
    parameters: Mapping[str, Any] = field(default_factory=lambda: {"type": "object", "properties": {}}, init=False)

    def __call__(self) -> str:
        self.count += self.step
        return str(self.count)

    def fork(self) -> Self:
        return type(self)(self.step, self.count)

    def reset(self, seed: int) -> None:
        self.count = 0

    def close(self) -> None:
        pass


class Uncopied(Tally):
    can_fork = False


tally: Tool = Tally()
uncopied = Uncopied()
HERE = "test_envs_terms"


@pytest.mark.parametrize("named", [f"{HERE}:tally", {f"{HERE}:Tally": {"step": 3}}, {f"{HERE}:Tally": None}])
def test_environments_have_named_tools_of_their_own(named: Any) -> None:
    step = 3 if named == {f"{HERE}:Tally": {"step": 3}} else 1
    one, other = (LookupEnv(tools=[named]) for _ in range(2))
    one.reset(seed=0)
    other.reset(seed=0)
    assert [one.step("<tally></tally>")[0] for _ in range(2)] == [str(step), str(2 * step)]
    twin = pickle.loads(pickle.dumps(one.fork()))
    assert [env.step("<tally></tally>")[0] for env in (twin, one, other)] == [str(3 * step), str(3 * step), str(step)]


def test_a_named_function_tool_is_the_tool_itself() -> None:
    assert LookupEnv(tools=[f"{HERE}:whisper"]).given_tools == (whisper,)
    assert isinstance(whisper, FunctionTool)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"tools": ["shout"]}, "tools: no tool 'shout': write module:Name or path/to/file.py:Name"),
        ({"tools": ["nowhere:shout"]}, "tools: no tool 'nowhere:shout': no module 'nowhere' in "),
        ({"tools": [f"{HERE}:whispr"]}, "has no 'whispr'; did you mean 'whisper'?"),
        (
            {"tools": [f"{HERE}:plain"]},
            "missing a required argument: 'word'; its arguments: word; name a tool, or what ",
        ),
        ({"tools": [f"{HERE}:of_no_tool"]}, "makes a str: name a tool, or what makes one; a function that is a tool"),
        ({"tools": [f"{HERE}:HERE"]}, "HERE is a str: name a tool, or what makes one"),
        (
            {"tools": [{f"{HERE}:Tally": {"stop": 1}}]},
            "got an unexpected keyword argument 'stop'; its arguments: step, ",
        ),
        ({"tools": [{f"{HERE}:whisper": {"word": "x"}}]}, "whisper is a tool already, it takes no arguments"),
        ({"tools": [f"{HERE}:uncopied"]}, "uncopied cannot be copied for each environment: name a function that makes"),
        ({"tools": [f"{HERE}:tally", f"{HERE}:tally"]}, "two tools are named 'tally': rename one"),
        ({"tools": [{"a:b": {}, "c:d": {}}]}, "write a name, or {name: {argument: value}}, not {'a:b': {}, 'c:d': {}}"),
        ({"terms": {"brief": "brevity"}}, "terms: brief: no function 'brevity': write module:Name or path/to/file.py"),
        ({"terms": {"brief": f"{HERE}:breviti"}}, f"terms: brief: no function '{HERE}:breviti': "),
        ({"terms": {"brief": f"{HERE}:HERE"}}, "is a str, not a function of the environment"),
        ({"terms": {"brief": f"{HERE}:of_no_tool"}}, "takes () -> 'str'; a term takes the environment alone"),
        ({"terms": {"brief": f"{HERE}:plain"}, "reward_weights": {"exact": 1}}, "terms: 'brief' has no weight: add it"),
    ],
)
def test_what_is_no_tool_or_term_is_refused(given: dict[str, Any], reason: str) -> None:
    with pytest.raises((ValueError, TypeError, ImportError), match=re.escape(reason)):
        LookupEnv(**{"reward_weights": {"exact": 1.0, "brief": 1.0}, **given})
