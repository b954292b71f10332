"""Lesson memory: what rollouts have taught, kept with its evidence, and told to agents in later episodes."""

from .curate import Add, Delete, Keep, Merge, Operation, Outcome, Reading, Update, curate, merged, read_operations
from .lesson import IN_FORCE, Effect, Evidence, Lesson, LessonRefused, State
from .ranking import ByMeaning, Ranker, by_words
from .store import Change, LessonStore

__all__ = [
    "IN_FORCE",
    "Add",
    "ByMeaning",
    "Change",
    "Delete",
    "Effect",
    "Evidence",
    "Keep",
    "Lesson",
    "LessonRefused",
    "LessonStore",
    "Merge",
    "Operation",
    "Outcome",
    "Ranker",
    "Reading",
    "State",
    "Update",
    "by_words",
    "curate",
    "merged",
    "read_operations",
]
