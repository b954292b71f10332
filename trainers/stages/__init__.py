"""The stages of a run: evaluations, a warm-up, the improvement."""

from .evaluate import Evaluate
from .improve import Improvement
from .stage import Stage
from .warmup import Warmup

__all__ = ["Evaluate", "Improvement", "Stage", "Warmup"]
