"""An index of a store in SQLite: where every tree lies, and its summary, for listing and filtering.

SQLite is in the standard library, reads a single row as cheaply as it filters many, and lets several processes read
while one writes. DuckDB would scan faster, which listings do not need. The index is a cache: the store can rebuild it
at any time. Where the file of the index cannot be written, an index in memory replaces it.

Every row has a checksum. An answer comes only from rows whose checksums match and whose numbers have no gap, and the
newest row is compared with the store. Therefore a filter reads all rows, a listing reads the rows that it lists, and
opening a store reads the newest row only. An index with a wrong row is rebuilt. Two things are not covered: one change
in four billion leaves the checksum as it was; and a wrong row may make a new tree share its opening with another
earlier tree than usual, which is still correct.
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

from ...envs import Message
from ...envs.notes import own_text
from ..tree import RolloutTree, is_success, tool_results
from .where import Range, Where, wider

_VERSION = 4  # of the tables
QUESTION = 160  # characters of what was asked that a listing shows
_BATCH = 256  # rows read at a time
_TERM = "iif(json_valid(terms), (SELECT value FROM json_each(terms) WHERE key = ?) {} ?, 1)"  # NaN is no valid JSON


@dataclass(frozen=True, slots=True)
class TreeSummary:
    """The facts about a stored tree that a listing shows and that conditions ask about."""

    number: int  # its place in the store, from 0
    labels: Mapping[str, Any]  # stage, step, ...
    env: str
    seed: int  # of the task
    rollouts: int
    nodes: int
    mean_return: float
    best_return: float
    terms: Mapping[str, float]  # reward term: its mean over the rollouts
    successes: Mapping[str, int]  # reward term: number of rollouts that reached 1 in it
    causes: Mapping[str, int]  # cause of truncation: number of rollouts
    sampled_tokens: int  # of the nodes; a turn that rollouts share counts once
    tool_calls: int  # counted in the same way
    question: str = ""  # what was asked: the beginning of the prompt's last message

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
            question=_beginning(tree.messages),
        )

    def success(self, term: str) -> float | None:
        """The share of the rollouts that reached 1 in a reward term; None where no turn of the tree has that term."""
        count = self.successes.get(term)
        return None if count is None else count / self.rollouts


def _beginning(messages: Sequence[Message]) -> str:
    """Of the last message, without the notes behind it, on one line."""
    return " ".join(own_text(messages[-1].text).split())[:QUESTION] if messages else ""


def _mean(values: Sequence[float]) -> float:
    """The mean. If the sum is infinite, so is the mean; statistics.fmean would raise."""
    return sum(values) / len(values)


@dataclass(frozen=True, slots=True)
class Entry:
    """A row of the index: what it knows about one tree."""

    summary: TreeSummary
    offset: int  # of the tree's record in the store, in bytes
    end: int  # of the record, in bytes
    opening: str  # key of the tree's messages and prompt; empty if the record refers to an earlier one for them


_COLUMNS = "number told stage step env mean_return rollouts terms start finish opening checksum".split()
_TABLES = f"""
CREATE TABLE trees (number INTEGER PRIMARY KEY, {", ".join(_COLUMNS[1:])});
CREATE INDEX openings ON trees (opening, number) WHERE opening != '';
CREATE TABLE tail (checksum INTEGER);
PRAGMA user_version = {_VERSION};
"""  # the columns have no types: SQLite would convert cells to them, and their checksums would no longer match
_NEWEST = "ORDER BY number DESC"


class Spoilt(sqlite3.DatabaseError):
    """The file of the index does not hold what was written to it."""


class Index:
    """Entries by the number of their tree. Several threads may use an index at once.

    Its methods raise sqlite3.Error where the file cannot be written, and Spoilt, which is a kind of sqlite3.Error, when
    they read something that was not written there.
    """

    def __init__(self, path: Path | None) -> None:
        """Opens the index in the file `path`, which is created if it is missing. None: an index in memory."""
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
        """A transaction. No other process changes the index during it; if it raises, nothing has changed."""
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
        """The number of trees in the index."""
        return self._first("number + 1", _NEWEST) or 0

    @property
    def end(self) -> int:
        """How many bytes of the store, from its beginning, the index covers."""
        return self._first("finish", _NEWEST) or 0

    @property
    def tail(self) -> int:
        """The checksum of the last bytes of the store that the index covers."""
        rows = self._rows("SELECT checksum FROM tail")
        return rows[0][0] if rows else zlib.crc32(b"")

    def add(self, entries: Iterable[Entry], tail: int) -> None:
        """Adds the trees that follow the last one; `tail` becomes the new `tail`. Only within `changing`."""
        marks = ", ".join("?" * len(_COLUMNS))
        self._connection.executemany(f"INSERT INTO trees VALUES ({marks})", map(_row, entries))
        self.mark(tail)

    def forget(self, size: int) -> None:
        """Removes the trees whose records end after the first `size` bytes of the store. Only within `changing`."""
        self._connection.execute("DELETE FROM trees WHERE finish > ?", [size])

    def mark(self, tail: int) -> None:
        """Sets `tail`. Only within `changing`."""
        self._connection.execute("DELETE FROM tail")
        self._connection.execute("INSERT INTO tail VALUES (?)", [tail])

    def place(self, number: int) -> int | None:
        """The offset of a tree's record; None if the index has no tree of this number."""
        rows = self._since("start", number, 1) if number >= 0 else []
        return rows[0][-1] if rows else None

    def covered(self, size: int) -> int:
        """How many trees have records that end within the first `size` bytes of the store."""
        return sum(self._all("finish <= ?", size))

    def ends_at(self, size: int) -> bool:
        """Whether a record ends at the offset `size`, or `size` is 0, where the first record begins."""
        return size == 0 or any(self._all("finish = ?", size))

    def last_opening(self, key: str, since: int) -> int | None:
        """The offset of the last record whose opening has this key, among the trees from the number `since` on."""
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
        """The value of the SQL expression `wanted` for every tree."""
        start = 0
        while rows := self._since(wanted, start, _BATCH, *values):
            yield from (row[-1] for row in rows)
            start += len(rows)

    def _since(self, wanted: str, start: int, limit: int, *values: Any) -> list[tuple[Any, ...]]:
        """The rows of at most `limit` trees from the number `start` on, as `_read` gives them."""
        rows = self._read(wanted, "WHERE number >= ? ORDER BY number LIMIT ?", *values, start, limit)
        if any(row[0] != number for number, row in enumerate(rows, start)):
            raise Spoilt("a row is missing")
        return rows

    def _first(self, wanted: str, which: str, *values: Any) -> int | None:
        """The value of the SQL expression `wanted` in the first of the rows that `which` selects; None without rows."""
        rows = self._read(wanted, f"{which} LIMIT 1", *values)
        return rows[0][-1] if rows else None

    def _read(self, wanted: str, which: str, *values: Any) -> list[tuple[Any, ...]]:
        """The rows that `which` selects. The value of the SQL expression `wanted` follows the cells of each."""
        rows = self._rows(f"SELECT *, {wanted} FROM trees {which}", *values)
        if any(_checksum(row[:-2]) != row[-2] for row in rows):
            raise Spoilt("a row is not as it was written")
        return rows

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
    """Creates the tables, unless the file has those of this version; tables of another version are dropped."""
    connection.execute("PRAGMA synchronous = OFF")  # an index that a crash of the machine spoils is rebuilt
    if connection.execute("PRAGMA user_version").fetchone()[0] != _VERSION:
        connection.execute("BEGIN IMMEDIATE")
        # Another process may have created them before the transaction began.
        if connection.execute("PRAGMA user_version").fetchone()[0] != _VERSION:
            for [table] in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
                connection.execute(f'DROP TABLE "{table}"')
            for statement in _TABLES.split(";"):
                connection.execute(statement)
        connection.execute("COMMIT")


