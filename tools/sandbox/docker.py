"""Docker: a container for each episode, its interpreter at the end of an exec stream."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shlex
import shutil
import socket
import struct
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .guest_channel import GRACE
from .guest_root import WORK
from .interface import ForkRefused, Limits, SandboxError, SandboxUnavailable
from .link import INSIDE, LIBRARIES, MAIN, PARTS, Link, Remote, cpu_seconds
from .packages import packages, site_packages
from .seccomp import filter_rules

OWN_IMAGE = "TREEGYM_DOCKER_IMAGE"
IMAGE = "treegym-python"  # and, behind a colon, what is in it
PYTHON, PROGRAM = "/treegym/python", "/treegym/inside"  # in the image; see Dockerfile
FRAME = struct.Struct("!4xI")
START = 60.0  # seconds that an interpreter has to start
USER = "65534:65534"
PROGRAMS = "sh env ls cat cp mv rm mkdir rmdir head tail sleep kill grep sed sort uniq wc find tee touch".split()
UNWANTED = {"test", "tests", "idlelib", "turtledemo", "ensurepip", "site-packages", "__pycache__"}


class Docker:
    """Containers without a network, capabilities or a writable file system, with Docker's bounds on what they use.

    Their image is the one that the environment variable TREEGYM_DOCKER_IMAGE names; without it, one is made of this
    Python, again whenever what it would hold has changed. Interpreters do not fork.
    """

    name = "docker"
    isolates = True
    bounds_total_memory = True

    def __init__(self) -> None:
        try:
            import docker
            from docker.errors import DockerException, ImageNotFound
        except ImportError:
            raise SandboxUnavailable("no Docker SDK here: pip install 'treegym[docker]'") from None
        _find_engine()
        try:
            self._client: Any = docker.from_env(timeout=60)
            self._client.ping()
        except DockerException as error:
            raise SandboxUnavailable(f"no Docker engine answers: {error}") from None
        image = os.environ.get(OWN_IMAGE)
        self._image = image or f"{IMAGE}:{_contents()}"
        try:
            self._client.images.get(self._image)
        except ImageNotFound:
            if image:
                raise SandboxUnavailable(f"the Docker engine has no image {image!r}, which {OWN_IMAGE} names") from None
            make_image(self._client, self._image)

    def start(self, limits: Limits, seed: int) -> Contained:
        container = self._client.containers.create(
            self._image,
            [PYTHON, "-I", f"{PROGRAM}/{MAIN}", json.dumps({"role": "reap"})],
            network_mode="none",
            mem_limit=limits.total_memory,
            memswap_limit=limits.total_memory,
            pids_limit=limits.processes,
            read_only=True,
            user=USER,
            cap_drop=["ALL"],
            security_opt=["no-new-privileges", f"seccomp={json.dumps(profile())}"],
            tmpfs={WORK: f"size={limits.disk},nr_inodes=16384,mode=0700,uid=65534,gid=65534"},
            ipc_mode="none",  # and so no /dev/shm
            working_dir="/",
            log_config={"Type": "none"},
            environment={"PYTHONHASHSEED": "0", "LANG": "C.UTF-8", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        )
        container.start()
        return Contained(self._client.api, container, limits, seed)

    def close(self) -> None:
        self._client.close()


def _find_engine() -> None:
    """SandboxUnavailable where no engine listens; asked here, for the SDK leaves its socket open when none does."""
    host = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock")
    if host.startswith("unix://"):
        with socket.socket(socket.AF_UNIX) as knock:
            try:
                knock.connect(host.removeprefix("unix://"))
            except OSError as error:
                raise SandboxUnavailable(f"no Docker engine at {host}: {error}") from None


class Contained(Remote):
    """An interpreter in a container of its own."""

    def __init__(self, api: Any, container: Any, limits: Limits, seed: int) -> None:
        super().__init__(limits)
        self._api, self._container, self._seed = api, container, seed
        self._pid = 0  # of the interpreter, where its engine is on this machine

    @property
    def container_id(self) -> str:
        return str(self._container.id)

    def _start(self) -> Link:
        settings = {
            "role": "pipes",
            "libraries": LIBRARIES,
            "limits": self.limits.inside() | {"work": WORK, "seed": self._seed},
        }
        command = [PYTHON, "-I", f"{PROGRAM}/{MAIN}", json.dumps(settings)]
        made = self._api.exec_create(self.container_id, command, stdin=True, user=USER)
        stream = self._api.exec_start(made["Id"], socket=True)
        link = _Stream(self.limits.message, stream)
        try:
            link.receive(START)  # imports take seconds where the machine is busy: not the first call's
        except (OSError, EOFError) as error:
            link.close()
            raise SandboxError(f"the interpreter in a container does not start: {error!r}") from None
        self._pid = _seen(self._api.exec_inspect(made["Id"])["Pid"], command[-1])
        return link

    def _kill(self) -> None:
        """Has the first process kill all others. To run a program for it, there may be no process left."""
        self._api.kill(self.container_id, signal="SIGUSR1")
        end = time.monotonic() + GRACE
        while self._api.stats(self.container_id, stream=False, one_shot=True)["pids_stats"].get("current") != 1:
            if time.monotonic() > end:
                self._container.kill()
                raise SandboxError("the processes of a container do not end")

    def _cpu_seconds(self) -> float:
        return cpu_seconds(self._pid)

    def fork(self) -> Contained:
        raise ForkRefused("a container cannot fork")

    def _leave(self) -> None:
        self._container.remove(force=True)  # which would hang while an attached stream is not read


def _seen(pid: int, argument: str) -> int:
    """The process, if it is seen from here by that number and was started with that argument; else 0."""
    try:
        return pid if argument.encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0") else 0
    except OSError:
        return 0


class _Stream(Link):
    """Docker's frames on the way back: a byte for the stream, three of nothing, four of length."""

    def __init__(self, limit: int, stream: Any) -> None:
        super().__init__(limit, getattr(stream, "_sock", stream))
        self._stream = stream
        self.socket.settimeout(GRACE)  # TLS, where the engine is elsewhere, does not work without
        self._frames = bytearray()  # of which nothing was taken out yet

    def close(self) -> None:
        self._stream.close()
        super().close()

    def _some(self) -> bytes:
        self._frames += super()._some()
        parts = bytearray()
        while len(self._frames) >= FRAME.size:
            end = FRAME.size + FRAME.unpack_from(self._frames)[0]
            if len(self._frames) < end:
                break
            parts += self._frames[FRAME.size : end]
            del self._frames[:end]
        return bytes(parts)


