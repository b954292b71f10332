"""Credit assignment, losses, packing, and the training loop."""

from .advantages.anchors import AnchorStates, HistoryAnchors
from .advantages.estimators import (
    AdvantageEstimator,
    BestOnly,
    GroupRelative,
    Norm,
    SharedMean,
    Sum,
    TokenReturns,
    Whitened,
    spread,
)
from .advantages.gae import GroupedGAE, bi_level_gae, gae
from .advantages.node_values import BackedUp, PrefixGroups, SummedLeaves
from .algorithms import ALGORITHMS, Algorithm, arpo, at2po, gigpo, grpo, tree_grpo
from .curriculum import Curriculum, Mixture, Part, TaskSource, Uniform
from .learner.checkpoints import Checkpoints, DamagedCheckpoint, Progress
from .learner.learner import Learner, Optimization
from .losses.comparisons import Compared, Comparisons, Groups, Siblings
from .losses.sums import DpoLoss, GvpoLoss, SumLoss, Sums
from .losses.terms import (
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
from .packing import Advantages, Pack, ScoredTree, Segment, Terms, TurnAdvantage, pack, plain, score, split
from .plan import HeldOut, Keep, OnFailure, Plan
from .stages import Evaluate, Improvement, Stage, Warmup
from .tasks import Environment
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
    "Checkpoints",
    "CispoLoss",
    "ClippedLoss",
    "Compared",
    "Comparisons",
    "Curriculum",
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
    "Mixture",
    "Norm",
    "OnFailure",
    "Optimization",
    "Pack",
    "Part",
    "Plan",
    "PolicyLoss",
    "PrefixGroups",
    "Progress",
    "ReinforceLoss",
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
    "TaskSource",
    "Terms",
    "TokenReturns",
    "Trainer",
    "TruncatedImportance",
    "TurnAdvantage",
    "Uniform",
    "Warmup",
    "Watcher",
    "Whitened",
    "WithEntropy",
    "WithKL",
    "arpo",
    "at2po",
    "bi_level_gae",
    "gae",
    "gigpo",
    "grpo",
    "kl",
    "pack",
    "plain",
    "score",
    "split",
    "spread",
    "tree_grpo",
]
