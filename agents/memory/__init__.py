"""Lesson memory: what rollouts have taught, kept with its evidence, and told to agents in later episodes."""

from .ask import AskModel
from .curate import Add, Delete, Keep, Merge, Operation, Outcome, Reading, Update, curate, merged, read_operations
from .lesson import IN_FORCE, Effect, Evidence, Lesson, LessonRefused, State
from .memory import Memory, told
from .ranking import ByMeaning, Ranker, by_words
from .reflect import Ask, Contrast, Reflection, Reflector, Seen, lessons_of
from .store import Change, LessonStore

__all__ = [
    "IN_FORCE",
    "Add",
    "Ask",
    "AskModel",
    "ByMeaning",
    "Change",
    "Contrast",
    "Delete",
    "Effect",
    "Evidence",
    "Keep",
    "Lesson",
    "LessonRefused",
    "LessonStore",
    "Memory",
    "Merge",
    "Operation",
    "Outcome",
    "Ranker",
    "Reading",
    "Reflection",
    "Reflector",
    "Seen",
    "State",
    "Update",
    "by_words",
    "curate",
    "lessons_of",
    "merged",
    "read_operations",
    "told",
]
