"""An optimiser step on eight rollouts: packed as a tree, or written out one by one."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from task import PROMPT_TOKENS, RESULT_TOKENS, TURN_TOKENS, TURNS
from worker import serve

from treegym.__main__ import tune_malloc
from treegym.agents import ROOT, Completion, Node, RolloutTree
from treegym.agents.models.registry import load
from treegym.envs import Task
from treegym.trainers import Advantages, Learner, Optimization
from treegym.trainers.losses import ClippedLoss
from treegym.trainers.packing import Pack

WIDTHS = {"chains": (8, 8, 8, 8), "tree": (2, 4, 8, 8), "unpacked": (1, 1, 1, 1)}  # nodes at each turn


def grow(widths: Sequence[int], vocabulary: int, seed: int) -> RolloutTree:
    """A tree of random tokens."""
    draw = random.Random(seed)

    def some(n: int) -> tuple[int, ...]:
        return tuple(draw.randrange(1000, vocabulary) for _ in range(n))

    nodes: list[Node] = []
    level = [ROOT]
    for turn, width in enumerate(widths):
        result = RESULT_TOKENS if turn < TURNS - 1 else 0
        level, above = list(range(len(nodes), len(nodes) + width)), level
        for i in range(width):
            action = Completion("", some(TURN_TOKENS), (-11.0,) * TURN_TOKENS)
            nodes.append(Node(above[i * len(above) // width], action, some(result)))
    return RolloutTree(Task("", seed), some(PROMPT_TOKENS), (), tuple(nodes), tuple(level))


def score(tree: RolloutTree) -> tuple[RolloutTree, Advantages]:
    return tree, [[(-1.0) ** rollout] * TURNS for rollout in range(len(tree.leaves))]


def work(pack: Pack, model: Any) -> float:
    """Multiplications, in 10¹², of a pass forward and back: of weights with tokens, of the output layer, whose logits
    are computed twice, with the tokens that something is predicted after, and of queries with keys and values."""
    config = model.config
    blocks = sum(weight.numel() for weight in model.model.layers.parameters())
    pairs = (pack.positions + 1).sum().item() * config.num_attention_heads * model.model.layers[0].self_attn.head_dim
    of_blocks = 3 * blocks * len(pack.tokens) + 7 * pairs * config.num_hidden_layers
    return (of_blocks + 4 * model.lm_head.weight.numel() * len(pack.rows)) / 1e12


def prepare(model: str, dtype: str, layout: str) -> Callable[[], dict[str, float]]:
    loaded, _ = load(Path(model))
    # All tokens in one pass, packed or not: a batch of eight rows without padding is what packing is compared with.
    learner = Learner(loaded, Optimization(learning_rate=1e-6, max_tokens=8192), dtype=getattr(torch, dtype))
    size, loss = loaded.config.vocab_size, ClippedLoss()
    batch = [score(grow(WIDTHS[layout], size, seed)) for seed in range(8 if layout == "unpacked" else 1)]

    def measure() -> dict[str, float]:
        learner.update(batch, loss)  # what a process has not used for a while may not be in memory
        packs: list[Pack] = []
        start = time.perf_counter()
        metrics = learner.update(batch, loss, on_pack=packs.append)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "tokens": metrics["trained_tokens"], "work": sum(work(p, loaded) for p in packs)}

    return measure


if __name__ == "__main__":
    tune_malloc()  # as the command does
    serve(prepare)
