"""Bubblewrap: the walls around a zygote, and the filter of system calls for what it serves."""

from __future__ import annotations

import ctypes
import ctypes.util
import errno
import functools
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .inside import CLONE_NEWNS, WORK
from .sandbox import INSIDE, Branch, Cgroup, Limits, SandboxError, Zygote

PROGRAM = "/run/inside.py"  # where inside.py is, inside
UID = 64321  # that a sandbox has when root starts it: root's own processes cannot be counted and limited
DENIED = """
    socket ptrace process_vm_readv process_vm_writev kcmp pidfd_getfd mount umount umount2 pivot_root chroot setns
    mount_setattr move_mount open_tree fsopen fsmount fsconfig fspick memfd_create memfd_secret bpf perf_event_open
    userfaultfd add_key request_key keyctl init_module finit_module delete_module kexec_load kexec_file_load reboot
    swapon swapoff acct quotactl quotactl_fd syslog open_by_handle_at name_to_handle_at fanotify_init personality
    io_uring_setup io_uring_enter io_uring_register sethostname setdomainname settimeofday clock_settime clock_adjtime
    adjtimex lookup_dcookie vhangup iopl ioperm modify_ldt nfsservctl shmget msgget semget mq_open
    landlock_create_ruleset
""".split()
NAMESPACES = (0x00020000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000)
TERMINALS = (0x5412, 0x541C)  # TIOCSTI and TIOCLINUX: input forged for a terminal


class Bubblewrap:
    """Namespaces, a filter of system calls, limits on resources and, for root, a cgroup for each episode."""

    name = "bubblewrap"
    isolates = True

    def __init__(self) -> None:
        if not shutil.which("bwrap"):
            raise SandboxError("no bwrap here: install the package bubblewrap")
        self._cgroups = Cgroup.works()
        self._zygote = Zygote(command, system_call_filter, isolated=True, work=WORK)

    @property
    def bounds_total_memory(self) -> bool:
        """Whether an episode's memory is bounded in total, not only that of each process."""
        return self._cgroups

    def start(self, limits: Limits, seed: int) -> Branch:
        return self._zygote.start(limits, seed, Cgroup(limits) if self._cgroups else None)

    def close(self) -> None:
        self._zygote.close()


def command() -> list[str]:
    """The way to a Python that sees nothing but itself."""
    rooted = not os.geteuid()
    inner = [
        "bwrap",
        *("--unshare-user", "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"),
        *("--uid", "65534", "--gid", "65534", "--die-with-parent", "--new-session"),
        *_view(PROGRAM if rooted else str(INSIDE)),
        *("--proc", "/proc", "--dir", WORK, "--dir", "/mnt", "--symlink", f"{WORK[1:]}/.tmp", "/tmp"),
        *("--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/"),
        *("--", sys.executable, "-I", PROGRAM),
    ]
    if not rooted:
        return inner
    # First a view in which another user can read this Python, wherever it is; then that user's sandbox.
    outer = ["bwrap", *_view(str(INSIDE)), "--dir", "/tmp", "--bind", "/proc", "/proc", "--ro-bind", "/sys", "/sys"]
    return [*outer, "--", "setpriv", "--reuid", str(UID), "--regid", str(UID), "--clear-groups", *inner]


def _view(program: str) -> Iterator[str]:
    """Mounts of devices, the system's programs and libraries, this Python and inside.py, all to be read only."""
    yield from ("--dev", "/dev")
    for name in ("bin", "sbin", "lib", "lib64", "lib32"):
        folder = f"/{name}"
        if os.path.islink(folder):
            yield from ("--symlink", os.readlink(folder), folder)
        elif os.path.isdir(folder):
            yield from ("--ro-bind", folder, folder)
    yield from ("--ro-bind", "/usr", "/usr")
    prefixes = [path for path in dict.fromkeys((sys.base_prefix, sys.prefix)) if not path.startswith("/usr/")]
    for path in (*prefixes, "/etc/ld.so.cache", "/etc/alternatives"):
        for parent in [*Path(path).parents][-2::-1]:  # made by bwrap itself, some would be closed to other users
            yield from ("--perms", "0755", "--dir", str(parent))
        yield from ("--ro-bind-try", path, path)
    yield from ("--perms", "0755", "--dir", "/run", "--ro-bind", program, PROGRAM)


class _Compare(ctypes.Structure):
    _fields_ = [
        ("argument", ctypes.c_uint),
        ("operator", ctypes.c_int),
        ("first", ctypes.c_uint64),
        ("second", ctypes.c_uint64),
    ]


@functools.cache
def system_call_filter() -> bytes:
    """A BPF program made by libseccomp: the denied calls fail with EPERM, and so does every new namespace but one.

    SandboxError where there is no libseccomp.
    """
    try:
        library = ctypes.CDLL(ctypes.util.find_library("seccomp") or "libseccomp.so.2")
    except OSError:
        raise SandboxError("no libseccomp here: install the package libseccomp2") from None
    library.seccomp_init.restype = ctypes.c_void_p
    allow, deny, missing = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS
    equal, other, masked = 4, 1, 7
    context = ctypes.c_void_p(library.seccomp_init(ctypes.c_uint32(allow)))

    def rule(action: int, call: str, *comparisons: _Compare) -> None:
        number = library.seccomp_syscall_resolve_name(call.encode())
        array = (_Compare * len(comparisons))(*comparisons)
        if number != -1:  # the library knows it
            library.seccomp_rule_add_array(context, ctypes.c_uint32(action), number, len(comparisons), array)

    for call in DENIED:
        rule(deny, call)
    for flag in NAMESPACES:
        rule(deny, "clone", _Compare(0, masked, flag, flag))
    rule(missing, "clone3")  # its flags are in memory, where a filter cannot look
    rule(deny, "unshare", _Compare(0, other, CLONE_NEWNS, 0))  # a fork's own files are mounted there
    for request in TERMINALS:
        rule(deny, "ioctl", _Compare(1, equal, request, 0))
    with tempfile.TemporaryFile() as file:
        if library.seccomp_export_bpf(context, file.fileno()) != 0:
            raise SandboxError("libseccomp cannot make the filter")
        library.seccomp_release(context)
        file.seek(0)
        return file.read()
