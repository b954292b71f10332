"""An index of a store in SQLite: where every tree lies, and its summary, for listing and filtering.

SQLite, for it is in the standard library, takes single rows as cheaply as it filters many, and lets several processes
read while one writes; DuckDB would scan faster, which listings do not need. The index is a cache: what it lacks it
takes from the store, and without it all is there. Where it cannot be written, one in memory stands in.
"""

from __future__ import annotations

import contextlib
import json
import math
import sqlite3
import threading
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from .tree import RolloutTree, tool_results

Range = tuple[float | None, float | None]  # least and most, both included; None: no bound
_ANY: Range = (None, None)
_VERSION = 1  # of the tables
_TERM = "iif(json_valid(terms), json_extract(terms, ?), NULL)"  # not a number is no JSON


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
            causes=Counter(str(tree.nodes[i].info.get("cause")) for i in tree.leaves if tree.nodes[i].truncated),
            sampled_tokens=tree.num_sampled_tokens,
            tool_calls=sum(tool_results(node.messages) for node in tree.nodes),
        )


def _mean(values: Sequence[float]) -> float:
    """Infinite where the sum is, which statistics.fmean refuses."""
    return sum(values) / len(values)


@dataclass(frozen=True, slots=True)
class Where:
    """Which trees: all that meet every condition."""

    stage: str | None = None
    steps: Range = _ANY
    env: str | None = None
    returns: Range = _ANY  # mean over the tree's rollouts
    terms: Mapping[str, Range] = field(default_factory=dict)  # reward terms by name: mean over the rollouts
    rollouts: Range = _ANY

    def sql(self) -> tuple[str, list[Any]]:
        """Conditions and their values."""
        conditions = ["1"]
        values: list[Any] = []
        for column, value in (("stage", self.stage), ("env", self.env)):
            if value is not None:
                conditions.append(f"{column} = ?")
                values.append(value)
        columns = (("step", self.steps), ("mean_return", self.returns), ("rollouts", self.rollouts))
        ranges: list[tuple[str, list[Any], Range]] = [(column, [], range) for column, range in columns]
        ranges += [(_TERM, [f"$.{json.dumps(name)}"], bounds) for name, bounds in self.terms.items()]
        for column, given, bounds in ranges:
            for sign, bound in zip((">=", "<="), bounds, strict=True):
                if bound is not None:
                    conditions.append(f"{column} {sign} ?")
                    values += [*given, bound]
        return " AND ".join(conditions), values


@dataclass(frozen=True, slots=True)
class Entry:
    """A line of the index."""

    summary: TreeSummary
    offset: int
    end: int
    opening: str  # key of what the tree begins with, if others may share it; else empty


_COLUMNS = ", ".join(each.name for each in fields(TreeSummary))
_TABLES = f"""
CREATE TABLE trees (
    number INTEGER PRIMARY KEY, labels TEXT, env TEXT, seed TEXT, rollouts INTEGER, nodes INTEGER, mean_return REAL,
    best_return REAL, terms TEXT, causes TEXT, sampled_tokens INTEGER, tool_calls INTEGER,
    stage, step, start INTEGER, "end" INTEGER, opening TEXT
);
CREATE INDEX stages ON trees (stage, step);
CREATE INDEX openings ON trees (opening, number) WHERE opening != '';
CREATE TABLE tail (checksum INTEGER);
PRAGMA user_version = {_VERSION};
"""  # seed is text: SQLite's integers end at 63 bits


