"""Whether a fork of an interpreter shares something with its parent: the host looks, for agent code runs in both."""

from __future__ import annotations

import os
import time
from collections.abc import Set
from stat import S_ISCHR, S_ISREG, S_ISSOCK

from .inside import DEVICES, WORK, parent_of, shared_memory
from .sandbox import ForkRefused

SECONDS = 1.0  # that the two have to come to rest
PAUSE = 0.0002  # seconds between two looks


def check_fork(fork: int, parent: int, interpreters: Set[int], channel: int, meeting: int) -> None:
    """ForkRefused unless each is without threads, children and what the other holds, and nobody holds it for them.

    So what the host sends to the meeting, the fork alone gets. The first three are processes; `interpreters` all of the
    episode. `channel` and `meeting` are inodes of sockets: the one that the parent has, and the one that the fork has.
    """
    end = time.monotonic() + SECONDS
    while True:
        rest = _rest(fork), _rest(parent)
        reason = _shared(fork, parent, interpreters, channel, meeting) if all(rest) else "it does not come to rest"
        if not reason and rest == (_rest(fork), _rest(parent)):  # neither has run meanwhile
            return
        if time.monotonic() > end:
            raise ForkRefused(reason or "it does not come to rest")
        time.sleep(PAUSE)


def _rest(pid: int) -> str:
    """How often a process with one thread, which sleeps, has slept so far; empty for any other."""
    with open(f"/proc/{pid}/status") as file:
        status = dict(line.split(":\t", 1) for line in file.read().splitlines() if ":\t" in line)
    still = status["State"].startswith("S") and status["Threads"] == "1"
    return status["voluntary_ctxt_switches"] + " " + status["nonvoluntary_ctxt_switches"] if still else ""


def _shared(fork: int, parent: int, interpreters: Set[int], channel: int, meeting: int) -> str | None:
    """What is shared, or might be."""
    try:
        files = os.stat(f"/proc/{parent}/root{WORK}").st_dev
        if _children(parent) or _children(fork) or _children(parent_of(fork)) - interpreters:
            return "there is a process that is no interpreter"
        if files in (os.stat(f"/proc/{fork}/{way}").st_dev for way in (f"root{WORK}", "cwd")):
            return "it has its parent's files"
        if memory := shared_memory(fork, files):
            return f"memory is shared: {memory}"
        return _held(parent, channel, None) or _held(fork, meeting, files)
    except OSError as error:  # it ended, or this user may not look
        return str(error)


def _children(pid: int) -> set[int]:
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return {int(child) for child in file.read().split()}


def _held(pid: int, socket: int, foreign: int | None) -> str | None:
    """An open file that is not on its own: neither this socket, nor a device without a state, nor a file elsewhere."""
    for number in os.listdir(f"/proc/{pid}/fd"):
        path = f"/proc/{pid}/fd/{number}"
        status = os.stat(path)
        kind = status.st_mode
        if not (
            (S_ISSOCK(kind) and status.st_ino == socket)
            or (S_ISCHR(kind) and status.st_rdev in DEVICES)
            or (S_ISREG(kind) and status.st_dev != foreign)
        ):
            return f"file descriptor {number} is {os.readlink(path)}"
    return None
