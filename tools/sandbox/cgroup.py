"""Cgroups: bounds on the total memory and the number of processes of an episode. Only root can make them."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar


class Cgroup:
    """A cgroup, of version 2 or 1, that bounds an episode's memory and processes."""

    ROOT = Path("/sys/fs/cgroup")
    _numbers = itertools.count()
    _ended: ClassVar[list[Path]] = []  # to be removed once the kernel has forgotten their processes
    _lock = threading.Lock()

    def __init__(self, memory: int, processes: int) -> None:
        self.sweep()
        name = f"treegym-{os.getpid()}-{next(self._numbers)}"
        if (self.ROOT / "cgroup.controllers").exists():
            bounds = {"memory.max": memory, "memory.swap.max": 0, "pids.max": processes}
            self._make(self.ROOT / name, bounds)
            self._folders = [self.ROOT / name]
        else:
            self._make(self.ROOT / "memory" / name, {"memory.limit_in_bytes": memory})
            self._make(self.ROOT / "pids" / name, {"pids.max": processes})
            self._folders = [self.ROOT / kind / name for kind in ("memory", "pids")]

    def _make(self, folder: Path, bounds: Mapping[str, int]) -> None:
        folder.mkdir()
        try:
            for name, value in bounds.items():
                if "swap" not in name or (folder / name).exists():  # not every kernel counts swap
                    (folder / name).write_text(str(value))
        except OSError:
            folder.rmdir()
            raise

    @classmethod
    def works(cls) -> bool:
        """Whether cgroups can be made here. Removes those that killed processes of treegym left behind."""
        for folder in [*cls.ROOT.glob("treegym-*-*"), *cls.ROOT.glob("*/treegym-*-*")]:
            if not Path("/proc", folder.name.split("-")[1]).exists():
                with contextlib.suppress(OSError):
                    folder.rmdir()
        if os.geteuid():
            return False
        try:
            cls(1 << 30, 512).remove()
        except OSError:
            return False
        return True

    def open(self) -> list[int]:
        """Descriptors of the files through which a process enters the cgroup."""
        return [os.open(folder / "cgroup.procs", os.O_WRONLY | os.O_CLOEXEC) for folder in self._folders]

    def remove(self) -> None:
        with self._lock:
            self._ended.extend(self._folders)
        self.sweep()

    @classmethod
    def sweep(cls, seconds: float = 0.0) -> None:
        """Removes the cgroups of ended episodes, as far as the kernel lets go of them within that time."""
        end = time.monotonic() + seconds
        while True:
            with cls._lock:
                cls._ended[:] = [folder for folder in cls._ended if not _removed(folder)]
            if not cls._ended or time.monotonic() >= end:
                break
            time.sleep(0.01)


def _removed(folder: Path) -> bool:
    try:
        folder.rmdir()
    except OSError:
        return not folder.exists()
    return True
