"""The host's end of an interpreter in a sandbox: messages over a socket, and calls."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .guest_channel import GRACE, packed, take
from .interface import Execution, Limits, SandboxError

INSIDE = Path(__file__).parent  # the folder of the program that runs at the other end
MAIN = "guest_main.py"  # the part of it that is started
PARTS = (MAIN, "guest_kernel.py", "guest_channel.py", "guest_root.py", "guest_interpreter.py", "guest_keeper.py")
LIBRARIES = (  # imported before the first call
    "base64",
    "collections",
    "datetime",
    "fractions",
    "functools",
    "itertools",
    "json",
    "math",
    "re",
    "statistics",
    "subprocess",
    "typing",
    "numpy",
    "numpy.random",
)
MAX_CODE = 100_000  # characters of an agent's call
PROCESSORS = os.cpu_count() or 1  # so many times faster than the clock a process may use up CPU time
LOOK = 0.02  # seconds between two looks at the CPU time, or more


class Link:
    """The host's end of a Channel. Agent code may forge what it receives: only size and shape are checked here."""

    def __init__(self, limit: int = 1 << 20, ours: socket.socket | None = None) -> None:
        self.theirs: socket.socket | None = None
        if ours is None:
            ours, self.theirs = socket.socketpair()
            self.inode = os.fstat(self.theirs.fileno()).st_ino  # by which /proc shows who holds the other end
        self.socket = ours
        self.socket.setblocking(False)  # a timeout would cost a system call for every message
        self._limit = limit
        self._unread = bytearray()

    def send(self, fds: Sequence[int] = (), **message: Any) -> None:
        data = memoryview(packed(message | {"fds": len(fds)} if fds else message))
        end = time.monotonic() + GRACE
        while data:
            try:
                sent = socket.send_fds(self.socket, [data], fds) if fds else self.socket.send(data)
                data, fds = data[sent:], ()
            except BlockingIOError:
                self._wait(select.POLLOUT, end)

    def receive(self, seconds: float) -> dict[str, Any]:
        """The next message. TimeoutError when none came in time, EOFError at the end or where it is malformed."""
        end = time.monotonic() + seconds
        while (text := take(self._unread, self._limit)) is None:
            self._wait(select.POLLIN, end)
            self._unread += self._some()
        try:
            message = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise EOFError(str(error)) from None
        if not isinstance(message, dict):
            raise EOFError("a message that is no object")
        return message

    def _wait(self, event: int, end: float) -> None:
        """Waits until the socket can be read or written. TimeoutError when it cannot by then."""
        ready = select.poll()
        ready.register(self.socket, event)
        if not ready.poll(max(end - time.monotonic(), 0) * 1000):
            raise TimeoutError("the other end does not read or write in time")

    def _some(self) -> bytes:
        try:
            part = self.socket.recv(1 << 16)
        except ConnectionError as error:
            raise EOFError(str(error)) from None
        if not part:
            raise EOFError("the end")
        return part

    def give(self) -> int:
        """The other end's descriptor, to be sent to a process; `gave` then closes it here."""
        assert self.theirs
        return self.theirs.fileno()

    def gave(self) -> None:
        if self.theirs:
            self.theirs.close()

    def close(self) -> None:
        self.socket.close()
        self.gave()


class Remote:
    """An interpreter behind a link. It is started at its first call, and again at the call after it was lost."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._link: Link | None = None
        self._closed = False
        self._owner = os.getpid()

    def _start(self) -> Link:
        raise NotImplementedError

    def _cpu_seconds(self) -> float:
        """CPU time of the interpreter so far; 0 where it cannot be seen from here."""
        raise NotImplementedError

    def _kill(self) -> None:
        raise NotImplementedError

    def _leave(self) -> None:
        raise NotImplementedError

    def run(self, code: str, *, apart: bool = False) -> Execution:
        if len(code) > MAX_CODE and not apart:
            return Execution(f"code of {len(code)} characters; at most {MAX_CODE}", failed=True)
        limits, link = self.limits, self._living()
        try:
            number = secrets.token_hex(8)  # the answer repeats it, so that none can be written ahead
            before = self._cpu_seconds()
            link.send(do="run", id=number, code=code, apart=apart)
            message = self._receive(link, before)
            if message.get("id") != number:
                raise EOFError("an answer out of turn")
            return _outcome(message, limits)
        except TimeoutError as error:
            return self._lose(str(error))
        except (OSError, EOFError):
            return self._lose("the interpreter ended: it exited, was killed, or used too much memory or CPU time")

    def _receive(self, link: Link, before: float) -> dict[str, Any]:
        """The answer to a call. TimeoutError when the call has used up its time on the clock or its CPU time.

        The host alone limits CPU time: a process could put off a limit of its own, or the signal that it sends.
        """
        end, cpu = time.monotonic() + self.limits.seconds, self.limits.cpu
        while True:
            left, allowed = end - time.monotonic(), cpu - (self._cpu_seconds() - before)
            if left <= 0:
                raise TimeoutError(f"stopped after {self.limits.seconds:g} seconds")
            if allowed <= 0:
                raise TimeoutError(f"stopped after {cpu:g} seconds of CPU time")
            with contextlib.suppress(TimeoutError):
                return link.receive(min(left, max(allowed / PROCESSORS, LOOK)))

    def _living(self) -> Link:
        if self._closed or self._owner != os.getpid():
            raise SandboxError("this interpreter is closed, or that of a process whose fork this is")
        if self._link is None:
            self._link = self._start()
        return self._link

    def _lose(self, why: str) -> Execution:
        with contextlib.suppress(SandboxError):
            self._kill()
        if self._link:
            self._link.close()
            self._link = None
        return Execution("", failed=True, lost=why)

    def close(self) -> None:
        """Ends the interpreter, except in a fork of the host: there it belongs to the parent process."""
        if not self._closed:
            self._closed = True
            try:
                if self._link:
                    self._link.close()
            finally:
                if self._owner == os.getpid():
                    self._leave()


def cpu_seconds(pid: int) -> float:
    """CPU time of a process, all threads together; 0 where no process has that number."""
    if pid <= 0:
        return 0.0
    try:
        return time.clock_gettime(~pid << 3 | 2)  # as clock_getcpuclockid(3) makes it
    except OSError:
        return 0.0


def _outcome(message: dict[str, Any], limits: Limits) -> Execution:
    text, error, size = message.get("text"), message.get("error"), message.get("bytes")
    failed, cut = message.get("failed"), message.get("cut")
    if not isinstance(text, str) or not isinstance(error, str) or not isinstance(size, int):
        raise EOFError("not an outcome")
    if not isinstance(failed, bool) or not isinstance(cut, bool):
        raise EOFError("not an outcome")
    told = visible(error[: limits.output])[-limits.output // 2 :]
    shown, room = visible(text[: limits.output]), limits.output - len(told)
    if cut or shown[room:]:
        notice = f"\n[cut: {size} bytes were printed]\n"
        shown = shown[: max(room - len(notice), 0)] + notice
    return Execution(shown + told, failed, size)


def visible(text: str) -> str:
    """The text with control characters (except line ends and tabs) and direction marks written as escapes."""
    return text if text.translate(_BLANKS).isprintable() else "".join(map(_shown, text))


_BLANKS = str.maketrans("", "", "\n\t")


def _shown(character: str) -> str:
    if character in "\n\t" or character.isprintable() or (character.isspace() and ord(character) > 160):
        return character
    return _escaped(character)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()
