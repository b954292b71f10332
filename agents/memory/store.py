"""LessonStore: lessons in an SQLite file, where every change is a row and the present follows from the changes.

The table `changes` is the record: who changed what, when and why. The table `lessons`, the present, is written in the
same transaction and can be rebuilt from the record. Two things alter the record itself. `forget` erases a text from it
and leaves the text's SHA-256. `rewind` removes the changes after a revision, so that a run which resumes from a
checkpoint numbers its lessons as a run that was never stopped would; texts that were forgotten since do not come back.

A change is acknowledged once it is on the disk. Several threads may use a store at once, and several processes may
have it open: each write waits for the others.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

from ..store.folder import whole
from ..store.frames import StoreError
from .lesson import (
    IN_FORCE,
    MAX_REASON,
    MAX_TAGS,
    Evidence,
    Lesson,
    LessonRefused,
    State,
    checked,
    checked_reason,
    from_json,
    is_number,
    likeness,
    to_json,
)
from .ranking import Ranker, by_words

CANDIDATES = 256  # lessons for one set of tags that are compared by words: those with the greatest effect
MAX_EVIDENCE = 100  # pieces that a lesson shows, the newest ones; the record has all
MAX_LINE = 1 << 20  # bytes of a line that is imported
_PATIENCE = 60.0  # seconds for which a write waits for other processes
_BATCH = 256  # rows read at a time
_SHOWN = 5  # lines of an import that are named when more are refused
_APPLICATION, _VERSION = 0x74674C65, 1  # by which SQLite files of this kind, and their tables, are known
_TOLD = "state IN ('proposed', 'active')"  # as the indices have it
_TABLES = f"""
CREATE TABLE changes (number INTEGER PRIMARY KEY, time REAL NOT NULL, author TEXT NOT NULL, kind TEXT NOT NULL,
    lesson INTEGER NOT NULL, reason TEXT NOT NULL, fields TEXT NOT NULL);
CREATE INDEX of_lesson ON changes (lesson, number);
CREATE TABLE lessons (id INTEGER PRIMARY KEY, env TEXT NOT NULL, tags TEXT NOT NULL, told TEXT NOT NULL,
    state TEXT NOT NULL, effect REAL NOT NULL, support INTEGER NOT NULL, likeness TEXT NOT NULL, body TEXT NOT NULL);
CREATE INDEX recalled ON lessons (env, tags, effect DESC, support DESC, id) WHERE {_TOLD};
CREATE INDEX alike ON lessons (likeness) WHERE {_TOLD};
CREATE INDEX retired ON lessons (env) WHERE state = 'retired';
PRAGMA application_id = {_APPLICATION};
PRAGMA user_version = {_VERSION};
"""
_CHANGEABLE = ("text", "when", "tags", "effect", "state")

CountTokens = Callable[[str], int]


def rough_tokens(text: str) -> int:
    """A quarter of a text's bytes, for callers without a tokenizer."""
    return len(text.encode()) // 4 + 1


@dataclass(frozen=True, slots=True)
class Change:
    """A row of the record. `fields` is JSON; where a text was forgotten, its digest stands there as `sha256`."""

    number: int  # the store's revision once the change was made
    time: float  # seconds since 1970
    author: str
    kind: str  # add, change, support, retire or forget
    lesson: int  # its id; 0: a lesson whose addition has been rewound, forgotten since
    reason: str
    fields: Mapping[str, Any]


