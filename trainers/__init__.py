"""Credit assignment, losses, packing, and the training loop."""

from .advantages import AdvantageEstimator, GroupRelative
from .algorithms import ALGORITHMS, Algorithm, grpo
from .learner import Learner, Optimization
from .losses import AGGREGATIONS, ClippedLoss, ImitationLoss, PolicyLoss
from .packing import Advantages, Pack, ScoredTree, Segment, Terms, pack, score, split
from .run import Progress, Run
from .training import Environment, HeldOut, Improvement, Plan, Stopped, Trainer, Warmup, Watcher

__all__ = [
    "AGGREGATIONS",
    "ALGORITHMS",
    "AdvantageEstimator",
    "Advantages",
    "Algorithm",
    "ClippedLoss",
    "Environment",
    "GroupRelative",
    "HeldOut",
    "ImitationLoss",
    "Improvement",
    "Learner",
    "Optimization",
    "Pack",
    "Plan",
    "PolicyLoss",
    "Progress",
    "Run",
    "ScoredTree",
    "Segment",
    "Stopped",
    "Terms",
    "Trainer",
    "Warmup",
    "Watcher",
    "grpo",
    "pack",
    "score",
    "split",
]
