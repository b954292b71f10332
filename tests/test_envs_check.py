"""check_env passes what ships, and catches an environment that breaks any one promise."""

import inspect
import os
import random
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import gymnasium
import numpy as np
import pytest

from treegym.envs import LookupEnv, Task, TextEnv, check, check_env, registered
from treegym.envs.formats.tagged import FORMATS
from treegym.envs.fresh import HASH_SEEDS, INSIDE
from treegym.tools import tool

USUAL = ("tagged", "hermes", "react", "fenced", "openai")  # those of model families are tried in one environment
SLOW = ("treegym/Code-v0", "treegym/PythonMath-v0", "treegym/Browser-v0")  # a format changes nothing inside their walls


@pytest.mark.parametrize(
    ("id", "format"),
    [(id, format) for id in registered() for format in (FORMATS if "Lookup" in id else USUAL) if id not in SLOW],
)
def test_every_registered_environment_keeps_the_contract_in_every_format(
    id: str, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "hash_seed_changes_nothing", lambda runs: None)  # is tried below, with one format
    check_env(Task(id, 0, settings={"format": format}).make)


@pytest.mark.parametrize("id", registered())
def test_every_registered_environment_keeps_the_contract(id: str) -> None:
    check_env(id)


class Unseeded(LookupEnv):
    def begin(self, options: Mapping[str, Any]) -> str:
        self._np_random = np.random.default_rng()
        return super().begin(options)


class TouchesGlobalRandom(LookupEnv):
    def begin(self, options: Mapping[str, Any]) -> str:
        random.random()
        return super().begin(options)


class SharesBetweenInstances(LookupEnv):
    steps: list[str] = []  # noqa: RUF012

    def begin(self, options: Mapping[str, Any]) -> str:
        self.steps.clear()
        return super().begin(options)

    @tool
    def lookup(self, word: str) -> str:
        """See where a word leads."""
        self.steps.append(word)
        return f"{super().lookup(word=word)} {len(self.steps)}"


class ForksShareState(LookupEnv):
    def begin(self, options: Mapping[str, Any]) -> str:
        self.seen: list[str] = []
        return super().begin(options)

    @tool
    def lookup(self, word: str) -> str:
        """See where a word leads."""
        self.seen.append(word)
        return f"{super().lookup(word=word)} {len(self.seen)}"

    def situation(self) -> Any:
        return [self.seed_key, self.seen]

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self.seen.append(action)
        return super().step(action)

    def fork(self) -> Self:
        twin = super().fork()
        twin.seen = self.seen
        return twin


class ForgetsWhenPickled(LookupEnv):
    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "turn": 0}


class EndsBothWays(LookupEnv):
    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = super().step(action)
        return observation, reward, terminated or truncated, terminated or truncated, info


class NeverEnds(LookupEnv):
    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        if self.over:
            return "over", 0.0, True, False, {"messages": [], "reward_terms": {}}
        return super().step(action)


class Silent(LookupEnv):
    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        return ("", *super().step(action)[1:])


class CrashesOnOddText(LookupEnv):
    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        action.encode()
        return super().step(action)


class OracleErrs(LookupEnv):
    def oracle(self) -> str | None:
        return None if self.over else self.write_answer("nowhere")


class HidesMessages(LookupEnv):
    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        *rest, info = super().step(action)
        del info["messages"]
        return (*rest, info)  # type: ignore[return-value]


COLOURS = {"red", "green", "blue", "white", "black", "grey"}


class ListsASet(LookupEnv):
    def begin(self, options: Mapping[str, Any]) -> str:
        return f"{super().begin(options)} Colours: {', '.join(COLOURS)}."


class AnswersByHash(LookupEnv):
    @tool
    def lookup(self, word: str) -> str:
        """See where a word leads."""
        return f"{super().lookup(word=word)} {hash(word)}"


class NamesItsStateByHash(LookupEnv):
    def state_key(self) -> str:
        return str(hash(super().state_key()))


class RewardsByHash(LookupEnv):
    def score(self, answer: str) -> dict[str, float]:
        return {**super().score(answer), "luck": hash(answer) / 2**64}

    reward_weights = {"exact": 1.0, "format": 0.1, "luck": 1.0}  # noqa: RUF012


