"""Policies by name: a model, a server, an oracle, dice, a script, a person."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from ..agents import ChatRenderer, Policy, Sampling, TextPolicy, TokenPolicy
from ..agents.models.registry import load_end_tokens, load_tokenizer
from ..agents.policies import ChatPlayer, OpenAIPolicy, OraclePlayer, RandomPlayer, ScriptedPolicy, Server
from ..tools.named import split_name
from .build import (
    computing,
    in_format,
    in_own_format,
    load_model,
    load_policy,
    refusing,
    settled,
    usable_cores,
    vocabulary,
)
from .errors import ScenarioError
from .parts import made_with
from .person import Person
from .schema import Scenario

UNBOUNDED = 1 << 30  # tokens: what is written in words is not cut
PLAYERS = ("oracle", "random", "human")
CHAT = ("chat+", "tools+", "reasoning+")  # before the address of a server that takes messages
NAMES = (
    "a directory of a run or a model, a model's name, http://HOST:PORT/v1#MODEL, chat+http://…, tools+http://…, "
    "oracle, random, human, "
    "scripted:FILE.py, module:Name or FILE.py:Name, alone or with fields: {FILE.py:Name: {field: value}}"
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
    players: dict[str, Callable[[], TextPolicy]] = {"oracle": OraclePlayer, "random": RandomPlayer, "human": Person}
    in_words = replace(sampling, max_context=UNBOUNDED)
    if name in players:
        at_once = 1 if name == "human" else rows
        return OpenedPolicy(players[name](), _renderer(scenario, tokenizer), in_words, at_once, scenario, _nothing)
    if name and name.startswith("scripted:"):
        renderer = _renderer(scenario, tokenizer)
        script = _script(Path(name.removeprefix("scripted:")))
        return OpenedPolicy(ScriptedPolicy(renderer, script), renderer, in_words, rows, scenario, _nothing)
    if name and name.startswith(("http://", "https://", *CHAT)):
        return _served(name, scenario, sampling, _renderer(scenario, tokenizer))
    if name and (name.startswith("{") or (split_name(name)[0] and not Path(name).exists())):
        return _of_module(name, scenario, sampling, tokenizer)
    return _local(scenario if name is None else replace(scenario, model=replace(scenario.model, name=name)), sampling)


def as_part(name: str | None) -> Any:
    """A policy as a scenario writes parts: `{file.py:Name: {field: value}}` is YAML, anything else is a name."""
    if not name or not name.startswith("{"):
        return name
    try:
        return yaml.safe_load(name)
    except yaml.YAMLError as error:
        raise ScenarioError(f"--policy {name}: not YAML: {str(error).splitlines()[0]}") from error


def speaking(scenario: Scenario, name: str | None, tokenizer: str | None = None) -> Scenario:
    """The scenario in the action format of the model that plays, as its chat template tells it.

    It stays as it is where it names a format, or where no model of a known template plays.
    """
    if name and name.startswith("tools+"):
        return in_format(scenario, "openai")
    if name in PLAYERS or (name and name.startswith("scripted:")) or (name and name.startswith(CHAT) and not tokenizer):
        return scenario
    if name and split_name(name)[0] and not name.startswith(("http://", "https://", *CHAT)) and not Path(name).exists():
        return in_own_format(scenario, tokenizer or scenario.model.name)
    served = name and name.startswith(("http://", "https://", *CHAT))
    return in_own_format(scenario, (tokenizer if served else name) or scenario.model.name)


def _of_module(name: str, scenario: Scenario, sampling: Sampling, tokenizer: str | None) -> OpenedPolicy:
    """The policy that `module:Name` makes, of the renderer and of the scenario's model where it wants them."""
    renderer = _renderer(scenario, tokenizer)
    loaded = functools.cache(lambda: load_model(scenario)[0])
    given = {
        "renderer": lambda: renderer,
        "scenario": lambda: scenario,
        "model": loaded,
        "dtype": lambda: computing(scenario, loaded()),
    }
    policy = made_with(as_part(name), f"--policy {name}", **given)
    rows = scenario.model.max_rows
    if isinstance(policy, TokenPolicy):
        return OpenedPolicy(policy, renderer, sampling, rows, scenario, _nothing)
    if isinstance(policy, TextPolicy):
        in_words = replace(sampling, max_context=UNBOUNDED)
        return OpenedPolicy(policy, renderer, in_words, rows, scenario, _nothing)
    raise ScenarioError(f"--policy {name}: {type(policy).__name__} has neither sample nor act")


def _local(scenario: Scenario, sampling: Sampling) -> OpenedPolicy:
    torch.set_num_threads(scenario.threads or usable_cores())
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        model, renderer = load_model(scenario)
    except ScenarioError as error:
        raise ScenarioError(f"{error}; a policy is {NAMES}") from error
    dtype = computing(scenario, model)
    policy = load_policy(scenario, model, renderer, dtype)
    return OpenedPolicy(policy, renderer, sampling, scenario.model.max_rows, settled(scenario, dtype), _nothing)


def _served(name: str, scenario: Scenario, sampling: Sampling, renderer: ChatRenderer) -> OpenedPolicy:
    address, _, model = name.partition("#")
    kinds, url = _address(address)
    if not model:
        raise ScenarioError(f"{name}: which model? Write {name}#MODEL, as {url}/models lists them")
    rows = scenario.model.max_rows
    try:
        server = Server(url, key=os.environ.get("OPENAI_API_KEY", ""), at_once=rows, patience=scenario.serving.patience)
    except ImportError as error:
        raise ScenarioError(str(error)) from error
    policy: Policy = OpenAIPolicy(server, model, renderer)
    if kinds:
        policy = ChatPlayer(server, model, sampling, tools="tools+" in kinds, reasoning="reasoning+" in kinds)
    return OpenedPolicy(policy, renderer, sampling, 4 * rows, scenario, server.close)  # slots stay full meanwhile


def _address(name: str) -> tuple[list[str], str]:
    """How a server is asked, as `CHAT` has it, and its address."""
    kinds = []
    while kind := next((kind for kind in CHAT if name.startswith(kind)), None):
        kinds.append(kind)
        name = name.removeprefix(kind)
    return kinds, name


def _renderer(scenario: Scenario, name: str | None) -> ChatRenderer:
    name = name or scenario.model.name
    texts = [*vocabulary(scenario)] if name == "nano" else []
    with refusing(f"--tokenizer {name}"):
        tokenizer = load_tokenizer(name, texts=texts, seed=scenario.seed)
        return ChatRenderer(tokenizer, ends=load_end_tokens(name), settings=scenario.model.template)


def _script(file: Path) -> Callable[[str, int], str]:
    """The function `script(text so far, seed)` of a Python file."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if not file.is_file() or spec is None or spec.loader is None:
        raise ScenarioError(f"scripted:{file}: no such Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        exec(compile(file.read_bytes(), str(file), "exec"), vars(module))  # which leaves no __pycache__ beside it
    except Exception as error:  # whatever the file does
        raise ScenarioError(f"scripted:{file}: {type(error).__name__}: {error}") from error
    script: Callable[[str, int], str] | None = getattr(module, "script", None)
    if script is None:
        raise ScenarioError(f"{file} has no function script(text, seed), which returns the next action")
    return script
