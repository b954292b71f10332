"""Curation: operations on a store of lessons, merged for a batch, each of them applied or refused with a reason."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import singledispatch
from typing import Any

from ...envs.notes import why_not_a_line
from .lesson import (
    IN_FORCE,
    MAX_REASON,
    Evidence,
    Lesson,
    LessonRefused,
    checked,
    is_number,
    likeness,
    near_words,
)
from .store import LessonStore

MAX_REPLY = 1 << 16  # characters of a reply that are read
MAX_OPERATIONS = 64  # of one reply


@dataclass(frozen=True, slots=True)
class Add:
    """Keep a lesson. Where a near duplicate is in force, that one gets the evidence."""

    lesson: Lesson


@dataclass(frozen=True, slots=True)
class Update:
    """Say a lesson in another way. A new lesson replaces it, because evidence and effect are those of the old text; or
    the one in force that says so already, which gets the evidence."""

    id: int
    text: str
    when: str | None = None  # None: the phrase that it has
    evidence: tuple[Evidence, ...] = ()  # for the new text


@dataclass(frozen=True, slots=True)
class Merge:
    """Say several lessons in one, which gets the evidence of all, and the tags that they share."""

    ids: tuple[int, ...]
    text: str
    when: str | None = None  # None: the phrase that all of them have


@dataclass(frozen=True, slots=True)
class Delete:
    """Retire a lesson. Its text stays on record."""

    id: int
    reason: str = ""  # empty: that of the batch


@dataclass(frozen=True, slots=True)
class Keep:
    """Leave a lesson as it is."""

    id: int


Operation = Add | Update | Merge | Delete | Keep


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of an operation."""

    operation: Operation
    lesson: Lesson | None = None  # as it is now; the new one where others are replaced
    refused: str = ""  # why nothing was done; empty: it was applied


def curate(store: LessonStore, operations: Iterable[Operation], reason: str) -> list[Outcome]:
    """Applies the operations in their order. One that cannot be applied is refused, and the others go on.

    A kill in between leaves the store as it was before all of them.
    """
    with store.transaction():
        return [_tried(store, operation, reason) for operation in operations]


def _tried(store: LessonStore, operation: Operation, reason: str) -> Outcome:
    try:
        with store.transaction():
            return Outcome(operation, _apply(operation, store, reason))
    except LessonRefused as refused:
        return Outcome(operation, refused=str(refused))


@singledispatch
def _apply(operation: object, store: LessonStore, reason: str) -> Lesson:
    """Does what the operation says. -> the lesson as it is then"""
    raise LessonRefused(f"no operation, but a {type(operation).__name__}")


@_apply.register
def _(operation: Add, store: LessonStore, reason: str) -> Lesson:
    return store.add(operation.lesson, reason)


@_apply.register
def _(operation: Update, store: LessonStore, reason: str) -> Lesson:
    old = _in_force(store, operation.id)
    when = old.when if operation.when is None else operation.when
    new = Lesson(operation.text, old.env, when, old.tags, store.author or old.author, operation.evidence)
    if (twin := store.twin(new)) is not None and twin.id == old.id:
        raise LessonRefused(f"lesson {twin.id} says so already")
    return _replaced(store, (old,), new, reason)


@_apply.register
def _(operation: Merge, store: LessonStore, reason: str) -> Lesson:
    if not isinstance(operation.ids, tuple | list):
        raise LessonRefused(f"a merge names a list of lessons, got a {type(operation.ids).__name__}")
    found = {lesson.id: lesson for lesson in (_in_force(store, id) for id in operation.ids)}
    olds = tuple(found.values())
    if len(olds) < 2:
        raise LessonRefused(f"a merge takes two lessons or more, got {len(olds)}")
    for name in ("env",) if operation.when is not None else ("env", "when"):
        if len({getattr(lesson, name) for lesson in olds}) > 1:
            raise LessonRefused(f"lessons {sorted(found)} do not have the same {name}")
    when = olds[0].when if operation.when is None else operation.when
    evidence = tuple(dict.fromkeys(piece for lesson in olds for piece in lesson.evidence))
    tags = tuple(set.intersection(*(set(lesson.tags) for lesson in olds)))
    author = store.author or olds[0].author
    return _replaced(store, olds, Lesson(operation.text, olds[0].env, when, tags, author, evidence), reason)


@_apply.register
def _(operation: Delete, store: LessonStore, reason: str) -> Lesson:
    return store.retire(operation.id, operation.reason or reason)


@_apply.register
def _(operation: Keep, store: LessonStore, reason: str) -> Lesson:
    return store.get(operation.id)


