"""Bubblewrap: the walls around a zygote, and the filter of system calls for what it serves."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from .cgroup import Cgroup
from .inside import ASIDE, WORK
from .remote import INSIDE
from .sandbox import Limits, SandboxUnavailable
from .seccomp import bpf
from .zygote import Branch, Zygote

PROGRAM = "/run/inside.py"  # where inside.py is, inside
UID = 64321  # that a sandbox has when root starts it: root's own processes cannot be counted and limited


class Bubblewrap:
    """Namespaces, a filter of system calls, limits on resources and, for root, a cgroup for each episode."""

    name = "bubblewrap"
    isolates = True

    def __init__(self) -> None:
        if not shutil.which("bwrap"):
            raise SandboxUnavailable("no bwrap here: install the package bubblewrap")
        self.bounds_total_memory = Cgroup.works()
        self._zygote = Zygote(command, bpf, isolated=True, work=WORK, cgroups=self.bounds_total_memory)

    def start(self, limits: Limits, seed: int) -> Branch:
        return self._zygote.start(limits, seed)

    def close(self) -> None:
        self._zygote.close()
        Cgroup.sweep(seconds=1.0)


def command() -> list[str]:
    """The way to a Python that sees nothing but itself."""
    rooted = not os.geteuid()
    under_tmp = any(path.startswith("/tmp/") for path in (sys.prefix, sys.base_prefix))
    inner = [
        "bwrap",
        *("--unshare-user", "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"),
        *("--uid", "65534", "--gid", "65534", "--die-with-parent", "--new-session"),
        *_view(PROGRAM if rooted else str(INSIDE)),
        *("--proc", "/proc", "--dir", WORK, "--perms", "0000", "--dir", os.path.dirname(ASIDE), "--dir", ASIDE),
        *(() if under_tmp else ("--symlink", f"{WORK[1:]}/.tmp", "/tmp")),
        *("--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/"),
        *("--", sys.executable, "-I", PROGRAM),
    ]
    if not rooted:
        return inner
    # First a view in which another user can read this Python, wherever it is; then that user's sandbox.
    outer = ["bwrap", *_view(str(INSIDE)), "--dir", "/tmp", "--bind", "/proc", "/proc", "--ro-bind", "/sys", "/sys"]
    return [*outer, "--", "setpriv", "--reuid", str(UID), "--regid", str(UID), "--clear-groups", *inner]


def _view(program: str) -> Iterator[str]:
    """Mounts of devices, the system's programs and libraries, this Python and inside.py, all to be read only."""
    yield from ("--dev", "/dev")
    for name in ("bin", "sbin", "lib", "lib64", "lib32"):
        folder = f"/{name}"
        if os.path.islink(folder):
            yield from ("--symlink", os.readlink(folder), folder)
        elif os.path.isdir(folder):
            yield from ("--ro-bind", folder, folder)
    yield from ("--ro-bind", "/usr", "/usr")
    prefixes = [path for path in dict.fromkeys((sys.base_prefix, sys.prefix)) if not path.startswith("/usr/")]
    for path in (*prefixes, "/etc/ld.so.cache", "/etc/alternatives"):
        for parent in [*Path(path).parents][-2::-1]:  # made by bwrap itself, some would be closed to other users
            yield from ("--perms", "0755", "--dir", str(parent))
        yield from ("--ro-bind-try", path, path)
    yield from ("--perms", "0755", "--dir", "/run", "--ro-bind", program, PROGRAM)
