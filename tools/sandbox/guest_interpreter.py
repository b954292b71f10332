"""The interpreter: runs the agent's code, one call after the other, and forks when the episode branches."""

from __future__ import annotations

import ast
import contextlib
import ctypes
import fcntl
import functools
import json
import linecache
import os
import random
import resource
import signal
import socket
import struct
import sys
import threading
import traceback
from io import TextIOWrapper
from stat import S_ISREG
from types import CodeType
from typing import Any, NoReturn

from .guest_channel import Channel, Pipes
from .guest_kernel import (
    CAP_SYS_ADMIN,
    CLONE,
    CLONE_NEWNS,
    CLONE_PARENT,
    FALLOC_FL_KEEP_SIZE,
    LAST_CAP,
    PR_CAPBSET_DROP,
    PR_SET_CHILD_SUBREAPER,
    PR_SET_DUMPABLE,
    PR_SET_NO_NEW_PRIVS,
    PR_SET_SECCOMP,
    checked,
    libc,
    python,
)
from .guest_root import WORK

DEVICES = {os.makedev(1, minor) for minor in (3, 5, 7, 8, 9)}  # null, zero, full, random, urandom
PROCMAP, PROCMAP_QUERY = struct.Struct("=9Q4I2Q"), 0xC0686611
VMA_WRITABLE, VMA_SHARED, COVERING_OR_NEXT_VMA = 2, 8, 16
COUNTED = {"CORE": 0, "MEMLOCK": 0, "MSGQUEUE": 0, "SIGPENDING": 256}  # limits of any process
REASON = 500  # bytes of why there was no fork
GAP = "\n[...]\n"  # stands for the middle of a text that is too long
FIRST = "x = 6\nprint(x)\nx * 7"  # run before all calls: the first to run waits until memory of the zygote is copied


class Uncopyable(Exception):
    """Why a copy of an interpreter would not be whole."""


class Interpreter:
    """Runs calls in one namespace. What they print goes to a file, of which the host is sent the beginning."""

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

        Code that runs `apart` is not the agent's. It has a namespace of its own, in which `agent` is that of the agent,
        and its errors come without a traceback.
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
        """Reserves room for what is shown of it, so that a call can print although the disk is full."""
        os.ftruncate(self.output, 0)
        libc.fallocate(self.output, FALLOC_FL_KEEP_SIZE, ctypes.c_long(0), ctypes.c_long(4 * self.limits["output"]))

    def _flush(self, writer: Any) -> str:
        """Writes out what was printed. Returns why a part is lost, if so: then the next call gets another writer."""
        lost = ""
        try:
            writer.flush()
            return ""
        except OSError as error:  # the disk is full, or it is more than a file may hold
            lost = f"the end of what was printed is lost: {error.strerror}\n"
        except Exception:  # the agent closed it
            pass
        with contextlib.suppress(Exception):
            writer.buffer.raw.close()  # otherwise what it holds would be written during a later call
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
        """The traceback from the agent's first frame on; of code that ran `apart`, the error alone."""
        if apart:
            return "".join(traceback.format_exception_only(error))
        frames = error.__traceback__
        while frames is not None and frames.tb_frame.f_code.co_filename == __file__:
            frames = frames.tb_next
        limit = None if not isinstance(error, RecursionError) else 5
        return "".join(traceback.format_exception(type(error), error, frames, limit=limit))

    def fork(self, meeting: int, work: str) -> None:
        """Forks this process. The copy gets its files and its channel over `meeting`, a socket to the keeper.

        Where there can be no copy, the reason is sent there. All that can be made before the fork is made before,
        because after it the first write to each page of memory copies the page.
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
        """Moves this process, a copy whose parent works in `folder`, to files and a channel of its own."""
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
        """Uncopyable where memory is shared that can be written, or that holds a file of the episode."""
        work = self.limits["work"]
        device = os.stat(work).st_dev if self.isolated else None  # without walls other files are on it, too
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
        """Number, path, flags and offset of an open file; None for a device without a state."""
        status = os.fstat(number)
        if status.st_rdev in DEVICES:
            return None
        if not S_ISREG(status.st_mode) or not status.st_nlink:
            raise Uncopyable(f"file descriptor {number} is {path}")
        with open(f"/proc/self/fdinfo/{number}") as file:
            info = dict(line.split(":\t") for line in file.read().splitlines()[:2])
        return number, path, int(info["flags"], 8), int(info["pos"])


def shared_memory(pid: int | str, device: int | None, folder: str = WORK) -> str | None:
    """A process's shared memory that can be written, or holds a file on `device` or in `folder`; None without any."""
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
    """The text, without its middle where it is longer than `most` characters."""
    half = (most - len(GAP)) // 2
    return text[:half] + GAP + text[-half:] if text[most:] else text


def _may_share(maps: int, device: int) -> bool:
    """Whether shared memory can be written, or holds a file on `device`. To read all maps takes ten times as long."""
    query, end = bytearray(PROCMAP.size), 0
    try:
        while True:  # the next shared range of memory from `end` on
            PROCMAP.pack_into(query, 0, len(query), VMA_SHARED | COVERING_OR_NEXT_VMA, end, *[0] * 12)
            fcntl.ioctl(maps, PROCMAP_QUERY, query)
            _, _, _, _, end, flags, _, _, _, major, minor, *_ = PROCMAP.unpack(query)
            if flags & VMA_WRITABLE or os.makedev(major, minor) == device:
                return True
    except FileNotFoundError:  # there is no more
        return False
    except OSError:  # before Linux 6.11 there is no such call
        return True


def fork_beside() -> bool:
    """Forks a child of this process's parent, which is the keeper. Whether this process is the copy.

    When the copy ends, its remains, what it started and its own copies come to the keeper, not to this process.

    Python takes the copy, too, for the process that goes on. Without threads it has nothing to set right in a child.
    The rest of what it does there, first of all to seed `random` anew, would make the copy differ from its parent, and
    takes as long as the fork itself.
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


ours = functools.lru_cache(maxsize=1)(body_of)  # for code that runs apart: calls differ in its last line alone


def compiled(code: str, name: str) -> tuple[CodeType, CodeType | None]:
    """The code up to the expression that it ends in, and that expression, if there is one."""
    text = code.rstrip("\n")
    start = text.rfind("\n") + 1
    above, line = text[:start], text[start:]
    if "\r" not in text and not line[:1].isspace():
        with contextlib.suppress(SyntaxError):  # the last line is no expression, or begins in a line above it
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
    """Sets the limits, the folder and the seeds of an interpreter."""
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
    """Seeds the global generators of Python and NumPy."""
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
    """Keeps CAP_SYS_ADMIN alone, for unshare(CLONE_NEWNS): the filter allows no other use. Programs get none."""
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


def serve_pipes(limits: dict[str, Any]) -> NoReturn:
    """Turns this process, in a container, into an interpreter over standard input and output, without a keeper."""
    channel = Pipes()
    null = os.open("/dev/null", os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    _bind(limits)
    interpreter = Interpreter(channel, limits, isolated=False)
    channel.send(ready=True)
    interpreter.serve()
