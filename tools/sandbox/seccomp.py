"""The filter of system calls for sandboxes, as rules and as the BPF program that libseccomp makes of them."""

from __future__ import annotations

import ctypes
import ctypes.util
import errno
import functools
import struct
import tempfile
from collections.abc import Iterator
from typing import NamedTuple

from .guest_kernel import CLONE_NEWNS, PR_SET_DUMPABLE
from .interface import SandboxError, SandboxUnavailable

DENIED = """
    socket bind connect listen ptrace process_vm_readv process_vm_writev kcmp pidfd_getfd mount umount umount2
    pivot_root chroot setns mount_setattr move_mount open_tree open_tree_attr fsopen fsmount fsconfig fspick
    memfd_create memfd_secret bpf perf_event_open userfaultfd add_key request_key keyctl init_module finit_module
    delete_module kexec_load kexec_file_load reboot swapon swapoff acct quotactl quotactl_fd syslog open_by_handle_at
    name_to_handle_at fanotify_init fanotify_mark inotify_init inotify_init1 inotify_add_watch cachestat personality
    sendmsg sendmmsg io_setup io_uring_setup io_uring_enter io_uring_register sethostname setdomainname settimeofday
    clock_settime clock_adjtime adjtimex lookup_dcookie vhangup iopl ioperm modify_ldt nfsservctl shmget msgget semget
    mq_open landlock_create_ruleset
""".split()
# sendmsg is there because it alone sends descriptors, of which a user may have only so many under way.
NO_STREAM = (2, 4, 8)  # bits of a socket's type: SOCK_STREAM has none of them, every other type has one
NEWEST = 450  # set_mempolicy_home_node, of Linux 5.17, on every architecture; later calls were not reviewed
NAMESPACES = (0x00020000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000)
TERMINALS = (0x5412, 0x541C)  # TIOCSTI and TIOCLINUX: input forged for a terminal
# F_SETLEASE and F_SETDELEG make others wait for a file, F_NOTIFY tells what others do in a folder, F_SETPIPE_SZ takes
# pages for pipes, of which a user may have only so many.
FILES = (1024, 1040, 1026, 1031)
AF_UNIX = 1
OTHERS = (  # calls that change limits and shares of processes: argument, its only allowed value; 0 is the caller itself
    ("prlimit64", 0, 0),
    ("setpriority", 0, 0),  # of a process, not of a group or a user
    ("setpriority", 1, 0),
    ("ioprio_set", 0, 1),
    ("ioprio_set", 1, 0),
    ("sched_setaffinity", 0, 0),
    ("sched_setscheduler", 0, 0),
    ("sched_setparam", 0, 0),
    ("sched_setattr", 0, 0),
)


class Compare(NamedTuple):
    """When a rule holds, in libseccomp's terms."""

    argument: int
    operator: str
    first: int
    second: int = 0


Rule = tuple[str, int, Compare | None]  # a call, the error it gives, and when; None: always


def equals(argument: int, value: int) -> Compare:
    """Compares the lower 32 bits of an argument: the kernel does not read the others."""
    return Compare(argument, "SCMP_CMP_MASKED_EQ", 0xFFFFFFFF, value)


def has(argument: int, bit: int) -> Compare:
    return Compare(argument, "SCMP_CMP_MASKED_EQ", bit, bit)


def differs(argument: int, value: int) -> Compare:
    """Compares all 64 bits, so that the one allowed value can be written in one way only."""
    return Compare(argument, "SCMP_CMP_NE", value)


def filter_rules(*, fork: bool) -> Iterator[Rule]:
    """Rules that deny calls. They deny all namespaces except, with `fork`, the one in which a fork mounts its files."""
    for call in DENIED:
        yield call, errno.EPERM, None
    for flag in NAMESPACES:
        yield "clone", errno.EPERM, has(0, flag)
    yield "clone3", errno.ENOSYS, None  # its flags are in memory, where a filter cannot look
    yield "unshare", errno.EPERM, differs(0, CLONE_NEWNS) if fork else None
    yield "socketpair", errno.EPERM, differs(0, AF_UNIX)
    for bit in NO_STREAM:  # a datagram reaches every socket with a name, those of other episodes too
        yield "socketpair", errno.EPERM, has(1, bit)
    for call, argument, value in OTHERS:
        yield call, errno.EPERM, differs(argument, value)
    if fork:  # an interpreter's memory stays closed to other branches
        yield "prctl", errno.EPERM, equals(0, PR_SET_DUMPABLE)
    for request in TERMINALS:
        yield "ioctl", errno.EPERM, equals(1, request)
    for command in FILES:
        yield "fcntl", errno.EPERM, equals(1, command)


class _Compare(ctypes.Structure):
    _fields_ = [
        ("argument", ctypes.c_uint),
        ("operator", ctypes.c_int),
        ("first", ctypes.c_uint64),
        ("second", ctypes.c_uint64),
    ]


def _known() -> bytes:
    """The program's beginning: a call newer than NEWEST fails as if the kernel did not have it."""
    load, jump_if_greater, give = 0x20, 0x25, 0x06
    steps = (load, 0, 0, 0), (jump_if_greater, 0, 1, NEWEST), (give, 0, 0, 0x00050000 | errno.ENOSYS)
    return b"".join(struct.pack("=HBBI", *step) for step in steps)


@functools.cache
def bpf() -> bytes:
    """The program for interpreters that fork. SandboxError where there is no libseccomp."""
    try:
        library = ctypes.CDLL(ctypes.util.find_library("seccomp") or "libseccomp.so.2")
    except OSError:
        raise SandboxUnavailable("no libseccomp here: install the package libseccomp2") from None
    library.seccomp_init.restype = ctypes.c_void_p
    operators = {"SCMP_CMP_NE": 1, "SCMP_CMP_MASKED_EQ": 7}
    context = ctypes.c_void_p(library.seccomp_init(ctypes.c_uint32(0x7FFF0000)))  # a call without a rule is allowed
    for call, error, comparison in filter_rules(fork=True):
        number = library.seccomp_syscall_resolve_name(call.encode())
        if number == -1:  # a call newer than the library
            continue
        index, operator, first, second = comparison or equals(0, 0)
        array = (_Compare * 1)(_Compare(index, operators[operator], first, second))
        count, action = 1 if comparison else 0, ctypes.c_uint32(0x00050000 | error)
        if library.seccomp_rule_add_array(context, action, number, count, array) != 0:
            raise SandboxError(f"libseccomp takes no rule for {call}")
    with tempfile.TemporaryFile() as file:
        if library.seccomp_export_bpf(context, file.fileno()) != 0:
            raise SandboxError("libseccomp cannot make the filter")
        library.seccomp_release(context)
        file.seek(0)
        return _known() + file.read()