class TellsHashesAside(LookupEnv):
    def details(self) -> dict[str, Any]:
        return {**super().details(), "order": list(COLOURS)}


class FailsByHash(LookupEnv):
    def begin(self, options: Mapping[str, Any]) -> str:
        if os.environ.get("PYTHONHASHSEED") == HASH_SEEDS[-1]:
            raise KeyError("no such colour")
        return super().begin(options)


@pytest.mark.parametrize(
    ("broken", "promise"),
    [
        (Unseeded, "seed"),
        (TouchesGlobalRandom, "random"),
        (SharesBetweenInstances, "disturbed"),
        (ForksShareState, "fork"),
        (ForgetsWhenPickled, "unpickled"),
        (EndsBothWays, "both terminated and truncated"),
        (NeverEnds, "ResetNeeded"),
        (Silent, "no answer"),
        (CrashesOnOddText, "surrogates"),
        (OracleErrs, "oracle"),
        (HidesMessages, "messages"),
        (ListsASet, r"ListsASet, seed 0: in a fresh .*hash seed, turn 0: observation is another.*\nfirst: .*\nthen: "),
        (AnswersByHash, "turn 1: observation"),
        (NamesItsStateByHash, "turn 0: state_key"),
        (RewardsByHash, "turn .: reward"),
        (TellsHashesAside, "turn 0: order"),
        (FailsByHash, f"PYTHONHASHSEED={HASH_SEEDS[-1]} it raises:(.|\n)*no such colour"),
    ],
)
def test_a_broken_promise_is_named(broken: type[LookupEnv], promise: str) -> None:
    with pytest.raises((AssertionError, UnicodeError), match=promise):
        check_env(broken)


class PaysWhole(LookupEnv):
    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        observation, reward, *rest = super().step(action)
        return (observation, int(reward), *rest)  # type: ignore[return-value]


class Clocked(LookupEnv):
    def begin(self, options: Mapping[str, Any]) -> str:
        return f"{super().begin(options)} It is {time.perf_counter_ns()}."