@contextlib.contextmanager
def _sound() -> Iterator[None]:
    """Raises Spoilt in place of the errors of SQLite which say that the file is not what SQLite wrote."""
    try:
        yield
    except sqlite3.ProgrammingError:
        raise
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:  # SQLite's message may quote bytes of the file
        name = getattr(error, "sqlite_errorname", "SQLITE_ERROR")  # missing if a cell is not valid text
        if isinstance(error, sqlite3.OperationalError) and name != "SQLITE_ERROR":
            raise  # such as a full disk, or a folder that cannot be written
        raise Spoilt(str(error)) from error


def _row(entry: Entry) -> tuple[Any, ...]:
    """The cells of a row: the summary as JSON, the columns that `_narrowed` reads, the place, and the checksum."""
    summary, labels = entry.summary, entry.summary.labels
    told = json.dumps([getattr(summary, each.name) for each in fields(TreeSummary)], default=dict)
    terms = json.dumps(summary.terms, default=dict)
    filtered = (labels.get("stage"), labels.get("step"), summary.env, summary.mean_return, summary.rollouts, terms)
    place = (entry.offset, entry.end, entry.opening)
    cells = tuple(map(_cell, (summary.number, told, *filtered, *place)))
    return *cells, _checksum(cells)


def _cell(value: Any) -> str | int | float | None:
    """The nearest value that SQLite can hold. It holds no lone surrogates, no integers beyond 64 bits, and no NaN."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, int):
        return max(-(1 << 63), min(int(value), (1 << 63) - 1))
    return float(value) if isinstance(value, float) and not math.isnan(value) else None


def _checksum(cells: Sequence[Any]) -> int:
    return zlib.crc32(ascii(cells).encode())
