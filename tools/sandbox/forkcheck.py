"""Whether a fork of an interpreter shares something with its parent. The host looks: agent code runs in both."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Set
from stat import S_ISCHR, S_ISREG, S_ISSOCK

from .guest_interpreter import DEVICES, shared_memory
from .guest_keeper import parent_of, stat
from .guest_kernel import checked, libc
from .guest_root import WORK
from .interface import ForkRefused

SECONDS = 1.0  # within which the two must come to rest
PIDFD_GETFD = 438  # the system call's number, on every architecture
NUMBERS = re.compile(rb"\nNSpid:(.*)")
FLAGS, PENDING = 6, 28  # places among the fields of `stat`
PF_EXITING = 4
PAUSE = 0.0002  # seconds between two looks
STATUS = re.compile(rb"\nState:\tS.*\nThreads:\t1\n.*\nvoluntary_ctxt_switches:\t(.*)", re.DOTALL)


def check_fork(fork: int, parent: int, interpreters: Set[int], channel: int, meeting: int) -> None:
    """ForkRefused unless fork and parent both wait, hold nothing that the other can use, and no third process holds it.

    OSError where one of them has ended, or this user may not look. After this check, what the host sends to the meeting
    reaches the fork alone. `fork`, `parent` and `interpreters` (all of the episode) are process ids; `channel` and
    `meeting` are inodes of the sockets at which the parent and the fork wait.
    """
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        if rest := _rest(fork, parent, interpreters):
            reason = _shared(fork, parent, channel, meeting)
            if rest == _rest(fork, parent, interpreters):  # neither has run meanwhile
                if reason:
                    raise ForkRefused(reason)
                return
        time.sleep(PAUSE)
    raise ForkRefused("it, its parent or a process beside them does not come to rest")


def _rest(fork: int, parent: int, interpreters: Set[int]) -> tuple[bytes, ...]:
    """How often the two have gone to sleep so far; empty where one of them or a third process may run."""
    if _children(parent) or _children(fork):
        return ()
    if not all(map(_dies, _children(parent_of(fork)) - interpreters)):
        return ()
    statuses = [STATUS.search(_read(f"/proc/{pid}/status")) for pid in (fork, parent)]
    return tuple(status[1] for status in statuses if status) if all(statuses) else ()


def _shared(fork: int, parent: int, channel: int, meeting: int) -> str | None:
    files = os.stat(f"/proc/{parent}/root{WORK}").st_dev
    if files in (os.stat(f"/proc/{fork}/{way}").st_dev for way in (f"root{WORK}", "cwd")):
        return "it has its parent's files"
    if memory := shared_memory(fork, files):
        return f"memory is shared: {memory}"
    return _held(parent, channel, None) or _held(fork, meeting, files)


def _children(pid: int) -> set[int]:
    return set(map(int, _read(f"/proc/{pid}/task/{pid}/children").split()))


def seen_from_here(parent: int, number: int) -> int:
    """The child of a process that has this number in its own namespace; 0 where there is none."""
    for pid in _children(parent):
        with contextlib.suppress(OSError):
            numbers = NUMBERS.search(_read(f"/proc/{pid}/status"))
            if numbers and int(numbers[1].split()[-1]) == number:
                return pid
    return 0


def _dies(pid: int) -> bool:
    """Whether a process runs no more code because it has ended or was killed, as that of a branch that just ended."""
    try:
        fields = stat(pid)
    except OSError:
        return True
    return fields[0] in "ZX" or bool(int(fields[FLAGS]) & PF_EXITING or int(fields[PENDING]) & 1 << signal.SIGKILL - 1)


def _read(path: str) -> bytes:
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.read(fd, 1 << 16)
    finally:
        os.close(fd)


def _held(pid: int, socket: int, foreign: int | None) -> str | None:
    """An open file that is neither this socket, nor a device without a state, nor a file outside of `foreign`.

    `foreign` is the number of the file system that belongs to the other process, if it has one to itself.
    """
    with contextlib.ExitStack() as opened:
        process = os.pidfd_open(pid)
        opened.callback(os.close, process)
        for number in os.listdir(f"/proc/{pid}/fdinfo"):  # the folder `fd` is root's alone
            fd = checked(libc.syscall(PIDFD_GETFD, process, int(number), 0), "pidfd_getfd")
            opened.callback(os.close, fd)
            status = os.fstat(fd)
            kind = status.st_mode
            if not (
                (S_ISSOCK(kind) and status.st_ino == socket)
                or (S_ISCHR(kind) and status.st_rdev in DEVICES)
                or (S_ISREG(kind) and status.st_dev != foreign)
            ):
                return f"file descriptor {number} is {os.readlink(f'/proc/self/fd/{fd}')}"
    return None
