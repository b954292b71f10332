"""Sandboxes, where an agent's Python runs: interpreters that keep their state, fork with it, and are held by limits.

Every backend starts `guest_main.py` and talks to it (link.py); what differs is the walls around.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol


class SandboxError(RuntimeError):
    """A sandbox cannot work here, or stopped working."""


class SandboxUnavailable(SandboxError):
    """What a sandbox needs is not installed here, or not allowed."""


class ForkRefused(RuntimeError):
    """An interpreter holds what cannot be copied: a thread, a pipe, a process."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What an episode may use. Every branch of it has the same limits."""

    seconds: float = 10.0  # of wall time for a call
    cpu: float = 10.0  # seconds of CPU time for a call: all threads of the interpreter, not its child processes
    memory: int = 512 << 20  # bytes of address space of a process
    total_memory: int = 1 << 30  # bytes of all processes and files together, where a cgroup can be made
    processes: int = 64
    file_size: int = 32 << 20  # bytes
    disk: int = 64 << 20  # bytes of all files of a branch
    open_files: int = 256
    output: int = 8000  # characters of a call's output and traceback that come back

    @property
    def message(self) -> int:
        """Bytes that an interpreter's answer may take: output, and half as much for an error, all as escapes."""
        return 18 * self.output + 10_000

    def inside(self) -> dict[str, Any]:
        """The limits as settings of `guest_main.py`, which also takes `work`, the folder of the files, and `seed`."""
        return {
            "AS": self.memory,
            "NPROC": self.processes,
            "FSIZE": self.file_size,
            "NOFILE": self.open_files,
            "disk": self.disk,
            "output": self.output,
        }


@dataclass(frozen=True, slots=True)
class Execution:
    """What came of a call."""

    text: str  # what it printed, cut where that is long, and its traceback, if any
    failed: bool = False
    size: int = 0  # bytes that it printed
    lost: str = ""  # why the interpreter and its variables are gone, if they are


class Interpreter(Protocol):
    """Python with a state of its own."""

    def run(self, code: str, *, apart: bool = False) -> Execution:
        """Never raises for what the code does. SandboxError when the sandbox itself fails.

        With `apart` the code runs in a namespace of its own, in which `agent` is the namespace of all other calls.
        """
        ...

    def fork(self) -> Interpreter:
        """An independent copy, files included. Raises ForkRefused."""
        ...

    def close(self) -> None: ...


class Sandbox(Protocol):
    """Makes interpreters behind one kind of walls."""

    name: str
    isolates: bool  # whether it claims to hold hostile code

    @property
    def bounds_total_memory(self) -> bool:
        """Whether an episode's memory is bounded in total, not only that of each process."""
        ...

    def start(self, limits: Limits, seed: int) -> Interpreter: ...

    def close(self) -> None: ...
