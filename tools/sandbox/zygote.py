"""The host's side of a zygote, of the episodes that it begins, and of their branches."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import secrets
import select
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from .cgroup import Cgroup
from .forkcheck import check_fork, seen_from_here
from .guest_channel import GRACE
from .guest_interpreter import REASON
from .guest_keeper import CREDENTIALS
from .interface import ForkRefused, Limits, SandboxError, SandboxUnavailable
from .link import LIBRARIES, Link, Remote, cpu_seconds

SPARES = 4  # limits for which an episode is kept ready
PAUSE = 0.02  # seconds before one is made, so that the episode that has just begun has the processors to itself
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
    """An episode that is made ahead: after a pause, or at once when it is wanted."""

    wanted: threading.Event
    branch: Future[Branch]

    def take(self) -> Branch:
        self.wanted.set()
        return self.branch.result()


class Zygote:
    """A running guest (guest_keeper.py) that serves episodes; started at first use.

    For each of the limits used last, an episode is made ahead with its interpreter, because entering a cgroup alone
    takes the kernel 10 ms or more.
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
            for spare in self._spares.values():  # one thread makes them all: none may pause now
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
        """The episode that was made ahead, if it is still alive."""
        spare = self._spares.pop(limits, None)
        try:
            branch = spare.take() if spare else None
        except (SandboxError, OSError):  # whoever begins the next episode meets the error again
            return None
        if branch and not (self._process and self._process.poll() is None):
            branch.close()
            return None
        return branch

    def _end_spare(self, limits: Limits) -> None:
        if branch := self._take_spare(limits):
            branch.close()

    def _begin(self, limits: Limits) -> Branch:
        link = KeeperLink()
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
        branch = Branch(Episode(link, limits, self._work, cgroup, self._sweep), 0)
        branch.begin()
        return branch

    def _sweep(self) -> None:
        """Has the zygote end the processes that keepers left behind when they were killed."""
        if self._isolated or self._owner != os.getpid():
            return  # processes of a namespace end with its keeper

        def sweep() -> None:
            with contextlib.suppress(OSError, EOFError):
                self._link.send()
                self._link.receive(GRACE)

        with contextlib.suppress(RuntimeError):  # at exit, when no thread takes it
            _launcher(self._owner).submit(sweep).result()

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
        """Ends the zygote and, with it, every episode; nothing in a fork of the host, where they are the parent's."""
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


class KeeperLink(Link):
    """The host's end of a keeper's channel. It tells the number of the process that writes."""

    def __init__(self, ours: socket.socket | None = None) -> None:
        super().__init__(ours=ours)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self.keeper = 0  # its process id, once it has written

    def _some(self) -> bytes:
        part, about, _, _ = self.socket.recvmsg(1 << 16, socket.CMSG_SPACE(CREDENTIALS.size))
        if not part:
            raise EOFError("the end")
        self.keeper = CREDENTIALS.unpack(about[0][2])[0]
        return part


