"""The tool `python`: code in an interpreter that keeps its variables and forks with its episode."""

from __future__ import annotations

import atexit
import contextlib
import functools
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from .protocol import ToolResult, only_text
from .sandbox import ForkRefused, Interpreter, Limits, Sandbox, SandboxError, SandboxUnavailable

PARAMETERS: Mapping[str, Any] = {
    "type": "object",
    "properties": {"code": {"type": "string"}},
    "required": ["code"],
    "additionalProperties": False,
}
GONE = "its variables are gone, its files are kept; the next call gets a fresh interpreter"


def open_sandbox(name: str = "strongest") -> Sandbox:
    """A running backend by name: one for the whole process. SandboxError says what to install where it cannot work."""
    if name == "strongest":
        return _strongest()
    if name not in BACKENDS:
        raise SandboxError(f"no sandbox {name!r}; sandboxes: strongest, {', '.join(BACKENDS)}")
    return _opened(name)


@functools.cache
def _strongest() -> Sandbox:
    reasons = []
    for name in BACKENDS:
        try:
            return _opened(name)
        except SandboxUnavailable as error:
            reasons.append(f"{name}: {error}")
    raise SandboxUnavailable("; ".join(reasons))


def _opened(name: str) -> Sandbox:
    with _lock:
        return _open(name)


_lock = threading.Lock()


@functools.cache
def _open(name: str) -> Sandbox:
    sandbox = BACKENDS[name]()
    atexit.register(sandbox.close)
    probe = sandbox.start(Limits(), 0)
    try:
        if (outcome := probe.run("6 * 7")).text != "42\n":
            raise SandboxError(f"the sandbox {name} does not compute: {outcome}")
    finally:
        probe.close()
    return sandbox


def _bubblewrap() -> Sandbox:
    from .bubblewrap import Bubblewrap

    return Bubblewrap()


def _docker() -> Sandbox:
    from .docker import Docker

    return Docker()


def _local() -> Sandbox:
    from .local import Local

    return Local()


BACKENDS = {"bubblewrap": _bubblewrap, "docker": _docker, "local": _local}  # the strongest first


class _Held:
    """An interpreter that several forks of a tool share until one of them runs something."""

    def __init__(self, interpreter: Interpreter) -> None:
        self.interpreter = interpreter
        self.holders = 1
        self.lock = threading.Lock()


@dataclass(eq=False)
class PythonTool:
    """`python(code)`. Forks are lazy: a branch that never runs code again costs nothing."""

    sandbox: str = "strongest"
    limits: Limits = field(default_factory=Limits)
    seed: int = 0
    name: str = "python"
    description: str = "Run Python code; variables stay. Print what you want to see."
    _held: _Held | None = field(default=None, repr=False)
    _calls: tuple[str, ...] = ()  # so far, from which a pickled tool comes back

    @property
    def parameters(self) -> Mapping[str, Any]:
        return PARAMETERS

    def __call__(self, /, **arguments: Any) -> ToolResult:
        code = only_text(self.name, "code", arguments)
        open_sandbox(self.sandbox)  # raises where none works, which is not the agent's doing
        try:
            outcome = self._own().run(code)
        except SandboxError as error:
            self.reset(self.seed)
            return ToolResult(f"the sandbox ended; variables and files are gone ({error})", failed=True)
        self._calls += (code,)
        text = outcome.text
        if outcome.size > len(text.encode()):
            text += f"\n[cut: {outcome.size} bytes were printed]"
        if outcome.lost:
            text += f"{outcome.lost}; {GONE}"
        return ToolResult(text or "(nothing printed)", failed=outcome.failed)

    def _own(self) -> Interpreter:
        """The interpreter, of this tool alone from now on."""
        if self._held is None:
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
        for code in self._calls:
            interpreter.run(code)
        return interpreter

    def fork(self) -> Self:
        """A branch; where its interpreter cannot be copied, the calls so far will be run again in a fresh one."""
        twin = type(self)(self.sandbox, self.limits, self.seed, self.name, self.description, self._held, self._calls)
        if self._held:
            with self._held.lock:
                self._held.holders += 1
        return twin

    def reset(self, seed: int) -> None:
        self.close()
        self.seed, self._calls = seed, ()

    def close(self) -> None:
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
