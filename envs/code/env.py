"""Code: a function to write or to repair until its tests pass."""

from __future__ import annotations

import random
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...tools import tool
from ...tools.sandbox import Limits, PythonTool
from ..problems import ProblemEnv
from .grade import can_grade, grade, try_examples, untested
from .problems import CodeProblem, generate, read_problems


class CodeEnv(ProblemEnv):
    """Try, then answer with the code, which hidden tests judge. See ProblemEnv.

    Terms: `passed`, the fraction of hidden tests that hold, and `solved`, 1.0 if all do. An oracle that errs answers
    its first idea untried. The tool `test` runs the examples; with `python`, a `PythonTool` is there too. `sandbox` and
    `limits` are as for `PythonTool`.
    """

    instructions = "Write the Python function. Test it, then answer with its code."
    max_turns = 4
    reward_weights: Mapping[str, float] = {"solved": 1.0, "passed": 0.0, "format": 0.1}
    most_steps = 6
    problem: CodeProblem

    def __init__(
        self,
        problems: str | Path | None = None,
        *,
        python: bool = False,
        sandbox: str = "strongest",
        limits: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        tools = [PythonTool(sandbox, Limits(**limits or {}))] if python else []
        super().__init__(problems, tools=tools, **settings)
        self.sandbox = sandbox
        if self.problems and (ids := untested(self.problems, sandbox)):
            warnings.warn(
                f"{problems}: {len(ids)} of {len(self.problems)} problems have no test that an empty answer fails; "
                f"they are not drawn: {', '.join(ids[:10])}",
                stacklevel=2,
            )

    @staticmethod
    def make(rng: random.Random, steps: int, heldout: bool) -> CodeProblem:
        return generate(rng, steps, heldout=heldout)

    @staticmethod
    def read(path: Path) -> Sequence[CodeProblem]:
        return read_problems(path)

    def usable(self, problem: CodeProblem) -> bool:
        return can_grade(problem, self.sandbox)

    @tool
    def test(self, code: str) -> str:
        """Run the code on the examples."""
        if not self.problem.examples:
            return "there are no examples"
        verdict = try_examples(self.problem, code, self.sandbox)
        return f"{verdict.passed} of {verdict.total} hold: {self.problem.examples}"

    def score(self, answer: str) -> dict[str, float]:
        verdict = grade(self.problem, answer, self.sandbox)
        return {"solved": float(verdict.solved), "passed": verdict.share}

    def oracle(self) -> str | None:
        if self.over:
            return None
        if self.errs:
            return self.write_answer(self.problem.wrong)
        if self.transcript:
            return self.write_answer(self.problem.solution)
        return self.write_call("test", code=self.problem.solution)
