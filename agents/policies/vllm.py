"""VLLMPolicy: a model that vLLM serves, sampled token by token, which takes over a learner's weights."""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from ..chat import ChatRenderer
from ..policy import Completion, Context, Sample, Sampling, derive_seed
from ..rollouts.failure import FailureCause
from ..serving.client import Server, ServerError
from ..serving.owned import Owned
from .openai import UNCUT, aborted, strange

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GENERATE = "inference/v1/generate"  # which `--enable-scale-out` opens
GONE = (FailureCause.CONNECTION, FailureCause.TIMEOUT, FailureCause.SERVER)  # after which another server is asked
DEATHS = 3  # of the owned server while one request was under way, which then has failed: it may be the cause
PROBE = (1, 2, 3)  # token ids that every model has


class ServerRefused(ServerError):
    """A server that cannot do what a run needs, with the way out."""

    def __init__(self, fault: str) -> None:
        super().__init__(fault, FailureCause.REFUSED)


Push = Callable[[Server, "PreTrainedModel", int], Awaitable[str]]
"""Gives a server the model's weights under a version; the name of the model to ask for from then on."""


@dataclass(slots=True, eq=False)
class _Host:
    """A server, and what is known of it."""

    server: Server
    model: str  # the name to ask for
    version: int | None = None  # of the weights that it was given last; None: it was given none
    busy: int = 0  # requests under way
    gone: bool = False  # since it last took weights
    mending: asyncio.Task[None] | None = None  # gives it the present weights


