"""What runs inside a sandbox: a zygote, a keeper for each episode, and interpreters. The standard library alone.

    zygote        imports the usual libraries once and forks a keeper when an episode begins; no agent's code runs in it
    keeper        first process of the episode's namespaces: mounts its files, starts, kills and moves interpreters; no
                  agent's code runs in it either
    interpreter   runs the agent's code, one call after the other, and forks when the episode branches

Each talks to the host over a socket of its own, in messages of a length and a JSON text. An interpreter can forge its
own answers and nobody else's.
"""

from __future__ import annotations

import ast
import contextlib
import ctypes
import fcntl
import functools
import gc
import json
import linecache
import os
import random
import re
import resource
import shutil
import signal
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from io import TextIOWrapper
from stat import S_IMODE, S_ISDIR, S_ISLNK, S_ISREG
from types import CodeType
from typing import Any, NoReturn

HEADER, CREDENTIALS = struct.Struct("!I"), struct.Struct("3i")
DEVICES = {os.makedev(1, minor) for minor in (3, 5, 7, 8, 9)}  # null, zero, full, random, urandom
CLONE = {"x86_64": 56, "aarch64": 220}  # the system call's number
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
CLONE_PARENT, CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWPID = 0x00008000, 0x00020000, 0x08000000, 0x20000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_BIND, MS_MOVE, MS_REC, MS_PRIVATE = 1 << 12, 1 << 13, 1 << 14, 1 << 18
MNT_DETACH = 2
PROCMAP, PROCMAP_QUERY = struct.Struct("=9Q4I2Q"), 0xC0686611
VMA_WRITABLE, VMA_SHARED, COVERING_OR_NEXT_VMA = 2, 8, 16
MOVE_MOUNT, FSOPEN, FSCONFIG, FSMOUNT = 429, 430, 431, 432  # system calls, on every architecture
FSCONFIG_SET_STRING, FSCONFIG_CMD_CREATE = 1, 6
MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV, MOVE_MOUNT_F_EMPTY_PATH = 2, 4, 4
PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 4, 22, 24, 36, 38
CAP_SYS_ADMIN, LAST_CAP = 21, 40
AT_FDCWD = -100
NUM_THREADS = 17  # among the fields of `stat`
FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
FILE = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
FALLOC_FL_KEEP_SIZE = 1
WORK = "/episode"
KERNEL = ("proc", "devpts", "mqueue")  # file systems that hold no files of the host
BASE = "/run/base"  # what all episodes' roots have in common, laid out by the zygote
ASIDE = "/mnt/aside"  # where a keeper gets and no agent's code: the folder above is closed to all without capabilities
COUNTED = {"CORE": 0, "MEMLOCK": 0, "MSGQUEUE": 0, "SIGPENDING": 256}  # limits of any process
TERMINALS = 16  # of an episode; all episodes together get those of the host
GRACE = 5.0  # seconds that a sandbox's own processes have for an answer
COPYING = 2.0  # seconds that a keeper gives each step of a fork: less, so that it answers in time
REASON = 500  # bytes of why there was no fork
CHUNK = 8 << 20  # bytes of a file that are copied at once
ROUNDS = 20  # of killing what is found, after which everything is stopped before it is looked for
GAP = "\n[...]\n"  # in a text whose middle is left out
FIRST = "x = 6\nprint(x)\nx * 7"  # run before all calls, so that none has to wait until memory of the zygote is copied
libc = ctypes.CDLL(None, use_errno=True)
python = ctypes.PyDLL(None, use_errno=True)  # the same functions, and Python's own, without another thread meanwhile


