"""How records lie in a file: as zstd frames that tell damage from a cut, or as plain lines."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import zstandard

_HEADER = struct.Struct("<6I")  # magic, size of what follows, number, bytes of the frame, CRC of the frame, of these
_START = struct.pack("<2I", 0x184D2A50, _HEADER.size - 8)  # a skippable frame: zstd tools pass over it


class StoreError(Exception):
    """A store cannot be read or written. The text names the file, and the record and byte where there is one."""


class DamagedStore(StoreError):
    """Bytes of a store are not what was written."""


class Damage(Exception):
    """Why no record begins here; `offset` in bytes."""

    def __init__(self, offset: int, why: str) -> None:
        super().__init__(why)
        self.offset = offset


@dataclass(frozen=True, slots=True)
class Piece:
    """A record's bytes."""

    offset: int  # in the file
    end: int  # where the next one begins
    number: int | None  # its place in the store, where the layout knows it
    line: bytes  # JSON, ends with a newline


class Layout(Protocol):
    """How records are written one after the other."""

    def encode(self, number: int, line: bytes) -> bytes:
        """What is appended to the file."""
        ...

    def read(self, file: BinaryIO, offset: int) -> Piece | None:
        """The record at an offset; None at the end and where the last one was cut off. Damage where there is none."""
        ...

    def after(self, file: BinaryIO, offset: int) -> int | None:
        """The first offset behind a damage at which a record may begin; None: there is none."""
        ...


def layout_of(path: Path) -> Layout:
    """By the file's name: compressed frames in *.zst, else lines."""
    return Frames() if path.suffix == ".zst" else Lines()


class Frames:
    """A header, then one zstd frame with the line. Every byte is under one of the header's two checksums.

    The header has its own, so a length can be trusted: a file that ends before it was cut off, anything else that is
    wrong is damage. To zstd the header is a skippable frame: `zstdcat` shows the lines.
    """

    def __init__(self, level: int = 3) -> None:
        self._compressor = zstandard.ZstdCompressor(level, write_checksum=True, write_content_size=True)

    def encode(self, number: int, line: bytes) -> bytes:
        frame = self._compressor.compress(line)
        fields = _START + struct.pack("<3I", number, len(frame), zlib.crc32(frame))
        return fields + struct.pack("<I", zlib.crc32(fields)) + frame

    def read(self, file: BinaryIO, offset: int) -> Piece | None:
        file.seek(offset)
        header = file.read(_HEADER.size)
        if len(header) < _HEADER.size and _START.startswith(header[: len(_START)]):
            return None
        number, length, checksum = self._fields(header, offset)
        frame = file.read(length)
        if len(frame) < length:
            if self.after(file, offset) is not None:
                raise Damage(offset, "it ends too early")
            return None
        if zlib.crc32(frame) != checksum:
            raise Damage(offset, "its checksum does not match")
        end = offset + _HEADER.size + length
        return Piece(offset, end, number, zstandard.decompress(frame))  # threads may not share a decompressor

    def _fields(self, header: bytes, offset: int) -> tuple[int, int, int]:
        """Number of the record, length and checksum of its frame."""
        if not header.startswith(_START) or zlib.crc32(header[:-4]) != int.from_bytes(header[-4:], "little"):
            raise Damage(offset, "there is no header of a record")
        _, _, number, length, checksum, _ = _HEADER.unpack(header)
        return number, length, checksum

    def after(self, file: BinaryIO, offset: int) -> int | None:
        step = 1 << 20
        base = offset + 1
        while True:
            file.seek(base)
            window = file.read(step + _HEADER.size - 1)
            at = window.find(_START)
            while at >= 0:
                header = window[at : at + _HEADER.size]
                if len(header) == _HEADER.size and zlib.crc32(header[:-4]) == int.from_bytes(header[-4:], "little"):
                    return base + at
                at = window.find(_START, at + 1)
            if len(window) < step + _HEADER.size - 1:
                return None
            base += step


class Lines:
    """One line each: schema 1, and runs that began with it. No checksums: damage shows where it breaks the JSON."""

    def encode(self, number: int, line: bytes) -> bytes:
        return line

    def read(self, file: BinaryIO, offset: int) -> Piece | None:
        file.seek(offset)
        line = file.readline()
        return Piece(offset, offset + len(line), None, line) if line.endswith(b"\n") else None

    def after(self, file: BinaryIO, offset: int) -> int | None:
        file.seek(offset)
        return offset + len(line) if (line := file.readline()).endswith(b"\n") else None


def pieces(layout: Layout, file: BinaryIO, offset: int) -> Iterator[Piece]:
    """The records from an offset on, up to the end or to the last one if it was cut off. Damage where one is."""
    while (piece := layout.read(file, offset)) is not None:
        yield piece
        offset = piece.end
