"""The stages of a run: evaluations, a warm-up, the improvement, the distillation of lessons."""

from .distil import Distillation
from .evaluate import Evaluate
from .improve import Improvement
from .stage import Stage
from .warmup import Warmup

__all__ = ["Distillation", "Evaluate", "Improvement", "Stage", "Warmup"]