def checked(result: int, *about: object) -> int:
    """A libc call's result. OSError where it failed."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), *map(str, about))
    return result


class Channel:
    """Messages over a socket, with at most a few file descriptors beside each; from the host they tell how many."""

    def __init__(self, fd: int) -> None:
        self.socket = socket.socket(fileno=fd)
        self.unread = bytearray()
        self.fds: list[int] = []  # that came and whose message was not yet read

    def send(self, **message: Any) -> None:
        self.socket.sendall(packed(message))

    def receive(self) -> tuple[dict[str, Any] | None, list[int]]:
        """The next message and the descriptors that belong to it; None at the end."""
        while (text := take(self.unread)) is None:
            part, found = self._some()
            if not part:
                return None, []
            self.unread += part
            self.fds += found  # with the first of the messages that are read at once
        message = json.loads(text)
        count = message.pop("fds", 0)
        fds, self.fds = self.fds[:count], self.fds[count:]
        return message, fds

    def _some(self) -> tuple[bytes, list[int]]:
        return socket.recv_fds(self.socket, 1 << 16, 4)[:2]

    def close(self) -> None:
        self.socket.close()


def packed(message: dict[str, Any]) -> bytes:
    text = json.dumps(message).encode()
    return HEADER.pack(len(text)) + text


def take(unread: bytearray, limit: int = 1 << 32) -> bytes | None:
    """The first message of what was received, taken out of it; None where it is not yet whole.

    EOFError where it is to be longer than the limit.
    """
    if len(unread) < HEADER.size:
        return None
    (length,) = HEADER.unpack_from(unread)
    if length > limit:
        raise EOFError(f"a message of {length} bytes")
    end = HEADER.size + length
    if len(unread) < end:
        return None
    message = bytes(unread[HEADER.size : end])
    del unread[:end]
    return message


class Pipes(Channel):
    """Messages over standard input and output, which the agent's code then has no more."""

    def __init__(self) -> None:
        self.ends = [os.dup(fd) for fd in (0, 1)]
        self.unread = bytearray()
        self.fds = []

    def send(self, **message: Any) -> None:
        data = packed(message)
        while data:
            data = data[os.write(self.ends[1], data) :]

    def _some(self) -> tuple[bytes, list[int]]:
        return os.read(self.ends[0], 1 << 16), []


# The interpreter


class Uncopyable(Exception):
    """Why a copy of an interpreter would not be whole."""


