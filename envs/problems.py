"""Environments of one problem an episode: made up, or out of a file."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

from .toolenv import ToolEnv


class Problem(Protocol):
    """What an episode is about."""

    @property
    def id(self) -> str: ...

    @property
    def question(self) -> str: ...

    @property
    def wrong(self) -> Any: ...  # what an erring oracle thinks; false where it knows no error to make


class ProblemEnv(ToolEnv):
    """Problems are made up, of as many `steps` as one of the given numbers, or are those of a file, of which every
    fifth is held out. Options of reset, which override the settings of the same name: `split` ("train" or "heldout"),
    `steps`, and `problem`, the id of one in the file. `oracle_error` is the probability that the oracle errs.

    Subclasses say how problems are made and read.
    """

    shared: ClassVar[frozenset[str]] = ToolEnv.shared | {"problems", "problem"}
    runs_code = True
    most_steps: ClassVar[int]
    problem: Any

    def __init__(
        self,
        problems: str | Path | None = None,
        *,
        split: str = "train",
        steps: Sequence[int] = (1, 2, 3),
        oracle_error: float = 0.0,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self.problems = _read(self.read, str(problems)) if problems else None
        self.split, self.steps, self.oracle_error = split, tuple(steps), oracle_error

    @staticmethod
    def make(rng: random.Random, steps: int, heldout: bool) -> Problem:
        raise NotImplementedError

    @staticmethod
    def read(path: Path) -> Sequence[Problem]:
        """ValueError names file, row and field."""
        raise NotImplementedError

    def begin(self, options: Mapping[str, Any]) -> str:
        split = options.get("split", self.split)
        if split not in ("train", "heldout"):
            raise ValueError(f"no split {split!r}; splits: train, heldout")
        rng = random.Random(int(self.np_random.integers(2**62)))
        self.problem = self._draw(rng, split, options)
        self.errs = rng.random() < self.oracle_error and bool(self.problem.wrong)
        return str(self.problem.question)

    def _draw(self, rng: random.Random, split: str, options: Mapping[str, Any]) -> Problem:
        if self.problems is None:
            steps = rng.choice(list(options.get("steps", self.steps)))
            if not 1 <= steps <= self.most_steps:
                raise ValueError(f"problems have 1 to {self.most_steps} steps, got {steps}")
            return self.make(rng, steps, split == "heldout")
        if "problem" in options:
            found = [problem for problem in self.problems if problem.id == options["problem"]]
            if not found or not self.usable(found[0]):
                fault = "cannot be scored" if found else "is not in the file"
                raise ValueError(f"the problem {options['problem']!r} {fault}")
            return found[0]
        pool = [p for i, p in enumerate(self.problems) if (i % 5 == 4) == (split == "heldout")]
        while pool:
            problem = pool.pop(rng.randrange(len(pool)))
            if self.usable(problem):
                return problem
        raise ValueError(f"the file has no problem of the split {split!r} that can be scored")

    def usable(self, problem: Any) -> bool:
        """Whether its answers can be scored; others are not drawn."""
        return True

    def details(self) -> dict[str, Any]:
        return {"problem": self.problem.id}

    def situation(self) -> Any:
        return self.problem.id


@functools.cache
def _read(read: Callable[[Path], Sequence[Problem]], path: str) -> tuple[Problem, ...]:
    return tuple(read(Path(path)))
