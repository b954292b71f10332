"""The zygote, which forks a keeper for each episode; and the keeper, which looks after the episode's interpreters."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import shutil
import signal
import socket
import struct
import sys
import time
from collections.abc import Iterator, Sequence
from stat import S_ISDIR, S_ISLNK, S_ISREG
from typing import Any, NoReturn

from .guest_channel import Channel
from .guest_interpreter import REASON, Uncopyable, begin, serve_pipes
from .guest_kernel import (
    AT_FDCWD,
    CLONE_NEWIPC,
    CLONE_NEWNS,
    CLONE_NEWPID,
    MNT_DETACH,
    MS_MOVE,
    MS_NODEV,
    MS_NOEXEC,
    MS_NOSUID,
    MS_PRIVATE,
    MS_REC,
    PR_SET_CHILD_SUBREAPER,
    PR_SET_DUMPABLE,
    checked,
    libc,
)
from .guest_root import ASIDE, WORK, bound_namespaces, cover, enter, lay, make_files, mount, mount_files

CREDENTIALS = struct.Struct("3i")
NUM_THREADS = 17  # among the fields of `stat`
FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
FILE = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
TERMINALS = 16  # of an episode; all episodes together get those of the host
COPYING = 2.0  # seconds that a keeper gives each step of a fork: less, so that it answers in time
CHUNK = 8 << 20  # bytes of a file that are copied at once
ROUNDS = 20  # of killing what is found, after which everything is stopped before it is looked for


class Keeper:
    """Looks after the interpreters of one episode and its branches."""

    def __init__(self, fd: int, limits: dict[str, Any], isolated: bool, filter_: bytes, expendable: int) -> None:
        self.channel = Channel(fd)
        self.expendable, self.kept = expendable, os.read(expendable, 16)  # oom_score_adj: open, and as it is here
        self.limits, self.isolated, self.filter = limits, isolated, filter_
        self.home = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC) if isolated else -1
        self.pids: dict[int, int] = {}  # of the interpreters, by branch
        # forks that came and have no files yet, by branch: where they wait, their process, its files, all that is open
        self.coming: dict[int, tuple[socket.socket, int, int, contextlib.ExitStack]] = {}
        self.rooms: dict[int, int] = {}  # mount namespaces of the branches: descriptors, by branch
        self.works: dict[int, str] = {}  # folders of their files, by branch
        self.fresh: int | None = None  # the mount namespace in which a parent's files are still mounted, aside

    def serve(self) -> NoReturn:
        with contextlib.suppress(OSError, EOFError):  # the host is gone
            message, fds = self.channel.receive()
            while message is not None:
                error, pid = self._do(message, fds)
                self.channel.send(error=error, branch=message["branch"], pid=pid)
                self._tidy()
                message, fds = self.channel.receive()
        self._end()

    def _do(self, message: dict[str, Any], fds: list[int]) -> tuple[str | None, int | None]:
        """Does as the host asks. What went wrong, which an agent's files may cause, and a new interpreter's pid."""
        try:
            return None, getattr(self, "do_" + message.pop("do"))(*fds, **message)
        except Uncopyable as error:
            return str(error), None
        except Exception as error:
            return f"{type(error).__name__}: {error}", None

    def do_start(self, fd: int, *, branch: int, work: str, seed: int) -> int:
        """A new interpreter over the branch's files."""
        if branch not in self.works:
            if not self.isolated and not self.works:
                os.mkdir(os.path.dirname(work), 0o700)  # made here, because a host that is killed would leave it
            self.works[branch] = work
            if self.isolated:
                self.rooms[branch] = os.dup(self.home)
        os.write(self.expendable, b"1000")  # the fork inherits it: one that writes its own is open to its siblings
        try:
            pid = os.fork()
        finally:
            os.write(self.expendable, self.kept)
        if not pid:
            try:
                if self.isolated:
                    checked(libc.setns(self.rooms[branch], CLONE_NEWNS), "setns")
                begin(fd, {**self.limits, "work": work, "seed": seed}, self.isolated, self.filter)
            finally:
                os._exit(1)
        os.close(fd)
        self.pids[branch] = pid
        return pid

    def do_meet(self, meeting: int, *, branch: int) -> int:
        """The fork of an interpreter, which comes to the meeting and waits there for files of its own."""
        with contextlib.ExitStack() as opened:
            fork = opened.enter_context(socket.socket(fileno=meeting))
            fork.settimeout(COPYING)
            files = -1
            if self.isolated:  # while it is made
                files = make_files(self.limits["disk"])
                opened.callback(os.close, files)
            pid = met(fork)
            if pid in self.pids.values() or parent_of(pid) != os.getpid():
                raise OSError(f"{pid} is no fork of its parent")
            self.coming[branch] = fork, pid, files, opened.pop_all()
            return pid

    def do_adopt(self, *rooms: int, branch: int, parent: int, work: str) -> None:
        """Gives a fork that came files of its own, a copy of its parent's, in its mount namespace if it has one."""
        fork, pid, files, opened = self.coming.pop(branch)
        with opened:
            self.works[branch] = work
            if self.isolated:
                opened.callback(os.close, rooms[0])
                self._furnish(branch, rooms[0], files)
            else:
                os.mkdir(work, 0o700)
                with _opened(work, FOLDER, AT_FDCWD) as files:
                    copy_folder(self.works[parent], files)
            self.pids[branch] = pid
            fork.sendall(b".")

    def _furnish(self, branch: int, room: int, files: int) -> None:
        """Copies and mounts files in a fork's mount namespace, where its parent's are still mounted."""
        known = {os.fstat(fd).st_ino for fd in (self.home, *self.rooms.values())}
        if os.fstat(room).st_ino in known:
            raise OSError("a fork has no mount namespace of its own")
        self.rooms[branch] = os.dup(room)
        with self._inside(room):
            copy_folder(WORK, files)
            checked(libc.mount(WORK.encode(), ASIDE.encode(), None, MS_MOVE, None), "move")
            self.fresh = self.rooms[branch]
            mount_files(files, WORK)

    def _tidy(self) -> None:
        """Unmounts the parent's files in a fork that has its own: while nobody waits, because the kernel takes long."""
        room, self.fresh = self.fresh, None
        if room is not None:
            with self._inside(room):
                while not libc.umount2(ASIDE.encode(), MNT_DETACH):  # twice if the parent was not tidied yet
                    pass

    @contextlib.contextmanager
    def _inside(self, room: int) -> Iterator[None]:
        """This process is in another mount namespace while the block runs."""
        checked(libc.setns(room, CLONE_NEWNS), "setns")
        try:
            yield
        finally:
            checked(libc.setns(self.home, CLONE_NEWNS), "setns")

    def do_kill(self, *, branch: int) -> None:
        """Ends the branch's interpreter and what it started, and what an interpreter that died left behind."""
        self.pids.pop(branch, None)
        others = set(self.pids.values())
        if self.isolated and not others:
            return signal_all(signal.SIGKILL)
        ended = end_below(os.getpid(), others)
        if not ended and self.isolated:  # processes that end as soon as they started the next outrun a list of them
            try:
                for _ in range(ROUNDS):
                    signal_all(signal.SIGSTOP)
                    if ended := end_below(os.getpid(), others):
                        break
            finally:
                signal_all(signal.SIGCONT)
        if not ended:
            raise OSError("processes start others faster than they can be ended")

    def do_discard(self, *, branch: int) -> None:
        """Ends a branch for good, and its files."""
        self.do_kill(branch=branch)
        if branch in self.coming:
            self.coming.pop(branch)[-1].close()
        room, work = self.rooms.pop(branch, None), self.works.pop(branch, None)
        if room is not None:
            os.close(room)
        if work is not None and not self.isolated:  # behind walls the folder has the same name in every branch
            shutil.rmtree(work, ignore_errors=True)

    def _end(self) -> NoReturn:
        """Ends all interpreters, then this process."""
        if self.isolated:
            signal_all(signal.SIGKILL)
        else:
            end_below(os.getpid(), set())
            for folder in {os.path.dirname(work) for work in self.works.values()}:  # a host that was killed does not
                shutil.rmtree(folder, ignore_errors=True)
        end = time.monotonic() + 2
        with contextlib.suppress(ChildProcessError):  # no child is left: only then the host hears of the end
            while os.waitpid(-1, os.WNOHANG) and time.monotonic() < end:
                time.sleep(0.0005)
        with contextlib.suppress(OSError):
            self.channel.send(ended=True)
        os._exit(0)


