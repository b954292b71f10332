"""The host's side of a zygote, of the episodes that it begins, and of their branches."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from .cgroup import Cgroup
from .inside import GRACE
from .remote import LIBRARIES, Link, Remote
from .sandbox import ForkRefused, Limits, SandboxError, SandboxUnavailable

SPARES = 4  # kinds of episodes that one is made ahead of
PAUSE = 0.02  # seconds before it is made, in which the episode that has just begun has the processors to itself
ENVIRONMENT = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",
    "OPENBLAS_NUM_THREADS": "1",  # a process with threads cannot fork
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}


@dataclass(frozen=True, slots=True)
class Spare:
    """An episode that is made ahead, a little later or once it is wanted."""

    wanted: threading.Event
    branch: Future[Branch]

    def take(self) -> Branch:
        self.wanted.set()
        return self.branch.result()


class Zygote:
    """A running `inside.py` that serves episodes; started at first use.

    An episode of each of the last few limits is made ahead, its interpreter too: to enter a cgroup alone takes the
    kernel 10 ms or more.
    """

    def __init__(
        self,
        command: Callable[[], Sequence[str]],
        filter_: Callable[[], bytes],
        *,
        isolated: bool,
        work: str | None,
        cgroups: bool = False,
    ) -> None:
        self._command, self._filter = command, filter_
        self._isolated, self._work, self._cgroups = isolated, work, cgroups
        self._lock = threading.Lock()
        self._settle()

    def _settle(self) -> None:
        self._owner = os.getpid()
        self._spares: dict[Limits, Spare] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._link = Link()

    def start(self, limits: Limits, seed: int) -> Branch:
        """The first interpreter of a new episode."""
        with self._lock:
            if self._owner != os.getpid():
                self._settle()  # in a fork of the host: what was made is the parent's
            for spare in self._spares.values():  # they are made one after the other
                spare.wanted.set()
            branch = self._take_spare(limits) or _launcher(self._owner).submit(self._begin, limits).result()
            self._spares[limits] = self._prepare(limits)
            if len(self._spares) > SPARES:
                self._end_spare(next(iter(self._spares)))
        branch.reseed(seed)
        return branch

    def _prepare(self, limits: Limits) -> Spare:
        def begin() -> Branch:
            wanted.wait(PAUSE)
            return self._begin(limits)

        wanted = threading.Event()
        return Spare(wanted, _launcher(self._owner).submit(begin))

    def _take_spare(self, limits: Limits) -> Branch | None:
        """The episode that was made ahead, if it lives."""
        spare = self._spares.pop(limits, None)
        try:
            branch = spare.take() if spare else None
        except (SandboxError, OSError):  # which whoever begins the next one meets again
            return None
        if branch and not (self._process and self._process.poll() is None):
            branch.close()
            return None
        return branch

    def _end_spare(self, limits: Limits) -> None:
        if branch := self._take_spare(limits):
            branch.close()

    def _begin(self, limits: Limits) -> Branch:
        link = Link()
        cgroup = Cgroup(limits.total_memory, limits.processes * 8) if self._cgroups else None
        fds = cgroup.open() if cgroup else []
        try:
            self._send([link.give(), *fds], limits.inside())
        except SandboxError:
            link.close()
            raise
        finally:
            for fd in fds:
                os.close(fd)
        link.gave()
        branch = Branch(Episode(link, limits, self._work, cgroup), 0)
        branch.begin()
        return branch

    def _send(self, fds: Sequence[int], limits: dict[str, Any]) -> None:
        """Begins an episode; a zygote that was killed since the last one is replaced."""
        for _ in range(2):
            self._run()
            try:
                return self._link.send(fds, limits=limits)
            except OSError:
                self._end()
        raise SandboxError("the zygote takes no episodes")

    def _run(self) -> None:
        if self._process and self._process.poll() is None:
            return
        self._link.close()
        self._link = Link()
        fd = self._link.give()
        filter_ = self._filter().hex()
        settings = {"role": "zygote", "libraries": LIBRARIES, "fd": fd, "isolated": self._isolated, "filter": filter_}
        command = [*self._command(), json.dumps(settings)]
        with tempfile.TemporaryFile() as log:
            self._process = subprocess.Popen(
                command, pass_fds=[fd], env=ENVIRONMENT, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
            self._link.gave()
            try:
                self._link.receive(60)
            except (EOFError, TimeoutError):
                self._end()
                log.seek(0)
                said = log.read().decode(errors="replace").strip()
                raise SandboxUnavailable(f"{command[0]} does not start: {said or 'it said nothing'}") from None

    def close(self) -> None:
        """Ends it and, with it, every episode; in a fork of the host nothing, for they are its parent's."""
        if self._owner != os.getpid():
            return
        with self._lock:
            for limits in list(self._spares):
                self._end_spare(limits)
            self._end()

    def _end(self) -> None:
        self._link.close()
        if self._process:
            self._process.kill()
            self._process.wait()
            self._process = None


@functools.cache
def _launcher(process: int) -> ThreadPoolExecutor:
    """A thread that lives as long as this process: what bwrap runs dies with the thread that started it."""
    return ThreadPoolExecutor(1, "sandboxes")


