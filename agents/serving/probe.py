"""The check of a push: a server continues a prompt, and its log-probabilities are compared with the model's own."""

from __future__ import annotations

import asyncio
import math
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..rollouts.failure import FailureCause
from .client import Server, ServerError

if TYPE_CHECKING:  # torch takes seconds to import
    import torch
    from transformers import PreTrainedModel

CHECK = "treegym-check"  # in the id of requests that are answered during a pause; extension/treegym_vllm.py has it too


@dataclass(frozen=True, slots=True)
class Check:
    """How log-probabilities of the server are compared with those of the model here."""

    prefix: tuple[int, ...] = ()  # token ids that the server caches; empty: drawn from the vocabulary
    length: int = 256  # of a prefix that is drawn; a server that takes fewer tokens gets as many as fit
    tokens: int = 8  # of the continuation
    tolerance: float | None = None  # nats, of any token; None: 1e-3 where the server computes in float32, else 0.5

    def prompt(self, vocabulary: int, limit: int) -> list[int]:
        """The prefix and one more token: a server computes the last token of a prompt even if it is cached."""
        drawn = random.Random(0).choices(range(vocabulary), k=(len(self.prefix) or self.length) + 1)
        return [*self.prefix, *drawn[len(self.prefix) :]][: limit - self.tokens]


@dataclass(frozen=True, slots=True)
class Probe:
    """Asks the server to continue a prompt, and the model how likely it finds that."""

    server: Server
    model: PreTrainedModel
    prompt: list[int]
    tokens: int
    tolerance: float
    timeout: float  # seconds

    async def warm(self, name: str) -> None:
        """Has the server cache the prefix under its present weights, so that a reset that is left out will be seen."""
        await self._continuation(name, 1)

    async def check(self, name: str) -> None:
        """ServerError where the server, asked for the model of this name, computes something else than the model."""
        deviation = await self.deviation(name)
        if not deviation <= self.tolerance:
            raise ServerError(
                f"{self.server.url} does not have the weights: a token's log-probability is {deviation:.2g} nats from "
                f"the model's, more than {self.tolerance:g}",
                FailureCause.MALFORMED,
            )

    async def deviation(self, name: str) -> float:
        """How far any token's log-probability is from the model's own, in nats."""
        tokens, logprobs = await self._continuation(name, self.tokens)
        own = await asyncio.to_thread(continuation_logprobs, self.model, self.prompt, tokens)
        apart = [abs(a - b) for a, b in zip(logprobs, own, strict=True)]
        return max(apart) if all(map(math.isfinite, apart)) else math.inf

    async def _continuation(self, name: str, tokens: int) -> tuple[list[int], list[float]]:
        body = {
            "request_id": f"{CHECK}-{os.urandom(4).hex()}",
            "model": name,
            "token_ids": self.prompt,
            "sampling_params": {"seed": 0, "max_tokens": tokens, "ignore_eos": True, "logprobs": 0, "temperature": 1.0},
        }
        reply = await self.server.ask("inference/v1/generate", body, timeout=self.timeout, patience=0)
        [choice] = reply["choices"]
        if len(choice["token_ids"]) != tokens:
            raise ServerError(f"{self.server.url} ended the check's request ({choice['finish_reason']})")
        return choice["token_ids"], [row["logprob"] for row in choice["logprobs"]["content"]]


def continuation_logprobs(model: PreTrainedModel, prompt: Sequence[int], tokens: Sequence[int]) -> list[float]:
    """The log-probability, in nats, that the model gives to each of the tokens that continue the prompt."""
    import torch

    ids = torch.tensor([*prompt, *tokens], device=model.device)
    with torch.no_grad():
        logits = _logits(model, ids[:-1])[len(prompt) - 1 :]
        rows = torch.log_softmax(logits.float(), -1).gather(1, ids[len(prompt) :, None])
    found: list[float] = rows[:, 0].tolist()
    return found


def _logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Logits [T, vocabulary] of a plain sequence [T], whichever attention the model is switched to."""
    import torch

    from ..inference.attention import BROUGHT, causal_attention, tree_logits

    if model.config._attn_implementation != BROUGHT:
        plain: Any = model
        logits: torch.Tensor = plain(ids[None], use_cache=False).logits[0]
        return logits
    positions = torch.arange(len(ids), device=ids.device)
    return tree_logits(model, ids, positions, lambda layer, *tensors: causal_attention(*tensors))
