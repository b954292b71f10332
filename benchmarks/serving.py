"""A vLLM server beside the engine of this process, what its blocks save, and what a push costs, as ratios.

    python benchmarks/serving.py                        # every part: 24 minutes on two cores that had other work too
    python benchmarks/serving.py --parts speed blocks   # these parts; the page keeps what it has of the others
    python benchmarks/serving.py --report               # the page alone, from the figures that there are
    python benchmarks/serving.py --quick                # few tokens and one round, for a look; writes nothing

SmolLM2 on the CPU. TREEGYM_VLLM names the vllm that is started, as for `treegym serve`; `.ci/with-vllm` installs one
and runs a command with it. The figures are in docs/results/serving.json, the page is docs/results/serving.md.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import inspect
import json
import os
import platform
import random
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command has it; importing treegym after torch is too late

import torch
from task import PROMPT_TOKENS
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from treegym.__main__ import tune_malloc
from treegym.agents import ChatRenderer, Context, RolloutStrategy, RolloutTree, Sampling, TokenPolicy, grow_trees
from treegym.agents.models.lora import add_lora
from treegym.agents.models.registry import fetch, load
from treegym.agents.policies.sampler import TransformersPolicy
from treegym.agents.policies.vllm import GENERATE, Push, VLLMPolicy
from treegym.agents.rollouts import Chains, TreeExpansion
from treegym.agents.serving import Server
from treegym.agents.serving.launch import ServerOptions, launch
from treegym.agents.serving.sync import Way, push
from treegym.agents.serving.ways import Files, Lora
from treegym.envs import Task
from treegym.scenarios.build import usable_cores
from treegym.trainers import Learner, Optimization
from treegym.trainers.losses import ClippedLoss

RESULTS = Path(__file__).parent.parent / "docs" / "results"
PAGE, FIGURES = RESULTS / "serving.md", RESULTS / "serving.json"
MARK = "<!-- What follows is written by hand. -->\n"
NAME = "smollm2"
RANK = 8
ENGINES = ("in-process", "vLLM")
BLOCKS = (32, 128)
STRATEGIES: dict[str, RolloutStrategy] = {
    "Chains(8)": Chains(8),
    "TreeExpansion(1, 3, 1)": TreeExpansion(1, 3, 1),
}
SAMPLING = Sampling(max_tokens=32, max_context=640)  # the quickstart's
SETTINGS = {"top_k": 2, "max_turns": 4}
TITLE = """# A model in vLLM