class LessonStore:
    """Lessons by number, from 1. A context manager, which closes the file.

    LessonRefused says why a lesson or a change is not taken; nothing has changed then. StoreError names a file that
    cannot be read or written.
    """

    def __init__(
        self, path: Path, author: str = "", clock: Callable[[], float] = time.time, read_only: bool = False
    ) -> None:
        """Opens the store in a file, which is created if it is missing. `author` is written down for its changes."""
        self.path, self.author = path, author
        self._clock, self._read_only = clock, read_only
        self._lock = threading.RLock()
        with self._named():
            self._connection = _open_to_read(path) if read_only else _open_to_write(path)
        self._closer = weakref.finalize(self, self._connection.close)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Opens a store that is there, for reading only."""
        return cls(path, read_only=True)

    def close(self) -> None:
        self._closer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # changes

    def add(self, lesson: Lesson, reason: str = "") -> Lesson:
        """Keeps a lesson, and gives it with its id.

        Where a near duplicate is in force (see `likeness`), that one gets the evidence instead and is returned.
        """
        lesson = replace(checked(lesson), id=0)
        reason = checked_reason(reason, needed=False)
        with self.transaction():
            self._check_successor(lesson)
            twin = self.twin(lesson)
            if twin is not None:
                return self._supported(twin, lesson.evidence, reason)
            return self._change("add", self._next_id(), json.loads(to_json(lesson)), reason, lesson.author)

    def change(self, id: int, *, reason: str, **fields: Any) -> Lesson:
        """Gives a lesson another text, phrase, tags, effect or state. The former ones stay on record.

        The effect of another text or phrase is not measured yet, so it becomes None unless it is given.
        """
        if unknown := fields.keys() - set(_CHANGEABLE):
            raise LessonRefused(f"{', '.join(sorted(unknown))} cannot be changed; {', '.join(_CHANGEABLE)} can")
        return self._altered("change", id, fields, reason)

    def support(self, id: int, evidence: Evidence, reason: str = "") -> Lesson:
        """Adds a piece of evidence to a lesson, unless it has this piece already."""
        reason = checked_reason(reason, needed=False)
        with self.transaction():
            return self._supported(self.get(id), (evidence,), reason)

    def retire(self, id: int, reason: str, replaced_by: int | None = None) -> Lesson:
        """Takes a lesson out of force; `replaced_by` is the id of one in force that says it better."""
        with self.transaction():
            if (former := self.get(id)).state not in IN_FORCE:
                raise LessonRefused(f"lesson {id} is {former.state} already")
            state: State = "retired" if replaced_by is None else "replaced"
            return self._altered("retire", id, {"state": state, "replaced_by": replaced_by}, reason)

    def forget(self, id: int, reason: str) -> None:
        """Erases a lesson's texts and phrases, former ones too, from the file, and leaves their SHA-256 on record.

        The reasons of its changes go as well, because they may quote the text. Other lessons that say the same keep
        it, and so do trees of episodes in which it was told. What was forgotten before is erased once more.
        """
        checked_reason(reason)
        with self.transaction():
            if not (past := self.history(id)) or id == 0:
                self.get(id)  # refuses the id
            digests = list(dict.fromkeys(_digest(change.fields["text"]) for change in past if "text" in change.fields))
            if any("text" in change.fields and change.fields["text"] in reason for change in past):
                raise LessonRefused("the reason quotes the text that is to be forgotten")
            if past[-1].kind != "forget":
                self._erase(past)
                self._write("forget", id, {"sha256": digests}, reason)
        self._sweep()

    def rewind(self, revision: int) -> int:
        """Goes back to an earlier revision: the changes after it are removed. -> how many

        Lessons that are added later get the same ids as they would have got at that revision. What was forgotten since
        does not come back: these changes follow the revision, with new numbers. A text may be written anew, as after
        any `forget`.
        """
        with self.transaction():
            if not is_number(revision) or revision > self.revision:
                raise LessonRefused(f"{self.path} is at revision {self.revision}, and can only go back to earlier ones")
            gone = self.changes(revision)
            self._connection.execute("DELETE FROM changes WHERE number > ?", [revision])
            for change in (change for change in gone if change.kind == "forget"):
                known = change.lesson if self.history(change.lesson) else 0
                self._append(replace(change, number=self.revision + 1, lesson=known))
            for id in {change.lesson for change in gone}:
                self._show(id, _present(id, self.history(id)))
        return len(gone)

    def rebuild(self) -> None:
        """Makes the present again from the record."""
        with self.transaction():
            self._connection.execute("DELETE FROM lessons")
            past = sorted(self.changes(), key=lambda change: (change.lesson, change.number))
            for id, changes in itertools.groupby(past, key=lambda change: change.lesson):
                self._show(id, _present(id, changes))

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """All changes inside are made together, or none of them if an exception leaves it.

        A transaction inside another one can fail alone.
        """
        if self._read_only:
            raise StoreError(f"{self.path} is open for reading only")
        with self._lock, self._named():
            inner = self._connection.in_transaction
            self._connection.execute("SAVEPOINT part" if inner else "BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("RELEASE part" if inner else "COMMIT")
            except BaseException:
                if self._connection.in_transaction:  # a full disk ends it
                    self._connection.execute("ROLLBACK TO part" if inner else "ROLLBACK")
                if inner and self._connection.in_transaction:
                    self._connection.execute("RELEASE part")
                raise

    # reading

    @property
    def revision(self) -> int:
        """The number of the last change; 0 for a new store."""
        return int(self._rows("SELECT coalesce(max(number), 0) FROM changes")[0][0])

    @property
    def in_force(self) -> int:
        """How many lessons are told, of all environments."""
        return int(self._rows(f"SELECT count(*) FROM lessons WHERE {_TOLD}")[0][0])

    def get(self, id: int) -> Lesson:
        """The lesson with this id. LessonRefused where there is none, with the ids that there are."""
        if not is_number(id):
            raise LessonRefused(f"an id is a number, got a {type(id).__name__}")
        if rows := self._rows("SELECT body FROM lessons WHERE id = ?", id):
            return from_json(rows[0][0])
        last = self._next_id() - 1
        if 0 < id <= last:
            raise LessonRefused(f"lesson {id} was forgotten")
        raise LessonRefused(
            f"there is no lesson {id}; there are 1 to {last}" if last else f"there is no lesson {id}, nor any"
        )

    def lessons(
        self, *, env: str | None = None, states: Collection[State] | None = IN_FORCE, tags: Iterable[str] | None = None
    ) -> Iterator[Lesson]:
        """The lessons in the order of their ids, of an environment, in these states, with exactly these tags.

        None: of every environment, in every state, with any tags.
        """
        conditions: list[tuple[str, Any]] = [("id > ?", 0)]
        if env is not None:
            conditions.append(("env = ?", env))
        if tags is not None:
            conditions.append(("tags = ?", _tags_key(tags)))
        if states is not None:
            conditions.append(("state IN (SELECT value FROM json_each(?))", json.dumps(list(states))))
        query = f"SELECT id, body FROM lessons WHERE {' AND '.join(text for text, _ in conditions)}"
        query += f" ORDER BY id LIMIT {_BATCH}"
        values = [value for _, value in conditions]
        while rows := self._rows(query, *values):
            yield from (from_json(body) for _, body in rows)
            values[0] = rows[-1][0]

    def still_in_force(self, ids: Iterable[int]) -> frozenset[int]:
        """Those of the ids whose lessons are told."""
        query = f"SELECT id FROM lessons WHERE {_TOLD} AND id IN (SELECT value FROM json_each(?))"
        return frozenset(id for (id,) in self._rows(query, json.dumps([*ids])))

    def retired(self, env: str) -> frozenset[int]:
        """The ids of the lessons of an environment that were taken out of force, and by no better one."""
        return frozenset(id for (id,) in self._rows("SELECT id FROM lessons WHERE env = ? AND state = 'retired'", env))

    def twin(self, lesson: Lesson) -> Lesson | None:
        """The near duplicate in force (see `likeness`) of a lesson that is, or is to be, in force."""
        query = f"SELECT body FROM lessons WHERE likeness = ? AND {_TOLD} ORDER BY id LIMIT 1"
        lesson = checked(lesson)
        rows = self._rows(query, likeness(lesson)) if lesson.state in IN_FORCE else []
        return from_json(rows[0][0]) if rows else None

    def history(self, id: int) -> list[Change]:
        """The changes of a lesson, the first one first; none where there was no such lesson."""
        return self._changes("lesson = ?", id) if is_number(id) else []

    def changes(self, since: int = 0) -> list[Change]:
        """The changes of all lessons after a revision."""
        return self._changes("number > ?", since)

    def _changes(self, which: str, value: int) -> list[Change]:
        columns = "number, time, author, kind, lesson, reason, fields"
        rows = self._rows(f"SELECT {columns} FROM changes WHERE {which} ORDER BY number", value)
        return [Change(n, at, who, kind, id, why, json.loads(fields)) for n, at, who, kind, id, why, fields in rows]

    def recall(
        self,
        env: str,
        tags: Sequence[str],
        words: str,
        tokens: int,
        count_tokens: CountTokens = rough_tokens,
        rank: Ranker = by_words,
    ) -> list[Lesson]:
        """The lessons to tell in a task: those in force for its environment whose tags are all among the task's.

        Lessons with more tags come first. Among lessons with equally many tags, those come first that fit `words`
        best, as `rank` says (without words: all alike), then those with the greater effect, where an unmeasured one
        counts as 0, then those with more evidence, then older ones. A lesson whose text and phrase do not fit into
        what is left of `tokens` is passed over. Of a task's tags the first six count, and for each set of tags the
        256 lessons with the greatest effect.
        """
        chosen: list[int] = []
        for rows in self._candidates(env, tags):
            scores = rank(words, [row[1] for row in rows]) if words.strip() and rows else [0.0] * len(rows)
            order = sorted(
                zip(scores, rows, strict=True), key=lambda pair: (-pair[0], -pair[1][2], -pair[1][3], pair[1][0])
            )
            for _, (id, told, *_) in order:
                if (cost := count_tokens(told)) <= tokens:
                    chosen.append(id)
                    tokens -= cost
            if tokens <= 0:
                break
        return self._bodies(chosen)

    def _candidates(self, env: str, tags: Sequence[str]) -> Iterator[list[tuple[int, str, float, int]]]:
        """(id, phrase and text, effect, pieces of evidence) of lessons, those with equally many tags in one list."""
        few = list(dict.fromkeys(tags))[:MAX_TAGS]
        query = (
            f"SELECT id, told, effect, support FROM lessons WHERE {_TOLD} AND env = ? AND tags = ? "
            f"ORDER BY effect DESC, support DESC, id LIMIT {CANDIDATES}"
        )
        for size in range(len(few), -1, -1):
            sets = [_tags_key(part) for part in itertools.combinations(few, size)]
            yield [row for key in sets for row in self._rows(query, env, key)]

    def _bodies(self, ids: Sequence[int]) -> list[Lesson]:
        rows = self._rows(
            "SELECT id, body FROM lessons WHERE id IN (SELECT value FROM json_each(?))", json.dumps(list(ids))
        )
        found = {id: from_json(body) for id, body in rows}
        return [found[id] for id in ids if id in found]  # another process may have forgotten one meanwhile

    # files

    def export(self, path: Path, states: Collection[State] | None = None) -> int:
        """Writes the lessons in these states (None: in all) as JSON lines. -> how many"""
        count = 0
        with whole(path) as part, part.open("w", encoding="utf-8") as file:
            for lesson in self.lessons(states=states):
                file.write(to_json(lesson) + "\n")
                count += 1
        return count

    def copy(self, path: Path) -> None:
        """Writes the store, as it is now, into a new file."""
        with whole(path) as part, self._lock, self._named(), contextlib.closing(sqlite3.connect(part)) as other:
            self._connection.backup(other)

    def import_(self, path: Path, reason: str = "") -> list[Lesson]:
        """Adds the lessons of JSON lines, with ids of this store; near duplicates join those that are in force.

        They are taken all or none: LessonRefused names the lines that cannot be taken, and why. What was measured
        elsewhere has yet to be measured here, so lessons in force become "proposed", without an effect. Ids in the
        file name lessons of the file; where `in_force` names others, these are left out, and a lesson that is replaced
        by another is retired.
        """
        return self._taken_in(_read_lines(path), reason or f"imported from {path.name}"[:MAX_REASON])

    def take_over(self, path: Path, reason: str = "") -> list[Lesson]:
        """Adds the lessons of another store, as `import_` adds those of a file."""
        with LessonStore.read(path) as other:
            return self._taken_in([*other.lessons(states=None)], reason or f"taken over from {path}"[:MAX_REASON])

    def _taken_in(self, read: Sequence[Lesson], reason: str) -> list[Lesson]:
        reason = checked_reason(reason)
        with self.transaction():
            given = [self.add(_unmeasured(lesson), reason).id for lesson in read]
            ids = {lesson.id: id for lesson, id in zip(read, given, strict=True) if lesson.id}  # by those of the file
            for lesson, id in zip(read, given, strict=True):
                self._supported(self.get(id), tuple(_renumbered(piece, ids) for piece in lesson.evidence), reason)
                if (successor := ids.get(lesson.replaced_by or 0, id)) != id:
                    self._altered("retire", id, {"state": "replaced", "replaced_by": successor}, reason)
            return [self.get(id) for id in given]

    # inside transactions

    def _altered(self, kind: str, id: int, fields: Mapping[str, Any], reason: str) -> Lesson:
        reason = checked_reason(reason)
        with self.transaction():
            former = self.get(id)
            lesson = checked(_with(former, fields))
            if lesson == former:
                return former
            self._check_successor(lesson)
            twin = self.twin(lesson)
            if twin is not None and twin.id != id:
                raise LessonRefused(f"lesson {twin.id} says so already")
            old, new = asdict(former), asdict(lesson)
            return self._change(kind, id, {name: new[name] for name in new if new[name] != old[name]}, reason)

    def _supported(self, lesson: Lesson, evidence: Iterable[Evidence], reason: str) -> Lesson:
        more = tuple(piece for piece in dict.fromkeys(evidence) if piece not in lesson.evidence)
        if not more:
            return lesson
        checked(replace(lesson, evidence=more))
        return self._change("support", lesson.id, {"evidence": [asdict(piece) for piece in more]}, reason)

    def _check_successor(self, lesson: Lesson) -> None:
        if lesson.replaced_by is not None and self.get(lesson.replaced_by).id == lesson.id:
            raise LessonRefused(f"lesson {lesson.id} cannot replace itself")

    def _next_id(self) -> int:
        return int(self._rows("SELECT coalesce(max(lesson), 0) + 1 FROM changes")[0][0])

    def _change(self, kind: str, id: int, fields: Mapping[str, Any], reason: str, author: str = "") -> Lesson:
        self._write(kind, id, fields, reason, author)
        return self.get(id)

    def _write(self, kind: str, id: int, fields: Mapping[str, Any], reason: str, author: str = "") -> None:
        """Puts a change on record and into the present."""
        change = Change(self.revision + 1, self._clock(), self.author or author, kind, id, reason, fields)
        former = None if kind in ("add", "forget") else self.get(id)
        self._append(change)
        self._show(id, _after(former, change))

    def _append(self, change: Change) -> None:
        cells = (change.number, change.time, change.author, change.kind, change.lesson, change.reason)
        self._connection.execute("INSERT INTO changes VALUES (?, ?, ?, ?, ?, ?, ?)", (*cells, _json(change.fields)))

    def _show(self, id: int, lesson: Lesson | None) -> None:
        """Makes this the lesson of that id in the present."""
        self._connection.execute("DELETE FROM lessons WHERE id = ?", [id])
        if lesson is not None:
            place = (id, lesson.env, _tags_key(lesson.tags), f"{lesson.when} {lesson.text}".strip(), lesson.state)
            weight = (lesson.effect.mean if lesson.effect else 0.0, len(lesson.evidence))
            cells = (*place, *weight, likeness(lesson), to_json(lesson))
            self._connection.execute("INSERT INTO lessons VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", cells)

    def _erase(self, past: Iterable[Change]) -> None:
        """Takes texts, phrases and reasons out of changes; digests of the texts take their places."""
        for change in past:
            kept = {name: value for name, value in change.fields.items() if name not in ("text", "when")}
            if "text" in change.fields:
                kept["sha256"] = _digest(change.fields["text"])
            query = "UPDATE changes SET fields = ?, reason = '' WHERE number = ?"
            self._connection.execute(query, [_json(kept), change.number])

    def _sweep(self) -> None:
        """Writes the file anew without what was deleted from it, and empties the write-ahead log."""
        if self._connection.in_transaction:
            raise StoreError(f"{self.path}: a text cannot be erased from the file inside a transaction")
        with self._lock, self._named():
            self._connection.execute("VACUUM")
            until = time.monotonic() + _PATIENCE
            while self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]:
                if time.monotonic() > until:
                    raise StoreError(f"{self.path} is being read, so its log still has the text: forget it once more")
                time.sleep(0.05)

    def _rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        with self._lock, self._named():
            return self._connection.execute(query, values).fetchall()

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Errors of SQLite become a StoreError that names the file."""
        try:
            yield
        except sqlite3.ProgrammingError:
            raise
        except sqlite3.Error as error:
            raise StoreError(f"{self.path}: {error}") from error


