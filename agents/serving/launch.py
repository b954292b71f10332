"""Starts vLLM servers: the command line, the environment, the wait until one is healthy, and the end of all of it."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from ..rollouts.failure import FailureCause
from . import guard
from .client import ServerError

EXECUTABLE = "TREEGYM_VLLM"  # the environment variable that names the vllm to start
EXTENSION = Path(__file__).parent / "extension"
PATIENCE = 600.0  # seconds in which a server must be healthy; on two busy cores a small model takes three minutes
BLOCK = 32  # tokens of a block of the cache on a CPU, the fewest that its attention takes
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # of --max-lora-rank
LINES = 30  # of the log, in the error of a server that died
_QUIET = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """What a vLLM server serves, and how it is started.

    Whoever reaches its port can give it other weights and stop it: the development endpoints that pushes need ask for
    no key. Leave `host` at the loopback unless everybody who reaches the address may do so.
    """

    model: str  # a transformers directory, or owner/name on the hub
    name: str = ""  # what requests call the model; default: `model`
    executable: str = ""  # default: TREEGYM_VLLM, else vllm on PATH
    host: str = "127.0.0.1"
    port: int = 0  # 0: any free one
    dtype: str = "auto"
    max_model_len: int = 2048  # tokens of a prompt and its reply
    transfer: Literal["files", "nccl"] = "files"  # how pushes of full weights reach it
    lora_rank: int = 0  # the highest rank of adapters; 0: it takes none
    max_loras: int = 2  # adapters in use at a time, at least `max_lag` + 2
    max_logprobs: int = 65  # of a token: one more than entropies may sum over
    processed_logprobs: bool = False  # log-probabilities after temperature, which temperatures other than 1 need
    device: Literal["auto", "cpu", "gpu"] = "auto"
    cache: int = 2  # GiB of keys and values, on a CPU
    key: str = ""  # asked of requests to /v1 and /inference, and of no others
    more: tuple[str, ...] = ()  # further arguments of `vllm serve`

    @property
    def on_cpu(self) -> bool:
        if self.device == "auto":
            return not any(Path(node).exists() for node in ("/dev/nvidiactl", "/dev/kfd"))
        return self.device == "cpu"

    def command(self, port: int) -> list[str]:
        """The command line that serves at this port."""
        words = [self._executable(), "serve", self.model, "--host", self.host, "--port", str(port)]
        words += ["--dtype", self.dtype, "--max-model-len", str(self.max_model_len), "--enable-scale-out"]
        words += ["--max-logprobs", str(self.max_logprobs)]
        words += ["--disable-uvicorn-access-log"]  # a line for each request: gigabytes in a long run
        words += ["--worker-extension-cls", "treegym_vllm.Reports", "--scheduler-cls", "treegym_vllm.CheckingScheduler"]
        words += ["--weight-transfer-config", json.dumps({"backend": self.transfer})]
        if self.name:
            words += ["--served-model-name", self.name]
        if self.on_cpu:  # a prompt with a seed that two passes share ends vLLM 0.32: CPU Generator does not use offset
            words += ["--enforce-eager", "--block-size", str(BLOCK), "--no-enable-chunked-prefill"]
            words += ["--max-num-batched-tokens", str(max(self.max_model_len, 2048))]
        if self.lora_rank:
            rank = min((rank for rank in RANKS if rank >= self.lora_rank), default=self.lora_rank)
            words += ["--enable-lora", "--max-lora-rank", str(rank), "--max-loras", str(self.max_loras)]
        if self.processed_logprobs:
            words += ["--logprobs-mode", "processed_logprobs"]
        return [*words, *self.more]

    def environment(self) -> dict[str, str]:
        """The environment variables that the server gets beside those of this process.

        PYTHONPATH becomes the folder of the worker extension alone: what this process finds on its own path is for
        another environment.
        """
        found = {**_QUIET, "PYTHONPATH": str(EXTENSION), "VLLM_SERVER_DEV_MODE": "1"}
        if self.on_cpu:
            found["VLLM_CPU_KVCACHE_SPACE"] = str(self.cache)
        if self.lora_rank:
            found["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
        if self.key:
            found["VLLM_API_KEY"] = self.key  # not on the command line, which everybody can read
        if Path(self.model).is_dir():
            found["HF_HUB_OFFLINE"] = "1"
        return found

    def _executable(self) -> str:
        wanted = self.executable or os.environ.get(EXECUTABLE) or "vllm"
        if path := shutil.which(wanted):
            return path
        raise FileNotFoundError(
            f"no executable {wanted!r}: install vLLM in an environment of its own, and name its vllm in {EXECUTABLE}"
        )


class VLLMServer:
    """A vLLM server that this process started and owns. All of it ends with `stop`, or with this process.

    It is two processes more than the one that answers: an engine and a worker, which outlive a killed server and keep
    the memory. So the server runs in a session of its own, under a guard (`guard.py`) that ends every process of it.
    """

    def __init__(self, options: ServerOptions) -> None:
        port = _free_port(options.host, options.port)
        self.options, self.command = options, options.command(port)
        self.url = f"http://{f'[{options.host}]' if ':' in options.host else options.host}:{port}"
        self._room = tempfile.TemporaryDirectory(prefix="treegym-vllm-", ignore_cleanup_errors=True)
        self.log = Path(self._room.name) / "log"
        guarded = [sys.executable, "-I", str(guard.__file__), str(os.getpid()), str(self.log), *self.command]
        self._guard = subprocess.Popen(
            guarded,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **options.environment()},
            start_new_session=True,  # Ctrl-C in the terminal is for this process, which then ends the server
        )
        assert self._guard.stdout
        with self._guard.stdout as told:
            self.pid = int(told.readline() or 0)  # of the process that answers, and of the session

    @property
    def alive(self) -> bool:
        """Whether the server has not ended, with all of its processes."""
        return self._guard.poll() is None

    def shown(self) -> str:
        """The command as a shell takes it, with the variables that the server needs."""
        hidden = {"VLLM_API_KEY": "..."} if self.options.key else {}
        variables = {**self.options.environment(), **hidden}
        return shlex.join(["env", *(f"{name}={value}" for name, value in variables.items()), *self.command])

    def wait(self, patience: float = PATIENCE) -> None:
        """Returns when the server is healthy. ServerError where it dies, or `patience` seconds pass before."""
        deadline = time.monotonic() + patience
        while not _healthy(self.url):
            if not self.alive:
                raise self.died("died while it started")
            if time.monotonic() > deadline:
                raise self.died(f"is not healthy after {patience:g} s", FailureCause.TIMEOUT)
            time.sleep(0.5)

    def died(self, how: str, cause: FailureCause = FailureCause.CRASHED) -> ServerError:
        """The error of a server that is no use any more: what is wrong with it, and the last lines of its log."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-LINES:]
        return ServerError("\n".join([f"the vLLM server at {self.url} {how}; the end of its log:", *lines]), cause)

    def stop(self) -> None:
        """Ends every process of the server. Stopping again does nothing."""
        if self._guard.stdin and not self._guard.stdin.closed:
            self._guard.stdin.close()
        try:
            self._guard.wait(3 * guard.PATIENCE)
        except subprocess.TimeoutExpired:
            self._guard.kill()
        if self._guard.wait() < 0 and self.pid:  # the guard was killed
            guard.end(self.pid)
        self._room.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def launch(options: ServerOptions, patience: float = PATIENCE) -> VLLMServer:
    """A healthy server, which takes one to three minutes. The caller stops it. ServerError."""
    server = VLLMServer(options)
    try:
        server.wait(patience)
    except BaseException:
        server.stop()
        raise
    return server


def _healthy(url: str) -> bool:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(f"{url}/health", timeout=5) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


def _free_port(host: str, port: int) -> int:
    """The port, or with 0 any one, if nobody listens there. OSError: another server would be taken for this one."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise OSError(f"cannot listen on {host}, port {port}: {error.strerror}; port 0 takes a free one") from error
        free: int = probe.getsockname()[1]
        return free
