"""Folders and files that are whole or not there."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

PLAYED = ("trees.jsonl", "trees.jsonl.zst", "metrics.jsonl", "cassette.jsonl", "checkpoints/*")  # what is worth keeping


@contextlib.contextmanager
def begun(folder: Path) -> Iterator[None]:
    """After an error before anything was played, the folder is as it was before; a new folder is removed.

    A ConnectionError leaves it: what was set up can go on when the server is back.
    """
    before = set(folder.iterdir()) if folder.is_dir() else set()
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    except ConnectionError:
        raise
    except BaseException:
        if not any(path.stat().st_size for pattern in PLAYED for path in folder.glob(pattern)):
            for path in set(folder.iterdir()) - before if folder.is_dir() else ():
                _remove(path)
            for path in missing:
                with contextlib.suppress(OSError):  # another run began in it
                    path.rmdir()
        raise


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A place beside `path` for a file or a folder that replaces it in the end; an error leaves `path` as it was.

    What is neither file nor folder, such as /dev/stdout, is itself that place.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        yield path
        return
    part = path.with_name(f"{path.name}.part")
    _remove(part)
    try:
        yield part
        if part.is_dir():
            _remove(path)  # a folder replaces an empty one only
        part.replace(path)
    except BaseException:
        _remove(part)
        raise


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