class VLLMPolicy:
    """Samples from vLLM's `/inference/v1/generate`: token ids in, token ids and their log-probabilities out.

    All rollouts of a tree ask one server, the least busy when the tree began, so that they share their prefix there. If
    it is gone its trees go on at another. Requests have seeds of their own, and the version of the weights as salt of
    the prefix cache: keys and values of older weights cannot be hit.

    After the first push only servers that have the weights of the last one are asked. One that missed it, or that was
    started anew, is given them first.
    """

    repeatable = False  # a server batches as requests come, and the last digits follow

    def __init__(
        self,
        servers: Sequence[Server],
        model: str,
        renderer: ChatRenderer,
        *,
        owned: Owned | None = None,  # a server that `open` starts, and that is started anew when it is gone
        push: Push | None = None,  # None: the servers' weights stay as they are
        entropy_top: int = 0,  # over how many of the likeliest tokens entropies will be wanted; 0: none will
        hop: float = 10.0,  # seconds of patience with one of several servers before its trees go to another
    ) -> None:
        if bool(servers) == bool(owned):
            raise ValueError("a policy needs servers that run, or one of its own")
        self.renderer = renderer
        self.weights_version = 0
        self._hosts = [_Host(server, model) for server in servers]
        self._name, self._owned = model, owned
        self._push, self._entropy_top, self._hop = push, entropy_top, hop
        self._pushed: PreTrainedModel | None = None  # the model of the last push, whose version is `weights_version`
        self._weights = asyncio.Lock()  # held while the model's weights are read, and while they move
        self._unmoved = asyncio.Event()  # whether the model's weights are those of the last push
        self._unmoved.set()
        self._places: WeakKeyDictionary[Context, _Host] = WeakKeyDictionary()  # of prompts
        self._sessions: WeakKeyDictionary[Context, str] = WeakKeyDictionary()
        self._count = 0

    async def sample(self, context: Context, seed: int, sampling: Sampling) -> Sample:
        if sampling.entropy and not sampling.entropy_top:
            raise ValueError(
                "entropies over all tokens would take megabytes for each of them from a server: set the strategy's "
                "`top` to a number of likeliest tokens, such as 16"
            )
        body = {
            "token_ids": context.tokens(),
            "sampling_params": {
                "max_tokens": sampling.max_tokens,
                "temperature": sampling.temperature,
                "seed": derive_seed(seed, context.length),
                "logprobs": sampling.entropy_top + 1 if sampling.entropy else 0,  # _likeliest
                "ignore_eos": True,  # the turn ends with the renderer's tokens alone
                "stop_token_ids": sorted(self.renderer.ends),
                "skip_special_tokens": False,
                **UNCUT,
                **({"stop": list(sampling.stop)} if sampling.stop else {}),
            },
        }
        completion = await self._ask(context, body, sampling)
        return Sample(completion, Context(completion.token_ids, context))

    async def _ask(self, context: Context, body: dict[str, Any], sampling: Sampling) -> Completion:
        """The reply of the tree's server, or of another one where that is gone."""
        deaths = 0
        while True:
            prompt = self._prompt(context)
            host = self._places[prompt]
            if not self._ready(host):
                await self._mended(host)
                continue
            asked = replace(host)
            others = [each for each in self._hosts if each is not host and not each.gone and self._ready(each)]
            error: ServerError | None = None
            host.busy += 1
            try:
                reply = await asked.server.ask(
                    GENERATE,
                    {**body, "model": asked.model, "cache_salt": str(asked.version or 0)},
                    headers={"X-Session-ID": self._sessions[prompt]},
                    patience=min(self._hop, asked.server.patience) if others else None,
                    again=aborted,
                )
                completion = self._read(asked, reply, sampling)
                if asked.version is None or completion.weights_version >= asked.version:
                    return completion
            except ServerError as fault:
                unloaded = asked.model != self._name and fault.status == 404
                if not unloaded and (fault.cause not in GONE or not (others or self._owned)):
                    raise
                error = None if unloaded else fault
            finally:
                host.busy -= 1
            if (host.server, host.version) != (asked.server, asked.version):
                continue  # a push, or another rollout, has mended it
            if error is None:  # somebody has started the server anew: it has the weights that it began with
                host.version = None
            elif others:
                host.gone = True
            elif (deaths := deaths + 1) < DEATHS:
                await self._mended(host)
            else:
                raise error

    def _ready(self, host: _Host) -> bool:
        """Whether the server has the weights of the last push."""
        return self._pushed is None or (host.version is not None and host.version >= self.weights_version)

    async def _mended(self, host: _Host) -> None:
        """Waits until a server has the present weights. The work goes on where one of those that wait is cancelled."""
        if host.mending is None or host.mending.done():
            host.mending = asyncio.create_task(self._mend(host))
        await asyncio.shield(host.mending)

    async def _mend(self, host: _Host) -> None:
        """Gives a server the present weights; the owned one is started anew before. ServerError.

        Once the learner's weights have moved, nobody has the present ones any more: the next push mends the server.
        """
        server, version = host.server, host.version
        while (host.server, host.version) == (server, version):
            await self._unmoved.wait()
            async with self._weights:
                if self._unmoved.is_set() and (host.server, host.version) == (server, version):
                    await self._start(host)
                    if self._pushed is not None:
                        await self._give(host, self._pushed, self.weights_version)

    async def _start(self, host: _Host) -> None:
        """Starts the owned server anew."""
        if self._owned:
            host.version = None
            host.server, host.model = await self._owned.start(), self._name

    async def _give(self, host: _Host, model: PreTrainedModel, version: int) -> None:
        assert self._push
        try:
            host.model = await self._push(host.server, model, version)
        except BaseException:
            host.version = None  # it may have been left without weights
            raise
        host.version, host.gone = version, False

    def _prompt(self, context: Context) -> Context:
        """The context at which the tree of this one began, with a place at a server."""
        spans = context.lineage()
        known = next((span for span in reversed(spans) if span in self._places), None)
        if known is not None and not self._places[known].gone:
            return known
        ready = [host for host in self._hosts if self._ready(host)] or self._hosts
        alive = [host for host in ready if not host.gone] or ready
        prompt = known or context
        self._places[prompt] = min(alive, key=lambda host: host.busy)
        self._count += 1
        self._sessions.setdefault(prompt, f"treegym-{id(self):x}-{self._count}")
        return prompt

    def _read(self, asked: _Host, reply: Mapping[str, Any], sampling: Sampling) -> Completion:
        present = asked.version or 0
        try:
            choice = reply["choices"][0]
            tokens = tuple(int(token) for token in choice["token_ids"])
            rows = choice["logprobs"]["content"]
            logprobs = tuple(float(row["logprob"]) for row in rows)
            entropies = tuple(_entropy(row, sampling.entropy_top) for row in rows) if sampling.entropy else ()
            adapter = asked.model != self._name  # of which the server's versions tell nothing
            first, last = (present, present) if adapter else _versions(choice, asked.version)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise strange(asked.server, error) from None
        if not tokens or len(logprobs) != len(tokens):
            raise ServerError(f"{asked.server.url} gave {len(tokens)} tokens and {len(logprobs)} log-probabilities")
        ended = self.renderer.ended(tokens) or self.renderer.stopped(tokens, sampling.stop)
        return Completion(
            text=self.renderer.text(tokens),
            token_ids=tokens,
            logprobs=logprobs,
            entropies=entropies,
            stop_reason="stop" if ended else "length",
            weights_version=first,
            last_weights_version=None if last == first else last,
        )

    # weights

    def release(self) -> None:
        """The servers keep their memory: a push goes over what is there."""

    @asynccontextmanager
    async def moving(self) -> AsyncIterator[None]:
        """While the learner's weights move. Until the next push no server is given what the model then holds."""
        async with self._weights:
            self._unmoved.clear()
            yield

    async def push(self, model: PreTrainedModel, version: int) -> None:
        """Gives the model's weights to every server that has not got this version. One that cannot take them is gone
        until the next push.

        Raises what the last of them raised where none took it.
        """
        if self._push is None:
            raise ServerRefused("the servers were opened to play: no way was given to push weights to them")
        async with self._weights:
            failure: ServerError | None = None
            for host in self._hosts:
                if host.version == version and not host.gone:
                    continue
                try:
                    await self._take(host, model, version)
                except ServerError as error:
                    host.gone, failure = True, error
            if failure and all(host.gone for host in self._hosts):
                raise failure
            self._pushed, self.weights_version = model, version
            self._unmoved.set()

    async def _take(self, host: _Host, model: PreTrainedModel, version: int) -> None:
        try:
            await self._give(host, model, version)
        except ServerError:
            if not self._owned:
                raise
            await self._start(host)
            await self._give(host, model, version)

    # opening and closing

    async def open(self, sampling: Sampling) -> None:
        """Starts the owned server, and asks every server once what it can do. ServerRefused, ServerError."""
        if self._owned:
            self._hosts = [_Host(await self._owned.start(), self._name)]
        await self.check(sampling)

    async def close(self) -> None:
        mending = [host.mending for host in self._hosts if host.mending]
        for task in mending:
            task.cancel()
        await asyncio.gather(*mending, return_exceptions=True)
        if self._owned:
            await self._owned.stop()
        else:
            for host in self._hosts:
                await host.server.close()

    # what the servers can do

    async def check(self, sampling: Sampling) -> None:
        """Asks every server once what it can do. ServerRefused, in one line, with what to start it with instead."""
        for host in self._hosts:
            await self._check(host, sampling)

    async def _check(self, host: _Host, sampling: Sampling) -> None:
        url = host.server.url
        models = {row["id"]: row for row in (await host.server.ask("v1/models"))["data"]}
        if host.model not in models:
            raise ServerRefused(f"{url} serves {', '.join(models)}, not {host.model}")
        longest = models[host.model].get("max_model_len")
        if longest is not None and longest < sampling.max_context:
            raise ServerRefused(
                f"{url} takes {longest} tokens, sampling.max_context is {sampling.max_context}: start it with "
                f"--max-model-len {sampling.max_context}, or set sampling.max_context={longest}"
            )
        if self._push and (await host.server.ask("is_paused"))["is_paused"]:
            return  # a broken push left it so, perhaps without weights: it answers nobody before the next one
        await self._probe(host, 1)
        if sampling.temperature not in (0.0, 1.0):
            gap = await self._probe(host)
            heated = await self._probe(host, temperature=sampling.temperature)
            if abs(heated - gap) < abs(heated - gap / sampling.temperature):
                raise ServerRefused(
                    f"{url} gives log-probabilities of temperature 1, and sampling.temperature is "
                    f"{sampling.temperature:g}: start it with --logprobs-mode processed_logprobs"
                )
        if self._entropy_top:
            await self._probe(host, self._entropy_top)

    async def _probe(self, host: _Host, top: int = 5, *, temperature: float = 1.0) -> float:
        """How far the likeliest token after PROBE is from the last of the `top` likeliest, nats. A temperature divides
        it."""
        params = {"max_tokens": 1, "temperature": temperature, "logprobs": top + 1, "seed": 0, **UNCUT}
        body = {"model": host.model, "token_ids": list(PROBE), "sampling_params": params}
        try:
            reply = await host.server.ask(GENERATE, body, again=aborted)
        except ServerError as error:
            raise ServerRefused(_advice(error)) from error
        [row] = reply["choices"][0]["logprobs"]["content"]
        likeliest = _likeliest(row, top)
        return likeliest[0] - likeliest[-1]