def parent_of(pid: int) -> int:
    """ProcessLookupError, or FileNotFoundError, where there is no such process."""
    return int(stat(pid)[1])


def stat(pid: int | str) -> list[str]:
    """State, parent and so on of a process, as proc_pid_stat(5) has them from the third field on."""
    fd = os.open(f"/proc/{pid}/stat", os.O_RDONLY)
    try:
        return os.read(fd, 4096).decode(errors="replace").rpartition(")")[2].split()
    finally:
        os.close(fd)


def signal_all(number: int) -> None:
    """Sends a signal at once to every process of the namespace except the first, which is this one."""
    with contextlib.suppress(ProcessLookupError):  # there is none
        os.kill(-1, number)


def end_below(pid: int, but: set[int]) -> bool:
    """Kills the processes below `pid`, except `but` and those below them. Whether none can have been missed.

    A process that was killed starts nothing more, whichever of its threads the list showed.
    """
    killed = set[int]()
    for _ in range(ROUNDS):
        found, gone = below(pid, but)
        if not (found | gone) - killed:
            return True
        for each in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(each, signal.SIGKILL)
        killed |= found
    return False


def below(pid: int, but: set[int]) -> tuple[set[int], set[int]]:
    """The living processes below `pid`, except `but` and those below them; and those that ended meanwhile.

    A process lives as long as one of its threads does: its first may have exited.
    """
    children: dict[int, list[int]] = {}
    gone = set[int]()
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                state, parent, *_ = fields = stat(name)
                if state not in "ZX" or int(fields[NUM_THREADS]) > 1:
                    children.setdefault(int(parent), []).append(int(name))
            except (OSError, ValueError, IndexError):
                gone.add(int(name))
    found, ahead = set[int](), [pid]
    while ahead:
        fresh = set(children.get(ahead.pop(), [])) - but
        found |= fresh
        ahead += fresh
    return found, gone


