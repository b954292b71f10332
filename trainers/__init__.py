"""Credit assignment, losses, packing, and the training loop."""

from ..agents import Advantages, Stopped, Watcher
from .advantages.estimators import AdvantageEstimator, spread
from .algorithms import ALGORITHMS, Algorithm, arpo, at2po, gigpo, grpo, tree_grpo
from .curriculum import Curriculum, Mixture, Part, TaskSource, Uniform
from .learner.learner import Learner, Optimization
from .losses.terms import PolicyLoss
from .packing import Terms
from .plan import HeldOut, Keep, OnFailure, Plan
from .stages import Distillation, Evaluate, Improvement, Stage, Warmup
from .tasks import TaskSet
from .training import LearningPolicy, Trainer

__all__ = [
    "ALGORITHMS",
    "AdvantageEstimator",
    "Advantages",
    "Algorithm",
    "Curriculum",
    "Distillation",
    "Evaluate",
    "HeldOut",
    "Improvement",
    "Keep",
    "Learner",
    "LearningPolicy",
    "Mixture",
    "OnFailure",
    "Optimization",
    "Part",
    "Plan",
    "PolicyLoss",
    "Stage",
    "Stopped",
    "TaskSet",
    "TaskSource",
    "Terms",
    "Trainer",
    "Uniform",
    "Warmup",
    "Watcher",
    "arpo",
    "at2po",
    "gigpo",
    "grpo",
    "spread",
    "tree_grpo",
]
