"""Evaluation: outcomes, figures, statistics, comparisons."""

from .compare import Curves, Flip, PairedResult, curves, flips, paired
from .outcomes import AnswerReader, Evaluation, Outcome, TaskOutcome, by_difficulty, distinct, figures, succeeded
from .statistics import Interval, paired_difference

__all__ = [
    "AnswerReader",
    "Curves",
    "Evaluation",
    "Flip",
    "Interval",
    "Outcome",
    "PairedResult",
    "TaskOutcome",
    "by_difficulty",
    "curves",
    "distinct",
    "figures",
    "flips",
    "paired",
    "paired_difference",
    "succeeded",
]
