"""EpisodeStore: an append-only file of rollout trees.

Every tree is one record, a line of JSON. records.py defines what a record holds, frames.py how records are laid out in
the file. `zstdcat trees.jsonl.zst` shows the lines. Beside the file is its index (index.py), a cache that readers bring
up to date with the trees that were appended since. Therefore listing, counting, or reading one tree does not read the
other trees.

One process writes at a time: it holds a lock on the file, which ends with the process. A killed process loses at most
the record that it was writing. That record is cut off; readers leave it out, and the next writer removes it. Nothing is
synced to the disk, so a crash of the machine loses what the system had not yet written out. Any other wrong byte raises
DamagedStore, and so does a file that is shorter than its index says. `salvage` keeps the records that can be read.
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
_CACHED = 64  # openings kept in memory
_ALL = Where()
CUT_OFF = "it is cut off"


class StoreLocked(StoreError):
    """Another process, or another EpisodeStore in this process, writes to the store."""


@dataclass(frozen=True, slots=True)
class Loss:
    """Bytes of a store that hold no readable record."""

    offset: int
    size: int  # in bytes; 0 if records are missing at the offset
    records: range  # the numbers of the lost records, as far as they are known
    why: str  # the reason, in words


class EpisodeStore:
    """Trees in the order of writing, each with labels such as its stage and step.

    Every method raises DamagedStore where it reads damaged bytes. A file whose name does not end in .zst holds plain
    lines, as all files of schema 1 did.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._layout = layout_of(path)
        self._index: Index | None = None
        self._openings: dict[tuple[int, int], Opening] = {}  # by offset and checksum
        self._lock: _Lock | None = None

    @property
    def index_path(self) -> Path:
        """The file of the index. It can be removed at any time."""
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
    ) -> int:
        """Writes one record; the tree's number.

        `advantages` are [rollout][turn]; each is a number, or a sequence with one number for each sampled token.
        `values` are [node][token], the value of the state before each sampled token. `lessons` are the names of the
        lessons in force. Raises StoreLocked while another process writes, and StoreError if the disk is full; then the
        store is as it was before.
        """
        numbers = None if advantages is None else plain(advantages)
        lock = self._locked()
        number, offset = self._begin(lock)
        key = opening_key(tree)
        shared = self._ask(Index.last_opening, key, number - SHARED + 1)
        opening = None
        if shared is not None:
            with self.path.open("rb") as file, contextlib.suppress(ValueError):  # it is damaged: write this tree's own
                opening = shared, self._opening(file, shared)
        summary = TreeSummary.of(number, json.loads(json.dumps(labels)), tree)
        line = write_record(Record(number, labels, tree, numbers, False, values, tuple(lessons)), opening)
        data = self._layout.encode(number, line)
        try:
            write(lock.file, data)
        except OSError as error:
            with contextlib.suppress(OSError):  # the record stays, cut off, until the next writer removes it
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
        except sqlite3.Error:  # the tree is stored; the index takes it up with the next reading
            self._drop_index()
        return number

    def truncate(self, size: int) -> None:
        """Removes what was written after the file had `size` bytes. DamagedStore if no record ends at that byte."""
        if size > self.size:
            raise DamagedStore(
                f"{self.path} ends at byte {self.size}, but {size} bytes were written: trees are missing"
            )
        if not self.path.exists():
            return
        lock = self._locked()
        try:
            self._fresh_index()
        except DamagedStore:  # the index covers more bytes than the file has: it may belong to another file
            self._discard_index()
        with contextlib.suppress(StoreError):  # the damage may come after the byte to truncate at
            self._catch_up()
        if not self._ask(Index.ends_at, size):
            raise DamagedStore(f"{self.path}: no record ends at byte {size}: the file is not the one it was")
        index = self._open_index()
        try:
            with index.changing():
                index.forget(size)
                os.ftruncate(lock.file, size)
                index.mark(self._tail(index.end))
        except sqlite3.Error:  # an index that still listed the removed trees would report them as missing
            self._drop_index()
            self.index_path.unlink(missing_ok=True)
            os.ftruncate(lock.file, size)

    def lock(self) -> None:
        """Keeps others from writing until `close`. StoreLocked if somebody else is writing."""
        self._locked()

    @contextlib.contextmanager
    def exclusively(self) -> Iterator[None]:
        """Keeps others from writing inside the `with` block. StoreLocked if somebody else is writing."""
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
        """Every whole record from the number `start` on, read one at a time."""
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
        """(labels, tree) of the tree with a number. IndexError if there is none."""
        record = self.record(number)
        return record.labels, record.tree

    def record(self, number: int) -> Record:
        """The tree with a number and all that is stored with it. IndexError if there is none."""
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
                    if summary is not None and (where.text is None or where.text_occurs(self.read(summary.number)[1])):
                        yield summary
                start += len(batch)
            if not self._catch_up(_BATCH):
                return

    def matching(self, where: Where = _ALL) -> int:
        """How many trees `where` means."""
        return sum(1 for _ in self.summaries(where))

    def survey(self) -> Iterator[Record | Loss]:
        """Every readable record, and the losses between them. StoreError if a record has a newer schema."""
        offset = number = 0
        lost: Loss | None = None  # begins where it says; its size and records are known at the next readable record
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
        with contextlib.suppress(DamagedStore):  # the index covers more than the file has: a loss, added below
            self._fresh_index()
        index = self._open_index()
        if index.end > size:
            lost = lost or Loss(size, 0, range(0), "records are missing")
        if lost:
            beyond = max(number + (lost.offset < size), index.count)
            yield replace(lost, size=size - lost.offset, records=range(number, beyond))

    @property
    def size(self) -> int:
        """Bytes written so far."""
        return self.path.stat().st_size if self.path.exists() else 0

    @property
    def cut_off(self) -> int:
        """Bytes of an incomplete record at the end. Its writer was killed, or is still writing it."""
        self._catch_up()
        return self.size - self._fresh_index().end

    # records

    def _place(self, number: int) -> int | None:
        """The offset of the record with a number; None if there is none."""
        offset = self._ask(Index.place, number)
        if offset is None:
            self._catch_up()
            offset = self._ask(Index.place, number)
        return offset

    def _pieces(self, file: BinaryIO, offset: int, number: int) -> Iterator[Piece]:
        """The records from the one at `offset`, which has this number. Raises DamagedStore where one is damaged."""
        try:
            for piece in pieces(self._layout, file, offset):
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
            key = offset, _checksum(piece.line)  # another process may have replaced the record at this offset
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
        while self._lock is None or not self._lock.holds(
            self.path
        ):  # somebody may have replaced the file before the lock
            self.close()
            self._lock = _Lock(self.path)
        return self._lock

    def _begin(self, lock: _Lock) -> tuple[int, int]:
        """Brings the index up to date and removes a cut-off record from the file. -> (number of trees, of bytes)"""
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
        """Removes the file of the index, so that it is rebuilt. Others who have it open can still read it."""
        self._index = None
        try:
            self.index_path.unlink(missing_ok=True)
        except OSError:
            self._index = Index(None)

    def _fresh_index(self) -> Index:
        """The index, which covers the beginning of this file. DamagedStore if it covers more than there is."""
        try:
            return self._checked(self._open_index())
        except Spoilt:
            self._discard_index()
            return self._checked(self._open_index())

    def _ask(self, question: Callable[..., T], *values: Any) -> T:
        """Calls a method of Index, such as Index.place, with the values. A spoilt index is rebuilt and asked again."""
        try:
            return question(self._fresh_index(), *values)
        except Spoilt:
            self._discard_index()
            with contextlib.suppress(StoreError):  # whoever reads a damaged record raises the error
                self._catch_up()
            return question(self._fresh_index(), *values)

    def _checked(self, index: Index) -> Index:
        if index.end > self.size:
            with index.changing():  # nobody truncates the store during this
                count, end, size = index.count, index.end, self.size
            if end > size:
                whole = index.covered(size)
                raise DamagedStore(
                    f"{self.path}: ends at byte {size}, but its index tells of {end} bytes: records {whole} to "
                    f"{count - 1} are missing or cut off; `treegym runs repair {self.path.parent}` goes on without them"
                )
        if index.tail != self._tail(index.end):
            with index.changing():
                if index.tail != self._tail(index.end):  # the index belongs to another file, which this one replaced
                    index.forget(-1)
                    index.mark(_checksum(b""))
        return index

    def _catch_up(self, limit: int | None = None) -> int:
        """Adds to the index at most `limit` of the trees that were appended since. -> the number added"""
        added = 0
        while self._fresh_index().end < self.size:
            batch = _BATCH if limit is None else limit - added
            try:
                found = self._add_batch(self._fresh_index(), batch)
            except Spoilt:
                self._discard_index()
                continue
            except sqlite3.OperationalError:  # the index cannot be written
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
                damage = error  # the trees before it are added first
            if entries:
                index.add(entries, self._tail(entries[-1].end))
        if damage is not None:
            raise damage
        return len(entries)

    def _tail(self, end: int) -> int:
        """The checksum of the last _TAIL bytes before an offset, by which an index recognises its file."""
        if not self.path.exists():
            return _checksum(b"")
        with self.path.open("rb") as file:
            file.seek(max(0, end - _TAIL))
            return _checksum(file.read(min(end, _TAIL)))


_TAIL = 64  # bytes


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
    """The process that has locked a file, as /proc/locks of Linux names it."""
    inode = os.fstat(file).st_ino
    with contextlib.suppress(OSError):
        for line in Path("/proc/locks").read_text().splitlines():
            fields = line.split()
            if "FLOCK" in fields and "->" not in fields and fields[5].endswith(f":{inode}"):
                return "this process" if int(fields[4]) == os.getpid() else f"process {fields[4]}"
    return "another process"


def write(file: int, data: bytes) -> None:
    """Appends all of the data to an open file; os.write may write only a part."""
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


def sync(path: Path) -> None:
    """Returns when the file's bytes are on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def append_line(path: Path, row: Mapping[str, Any]) -> None:
    """Appends a row to a JSON lines file. NaN and infinities, which JSON lacks, become null."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(finite(row), ensure_ascii=False, separators=(",", ":"), allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """The value with None in place of each NaN and infinity, which JSON lacks."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a JSON lines file. An incomplete last line is left out."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)
