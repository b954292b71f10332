"""Interpreters without walls: processes of the same user, with limits on resources. Not a security boundary."""

from __future__ import annotations

import sys
import warnings

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
        self._zygote = Zygote(lambda: [sys.executable, "-I", str(INSIDE)], lambda: b"", isolated=False, work=None)

    def start(self, limits: Limits, seed: int) -> Branch:
        return self._zygote.start(limits, seed)

    def close(self) -> None:
        self._zygote.close()
