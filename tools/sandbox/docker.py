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
IMAGE = "treegym-python"  # its tag is a digest of what is in it
PYTHON, PROGRAM = "/treegym/python", "/treegym/inside"  # in the image; see Dockerfile
FRAME = struct.Struct("!4xI")
START = 60.0  # seconds that an interpreter has to start
USER = "65534:65534"
PROGRAMS = "sh env ls cat cp mv rm mkdir rmdir head tail sleep kill grep sed sort uniq wc find tee touch".split()
UNWANTED = {"test", "tests", "idlelib", "turtledemo", "ensurepip", "site-packages", "__pycache__"}


class Docker:
    """Containers without a network, capabilities or a writable file system, with Docker's bounds on what they use.

    The environment variable TREEGYM_DOCKER_IMAGE names their image. Without it an image is made of this Python, and
    made again when its contents would have changed. Interpreters do not fork.
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
    """SandboxUnavailable where no engine listens. The SDK is not asked first, because it would leave a socket open."""
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
        self._pid = 0  # the interpreter's process; 0 where the engine is on another machine

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
            link.receive(START)  # on a busy machine imports take seconds, which the first call should not pay
        except (OSError, EOFError) as error:
            link.close()
            raise SandboxError(f"the interpreter in a container does not start: {error!r}") from None
        self._pid = _seen(self._api.exec_inspect(made["Id"])["Pid"], command[-1])
        return link

    def _kill(self) -> None:
        """Has the container's process 1 kill all others. Running a program might exceed the limit of processes."""
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
        self._container.remove(force=True)  # hangs while an attached stream is not read: it is closed by now


def _seen(pid: int, argument: str) -> int:
    """The process id, if a process of that number on this machine was started with the argument; otherwise 0."""
    try:
        return pid if argument.encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0") else 0
    except OSError:
        return 0


class _Stream(Link):
    """Unpacks Docker's frames. A frame begins with one byte for the stream, three unused and four for the length."""

    def __init__(self, limit: int, stream: Any) -> None:
        super().__init__(limit, getattr(stream, "_sock", stream))
        self._stream = stream
        self.socket.settimeout(GRACE)  # TLS, to an engine on another machine, does not work without one
        self._frames = bytearray()  # received, not unpacked yet

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
    """Paths of the image's files on this machine, with the links that lead to them and the libraries that they load."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    paths = {str(path) for path in stdlib.rglob("*") if _wanted(path, stdlib)}
    paths |= {sys.executable, f"{sys.prefix}/pyvenv.cfg"} if sys.prefix != sys.base_prefix else {sys.executable}
    paths |= {path for name in PROGRAMS if (path := shutil.which(name))}
    paths |= _libraries(path for path in (*paths, *installed) if ".so" in path or "/bin/" in path)
    for path in list(paths):
        while Path(path).is_symlink():
            paths.add(path)
            path = os.path.normpath(os.path.join(os.path.dirname(path), os.readlink(path)))
        paths.add(os.path.realpath(path))
    # /lib and /bin are links into /usr
    paths = {os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path)) for path in paths}
    return paths - set(map(os.path.realpath, installed)) | set(installed)


def _installed() -> dict[str, str]:
    """Files of the packages that agents may import: path on this machine -> path in the image."""
    places = {}
    for name, top in packages().items():
        for path in [top] if top.is_file() else filter(lambda path: _wanted(path, top), top.rglob("*")):
            places[str(path)] = os.path.normpath(os.path.join(site_packages(), name, path.relative_to(top)))
    return places


def _wanted(path: Path, root: Path) -> bool:
    return path.is_file() and not UNWANTED & set(path.relative_to(root).parts)


def _libraries(programs: Iterable[str]) -> set[str]:
    """Shared libraries that the programs load, by the system's loader."""
    done = subprocess.run(["ldd", *programs], capture_output=True, text=True, check=False)
    return set(re.findall(r"^\s+(?:\S+ => )?(/.+) \(0x", done.stdout, re.MULTILINE))
