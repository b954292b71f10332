"""Credit assignment, losses, packing, and the training loop."""

from .advantages import AdvantageEstimator, BestOnly, GroupRelative, Norm, SharedMean, Sum, TokenReturns, Whitened
from .algorithms import ALGORITHMS, Algorithm, arpo, at2po, gigpo, grpo, tree_grpo
from .anchors import AnchorStates, HistoryAnchors
from .comparisons import Compared, Comparisons, Groups, Siblings
from .gae import GroupedGAE, bi_level_gae, gae
from .learner import Learner, Optimization
from .losses import (
    AGGREGATIONS,
    CispoLoss,
    ClippedLoss,
    GeometricLoss,
    PolicyLoss,
    ReinforceLoss,
    SapoLoss,
    TruncatedImportance,
    WithEntropy,
    WithKL,
    kl,
)
from .node_values import BackedUp, PrefixGroups, SummedLeaves
from .packing import Advantages, Pack, ScoredTree, Segment, Terms, TurnAdvantage, by_turn, pack, score, split
from .plan import Environment, HeldOut, Keep, OnFailure, Plan
from .run import DamagedCheckpoint, Progress, Run
from .stages import Evaluate, Improvement, Stage, Warmup
from .sum_losses import DpoLoss, GvpoLoss, SumLoss, Sums
from .training import LearningPolicy, Stopped, Trainer, Watcher

__all__ = [
    "AGGREGATIONS",
    "ALGORITHMS",
    "AdvantageEstimator",
    "Advantages",
    "Algorithm",
    "AnchorStates",
    "BackedUp",
    "BestOnly",
    "CispoLoss",
    "ClippedLoss",
    "Compared",
    "Comparisons",
    "DamagedCheckpoint",
    "DpoLoss",
    "Environment",
    "Evaluate",
    "GeometricLoss",
    "GroupRelative",
    "GroupedGAE",
    "Groups",
    "GvpoLoss",
    "HeldOut",
    "HistoryAnchors",
    "Improvement",
    "Keep",
    "Learner",
    "LearningPolicy",
    "Norm",
    "OnFailure",
    "Optimization",
    "Pack",
    "Plan",
    "PolicyLoss",
    "PrefixGroups",
    "Progress",
    "ReinforceLoss",
    "Run",
    "SapoLoss",
    "ScoredTree",
    "Segment",
    "SharedMean",
    "Siblings",
    "Stage",
    "Stopped",
    "Sum",
    "SumLoss",
    "SummedLeaves",
    "Sums",
    "Terms",
    "TokenReturns",
    "Trainer",
    "TruncatedImportance",
    "TurnAdvantage",
    "Warmup",
    "Watcher",
    "Whitened",
    "WithEntropy",
    "WithKL",
    "arpo",
    "at2po",
    "bi_level_gae",
    "by_turn",
    "gae",
    "gigpo",
    "grpo",
    "kl",
    "pack",
    "score",
    "split",
    "tree_grpo",
]