`python benchmarks/serving.py`: SmolLM2-135M in a vLLM server on the CPU, started as `treegym serve` starts it, beside
the engine in the process. One server runs at a time, and while one side is timed the other idles. A ratio is the median
of its rounds, with the lowest and the highest; other figures are medians. The engine in the process computes on all
cores; vLLM leaves one to its scheduler, as is its default, and computes on the others.
"""

Row = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    rounds: int
    branches: tuple[int, ...] = (1, 8, 32)
    tokens: int = 64  # sampled by each branch
    tasks: int = 4


@dataclass(frozen=True)
class Kind:
    """A server, and the parts that ask it."""

    parts: tuple[str, ...]
    dtype: str
    block: int = 32
    lora_rank: int = 0

    def serving(self) -> ServerOptions:
        more = ("--block-size", str(self.block), "--enable-prompt-tokens-details")
        return ServerOptions(
            str(fetch(NAME)),
            name=NAME,
            dtype=self.dtype,
            max_model_len=1024,
            lora_rank=self.lora_rank,
            device="cpu",
            cache=1,
            more=more,
        )


KINDS = (
    Kind(("speed", "blocks", "mismatch"), "bfloat16"),
    Kind(("blocks",), "bfloat16", block=BLOCKS[1]),
    Kind(("push", "mismatch"), "float32", lora_rank=RANK),
)


class CountingServer(Server):
    """Adds up the prompt tokens that the server computed because they were not in its prefix cache."""

    computed = 0

    async def ask(self, path: str, *arguments: Any, **settings: Any) -> dict[str, Any]:
        reply = await super().ask(path, *arguments, **settings)
        if path == GENERATE:
            usage = reply["usage"]
            self.computed += usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"]
        return reply


@dataclass
class Bench:
    """What the parts share, and the rows that they measured."""

    model: PreTrainedModel  # float32
    tokenizer: PreTrainedTokenizerBase
    sizes: Sizes
    rows: dict[str, list[Row]] = field(default_factory=dict)

    def note(self, part: str, **row: Any) -> None:
        self.rows.setdefault(part, []).append(row)
        print(f"{part}: {row}", flush=True)

    def engines(self, kind: Kind, server: Server, renderer: ChatRenderer) -> dict[str, TokenPolicy]:
        dtype, rows = getattr(torch, kind.dtype), max(self.sizes.branches)
        here = TransformersPolicy(self.model, renderer, dtype=dtype, max_rows=rows)
        return dict(zip(ENGINES, (here, VLLMPolicy([server], NAME, renderer)), strict=True))

    def tasks(self, round: int) -> list[Task]:
        """The tasks of a step."""
        seeds = range(100 * round, 100 * round + self.sizes.tasks)
        return [Task("treegym/FactSearch-v0", seed, {"split": "train", "hops": 2}, SETTINGS) for seed in seeds]


async def speed(bench: Bench, kind: Kind, server: CountingServer) -> None:
    """Sampled tokens a second in bfloat16, from the first request to the last reply: 64 tokens of each branch, after
    prompts of 271 random tokens that neither side has seen before. All branches have one prompt, or each has its own.
    No token ends a turn."""
    renderer = ChatRenderer(bench.tokenizer)
    renderer.ends = frozenset()
    engines = bench.engines(kind, server, renderer)
    sampling = Sampling(max_tokens=bench.sizes.tokens, max_context=512)
    seeds, branches = count(), sorted(bench.sizes.branches, reverse=True)
    for policy in engines.values():  # room for keys and values is made, the server's first request is slow
        await _speed(policy, _contexts(bench, next(seeds), branches[0], shared=False), sampling)
    for round in range(bench.sizes.rounds):
        for number in branches:
            for shared in (True, False):
                seed = next(seeds)
                for name in ENGINES[:: -1 if round % 2 else 1]:
                    value = await _speed(engines[name], _contexts(bench, seed, number, shared=shared), sampling)
                    bench.note("speed", engine=name, branches=number, shared=shared, round=round, speed=value)


def _contexts(bench: Bench, seed: int, number: int, *, shared: bool) -> list[Context]:
    """The prompts of so many branches, drawn from the vocabulary."""
    draw = random.Random(seed)
    prompts = [draw.choices(range(1000, bench.model.config.vocab_size), k=PROMPT_TOKENS) for _ in range(number)]
    contexts = [Context(tuple(tokens)) for tokens in prompts]
    return contexts[:1] * number if shared else contexts


async def _speed(policy: TokenPolicy, contexts: Sequence[Context], sampling: Sampling) -> float:
    start = time.perf_counter()
    requests = (policy.sample(context, seed, sampling) for seed, context in enumerate(contexts))
    lengths = [len(sample.completion.token_ids) for sample in await asyncio.gather(*requests)]
    seconds = time.perf_counter() - start
    assert lengths == [sampling.max_tokens] * len(contexts), lengths
    return sum(lengths) / seconds


async def blocks(bench: Bench, kind: Kind, server: CountingServer) -> None:
    """Servers with blocks of 32 and of 128 tokens, in bfloat16, one after the other, grow the same trees on FactSearch,
    one tree at a time. Computed are the tokens of prompts that were not in the prefix cache, which a new salt empties
    for every tree. Unique tokens are those of a tree, each once. The model is untrained and seldom calls the tool, so
    that half of them are its own, which need no computing as a prompt. A ratio is of one tree."""
    policy = VLLMPolicy([server], NAME, ChatRenderer(bench.tokenizer))
    for round in range(bench.sizes.tasks + 1):
        for name, strategy in STRATEGIES.items():
            policy.weights_version += 1  # the salt
            before = server.computed
            trees, seconds = await _grown(bench, policy, bench.tasks(round)[:1], strategy)
            computed, unique = server.computed - before, trees[0].num_unique_tokens
            if round:  # the first one warms up
                counted = {"computed": computed, "unique": unique, "sampled": trees[0].num_sampled_tokens}
                figures = {**counted, "share": computed / unique, "seconds": seconds}
                bench.note("blocks", strategy=name, block=kind.block, round=round, **figures)


async def pushes(bench: Bench, kind: Kind, server: CountingServer) -> None:
    """A push of new weights, with its checks, and the rollout of a step with them: 4 FactSearch tasks, 4 rollouts each,
    at most 32 tokens a turn. Server and learner are in float32; `Lora` sends an adapter of rank 8 on all linear layers,
    and its rollouts ask for the adapter."""
    adapted = copy.deepcopy(bench.model)
    add_lora(adapted, RANK, 2 * RANK, seed=0)
    renderer = ChatRenderer(bench.tokenizer)
    ways: dict[str, tuple[Way, PreTrainedModel]] = {"Files": (Files(), bench.model), "Lora": (Lora(), adapted)}
    policies = {name: VLLMPolicy([server], NAME, renderer, push=_by(way)) for name, (way, _) in ways.items()}
    for name, policy in policies.items():
        await policy.push(ways[name][1], 1)  # warms up
    for round in range(bench.sizes.rounds):
        for name, policy in policies.items():
            start = time.perf_counter()
            await policy.push(ways[name][1], round + 2)
            seconds = time.perf_counter() - start
            trees, rollout = await _grown(bench, policy, bench.tasks(round), Chains(4))
            sampled = sum(tree.num_sampled_tokens for tree in trees)
            bench.note("push", way=name, round=round, push=seconds, rollout=rollout, sampled=sampled)


def _by(way: Way) -> Push:
    async def pushed(server: Server, model: PreTrainedModel, version: int) -> str:
        return await push(server, way, model, version)

    return pushed


async def mismatch(bench: Bench, kind: Kind, server: CountingServer) -> None:
    """How far the log-probabilities of the sampler are from those of the learner, which computes in the same dtype:
    `sampler_deviation`, `sampler_deviation_max` and `sampler_ratios_off` of a step of 4 FactSearch tasks, 4 rollouts
    each, as the metrics of a training run have them. Each engine is judged on the tokens that it sampled."""
    learner = Learner(bench.model, Optimization(learning_rate=0.0), dtype=getattr(torch, kind.dtype))
    for name, policy in bench.engines(kind, server, ChatRenderer(bench.tokenizer)).items():
        trees, _ = await _grown(bench, policy, bench.tasks(0), Chains(4))
        scored = [(tree, [[1.0] * len(path) for path in tree.paths]) for tree in trees]
        found = learner.update(scored, ClippedLoss())  # with a rate of 0 no weight moves
        figures = {"mean": found["ratio_deviation"], "max": found["ratio_deviation_max"], "off": found["ratios_off"]}
        bench.note("mismatch", engine=name, dtype=kind.dtype, tokens=found["loss_terms"], **figures)


async def _grown(
    bench: Bench, policy: TokenPolicy, tasks: Sequence[Task], strategy: RolloutStrategy
) -> tuple[list[RolloutTree], float]:
    """The trees, and the seconds that they took."""
    start = time.perf_counter()
    trees = await grow_trees(tasks, strategy, policy, ChatRenderer(bench.tokenizer), SAMPLING, seed=tasks[0].seed)
    return trees, time.perf_counter() - start


Measure = Callable[[Bench, Kind, CountingServer], Awaitable[None]]
PARTS: dict[str, Measure] = {"speed": speed, "blocks": blocks, "push": pushes, "mismatch": mismatch}


async def measured(parts: Sequence[str], sizes: Sizes) -> dict[str, Any]:
    """The rows of the parts, with the machine that they were measured on."""
    bench, vllm = Bench(*load(NAME), sizes), ""
    for kind in KINDS:
        wanted = [part for part in kind.parts if part in parts]
        if not wanted:
            continue
        print(f"starting a server in {kind.dtype}, blocks of {kind.block}, for {', '.join(wanted)}", flush=True)
        with launch(kind.serving()) as started:
            server = CountingServer(started.url, timeout=600)
            vllm = (await server.ask("version"))["version"]
            for part in wanted:
                await PARTS[part](bench, kind, server)
            await server.close()
    return {part: {"machine": machine(vllm), "rows": rows} for part, rows in bench.rows.items()}


def machine(vllm: str) -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    processor = next((line.partition(": ")[2] for line in lines if "model name" in line), platform.machine())
    amx = " with AMX" if any("amx_bf16" in line for line in lines) else ""
    return f"{usable_cores()} cores of {processor}{amx}, torch {version('torch')}, vLLM {vllm}"


# the page


def of(rows: Sequence[Row], **wanted: Any) -> list[Row]:
    return [row for row in rows if wanted.items() <= row.items()]


def middle(rows: Sequence[Row], key: str, form: str) -> str:
    return format(median(row[key] for row in rows), form)


def ratio(ones: Sequence[Row], others: Sequence[Row], key: str, under: str = "") -> str:
    found = [one[key] / other[under or key] for one, other in zip(ones, others, strict=True)]
    return f"{median(found):.2f}" + (f" ({min(found):.2f} to {max(found):.2f})" if len(found) > 1 else "")


def speed_table(rows: Sequence[Row]) -> Iterator[tuple[str, ...]]:
    yield "branches", "prompts", "in-process, tokens/s", "vLLM, tokens/s", "in-process ÷ vLLM"
    for branches in sorted({row["branches"] for row in rows}):
        for shared, prompts in ((True, "one"), (False, "each its own")):
            here, there = (of(rows, engine=name, branches=branches, shared=shared) for name in ENGINES)
            medians = (middle(side, "speed", ".0f") for side in (here, there))
            yield str(branches), prompts, *medians, ratio(here, there, "speed")


def blocks_table(rows: Sequence[Row]) -> Iterator[tuple[str, ...]]:
    yield "", "computed ÷ unique, 32", "128", "computed, 32 ÷ 128", "seconds, 32", "128", "time, 32 ÷ 128"
    for strategy in STRATEGIES:
        sides = small, large = [of(rows, strategy=strategy, block=block) for block in BLOCKS]
        shares = (middle(side, "share", ".2f") for side in sides)
        seconds = (middle(side, "seconds", ".1f") for side in sides)
        yield strategy, *shares, ratio(small, large, "computed"), *seconds, ratio(small, large, "seconds")


def push_table(rows: Sequence[Row]) -> Iterator[tuple[str, ...]]:
    yield "", "push, s", "rollout, s", "sampled tokens", "push ÷ rollout"
    for way in ("Files", "Lora"):
        its = of(rows, way=way)
        medians = (middle(its, key, form) for key, form in (("push", ".1f"), ("rollout", ".1f"), ("sampled", ",.0f")))
        yield f"`{way}`", *medians, ratio(its, its, "push", "rollout")


def mismatch_table(rows: Sequence[Row]) -> Iterator[tuple[str, ...]]:
    yield "", "mean, nats", "maximum, nats", "ratios outside 0.9 to 1.1", "tokens", "mean ÷ in-process"
    for dtype in ("bfloat16", "float32"):
        [here], _ = (of(rows, dtype=dtype, engine=name) for name in ENGINES)
        for row in of(rows, dtype=dtype):
            figures = f"{row['mean']:.2g}", f"{row['max']:.2g}", f"{row['off']:.1%}", f"{row['tokens']:,.0f}"
            yield f"{dtype}, {row['engine']}", *figures, "" if row is here else ratio([row], [here], "mean")


TABLES: dict[str, tuple[str, Callable[[Sequence[Row]], Iterator[tuple[str, ...]]]]] = {
    "speed": ("Sampled tokens a second", speed_table),
    "blocks": ("Blocks of the prefix cache", blocks_table),
    "push": ("A push and its rollout", push_table),
    "mismatch": ("Mismatch of sampler and learner", mismatch_table),
}


def section(part: str, figures: Mapping[str, Any] | None) -> list[str]:
    title, table = TABLES[part]
    lines = [f"## {title}", "", inspect.getdoc(PARTS[part]) or "", ""]
    if figures is None:
        return [*lines, "Not run yet.", ""]
    head, *rows = (f"| {' | '.join(cells)} |" for cells in table(figures["rows"]))
    return [*lines, f"{figures['machine']}.", "", head, "|---" * (head.count("|") - 1) + "|", *rows, ""]


def page(found: Mapping[str, Any]) -> str:
    return "\n".join([TITLE, *(line for part in PARTS for line in section(part, found.get(part)))])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="few tokens and one round; writes nothing")
    parser.add_argument("--report", action="store_true", help="measures nothing, writes the page alone")
    args = parser.parse_args()
    tune_malloc()  # as the command does
    torch.set_num_threads(usable_cores())
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sizes = Sizes(1, branches=(1, 2), tokens=8, tasks=1) if args.quick else Sizes(args.rounds)
    found: dict[str, Any] = json.loads(FIGURES.read_text()) if FIGURES.exists() and not args.quick else {}
    if not args.report:
        found |= asyncio.run(measured(args.parts, sizes))
    print(page(found))
    if args.quick:
        return
    if found:
        FIGURES.write_text(json.dumps(found, indent=1) + "\n")
    by_hand = PAGE.read_text().partition(MARK)[2] if PAGE.exists() else ""
    PAGE.write_text(f"{page(found)}\n{MARK}{by_hand}")


if __name__ == "__main__":
    main()