def _advice(error: ServerError) -> str:
    """A refusal with the way out, where that is known."""
    fault = str(error)
    if found := re.search(r"logprobs.*?(?:max allowed|maximum)\D*(\d+)", fault, re.IGNORECASE):
        return f"{fault}: start it with --max-logprobs, or take entropies over at most {int(found[1]) - 1} tokens"
    if error.status in (403, 404):
        return f"{fault}: start vLLM with --enable-scale-out"
    return fault


def _likeliest(row: Mapping[str, Any], top: int) -> list[float]:
    """The log-probabilities of the likeliest tokens, by ids, for two tokens may have one text.

    One more must have been asked for: among as many as were asked for is the sampled token, whatever its rank.
    """
    found = {int(each["token_id"]): float(each["logprob"]) for each in row["top_logprobs"]}
    return sorted(found.values(), reverse=True)[:top]


def _entropy(row: Mapping[str, Any], top: int) -> float:
    """The entropy, nats, over the likeliest tokens."""
    return -sum(math.exp(logprob) * logprob for logprob in _likeliest(row, top))


def _versions(choice: Mapping[str, Any], given: int | None) -> tuple[int, int]:
    """The versions of the weights that made the first and the last token of a server that was given weights of the
    version `given`. Those that a server begins with have no number: they are 0, and -1 once it was given others."""
    spans = sorted(choice.get("weight_versions") or (), key=lambda span: int(span["start"]))
    named = [str(span["version"]) for span in spans]
    unnumbered = 0 if given is None else -1
    known = [int(name) if name.isdecimal() else unnumbered for name in named] or [given or 0]
    return known[0], known[-1]
