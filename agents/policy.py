"""Policies: contexts of tokens in, completions of tokens out; or messages in, a text out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

from ..envs import Message, TextEnv

if TYPE_CHECKING:
    from transformers import PreTrainedModel

StopReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled reply, token by token. The non-empty tuples have equal length."""

    text: str  # without the end-of-turn token
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()  # nats, under the distribution sampled from
    entropies: tuple[float, ...] = ()  # nats, of that distribution; empty when not asked for
    stop_reason: StopReason = "stop"  # "stop": ended by an end token or a stop text; "length": cut at max_tokens
    weights_version: int = 0  # version of the weights that sampled its first token
    last_weights_version: int | None = None  # that sampled its last token; None: the same


class Context:
    """The tokens of `parent`, then `token_ids`: what a policy is asked to continue.

    Contexts are compared by identity, so that a policy can keep its work on one (a KV cache)
    for as long as somebody holds the context or a child of it.
    """

    __slots__ = ("__weakref__", "length", "parent", "token_ids")

    def __init__(self, token_ids: tuple[int, ...], parent: Context | None = None) -> None:
        self.token_ids = token_ids
        self.parent = parent
        self.length: int = len(token_ids) + (parent.length if parent else 0)  # tokens, from the start

    def lineage(self) -> list[Context]:
        """The contexts from the first ancestor to this one."""
        spans: list[Context] = []
        context: Context | None = self
        while context is not None:
            spans.append(context)
            context = context.parent
        return spans[::-1]

    def tokens(self) -> list[int]:
        """All tokens, from the start."""
        return [token for span in self.lineage() for token in span.token_ids]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn: from softmax(logits / temperature), the whole distribution.

    There is no top-p: its log-probabilities would not be the learner's.
    """

    temperature: float = 1.0  # 0: the most likely token
    max_tokens: int = 64  # per turn
    max_context: int = 2048  # tokens of an episode; a turn that would not fit is not begun
    max_calls: int | None = None  # tool calls of an episode; the turn that reaches them is its last
    entropy: bool = False  # whether completions have entropies
    entropy_top: int = 0  # entropies sum over this many of the likeliest tokens, not renormalised; 0: over all
    stop: tuple[str, ...] = ()  # a turn ends with the token that completes one of these texts, which stays in it

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.max_tokens < 1:
            raise ValueError(f"temperature must be >= 0 and max_tokens >= 1, got {self}")
        if self.entropy_top < 0 or (self.max_calls is not None and self.max_calls < 1):
            raise ValueError(f"max_calls must be >= 1 and entropy_top >= 0, got {self}")
        if isinstance(self.stop, str) or not all(self.stop):
            raise ValueError(f"stop must be a list of texts, none of them empty, got {self.stop!r}")


@dataclass(frozen=True, slots=True)
class Sample:
    """What a policy gives: the completion, and the context that ends with it."""

    completion: Completion
    context: Context


@runtime_checkable
class TokenPolicy(Protocol):
    """A policy that continues tokens: a model in this process or on a server, whose tokens can be trained on."""

    async def sample(self, context: Context, seed: int, sampling: Sampling) -> Sample:
        """One completion; equal arguments and weights give equal tokens."""
        ...


@runtime_checkable
class TextPolicy(Protocol):
    """A policy that writes words, and may look at the environment itself: an oracle, a person, a chat server."""

    async def act(self, messages: Sequence[Message], env: TextEnv, seed: int) -> str:
        """The next action after these messages; `env` is in the state they led to and is not to be changed.

        A policy looks at `env` before its first await only: from then on another rollout may step it.
        """
        ...


Policy = TokenPolicy | TextPolicy


@runtime_checkable
class Lockstep(Protocol):
    """A policy that wants to know how many callers it has, to wait until all of them have asked."""

    def expect(self, callers: int) -> None:
        """The engine announces that `callers` more (negative: fewer) coroutines will call `sample`."""
        ...


@runtime_checkable
class WeightSync(Protocol):
    """What a trainer needs of a policy, beside its samples, to improve it: new weights go to it after every step."""

    def release(self) -> None:
        """Gives back the memory of weights and caches: the weights are about to move. `push` comes before the next
        sample."""
        ...

    async def push(self, model: PreTrainedModel, version: int) -> None:
        """Takes over the model's present weights; from now on completions name them by this version."""
        ...


@runtime_checkable
class OwnWeights(Protocol):
    """A policy that samples with weights of its own, as a server does. Where `improvement.max_lag` is above 0, it is
    asked for samples while the model's weights move, and `push` comes while it samples."""

    def moving(self) -> AbstractAsyncContextManager[None]:
        """Entered while the model's weights move. The policy must not read them from then on until `push`."""
        ...


@runtime_checkable
class Served(Protocol):
    """A policy with connections, or with servers of its own: opened in the event loop that it plays in, and closed
    there."""

    async def open(self, sampling: Sampling) -> None:
        """Brings it up. Raises where it cannot sample so."""
        ...

    async def close(self) -> None: ...


class ContextLengthExceeded(Exception):
    """The policy cannot reply: the context is as long as its model takes, or leaves no room."""


class CutReply(str):
    """An action that reached the limit of its tokens before its end."""

    __slots__ = ()


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from the parts, the same on every machine."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def uniform(seed: int, position: int) -> float:
    """The number in [0, 1) that draws the token at this position: splitmix64 of seed and counter."""
    mask = (1 << 64) - 1
    z = (seed + (position + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return float((z ^ (z >> 31)) >> 11) / float(1 << 53)