class Interpreter:
    """Runs calls in one namespace; what they print goes to a file, its beginning to the host."""

    def __init__(self, channel: Channel, limits: dict[str, Any], isolated: bool) -> None:
        self.channel = channel
        self.limits = limits
        self.isolated = isolated
        self.names = {"__name__": "__main__", "__builtins__": __builtins__}
        self.calls = 0
        self.writer: TextIOWrapper | None = None
        self._open_output()

    def _open_output(self) -> None:
        flags = os.O_TMPFILE | os.O_RDWR | os.O_APPEND | os.O_CLOEXEC
        self.output = os.open(self.limits["work"], flags, 0o600)

    def serve(self) -> NoReturn:
        while True:
            message, fds = self.channel.receive()
            if message is None:
                os._exit(0)
            if message["do"] == "run":
                self.channel.send(id=message["id"], **self.run(message["code"], message["apart"]))
            elif message["do"] == "fork":
                self.fork(fds[0], message["work"])
            elif message["do"] == "seed":
                seed(message["seed"])

    def run(self, code: str, apart: bool) -> dict[str, Any]:
        """What the code printed and whether it failed; the value of a last expression is printed too.

        Code `apart` is not the agent's: it has names of its own, the agent's as `agent`, and no tracebacks.
        """
        if apart:
            name, names = __file__, {"__name__": "apart", "__builtins__": __builtins__, "agent": self.names}
        else:
            self.calls += 1
            name, names = f"<call {self.calls}>", self.names
            linecache.cache[name] = (len(code), None, code.splitlines(True), name)
        for fd in (1, 2):
            os.dup2(self.output, fd)
        self._empty_output()
        if self.writer is None:
            self.writer = open(1, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115 (stays)
        sys.stdout = sys.stderr = writer = self.writer
        error = self._execute(code, name, names)
        lost = self._flush(writer)
        return {**self._printed(), "failed": bool(error or lost), "error": error or lost}

    def _empty_output(self) -> None:
        """Keeps room for what is shown of it: a call can print although the disk is full."""
        os.ftruncate(self.output, 0)
        libc.fallocate(self.output, FALLOC_FL_KEEP_SIZE, ctypes.c_long(0), ctypes.c_long(4 * self.limits["output"]))

    def _flush(self, writer: Any) -> str:
        """Why a part of the output is lost, if it is. The next call then gets another writer."""
        lost = ""
        try:
            writer.flush()
            return ""
        except OSError as error:  # the disk is full, or it is more than a file may hold
            lost = f"the end of what was printed is lost: {error.strerror}\n"
        except Exception:  # the agent closed it
            pass
        with contextlib.suppress(Exception):
            writer.buffer.raw.close()  # else what it holds is written once it is forgotten, in another call
        self.writer = None
        return lost

    def _printed(self) -> dict[str, Any]:
        """The output's beginning, its size in bytes, and whether there is more."""
        size, data, most = os.fstat(self.output).st_size, b"", self.limits["output"]
        if size:
            data = os.pread(self.output, 4 * most, 0)
            os.ftruncate(self.output, 0)
        text = data.decode("utf-8", "replace")
        return {"text": text[:most], "bytes": size, "cut": size > 4 * most or bool(text[most:])}

    def _execute(self, code: str, name: str, names: dict[str, Any]) -> str:
        """What went wrong, as the agent reads it; nothing where all went well."""
        try:
            body, last = compiled(code, name)
            exec(body, names)
            if last:
                value = eval(last, names)
                if value is not None:
                    names["_"] = value
                    print(repr(value))
            return ""
        except SystemExit as error:
            return "".join(traceback.format_exception_only(error)).rstrip() + "; the interpreter goes on\n"
        except BaseException as error:
            return _shortened(self._told(error, apart=names is not self.names), self.limits["output"] // 2)

    def _told(self, error: BaseException, *, apart: bool) -> str:
        """The traceback from the agent's first frame on."""
        if apart:
            return "".join(traceback.format_exception_only(error))
        frames = error.__traceback__
        while frames is not None and frames.tb_frame.f_code.co_filename == __file__:
            frames = frames.tb_next
        limit = None if not isinstance(error, RecursionError) else 5
        return "".join(traceback.format_exception(type(error), error, frames, limit=limit))

    def fork(self, meeting: int, work: str) -> None:
        """Forks. The copy gets files and a channel at the meeting. Where there is no copy, the reason is sent there.

        What can be made before is: afterwards each page of memory that is first written to is copied.
        """
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        keeper, copied = socket.socket(fileno=meeting), False
        try:
            self._check_processes()
            self._check_signals()
            self._check_memory()
            files = self._files(but={1, 2, self.channel.socket.fileno(), self.output, meeting})
            folder = os.getcwd()
            copied = fork_beside()
            if copied:
                self._settle(keeper, work, folder, files)
        except Exception as error:
            reason = str(error) if isinstance(error, Uncopyable) else repr(error)
            with contextlib.suppress(OSError):  # nobody waits any more
                keeper.send(reason.encode(errors="replace")[:REASON])
            if copied:
                os._exit(1)
        keeper.close()

    def _settle(self, keeper: socket.socket, work: str, folder: str, files: list[tuple[int, str, int, int]]) -> None:
        """Moves this process, a copy of one that works in the folder, to files and a channel of its own."""
        os.close(self.output)
        self.channel.close()
        if self.isolated:
            checked(libc.unshare(CLONE_NEWNS), "unshare")
        keeper.send(b".")
        os.setpgid(0, 0)  # a signal to its group is not to its parent
        checked(libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0))
        if not keeper.recv(1):
            os._exit(1)  # the keeper has no files for it, and says why
        old = self.limits["work"]
        if work != old:
            self.limits = {**self.limits, "work": work}
            moved = {name: path.replace(old, work, 1) for name, path in os.environ.items() if path.startswith(old)}
            os.environ.update(moved)
        os.chdir(folder.replace(old, work, 1))
        for number, path, flags, offset in files:
            new = os.open(path.replace(old, work, 1), flags & ~(os.O_TRUNC | os.O_CREAT | os.O_EXCL))
            os.lseek(new, offset, os.SEEK_SET)
            os.dup2(new, number, inheritable=not flags & os.O_CLOEXEC)
            os.close(new)
        self._open_output()
        for standard in (1, 2):  # which are still its parent's output
            os.dup2(self.output, standard)
        keeper.send(b".")
        fds = socket.recv_fds(keeper, 1, 1)[1]
        if not fds:
            os._exit(1)  # the host found that it holds more than it may
        self.channel = Channel(fds[0])

    def _check_processes(self) -> None:
        """Uncopyable where there are threads or children."""
        if len(os.listdir("/proc/self/task")) > 1:
            names = [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]
            raise Uncopyable(f"threads are running: {', '.join(names) or 'not of Python'}")
        with contextlib.suppress(ChildProcessError):  # there is none
            os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            raise Uncopyable("a process that it started runs, or ended and was not waited for")

    def _check_signals(self) -> None:
        """Uncopyable where a signal is to come: the kernel gives neither timers nor what is pending to a copy."""
        timers = (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF)
        more = ""
        with contextlib.suppress(FileNotFoundError), open("/proc/self/timers") as file:  # not every kernel tells
            more = file.read()
        if more or any(signal.getitimer(timer)[0] for timer in timers):
            raise Uncopyable("a timer runs")
        if signal.sigpending():
            raise Uncopyable("a signal is pending")

    def _check_memory(self) -> None:
        """Uncopyable where memory is shared, to be written or with a file of the episode's."""
        work = self.limits["work"]
        device = os.stat(work).st_dev if self.isolated else None  # else other files are there, too
        if shared := shared_memory("self", device, work):
            raise Uncopyable(f"memory is shared: {shared}")

    def _files(self, but: set[int]) -> list[tuple[int, str, int, int]]:
        """Number, path, flags and offset of each open file. Uncopyable where one is no file, or has no name."""
        found = []
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(FileNotFoundError):  # that of the listing itself
                number, path = int(name), os.readlink(f"/proc/self/fd/{name}")
                if number not in but and (file := self._file(number, path)):
                    found.append(file)
        return found

    def _file(self, number: int, path: str) -> tuple[int, str, int, int] | None:
        """None for a device without a state."""
        status = os.fstat(number)
        if status.st_rdev in DEVICES:
            return None
        if not S_ISREG(status.st_mode) or not status.st_nlink:
            raise Uncopyable(f"file descriptor {number} is {path}")
        with open(f"/proc/self/fdinfo/{number}") as file:
            info = dict(line.split(":\t") for line in file.read().splitlines()[:2])
        return number, path, int(info["flags"], 8), int(info["pos"])


def shared_memory(pid: int | str, device: int | None, folder: str = WORK) -> str | None:
    """A process's memory that is shared, to be written or with a file on the device or in the folder."""
    with open(f"/proc/{pid}/maps", "rb") as maps:
        if device is not None and not _may_share(maps.fileno(), device):
            return None
        for line in maps:
            _, rights, _, numbers, _, *path = line.split(None, 5)
            number = os.makedev(*(int(part, 16) for part in numbers.split(b":")))
            ours = number == device or (bool(path) and path[0].startswith(folder.encode()))
            if rights.endswith(b"s") and (b"w" in rights or ours):
                return line.decode(errors="replace").strip()
    return None


def _shortened(text: str, most: int) -> str:
    """Without its middle where it is longer than so many characters."""
    half = (most - len(GAP)) // 2
    return text[:half] + GAP + text[-half:] if text[most:] else text


def _may_share(maps: int, device: int) -> bool:
    """Whether shared memory can be written, or is a file's on the device. To read all maps takes ten times as long."""
    query, end = bytearray(PROCMAP.size), 0
    try:
        while True:  # the next one that is shared, from there on
            PROCMAP.pack_into(query, 0, len(query), VMA_SHARED | COVERING_OR_NEXT_VMA, end, *[0] * 12)
            fcntl.ioctl(maps, PROCMAP_QUERY, query)
            _, _, _, _, end, flags, _, _, _, major, minor, *_ = PROCMAP.unpack(query)
            if flags & VMA_WRITABLE or os.makedev(major, minor) == device:
                return True
    except FileNotFoundError:  # there is no more
        return False
    except OSError:  # nor this call, before Linux 6.11
        return True


def fork_beside() -> bool:
    """Forks, but a child of this process's parent, the keeper; whether this is the copy.

    So nothing comes to this process when the copy ends: neither its remains nor what it started nor its own copies.
    To Python the copy, too, is the process that goes on: without threads it has nothing to set right in a child, and
    what else it does there, to seed `random` anew first of all, is to be spared a copy. It takes as long as the fork.
    """
    number, zero = CLONE[os.uname().machine], ctypes.c_long(0)
    python.PyOS_BeforeFork()
    pid = python.syscall(number, CLONE_PARENT | signal.SIGCHLD, zero, zero, zero, zero)
    python.PyOS_AfterFork_Parent()
    if pid < 0:
        raise Uncopyable(f"no process more: {os.strerror(ctypes.get_errno())}")
    return not pid


def body_of(text: str, name: str) -> CodeType:
    return compile(text, name, "exec", dont_inherit=True)


ours = functools.lru_cache(maxsize=1)(body_of)  # of code that is not the agent's and differs in its last line alone


def compiled(code: str, name: str) -> tuple[CodeType, CodeType | None]:
    """The code, and the expression that it ends in, if any, apart."""
    text = code.rstrip("\n")
    start = text.rfind("\n") + 1
    above, line = text[:start], text[start:]
    if "\r" not in text and not line[:1].isspace():
        with contextlib.suppress(SyntaxError):  # else the last line is an expression, and what is above it is whole
            last = compile("\n" * above.count("\n") + line, name, "eval", dont_inherit=True)
            return (ours if name == __file__ else body_of)(above, name), last
    tree: Any = compile(code, name, "exec", ast.PyCF_ONLY_AST, dont_inherit=True)
    end = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    body = compile(tree, name, "exec", dont_inherit=True)
    return body, compile(ast.Expression(end.value), name, "eval", dont_inherit=True) if end else None


def begin(fd: int, limits: dict[str, Any], isolated: bool, filter_: bytes) -> NoReturn:
    """Turns this process, a fresh fork, into an interpreter that talks on the descriptor."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.setsid()
    _close_all_but(fd)
    if isolated:
        _drop_capabilities()
    _bind(limits)
    checked(libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0))  # as its keeper is where there are walls
    if filter_:
        _filter_calls(filter_)
    interpreter = Interpreter(Channel(fd), limits, isolated)
    json.dumps(interpreter.run(FIRST, apart=True))
    interpreter.serve()


def _bind(limits: dict[str, Any]) -> None:
    """Limits, folder and seeds of an interpreter."""
    checked(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    checked(libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0))
    for name in ("AS", "NPROC", "FSIZE", "NOFILE"):
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limits[name], limits[name]))
    for name, most in COUNTED.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))
    temporary = os.path.join(limits["work"], ".tmp")
    with contextlib.suppress(OSError):  # the disk is full, or another file has its name
        os.makedirs(temporary, exist_ok=True)
    os.chdir(limits["work"])
    os.environ.update(HOME=limits["work"], TMPDIR=temporary)
    seed(limits["seed"])


def seed(number: int) -> None:
    """Seeds the generators that code uses without one of its own."""
    random.seed(number)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(number % 2**32)


def _close_all_but(fd: int) -> None:
    null = os.open("/dev/null", os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    os.closerange(3, fd)
    os.closerange(fd + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[0])


class _CapabilityHeader(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]


class _CapabilityData(ctypes.Structure):
    _fields_ = [("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32)]


def _drop_capabilities() -> None:
    """Keeps what unshare(CLONE_NEWNS) needs, the one use of it that the filter lets through; programs get none."""
    for number in range(LAST_CAP + 1):
        libc.prctl(PR_CAPBSET_DROP, number, 0, 0, 0)
    header = _CapabilityHeader(0x20080522, 0)
    data = (_CapabilityData * 2)(_CapabilityData(1 << CAP_SYS_ADMIN, 1 << CAP_SYS_ADMIN, 0))
    checked(libc.capset(ctypes.byref(header), data), "capset")


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]


def _filter_calls(filter_: bytes) -> None:
    program = _Program(len(filter_) // 8, filter_)
    checked(libc.prctl(PR_SET_SECCOMP, 2, ctypes.byref(program), 0, 0), "seccomp")


# The keeper


class Keeper:
    """Looks after the interpreters of one episode and its branches."""

    def __init__(self, fd: int, limits: dict[str, Any], isolated: bool, filter_: bytes, expendable: int) -> None:
        self.channel = Channel(fd)
        self.expendable, self.kept = expendable, os.read(expendable, 16)  # how soon this goes where memory is short
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
        """What went wrong, whatever an agent's files made of it, and the interpreter that is new."""
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
                os.mkdir(os.path.dirname(work), 0o700)  # here, so that a host that is killed leaves none
            self.works[branch] = work
            if self.isolated:
                self.rooms[branch] = os.dup(self.home)
        os.write(self.expendable, b"1000")  # which the fork inherits; to write its own, it had to open to its siblings
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
        """Unmounts what a fork's own files replaced: the kernel takes long over it, so not while anyone waits."""
        room, self.fresh = self.fresh, None
        if room is not None:
            with self._inside(room):
                while not libc.umount2(ASIDE.encode(), MNT_DETACH):  # twice if the parent was not tidied yet
                    pass

    @contextlib.contextmanager
    def _inside(self, room: int) -> Iterator[None]:
        """In another mount namespace."""
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
        self.do_kill(branch=branch)
        if branch in self.coming:
            self.coming.pop(branch)[-1].close()
        room, work = self.rooms.pop(branch, None), self.works.pop(branch, None)
        if room is not None:
            os.close(room)
        if work is not None and not self.isolated:  # else the folder has that name in every branch
            shutil.rmtree(work, ignore_errors=True)

    def _end(self) -> NoReturn:
        if self.isolated:
            signal_all(signal.SIGKILL)
        else:
            end_below(os.getpid(), set())
            for folder in {os.path.dirname(work) for work in self.works.values()}:  # a host that was killed does not
                shutil.rmtree(folder, ignore_errors=True)
        end = time.monotonic() + 2
        with contextlib.suppress(ChildProcessError):  # none is left: only then the host hears of the end
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
    """To every process of the namespace but its first, which this is, at once."""
    with contextlib.suppress(ProcessLookupError):  # there is none
        os.kill(-1, number)


def end_below(pid: int, but: set[int]) -> bool:
    """Kills the processes below this one, without these and those below them. Whether none can have been missed.

    What is to die starts nothing more, whichever of its threads the list showed.
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
    """The living processes below this one, without these and those below them; and those that ended meanwhile.

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


def make_files(disk: int) -> int:
    """An empty file system of so many bytes, mounted nowhere yet: a descriptor."""
    context = checked(libc.syscall(FSOPEN, b"tmpfs", 1), "fsopen")
    try:
        for key, value in (("size", disk), ("nr_inodes", 16384), ("mode", "0700")):
            setting = key.encode(), str(value).encode()
            checked(libc.syscall(FSCONFIG, context, FSCONFIG_SET_STRING, *setting, 0), "fsconfig", key)
        checked(libc.syscall(FSCONFIG, context, FSCONFIG_CMD_CREATE, None, None, 0), "fsconfig")
        return checked(libc.syscall(FSMOUNT, context, 1, MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV), "fsmount")
    finally:
        os.close(context)


def mount_files(files: int, folder: str) -> None:
    target = AT_FDCWD, folder.encode(), MOVE_MOUNT_F_EMPTY_PATH
    checked(libc.syscall(MOVE_MOUNT, files, b"", *target), "move_mount", folder)


def met(other: socket.socket) -> int:
    """The process that writes to the socket, as the kernel says.

    EOFError where nobody does, Uncopyable where it is the reason why there is no fork.
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
    """Copies the files of a folder into another, which is open. Uncopyable where it would have to wait, or takes long.

    Agent code may run meanwhile.
    """
    with _opened(path, FOLDER, AT_FDCWD) as source:
        _copy(source, target, time.monotonic() + COPYING)


def _copy(source: int, target: int, end: float) -> None:
    """By open folders, so that a link that is put in a folder's place meanwhile leads nowhere."""
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
    """A file's descriptor, without waiting: for the other end of a pipe, or for who holds a lease."""
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
        _bound_namespaces(4 * limits["NPROC"])
    expendable = os.open("/proc/self/oom_score_adj", os.O_RDWR | os.O_CLOEXEC)
    if isolated:
        checked(libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0))
    Keeper(fd, limits, isolated, filter_, expendable).serve()


