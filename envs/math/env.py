"""PythonMath: word problems, worked out with a Python interpreter."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...tools.sandbox import Limits, PythonTool
from ..problems import ProblemEnv
from .answers import same_answer
from .problems import MathProblem, generate, read_problems


class PythonMathEnv(ProblemEnv):
    """Compute, then answer. See ProblemEnv; `sandbox` and `limits` are those of `PythonTool`."""

    instructions = "Solve the problem. Compute with Python."
    max_turns = 4
    reward_weights: Mapping[str, float] = {"correct": 1.0, "format": 0.1}
    most_steps = 8
    problem: MathProblem

    def __init__(
        self,
        problems: str | Path | None = None,
        *,
        sandbox: str = "strongest",
        limits: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(problems, tools=[PythonTool(sandbox, Limits(**limits or {}))], **settings)

    @staticmethod
    def make(rng: random.Random, steps: int, heldout: bool) -> MathProblem:
        return generate(rng, steps, heldout=heldout)

    @staticmethod
    def read(path: Path) -> Sequence[MathProblem]:
        return read_problems(path)

    def details(self) -> dict[str, Any]:
        return {"steps": max(0, len(self.problem.steps) - 1), **super().details()}

    def score(self, answer: str) -> dict[str, float]:
        return {"correct": float(same_answer(answer, self.problem.answer))}

    def oracle(self) -> str | None:
        if self.over:
            return None
        if not self.problem.steps:  # a file tells the answer alone
            return self.write_answer(self.problem.answer)
        computed = [exchange.result for exchange in self.transcript if not exchange.result.failed]
        if computed:
            return self.write_answer(computed[-1].text.strip())
        steps = self.problem.wrong if self.errs else self.problem.steps
        return self.write_call("python", code="\n".join([*steps, "print(x)"]))
