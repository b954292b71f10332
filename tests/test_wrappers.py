"""Wrappers: what they change takes effect in forks and in training, and is played again from the task alone."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import pytest
from commands import command
from gymnasium.envs.registration import WrapperSpec

from treegym.agents import Completion, Node, RolloutTree, Run
from treegym.agents.evaluation.outcomes import AnswerReader
from treegym.agents.exchange import grammar_of
from treegym.agents.policies import RandomPlayer
from treegym.agents.rollouts import verify
from treegym.agents.store.records import Record, read_record, write_record
from treegym.envs import LookupEnv, Message, Step, Task, TextEnv, TextWrapper, check, check_env, registered
from treegym.scenarios import ScenarioError, load_scenario, train
from treegym.scenarios.build import check_weights, in_format, try_environment
from treegym.trainers import Stopped

LOOKUP = "treegym/Lookup-v0"
PAGE = (
    (Path(__file__).parent.parent / "docs" / "environments.md").read_text(encoding="utf-8").partition("## Wrappers")[2]
)
COUNTDOWN, *_ = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
WRAPPED, *_ = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


class Diary(TextWrapper):
    """Keeps what was done in a list, and tells it."""

    reward_weights: Mapping[str, float] = {"entries": 0.001}

    def start(self, messages: Sequence[Message]) -> Sequence[Message]:
        self.entries: list[str] = []
        return messages

    def score(self, step: Step) -> Mapping[str, float | None]:
        self.entries.append(step.action[:20])
        return {"entries": float(len(self.entries))} if step.over else {"entries": None}

    def tell(self, step: Step) -> Sequence[Message]:
        return [*step.messages, Message("user", f"so far: {self.entries}")]


AROUND: list[Any] = [
    "StepPenalty",
    {"Hint": {"text": "Think first."}},
    {"WithNotes": {"notes": [{"text": "Take your time."}, {"text": "It was seen before.", "when": "e", "id": "1"}]}},
    f"{Path(__file__).stem}:Diary",
    ["TurnLimit", {"turns": 40}],
]


@pytest.mark.parametrize("id", registered())
def test_every_environment_keeps_the_contract_within_wrappers(id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "hash_seed_changes_nothing", lambda runs: None)  # slow; wrappers have no sets
    check_env(Task(id, 0, wrappers=tuple(AROUND)).make, seeds=[0])


def told(env: TextEnv) -> list[str]:
    return [message.text for message in env.reset(seed=1)[1]["messages"]]


def test_the_first_wrapper_is_the_innermost() -> None:
    hints = [{"Hint": {"text": text}} for text in ("one", "two")]
    bare, wrapped = (told(Task(LOOKUP, 0, wrappers=tuple(each)).make()) for each in ([], hints))
    assert wrapped == [bare[0], f"{bare[1]}\none\ntwo"]


def test_a_fork_has_the_state_of_the_wrapper_and_of_the_environment() -> None:
    env = Diary(LookupEnv())
    env.reset(seed=0)
    env.step("one")
    twin = env.fork()
    twin.step("two")
    assert (env.entries, twin.entries) == (["one"], ["one", "two"])
    assert env.unwrapped is not twin.unwrapped
    assert env.unwrapped.turn == 1  # type: ignore[attr-defined]


def test_terms_of_a_wrapper_are_weighed_and_add_to_those_of_the_environment() -> None:
    """By hand: two turns; exact 1, format 1, and 3 penalties of two wrappers."""
    penalties = ["StepPenalty", {"StepPenalty": {"weight": -0.5, "term": "more"}}]
    env = Task(LOOKUP, 0, settings={"hops": [1]}, wrappers=tuple(penalties)).make()
    env.reset(seed=0)
    rewards, terms = [], []
    for _ in range(2):
        _, reward, _, _, info = env.step(str(env.oracle()))
        rewards.append(reward)
        terms.append(info["reward_terms"])
    assert terms == [{"turns": 1.0, "more": 1.0}, {"exact": 1.0, "format": 1.0, "turns": 1.0, "more": 1.0}]
    assert rewards == pytest.approx([-0.51, 1.1 - 0.51], abs=1e-12)
    assert env.oracle() is None


def test_a_wrapper_without_hooks_changes_nothing() -> None:
    plain, around = LookupEnv(), TextWrapper(LookupEnv())
    assert around.reset(seed=2) == plain.reset(seed=2)
    while action := plain.oracle():
        assert around.oracle() == action
        assert around.step(action) == plain.step(action)
        assert around.state_key() == plain.state_key()


# Gymnasium's


@pytest.fixture
def registering(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gymnasium.envs.registration, "registry", dict(gymnasium.registry))
    monkeypatch.setattr(gymnasium, "registry", gymnasium.envs.registration.registry)


@pytest.mark.usefixtures("registering")
@pytest.mark.parametrize("forked", [False, True])
@pytest.mark.parametrize("way", ["registration", "setting", "name", "inner"])
def test_a_time_limit_truncates_in_forks_too(way: str, forked: bool) -> None:
    task = Task("tests/Limited-v0", 0)
    limit = {"max_episode_steps": 2}
    if way == "setting":
        task = Task(LOOKUP, 0, settings=limit)
    if way == "name":
        task = Task(LOOKUP, 0, wrappers=({"gymnasium.wrappers:TimeLimit": limit},))  # type: ignore[arg-type]
    hint = (WrapperSpec("Hint", "treegym.envs:Hint", {"text": "Well?"}),) if way == "inner" else ()
    gymnasium.register("tests/Limited-v0", LookupEnv, max_episode_steps=2, additional_wrappers=hint)
    env = task.make()
    assert told(env)[1].endswith("Well?") is bool(hint)
    assert env.step("<lookup>moon</lookup>")[2:4] == (False, False)
    env = env.fork() if forked else env
    *_, terminated, truncated, info = env.step("<lookup>moon</lookup>")
    assert (terminated, truncated, info["cause"]) == (False, True, "turn limit")
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step("<lookup>moon</lookup>")
    env.reset(seed=0)
    env.step("<lookup>moon</lookup>")
    *_, terminated, truncated, info = env.step("<answer>moon</answer>")
    assert (terminated, truncated, "cause" in info) == (True, False, False)


class Louder(gymnasium.Wrapper[str, str, str, str]):
    """A user's, of Gymnasium's kind."""


@pytest.mark.usefixtures("registering")
@pytest.mark.parametrize(
    ("spec", "instead"),
    [
        (WrapperSpec("", "gymnasium.wrappers:TransformReward", {"func": abs}), "adds terms in `score`"),
        (WrapperSpec("", "gymnasium.wrappers:ClipReward", {"max_reward": 1.0}), "adds terms in `score`"),
        (
            WrapperSpec("", "gymnasium.wrappers:TransformObservation", {"func": str, "observation_space": None}),
            "changes what is told in `start` and `tell`",
        ),
        (
            WrapperSpec("", "gymnasium.wrappers:TransformAction", {"func": str, "action_space": None}),
            "whose `step` changes the action",
        ),
        (WrapperSpec("", "gymnasium.wrappers:RecordEpisodeStatistics", {}), "leave it out, trees record"),
        (WrapperSpec("", "gymnasium.wrappers:Autoreset", {}), "derive it from treegym.envs.TextWrapper"),
        (WrapperSpec("", "test_wrappers:Louder", {}), "derive it from treegym.envs.TextWrapper"),
    ],
    ids=lambda value: value.entry_point if isinstance(value, WrapperSpec) else "",
)
def test_what_cannot_take_effect_is_refused_with_what_to_write_instead(spec: WrapperSpec, instead: str) -> None:
    gymnasium.register("tests/Changed-v0", LookupEnv, additional_wrappers=(spec,))
    name = spec.entry_point.partition(":")[2]
    for task in (
        Task("tests/Changed-v0", 0),
        Task(LOOKUP, 0, wrappers=((spec.entry_point, spec.kwargs or {}),)),
        Task("tests/Changed-v0", 0, wrappers=(("Hint", {"text": "x"}),)),
    ):
        with pytest.raises(TypeError, match=f": {name} is a gymnasium.Wrapper, which cannot fork; .*{instead}"):
            task.make()


@pytest.mark.usefixtures("registering")
def test_what_only_checks_is_left_out_and_its_checks_hold() -> None:
    checks = ("gymnasium.wrappers:PassiveEnvChecker", "gymnasium.wrappers:OrderEnforcing")
    gymnasium.register("tests/Checked-v0", LookupEnv, order_enforce=True, disable_env_checker=False)
    env = Task("tests/Checked-v0", 0, wrappers=tuple((check, {}) for check in checks)).make()
    assert type(env) is LookupEnv
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step("x")
    with pytest.raises(gymnasium.error.ResetNeeded):
        Diary(env).step("x")


# names


@pytest.mark.parametrize(
    ("wrapper", "reason"),
    [
        ("Hnit", "no wrapper 'Hnit'; did you mean 'Hint'? One of your own is module:Name or path/to/file.py:Name"),
        ("Nothing", "no wrapper 'Nothing'; there are Hint, StepPenalty, TurnLimit, WithNotes. One of your own is"),
        ("Hint", "the wrapper Hint: missing a required argument: 'text'; its arguments: text"),
        ({"TurnLimit": {"turns": 0}}, "a limit of 0 turns: expected 1 or more"),
        ({"StepPenalty": {"term": "exact"}}, "StepPenalty: the term 'exact' has a weight already; name another one"),
        ("json:loadz", "has no 'loadz'; did you mean 'load'?"),
        ("json:__name__", "json:__name__ is a str: name a TextWrapper, or a function that makes one"),
        ("builtins:repr", "the wrapper builtins:repr is a str, not a TextEnv"),
    ],
)
def test_what_is_no_wrapper_is_refused(wrapper: Any, reason: str) -> None:
    with pytest.raises((ValueError, TypeError, ImportError), match=re.escape(reason)):
        Task(LOOKUP, 0, wrappers=(wrapper,)).make()


@pytest.mark.parametrize(
    "wrappers", ["Hint", {"Hint": {}}, [3], [{"Hint": 3}], [{"Hint": {}, "TurnLimit": {}}], [["a"]]]
)
def test_wrappers_that_are_no_list_of_names_are_refused(wrappers: Any) -> None:
    with pytest.raises(ValueError, match=r"wrappers are a list, such as|write a name, or \{name: "):
        Task(LOOKUP, 0, wrappers=wrappers)


# trees


def tree_of(task: Task) -> RolloutTree:
    action = Completion("<answer>x</answer>", (1,), (0.0,))
    return RolloutTree(task, (1,), (Message("user", "go"),), (Node(-1, action, terminated=True),), (0,))


@pytest.mark.parametrize("wrappers", [(), AROUND])
def test_a_tree_records_the_wrappers_of_its_task(wrappers: Sequence[Any]) -> None:
    tree = tree_of(Task(LOOKUP, 3, wrappers=tuple(wrappers)))
    assert RolloutTree.from_json(json.loads(json.dumps(tree.to_json()))) == tree
    line = write_record(Record(0, {}, tree), None)
    assert read_record(0, line, lambda offset: pytest.fail("it shares nothing")).tree == tree
    assert ("wrappers" in json.loads(line)["tree"]["task"]) is bool(wrappers)  # older runs have none


def test_a_tree_from_before_there_were_wrappers_reads_equal() -> None:
    tree = tree_of(Task(LOOKUP, 3))
    row = json.loads(json.dumps(tree.to_json()))
    del row["task"]["wrappers"]
    assert RolloutTree.from_json(row) == tree


# whoever asks for a ToolEnv


def test_who_asks_for_a_tool_environment_finds_it_within_wrappers() -> None:
    bare = Task(LOOKUP, 0, settings={"format": "react"})
    around = replace(bare, wrappers=tuple(AROUND))
    one, other = bare.make(), around.make()
    messages = one.reset(seed=0)[1]["messages"]
    other.reset(seed=0)
    written = [[asyncio.run(RandomPlayer().act(messages, env, seed)) for seed in range(20)] for env in (one, other)]
    assert written[0] == written[1]
    assert any("Action: lookup" in text for text in written[0])
    reader = AnswerReader()
    assert reader(around, "Thought: so\nFinal Answer: Moon") == reader(bare, "Final Answer: moon") == "moon"
    reader.close()
    assert grammar_of(around) == grammar_of(bare) is not None


SCENARIO = """
model: {name: nano, dtype: float32}
algorithm: {parameters: {n: 2}}
sampling: {max_tokens: 4}
warmup: {demonstrations: 8}
improvement: {steps: 2, tasks_per_step: 2}
heldout: {tasks: 2}
checkpoint_every: 1.0e-9
threads: 1
"""


@pytest.fixture
def scenario(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The page's, with the page's wrapper beside it."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "countdown", raising=False)
    (tmp_path / "countdown.py").write_text(COUNTDOWN)
    (tmp_path / "some.yaml").write_text(WRAPPED + SCENARIO)
    return tmp_path / "some.yaml"


def test_scenarios_ask_the_environment_within_its_wrappers(scenario: Path) -> None:
    chosen = load_scenario(scenario)
    assert in_format(chosen, "hermes").environment.settings == {"format": "hermes"}
    scheduled = load_scenario(scenario, ["improvement.reward_weights={exact: [1, 1], format: [0, 1]}"])
    env = try_environment(chosen.environment)
    check_weights(scheduled, env)
    assert env.reward_weights == {"exact": 1.0, "format": 0.1, "turns": -0.02}
    try_environment(load_scenario(scenario, ["environment.success=turns"]).environment)
    with pytest.raises(ScenarioError, match="no reward term 'won'; terms: \\['exact', 'format', 'turns'\\]"):
        try_environment(load_scenario(scenario, ["environment.success=won"]).environment)


def test_the_page_s_wrappers_train_resume_and_are_verified_from_anywhere(
    scenario: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train(load_scenario(scenario), tmp_path / "whole")
    with monkeypatch.context() as patched, pytest.raises(Stopped):
        steps = iter([False, False, True])
        patched.setattr("treegym.scenarios.watch.ProgressBars.should_stop", lambda bars: next(steps))
        train(load_scenario(scenario), tmp_path / "parted")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")

    def forget() -> None:
        sys.modules.pop("countdown", None)
        monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(tmp_path)])

    forget()
    assert command(capsys, "train", "--resume", "--out", "../parted")[0] == 0
    trees = [*Run(Path("../whole")).trees]
    assert [*Run(Path("../parted")).trees] == trees
    assert {labels["stage"] for labels, _ in trees} >= {"warm-up", "improvement", "trained"}  # both splits
    for _, tree in trees:
        assert [name for name, _ in tree.task.wrappers] == ["Hint", "countdown.py:Countdown"]
        assert tree.messages[-1].text.endswith("\nFollow each link.")
        assert all(tree.nodes[path[-1]].terminated or len(path) <= 5 for path in tree.paths)
        assert tree.term("turns") == tuple(map(len, tree.paths))
    forget()
    status, said, _ = command(capsys, "replay", "verify", "../whole")
    assert status == 0, said
    changed = replace(trees[-1][1], task=replace(trees[-1][1].task, wrappers=()))
    assert verify(changed)  # what the tree says comes from its wrappers


@pytest.mark.parametrize(
    ("lines", "place", "reason"),
    [
        (["Hnit"], 4, "environment.wrappers.0: no wrapper 'Hnit'; did you mean 'Hint'?"),
        (
            ["StepPenalty", "{Hint: {txt: x}}"],
            5,
            "environment.wrappers.1.Hint.txt: no such field; did you mean 'text'?",
        ),
        (["Hint"], 4, "environment.wrappers.0.Hint: missing a required argument: 'text'"),
        (["{TurnLimit: {turns: many}}"], 4, "environment.wrappers.0.TurnLimit.turns: input should be a valid integer"),
        (["nowhere.py:Hint"], 4, "environment.wrappers.0: no file 'nowhere.py' in "),
        (["3"], 4, "environment.wrappers.0: write a name, or {name: {argument: value}}, not 3"),
    ],
)
def test_a_scenario_s_wrappers_are_checked_with_their_place(
    lines: list[str], place: int, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    file = tmp_path / "some.yaml"
    listed = "".join(f"    - {line}\n" for line in lines)
    file.write_text(f"environment:\n  id: {LOOKUP}\n  wrappers:\n{listed}")
    with pytest.raises(ScenarioError) as refusal:
        load_scenario(file)
    assert str(refusal.value).startswith(f"{file}:{place}: {reason}")


def test_wrapped_tasks_of_a_problem_are_compared_with_those_that_are_not() -> None:
    from treegym.agents.evaluation.outcomes import TaskOutcome

    bare, hinted = (
        TaskOutcome.of(0, replace(tree_of(Task(LOOKUP, 3, wrappers=wrappers)), state_key="s"), "exact")
        for wrappers in ((), (("Hint", {"text": "x"}),))
    )
    assert bare.key == hinted.key
    assert bare.problem != hinted.problem
