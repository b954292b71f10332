"""An index of a store in SQLite: where every tree lies, and its summary, for listing and filtering.

SQLite, for it is in the standard library, takes single rows as cheaply as it filters many, and lets several processes
read while one writes; DuckDB would scan faster, which listings do not need. The index is a cache: what it lacks it
takes from the store, and without it all is there. Where it cannot be written, one in memory stands in.

Every row has a checksum. An answer is taken from rows that match theirs and whose numbers have no gap, and the newest
row is compared with the store; so a filter reads all rows, a listing those that it lists, opening a store the newest
alone. A spoilt index is built anew. Not covered are one change in four billion, which leaves the checksum as it was,
and the choice of the earlier prompt that a new one is stored with, where any is right.
"""

from __future__ import annotations

import contextlib
import json
import math
import sqlite3
import threading
import weakref
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..tree import RolloutTree, is_success, tool_results
from .where import Range, Where, wider

_VERSION = 3  # of the tables
_BATCH = 256  # rows read at a time
_TERM = "iif(json_valid(terms), (SELECT value FROM json_each(terms) WHERE key = ?) {} ?, 1)"  # NaN is no valid JSON


@dataclass(frozen=True, slots=True)
class TreeSummary:
    """What a listing tells of a stored tree."""

    number: int  # its place in the store, from 0
    labels: Mapping[str, Any]  # stage, step, ...
    env: str
    seed: int  # of the task
    rollouts: int
    nodes: int
    mean_return: float
    best_return: float
    terms: Mapping[str, float]  # reward terms by name: means over the rollouts
    successes: Mapping[str, int]  # reward terms by name: how many rollouts reached 1 in it
    causes: Mapping[str, int]  # of truncation, by name: how many rollouts
    sampled_tokens: int  # each once
    tool_calls: int  # each once

    @classmethod
    def of(cls, number: int, labels: Mapping[str, Any], tree: RolloutTree) -> TreeSummary:
        if not tree.leaves:
            raise ValueError(f"the tree of {tree.task.env}, seed {tree.task.seed}, has no rollout to tell of")
        names = sorted({name for node in tree.nodes for name in node.reward_terms})
        return cls(
            number=number,
            labels=labels,
            env=tree.task.env,
            seed=tree.task.seed,
            rollouts=len(tree.leaves),
            nodes=len(tree.nodes),
            mean_return=_mean(tree.returns),
            best_return=max(tree.returns),
            terms={name: _mean(tree.term(name)) for name in names},
            successes={name: sum(map(is_success, tree.term(name))) for name in names},
            causes=Counter(str(tree.nodes[i].info.get("cause")) for i in tree.leaves if tree.nodes[i].truncated),
            sampled_tokens=tree.num_sampled_tokens,
            tool_calls=sum(tool_results(node.messages) for node in tree.nodes),
        )

    def success(self, term: str) -> float | None:
        """The share of the rollouts that reached 1 in a reward term; None where no turn of the tree has that term."""
        count = self.successes.get(term)
        return None if count is None else count / self.rollouts


def _mean(values: Sequence[float]) -> float:
    """Infinite where the sum is, which statistics.fmean refuses."""
    return sum(values) / len(values)


@dataclass(frozen=True, slots=True)
class Entry:
    """A line of the index."""

    summary: TreeSummary
    offset: int
    end: int
    opening: str  # key of what the tree begins with, if others may share it; else empty


_COLUMNS = "number told stage step env mean_return rollouts terms start finish opening checksum".split()
_TABLES = f"""
CREATE TABLE trees (number INTEGER PRIMARY KEY, {", ".join(_COLUMNS[1:])});
CREATE INDEX openings ON trees (opening, number) WHERE opening != '';
CREATE TABLE tail (checksum INTEGER);
PRAGMA user_version = {_VERSION};
"""  # columns have no types, so that cells are read as they were written
_NEWEST = "ORDER BY number DESC"


class Spoilt(sqlite3.DatabaseError):
    """The index holds other bytes than were written to it."""


