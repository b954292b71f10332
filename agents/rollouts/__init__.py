"""Rollouts: the engine that grows trees, strategies, replay."""

from .engine import GrowingTree, Turn, grow, grow_trees
from .failure import Failure, FailureCause, TooManyFailures, failure_cause
from .replay import Continuation, Divergence, Episode, LostTurn, RewardTerm, lost_turns, played, rescore, verify
from .response import (
    LENIENT,
    STRICT,
    Difference,
    EpisodeError,
    OutsideSource,
    Recall,
    ReplayMismatch,
    Response,
    Strictness,
)
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
    "Budgeted",
    "Chains",
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
    "LostTurn",
    "OutsideSource",
    "Recall",
    "ReplayMismatch",
    "Response",
    "RewardTerm",
    "RolloutStrategy",
    "SomeChains",
    "Strictness",
    "TooManyFailures",
    "TreeExpansion",
    "Turn",
    "failure_cause",
    "grow",
    "grow_trees",
    "lost_turns",
    "normalized_entropy",
    "played",
    "rescore",
    "verify",
]