class Index:
    """Entries by number. Safe to use from several threads; sqlite3.Error where the file cannot be written."""

    def __init__(self, path: Path | None) -> None:
        """None: in memory."""
        self._lock = threading.RLock()
        self._connection = self._open(path)
        self._closer = weakref.finalize(self, self._connection.close)

    def _open(self, path: Path | None) -> sqlite3.Connection:
        connection = sqlite3.connect(path or ":memory:", timeout=30, isolation_level=None, check_same_thread=False)
        try:
            connection.execute("PRAGMA synchronous = OFF")  # what a crash of the machine spoils is built again
            if connection.execute("PRAGMA user_version").fetchone()[0] != _VERSION:
                connection.execute("BEGIN IMMEDIATE")
                if connection.execute("PRAGMA user_version").fetchone()[0] != _VERSION:  # nobody else was quicker
                    for [table] in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
                        connection.execute(f'DROP TABLE "{table}"')
                    for statement in _TABLES.split(";"):
                        connection.execute(statement)
                connection.execute("COMMIT")
        except BaseException as error:
            connection.close()
            if path and type(error) is sqlite3.DatabaseError:  # no database at all
                path.unlink()
                return self._open(path)
            raise
        return connection

    def close(self) -> None:
        self._closer()

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """A transaction: no other process changes the index meanwhile, and all is done or nothing."""
        with self._lock:
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
        return self._number("SELECT max(number) + 1 FROM trees") or 0

    @property
    def end(self) -> int:
        """Bytes of the store that the index covers."""
        return self._number('SELECT "end" FROM trees ORDER BY number DESC LIMIT 1') or 0

    @property
    def tail(self) -> int | None:
        """Checksum of the last bytes that the index covers."""
        return self._number("SELECT checksum FROM tail")

    def add(self, entries: Iterable[Entry], tail: int) -> None:
        """Within `changing`."""
        self._connection.executemany(
            f"INSERT INTO trees VALUES ({', '.join('?' * 17)})",
            ((*_cells(entry.summary), entry.offset, entry.end, entry.opening) for entry in entries),
        )
        self.mark(tail)

    def forget(self, size: int) -> None:
        """Drops what ends after this offset. Within `changing`."""
        self._connection.execute('DELETE FROM trees WHERE "end" > ?', [size])

    def mark(self, tail: int) -> None:
        """Notes the checksum of the last bytes covered. Within `changing`."""
        self._connection.execute("DELETE FROM tail")
        self._connection.execute("INSERT INTO tail VALUES (?)", [tail])

    def place(self, number: int) -> int | None:
        """The offset of a tree's record."""
        return self._number("SELECT start FROM trees WHERE number = ?", number)

    def covered(self, size: int) -> int:
        """How many trees end within so many bytes."""
        return self._number('SELECT count(*) FROM trees WHERE "end" <= ?', size) or 0

    def last_opening(self, key: str, since: int) -> int | None:
        """The offset of the last record with an opening, if it is one of those from a number on."""
        return self._number(
            "SELECT start FROM trees WHERE opening = ? AND opening != '' AND number >= ? ORDER BY number DESC LIMIT 1",
            key,
            since,
        )

    def summaries(self, where: Where, start: int, limit: int) -> list[TreeSummary]:
        """Of the first trees from a number on that are meant."""
        conditions, values = where.sql()
        query = f"SELECT {_COLUMNS} FROM trees WHERE number >= ? AND {conditions} ORDER BY number LIMIT ?"
        with self._lock:
            return [_summary(row) for row in self._connection.execute(query, [start, *values, limit])]

    def matching(self, where: Where) -> int:
        """How many trees are meant."""
        conditions, values = where.sql()
        return self._number(f"SELECT count(*) FROM trees WHERE {conditions}", *values) or 0

    def _number(self, query: str, *values: Any) -> int | None:
        with self._lock:
            row = self._connection.execute(query, values).fetchone()
        return None if row is None or row[0] is None else int(row[0])


def _cells(summary: TreeSummary) -> list[Any]:
    """The columns of a summary, then those that only filters read."""
    cells: list[Any] = []
    for name in _COLUMNS.split(", "):
        cell = getattr(summary, name)
        cells.append(json.dumps(dict(cell)) if isinstance(cell, Mapping) else str(cell) if name == "seed" else cell)
    known = (summary.labels.get(name) for name in ("stage", "step"))
    return [*cells, *(value if isinstance(value, str | int | float) else None for value in known)]


def _summary(row: tuple[Any, ...]) -> TreeSummary:
    cells = dict(zip(_COLUMNS.split(", "), row, strict=True))
    for name in ("labels", "terms", "causes"):
        cells[name] = json.loads(cells[name])
    for name in ("mean_return", "best_return"):
        cells[name] = math.nan if cells[name] is None else cells[name]  # which SQLite does not know
    return TreeSummary(**{**cells, "seed": int(cells["seed"])})
