"""Servers that are started, and pushes to them, without vLLM: a program acts as its server, and a model in here."""

from __future__ import annotations

import asyncio
import copy
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

pytest.importorskip("httpx2", reason="pip install 'treegym[search]'")
from listening import listening
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from treegym.agents.models.lora import add_lora
from treegym.agents.models.nano import build_nano
from treegym.agents.rollouts.failure import FailureCause
from treegym.agents.serving import Server, ServerError, guard
from treegym.agents.serving.launch import EXECUTABLE, EXTENSION, ServerOptions, launch
from treegym.agents.serving.owned import Owned
from treegym.agents.serving.probe import Check, continuation_logprobs
from treegym.agents.serving.sync import PushFailed, push
from treegym.agents.serving.ways import Files, Lora, Nccl
from treegym.envs import lookup

ACTS_AS_VLLM = """
import http.server, os, signal, subprocess, sys
if "--die" in sys.argv:
    print("first line"); print("no such model"); sys.exit(3)
open(os.path.join(os.path.dirname(sys.argv[0]), "vllm.pid"), "w").write(str(os.getpid()))
for _ in range(2):  # an engine and a worker
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
if "--deaf" in sys.argv:
    import time; time.sleep(600)
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def executable(tmp_path: Path) -> str:
    file, program = tmp_path / "vllm", tmp_path / "acts_as_vllm.py"
    program.write_text(ACTS_AS_VLLM)
    file.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{program}" "$@"\n')  # no #! takes a path with a space
    file.chmod(0o755)
    return str(file)


def gone(session: int) -> bool:
    """Whether all processes of the session have ended, or do so within a minute."""
    deadline = time.monotonic() + 60
    while guard.members(session) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not guard.members(session)


def test_a_stopped_server_leaves_no_process(executable: str) -> None:
    with launch(ServerOptions("model", executable=executable)) as server:
        assert server.alive and len(guard.members(server.pid)) == 3
    assert guard.members(server.pid) == [] and not server.alive
    server.stop()


def test_what_outlives_a_killed_server_is_ended(executable: str) -> None:
    with launch(ServerOptions("model", executable=executable)) as server:
        os.kill(server.pid, signal.SIGKILL)
        assert gone(server.pid)


def test_a_server_whose_guard_is_killed_is_stopped_all_the_same(executable: str) -> None:
    with launch(ServerOptions("model", executable=executable)) as server:
        server._guard.kill()
    assert guard.members(server.pid) == []


def test_a_server_ends_with_the_process_that_started_it(executable: str) -> None:
    code = f"""
