"""Advantage estimators: how much better each turn of each rollout was than expected."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from ..agents import RolloutTree
from .packing import Advantages


class AdvantageEstimator(Protocol):
    """Scores every turn of the trees grown for one task."""

    def __call__(self, trees: Sequence[RolloutTree]) -> list[Advantages]:
        """[tree][rollout][turn]."""
        ...


@dataclass(frozen=True, slots=True)
class GroupRelative:
    """A rollout's return against its group's, the same for all its turns (GRPO, arXiv:2402.03300 sec. 4.1.2).

    The paper divides by the standard deviation; `divide=False` leaves that out (Dr.GRPO, arXiv:2503.20783).
    A group of one has nothing to compare with: "zero" as in TRL, or its "raw" return as in verl.
    """

    divide: bool = True
    ddof: Literal[0, 1] = 1
    eps: float = 1e-6
    alone: Literal["zero", "raw"] = "zero"

    @classmethod
    def verl(cls) -> GroupRelative:
        return cls(alone="raw")

    @classmethod
    def trl(cls) -> GroupRelative:
        return cls(eps=1e-4)

    def __call__(self, trees: Sequence[RolloutTree]) -> list[Advantages]:
        scores = iter(self.standardize([score for tree in trees for score in tree.returns]))
        return [[[next_score] * len(path) for path, next_score in zip(tree.paths, scores)] for tree in trees]  # noqa: B905

    def standardize(self, returns: Sequence[float]) -> list[float]:
        """Advantages of one group; zeros when the returns are equal."""
        if len(returns) == 1:
            return [returns[0] if self.alone == "raw" else 0.0]
        if min(returns) == max(returns):  # their mean may be off by a rounding
            return [0.0] * len(returns)
        mean = math.fsum(returns) / len(returns)
        if not self.divide:
            return [x - mean for x in returns]
        deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in returns) / (len(returns) - self.ddof))
        return [(x - mean) / (deviation + self.eps) for x in returns]
