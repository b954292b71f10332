"""Algorithms: a rollout strategy, an advantage estimator and a loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..agents import RolloutStrategy
from ..agents.rollouts import Chains, EntropyBranching, TreeExpansion
from .advantages.anchors import AnchorStates
from .advantages.estimators import AdvantageEstimator, GroupRelative, Norm, SharedMean, Sum
from .advantages.node_values import BackedUp
from .losses.comparisons import Comparisons
from .losses.sums import SumLoss
from .losses.terms import AggregationName, ClippedLoss, PolicyLoss, check_loss


@dataclass(frozen=True, slots=True)
class Algorithm:
    """What is grown for a task, how its turns are credited or what of it is compared, and what is minimised.

    ValueError where the loss is not one for such credits or comparisons.
    """

    rollout: RolloutStrategy
    advantage: AdvantageEstimator | Comparisons
    loss: PolicyLoss | SumLoss

    def __post_init__(self) -> None:
        if not isinstance(self.loss, SumLoss):
            check_loss(self.loss)
        makes = self.advantage.makes if isinstance(self.advantage, Comparisons) else "advantage"
        takes = self.loss.couples if isinstance(self.loss, SumLoss) else "advantage"
        if makes != takes:
            raise ValueError(
                f"{type(self.loss).__name__} takes {takes}s, and {type(self.advantage).__name__} makes {makes}s; "
                "GvpoLoss takes the groups that Groups makes, DpoLoss the pairs that Siblings makes"
            )


def grpo(
    n: int = 8,
    *,
    clip: float = 0.2,
    clip_high: float | None = None,
    aggregation: AggregationName = "seq-mean-token-mean",
) -> Algorithm:
    """Independent rollouts, each compared with its group. arXiv:2402.03300."""
    loss = ClippedLoss(clip, clip if clip_high is None else clip_high, aggregation=aggregation)
    return Algorithm(_group(n), GroupRelative(), loss)


def gigpo(
    n: int = 8, *, discount: float = 0.95, step_weight: float = 1.0, divide: bool = True, clip: float = 0.2
) -> Algorithm:
    """Whole rollouts compared as in GRPO, plus turns compared at states the group revisits. arXiv:2505.10978."""
    norm = Norm(divide)
    advantage = Sum((1.0, GroupRelative(norm)), (step_weight, AnchorStates(discount, norm)))
    return Algorithm(_group(n), advantage, ClippedLoss(clip, clip, aggregation="token-mean"))


def arpo(
    roots: int = 8,
    budget: int = 16,
    *,
    beam: int = 2,
    base: float = 0.5,
    weight: float = 0.2,
    threshold: float | None = None,
    hard: bool = False,
    clip: float = 0.2,
) -> Algorithm:
    """Rollouts that fork where the policy is unsure after a tool result, scored as in GRPO. arXiv:2507.19849.

    `hard`: a turn that rollouts share has one advantage, the mean of theirs."""
    rollout = EntropyBranching(roots, budget, beam, base, weight, threshold)
    advantage = SharedMean(GroupRelative()) if hard else GroupRelative()
    return Algorithm(rollout, advantage, ClippedLoss(clip, clip, dual_clip=3.0, aggregation="token-mean"))


def tree_grpo(
    trees: int = 2, expansions: int = 2, rounds: int = 1, *, keep: int | None = None, clip: float = 0.2
) -> Algorithm:
    """Trees of whole turns; rollouts compared over all trees, plus within their own. arXiv:2509.21240."""
    advantage = Sum((1.0, GroupRelative()), (1.0, GroupRelative(within="origin")))
    rollout = TreeExpansion(trees, expansions, rounds, keep=keep)
    return Algorithm(rollout, advantage, ClippedLoss(clip, clip, dual_clip=3.0, aggregation="token-mean"))


def at2po(
    chains: int = 4, expansions: int = 2, rounds: int = 2, *, clip: float = 3e-3, clip_high: float = 4e-3
) -> Algorithm:
    """One tree, whose unsurest turns are taken again; turns credited with the value of their node. arXiv:2601.04767.

    Its bounds are narrower than what sampler and learner differ by in bfloat16, so ratios start from the learner."""
    rollout = TreeExpansion(1, expansions, rounds, chains, choose="unsure")
    return Algorithm(rollout, BackedUp(), ClippedLoss(clip, clip_high, level="turn", old="learner"))


def _group(n: int) -> Chains:
    if n < 2:
        raise ValueError(f"n must be at least 2, got {n}: a rollout alone has no other to be compared with")
    return Chains(n)


ALGORITHMS: dict[str, Callable[..., Algorithm]] = {
    make.__name__: make for make in (grpo, gigpo, arpo, tree_grpo, at2po)
}
