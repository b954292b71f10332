"""What a task is told: lessons as notes, and whether they give its answer away."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ...envs import Task, TextEnv, ToolEnv
from ...envs.notes import Note, Place, own_text, read_notes, with_notes
from ...envs.task import Wrappers
from ..rollouts.response import OutsideSource, open_task
from ..tree import RolloutTree
from .lesson import Lesson

_LONGEST = 1_000  # turns of an oracle that are looked through


def told(lessons: Sequence[Lesson], place: Place) -> Wrappers:
    """What puts lessons around a task, as notes; nothing without lessons."""
    notes = [lesson.note() for lesson in lessons]
    return (with_notes(notes, place),) if notes else ()


def notes_of(task: Task) -> tuple[Note, ...]:
    """The notes that a task carries."""
    added = [arguments["notes"] for name, arguments in task.wrappers if name == "WithNotes"]
    return tuple(note for notes in added for note in read_notes(notes))


def lessons_of(task: Task) -> tuple[str, ...]:
    """The ids of the lessons whose notes a task carries. Notes of another origin have none, or no number."""
    return tuple(note.id for note in notes_of(task) if note.id.isdecimal())


def without_lessons(task: Task) -> Task:
    """The task without the notes of lessons; those of another origin stay."""
    return replace(task, wrappers=tuple(added for added in task.wrappers if not _tells_lessons(*added)))


def _tells_lessons(name: str, arguments: Mapping[str, Any]) -> bool:
    return name == "WithNotes" and any(note.id.isdecimal() for note in read_notes(arguments["notes"]))


def met(tree: RolloutTree) -> frozenset[int]:
    """The ids of the lessons that a rollout of the tree came to where they speak of."""
    texts = [
        message.text for messages in (tree.messages, *(node.messages for node in tree.nodes)) for message in messages
    ]
    said = "\n".join(own_text(text) for text in texts)
    return frozenset(int(note.id) for note in notes_of(tree.task) if note.id.isdecimal() and note.when in said)


def told_answer(task: Task) -> bool:
    """Whether a note of the task holds the answer that its environment's oracle gives.

    An answer counts as words of its own, in any case, where the prompt does not say it as well. What the oracle needs
    from outside is not asked for: then, as without an oracle, the answer is unknown and the result False.
    """
    if not (notes := notes_of(task)):
        return False
    bare = replace(task, wrappers=tuple(added for added in task.wrappers if added[0] != "WithNotes"))
    try:
        env, response = open_task(bare, sealed=True)
    except OutsideSource:
        return False
    with contextlib.closing(env):
        prompt = [message.text for message in response.messages]
        answer = _oracle_answer(env)
    return _said(answer, [note.text for note in notes]) and not _said(answer, prompt)


def answers_told(tasks: Iterable[Task]) -> dict[str, int]:
    """How many tasks' answers are told in a note, as `answers_told`; nothing where no task has notes."""
    noted = [task for task in tasks if notes_of(task)]
    return {"answers_told": sum(map(told_answer, noted))} if noted else {}


def _oracle_answer(env: TextEnv) -> str:
    """What the oracle answers in the end; empty where it ends with a call, or knows no way."""
    own = env.unwrapped
    for _ in range(_LONGEST):
        if (action := env.oracle()) is None:
            return ""
        _, _, terminated, truncated, _ = env.step(action)
        if terminated and isinstance(own, ToolEnv):
            return getattr(own.format.parse(action, own.tools), "answer", None) or ""
        if terminated or truncated:
            return action if terminated else ""
    return ""


def _said(answer: str, texts: Sequence[str]) -> bool:
    words = re.compile(rf"(?<!\w){re.escape(answer.strip())}(?!\w)", re.IGNORECASE)
    return bool(answer.strip()) and any(words.search(text) for text in texts)
