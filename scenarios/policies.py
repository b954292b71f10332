"""Policies by name: a model, a server, an oracle, dice, a script, a person."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..agents import (
    ChatPlayer,
    ChatRenderer,
    OpenAIPolicy,
    OraclePlayer,
    Player,
    Policy,
    RandomPlayer,
    Sampling,
    ScriptedPolicy,
    Server,
    TransformersPolicy,
    native_dtype,
)
from ..agents.models import load_tokenizer
from .build import load_model, refusing, settled, vocabulary
from .errors import ScenarioError
from .person import Person
from .schema import Scenario

UNBOUNDED = 1 << 30  # tokens: what is written in words is not cut
NAMES = (
    "a directory of a run or a model, a model's name, http://HOST:PORT/v1#MODEL, chat+http://…, oracle, random, human, "
    "scripted:FILE.py"
)


@dataclass(frozen=True, slots=True)
class OpenedPolicy:
    """A policy ready to play, and what goes with it."""

    policy: Policy
    renderer: ChatRenderer
    sampling: Sampling
    rollouts: int  # at a time
    scenario: Scenario  # with the model and dtype that play
    close: Callable[[], Awaitable[None]]


async def _nothing() -> None:
    """There is nothing to close."""


def open_policy(name: str | None, scenario: Scenario, tokenizer: str | None = None) -> OpenedPolicy:
    """The policy of that name, by default the scenario's model. ScenarioError where it cannot be had.

    `tokenizer` is a model's directory or name; by default the scenario's. Open it in the event loop that it plays in.
    """
    sampling = replace(scenario.sampling, temperature=scenario.heldout.temperature)
    rows = scenario.model.max_rows
    players: dict[str, Callable[[], Player]] = {"oracle": OraclePlayer, "random": RandomPlayer, "human": Person}
    in_words = replace(sampling, max_context=UNBOUNDED)
    if name in players:
        at_once = 1 if name == "human" else rows
        return OpenedPolicy(players[name](), _renderer(scenario, tokenizer), in_words, at_once, scenario, _nothing)
    if name and name.startswith("scripted:"):
        renderer = _renderer(scenario, tokenizer)
        script = _script(Path(name.removeprefix("scripted:")))
        return OpenedPolicy(ScriptedPolicy(renderer, script), renderer, in_words, rows, scenario, _nothing)
    if name and name.startswith(("http://", "https://", "chat+")):
        return _served(name, scenario, sampling, _renderer(scenario, tokenizer))
    return _local(scenario if name is None else replace(scenario, model=replace(scenario.model, name=name)), sampling)


def _local(scenario: Scenario, sampling: Sampling) -> OpenedPolicy:
    torch.set_num_threads(scenario.threads or os.cpu_count() or 1)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        model, renderer = load_model(scenario)
    except ScenarioError as error:
        raise ScenarioError(f"{error}; a policy is {NAMES}") from error
    named = scenario.model.dtype
    dtype = native_dtype(model.device) if named == "auto" else getattr(torch, named)
    with refusing("model.name"):
        policy = TransformersPolicy(model, renderer, dtype=dtype, max_rows=scenario.model.max_rows)
    return OpenedPolicy(policy, renderer, sampling, scenario.model.max_rows, settled(scenario, dtype), _nothing)


def _served(name: str, scenario: Scenario, sampling: Sampling, renderer: ChatRenderer) -> OpenedPolicy:
    url, _, model = name.removeprefix("chat+").partition("#")
    if not model:
        raise ScenarioError(f"{name}: which model? Write {name}#MODEL, as {url}/models lists them")
    rows = scenario.model.max_rows
    try:
        server = Server(url, key=os.environ.get("OPENAI_API_KEY", ""), at_once=rows)
    except ImportError as error:
        raise ScenarioError(str(error)) from error
    policy = ChatPlayer(server, model, sampling) if name.startswith("chat+") else OpenAIPolicy(server, model, renderer)
    return OpenedPolicy(policy, renderer, sampling, 4 * rows, scenario, server.close)  # slots stay full meanwhile


def _renderer(scenario: Scenario, name: str | None) -> ChatRenderer:
    name = name or scenario.model.name
    texts = vocabulary(scenario) if name == "nano" else ()
    with refusing(f"--tokenizer {name}"):
        return ChatRenderer(load_tokenizer(name, texts=texts, seed=scenario.seed))


def _script(file: Path) -> Callable[[str, int], str]:
    """The function `script(text so far, seed)` of a Python file."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if not file.is_file() or spec is None or spec.loader is None:
        raise ScenarioError(f"scripted:{file}: no such Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the file does
        raise ScenarioError(f"scripted:{file}: {type(error).__name__}: {error}") from error
    script: Callable[[str, int], str] | None = getattr(module, "script", None)
    if script is None:
        raise ScenarioError(f"{file} has no function script(text, seed), which returns the next action")
    return script
