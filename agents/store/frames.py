"""How records are laid out in a file: as zstd frames, where damage differs from a cut, or as plain lines."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import zstandard

# magic number, size of the rest, number of the record, bytes of its frame, CRC of its frame, CRC of these five
_HEADER = struct.Struct("<6I")
_START = struct.pack("<2I", 0x184D2A50, _HEADER.size - 8)  # marks a skippable frame, which zstd tools skip


class StoreError(Exception):
    """A store cannot be read or written. The text names the file, and the record and its byte if it is about one."""


class DamagedStore(StoreError):
    """Bytes of a store are not those that were written."""


class Damage(Exception):
    """No record can be read at `offset`, in bytes. The text says why."""

    def __init__(self, offset: int, why: str) -> None:
        super().__init__(why)
        self.offset = offset


@dataclass(frozen=True, slots=True)
class Piece:
    """The bytes of one record."""

    offset: int  # in the file
    end: int  # of the record in the file: the next one begins there
    number: int | None  # of the tree in the store; None if the layout does not write it
    line: bytes  # JSON that ends with a newline


class Layout(Protocol):
    """How the records of a file follow each other."""

    def encode(self, number: int, line: bytes) -> bytes:
        """The bytes to append to the file for a record."""
        ...

    def read(self, file: BinaryIO, offset: int) -> Piece | None:
        """The record at an offset. None at the end of the file and where the last record is cut off.

        Raises Damage where no record can be read.
        """
        ...

    def after(self, file: BinaryIO, offset: int) -> int | None:
        """The first offset after a damaged record at which another record may begin; None if there is none."""
        ...


def layout_of(path: Path) -> Layout:
    """Frames for a file whose name ends in .zst, Lines for any other."""
    return Frames() if path.suffix == ".zst" else Lines()


class Frames:
    """Each record is a header and a zstd frame that holds the line. The header's two checksums cover every byte.

    One checksum covers the header itself, so that the length in it can be trusted. If the file ends before that length,
    its last record is cut off; anything else that is wrong is damage. For zstd the header is a skippable frame, so
    `zstdcat` shows the lines.
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
        return Piece(
            offset, end, number, zstandard.decompress(frame)
        )  # a decompressor object is not safe in several threads

    def _fields(self, header: bytes, offset: int) -> tuple[int, int, int]:
        """From a header: the number of the record, the length of its frame, and the checksum of its frame."""
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
    """Each record is one line, as in schema 1. There are no checksums: only damage that breaks the JSON is noticed."""

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
    """The records from an offset on. They end before a last record that is cut off. Raises Damage at a damaged one."""
    while (piece := layout.read(file, offset)) is not None:
        yield piece
        offset = piece.end
