"""Calls of the kernel that Python has no functions for: their numbers, their flags, and an error where one fails."""

from __future__ import annotations

import ctypes
import os

CLONE = {"x86_64": 56, "aarch64": 220}  # the system call's number
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
CLONE_PARENT, CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWPID = 0x00008000, 0x00020000, 0x08000000, 0x20000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_BIND, MS_MOVE, MS_REC, MS_PRIVATE = 1 << 12, 1 << 13, 1 << 14, 1 << 18
MNT_DETACH = 2
MOVE_MOUNT, FSOPEN, FSCONFIG, FSMOUNT = 429, 430, 431, 432  # system calls, on every architecture
FSCONFIG_SET_STRING, FSCONFIG_CMD_CREATE = 1, 6
MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV, MOVE_MOUNT_F_EMPTY_PATH = 2, 4, 4
PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 4, 22, 24, 36, 38
CAP_SYS_ADMIN, LAST_CAP = 21, 40
AT_FDCWD = -100
FALLOC_FL_KEEP_SIZE = 1
libc = ctypes.CDLL(None, use_errno=True)
python = ctypes.PyDLL(None, use_errno=True)  # the same functions, and Python's own, without another thread meanwhile


def checked(result: int, *about: object) -> int:
    """A libc call's result. OSError where it failed."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), *map(str, about))
    return result
