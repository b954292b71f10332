"""Algorithms: a rollout strategy, an advantage estimator and a loss."""

from __future__ import annotations

from dataclasses import dataclass

from ..agents import Chains, RolloutStrategy
from .advantages import AdvantageEstimator, GroupRelative
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
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    loss = ClippedLoss(clip, clip if clip_high is None else clip_high, aggregation=aggregation)
    return Algorithm(Chains(n), GroupRelative(), loss)


ALGORITHMS = {"grpo": grpo}