def lay() -> None:
    """Copies into BASE, once for all episodes, what no overlay can show: folders in which something is mounted, file by
    file. Where other folders come, empty ones stand; where devices come, empty files."""
    os.makedirs(BASE + ASIDE)
    _lay("/", _mounts())
    os.chmod(BASE + os.path.dirname(ASIDE), 0)


def _lay(path: str, mounts: dict[str, str]) -> None:
    os.makedirs(BASE + path, exist_ok=True)
    if path == os.path.dirname(ASIDE) or path == BASE or not _made_again(path, mounts):
        return
    for name in os.listdir(path):
        inner = os.path.join(path, name)
        status = os.lstat(inner)
        if S_ISLNK(status.st_mode):
            os.symlink(os.readlink(inner), BASE + inner)
        elif S_ISREG(status.st_mode):
            shutil.copy(inner, BASE + inner)
        elif S_ISDIR(status.st_mode):
            _lay(inner, mounts)
        else:
            os.close(os.open(BASE + inner, os.O_CREAT))
    os.chmod(BASE + path, S_IMODE(os.stat(path).st_mode))


def cover() -> None:
    """Makes a root of this episode's own, aside, with the same content as this one: BASE and host folders as overlays.

    A lock on a file is then a lock in this episode alone. Devices stay those of the host.
    """
    _overlay(BASE, ASIDE)
    _cover("/", _mounts())


