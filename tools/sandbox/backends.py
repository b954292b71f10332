"""The sandboxes by name, each opened once for the whole process."""

from __future__ import annotations

import atexit
import functools
import threading

from .interface import Limits, Sandbox, SandboxError, SandboxUnavailable


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
