"""Weight sync: gives a vLLM server a model's present weights, and proves that it has them before it answers anybody.

A push pauses the server, has it load the weights, resets its caches, checks it and resumes it. The check asks for a
continuation behind a prefix that the server cached under its older weights, and compares the log-probabilities with
those of the model here: `prompt_logprobs` bypass the cache, and would not show that its keys and values are stale. What
goes wrong before the server resumes is mended by doing all of it again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from ..rollouts.failure import FailureCause
from .client import Server, ServerError
from .probe import Check, Probe

if TYPE_CHECKING:  # torch takes seconds to import
    from transformers import PreTrainedModel

ATTEMPTS = 3
Pause = Literal["wait", "keep"]


class PushFailed(ServerError):
    """A server cannot be given the weights. It is left paused, so that it answers nobody; start it anew."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds that each phase of a push may take."""

    pause: float = 600.0  # with mode "wait", requests under way first come to their end
    update: float = 300.0  # each of start, update and finish
    phase: float = 60.0  # each of the others


LIMITS, CHECK = Limits(), Check()


@dataclass(frozen=True, slots=True)
class Load:
    """What a push sends."""

    model: str = ""  # what requests ask for once it is there; empty: the server's own model
    folder: Path | None = None  # where its files are
    names: frozenset[str] = frozenset()  # of its tensors


class Way(Protocol):
    """How weights reach a server."""

    @property
    def pauses(self) -> bool:
        """Whether the weights replace those that requests under way are sampled with."""
        ...

    def packed(self, model: PreTrainedModel, version: int) -> AbstractContextManager[Load]:
        """The model's weights, ready to be sent. It is entered and left in a thread."""
        ...

    async def load(self, server: Server, load: Load, model: PreTrainedModel, version: int, seconds: float) -> None:
        """Has the server load the weights, each phase within so many seconds. ServerError."""
        ...


async def push(
    server: Server,
    way: Way,
    model: PreTrainedModel,
    version: int,
    *,
    pause: Pause = "wait",
    check: Check = CHECK,
    limits: Limits = LIMITS,
) -> str:
    """Gives the server at its root URL the model's weights. Returns the name of the model that requests ask for.

    A version that the server has already, with these weights, is not sent again. Between the pause and the end of the
    check the server answers nobody else. PushFailed after three attempts.
    """
    async with server.aside() as control:  # requests that wait for the server to resume may hold all connections
        state = await _State.of(control, limits)
        prompt = check.prompt(model.config.get_text_config().vocab_size, state.length)
        tolerance = (1e-3 if state.dtype == "float32" else 0.5) if check.tolerance is None else check.tolerance
        probe = Probe(control, model, prompt, check.tokens, tolerance, limits.phase)
        packing = way.packed(model, version)
        load = await asyncio.to_thread(packing.__enter__)
        try:
            return await _Push(control, way, model, version, pause, limits, probe, load).carried_out(state)
        finally:
            await asyncio.to_thread(packing.__exit__, None, None, None)


@dataclass(frozen=True, slots=True)
class _State:
    """What a server says of itself."""

    model: str  # the name of its own model
    names: frozenset[str]  # of that and of its adapters
    length: int  # tokens that a prompt and its reply may have
    dtype: str
    version: str
    paused: bool

    @staticmethod
    async def of(server: Server, limits: Limits) -> _State:
        try:
            version = (await server.ask("weight_info", timeout=limits.phase))["weight_version"]
            paused = (await server.ask("is_paused", timeout=limits.phase))["is_paused"]
            dtype = (await _report(server, limits))["dtype"]
        except ServerError as error:
            if error.cause != FailureCause.REFUSED:
                raise
            raise ServerError(f"{error}; `treegym serve` starts servers that take weights", error.cause) from error
        rows = (await server.ask("v1/models", timeout=limits.phase))["data"]
        own = next(row for row in rows if row.get("max_model_len"))
        names = frozenset(row["id"] for row in rows)
        return _State(own["id"], names, own["max_model_len"], dtype, version, paused)


@dataclass(frozen=True, slots=True)
class _Push:
    server: Server
    way: Way
    model: PreTrainedModel
    version: int
    pause: Pause
    limits: Limits
    probe: Probe
    load: Load

    async def carried_out(self, state: _State) -> str:
        name = self.load.model or state.model
        if not state.paused:  # a server that a failed push left paused may be without weights, and die when asked
            there = name in state.names if self.load.model else state.version == str(self.version)
            if there and await self.probe.deviation(name) <= self.probe.tolerance:
                return name
            if self.way.pauses:
                await self.probe.warm(state.model)
        failures: list[ServerError] = []
        while len(failures) < ATTEMPTS:
            try:
                await (self._replaced(name) if self.way.pauses else self._added(name))
                return name
            except ServerError as error:
                failures.append(error)
        fault = f"{self.server.url} has not got version {self.version} in {ATTEMPTS} attempts: {failures[-1]}"
        raise PushFailed(fault, failures[-1].cause) from failures[-1]

    async def _added(self, name: str) -> None:
        """Nobody knows the name yet, so nobody has to wait."""
        await self.way.load(self.server, self.load, self.model, self.version, self.limits.update)
        await self.probe.check(name)

    async def _replaced(self, name: str) -> None:
        await told(self.server, f"pause?mode={self.pause}&clear_cache=false", self.limits.pause)
        await self.way.load(self.server, self.load, self.model, self.version, self.limits.update)
        await _reset(self.server, self.limits)
        await _compare_names(self.server, self.load.names, self.limits)
        await told(self.server, "pause?mode=wait&clear_cache=false", self.limits.phase)  # "keep" holds checks as well
        await self.probe.check(name)
        await told(self.server, "resume", self.limits.phase)


async def told(server: Server, path: str, seconds: float, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The answer to a POST that is made once: a phase that fails is repeated with all the others."""
    return await server.ask(path, body or {}, timeout=seconds, patience=0)


async def _reset(server: Server, limits: Limits) -> None:
    reply = await told(server, "reset_prefix_cache?reset_running_requests=true&reset_external=true", limits.phase)
    if not reply.get("success"):
        raise ServerError(f"{server.url} did not reset its prefix cache", FailureCause.SERVER)
    for cache in ("reset_mm_cache", "reset_encoder_cache"):
        await server.tell(cache, {}, timeout=limits.phase, patience=0)


async def _compare_names(server: Server, names: Collection[str], limits: Limits) -> None:
    """A layer that is not sent keeps its older weights, and the server says nothing of it."""
    report = await _report(server, limits)
    expected, sent = set(report["expected"]), set(names if report["sent"] is None else report["sent"])
    for what, which in (
        ("was not sent", (expected | set(names)) - sent),
        ("was sent, but does not expect,", sent - expected),
        ("did not load", report["unloaded"]),
    ):
        if which:
            more = f" and {len(which) - 1} more tensors" if len(which) > 1 else ""
            raise ServerError(f"{server.url} {what} {min(which)}{more}", FailureCause.MALFORMED)


async def _report(server: Server, limits: Limits) -> dict[str, Any]:
    body = {"method": "treegym_report"}
    report: dict[str, Any] = (await server.ask("collective_rpc", body, timeout=limits.phase, patience=0))["results"][0]
    return report
