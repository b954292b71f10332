"""The learner: optimiser steps from packed trees, and checkpoints."""

from .checkpoints import Checkpoints, DamagedCheckpoint, Progress
from .learner import Learner, Optimization

__all__ = [
    "Checkpoints",
    "DamagedCheckpoint",
    "Learner",
    "Optimization",
    "Progress",
]