@dataclass(eq=False)
class Episode:
    """The host's side of a keeper: the branches that live."""

    link: Link
    limits: Limits
    work: str | None  # where its files are inside; None: in a folder of each branch's own
    cgroup: Cgroup | None
    lock: threading.RLock = field(default_factory=threading.RLock)
    numbers: itertools.count[int] = field(default_factory=itertools.count)
    living: set[int] = field(default_factory=set)
    folder: str = ""
    ended: bool = False
    owed: int = 0  # answers of the keeper that nobody has read

    def enter(self) -> tuple[int, str]:
        """A new branch's number and the folder of its files."""
        with self.lock:
            branch = next(self.numbers)
            self.living.add(branch)
            if self.work is None and not self.folder:
                self.folder = os.path.join(tempfile.gettempdir(), f"treegym-{secrets.token_hex(8)}")
            return branch, self.work or f"{self.folder}/{branch}"

    def ask(self, fds: Sequence[int] = (), **message: Any) -> None:
        """Has the keeper do something. SandboxError where it cannot."""
        with self.lock:  # the answer is to this
            self.order(fds, **message)
            self.settle()

    def order(self, fds: Sequence[int] = (), **message: Any) -> None:
        """The same, without waiting for it; `settle` does."""
        with self.lock, self._answering():
            self.link.send(fds, **message)
            self.owed += 1

    def settle(self) -> None:
        """Waits until the keeper has done what it was told. SandboxError where it could not."""
        with self.lock, self._answering():
            while self.owed:
                answer = self.link.receive(GRACE)  # which may come late: then it is owed still
                self.owed -= 1
                if answer.get("error"):
                    raise SandboxError(f"sandbox: {answer['error']}")

    @contextlib.contextmanager
    def _answering(self) -> Iterator[None]:
        try:
            yield
        except (OSError, EOFError) as error:
            raise SandboxError(f"the keeper of a sandbox does not answer: {error!r}") from None

    def leave(self, branch: int) -> None:
        """The last to leave ends it."""
        with contextlib.suppress(SandboxError):
            self.ask(do="discard", branch=branch)
        with self.lock:
            self.living.discard(branch)
            last, self.ended = not self.living and not self.ended, self.ended or not self.living
        if last:
            self.end()

    def end(self) -> None:
        """Waits for the keeper to end, and everything below it."""
        with contextlib.suppress(EOFError, OSError):
            self.link.socket.shutdown(socket.SHUT_WR)
            self.link.receive(GRACE)
        self.link.close()
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)
        if self.cgroup:
            self.cgroup.remove()


class Branch(Remote):
    """An interpreter of an episode that a keeper looks after."""

    def __init__(self, episode: Episode, seed: int) -> None:
        super().__init__(episode.limits)
        self._episode, self._seed = episode, seed
        self._number, self._work = episode.enter()

    def begin(self) -> None:
        """Has the interpreter started, without waiting for it."""
        self._link = self._open(self._episode.order)

    def reseed(self, seed: int) -> None:
        """Seeds an interpreter that has not run anything."""
        self._seed = seed
        self._episode.settle()
        try:
            self._living().send(do="seed", seed=seed)
        except OSError:
            self._lose("")  # the first call starts another

    def _start(self) -> Link:
        return self._open(self._episode.ask)

    def _open(self, tell: Callable[..., None]) -> Link:
        link = Link(self.limits.message)
        try:
            tell([link.give()], do="start", branch=self._number, work=self._work, seed=self._seed)
        except SandboxError:
            link.close()
            raise
        link.gave()
        return link

    def _kill(self) -> None:
        self._episode.ask(do="kill", branch=self._number)

    def fork(self) -> Branch:
        with self._episode.lock:  # no other branch ends meanwhile, and with it what the keeper does not know yet
            return self._fork()

    def _fork(self) -> Branch:
        parent = self._living()
        twin = Branch(self._episode, self._seed)
        link = twin._link = Link(self.limits.message)
        try:
            with contextlib.ExitStack() as meeting:  # of the copy and the keeper
                ends = [meeting.enter_context(end) for end in socket.socketpair()]
                ends[0].setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)  # to hear who comes
                message = {"branch": twin._number, "parent": self._number, "work": twin._work}
                parent.send([link.give(), ends[1].fileno()], do="fork", work=twin._work)
                self._episode.order([ends[0].fileno()], do="adopt", **message)
            link.gave()
            try:
                self._episode.settle()
            except SandboxError:
                with contextlib.suppress(OSError, EOFError):
                    _unrefused(link)  # why there was no copy to come to the keeper
                raise
            _unrefused(link)
        except (OSError, EOFError, SandboxError) as error:
            twin.close()
            raise ForkRefused(f"the interpreter did not fork: {error!r}") from None
        except ForkRefused:
            twin.close()
            raise
        return twin

    def _leave(self) -> None:
        self._episode.leave(self._number)


def _unrefused(link: Link) -> None:
    if reason := link.receive(GRACE).get("refused"):
        raise ForkRefused(str(reason)[:500])