class Index:
    """Entries by number. Safe to use from several threads; sqlite3.Error where the file cannot be written.

    Spoilt, a kind of that, in every method that meets it.
    """

    def __init__(self, path: Path | None) -> None:
        """None: in memory."""
        self._lock = threading.RLock()
        self._connection = self._open(path)
        self._closer = weakref.finalize(self, self._connection.close)

    def _open(self, path: Path | None) -> sqlite3.Connection:
        connection = sqlite3.connect(path or ":memory:", timeout=30, isolation_level=None, check_same_thread=False)
        try:
            with _sound():
                _prepare(connection)
        except BaseException as error:
            connection.close()
            if path and isinstance(error, Spoilt):
                path.unlink(missing_ok=True)
                return self._open(path)
            raise
        return connection

    def close(self) -> None:
        self._closer()

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """A transaction: no other process changes the index meanwhile, and all is done or nothing."""
        with self._lock, _sound():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    @property
    def count(self) -> int:
        """Trees in the index."""
        return self._first("number + 1", _NEWEST) or 0

    @property
    def end(self) -> int:
        """Bytes of the store that the index covers."""
        return self._first("finish", _NEWEST) or 0

    @property
    def tail(self) -> int:
        """Checksum of the last bytes that the index covers."""
        found = self._rows("SELECT checksum FROM tail")
        return found[0][0] if found else zlib.crc32(b"")

    def add(self, entries: Iterable[Entry], tail: int) -> None:
        """Within `changing`."""
        marks = ", ".join("?" * len(_COLUMNS))
        self._connection.executemany(f"INSERT INTO trees VALUES ({marks})", map(_row, entries))
        self.mark(tail)

    def forget(self, size: int) -> None:
        """Drops what ends after this offset. Within `changing`."""
        self._connection.execute("DELETE FROM trees WHERE finish > ?", [size])

    def mark(self, tail: int) -> None:
        """Notes the checksum of the last bytes covered. Within `changing`."""
        self._connection.execute("DELETE FROM tail")
        self._connection.execute("INSERT INTO tail VALUES (?)", [tail])

    def place(self, number: int) -> int | None:
        """The offset of a tree's record."""
        found = self._since("start", number, 1) if number >= 0 else []
        return found[0][-1] if found else None

    def covered(self, size: int) -> int:
        """How many trees end within so many bytes."""
        return sum(self._all("finish <= ?", size))

    def ends_at(self, size: int) -> bool:
        """Whether a record ends, or the first begins, at this offset."""
        return size == 0 or any(self._all("finish = ?", size))

    def last_opening(self, key: str, since: int) -> int | None:
        """The offset of the last record with an opening, if it is one of those from a number on."""
        return self._first("start", f"WHERE opening = ? AND opening != '' AND number >= ? {_NEWEST}", key, since)

    def summaries(self, where: Where, start: int, limit: int) -> list[TreeSummary | None]:
        """The summaries of at most `limit` trees from the number `start` on; None for one that does not pass `where`.

        `where.text` is ignored.
        """
        narrowed, values = _narrowed(where)
        rows = self._since(narrowed, start, limit, *values)
        candidates = (TreeSummary(*json.loads(told)) if may_pass else None for _, told, *_, may_pass in rows)
        return [summary if summary is not None and where.passes(summary) else None for summary in candidates]

    def _all(self, wanted: str, *values: Any) -> Iterator[Any]:
        """What is wanted of every tree."""
        start = 0
        while found := self._since(wanted, start, _BATCH, *values):
            yield from (row[-1] for row in found)
            start += len(found)

    def _since(self, wanted: str, start: int, limit: int, *values: Any) -> list[tuple[Any, ...]]:
        """Rows of the trees from a number on."""
        found = self._read(wanted, "WHERE number >= ? ORDER BY number LIMIT ?", *values, start, limit)
        if any(row[0] != number for number, row in enumerate(found, start)):
            raise Spoilt("a row is missing")
        return found

    def _first(self, wanted: str, which: str, *values: Any) -> int | None:
        found = self._read(wanted, f"{which} LIMIT 1", *values)
        return found[0][-1] if found else None

    def _read(self, wanted: str, which: str, *values: Any) -> list[tuple[Any, ...]]:
        """Rows, each with what is wanted behind its cells."""
        found = self._rows(f"SELECT *, {wanted} FROM trees {which}", *values)
        if any(_checksum(row[:-2]) != row[-2] for row in found):
            raise Spoilt("a row is not as it was written")
        return found

    def _rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        with self._lock, _sound():
            return self._connection.execute(query, [_cell(value) for value in values]).fetchall()


