"""Rollouts: the engine that grows trees, strategies, replay."""

from .engine import GrowingTree, Turn, grow, grow_trees
from .failure import Failure, FailureCause, TooManyFailures, failure_cause
from .replay import Continuation, Divergence, Episode, RewardTerm, played, rescore, verify
from .response import LENIENT, STRICT, Answer, Comparison, Difference, EpisodeError, OutsideSource, ReplayMismatch
from .strategies import (
    Budgeted,
    Chains,
    EntropyBranching,
    FollowOracle,
    RolloutStrategy,
    SomeChains,
    TreeExpansion,
    normalized_entropy,
)

__all__ = [
    "LENIENT",
    "STRICT",
    "Answer",
    "Budgeted",
    "Chains",
    "Comparison",
    "Continuation",
    "Difference",
    "Divergence",
    "EntropyBranching",
    "Episode",
    "EpisodeError",
    "Failure",
    "FailureCause",
    "FollowOracle",
    "GrowingTree",
    "OutsideSource",
    "ReplayMismatch",
    "RewardTerm",
    "RolloutStrategy",
    "SomeChains",
    "TooManyFailures",
    "TreeExpansion",
    "Turn",
    "failure_cause",
    "grow",
    "grow_trees",
    "normalized_entropy",
    "played",
    "rescore",
    "verify",
]