import sys, time
from treegym.agents.serving.launch import ServerOptions, launch
print(launch(ServerOptions("model", executable={executable!r})).pid, flush=True)
time.sleep(600)
"""
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert owner.stdout
    with owner:
        session = int(owner.stdout.readline())
        assert len(guard.members(session)) == 3
        owner.kill()
    assert gone(session)


def test_treegym_serve_shows_command_and_address_and_ctrl_c_ends_all_of_it(executable: str, tmp_path: Path) -> None:
    arguments = [sys.executable, "-m", "treegym", "serve", str(tmp_path), "--vllm", executable, "--port", "0"]
    with subprocess.Popen([*arguments, "--", "--extra"], stdout=subprocess.PIPE, text=True) as command:
        assert command.stdout
        shown, log, address = (command.stdout.readline() for _ in range(3))
        session = int(Path(f"{executable}.pid").read_text())
        assert f"{executable} serve {tmp_path}" in shown and shown.endswith("--extra\n")
        assert "log is" in log and "at http://127.0.0.1:" in address
        command.send_signal(signal.SIGINT)
        assert command.stdout.read().endswith("stopped\n")  # after an interrupted line, which rich writes again
    assert command.returncode == 0 and guard.members(session) == []


def test_a_start_that_nobody_waits_for_any_more_leaves_no_process(executable: str) -> None:
    async def main() -> int:
        owned = Owned(ServerOptions("model", executable=executable, more=("--deaf",)))
        starting = asyncio.create_task(owned.start())
        while owned.running is None or len(guard.members(owned.running.pid)) < 3:
            await asyncio.sleep(0.01)
        session = owned.running.pid
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        assert starting.cancelled()
        return session

    assert guard.members(asyncio.run(main())) == []


def test_a_request_to_a_closed_server_fails_as_one_that_is_gone() -> None:
    """Another rollout may close it, and start another, while this one waits for its next attempt."""

    async def main() -> None:
        server = Server("http://127.0.0.1:9", patience=60.0)
        asking = asyncio.create_task(server.ask("anything"))
        await asyncio.sleep(0.05)
        await server.close()
        with pytest.raises(ServerError, match="its connections were closed") as closed:
            await asking
        assert closed.value.cause == FailureCause.CONNECTION

    asyncio.run(main())


def test_a_port_that_is_taken_is_refused(executable: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError, match="cannot listen on 127"):
        launch(ServerOptions("model", executable=executable, port=taken.getsockname()[1]))


def test_a_process_that_is_deaf_to_sigterm_is_killed() -> None:
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(600)"
    deaf = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True)
    assert deaf.stdout
    with deaf:
        deaf.stdout.readline()
        guard.end(deaf.pid, patience=0.1)
    assert deaf.returncode == -signal.SIGKILL


def test_a_server_that_dies_says_why(executable: str) -> None:
    with pytest.raises(ServerError, match=r"died while it started; the end of its log:\nfirst line\nno such model$"):
        launch(ServerOptions("model", executable=executable, more=("--die",)))


def test_without_vllm_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(EXECUTABLE, "/nowhere/vllm")
    with pytest.raises(FileNotFoundError, match=r"no executable '/nowhere/vllm': install vLLM .* TREEGYM_VLLM"):
        launch(ServerOptions("model"))


def test_the_command_line_is_what_pushes_and_a_cpu_need(executable: str) -> None:
    command = ServerOptions("model", executable=executable, max_model_len=4096, device="cpu").command(1)
    options = dict(pairwise(command))
    assert options["--host"] == "127.0.0.1" and options["--block-size"] == "32"
    assert {"--enforce-eager", "--no-enable-chunked-prefill", "--enable-scale-out"} <= set(command)
    assert int(options["--max-num-batched-tokens"]) >= 4096
    assert "--enable-lora" not in command and "--logprobs-mode" not in command
    more = ServerOptions(
        "model", executable=executable, device="gpu", lora_rank=9, max_loras=6, processed_logprobs=True
    )
    options = dict(pairwise(more.command(1)))
    assert options["--max-lora-rank"] == "16" and options["--max-loras"] == "6"
    assert options["--logprobs-mode"] == "processed_logprobs" and "--block-size" not in options
    secret = ServerOptions("model", executable=executable, key="secret")
    assert not any("secret" in word for word in secret.command(1))
    assert secret.environment()["VLLM_API_KEY"] == "secret" and secret.environment()["PYTHONPATH"] == str(EXTENSION)
    assert [file.name for file in EXTENSION.glob("*.py")] in (
        ["__init__.py", "treegym_vllm.py"],
        ["treegym_vllm.py", "__init__.py"],
    )


# pushes


@pytest.fixture(scope="module")
def nano() -> PreTrainedModel:
    return build_nano(lookup.vocabulary())[0]


def names_of(model: PreTrainedModel) -> set[str]:
    return {name for name in model.state_dict() if name != "lm_head.weight"}


class ActsAsVLLM(Server):
    """A server whose model is in this process: what it was pushed is what it computes."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.url, self.model, self.version, self.paused = "http://acts", copy.deepcopy(model), "default", False
        self.active, self.sent = False, set[str]()
        self.adapters: list[str] = []
        self.paths: list[str] = []
        self.spoil: Callable[[str], dict[str, Any] | None] = lambda path: (
            None
        )  # stands between a request and its answer

    @asynccontextmanager
    async def aside(self) -> AsyncIterator[ActsAsVLLM]:
        yield self

    async def ask(self, path: str, body: Mapping[str, Any] | None = None, **settings: Any) -> dict[str, Any]:
        self.paths.append(path)
        answer = self.spoil(path)
        return self.answer(path, dict(body or {})) if answer is None else answer

    def answer(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        match path.partition("?")[0]:
            case "pause" | "resume" as state:
                self.paused = state == "pause"
            case "weight_info":
                return {"weight_version": self.version}
            case "is_paused":
                return {"is_paused": self.paused}
            case "v1/models":
                return {"data": [{"id": "nano", "max_model_len": 128}, *({"id": name} for name in self.adapters)]}
            case "collective_rpc":
                report = {"sent": sorted(self.sent), "loaded": [], "unloaded": []}
                return {"results": [{**report, "expected": sorted(names_of(self.model)), "dtype": "float32"}]}
            case "start_weight_update" | "finish_weight_update" as phase if self.active == (phase[0] == "s"):
                raise ServerError(f"http://acts/{phase} answered 500")
            case "start_weight_update":
                self.active = True
            case "update_weights":
                self.read(Path(body["update_info"]["folder"]))
            case "finish_weight_update":
                self.active, self.version = False, body.get("weight_version", self.version)
            case "reset_prefix_cache":
                return {"success": True}
            case "v1/load_lora_adapter":
                self.adapters.append(body["lora_name"])
            case "v1/unload_lora_adapter" if body["lora_name"] not in self.adapters:
                raise ServerError("http://acts answered 404: no such adapter", FailureCause.REFUSED)
            case "v1/unload_lora_adapter":
                self.adapters.remove(body["lora_name"])
            case "inference/v1/generate":
                return self.continuation(body)
        return {}

    def read(self, folder: Path) -> None:
        from safetensors.torch import load_file

        tensors = load_file(folder / "model.safetensors")
        self.sent = set(tensors)
        self.model.load_state_dict(tensors, strict=False)

    def continuation(self, body: dict[str, Any]) -> dict[str, Any]:
        tokens = [1 + i for i in range(body["sampling_params"]["max_tokens"])]
        logprobs = continuation_logprobs(self.model, body["token_ids"], tokens)
        content = [{"logprob": logprob} for logprob in logprobs]
        return {"choices": [{"token_ids": tokens, "finish_reason": "length", "logprobs": {"content": content}}]}


def changed(model: PreTrainedModel) -> PreTrainedModel:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for weight in other.parameters():
            if weight.requires_grad:
                weight += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    return other


@pytest.fixture
def server(nano: PreTrainedModel) -> ActsAsVLLM:
    return ActsAsVLLM(nano)


def test_a_push_is_its_phases_in_order_and_a_version_is_pushed_once(
    server: ActsAsVLLM, nano: PreTrainedModel, tmp_path: Path
) -> None:
    model = changed(nano)
    assert asyncio.run(push(server, Files(tmp_path), model, 3)) == "nano"
    begun = next(i for i, path in enumerate(server.paths) if path.startswith("pause"))
    assert [path.partition("?")[0] for path in server.paths[begun - 1 :]] == [
        "inference/v1/generate",  # so that the prefix is cached under the older weights
        "pause",
        "start_weight_update",
        "update_weights",
        "finish_weight_update",
        "reset_prefix_cache",
        "reset_mm_cache",
        "reset_encoder_cache",
        "collective_rpc",
        "pause",
        "inference/v1/generate",
        "resume",
    ]
    assert "reset_running_requests=true" in server.paths[begun + 4] and server.version == "3"
    assert list(tmp_path.iterdir()) == []
    server.paths.clear()
    asyncio.run(push(server, Files(tmp_path), model, 3))
    assert not [path for path in server.paths if path.startswith(("pause", "update"))]


@pytest.mark.parametrize(
    "path", ["pause", "start_weight_update", "update_weights", "finish", "reset_prefix", "inference"]
)
def test_a_phase_that_fails_is_repeated_with_all_the_others(
    server: ActsAsVLLM, nano: PreTrainedModel, path: str
) -> None:
    seen = list[str]()

    def spoil(asked: str) -> None:
        if asked.startswith(path) and server.paused == (path != "pause"):
            seen.append(asked)
            if len(seen) == 1:
                raise ServerError("gone")

    server.spoil = spoil
    asyncio.run(push(server, Files(), changed(nano), 1))
    assert server.paths.count("resume") == 1 and server.paths[-1] == "resume"
    assert server.paths.count("update_weights") == 1 + (
        path in ("update_weights", "finish", "reset_prefix", "inference")
    )


SPOILED: dict[str, tuple[Callable[[str], dict[str, Any] | None], str]] = {
    "reset": (lambda path: {"success": False} if path.startswith("reset_prefix") else None, "did not reset its prefix"),
    "transfer": (lambda path: {} if path == "update_weights" else None, "was not sent"),
}


@pytest.mark.parametrize("fault", SPOILED)
def test_after_three_attempts_a_server_stays_paused(server: ActsAsVLLM, nano: PreTrainedModel, fault: str) -> None:
    server.spoil, reason = SPOILED[fault]
    with pytest.raises(PushFailed, match=f"has not got version 1 in 3 attempts: .*{reason}"):
        asyncio.run(push(server, Files(), changed(nano), 1))
    assert server.paused and "resume" not in server.paths
    server.spoil = lambda path: None
    server.paths.clear()
    asyncio.run(push(server, Files(), changed(nano), 1))
    assert not server.paused
    asked = server.paths.index("inference/v1/generate")
    assert asked > server.paths.index("finish_weight_update")  # a worker left without weights dies of a request


def test_weights_that_the_server_computes_otherwise_fail_the_check(server: ActsAsVLLM, nano: PreTrainedModel) -> None:
    model = changed(nano)
    server.read = lambda folder: server.sent.update(names_of(nano))  # type: ignore[method-assign]
    with pytest.raises(PushFailed, match=r"does not have the weights: a token's log-probability is .* nats from"):
        asyncio.run(push(server, Files(), model, 1))
    asyncio.run(push(server, Files(), model, 1, check=Check(tolerance=1e3)))


def test_adapters_get_a_name_for_each_version_and_the_last_ones_stay(server: ActsAsVLLM, nano: PreTrainedModel) -> None:
    model, way = copy.deepcopy(nano), Lora(kept=2)
    add_lora(model, 2, 4, seed=0)
    names = [asyncio.run(push(server, way, model, version)) for version in (1, 2, 2, 3)]
    assert [name.partition("-")[0] for name in names] == ["v1", "v2", "v2", "v3"] and names[1] == names[2]
    assert server.adapters == [names[1], names[3]]
    server.adapters.clear()  # it was started anew
    assert server.adapters == [asyncio.run(push(server, way, model, version)) for version in (3, 4)]
    assert not [path for path in server.paths if path.startswith(("pause", "resume"))]
    with pytest.raises(ValueError, match="the model has none; sync: files"):
        asyncio.run(push(server, way, nano, 4))


def test_an_adapter_whose_load_was_done_but_not_answered_is_loaded_again(
    server: ActsAsVLLM, nano: PreTrainedModel
) -> None:
    model, lost = copy.deepcopy(nano), list[str]()
    add_lora(model, 2, 4, seed=0)

    def answer(path: str, body: dict[str, Any]) -> dict[str, Any]:
        if path == "v1/load_lora_adapter" and body["lora_name"] in server.adapters:
            raise ServerError("http://acts answered 400: it has already been loaded", FailureCause.REFUSED)
        reply = ActsAsVLLM.answer(server, path, body)
        if path == "v1/load_lora_adapter" and not lost:
            lost.append(path)
            raise ServerError("http://acts has not answered", FailureCause.TIMEOUT)
        return reply

    server.answer = answer  # type: ignore[method-assign]
    assert server.adapters == [asyncio.run(push(server, Lora(), model, 1))] and lost


def test_what_a_killed_process_left_in_shared_memory_is_removed(
    server: ActsAsVLLM, nano: PreTrainedModel, tmp_path: Path
) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left, used = tmp_path / f"treegym-weights-{ended.pid}-x", tmp_path / f"treegym-weights-{os.getppid()}-x"
    left.mkdir()
    used.mkdir()
    asyncio.run(push(server, Files(tmp_path), nano, 1))
    assert list(tmp_path.iterdir()) == [used]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA")
def test_nccl_is_refused_without_cuda() -> None:
    with pytest.raises(ValueError, match="there is no CUDA here; sync: files needs none"):
        Nccl()


def test_a_server_that_takes_no_weights_is_told_so(server: ActsAsVLLM, nano: PreTrainedModel) -> None:
    def refuse(path: str) -> None:
        raise ServerError(f"http://acts/{path} answered 404: Not Found", FailureCause.REFUSED)

    server.spoil = refuse
    with pytest.raises(ServerError, match="404: Not Found; `treegym serve` starts servers that take weights"):
        asyncio.run(push(server, Files(), nano, 1))


def test_a_request_that_is_made_once_has_a_connection_of_its_own() -> None:
    ports = []

    async def health(request: Request) -> Response:
        assert request.client
        ports.append(request.client.port)
        return JSONResponse({})

    async def asked(url: str) -> None:
        server = Server(url)
        for _ in range(2):
            await server.ask("health")
        async with server.aside() as control:
            for _ in range(2):
                await control.ask("health")
        await server.close()

    with listening(Starlette(routes=[Route("/health", health)])) as url:
        asyncio.run(asked(url))
    assert ports[0] == ports[1] and len(set(ports)) == 3