def _cover(path: str, mounts: dict[str, str]) -> None:
    if path in (os.path.dirname(ASIDE), BASE) or mounts.get(path) in KERNEL:
        return
    if not _made_again(path, mounts):
        _overlay(path, ASIDE + path)
        return
    for name in os.listdir(path):
        inner = os.path.join(path, name)
        status = os.lstat(inner)
        if S_ISDIR(status.st_mode):
            _cover(inner, mounts)
        elif not S_ISREG(status.st_mode) and not S_ISLNK(status.st_mode):
            mount(os.fsencode(inner), ASIDE + inner, None, MS_BIND)


def _made_again(path: str, mounts: dict[str, str]) -> bool:
    """Whether a folder is in BASE: one that bwrap made, or one in which something is mounted."""
    if mounts.get(path) in KERNEL:
        return False
    made_here = {os.stat(folder).st_dev for folder in ("/", "/dev")}
    below = path.rstrip("/") + "/"
    return os.stat(path).st_dev in made_here or any(other.startswith(below) for other in mounts)


def _overlay(path: str, target: str) -> None:
    layers = ":".join(re.sub(r"([\\:,])", r"\\\1", layer) for layer in (WORK, path))  # one alone is refused
    mount(b"overlay", target, b"overlay", MS_RDONLY | MS_NOSUID | MS_NODEV, f"lowerdir={layers}".encode())


