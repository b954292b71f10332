"""PythonMath: word problems, worked out with a Python interpreter."""

from __future__ import annotations

import functools
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from ..tools import Limits, PythonTool
from .mathproblems import Problem, generate, read_problems, same_answer
from .toolenv import ToolEnv


class PythonMathEnv(ToolEnv):
    """Compute, then answer.

    Problems are made up, of as many `steps` as one of the given numbers, or are those of a file (see `read_problems`),
    of which every fifth is held out. Options of reset, which override the settings of the same name: `split` ("train"
    or "heldout"), `steps`, and `problem`, the id of one in the file. `oracle_error` is the probability that the oracle
    misreads a step. `sandbox` and `limits` are those of `PythonTool`.
    """

    instructions = "Solve the problem. Compute with Python."
    max_turns = 4
    reward_weights: Mapping[str, float] = {"correct": 1.0, "format": 0.1}
    shared: ClassVar[frozenset[str]] = ToolEnv.shared | {"problems", "problem"}

    def __init__(
        self,
        problems: str | Path | None = None,
        *,
        split: str = "train",
        steps: Sequence[int] = (1, 2, 3),
        oracle_error: float = 0.0,
        sandbox: str = "strongest",
        limits: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(tools=[PythonTool(sandbox, Limits(**limits or {}))], **settings)
        self.problems = _read(str(problems)) if problems else None
        self.split, self.steps, self.oracle_error = split, tuple(steps), oracle_error

    def begin(self, options: Mapping[str, Any]) -> str:
        split = options.get("split", self.split)
        if split not in ("train", "heldout"):
            raise ValueError(f"no split {split!r}; splits: train, heldout")
        rng = random.Random(int(self.np_random.integers(2**62)))
        self.problem = self._draw(rng, split, options)
        self.misread = rng.random() < self.oracle_error and bool(self.problem.wrong)
        return self.problem.question

    def _draw(self, rng: random.Random, split: str, options: Mapping[str, Any]) -> Problem:
        if self.problems is None:
            steps = rng.choice(list(options.get("steps", self.steps)))
            if not 1 <= steps <= 8:
                raise ValueError(f"problems have 1 to 8 steps, got {steps}")
            return generate(rng, steps, heldout=split == "heldout")
        if "problem" in options:
            found = [problem for problem in self.problems if problem.id == options["problem"]]
            if not found:
                raise ValueError(f"no problem {options['problem']!r} in the file")
            return found[0]
        pool = [p for i, p in enumerate(self.problems) if (i % 5 == 4) == (split == "heldout")]
        if not pool:
            raise ValueError(f"the file has no problem of the split {split!r}")
        return rng.choice(pool)

    def details(self) -> dict[str, Any]:
        return {"steps": max(0, len(self.problem.steps) - 1), "problem": self.problem.id}

    def situation(self) -> Any:
        return self.problem.id

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
        steps = self.problem.wrong if self.misread else self.problem.steps
        return self.write_call("python", code="\n".join([*steps, "print(x)"]))


@functools.cache
def _read(path: str) -> tuple[Problem, ...]:
    return tuple(read_problems(Path(path)))
