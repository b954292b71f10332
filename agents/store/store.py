"""EpisodeStore: an append-only file of rollout trees.

Every tree is one record, a line of JSON: what it holds is told in records.py, how it lies in the file in frames.py.
`zstdcat trees.jsonl.zst` shows the lines. Beside the file lies its index (index.py), a cache that a reader brings up to
date with whatever was appended since; so listing, counting and reading one tree do not read the others.

One process writes at a time, under a lock on the file that ends with the process. A killed process loses at most the
record that it was writing: it is cut off, readers leave it out, the next writer removes it. Nothing is synced to the
disk, so a machine that crashes loses what the system had not yet written out. Anything else that is wrong with the
bytes is a DamagedStore, a file shorter than its index says too; `salvage` goes on without what was lost.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import sqlite3
import struct
import weakref
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from ..tree import Advantages, RolloutTree
from .frames import Damage, DamagedStore, Piece, StoreError, layout_of, pieces
from .index import Entry, Index, Spoilt, TreeSummary
from .records import SHARED, Numbers, Opening, Record, UnknownSchema, opening_key, plain, read_record, write_record
from .where import Where

T = TypeVar("T")

_BATCH = 256  # trees that are listed, or added to the index, at a time
_CACHED = 64  # openings
_ALL = Where()
CUT_OFF = "it is cut off"


class StoreLocked(StoreError):
    """Another process writes to the store, or this one by another EpisodeStore."""


@dataclass(frozen=True, slots=True)
class Loss:
    """Bytes of a store that hold no readable record."""

    offset: int
    size: int  # 0: records are missing there
    records: range  # their numbers, as far as they are known
    why: str


class EpisodeStore:
    """Trees in the order of writing, each with labels such as its stage and step.

    Damage to the file is a DamagedStore, in every method that meets it. A file that is not named *.zst holds plain
    lines, as those of schema 1 did.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._layout = layout_of(path)
        self._index: Index | None = None
        self._openings: dict[tuple[int, int], Opening] = {}  # by offset and checksum
        self._lock: _Lock | None = None

    @property
    def index_path(self) -> Path:
        """Where the index lies; it can be removed at any time."""
        return self.path.with_name(f"{self.path.name}.index")

    # writing

    def append(
        self,
        tree: RolloutTree,
        /,
        advantages: Advantages | Numbers | None = None,
        values: Sequence[Sequence[float]] | None = None,
        lessons: Sequence[str] = (),
        **labels: Any,
    ) -> None:
        """Writes one record; a killed process loses at most that.

        `advantages` are [rollout][turn], each a number or one for each sampled token; `values` are [node][token], of
        the state before each sampled token; `lessons` are the names of those in force.

        StoreLocked while another process writes; StoreError where there is no room, after which the store is as before.
        """
        known = None if advantages is None else plain(advantages)
        lock = self._locked()
        number, offset = self._begin(lock)
        key = opening_key(tree)
        shared = self._ask(Index.last_opening, key, number - SHARED + 1)
        opening = None
        if shared is not None:
            with self.path.open("rb") as file, contextlib.suppress(ValueError):  # damaged: this tree stands for itself
                opening = shared, self._opening(file, shared)
        summary = TreeSummary.of(number, json.loads(json.dumps(labels)), tree)
        line = write_record(Record(number, labels, tree, known, False, values, tuple(lessons)), opening)
        data = self._layout.encode(number, line)
        try:
            write(lock.file, data)
        except OSError as error:
            with contextlib.suppress(OSError):  # then the record is cut off, which is mended later
                os.ftruncate(lock.file, offset)
            raise StoreError(
                f"{self.path}: tree {number} could not be written: {error.strerror}; "
                f"the {number} trees before it are whole"
            ) from error
        end, index = offset + len(data), self._open_index()
        entry = Entry(summary, offset, end, "" if opening else key)
        try:
            with index.changing():
                index.add([entry], _checksum(data[-_TAIL:]) if len(data) >= _TAIL else self._tail(end))
        except sqlite3.Error:  # the tree is stored; the index catches up when it can
            self._drop_index()

    def truncate(self, size: int) -> None:
        """Forgets what was written after the file had this size. DamagedStore where no record ends there."""
        if size > self.size:
            raise DamagedStore(
                f"{self.path} ends at byte {self.size}, but {size} bytes were written: trees are missing"
            )
        if not self.path.exists():
            return
        lock = self._locked()
        try:
            self._fresh_index()
        except DamagedStore:  # the index tells of more than there is: it may be that of another file
            self._discard_index()
        with contextlib.suppress(StoreError):  # what is damaged may come after
            self._catch_up()
        if not self._ask(Index.ends_at, size):
            raise DamagedStore(f"{self.path}: no record ends at byte {size}: the file is not the one it was")
        index = self._open_index()
        try:
            with index.changing():
                index.forget(size)
                os.ftruncate(lock.file, size)
                index.mark(self._tail(index.end))
        except sqlite3.Error:  # an index that cannot forget would miss the trees
            self._drop_index()
            self.index_path.unlink(missing_ok=True)
            os.ftruncate(lock.file, size)

    def lock(self) -> None:
        """Nobody else writes until `close`. StoreLocked where somebody does."""
        self._locked()

    @contextlib.contextmanager
    def exclusively(self) -> Iterator[None]:
        """Nobody else writes meanwhile. StoreLocked where somebody does."""
        self.lock()
        try:
            yield
        finally:
            self.close()

    def close(self) -> None:
        """Lets another process write."""
        if self._lock is not None:
            self._lock.release()
        self._lock = None
        self._drop_index()

    # reading

    def __iter__(self) -> Iterator[tuple[dict[str, Any], RolloutTree]]:
        """(labels, tree) of every whole record."""
        for record in self.records():
            yield record.labels, record.tree

    def records(self, start: int = 0) -> Iterator[Record]:
        """Every whole record from a number on, read one at a time."""
        self._fresh_index()
        offset = self._place(start) if start else 0
        if offset is None or not self.path.exists():
            return
        with self.path.open("rb") as file:
            for number, piece in enumerate(self._pieces(file, offset, start), start):
                yield self._decode(file, piece, number)

    def __len__(self) -> int:
        self._catch_up()
        return self._fresh_index().count

    def read(self, number: int) -> tuple[dict[str, Any], RolloutTree]:
        """(labels, tree) of the tree at a place. IndexError where there is none."""
        record = self.record(number)
        return record.labels, record.tree

    def record(self, number: int) -> Record:
        """The same with all that is stored beside it."""
        offset = self._place(number)
        if offset is None:
            raise IndexError(f"{self.path} holds no tree {number}; it has {len(self)}, numbered from 0")
        with self.path.open("rb") as file:
            for piece in self._pieces(file, offset, number):
                return self._decode(file, piece, number)
        raise self._damaged(number, offset, CUT_OFF)

    def summaries(self, where: Where = _ALL, start: int = 0) -> Iterator[TreeSummary]:
        """The summaries of the trees that `where` means, in the order of writing, from the number `start` on.

        The index answers, except for `where.text`: each tree that passes the other conditions is read for it. Trees
        that the index does not cover yet are read to add them.
        """
        while True:
            while batch := self._ask(Index.summaries, where, start, _BATCH):
                for summary in batch:
                    if summary is not None and (where.text is None or where.occurs(self.read(summary.number)[1])):
                        yield summary
                start += len(batch)
            if not self._catch_up(_BATCH):
                return

    def matching(self, where: Where = _ALL) -> int:
        """How many trees `where` means."""
        return sum(1 for _ in self.summaries(where))

    def survey(self) -> Iterator[Record | Loss]:
        """Every readable record, and what lies between them. StoreError where one is of a newer schema."""
        offset = number = 0
        lost: Loss | None = None  # up to here, how many records is not yet known
        size = self.size
        with self.path.open("rb") as file:
            while offset < size:
                start = offset
                try:
                    piece = self._layout.read(file, offset)
                except Damage as damage:
                    offset = self._layout.after(file, offset) or size
                    lost = lost or Loss(start, 0, range(0), str(damage))
                    continue
                if piece is None:
                    lost, offset = lost or Loss(start, 0, range(0), CUT_OFF), size
                    continue
                offset = piece.end
                if piece.number is not None and piece.number < number:
                    lost = lost or Loss(start, 0, range(0), f"record {piece.number} lies there once more")
                    continue
                now = max(number, piece.number or 0)
                if lost or now > number:
                    lost = lost or Loss(start, 0, range(0), "records are missing")
                    yield replace(lost, size=start - lost.offset, records=range(number, now))
                number, lost = now + 1, None
                try:
                    yield self._decode(file, piece, now)
                except DamagedStore as error:
                    yield Loss(start, offset - start, range(now, now + 1), str(error))
        with contextlib.suppress(DamagedStore):  # it tells of more than there is, as is said below
            self._fresh_index()
        known = self._open_index()
        if known.end > size:
            lost = lost or Loss(size, 0, range(0), "records are missing")
        if lost:
            beyond = max(number + (lost.offset < size), known.count)
            yield replace(lost, size=size - lost.offset, records=range(number, beyond))

    @property
    def size(self) -> int:
        """Bytes written so far."""
        return self.path.stat().st_size if self.path.exists() else 0

    @property
    def cut_off(self) -> int:
        """Bytes of a record at the end that was not written to its end: by a killed process, or not yet."""
        self._catch_up()
        return self.size - self._fresh_index().end

    # records

    def _place(self, number: int) -> int | None:
        """The offset of a record; None where there is none of that number."""
        offset = self._ask(Index.place, number)
        if offset is None:
            self._catch_up()
            offset = self._ask(Index.place, number)
        return offset

    def _pieces(self, file: BinaryIO, offset: int, number: int) -> Iterator[Piece]:
        """Records from the one with this offset and number on."""
        found = pieces(self._layout, file, offset)
        try:
            for piece in found:
                if piece.number not in (None, number):
                    raise Damage(piece.offset, f"record {piece.number} lies there")
                yield piece
                number += 1
        except Damage as damage:
            raise self._damaged(number, damage.offset, str(damage)) from None

    def _decode(self, file: BinaryIO, piece: Piece, number: int) -> Record:
        try:
            record = read_record(number, piece.line, lambda offset: self._opening(file, offset))
        except UnknownSchema as error:
            raise StoreError(f"{self.path}: record {number} at byte {piece.offset} {error}") from None
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, struct.error) as error:
            raise self._damaged(number, piece.offset, f"it holds no tree: {error}") from error
        return record

    def _opening(self, file: BinaryIO, offset: int) -> Opening:
        try:
            piece = self._layout.read(file, offset)
            if piece is None:
                raise ValueError(f"what it begins with, at byte {offset}, is missing")
            key = offset, _checksum(piece.line)  # another process may have written another record there
            opening = self._openings.get(key)
            if opening is None:
                tree = read_record(0, piece.line, self._no_opening).tree
                opening = Opening(tree.messages, tree.prompt)
                if len(self._openings) >= _CACHED:
                    self._openings.clear()
                self._openings[key] = opening
            return opening
        except (Damage, UnknownSchema) as error:
            raise ValueError(f"what it begins with, at byte {offset}, is damaged: {error}") from None

    @staticmethod
    def _no_opening(offset: int) -> Opening:
        raise ValueError("an opening has none itself")

    def _damaged(self, number: int, offset: int, why: str) -> DamagedStore:
        return DamagedStore(
            f"{self.path}: record {number} at byte {offset} is damaged: {why}; "
            f"`treegym runs repair {self.path.parent}` keeps what can be read"
        )

    # the lock and the index

    def _locked(self) -> _Lock:
        while self._lock is None or not self._lock.holds(self.path):  # it may be replaced until it is locked
            self.close()
            self._lock = _Lock(self.path)
        return self._lock

    def _begin(self, lock: _Lock) -> tuple[int, int]:
        """(trees, bytes) so far. The index is up to date; a record that was cut off is gone from the file."""
        while (index := self._fresh_index()).end != os.fstat(lock.file).st_size:
            end = index.end
            if not self._catch_up():  # no whole record follows
                os.ftruncate(lock.file, end)
        return index.count, index.end

    def _open_index(self) -> Index:
        if self._index is None:
            known = self.path.exists() or self.index_path.exists()
            try:
                self._index = Index(self.index_path if known else None)
            except (sqlite3.OperationalError, OSError):  # a folder that cannot be written, a full disk
                self._index = Index(None)
        return self._index

    def _drop_index(self) -> None:
        if self._index is not None:
            self._index.close()
        self._index = None

    def _discard_index(self) -> None:
        """Another one is built; who still reads this one may do so."""
        self._index = None
        try:
            self.index_path.unlink(missing_ok=True)
        except OSError:
            self._index = Index(None)

    def _fresh_index(self) -> Index:
        """The index, if it is one of this file. DamagedStore where it knows of more than there is."""
        try:
            return self._checked(self._open_index())
        except Spoilt:
            self._discard_index()
            return self._checked(self._open_index())

    def _ask(self, question: Callable[..., T], *values: Any) -> T:
        """What the index answers; a spoilt one is built anew before."""
        try:
            return question(self._fresh_index(), *values)
        except Spoilt:
            self._discard_index()
            with contextlib.suppress(StoreError):  # damage is told where it is met
                self._catch_up()
            return question(self._fresh_index(), *values)

    def _checked(self, index: Index) -> Index:
        if index.end > self.size:
            with index.changing():  # nobody truncates just now
                count, end, size = index.count, index.end, self.size
            if end > size:
                whole = index.covered(size)
                raise DamagedStore(
                    f"{self.path}: ends at byte {size}, but its index tells of {end} bytes: records {whole} to "
                    f"{count - 1} are missing or cut off; `treegym runs repair {self.path.parent}` goes on without them"
                )
        if index.tail != self._tail(index.end):
            with index.changing():
                if index.tail != self._tail(index.end):  # another file has taken the place of this one
                    index.forget(-1)
                    index.mark(_checksum(b""))
        return index

    def _catch_up(self, limit: int | None = None) -> int:
        """Adds to the index what was appended since; how many trees, at most `limit`."""
        added = 0
        while self._fresh_index().end < self.size:
            batch = _BATCH if limit is None else limit - added
            try:
                found = self._add_batch(self._fresh_index(), batch)
            except Spoilt:
                self._discard_index()
                continue
            except sqlite3.OperationalError:  # it cannot be written
                self._drop_index()
                self._index = Index(None)
                continue
            added += found
            if not found or added == limit:
                break
        return added

    def _add_batch(self, index: Index, limit: int) -> int:
        damage: StoreError | None = None
        with index.changing(), self.path.open("rb") as file:
            number, entries = index.count, list[Entry]()
            try:
                for piece in self._pieces(file, index.end, number):
                    record = self._decode(file, piece, number)
                    opening = "" if record.shares else opening_key(record.tree)
                    summary = TreeSummary.of(number, record.labels, record.tree)
                    entries.append(Entry(summary, piece.offset, piece.end, opening))
                    number += 1
                    if len(entries) == limit:
                        break
            except StoreError as error:
                damage = error  # what stands before it is listed all the same
            if entries:
                index.add(entries, self._tail(entries[-1].end))
        if damage is not None:
            raise damage
        return len(entries)

    def _tail(self, end: int) -> int:
        """Checksum of the last bytes before an offset, by which a file is known again."""
        if not self.path.exists():
            return _checksum(b"")
        with self.path.open("rb") as file:
            file.seek(max(0, end - _TAIL))
            return _checksum(file.read(min(end, _TAIL)))


