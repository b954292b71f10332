"""From a scenario's `serving` to a policy on vLLM servers: those that run at its URLs, or one that is started."""

from __future__ import annotations

import json
import os
import shutil
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..agents import ChatRenderer
from ..agents.models.lora import has_lora, lora_rank, merged_state
from ..agents.policies.vllm import Push, VLLMPolicy
from ..agents.rollouts.strategies import Budgeted, EntropyBranching
from ..agents.serving import Server
from ..agents.serving.launch import ServerOptions
from ..agents.serving.owned import Owned
from ..agents.serving.scratch import scratch
from ..agents.serving.sync import Pause, Way, push
from ..agents.serving.ways import Files, Lora, Nccl
from .errors import ScenarioError
from .schema import Scenario

NAME = "policy"  # what a server that is started calls the model


def served_policy(scenario: Scenario, model: PreTrainedModel, renderer: ChatRenderer, dtype: torch.dtype) -> VLLMPolicy:
    """What samples from the servers of a scenario. ScenarioError where it cannot be had, or cannot take the weights."""
    choice, rows = scenario.serving, scenario.model.max_rows
    if scenario.model.policy is not None:
        raise ScenarioError("model.policy: with serving.engine: vllm the servers sample; leave one of the two out")
    push, entropy_top = _pushing(_way(scenario, model), choice.pause), _entropy_top(scenario.plan().algorithm.rollout)
    key = os.environ.get("VLLM_API_KEY", "")  # a server that is started here finds it there too
    if not choice.urls:
        folder = _base(scenario, model) if choice.sync == "lora" else _saved(model, renderer, dtype)
        owned = Owned(_options(scenario, model, folder, dtype, key), at_once=rows, patience=choice.patience)
        if choice.sync != "lora":
            weakref.finalize(owned, shutil.rmtree, folder, ignore_errors=True)  # at the latest when the process ends
        return VLLMPolicy((), NAME, renderer, owned=owned, push=push, entropy_top=entropy_top)
    addresses = [url.partition("#") for url in choice.urls]
    names = {name for _, _, name in addresses}
    if len(names) != 1 or not names - {""} or any(url.rstrip("/").endswith("/v1") for url, _, _ in addresses):
        raise ScenarioError("serving.urls: write http://HOST:PORT#MODEL, without /v1, with the same MODEL at each")
    servers = [Server(url, key=key, at_once=rows, patience=choice.patience) for url, _, _ in addresses]
    return VLLMPolicy(servers, names.pop(), renderer, push=push, entropy_top=entropy_top)


def _way(scenario: Scenario, model: PreTrainedModel) -> Way:
    choice = scenario.serving
    folder = Path(choice.folder).absolute() if choice.folder else None
    if folder and not folder.is_dir():
        raise ScenarioError(f"serving.folder: {folder} is no directory: it must be there, for the servers as well")
    match choice.sync:
        case "lora":
            if not has_lora(model):
                raise ScenarioError("serving.sync: lora pushes adapters: set model.weights to lora, or sync to files")
            return Lora(_versions(scenario), folder)
        case "nccl":
            try:
                return Nccl(choice.address)
            except ValueError as error:
                raise ScenarioError(f"serving.{error}") from error
    return Files(folder)


def _versions(scenario: Scenario) -> int:
    """How many versions of an adapter are in use at a time, with the one that is being pushed."""
    plan = scenario.plan()
    return max(getattr(stage, "max_lag", 0) for stage in (plan.improvement, *plan.stages)) + 2


def _pushing(way: Way, pause: Pause) -> Push:
    async def give(server: Server, model: PreTrainedModel, version: int) -> str:
        return await push(server, way, model, version, pause=pause)

    return give


def _entropy_top(strategy: Any) -> int:
    """Over how many tokens a strategy takes entropies; 0 where it takes none. ScenarioError where it takes all."""
    if isinstance(strategy, Budgeted):
        return _entropy_top(strategy.strategy)
    if not isinstance(strategy, EntropyBranching):
        return 0
    if not strategy.top:
        raise ScenarioError(
            "algorithm.rollout: entropies over all tokens would take megabytes for each of them from a server: "
            "write EntropyBranching with `top`, such as {EntropyBranching: {top: 20}}"
        )
    return strategy.top


def _options(scenario: Scenario, model: PreTrainedModel, folder: str, dtype: torch.dtype, key: str) -> ServerOptions:
    return ServerOptions(
        folder,
        name=NAME,
        dtype=str(dtype).removeprefix("torch."),
        max_model_len=scenario.sampling.max_context,
        transfer="nccl" if scenario.serving.sync == "nccl" else "files",
        lora_rank=lora_rank(model) if scenario.serving.sync == "lora" else 0,
        max_loras=_versions(scenario),
        processed_logprobs=scenario.sampling.temperature not in (0.0, 1.0),
        key=key,
        more=tuple(word for name, value in scenario.serving.start.items() for word in _flag(name, value)),
    )


def _base(scenario: Scenario, model: PreTrainedModel) -> str:
    if not Path(model.name_or_path or "").is_dir():
        raise ScenarioError("serving.sync: lora needs a base model that was saved; with files the merged one is pushed")
    return str(model.name_or_path)


def _saved(model: PreTrainedModel, renderer: ChatRenderer, dtype: torch.dtype) -> str:
    """A directory that vLLM can serve: the model in the dtype that it computes in, adapters merged."""
    folder = scratch("served")
    model.save_pretrained(folder, state_dict={name: x.to(dtype) for name, x in merged_state(model).items()})
    renderer.tokenizer.save_pretrained(folder)
    return str(folder)


def _flag(name: str, value: Any) -> list[str]:
    """`{enable-foo: true}` is --enable-foo, `{enable-foo: false}` is nothing; mappings and lists are JSON."""
    if isinstance(value, bool):
        return [f"--{name}"] if value else []
    return [f"--{name}", json.dumps(value) if isinstance(value, Mapping | list) else str(value)]