def _open_to_write(path: Path) -> sqlite3.Connection:
    path.parent.mkdir(parents=True, exist_ok=True)
    connection = _connect(str(path))
    try:
        connection.execute("PRAGMA secure_delete = ON")  # what is deleted is overwritten
        connection.execute("PRAGMA synchronous = FULL")  # a commit is on the disk before it is acknowledged
        if not _is_ours(connection, path):
            connection.execute("BEGIN IMMEDIATE")
            if not _is_ours(connection, path):  # another process may have made the tables meanwhile
                for statement in _TABLES.split(";"):
                    connection.execute(statement)
            connection.execute("COMMIT")
        _log_ahead(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def _log_ahead(connection: sqlite3.Connection) -> None:
    """Switches the file to a write-ahead log. SQLite does not wait for other processes here."""
    until = time.monotonic() + _PATIENCE
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError:
            if time.monotonic() > until:
                raise
            time.sleep(0.02)


def _open_to_read(path: Path) -> sqlite3.Connection:
    if not path.is_file():
        raise StoreError(f"{path}: there is no store of lessons")
    address = f"file:{quote(str(path.resolve()))}?mode=ro"
    log = path.with_name(f"{path.name}-wal")
    try:
        return _opened_to_read(address, path)
    except sqlite3.OperationalError:
        if log.exists() and log.stat().st_size:
            raise
        # in a folder that cannot be written there is no place for what readers and writers share, and no writer
        return _opened_to_read(f"{address}&immutable=1", path)


def _opened_to_read(address: str, path: Path) -> sqlite3.Connection:
    connection = _connect(address)
    try:
        if not _is_ours(connection, path):
            raise StoreError(f"{path} is no store of lessons")
    except BaseException:
        connection.close()
        raise
    return connection


def _connect(address: str) -> sqlite3.Connection:
    return sqlite3.connect(
        address, timeout=_PATIENCE, isolation_level=None, check_same_thread=False, uri=address.startswith("file:")
    )


def _is_ours(connection: sqlite3.Connection, path: Path) -> bool:
    """Whether the file has this version's tables. False: it has none yet. StoreError where it has others."""
    # the tables first: another process that makes them gives the file its numbers with them
    if not connection.execute("SELECT name FROM sqlite_master LIMIT 1").fetchall():
        return False
    [[application]], [[version]] = (
        connection.execute(f"PRAGMA {name}").fetchall() for name in ("application_id", "user_version")
    )
    if application != _APPLICATION:
        raise StoreError(f"{path} is no store of lessons")
    if version != _VERSION:
        raise StoreError(f"{path} is a store of lessons of version {version}; this treegym reads version {_VERSION}")
    return True


def _present(id: int, past: Iterable[Change]) -> Lesson | None:
    """What a lesson is after all of its changes; None where there are none, and where it was forgotten."""
    changes = list(past)
    if not changes or changes[-1].kind == "forget":
        return None
    lesson = None
    for change in changes:
        lesson = _after(lesson, change)
    return lesson


def _after(former: Lesson | None, change: Change) -> Lesson | None:
    """What a lesson is after a change."""
    if change.kind == "forget":
        return None
    told: dict[str, Any] = json.loads(to_json(former)) if former is not None else {"id": change.lesson}
    fields = dict(change.fields)
    if change.kind == "support":
        fields["evidence"] = [*told.get("evidence", []), *fields["evidence"]]
    now = told | fields
    return from_json(_json(now | {"evidence": now.get("evidence", [])[-MAX_EVIDENCE:]}))


def _with(lesson: Lesson, fields: Mapping[str, Any]) -> Lesson:
    """The lesson with other fields. What was measured does not hold for another text or phrase."""
    fields = dict(fields)
    if fields.get("state", "replaced") != "replaced":
        fields["replaced_by"] = None
    if any(fields.get(name, getattr(lesson, name)) != getattr(lesson, name) for name in ("text", "when")):
        fields.setdefault("effect", None)
    return replace(lesson, **fields)


def _read_lines(path: Path) -> list[Lesson]:
    """The lessons of JSON lines; blank lines are passed over. LessonRefused names the lines that cannot be taken."""
    read: list[Lesson] = []
    lines: dict[int, int] = {}  # where each id stands
    faults: list[str] = []
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b""), 1):
            try:
                if len(line) > MAX_LINE:
                    raise LessonRefused(f"has more than {MAX_LINE} bytes")
                if line.strip():
                    read.append(lesson := checked(from_json(line)))
                    if lesson.id and lines.setdefault(lesson.id, number) != number:
                        raise LessonRefused(f"lesson {lesson.id} stands in line {lines[lesson.id]} already")
            except LessonRefused as refused:
                faults.append(f"line {number}: {refused}")
                if len(line) > MAX_LINE:
                    break
    if faults:
        more = f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise LessonRefused(f"{path}: nothing is taken: {'; '.join(faults[:_SHOWN])}{more}")
    return read


def _unmeasured(lesson: Lesson) -> Lesson:
    """The lesson as it is added from elsewhere."""
    state: State = "proposed" if lesson.state in IN_FORCE else "retired"
    return replace(lesson, evidence=(), effect=None, state=state, replaced_by=None)


def _renumbered(piece: Evidence, ids: Mapping[int, int]) -> Evidence:
    return replace(piece, in_force=tuple(ids[id] for id in piece.in_force if id in ids))


def _tags_key(tags: Iterable[str]) -> str:
    return "\n".join(sorted(set(tags)))  # which no tag contains


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _json(fields: Mapping[str, Any]) -> str:
    return json.dumps(fields, ensure_ascii=False, separators=(",", ":"))