_TAIL = 64


def _checksum(data: bytes) -> int:
    return zlib.crc32(data)


class _Lock:
    """The file of a store, open for appending, with the lock of its only writer."""

    def __init__(self, path: Path) -> None:
        self.file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(self.file)
            os.close(self.file)
            raise StoreLocked(
                f"{path} is locked: {holder} writes to it; wait until it has ended, or write elsewhere"
            ) from None
        self.release = weakref.finalize(self, os.close, self.file)

    def holds(self, path: Path) -> bool:
        """Whether the file is still the one at the path."""
        return path.exists() and os.path.samestat(os.fstat(self.file), path.stat())


def _holder(file: int) -> str:
    """The process that has locked a file, as Linux tells it."""
    inode = os.fstat(file).st_ino
    with contextlib.suppress(OSError):
        for line in Path("/proc/locks").read_text().splitlines():
            fields = line.split()
            if "FLOCK" in fields and "->" not in fields and fields[5].endswith(f":{inode}"):
                return "this process" if int(fields[4]) == os.getpid() else f"process {fields[4]}"
    return "another process"


def write(file: int, data: bytes) -> None:
    """Appends all of it to an open file."""
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


def sync(path: Path) -> None:
    """Returns when the file's bytes are on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def append_line(path: Path, row: Mapping[str, Any]) -> None:
    """Appends a row to a JSON lines file; numbers that JSON lacks are null."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(finite(row), ensure_ascii=False, separators=(",", ":"), allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """The value with null in place of each NaN and infinity, which JSON has not."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a JSON lines file; a last line that was cut off is left out."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)
