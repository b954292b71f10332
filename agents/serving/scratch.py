"""Scratch folders: each is of one process, and what a killed process left is removed by the next one."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path


def scratch(kind: str, room: Path | None = None) -> Path:
    """A new folder in `room`, by default the one for temporary files. The caller removes it.

    Folders of the same kind whose process has ended are removed first: nothing else would give back the memory or the
    disk that they take.
    """
    room, mark = room or Path(tempfile.gettempdir()), f"treegym-{kind}-"
    for folder in room.glob(f"{mark}*"):
        owner = folder.name.removeprefix(mark).partition("-")[0]
        if owner.isdecimal() and not _runs(int(owner)):
            shutil.rmtree(folder, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{mark}{os.getpid()}-", dir=room))


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
