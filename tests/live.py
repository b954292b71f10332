"""What tests of a real vLLM server share."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import httpx2
import pytest
from transformers import PreTrainedModel

from treegym.agents.serving import Server
from treegym.agents.serving.launch import EXECUTABLE
from treegym.agents.serving.probe import continuation_logprobs

LIVE = [
    pytest.mark.vllm,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        not os.environ.get(EXECUTABLE), reason=f"{EXECUTABLE} names no vllm; make test-vllm installs one"
    ),
]
TOLERANCE, APART = 1e-3, 0.1  # nats


@asynccontextmanager
async def connected(url: str, kind: type[Server] = Server, at_once: int = 32) -> AsyncIterator[Server]:
    server = kind(url, at_once=at_once)
    try:
        yield server
    finally:
        await server.close()


async def continued(server: Server, name: str, prompt: list[int], tokens: int = 8) -> dict[str, Any]:
    sampling = {"seed": 1, "max_tokens": tokens, "ignore_eos": True, "logprobs": 0}
    body = {"model": name, "token_ids": prompt, "sampling_params": sampling}
    return await server.ask("inference/v1/generate", body, timeout=300)


def deviation(
    reply: Mapping[str, Any], model: PreTrainedModel, prompt: list[int], begin: int = 0, end: int | None = None
) -> float:
    """How far the reply's log-probabilities are from the model's at the tokens from `begin` to `end`."""
    [choice] = reply["choices"]
    own = continuation_logprobs(model, prompt, choice["token_ids"])
    rows: list[float] = [row["logprob"] for row in choice["logprobs"]["content"]]
    return max(abs(a - b) for a, b in list(zip(rows, own, strict=True))[begin:end])


def metric(url: str, name: str) -> float:
    """What the server's own count of this name stands at."""
    text = httpx2.get(f"{url}/metrics").text
    return sum(map(float, re.findall(rf"^vllm:{name}{{.*}} (.*)$", text, re.MULTILINE)))


async def until(holds: Callable[[], bool], seconds: float = 60.0) -> None:
    async with asyncio.timeout(seconds):
        while not holds():
            await asyncio.sleep(0.1)
