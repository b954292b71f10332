"""Lines of a text file, plain, .gz or .xz; a file that cannot be read is named with the line."""

from __future__ import annotations

import codecs
import gzip
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast


def lines_of(path: Path) -> Iterator[tuple[int, str]]:
    """Each line with its number, from 1. ValueError names the line that is no UTF-8, or at which a file breaks off."""
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    number = 0
    with cast(Any, opener)(path, "rb") as file:
        try:
            for number, line in enumerate(file, 1):
                yield number, (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).decode()
        except UnicodeDecodeError as error:
            byte = f"byte 0x{error.object[error.start]:02x} at {error.start}"
            raise ValueError(
                f"{path}, line {number}: not UTF-8 ({byte}: {error.reason}); if it is Latin-1: iconv -f latin1 -t utf-8"
            ) from None
        except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
            raise ValueError(f"{path}, line {number + 1}: the file is cut or damaged here: {error}") from None
