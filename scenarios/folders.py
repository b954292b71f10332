"""Folders that are as they were where nothing came of a command."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

LESSONS = "lessons.sqlite"  # the file of a run that has its lessons
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
        from ..agents.store.folder import remove  # most commands come to their end without it

        if not any(path.stat().st_size for pattern in PLAYED for path in folder.glob(pattern)):
            for path in set(folder.iterdir()) - before if folder.is_dir() else ():
                remove(path)
            for path in missing:
                with contextlib.suppress(OSError):  # another run began in it
                    path.rmdir()
        raise
