"""Bubblewrap: the walls around a zygote, and the filter of system calls for what it serves."""

from __future__ import annotations

import glob
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from .cgroup import Cgroup
from .guest_root import ASIDE, BASE, WORK
from .interface import Limits, SandboxUnavailable
from .link import INSIDE, MAIN, PARTS
from .packages import packages, site_packages
from .seccomp import bpf
from .zygote import Branch, Zygote

PROGRAM = "/run/inside"  # the folder of the guest's files, inside
SOURCES = ("/usr/src/", "/usr/local/src/")  # where containers keep programs and data; hidden
UID = 64321  # the user of a sandbox that root starts: root's own processes cannot be counted and limited


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
    """The command line of a Python that sees only itself, the system and the packages that agents may import."""
    rooted = not os.geteuid()
    under_tmp = any(path.startswith("/tmp/") for path in (sys.prefix, sys.base_prefix))
    inner = [
        "bwrap",
        *("--unshare-user", "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"),
        *("--uid", "65534", "--gid", "65534", "--die-with-parent", "--new-session"),
        *(_view(PROGRAM) if rooted else (*_view(str(INSIDE)), *_packages())),
        *("--proc", "/proc", "--dir", WORK, "--perms", "0000", "--dir", os.path.dirname(ASIDE), "--dir", ASIDE),
        *("--perms", "0755", "--tmpfs", BASE),
        *(() if under_tmp else ("--symlink", f"{WORK[1:]}/.tmp", "/tmp")),
        *("--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/"),
        *("--", sys.executable, "-I", f"{PROGRAM}/{MAIN}"),
    ]
    if not rooted:
        return inner
    # First a view in which another user can read this Python, wherever it is; then that user's sandbox.
    system = ("--dir", "/tmp", "--bind", "/proc", "/proc", "--ro-bind", "/sys", "/sys")
    outer = ["bwrap", *_view(str(INSIDE)), *_packages(), *system]
    return [*outer, "--", "setpriv", "--reuid", str(UID), "--regid", str(UID), "--clear-groups", *inner]


def _view(source: str) -> Iterator[str]:
    """Read-only mounts: devices, the system's programs and libraries, this Python, the guest's files in `source`."""
    yield from ("--dev", "/dev")
    for name in ("bin", "sbin", "lib", "lib64", "lib32"):
        yield from _shown(f"/{name}")
    yield from ("--ro-bind", "/usr", "/usr")
    sources = [folder for folder in SOURCES if os.path.isdir(folder)]
    for folder in sources:
        yield from ("--perms", "0755", "--tmpfs", folder)
    for path in (*_python(), "/etc/ld.so.cache", "/etc/alternatives"):
        for parent in [*Path(path).parents][-2::-1]:  # bwrap itself would make some that are closed to others
            yield from ("--perms", "0755", "--dir", str(parent))
        yield from _shown(path)
    for folder in sources:
        yield from ("--remount-ro", folder)
    for folder in ("/run", PROGRAM):
        yield from ("--perms", "0755", "--dir", folder)
    for part in PARTS:
        yield from ("--ro-bind", f"{source}/{part}", f"{PROGRAM}/{part}")


def _shown(path: str) -> Iterator[str]:
    if os.path.islink(path):
        yield from ("--symlink", os.readlink(path), path)
    elif os.path.exists(path):
        yield from ("--ro-bind", path, path)


def _python() -> Iterator[str]:
    """Paths of this Python's program, of every link to it, and of its libraries. What else lies beside is left out."""
    path, paths = sys.executable, list[str]()
    while path not in paths:
        paths.append(path)
        if os.path.islink(path):
            path = os.path.normpath(os.path.join(os.path.dirname(path), os.readlink(path)))
    parts = [f"{prefix}/{part}" for prefix in _prefixes() for part in ("lib", "lib64", "pyvenv.cfg")]
    for path in dict.fromkeys((*paths, *parts)):
        if not path.startswith("/usr/") or path.startswith(SOURCES):  # the rest of /usr is there already
            yield path


def _prefixes() -> tuple[str, ...]:
    return tuple(dict.fromkeys((sys.base_prefix, sys.prefix)))


def _packages() -> Iterator[str]:
    """Mounts that hide whatever is installed, and in its place show the packages that agents may import."""
    places = [f"{prefix}/lib*/python3*/*-packages" for prefix in ("/usr", "/usr/local", *_prefixes())]
    target = os.path.realpath(site_packages())
    hidden = {os.path.realpath(folder) for place in places for folder in glob.glob(place)} | {target}
    for folder in sorted(hidden):
        yield from ("--perms", "0755", "--tmpfs", folder)
    for name, path in packages().items():
        yield from ("--ro-bind", str(path), f"{target}/{name}")
    for folder in sorted(hidden):
        yield from ("--remount-ro", folder)