def _mounts() -> dict[str, str]:
    """Where something is mounted, and the kind of its file system."""
    with open("/proc/self/mountinfo") as file:
        lines = [line.split() for line in file]
    return {_unescaped(line[4]): line[line.index("-") + 1] for line in lines}


def enter(root: str) -> None:
    os.chdir(root)
    checked(libc.syscall(PIVOT_ROOT[os.uname().machine], b".", b"."), "pivot_root")
    checked(libc.umount2(b".", MNT_DETACH), "umount")
    os.chdir("/")


def mount(source: bytes, target: str, kind: bytes | None, flags: int, options: bytes | None = None) -> None:
    checked(libc.mount(source, os.fsencode(target), kind, flags, options), f"mount at {target}")


def _unescaped(path: str) -> str:
    """A path of mountinfo, where blanks and the like are octal numbers."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), path)


def _bound_namespaces(mounts: int) -> None:
    """So many mount namespaces for this user namespace, and none of what else is counted there."""
    for entry in os.scandir("/proc/sys/user"):
        with open(entry, "w") as file:
            file.write(str(mounts if entry.name == "max_mnt_namespaces" else 0))


def serve_episodes(fd: int, isolated: bool, filter_: bytes) -> None:
    """The zygote, until its host is gone."""
    gc.collect()
    gc.freeze()  # a collection would touch, and so copy, the pages that forks share
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    if not isolated:  # what a keeper leaves behind that is killed comes here; else its namespace ends with it
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
    """Ends what keepers that were killed left below this process: keepers alone are in its own session."""
    keepers = set[int]()
    for pid in below(os.getpid(), set())[0]:
        with contextlib.suppress(ProcessLookupError):
            if os.getsid(pid) == os.getsid(0):
                keepers.add(pid)
    end_below(os.getpid(), keepers)


def serve_pipes(limits: dict[str, Any]) -> NoReturn:
    """An interpreter alone, over standard input and output: one in a container."""
    channel = Pipes()
    null = os.open("/dev/null", os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    _bind(limits)
    interpreter = Interpreter(channel, limits, isolated=False)
    channel.send(ready=True)
    interpreter.serve()


def reap() -> NoReturn:
    """The first process of a container: buries the dead, and kills all others when the host says so by a signal."""
    checked(libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0))  # its memory is nobody's business
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


if __name__ == "__main__":
    main()
