"""Lesson memory: what rollouts have taught, kept with its evidence, and told to agents in later episodes."""

from .ask import AskModel
from .curate import Add, Delete, Keep, Merge, Operation, Outcome, Reading, Update, curate, merged, read_operations
from .lesson import IN_FORCE, Effect, Evidence, Lesson, LessonRefused, State, tags_of
from .memory import Memory, suspects
from .ranking import ByMeaning, Ranker, by_words
from .reflect import Ask, Contrast, Reflection, Reflector, Seen
from .store import Change, LessonStore
from .telling import answers_told, lessons_of, met, notes_of, told, told_answer, without_lessons

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
    "answers_told",
    "by_words",
    "curate",
    "lessons_of",
    "merged",
    "met",
    "notes_of",
    "read_operations",
    "suspects",
    "tags_of",
    "told",
    "told_answer",
    "without_lessons",
]
