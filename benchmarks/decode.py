"""Tokens per second while decoding, the prompts computed before: treegym's sampler, or transformers' generate."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from grpo_step import EndlessRenderer
from task import PROMPT_TOKENS
from worker import serve

from treegym.__main__ import tune_malloc
from treegym.agents import Context, Sampling
from treegym.agents.inference.forward import native_dtype
from treegym.agents.models.registry import load
from treegym.agents.policies.sampler import TransformersPolicy

ROWS, NEW_TOKENS = 32, 32
Decode = Callable[[int, int], None]  # (rows, new tokens)


def prompts(vocabulary: int) -> list[tuple[int, ...]]:
    draw = random.Random(0)
    return [tuple(draw.randrange(1000, vocabulary) for _ in range(PROMPT_TOKENS)) for _ in range(ROWS)]


def treegym(model: str) -> Decode:
    loaded, tokenizer = load(Path(model))
    policy = TransformersPolicy(loaded, EndlessRenderer(tokenizer))
    contexts = [Context(tokens) for tokens in prompts(loaded.config.vocab_size)]

    async def sample(rows: int, new_tokens: int) -> None:
        sampling = Sampling(max_tokens=new_tokens)
        await asyncio.gather(*(policy.sample(contexts[i], i, sampling) for i in range(rows)))

    return lambda rows, new_tokens: asyncio.run(sample(rows, new_tokens))


def generate(model: str) -> Decode:
    loaded: Any = load(Path(model), dtype=native_dtype(torch.device("cpu")))[0]
    tokens = torch.tensor(prompts(loaded.config.vocab_size))

    def decode(rows: int, new_tokens: int) -> None:
        length = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
        whole = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        loaded.generate(tokens[:rows], attention_mask=torch.ones_like(tokens[:rows]), **length, **whole)

    return decode


def prepare(model: str, engine: str) -> Callable[[int], dict[str, float]]:
    decode = {"treegym": treegym, "generate": generate}[engine](model)

    def seconds(rows: int, new_tokens: int) -> float:
        start = time.perf_counter()
        decode(rows, new_tokens)
        return time.perf_counter() - start

    def measure(rows: int) -> dict[str, float]:
        prompt = seconds(rows, 1)
        return {"prompt": prompt, "speed": rows * NEW_TOKENS / (seconds(rows, NEW_TOKENS + 1) - prompt)}

    decode(1, NEW_TOKENS + 1)  # warms up, the longest first: room for keys and values is made once
    for rows in (8, ROWS):
        decode(rows, 2)  # treegym keeps the prompts' keys and values from here on
    return measure


if __name__ == "__main__":
    tune_malloc()  # as the command does
    serve(prepare)
