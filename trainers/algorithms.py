"""Algorithms: a rollout strategy, an advantage estimator and a loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..agents import Chains, RolloutStrategy
from .advantages import AdvantageEstimator, GroupRelative, Norm, Sum
from .anchors import AnchorStates
from .losses import AggregationName, ClippedLoss, PolicyLoss


@dataclass(frozen=True, slots=True)
class Algorithm:
    """What is grown for a task, how it is scored, and what is minimised."""

    rollout: RolloutStrategy
    advantage: AdvantageEstimator
    loss: PolicyLoss


def grpo(
    n: int = 8,
    *,
    clip: float = 0.2,
    clip_high: float | None = None,
    aggregation: AggregationName = "seq-mean-token-mean",
) -> Algorithm:
    """Independent rollouts, each compared with its group. arXiv:2402.03300."""
    loss = ClippedLoss(clip, clip if clip_high is None else clip_high, aggregation=aggregation)
    return Algorithm(Chains(_at_least_one(n)), GroupRelative(), loss)


def gigpo(
    n: int = 8, *, discount: float = 0.95, step_weight: float = 1.0, divide: bool = True, clip: float = 0.2
) -> Algorithm:
    """Whole rollouts compared as in GRPO, plus turns compared at states the group revisits. arXiv:2505.10978."""
    norm = Norm(divide)
    advantage = Sum((1.0, GroupRelative(norm)), (step_weight, AnchorStates(discount, norm)))
    return Algorithm(Chains(_at_least_one(n)), advantage, ClippedLoss(clip, clip, aggregation="token-mean"))


def _at_least_one(n: int) -> int:
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    return n


ALGORITHMS: dict[str, Callable[..., Algorithm]] = {"grpo": grpo, "gigpo": gigpo}
