"""Grading of code that nobody trusts: it answers calls in one sandbox, the tests judge the answers in another."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from ...tools.artefacts import cached_directory
from ...tools.sandbox import Execution, Interpreter, Limits, SandboxError, open_sandbox
from .problems import CodeProblem

LIMITS = Limits(seconds=8, cpu=2, output=200_000)  # of one call of the code, and of one run of the tests
SECONDS = 60.0  # of all calls of the code in a grading, after which it gets no more
MAX_LOSSES = 3  # calls that may end the code's interpreter before it gets no more
MAX_ROUNDS = 20  # runs of the tests, each of which knows the answers to what the ones before asked
# What a call gives where the answer's function is only `pass`, and where the answer is empty.
EMPTY: tuple[dict[str, Any], ...] = ({"value": None}, {"error": "NameError"})
UNGRADED = "its own solution does not pass its tests, or an empty answer does"
NOTHING = dict.fromkeys(("reached", "held", "total", "passed"), 0)


@dataclass(frozen=True, slots=True)
class Verdict:
    """How many of the tests' assertions hold, of those that an empty answer fails."""

    passed: int
    total: int

    @property
    def share(self) -> float:
        return self.passed / self.total if self.total else 0.0

    @property
    def solved(self) -> bool:
        return self.passed == self.total > 0


def grade(problem: CodeProblem, code: str, sandbox: str = "strongest") -> Verdict:
    """The verdict of the problem's tests on the code. ValueError where the problem cannot be graded.

    An assertion that an empty answer passes too earns nothing, but a wrong answer may lose by it.
    """
    hollow, best = _best(problem, sandbox)
    if not best["total"]:
        raise ValueError(f"the problem {problem.id} cannot be graded: {UNGRADED}")
    with contextlib.closing(_start(sandbox)) as judge:
        counts = _counts(problem, problem.tests, code, judge, sandbox, hollow)
    failed = counts["reached"] - counts["held"]  # a test that loops over a long answer may reach more
    missed = best["held"] - min(counts["held"], best["held"] - failed)
    return Verdict(max(0, min(counts["passed"], best["total"] - missed)), best["total"])


def can_grade(problem: CodeProblem, sandbox: str = "strongest") -> bool:
    """Whether its own solution passes its tests here, and an empty answer fails one of them."""
    return _best(problem, sandbox)[1]["total"] > 0


def try_examples(problem: CodeProblem, code: str, sandbox: str = "strongest") -> Verdict:
    """The verdict of the examples, which an agent may see; all of them count."""
    with contextlib.closing(_start(sandbox)) as judge:
        counts = _counts(problem, problem.examples, code, judge, sandbox, {})
    return Verdict(counts["held"], counts["reached"])


@functools.cache
def untested(problems: tuple[CodeProblem, ...], sandbox: str = "strongest") -> tuple[str, ...]:
    """Ids of the problems without an assertion that an empty answer fails; kept in the cache folder."""

    def build(folder: Path) -> None:
        with contextlib.closing(_start(sandbox)) as judge:
            found = [problem.id for problem in problems if not _tests_something(_surveys(problem, judge))]
        (folder / "untested.json").write_text(json.dumps(found))

    about = repr((problems, _inside("guest_check"), EMPTY, sys.version_info[:2]))
    folder = cached_directory("untested", hashlib.sha256(about.encode()).hexdigest(), build)
    return tuple(json.loads((folder / "untested.json").read_text()))


@functools.lru_cache(4096)
def _best(problem: CodeProblem, sandbox: str) -> tuple[dict[str, str], dict[str, int]]:
    """The problem's hollow assertions (place -> hexadecimal bits, the nth for the nth time that it is reached), and the
    counts of the problem's own solution: zeros if that does not pass all."""
    hollow: dict[str, int] = {}
    with contextlib.closing(_start(sandbox)) as judge:
        for survey in _surveys(problem, judge):
            for place, bits in survey["held"].items():
                hollow[place] = hollow.get(place, 0) | int(bits, 16)
        written = {place: hex(bits) for place, bits in hollow.items()}
        counts = _counts(problem, problem.tests, problem.solution, judge, sandbox, written)
    return written, counts if counts["held"] == counts["reached"] else NOTHING


