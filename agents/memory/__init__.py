"""Lesson memory: what rollouts have taught, told to later ones, measured, and retired where it does not help."""

from .curate import Add, Delete, Keep, Merge, Operation, Outcome, Update, curate, merged, read_operations
from .lesson import Effect, Evidence, Lesson, LessonRefused
from .memory import Memory, told
from .reflect import Contrast, Reflector, Seen, lessons_of
from .store import LessonStore

__all__ = [
    "Add",
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
    "Reflector",
    "Seen",
    "Update",
    "curate",
    "lessons_of",
    "merged",
    "read_operations",
    "told",
]