def met(other: socket.socket) -> int:
    """The process that writes to the socket, as the kernel says.

    EOFError where nobody does, Uncopyable where what is written is the reason why there is no fork.
    """
    data, parts, _, _ = other.recvmsg(REASON, socket.CMSG_SPACE(CREDENTIALS.size))
    pid = 0
    for _, kind, content in parts:
        if kind == socket.SCM_CREDENTIALS:
            pid = CREDENTIALS.unpack(content)[0]
    if not data:
        raise EOFError("no fork came")
    if data != b".":
        raise Uncopyable(data.decode(errors="replace"))
    return pid


def copy_folder(path: str, target: int) -> None:
    """Copies the files of a folder into `target`, an open folder. Agent code may run meanwhile.

    Uncopyable where that would have to wait, or takes more than COPYING.
    """
    with _opened(path, FOLDER, AT_FDCWD) as source:
        _copy(source, target, time.monotonic() + COPYING)


def _copy(source: int, target: int, end: float) -> None:
    """Goes by open folders, so that a link that is put in a folder's place meanwhile leads nowhere."""
    for name in os.listdir(source):
        _in_time(end)
        mode = os.stat(name, dir_fd=source, follow_symlinks=False).st_mode
        if S_ISLNK(mode):
            os.symlink(os.readlink(name, dir_fd=source), name, dir_fd=target)
        elif S_ISDIR(mode):
            os.mkdir(name, dir_fd=target)
            with _opened(name, FOLDER, source) as old, _opened(name, FOLDER, target) as new:
                _copy(old, new, end)
                shutil.copystat(old, new)
        else:
            with _opened(name, FILE, source) as old:
                if not S_ISREG(os.fstat(old).st_mode):
                    raise Uncopyable(f"{name} is neither a file, a folder nor a link")
                with _opened(name, NEW_FILE, target) as new:
                    _copy_content(old, new, end)
                    shutil.copystat(old, new)


