"""Interpreters without walls: processes of the same user, with limits on resources. Not a security boundary."""

from __future__ import annotations

import os
import shutil
import sysconfig
import tempfile
import venv
import warnings
from pathlib import Path

from .packages import packages
from .remote import INSIDE
from .sandbox import Limits
from .zygote import Branch, Zygote


class Local:
    """For code that is trusted: it can read the user's files, reach the network and signal other processes."""

    name = "local"
    isolates = bounds_total_memory = False

    def __init__(self) -> None:
        warnings.warn("the sandbox 'local' limits resources and holds nothing back: it is no security boundary",
                      stacklevel=2)  # fmt: skip
        self._owner = os.getpid()
        self._folder = tempfile.mkdtemp(prefix="treegym-python-")
        self._zygote = Zygote(
            lambda: [_python(self._folder), "-I", str(INSIDE)], lambda: b"", isolated=False, work=None
        )

    def start(self, limits: Limits, seed: int) -> Branch:
        return self._zygote.start(limits, seed)

    def close(self) -> None:
        self._zygote.close()
        if self._owner == os.getpid():
            shutil.rmtree(self._folder, ignore_errors=True)


def _python(folder: str) -> str:
    """A virtual environment with links to the packages that agents may import; what it can read by path is more."""
    venv.create(folder, symlinks=True)
    target = Path(sysconfig.get_path("purelib", "venv", {"base": folder, "platbase": folder}))
    for name, path in packages().items():
        if not (target / name).exists():
            (target / name).symlink_to(path)
    return f"{folder}/bin/python"
