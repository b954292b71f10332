"""Interpreters without walls: processes of the same user, with limits on resources. Not a security boundary."""

from __future__ import annotations

import hashlib
import sys
import sysconfig
import venv
import warnings
from pathlib import Path

from ..artefacts import cached_directory
from .interface import Limits
from .link import INSIDE, MAIN
from .packages import packages
from .zygote import Branch, Zygote


class Local:
    """For code that is trusted: it can read the user's files, reach the network and signal other processes."""

    name = "local"
    isolates = bounds_total_memory = False

    def __init__(self) -> None:
        warnings.warn("the sandbox 'local' limits resources and holds nothing back: it is no security boundary",
                      stacklevel=2)  # fmt: skip
        self._zygote = Zygote(lambda: [_python(), "-I", str(INSIDE / MAIN)], lambda: b"", isolated=False, work=None)

    def start(self, limits: Limits, seed: int) -> Branch:
        return self._zygote.start(limits, seed)

    def close(self) -> None:
        self._zygote.close()


def _python() -> str:
    """The Python of a virtual environment in the cache, with links to the packages that agents may import.

    It can read more than those.
    """
    about = [sys.version, sys.executable, *map(str, packages().items())]
    key = hashlib.sha256("\n".join(about).encode()).hexdigest()[:16]
    return str(cached_directory("python", key, _make_python) / "bin" / "python")


def _make_python(folder: Path) -> None:
    venv.create(folder, symlinks=True)
    target = sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)})
    for name, path in packages().items():
        link = Path(target, name)
        if not link.exists():
            link.symlink_to(path)
