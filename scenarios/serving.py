"""From a scenario's `serving` to a policy on vLLM servers: those that run at its URLs, or one that is started."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..agents import ChatRenderer
from ..agents.models.lora import has_lora, merged_state
from ..agents.policies.vllm import VLLMPolicy
from ..agents.serving import Server
from ..agents.serving.launch import Serving
from ..agents.serving.owned import Owned
from ..agents.serving.sync import Way, push
from ..agents.serving.ways import Files, Lora, Nccl
from .errors import ScenarioError
from .schema import Scenario

NAME = "policy"  # what a server that is started calls the model


def served_policy(scenario: Scenario, model: PreTrainedModel, renderer: ChatRenderer, dtype: torch.dtype) -> VLLMPolicy:
    """What samples from the servers of a scenario. ScenarioError where the model cannot be synchronised so."""
    serving = scenario.serving
    if serving.sync == "lora" and not has_lora(model):
        raise ScenarioError("serving.sync: lora pushes adapters: set model.weights to lora, or sync to files")
    if serving.sync == "lora" and not Path(model.name_or_path or "").is_dir():
        raise ScenarioError("serving.sync: lora needs a base model that was saved; with files the merged one is pushed")
    ways: Mapping[str, type[Way]] = {"files": Files, "lora": Lora, "nccl": Nccl}
    pushed = functools.partial(push, way=ways[serving.sync](), pause=serving.pause)
    rows = scenario.model.max_rows
    if not serving.urls:
        options = _options(scenario, model, renderer, dtype)
        owned = Owned(options, at_once=rows, patience=serving.patience)
        return VLLMPolicy((), NAME, renderer, owned=owned, push=_ordered(pushed))
    addresses = [url.partition("#") for url in serving.urls]
    names = {name for _, _, name in addresses}
    if len(names) != 1 or not names - {""}:
        raise ScenarioError("serving.urls: write http://HOST:PORT#MODEL, with the same MODEL at each")
    servers = [Server(url, at_once=rows, patience=serving.patience) for url, _, _ in addresses]
    return VLLMPolicy(servers, names.pop(), renderer, push=_ordered(pushed))


def _ordered(pushed: Any) -> Any:
    """`push` with its way and pause, called as a policy calls it."""

    async def call(server: Server, model: PreTrainedModel, version: int) -> str:
        name: str = await pushed(server, model=model, version=version)
        return name

    return call


def _options(scenario: Scenario, model: PreTrainedModel, renderer: ChatRenderer, dtype: torch.dtype) -> Serving:
    """How a server of the model's own is started; its weights are in a folder that lives as long as this process."""
    lora = scenario.serving.sync == "lora"
    return Serving(
        str(model.name_or_path) if lora else _saved(model, renderer, dtype),
        name=NAME,
        dtype=str(dtype).removeprefix("torch."),
        max_model_len=scenario.sampling.max_context,
        transfer="nccl" if scenario.serving.sync == "nccl" else "files",
        lora_rank=scenario.model.lora_rank if lora else 0,
        processed_logprobs=scenario.sampling.temperature not in (0.0, 1.0),
        more=tuple(word for name, value in scenario.serving.start.items() for word in _flag(name, value)),
    )


def _saved(model: PreTrainedModel, renderer: ChatRenderer, dtype: torch.dtype) -> str:
    """A directory that vLLM can serve: the model in the dtype that it computes in, adapters merged."""
    folder = tempfile.TemporaryDirectory(prefix="treegym-served-", ignore_cleanup_errors=True)
    model.save_pretrained(folder.name, state_dict={name: x.to(dtype) for name, x in merged_state(model).items()})
    renderer.tokenizer.save_pretrained(folder.name)
    _FOLDERS.append(folder)
    return folder.name


_FOLDERS: list[tempfile.TemporaryDirectory[str]] = []  # which are removed when the process ends


def _flag(name: str, value: Any) -> list[str]:
    """`{enable-foo: true}` is --enable-foo, `{enable-foo: false}` is nothing."""
    if isinstance(value, bool):
        return [f"--{name}"] if value else []
    return [f"--{name}", str(value)]
