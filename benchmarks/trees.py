"""Chains and trees with as many leaves: what growing and training them costs. Writes docs/results/trees.md.

    python benchmarks/trees.py           # nine minutes on two quiet cores
    python benchmarks/trees.py --quick   # fewer points, one round, for a look

The policy is the warmed-up one of benchmarks/algorithms.py, which is made first where there is none. Sides of a
comparison take turns, and a ratio is the median of its rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import torch
from algorithms import RESULTS, warm_up
from grpo_step import EndlessRenderer, ToyEnv  # noqa: F401  (importing it registers the environment)
from matplotlib import pyplot  # draws svg: algorithms sets it
from task import TEMPLATE
from update import work

from treegym.__main__ import tune_malloc
from treegym.agents import ChatRenderer, Cost, RolloutStrategy, RolloutTree, Sampling, grow_trees
from treegym.agents.inference.forward import native_dtype
from treegym.agents.models.registry import load
from treegym.agents.policies.sampler import TransformersPolicy
from treegym.agents.rollouts import Chains, EntropyBranching, TreeExpansion
from treegym.envs import Task
from treegym.trainers import Learner, Optimization, tree_grpo
from treegym.trainers.packing import Pack

TASKS = 4  # at a time
LEAVES = 8  # a task, on FactSearch
STRATEGIES: dict[str, Callable[[int], RolloutStrategy]] = {  # by the number of leaves
    "chains": Chains,
    "ARPO": lambda n: EntropyBranching(n // 2, n),
    "Tree-GRPO": lambda n: TreeExpansion(2, n // 2 - 1, 1),
}
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (native_dtype(torch.device("cpu")), torch.float32)}
TURN_TOKENS = 16  # in the environment where turns are forced
TURNS, WIDTHS = (2, 4, 8, 16), (4, 8, 16, 32, 64)

Row = dict[str, Any]


class Grower:
    """Grows trees of an environment with a model."""

    def __init__(self, model: Any, renderer: ChatRenderer, sampling: Sampling) -> None:
        self.renderer, self.sampling = renderer, sampling
        self.policy = TransformersPolicy(model, renderer, max_rows=64)

    def grow(self, tasks: Sequence[Task], strategy: RolloutStrategy, seed: int) -> tuple[list[RolloutTree], Row]:
        """The trees, and what they took."""
        self.policy.refresh(seed)  # forgets the keys and values of the last time
        before, start = self.policy.sampled_tokens, time.perf_counter()
        trees = asyncio.run(grow_trees(tasks, strategy, self.policy, self.renderer, self.sampling, seed=seed))
        seconds = time.perf_counter() - start
        cost = sum((tree.cost for tree in trees), Cost())
        decoded = self.policy.sampled_tokens - before
        return trees, {**asdict(cost), "decoded_tokens": decoded, "seconds": seconds}


def on_factsearch(model: Any, tokenizer: Any, rounds: int) -> dict[str, list[Row]]:
    """What 8 leaves a task take, and the Tree-GRPO trees' update packed and written out, in each dtype."""
    grower = Grower(model, ChatRenderer(tokenizer), Sampling(max_tokens=32, max_context=640))
    still = Optimization(learning_rate=0.0, max_tokens=1 << 20)
    learners = {name: Learner(model, still, dtype=dtype) for name, dtype in DTYPES.items()}
    algorithm = tree_grpo(2, LEAVES // 2 - 1)
    rows: defaultdict[str, list[Row]] = defaultdict(list)
    settings = {"top_k": 2, "max_turns": 4}
    for round in range(rounds + 1):  # the first one warms up
        tasks = [
            Task("treegym/FactSearch-v0", 100 * round + i, {"split": "train", "hops": 2}, settings)
            for i in range(TASKS)
        ]
        found, grown = {}, {}
        for name, strategy in STRATEGIES.items():
            grown[name], found[name] = grower.grow(tasks, strategy(LEAVES), round)
        trees = grown["Tree-GRPO"]
        scored = list(zip(trees, algorithm.advantage(trees), strict=True))
        # Another first token for each leaf: nothing is shared, as without a tree.
        first = count()
        apart = [
            (replace(tree, prompt=(next(first), *tree.prompt[1:]), leaves=(leaf,), origins=()), [advantages[i]])
            for tree, advantages in scored
            for i, leaf in enumerate(tree.leaves)
        ]
        grower.policy.release()
        for dtype, learner in learners.items():
            for name, batch in (("packed", scored), ("written out", apart)):
                packs: list[Pack] = []
                start = time.perf_counter()
                metrics = learner.update(batch, algorithm.loss, on_pack=packs.append)
                seconds, done = time.perf_counter() - start, sum(work(pack, model) for pack in packs)
                found[f"{name} {dtype}"] = {"seconds": seconds, "tokens": metrics["trained_tokens"], "work": done}
        for name, row in found.items():
            if round:
                rows[name].append(row)
                print(f"factsearch, round {round}, {name}: {row}", flush=True)
    return rows


def by_size(model: Any, tokenizer: Any, rounds: int, widths: Sequence[int], turns: Sequence[int]) -> list[Row]:
    """What one tree takes as its leaves and its turns grow, every turn of as many tokens."""
    tokenizer.chat_template = TEMPLATE
    grower = Grower(model, EndlessRenderer(tokenizer), Sampling(max_tokens=TURN_TOKENS, max_context=4096))
    sizes = [(width, 4) for width in widths] + [(8, depth) for depth in turns if depth != 4]
    rows: list[Row] = []
    for round in range(rounds):
        for leaves, depth in sizes:
            for name, strategy in STRATEGIES.items():
                task = Task("benchmarks/Toy-v0", round, {"turns": depth})
                _, row = grower.grow([task], strategy(leaves), round)
                rows.append({"strategy": name, "leaves": leaves, "turns": depth, **row})
                print(f"size, round {round}: {rows[-1]}", flush=True)
    return rows


def table(rows: Mapping[str, Sequence[Row]]) -> list[str]:
    """Medians of the rounds; ratios are of each round."""
    names = ("sampled_tokens", "repeated_tokens", "decoded_tokens", "prefill_tokens", "tool_calls", "repeated_calls")
    lines = [
        "| | sampled | in given replies | decoded | prefilled | tool calls | repeated | seconds | ÷ chains |",
        "|---" * 9 + "|",
    ]
    for name in STRATEGIES:
        cells = [f"{median(row[key] for row in rows[name]):,.0f}" for key in names]
        seconds = median(row["seconds"] for row in rows[name])
        lines.append(f"| {name} | {' | '.join(cells)} | {seconds:.1f} | {ratio(rows[name], rows['chains'])} |")
    lines += [
        "",
        "| the update of the Tree-GRPO trees: packed ÷ written out | tokens | work | time | target |",
        "|---|---|---|---|---|",
    ]
    for dtype in DTYPES:
        pair = rows[f"packed {dtype}"], rows[f"written out {dtype}"]
        bound = 1.1 * median(a["tokens"] / b["tokens"] for a, b in zip(*pair, strict=True))
        cells = " | ".join(ratio(*pair, key) for key in ("tokens", "work", "seconds"))
        lines.append(f"| {dtype} | {cells} | at most {bound:.2f} |")
    return lines


def ratio(ones: Sequence[Row], others: Sequence[Row], key: str = "seconds") -> str:
    found = [one[key] / other[key] for one, other in zip(ones, others, strict=True)]
    return f"{median(found):.2f} ({min(found):.2f} to {max(found):.2f})"


def plot(rows: Sequence[Row], file: Path) -> None:
    """Seconds and decoded tokens against leaves (4 turns) and turns (8 leaves)."""
    figure, axes = pyplot.subplots(2, 2, figsize=(8, 6), sharey="row")
    for column, (varied, fixed, value) in enumerate((("leaves", "turns", 4), ("turns", "leaves", 8))):
        chosen = [row for row in rows if row[fixed] == value]
        sizes = sorted({row[varied] for row in chosen})
        for line, key in enumerate(("decoded_tokens", "seconds")):
            for name in STRATEGIES:
                points = [
                    median(row[key] for row in chosen if row["strategy"] == name and row[varied] == size)
                    for size in sizes
                ]
                axes[line][column].plot(sizes, points, "o-", label=name, markersize=4)
            axes[line][column].set(xlabel=f"{varied} ({value} {fixed})", ylabel=key.replace("_", " "))
            axes[line][column].set_xscale("log", base=2)
            axes[line][column].set_yscale("log")
            axes[line][column].grid(alpha=0.3)
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    tune_malloc()  # as the command does
    start = warm_up("factsearch")
    start.run()
    model, tokenizer = load(start.folder / "model")
    rounds = 1 if args.quick else args.repeats
    factsearch = on_factsearch(model, tokenizer, rounds)
    few = 2 if args.quick else None
    sizes = by_size(model, tokenizer, rounds, WIDTHS[:few], TURNS[:few])
    text = [
        "# Chains and trees",
        "",
        "Made by `python benchmarks/trees.py`: SmolLM2-135M, warmed up on two-hop FactSearch. Medians of the rounds,",
        "ratios with the lowest and the highest.",
        "",
        f"## {TASKS} FactSearch tasks, {LEAVES} leaves each",
        "",
        "Sampled tokens and tool calls are those of a tree's turns, each once. Where a rollout says what another has",
        "said at that point, the turn is shared, under chains too: that is in given replies and repeated, which an",
        "engine without trees pays for again. Decoded is what the engine computed: rollouts that have said the same so",
        "far are one row until they differ. Work is what an update must multiply; passes over weights, gradients and",
        "moments, which it takes however few its tokens, are in both sides' time.",
        "",
        *table(factsearch),
        "",
        "## One tree as it grows",
        "",
        f"Every turn has {TURN_TOKENS} tokens, every rollout as many turns.",
        "",
        "![cost by leaves and turns](trees.svg)",
    ]
    if args.quick:
        print("\n".join(text))
        return
    RESULTS.mkdir(parents=True, exist_ok=True)
    plot(sizes, RESULTS / "trees.svg")
    (RESULTS / "trees.md").write_text("\n".join(text) + "\n")
    (RESULTS / "trees.json").write_text(json.dumps({"factsearch": factsearch, "sizes": sizes}) + "\n")


if __name__ == "__main__":
    main()