class Remembers(LookupEnv):
    """What it has seen stays from episode to episode."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.seen: list[str] = []

    @tool
    def lookup(self, word: str) -> str:
        """See where a word leads."""
        self.seen.append(word)
        return f"{super().lookup(word)} {len(self.seen)}"


class HoldsALock(LookupEnv):
    def begin(self, options: Mapping[str, Any]) -> str:
        self.mutex = threading.Lock()
        return super().begin(options)


class DividesByZero(LookupEnv):
    @tool
    def lookup(self, word: str) -> str:
        """See where a word leads."""
        return super().lookup(word) if len(word) < 9 else str(1 / 0)


class TellsNumbers(LookupEnv):
    @tool
    def lookup(self, word: str) -> str:
        """See where a word leads."""
        return f"{super().lookup(word)} {id(self)}"


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        (
            Clocked,
            r"Clocked, seed 0: .*\nturn 0: observation is another\nfirst: .*\nthen:  .*\nusually: .*clock",
        ),
        (
            Remembers,
            r"second reset .*\nturn 1: observation is .*\nfirst: .* 1.\nthen: .*\nusually: an attribute",
        ),
        (SharesBetweenInstances, r"disturbed each other\nturn \d+: .*\n.*\n.*\nusually: a list or a dict on the class"),
        (HoldsALock, r"turn 0: fork\(\) raised TypeError of mutex: .*\nusually: .*can_fork = False"),
        (
            DividesByZero,
            r"step\(\) raised ZeroDivisionError: .*\nturn \d+, the action .*\nusually: ToolError",
        ),
        (PaysWhole, r"turn 1: the reward 0 after .* is no float"),
        (TellsNumbers, r"turn 1: observation is another\nfirst: .*\nthen: "),
    ],
)
def test_turn_difference_cause_and_way_out_are_said(broken: type[LookupEnv], told: str) -> None:
    with pytest.raises(AssertionError, match=told):
        check_env(broken)


def test_few_environments_are_made() -> None:
    """Each may start a server."""
    made = 0

    def make() -> LookupEnv:
        nonlocal made
        made += 1
        return LookupEnv()

    check_env(make)
    assert 5 < made <= 20


class Few(LookupEnv):
    """Three tasks, with which it does not care for the split."""

    def begin(self, options: Mapping[str, Any]) -> str:
        self._np_random = np.random.default_rng(int(self.np_random.integers(3)))
        return super().begin(options)


class Parted(Few):
    def begin(self, options: Mapping[str, Any]) -> str:
        return f"{super().begin(options)} ({options.get('split', 'train')})"


def test_held_out_tasks_that_are_train_tasks_are_said() -> None:
    with pytest.warns(UserWarning, match=r"Few: options\['split'\] changes nothing, and . of 8 held-out tasks"):
        check_env(Few)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(Parted)
        check_env(LookupEnv)


def test_a_registered_environment_is_tried_in_a_fresh_interpreter_too() -> None:
    class Listing(ListsASet):
        """Of no module that can be imported."""

        can_fork = False

    gymnasium.register("tests/Listing-v0", Listing)
    try:
        with pytest.raises(AssertionError, match="Listing, seed 1: in a fresh interpreter"):
            check_env("tests/Listing-v0", seeds=[1])
    finally:
        del gymnasium.registry["tests/Listing-v0"]


def test_what_a_script_defines_is_tried_in_a_fresh_interpreter_too(tmp_path: Path) -> None:
    source = (
        Path(inspect.getfile(LookupEnv))
        .read_text()
        .replace("from ..", "from treegym.")
        .replace("from .", "from treegym.envs.")
    )
    script = tmp_path / "some.py"
    script.write_text(f"{source}\nfrom treegym.envs import check_env\ncheck_env(LookupEnv, seeds=[0])\nprint('kept')\n")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert done.stdout == "kept\n", done.stderr


def test_a_fresh_interpreter_starts_no_other_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """So a module that calls check_env when it is imported, as the fresh interpreter does, ends."""
    settings: list[Mapping[str, str]] = []
    run = subprocess.run

    def watched(command: Any, **options: Any) -> Any:
        settings.append(options["env"])
        return run(command, **options)

    monkeypatch.setattr(subprocess, "run", watched)
    check_env(LookupEnv, seeds=[0])
    assert len(settings) == len(HASH_SEEDS)
    monkeypatch.setenv(INSIDE, settings[0][INSIDE])
    check_env(LookupEnv, seeds=[0])
    assert len(settings) == len(HASH_SEEDS)


def test_what_a_fresh_interpreter_cannot_make_is_said() -> None:
    lock = threading.Lock()

    class Locked(LookupEnv):
        can_fork = False

        def begin(self, options: Mapping[str, Any]) -> str:
            with lock:
                return super().begin(options)

    with pytest.warns(UserWarning, match=r"Locked was not tried in a fresh interpreter .*cannot pickle.*module"):
        check_env(Locked, seeds=[0])


def test_what_cannot_be_copied_need_not_be() -> None:
    class Browser(LookupEnv):
        can_fork = False

        def fork(self) -> Self:
            raise AssertionError("never asked for")

        def __reduce__(self) -> str:
            raise TypeError("a browser cannot be pickled")

    check_env(Browser)

    class Forgetful(TextEnv):
        pass

    with pytest.raises(NotImplementedError, match="Forgetful has no fork"):
        Forgetful().fork()


def test_a_script_s_environment_with_tools_is_tried_in_fresh_interpreters(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    subprocess.run([sys.executable, "-W", "error", "script.py"], cwd=tmp_path, check=True)


SCRIPT = '''
from treegym.envs import ToolEnv, check_env
from treegym.tools import tool

class Outer(ToolEnv):
    def begin(self, options):
        return f"Say {self.np_random.integers(10**9)}."
    @tool
    def look(self, where: str) -> str:
        """Look somewhere."""
        return f"{type(self).__name__} sees {where}"
    def score(self, answer):
        return {"exact": 1.0}

class Inner(Outer):
    @tool
    def look(self, where: str) -> str:
        """Look somewhere else."""
        return super().look.function(self, where)

if __name__ == "__main__":
    check_env(Inner)
'''
