"""VLLMPolicy: a model that vLLM serves, sampled token by token, which takes over a learner's weights."""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
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
PROBE = (1, 2, 3)  # token ids that every model has


class ServerRefused(ValueError):
    """A server that cannot do what a run needs, with the way out."""


Push = Callable[[Server, "PreTrainedModel", int], Awaitable[str]]
"""Gives a server the model's weights under a version; the name of the model to ask for from then on."""


@dataclass(slots=True, eq=False)
class _Host:
    """A server, and what is known of it."""

    server: Server
    model: str  # the name to ask for
    busy: int = 0  # requests under way
    gone: bool = False  # since it last took weights


class VLLMPolicy:
    """Samples from vLLM's `/inference/v1/generate`: token ids in, token ids and their log-probabilities out.

    All rollouts of a tree ask one server, the least busy when the tree began, so that they share their prefix there. If
    it is gone its trees go on at another. Requests have seeds of their own, and the version of the weights as salt of
    the prefix cache: keys and values of older weights cannot be hit.
    """

    repeatable = False  # a server batches as requests come, and the last digits follow
    own_weights = True  # it can sample while the learner's weights move

    def __init__(
        self,
        servers: Sequence[Server],
        model: str,
        renderer: ChatRenderer,
        *,
        owned: Owned | None = None,  # a server that `open` starts, and that is started anew when it is gone
        push: Push | None = None,  # None: the servers' weights stay as they are
        hop: float = 10.0,  # seconds of patience with one of several servers before its trees go to another
    ) -> None:
        if bool(servers) == bool(owned):
            raise ValueError("a policy needs servers that run, or one of its own")
        self.renderer = renderer
        self.weights_version = 0
        self._hosts = [_Host(server, model) for server in servers]
        self._name, self._owned = model, owned
        self._push, self._hop = push, hop
        self._model: PreTrainedModel | None = None  # what the servers have the weights of
        self._pushed: int | None = None  # their version
        self._mending = asyncio.Lock()
        self._places: WeakKeyDictionary[Context, _Host] = WeakKeyDictionary()  # of prompts
        self._sessions: WeakKeyDictionary[Context, str] = WeakKeyDictionary()
        self._count = 0

    async def sample(self, context: Context, seed: int, sampling: Sampling) -> Sample:
        if sampling.entropy and not sampling.entropy_top:
            raise ServerRefused(
                "entropies over all tokens would take megabytes for each of them from a server: set the strategy's "
                "`top` to a number of likeliest tokens, such as 16"
            )
        body = {
            "token_ids": context.tokens(),
            "cache_salt": str(self.weights_version),
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
        host, reply = await self._ask(context, body)
        completion = self._read(host, reply, sampling)
        return Sample(completion, Context(completion.token_ids, context))

    async def _ask(self, context: Context, body: dict[str, Any]) -> tuple[_Host, dict[str, Any]]:
        """The answer of the tree's server, or of another one where that is gone."""
        prompt = self._prompt(context)
        while True:
            host = self._places[prompt]
            others = [each for each in self._hosts if each is not host and not each.gone]
            host.busy += 1
            try:
                return host, await host.server.ask(
                    GENERATE,
                    {**body, "model": host.model},
                    headers={"X-Session-ID": self._sessions[prompt]},
                    patience=min(self._hop, host.server.patience) if others else None,
                    again=aborted,
                )
            except ServerError as error:
                if error.cause not in GONE or not (others or self._owned):
                    raise
                if others:
                    host.gone = True
                    self._places[prompt] = min(others, key=lambda each: each.busy)
                else:
                    await self._mended(host, host.server)
            finally:
                host.busy -= 1

    async def _mended(self, host: _Host, server: Server) -> None:
        """Starts the owned server anew, with the present weights, unless another rollout has done so meanwhile."""
        assert self._owned
        async with self._mending:
            if host.server is not server:
                return
            host.server, host.model = await self._owned.start(), self._name
            if self._push and self._model is not None:
                host.model = await self._push(host.server, self._model, self.weights_version)

    def _prompt(self, context: Context) -> Context:
        """The context at which the tree of this one began, with a place at a server."""
        spans = context.lineage()
        known = next((span for span in reversed(spans) if span in self._places), None)
        if known is not None and not self._places[known].gone:
            return known
        alive = [host for host in self._hosts if not host.gone] or self._hosts
        prompt = known or context
        self._places[prompt] = min(alive, key=lambda host: host.busy)
        self._count += 1
        self._sessions.setdefault(prompt, f"treegym-{id(self):x}-{self._count}")
        return prompt

    def _read(self, host: _Host, reply: Mapping[str, Any], sampling: Sampling) -> Completion:
        try:
            choice = reply["choices"][0]
            tokens = tuple(int(token) for token in choice["token_ids"])
            rows = choice["logprobs"]["content"]
            logprobs = tuple(float(row["logprob"]) for row in rows)
            entropies = tuple(_entropy(row, sampling.entropy_top) for row in rows) if sampling.entropy else ()
            first, last = _versions(choice, self.weights_version)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise strange(host.server, error) from None
        if not tokens or len(logprobs) != len(tokens):
            raise ServerError(f"{host.server.url} gave {len(tokens)} tokens and {len(logprobs)} log-probabilities")
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

    async def push(self, model: PreTrainedModel, version: int) -> None:
        """Gives every server the model's weights; one that cannot be reached is gone until the next push.

        Does nothing where the servers have this version. Raises what the last of them raised where none took it.
        """
        if self._push is None:
            raise ServerRefused("the servers were opened to play: no way was given to push weights to them")
        if version == self._pushed and not any(host.gone for host in self._hosts):
            return
        self._model = model
        failure: Exception | None = None
        for host in self._hosts:
            try:
                try:
                    host.model = await self._push(host.server, model, version)
                except ServerError:
                    if not self._owned:
                        raise
                    host.server = await self._owned.start()
                    host.model = await self._push(host.server, model, version)
                host.gone = False
            except ServerError as error:
                host.gone, failure = True, error
        if failure and all(host.gone for host in self._hosts):
            raise failure
        self.weights_version = self._pushed = version

    # opening and closing

    async def open(self, sampling: Sampling, *, entropy_top: int = 0) -> None:
        """Starts the owned server, and asks every server once what it can do. ServerRefused, ServerError."""
        if self._owned:
            self._hosts = [_Host(await self._owned.start(), self._name)]
        await self.check(sampling, entropy_top=entropy_top)

    async def close(self) -> None:
        if self._owned:
            await self._owned.stop()
        else:
            for host in self._hosts:
                await host.server.close()

    # what the servers can do

    async def check(self, sampling: Sampling, *, entropy_top: int = 0) -> None:
        """Asks every server once what it can do. ServerRefused, in one line, with what to start it with instead."""
        for host in self._hosts:
            await self._check(host, sampling, entropy_top)

    async def _check(self, host: _Host, sampling: Sampling, entropy_top: int) -> None:
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
        await self._probe(host, 1)
        if sampling.temperature not in (0.0, 1.0):
            gap = await self._probe(host)
            heated = await self._probe(host, temperature=sampling.temperature)
            if abs(heated - gap) < abs(heated - gap / sampling.temperature):
                raise ServerRefused(
                    f"{url} gives log-probabilities of temperature 1, and sampling.temperature is "
                    f"{sampling.temperature:g}: start it with --logprobs-mode processed_logprobs"
                )
        if entropy_top:
            await self._probe(host, entropy_top)

    async def _probe(self, host: _Host, top: int = 5, *, temperature: float = 1.0) -> float:
        """How far the likeliest token after PROBE is from the last of the `top` likeliest, nats. A temperature divides
        it."""
        params = {"max_tokens": 1, "temperature": temperature, "logprobs": top + 1, "seed": 0, **UNCUT}
        body = {"model": host.model, "token_ids": list(PROBE), "sampling_params": params}
        try:
            reply = await host.server.ask(GENERATE, body, again=aborted)
        except ServerError as error:
            raise ServerRefused(_advice(str(error))) from error
        [row] = reply["choices"][0]["logprobs"]["content"]
        likeliest = _likeliest(row, top)
        return likeliest[0] - likeliest[-1]


def _advice(fault: str) -> str:
    """A refusal with the way out, where that is known."""
    if found := re.search(r"logprobs.*?(?:max allowed|maximum)\D*(\d+)", fault, re.IGNORECASE):
        return f"{fault}: start it with --max-logprobs, or take entropies over at most {int(found[1]) - 1} tokens"
    if re.search(r"answered 40[34]", fault):
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


def _versions(choice: Mapping[str, Any], present: int) -> tuple[int, int]:
    """The versions of the weights that made the first and the last token."""
    spans = sorted(choice.get("weight_versions") or (), key=lambda span: int(span["start"]))
    named = [str(span["version"]) for span in spans]
    known = [int(name) if name.isdecimal() else present for name in named] or [present]
    return known[0], known[-1]