@dataclass(eq=False)
class Episode:
    """The host's side of a keeper, and the branches that are alive."""

    link: KeeperLink
    limits: Limits
    work: str | None  # folder of its files inside; None: each branch has a folder of its own
    cgroup: Cgroup | None
    sweep: Callable[[], None]  # ends what a keeper that was killed left behind
    lock: threading.RLock = field(default_factory=threading.RLock)
    numbers: itertools.count[int] = field(default_factory=itertools.count)
    living: set[int] = field(default_factory=set)
    pids: dict[int, int] = field(default_factory=dict)  # branch -> its interpreter's process id on the host
    keeper: int | None = None  # descriptor of its process
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
        """Has the keeper do something, and waits for it. SandboxError where it cannot."""
        with self.lock:  # so that the answer is the one to this order
            self.order(fds, **message)
            self.settle()

    def order(self, fds: Sequence[int] = (), **message: Any) -> None:
        """Has the keeper do something without waiting for it; `settle` waits."""
        with self.lock, self._answering():
            self.link.send(fds, **message)
            self.owed += 1

    def settle(self) -> None:
        """Waits until the keeper has done what it was told. SandboxError where it could not."""
        with self.lock, self._answering():
            while self.owed:
                answer = self.link.receive(GRACE)  # where it is late, it stays owed
                self.owed -= 1
                if answer["error"]:
                    raise SandboxError(f"sandbox: {answer['error']}")
                if answer.get("pid"):
                    self._meet(answer["branch"], answer["pid"])

    def _meet(self, branch: int, number: int) -> None:
        """Notes the keeper's process, and that of the branch's interpreter, which has the number in its namespace."""
        if self.keeper is None:
            self.keeper = os.pidfd_open(self.link.keeper)
        self.pids[branch] = seen_from_here(self.link.keeper, number)

    @contextlib.contextmanager
    def _answering(self) -> Iterator[None]:
        try:
            yield
        except (OSError, EOFError) as error:
            raise SandboxError(f"the keeper of a sandbox does not answer: {error!r}") from None

    def leave(self, branch: int) -> None:
        """Ends a branch; with the last one, the episode ends."""
        with contextlib.suppress(SandboxError):
            self.ask(do="discard", branch=branch)
        with self.lock:
            self.living.discard(branch)
            self.pids.pop(branch, None)
            last, self.ended = not self.living and not self.ended, self.ended or not self.living
        if last:
            self.end()

    def end(self) -> None:
        """Ends the keeper and everything below it, by force where the keeper does not say that it has done so."""
        try:
            with contextlib.suppress(OSError):
                self.link.socket.shutdown(socket.SHUT_WR)
            while "ended" not in self.link.receive(GRACE):
                pass  # an answer that nobody waited for
        except (OSError, EOFError):
            self.fall()
        self.link.close()
        if self.keeper is not None:
            os.close(self.keeper)
            self.keeper = None
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)
        if self.cgroup:
            self.cgroup.remove()

    def fall(self) -> None:
        """Kills the keeper and, with it, every process of the episode."""
        if self.keeper is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.keeper, signal.SIGKILL)
            ended = select.poll()
            ended.register(self.keeper, select.POLLIN)
            ended.poll(GRACE * 1000)
        self.sweep()


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
        try:
            self._episode.ask(do="kill", branch=self._number)
        except SandboxError:
            self._episode.fall()
            raise

    def _cpu_seconds(self) -> float:
        return cpu_seconds(self._episode.pids.get(self._number, 0))

    def fork(self) -> Branch:
        with self._episode.lock:  # where another branch ends, the keeper ends a copy that it has not met yet
            return self._fork()

    def _fork(self) -> Branch:
        parent = self._living()
        twin = Branch(self._episode, self._seed)
        link = twin._link = Link(self.limits.message)
        try:
            with contextlib.ExitStack() as opened:  # where the copy meets the keeper and then the host
                ends = [opened.enter_context(end) for end in socket.socketpair()]
                ends[0].setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)  # to hear who comes
                ends[0].settimeout(GRACE)
                parent.send([ends[1].fileno()], do="fork", work=twin._work)
                meeting = os.fstat(ends[1].fileno()).st_ino
                ends[1].close()
                self._episode.ask([ends[0].fileno()], do="meet", branch=twin._number)
                message = {"branch": twin._number, "parent": self._number, "work": twin._work}
                rooms = []
                if self._episode.work:  # the copy's mount namespace: the keeper may not open it
                    rooms.append(os.open(f"/proc/{self._episode.pids[twin._number]}/ns/mnt", os.O_RDONLY))
                    opened.callback(os.close, rooms[0])
                self._episode.ask(rooms, do="adopt", **message)
                if (ready := ends[0].recv(REASON)) != b".":
                    raise ForkRefused(ready.decode(errors="replace") or "the copy ended")
                if self._episode.work:
                    self._check(twin, parent, meeting)
                socket.send_fds(ends[0], [b"."], [link.give()])
            link.gave()
        except (OSError, EOFError, SandboxError) as error:
            twin.close()
            raise ForkRefused(f"the interpreter did not fork: {error}") from None
        except ForkRefused:
            twin.close()
            raise
        return twin

    def _check(self, twin: Branch, parent: Link, meeting: int) -> None:
        pids = self._episode.pids
        check_fork(pids[twin._number], pids[self._number], set(pids.values()), parent.inode, meeting)

    def _leave(self) -> None:
        self._episode.leave(self._number)