def _surveys(problem: CodeProblem, judge: Interpreter) -> list[dict[str, Any]]:
    """For each empty answer, which assertions hold; none where the tests run for too long."""
    calls = (f"survey({problem.before!r}, {problem.tests!r}, {list(problem.functions)!r}, {x!r})" for x in EMPTY)
    replies = (_reply(judge.run(f"{_inside('guest_check')}\n{call}", apart=True)) for call in calls)
    return [reply or {"held": {}, "reached": {}, "whole": False} for reply in replies]


def _tests_something(surveys: Sequence[dict[str, Any]]) -> bool:
    """Whether some assertion fails for every empty answer; True where no run of the tests came to its end."""
    if not any(survey["whole"] for survey in surveys):
        return True
    held = {(place, time) for s in surveys for place, bits in s["held"].items() for time in _bits(int(bits, 16))}
    return any((place, time) not in held for s in surveys for place, n in s["reached"].items() for time in range(n))


def _bits(number: int) -> Iterator[int]:
    return (place for place in range(number.bit_length()) if number >> place & 1)


def _counts(
    problem: CodeProblem, tests: str, code: str, judge: Interpreter, sandbox: str, hollow: dict[str, str]
) -> dict[str, int]:
    """How many assertions were `reached` and `held`, and the same without hollow ones, `total` and `passed`."""
    answers: dict[str, Any] = {}
    with contextlib.closing(_Subject(problem, code, sandbox)) as subject:
        for _ in range(MAX_ROUNDS):
            known = f"json.loads({json.dumps(answers)!r}), {hollow!r}"
            call = f"tally({problem.before!r}, {tests!r}, {list(problem.functions)!r}, {known})"
            tally = _reply(judge.run(f"{_inside('guest_check')}\n{call}", apart=True))
            if tally is None:
                return NOTHING
            wanted = tally.pop("wanted")
            if not wanted:
                return tally
            answers |= {call: subject.answer(call) for call in wanted}
    return NOTHING


class _Subject:
    """The code under test in its own interpreter, loaded again after a call that ended it."""

    def __init__(self, problem: CodeProblem, code: str, sandbox: str) -> None:
        self._problem, self._code = problem, code
        self._programs: list[str] | None = None
        self._interpreter = _start(sandbox)
        self._loaded = False
        self._losses = 0
        self._seconds = 0.0

    def answer(self, call: str) -> dict[str, Any]:
        """The encoded value that the call returned, or the name of its error."""
        if self._losses >= MAX_LOSSES or self._seconds >= SECONDS:
            return {"error": "Lost"}
        start = time.monotonic()
        try:
            if not self._loaded:
                self._load()
            source = f"{_inside('guest_check')}\nanswer(agent, {call!r})"
            outcome = self._note(self._interpreter.run(source, apart=True))
        except SandboxError:
            self._losses = MAX_LOSSES
            return {"error": "Lost"}
        finally:
            self._seconds += time.monotonic() - start
        reply = _reply(outcome)
        return reply if reply and reply.keys() in ({"value"}, {"error"}) else {"error": "Unreadable"}

    def _load(self) -> None:
        self._loaded = True
        if self._programs is None:
            self._programs = self._read()  # before any of it has run
        for program in self._programs:
            self._note(self._interpreter.run(program))

    def _read(self) -> list[str]:
        """The programs to run, extracted from the answer; the answer itself where that fails."""
        call = f"programs({self._code!r}, {list(self._problem.functions)!r}, {self._problem.start!r})"
        source = f"{_inside('guest_answer')}\nimport json\nprint(json.dumps({{'programs': {call}}}))"
        reply = _reply(self._note(self._interpreter.run(source, apart=True)))
        return [program for program in reply["programs"] if program] if reply else [self._code]

    def _note(self, outcome: Execution) -> Execution:
        if outcome.lost:
            self._losses += 1
            self._loaded = False
        return outcome

    def close(self) -> None:
        self._interpreter.close()


def _start(sandbox: str) -> Interpreter:
    return open_sandbox(sandbox).start(LIMITS, 0)


def _reply(outcome: Execution) -> dict[str, Any] | None:
    """The JSON object that was printed, if one was."""
    if outcome.failed or outcome.size > len(outcome.text):
        return None
    try:
        reply = json.loads(outcome.text)
    except (ValueError, RecursionError):
        return None
    return reply if isinstance(reply, dict) else None


@functools.cache
def _inside(name: str) -> str:
    return resources.files(__package__).joinpath(f"{name}.py").read_text()