def _in_force(store: LessonStore, id: int) -> Lesson:
    """The lesson, or the one that has replaced it. LessonRefused where that one is not in force."""
    lesson, passed = store.get(id), {id}
    while lesson.replaced_by is not None and lesson.replaced_by not in passed:
        passed.add(lesson.replaced_by)
        lesson = store.get(lesson.replaced_by)
    if lesson.state not in IN_FORCE:
        raise LessonRefused(f"lesson {lesson.id} is {lesson.state}")
    return lesson


def _replaced(store: LessonStore, olds: Sequence[Lesson], new: Lesson, reason: str) -> Lesson:
    """Adds the new lesson, which may be one of the old ones or another that is there, and retires the others for it."""
    added = store.add(new, reason)
    for old in olds:
        if old.id != added.id:
            store.retire(old.id, reason, replaced_by=added.id)
    return added


def merged(batches: Iterable[Iterable[Operation]]) -> tuple[list[Operation], list[Outcome]]:
    """Joins the operations of several groups. -> those to apply, in order, and those that are set aside, with why

    A deletion wins over all else that is said of its lesson. Deletions come first, so that a text which one group
    deletes and another one adds is kept as a new lesson, with both sides on record. Equal operations are one, with the
    evidence of all; so are additions of near duplicates. Where groups update a lesson in different ways, all ways go on
    record, and the one that most groups want comes last, so that it is in force.
    """
    said = [operation for batch in batches for operation in batch]
    odd = [operation for operation in said if not _is_sound(operation)]  # curate says what is wrong with them
    said = [operation for operation in said if _is_sound(operation)]
    deletes = _deletes([operation for operation in said if isinstance(operation, Delete)])
    gone = {operation.id for operation in deletes}
    merges, aside = _merges([operation for operation in said if isinstance(operation, Merge)], gone)
    for operation in said:
        if isinstance(operation, Update | Keep) and operation.id in gone:
            aside.append(Outcome(operation, refused=f"lesson {operation.id} is deleted in the same batch"))
    updates = _updates([operation for operation in said if isinstance(operation, Update) and operation.id not in gone])
    adds = _adds([operation for operation in said if isinstance(operation, Add)])
    keeps = dict.fromkeys(operation for operation in said if isinstance(operation, Keep) and operation.id not in gone)
    return [*odd, *deletes, *updates, *merges, *adds, *keeps], aside


def _is_sound(operation: object) -> bool:
    """Whether the fields of an operation have the right types, and the lesson of an addition can be kept."""
    match operation:
        case Add(lesson):
            try:
                return bool(checked(lesson))
            except LessonRefused:
                return False
        case Update(id, str(), None | str(), tuple()) | Delete(id, str()) | Keep(id):
            return is_number(id)
        case Merge(tuple(ids), str(), None | str()):
            return all(map(is_number, ids))
    return False


def _deletes(operations: Sequence[Delete]) -> list[Delete]:
    reasons: dict[int, list[str]] = {}
    for operation in operations:
        said = reasons.setdefault(operation.id, [])
        said += [operation.reason] if operation.reason not in ("", *said) else []
    return [Delete(id, _one_line(said)) for id, said in reasons.items()]


def _one_line(reasons: Sequence[str]) -> str:
    """The reasons in one, without those that cannot go on record; if none can, the first, so that it is refused."""
    fit = [reason for reason in reasons if not why_not_a_line(reason, MAX_REASON)]
    return "; ".join(fit)[:MAX_REASON] if fit else "".join(reasons[:1])


def _updates(operations: Sequence[Update]) -> list[Update]:
    said: dict[tuple[Any, ...], list[Update]] = {}
    for operation in operations:
        key = (operation.id, operation.when, *near_words(operation.text))
        said.setdefault(key, []).append(operation)
    by_votes = sorted(said.values(), key=len)
    return [replace(same[0], evidence=_joined(each.evidence for each in same)) for same in by_votes]


def _merges(operations: Sequence[Merge], gone: set[int]) -> tuple[list[Merge], list[Outcome]]:
    merges: dict[tuple[Any, ...], Merge] = {}
    aside: list[Outcome] = []
    for operation in operations:
        left = tuple(id for id in dict.fromkeys(operation.ids) if id not in gone)
        if len(left) < 2 <= len(set(operation.ids)):
            aside.append(Outcome(operation, refused="all but one of the lessons are deleted in the same batch"))
        else:
            key = (frozenset(left), operation.when, *near_words(operation.text))
            merges.setdefault(key, replace(operation, ids=left) if gone & set(operation.ids) else operation)
    return list(merges.values()), aside


def _adds(operations: Sequence[Add]) -> list[Add]:
    said: dict[str, list[Lesson]] = {}
    for lesson in (checked(operation.lesson) for operation in operations):
        said.setdefault(likeness(lesson), []).append(lesson)
    return [Add(replace(same[0], evidence=_joined(each.evidence for each in same))) for same in said.values()]


def _joined(evidence: Iterable[tuple[Evidence, ...]]) -> tuple[Evidence, ...]:
    return tuple(dict.fromkeys(piece for pieces in evidence for piece in pieces))


