"""The interpreter of one episode, started and forked as late as can be. Where that fails, its calls run again."""

from __future__ import annotations

import contextlib
import os
import threading
from dataclasses import dataclass, field
from typing import Any, Self

from ..protocol import ToolResult
from .backends import open_sandbox
from .interface import Execution, ForkRefused, Interpreter, Limits, SandboxError

GONE = "its variables are gone, its files are kept; the next call gets a fresh interpreter"


class _Held:
    """An interpreter that several forks of a session share until one of them runs something."""

    def __init__(self, interpreter: Interpreter) -> None:
        self.interpreter = interpreter
        self.owner = os.getpid()
        self.holders = 1
        self.lock = threading.Lock()


@dataclass(eq=False)
class Session:
    """Forks are lazy: a branch that never runs code again costs nothing.

    Where an interpreter cannot be copied, and where a session was pickled or is used in a fork of the host process, the
    calls so far run again in a fresh one.
    """

    sandbox: str = "strongest"
    limits: Limits = field(default_factory=Limits)
    seed: int = 0
    _held: _Held | None = field(default=None, repr=False)
    _calls: tuple[tuple[str, bool], ...] = ()  # so far: code, and whether it ran apart

    def run(self, code: str, *, apart: bool = False) -> ToolResult:
        """What came of the code, as an agent reads it. Raises SandboxError only where no sandbox can be had."""
        open_sandbox(self.sandbox)
        try:
            outcome = self._own().run(code, apart=apart)
        except SandboxError as error:
            self.reset(self.seed)
            return ToolResult(f"the sandbox ended; variables and files are gone ({error})", failed=True)
        self._calls += ((code, apart),)
        return _result(outcome)

    def _own(self) -> Interpreter:
        """The interpreter, which no other session shares from now on."""
        if self._held is None or self._held.owner != os.getpid():  # in a fork of the host, where it is not ours
            self._held = _Held(self._replayed())
        held = self._held
        with held.lock:
            if held.holders > 1:
                try:
                    twin = held.interpreter.fork()
                except ForkRefused:
                    twin = self._replayed()
                held.holders -= 1
                self._held = _Held(twin)
        return self._held.interpreter

    def _replayed(self) -> Interpreter:
        """A fresh interpreter after the calls so far."""
        interpreter = open_sandbox(self.sandbox).start(self.limits, self.seed)
        for code, apart in self._calls:
            interpreter.run(code, apart=apart)
        return interpreter

    def fork(self) -> Self:
        twin = type(self)(self.sandbox, self.limits, self.seed, self._held, self._calls)
        if self._held:
            with self._held.lock:
                self._held.holders += 1
        return twin

    def reset(self, seed: int) -> None:
        """Forgets the interpreter and the calls, for a new episode."""
        self.close()
        self.seed, self._calls = seed, ()

    def close(self) -> None:
        """Gives back the interpreter. A second call does nothing."""
        held, self._held = self._held, None
        if held:
            with held.lock:
                held.holders -= 1
                if not held.holders:
                    held.interpreter.close()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.close()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_held": None}


def _result(outcome: Execution) -> ToolResult:
    text = outcome.text
    if outcome.lost:
        text += f"{outcome.lost}; {GONE}"
    return ToolResult(text or "(nothing printed)", failed=outcome.failed)