def profile() -> dict[str, Any]:
    """The system call filter as Docker takes it."""
    rules: list[dict[str, Any]] = []
    for call, error, comparison in filter_rules(fork=False):
        rule: dict[str, Any] = {"names": [call], "action": "SCMP_ACT_ERRNO", "errnoRet": error}
        if comparison:
            index, operator, first, second = comparison
            rule["args"] = [{"index": index, "op": operator, "value": first, "valueTwo": second}]
        rules.append(rule)
    return {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": rules}


def _contents() -> str:
    """A digest of what tells one image from another: this Python, the packages, and the program."""
    about = [sys.version, sys.executable, *(f"{name} {path.stat().st_mtime_ns}" for name, path in packages().items())]
    program = b"".join((INSIDE / part).read_bytes() for part in PARTS)
    return hashlib.sha256("\n".join(about).encode() + program).hexdigest()[:12]


def make_image(client: Any, name: str) -> None:
    """An image of this Python, the usual libraries and a few programs, made without a registry."""
    with tempfile.TemporaryFile() as file:
        with tarfile.open(fileobj=file, mode="w") as archive:
            inside = _installed()
            for path in sorted(_files(inside)):
                archive.add(path, inside.get(path), recursive=False)
            for part in PARTS:
                archive.add(INSIDE / part, f"{PROGRAM}/{part}")
            script = f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n'.encode()
            entry = tarfile.TarInfo(PYTHON)
            entry.mode, entry.size = 0o755, len(script)
            archive.addfile(entry, io.BytesIO(script))
            for name_, target in (("bin", "usr/bin"), ("lib", "usr/lib"), ("lib64", "usr/lib64")):
                link = tarfile.TarInfo(name_)
                link.type, link.linkname = tarfile.SYMTYPE, target
                archive.addfile(link)
            for folder in (WORK, "/tmp", "/dev", "/proc", "/sys"):
                entry = tarfile.TarInfo(folder)
                entry.type, entry.mode = tarfile.DIRTYPE, 0o755
                archive.addfile(entry)
        file.seek(0)
        repository, _, tag = name.partition(":")
        client.api.import_image_from_data(file.read(), repository=repository, tag=tag)


def _files(installed: Iterable[str]) -> set[str]:
    """Files of the image, each where it is here, with the links on their way and the libraries they load."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    found = {str(path) for path in stdlib.rglob("*") if _wanted(path, stdlib)}
    found |= {sys.executable, f"{sys.prefix}/pyvenv.cfg"} if sys.prefix != sys.base_prefix else {sys.executable}
    found |= {path for name in PROGRAMS if (path := shutil.which(name))}
    found |= _libraries(path for path in (*found, *installed) if ".so" in path or "/bin/" in path)
    for path in list(found):
        while Path(path).is_symlink():
            found.add(path)
            path = os.path.normpath(os.path.join(os.path.dirname(path), os.readlink(path)))
        found.add(os.path.realpath(path))
    # /lib and /bin are links, so that what is found there lies under /usr
    found = {os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path)) for path in found}
    return found - set(map(os.path.realpath, installed)) | set(installed)


def _installed() -> dict[str, str]:
    """Files of the packages that agents may import: their places in the image, by those here."""
    found = {}
    for name, top in packages().items():
        for path in [top] if top.is_file() else filter(lambda path: _wanted(path, top), top.rglob("*")):
            found[str(path)] = os.path.normpath(os.path.join(site_packages(), name, path.relative_to(top)))
    return found


def _wanted(path: Path, root: Path) -> bool:
    return path.is_file() and not UNWANTED & set(path.relative_to(root).parts)


def _libraries(programs: Iterable[str]) -> set[str]:
    """Shared libraries that these load, by the system's loader."""
    done = subprocess.run(["ldd", *programs], capture_output=True, text=True, check=False)
    return set(re.findall(r"^\s+(?:\S+ => )?(/.+) \(0x", done.stdout, re.MULTILINE))