@dataclass(frozen=True, slots=True)
class Reading:
    """What could be read of a model's reply."""

    operations: tuple[Operation, ...] = ()
    problems: tuple[str, ...] = ()  # one for each operation that could not be read, or one for the whole reply


def read_operations(
    reply: str, env: str, tags: Sequence[str] = (), author: str = "", evidence: Sequence[Evidence] = ()
) -> Reading:
    """Reads a model's reply: a JSON list of operations, which may stand in a fenced block or between sentences.

    An operation is an object such as {"op": "ADD", "text": …, "when": …}, {"op": "UPDATE", "id": 3, "text": …},
    {"op": "MERGE", "ids": [3, 4], "text": …}, {"op": "DELETE", "id": 3, "reason": …} or {"op": "KEEP", "id": 3}. Of a
    list that is cut off, the whole operations are read. Environment, tags, author and evidence are those of lessons
    that are added. Nothing raises: what cannot be read is a problem.
    """
    rows = _rows(reply[:MAX_REPLY])
    if rows is None:
        return Reading(problems=(f"no JSON list of operations in the reply: {reply[:60]!r}",))
    about = Lesson("", env, tags=tuple(tags), author=author, evidence=tuple(evidence))
    operations: list[Operation] = []
    problems: list[str] = []
    for number, row in enumerate(rows[:MAX_OPERATIONS], 1):
        try:
            operations.append(_operation(row, about))
        except LessonRefused as refused:
            problems.append(f"operation {number}: {refused}")
    if len(rows) > MAX_OPERATIONS:
        problems.append(f"{len(rows)} operations: the first {MAX_OPERATIONS} are read")
    return Reading(tuple(operations), tuple(problems))


def _rows(text: str) -> list[Any] | None:
    """The operations in a text, as JSON has them; None where it holds neither an object nor an empty list."""
    rows: list[Any] = []
    found, at, tries = False, 0, 0
    while (start := _BRACKET.search(text, at)) is not None and tries < _TRIES:
        try:
            value, at = _DECODER.raw_decode(text, start.start())
        except (ValueError, RecursionError):
            at, tries = start.end(), tries + 1
            continue
        listed = value.get("operations", value) if isinstance(value, dict) else value
        listed = listed if isinstance(listed, list) else [listed]
        if not listed or any(isinstance(row, dict) for row in listed):  # otherwise it is a remark, such as [1]
            found = True
            rows += listed
    return rows if found else None


_BRACKET = re.compile(r"[\[{]")
_DECODER = json.JSONDecoder()
_TRIES = 200  # brackets that open nothing; more would take long


def _operation(row: Any, about: Lesson) -> Operation:
    if not isinstance(row, dict):
        raise LessonRefused(f"expected an object, got {row!r:.60}")
    kind = str(_one_of(row, "op", "operation", "action", "type")).upper()
    match kind:
        case "ADD":
            return Add(replace(about, text=_text(row), when=_when(row) or ""))
        case "UPDATE":
            return Update(_id(row.get("id")), _text(row), _when(row), about.evidence)
        case "MERGE":
            ids = row.get("ids")
            if not isinstance(ids, list):
                raise LessonRefused(f"MERGE takes a list of ids, got {ids!r:.60}")
            return Merge(tuple(map(_id, ids)), _text(row), _when(row))
        case "DELETE":
            reason = row.get("reason") or ""
            return Delete(_id(row.get("id")), reason if isinstance(reason, str) else f"{reason!r:.80}")
        case "KEEP":
            return Keep(_id(row.get("id")))
    raise LessonRefused(f"the operation is ADD, UPDATE, MERGE, DELETE or KEEP, got {kind[:20]!r}")


def _one_of(row: Mapping[str, Any], *names: str) -> Any:
    """The value under the first of the names that the row has; None where it has none."""
    return next((row[name] for name in names if name in row), None)


def _text(row: Mapping[str, Any]) -> str:
    text = _one_of(row, "text", "lesson", "content")
    if not isinstance(text, str):
        raise LessonRefused(f"the text is missing, got {text!r:.60}")
    return text


def _when(row: Mapping[str, Any]) -> str | None:
    when = row.get("when")
    if not isinstance(when, str | None):
        raise LessonRefused(f"when is a phrase, got {when!r:.60}")
    return when


def _id(value: Any) -> int:
    """An id: a number, or a text that holds one, such as "3" or "#3"."""
    written = _NUMBER.fullmatch(value) if isinstance(value, str) else None
    number = int(written[1]) if written else value
    if not is_number(number):
        raise LessonRefused(f"an id is a number, got {value!r:.60}")
    return int(number)


_NUMBER = re.compile(r"\W*(?:lesson )?([0-9]{1,15})\W*", re.IGNORECASE)
