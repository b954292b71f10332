"""The lessons of a run, told as JSON to the viewer's page. They are read and never written."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from ...agents.memory import IN_FORCE, Change, Evidence, Lesson, LessonRefused, LessonStore, State
from ...agents.memory.lesson import STATES
from ...agents.store import StoreError
from ..folders import LESSONS

MAX_LESSONS = 1000  # in one answer, the first ones
MAX_EVIDENCE = 50  # pieces of a lesson whose episodes are looked up
SEES = "in-force"  # the states that are shown where none is named, as `treegym lessons list` calls them

Through = Callable[
    [int, Sequence[int]], Sequence[int] | None
]  # the rollouts of a tree that go through any of the nodes


def has_lessons(run: Path) -> bool:
    return (run / LESSONS).is_file()


def lessons_listing(run: Path, state: str = "", words: str = "") -> dict[str, Any]:
    """The lessons in a state that have all of the words, in the order of their ids, and how many there are.

    The words are looked for in id, text, phrase, environment and tags, whatever their case. ValueError where there is
    no such state, LookupError where the run has no lessons, StoreError where they cannot be read.
    """
    states: dict[str, Collection[State]] = {SEES: IN_FORCE, "all": STATES}
    states |= {name: (name,) for name in STATES}
    if (state or SEES) not in states:
        raise ValueError(f"state: one of {', '.join(states)}, got {state!r}")
    parts = words.lower().split()
    known, rows, matching = 0, [], 0
    with _opened(run) as store:
        for lesson in store.lessons(states=states[state or SEES]):
            known += 1
            if all(part in _searched(lesson) for part in parts):
                matching += 1
                if matching <= MAX_LESSONS:
                    rows.append(_row(lesson))
    return {"known": known, "matching": matching, "rows": rows}


def lesson_page(run: Path, id: int, through: Through) -> dict[str, Any]:
    """A lesson with its evidence and its changes. Of one that was forgotten there are the changes alone.

    `rollouts` of a piece of evidence are those through its nodes; None where it is of another run. LookupError where
    there is no lesson with this id, StoreError where it cannot be read.
    """
    with _opened(run) as store:
        past = store.history(id)
        if not past or id == 0:
            try:
                store.get(id)  # says which there are
            except LessonRefused as refused:
                raise LookupError(str(refused)) from None
        forgotten = bool(past) and past[-1].kind == "forget"
        return _page(run, None if forgotten else store.get(id), past, through)


def lessons_export(run: Path, through: Through) -> list[dict[str, Any]]:
    """The pages of a run's lessons in all states, the first ones; those that were forgotten are left out."""
    with _opened(run) as store:
        lessons = [*islice(store.lessons(states=None), MAX_LESSONS)]
        return [_page(run, each, store.history(each.id), through) for each in lessons]


@contextlib.contextmanager
def _opened(run: Path) -> Iterator[LessonStore]:
    """The run's lessons. What cannot be read in the file is a StoreError."""
    if not has_lessons(run):
        raise LookupError(f"{run.resolve().name} has no lessons: there is no {LESSONS}")
    try:
        with LessonStore.read(run / LESSONS) as store:
            yield store
    except ValueError as error:  # a row that holds no lesson or no change
        raise StoreError(f"{run / LESSONS}: {error}") from error


def _searched(lesson: Lesson) -> str:
    return " ".join((str(lesson.id), lesson.text, lesson.when, lesson.env, *lesson.tags)).lower()


def _row(lesson: Lesson) -> dict[str, Any]:
    fields = {name: value for name, value in asdict(lesson).items() if name != "evidence"}
    return fields | {"seen": len(lesson.evidence)}


def _page(run: Path, lesson: Lesson | None, past: Sequence[Change], through: Through) -> dict[str, Any]:
    told = None
    if lesson is not None:
        pieces = [asdict(piece) | {"rollouts": None} for piece in lesson.evidence]
        for piece, shown in islice(zip(lesson.evidence, pieces, strict=True), MAX_EVIDENCE):
            if _is_here(run, piece):
                shown["rollouts"] = through(piece.tree, piece.nodes)
        told = _row(lesson) | {"evidence": pieces}
    return {"lesson": told, "history": [_change(change) for change in past]}


def _change(change: Change) -> dict[str, Any]:
    """A change as it is shown: evidence as how many pieces of it, everything else as it stands."""
    fields: Mapping[str, Any] = change.fields
    shown = {name: len(value) if name == "evidence" else value for name, value in fields.items()}
    return asdict(change) | {"fields": shown}


def _is_here(run: Path, piece: Evidence) -> bool:
    """Whether the piece is of this run, which may have been moved since, but not renamed."""
    named, here = Path(piece.run), run.resolve()
    return named.resolve() == here or (not named.exists() and named.name == here.name)
