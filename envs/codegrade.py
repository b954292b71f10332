"""Grading of code that nobody trusts: it answers calls in one sandbox, the tests judge the answers in another."""

from __future__ import annotations

import contextlib
import functools
import json
import time
from dataclasses import dataclass
from importlib import resources
from typing import Any

from ..tools import Interpreter, Limits, Outcome, SandboxError, open_sandbox
from .codeproblems import CodeProblem

LIMITS = Limits(seconds=8, cpu=2, output=200_000)  # of one call of the code, and of one run of the tests
SECONDS = 60.0  # of all calls of the code in a grading, after which it gets no more
MAX_LOSSES = 3  # calls that may end the code's interpreter before it gets no more
MAX_ROUNDS = 20  # runs of the tests, each of which knows the answers to what the ones before asked


@dataclass(frozen=True, slots=True)
class Verdict:
    """How many of the tests' assertions hold."""

    passed: int
    total: int

    @property
    def share(self) -> float:
        return self.passed / self.total if self.total else 0.0

    @property
    def solved(self) -> bool:
        return self.passed == self.total > 0


def grade(problem: CodeProblem, code: str, sandbox: str = "strongest") -> Verdict:
    """The verdict of the problem's tests on the code. ValueError where not even its own solution passes them."""
    total = _total(problem, sandbox)
    if not total:
        raise ValueError(f"the problem {problem.id} cannot be graded: its own solution does not pass its tests")
    passed, reached = _passed(problem, problem.tests, code, sandbox)
    failed = reached - passed  # a test that loops over an answer may reach more assertions than there are
    return Verdict(max(0, min(passed, total - failed)), total)


def can_grade(problem: CodeProblem, sandbox: str = "strongest") -> bool:
    """Whether its own solution passes its tests here."""
    return _total(problem, sandbox) > 0


def try_examples(problem: CodeProblem, code: str, sandbox: str = "strongest") -> Verdict:
    """The verdict of the examples, which an agent may see."""
    return Verdict(*_passed(problem, problem.examples, code, sandbox))


@functools.lru_cache(4096)
def _total(problem: CodeProblem, sandbox: str) -> int:
    """Assertions that the problem's own solution reaches; 0 if it does not pass them all."""
    passed, total = _passed(problem, problem.tests, problem.solution, sandbox)
    return total if passed == total else 0


def _passed(problem: CodeProblem, tests: str, code: str, sandbox: str) -> tuple[int, int]:
    """Assertions that hold, and those that were reached."""
    answers: dict[str, Any] = {}
    with contextlib.closing(_Subject(code, sandbox)) as subject, contextlib.closing(_start(sandbox)) as judge:
        for _ in range(MAX_ROUNDS):
            known = json.dumps(answers)
            call = f"tally({problem.before!r}, {tests!r}, {list(problem.functions)!r}, json.loads({known!r}))"
            tally = _reply(judge.run(f"{_inside()}\n{call}", apart=True))
            if tally is None:
                return 0, 0
            if not tally["wanted"]:
                return tally["passed"], tally["total"]
            answers |= {call: subject.answer(call) for call in tally["wanted"]}
    return 0, 0


class _Subject:
    """The code under test in its own interpreter, loaded anew after a call that ended it."""

    def __init__(self, code: str, sandbox: str) -> None:
        self._code = code
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
                self._loaded = True
                self._note(self._interpreter.run(self._code))
            outcome = self._note(self._interpreter.run(f"{_inside()}\nanswer(agent, {call!r})", apart=True))
        except SandboxError:
            self._losses = MAX_LOSSES
            return {"error": "Lost"}
        finally:
            self._seconds += time.monotonic() - start
        reply = _reply(outcome)
        return reply if reply and reply.keys() in ({"value"}, {"error"}) else {"error": "Unreadable"}

    def _note(self, outcome: Outcome) -> Outcome:
        if outcome.lost:
            self._losses += 1
            self._loaded = False
        return outcome

    def close(self) -> None:
        self._interpreter.close()


def _start(sandbox: str) -> Interpreter:
    return open_sandbox(sandbox).start(LIMITS, 0)


def _reply(outcome: Outcome) -> dict[str, Any] | None:
    """The JSON object that was printed, if one was."""
    if outcome.failed or outcome.size > len(outcome.text):
        return None
    try:
        reply = json.loads(outcome.text)
    except (ValueError, RecursionError):
        return None
    return reply if isinstance(reply, dict) else None


@functools.cache
def _inside() -> str:
    return resources.files(__package__).joinpath("codecheck.py").read_text()
