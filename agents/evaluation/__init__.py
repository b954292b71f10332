"""Evaluation: outcomes, figures, statistics, comparisons, and the loop that plays."""

from .compare import Comparison, Curves, Flip, PairedResult, compare, curves, flips, paired
from .figures import Evaluation, by_difficulty, figures
from .outcomes import AnswerReader, Outcome, TaskOutcome, distinct, succeeded
from .run import Budget, evaluate, evaluate_async, read_evaluation
from .statistics import Interval, paired_difference

__all__ = [
    "AnswerReader",
    "Budget",
    "Comparison",
    "Curves",
    "Evaluation",
    "Flip",
    "Interval",
    "Outcome",
    "PairedResult",
    "TaskOutcome",
    "by_difficulty",
    "compare",
    "curves",
    "distinct",
    "evaluate",
    "evaluate_async",
    "figures",
    "flips",
    "paired",
    "paired_difference",
    "read_evaluation",
    "succeeded",
]