def _copy_content(source: int, target: int, end: float) -> None:
    while os.sendfile(target, source, None, CHUNK):
        _in_time(end)  # it may grow all the time


def _in_time(end: float) -> None:
    if time.monotonic() > end:
        raise Uncopyable(f"its files take more than {COPYING:g} seconds to copy")


@contextlib.contextmanager
def _opened(name: str, flags: int, folder: int) -> Iterator[Any]:
    """Opens a file without waiting for the other end of a pipe, or for whoever holds a lease on the file."""
    try:
        fd = os.open(name, flags, 0o600, dir_fd=folder)
    except BlockingIOError:
        raise Uncopyable(f"a program holds a lease on {name}") from None
    try:
        yield fd
    finally:
        os.close(fd)


# The zygote


def keep(fd: int, limits: dict[str, Any], isolated: bool, filter_: bytes, cgroups: Sequence[int]) -> NoReturn:
    """Turns this process, a fresh fork of the zygote, into the keeper of a new episode."""
    if isolated:
        uid, gid = os.getuid(), os.getgid()
        checked(libc.unshare(0x10000000 | CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWPID), "unshare")
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
        if os.fork():
            os._exit(0)
    for cgroup in cgroups:
        os.write(cgroup, b"0")
        os.close(cgroup)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    checked(libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0))
    if isolated:
        checked(libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None), "mount", "/")
        cover()
        mount(b"proc", ASIDE + "/proc", b"proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
        terminals = f"newinstance,ptmxmode=0666,mode=620,max={TERMINALS}".encode()
        mount(b"devpts", ASIDE + "/dev/pts", b"devpts", MS_NOSUID | MS_NOEXEC, terminals)
        files = make_files(limits["disk"])
        mount_files(files, ASIDE + WORK)
        os.close(files)
        enter(ASIDE)
        bound_namespaces(4 * limits["NPROC"])
    expendable = os.open("/proc/self/oom_score_adj", os.O_RDWR | os.O_CLOEXEC)
    if isolated:
        checked(libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0))
    Keeper(fd, limits, isolated, filter_, expendable).serve()


def serve_episodes(fd: int, isolated: bool, filter_: bytes) -> None:
    """Makes this process the zygote, until its host is gone."""
    gc.collect()
    gc.freeze()  # a collection would touch, and so copy, the pages that forks share
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    if not isolated:  # inherits what a killed keeper leaves; behind walls that ends with its namespace
        checked(libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0))
    if isolated:
        lay()
    channel = Channel(fd)
    channel.send(ready=True)
    while True:
        message, fds = channel.receive()
        if message is None:
            break
        if "limits" not in message:
            _sweep()
            channel.send(swept=True)
            continue
        if not os.fork():
            try:
                channel.close()
                keep(fds[0], message["limits"], isolated, filter_, fds[1:])
            except BaseException as error:
                with contextlib.suppress(OSError):
                    Channel(fds[0]).send(error=f"{type(error).__name__}: {error}")
            finally:
                os._exit(1)
        for received in fds:
            os.close(received)


def _sweep() -> None:
    """Ends what killed keepers left below this process. The others there, in its session, are living keepers."""
    keepers = set[int]()
    for pid in below(os.getpid(), set())[0]:
        with contextlib.suppress(ProcessLookupError):
            if os.getsid(pid) == os.getsid(0):
                keepers.add(pid)
    end_below(os.getpid(), keepers)


def reap() -> NoReturn:
    """Makes this the first process of a container: it kills all others whenever the host sends SIGUSR1."""
    checked(libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0))  # nobody else reads its memory
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, lambda *_: signal_all(signal.SIGKILL))
    while True:
        signal.pause()


def main() -> None:
    """The program's argument is JSON: {"role", "libraries": [...], and what the role takes}.

    A role is "zygote", "pipes" or "reap".
    """
    settings = json.loads(sys.argv[1])
    for name in settings.get("libraries", ()):
        with contextlib.suppress(ImportError):
            __import__(name)
    if settings["role"] == "zygote":
        serve_episodes(settings["fd"], settings["isolated"], bytes.fromhex(settings["filter"]))
    elif settings["role"] == "pipes":
        serve_pipes(settings["limits"])
    else:
        reap()
