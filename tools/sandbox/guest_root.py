"""The root of an episode: the host's files as overlays, read only, and a file system of its own for what it writes."""

from __future__ import annotations

import os
import re
import shutil
from stat import S_IMODE, S_ISDIR, S_ISLNK, S_ISREG

from .guest_kernel import (
    AT_FDCWD,
    FSCONFIG,
    FSCONFIG_CMD_CREATE,
    FSCONFIG_SET_STRING,
    FSMOUNT,
    FSOPEN,
    MNT_DETACH,
    MOUNT_ATTR_NODEV,
    MOUNT_ATTR_NOSUID,
    MOVE_MOUNT,
    MOVE_MOUNT_F_EMPTY_PATH,
    MS_BIND,
    MS_NODEV,
    MS_NOSUID,
    MS_RDONLY,
    PIVOT_ROOT,
    checked,
    libc,
)

WORK = "/episode"
KERNEL = ("proc", "devpts", "mqueue")  # file systems that hold no files of the host
BASE = "/run/base"  # what all episodes' roots have in common, laid out by the zygote
ASIDE = "/mnt/aside"  # where a keeper gets and no agent's code: the folder above is closed to all without capabilities


def lay() -> None:
    """Copies into BASE, once for all episodes, what no overlay can show: folders in which something is mounted.

    Their files are copied. Where an episode mounts other folders an empty one stands, and an empty file for a device.
    """
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
    """Makes this episode's root at ASIDE, with the content of the present one: BASE and host folders as overlays.

    So a lock on a file is held in this episode alone. Devices stay those of the host.
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
    layers = ":".join(
        re.sub(r"([\\:,])", r"\\\1", layer) for layer in (WORK, path)
    )  # the kernel refuses a single layer
    mount(b"overlay", target, b"overlay", MS_RDONLY | MS_NOSUID | MS_NODEV, f"lowerdir={layers}".encode())


def _mounts() -> dict[str, str]:
    """Where something is mounted, and the kind of its file system."""
    with open("/proc/self/mountinfo") as file:
        lines = [line.split() for line in file]
    return {_unescaped(line[4]): line[line.index("-") + 1] for line in lines}


def enter(root: str) -> None:
    """Makes a folder this process's root, and unmounts the old root."""
    os.chdir(root)
    checked(libc.syscall(PIVOT_ROOT[os.uname().machine], b".", b"."), "pivot_root")
    checked(libc.umount2(b".", MNT_DETACH), "umount")
    os.chdir("/")


def mount(source: bytes, target: str, kind: bytes | None, flags: int, options: bytes | None = None) -> None:
    checked(libc.mount(source, os.fsencode(target), kind, flags, options), f"mount at {target}")


def _unescaped(path: str) -> str:
    """A path of mountinfo, where blanks and the like are octal numbers."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), path)


def bound_namespaces(mounts: int) -> None:
    """Allows this user namespace so many mount namespaces, and none of the other kinds that are counted there."""
    for entry in os.scandir("/proc/sys/user"):
        with open(entry, "w") as file:
            file.write(str(mounts if entry.name == "max_mnt_namespaces" else 0))


def make_files(disk: int) -> int:
    """The descriptor of an empty file system of `disk` bytes, which is mounted nowhere yet."""
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