def _narrowed(where: Where) -> tuple[str, list[Any]]:
    """A condition in SQL with its values. Every tree that passes `where` fulfils it, and few others do."""
    parts: list[tuple[str, list[Any]]] = [("1", [])]
    for column, text in (("stage", where.stage), ("env", where.env)):
        parts += [(f"{column} = ?", [text])] if text is not None else []
    for column, bounds in (("step", where.steps), ("mean_return", where.returns), ("rollouts", where.rollouts)):
        parts += [(f"{column} {sign} ?", [bound]) for sign, bound in _ends(bounds)]
    for name, bounds in where.terms.items():
        parts += [(_TERM.format(sign), [name, bound]) for sign, bound in _ends(wider(bounds))]
    return " AND ".join(condition for condition, _ in parts), [value for _, values in parts for value in values]


def _ends(bounds: Range) -> list[tuple[str, float]]:
    return [(sign, bound) for sign, bound in zip((">=", "<="), bounds, strict=True) if bound is not None]


def _prepare(connection: sqlite3.Connection) -> None:
    """Makes the tables where there are none of this version."""
    connection.execute("PRAGMA synchronous = OFF")  # what a crash of the machine spoils is built again
    if connection.execute("PRAGMA user_version").fetchone()[0] != _VERSION:
        connection.execute("BEGIN IMMEDIATE")
        if connection.execute("PRAGMA user_version").fetchone()[0] != _VERSION:  # nobody else was quicker
            for [table] in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
                connection.execute(f'DROP TABLE "{table}"')
            for statement in _TABLES.split(";"):
                connection.execute(statement)
        connection.execute("COMMIT")


@contextlib.contextmanager
def _sound() -> Iterator[None]:
    """Spoilt where SQLite finds other bytes than it can have written."""
    try:
        yield
    except sqlite3.ProgrammingError:
        raise
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:  # the latter where its message quotes the file
        name = getattr(error, "sqlite_errorname", "SQLITE_ERROR")  # there is none for a cell that is no text
        if isinstance(error, sqlite3.OperationalError) and name != "SQLITE_ERROR":
            raise  # such as a full disk, or a folder that cannot be written
        raise Spoilt(str(error)) from error


def _row(entry: Entry) -> tuple[Any, ...]:
    """Its cells and their checksum: what a listing tells, what filters read, and where the record lies."""
    summary, labels = entry.summary, entry.summary.labels
    told = json.dumps([getattr(summary, each.name) for each in fields(TreeSummary)], default=dict)
    terms = json.dumps(summary.terms, default=dict)
    filtered = (labels.get("stage"), labels.get("step"), summary.env, summary.mean_return, summary.rollouts, terms)
    place = (entry.offset, entry.end, entry.opening)
    cells = tuple(map(_cell, (summary.number, told, *filtered, *place)))
    return *cells, _checksum(cells)


def _cell(value: Any) -> str | int | float | None:
    """The nearest that SQLite can hold: no half of a surrogate pair, no integer beyond 63 bits, no NaN."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, int):
        return max(-(1 << 63), min(int(value), (1 << 63) - 1))
    return float(value) if isinstance(value, float) and not math.isnan(value) else None


def _checksum(cells: Sequence[Any]) -> int:
    return zlib.crc32(ascii(cells).encode())
