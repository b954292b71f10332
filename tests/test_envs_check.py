"""check_env passes what ships, and catches an environment that breaks any one promise."""

import random
from collections.abc import Mapping
from typing import Any, Self

import numpy as np
import pytest

from treegym.envs import LookupEnv, Task, TextEnv, check_env, registered
from treegym.envs.formats import FORMATS
from treegym.tools import tool

USUAL = ("tagged", "hermes", "react", "fenced", "openai")  # those of model families are tried in one environment
SANDBOXED = ("treegym/Code-v0", "treegym/PythonMath-v0")  # slow; a format changes nothing inside their walls


@pytest.mark.parametrize(
    ("id", "format"),
    [(id, format) for id in registered() for format in (FORMATS if "Lookup" in id else USUAL) if id not in SANDBOXED],
)
def test_every_registered_environment_keeps_the_contract_in_every_format(id: str, format: str) -> None:
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
    ],
)
def test_a_broken_promise_is_named(broken: type[LookupEnv], promise: str) -> None:
    with pytest.raises((AssertionError, UnicodeError), match=promise):
        check_env(broken)


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
