"""What storing trees costs, and what they take. Writes docs/results/store.md.

    python benchmarks/store.py                     # ten minutes and 11 GB in the temporary folder
    python benchmarks/store.py --gigabytes 0.1     # for a look, nothing is written to docs

Sides of a comparison take turns, and a ratio is the median of its rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from treegym.agents import (
    ChatRenderer,
    Completion,
    EpisodeStore,
    Policy,
    RolloutStrategy,
    RolloutTree,
    Sampling,
    grow_trees,
)
from treegym.agents.models.nano import build_nano
from treegym.agents.policies import ScriptedPolicy
from treegym.agents.policies.sampler import TransformersPolicy
from treegym.agents.rollouts import Chains, EntropyBranching, TreeExpansion
from treegym.agents.store import Record, TreeSummary, Where
from treegym.agents.store.frames import layout_of
from treegym.agents.store.index import Entry, Index
from treegym.agents.store.records import opening_key, write_record
from treegym.envs import Task

RESULTS = Path(__file__).parent.parent / "docs" / "results"
ROUNDS = 5
TASKS = 4  # grown together
LEAVES = 64
WIDE: dict[str, RolloutStrategy] = {
    "ARPO": EntropyBranching(LEAVES // 4, LEAVES),
    "Tree-GRPO": TreeExpansion(8, 7, 1),
    "chains": Chains(LEAVES),
}
Row = dict[str, Any]


class Grower:
    """Grows trees of the lookup game: with the untrained nano model, or with a script, which takes no time to think."""

    def __init__(self, *, scripted: bool = False) -> None:
        texts = [m.text for task in tasks(0, 64) for m in task.make().reset(seed=task.seed)[1]["messages"]]
        model, tokenizer = build_nano(texts)
        self.renderer = ChatRenderer(tokenizer)
        self.policy: Policy = TransformersPolicy(model, self.renderer, max_rows=64)
        if scripted:
            self.policy = ScriptedPolicy(self.renderer, say)

    def grow(self, chosen: Sequence[Task], strategy: RolloutStrategy, seed: int) -> list[RolloutTree]:
        sampling = Sampling(max_tokens=16, max_context=2048)
        return asyncio.run(grow_trees(chosen, strategy, self.policy, self.renderer, sampling, seed=seed))


def tasks(first: int, count: int) -> list[Task]:
    return [Task("treegym/Lookup-v0", first + i, {}, {"hops": [3]}) for i in range(count)]


def say(text: str, seed: int) -> str:
    """A look at some word of the conversation."""
    words = [word for word in text.split() if word.isalpha()]
    return f"<lookup>{random.Random(f'{len(text)} {seed}').choice(words)}</lookup>"


def recording(folder: Path) -> list[Row]:
    """Trees of 8 rollouts, 4 at a time: seconds to grow and seconds to store them, in turns."""
    rows: list[Row] = []
    for policy in ("nano", "script"):
        grower = Grower(scripted=policy == "script")
        store = EpisodeStore(folder / f"{policy}.jsonl.zst")
        for round in range(ROUNDS + 1):  # the first one warms up
            start = time.perf_counter()
            trees = grower.grow(tasks(100 * round, TASKS), Chains(8), round)
            grown = time.perf_counter()
            for tree in trees:
                store.append(tree, [[0.1] * len(path) for path in tree.paths], stage="improvement", step=round)
            stored = time.perf_counter()
            if round:
                rows.append({"policy": policy, "rollout": grown - start, "store": stored - grown, "trees": len(trees)})
        store.close()
    return rows


def wide() -> tuple[list[Row], list[RolloutTree]]:
    """Bytes of trees with 64 leaves."""
    grower = Grower()
    rows, grown = [], []
    for name, strategy in WIDE.items():
        [tree] = grower.grow(tasks(7, 1), strategy, 1)
        grown.append(tree)
        bare = replace(
            tree,
            prompt=(),
            nodes=tuple(replace(n, action=Completion(n.action.text), observation=()) for n in tree.nodes),
        )
        texts = [m.text for m in tree.messages] + [n.action.text for n in tree.nodes]
        texts += [m.text for n in tree.nodes for m in n.messages]
        sizes: Row = {}
        for label, kept in (("texts", bare), ("whole", tree)):
            line = write_record(Record(0, {}, kept), None)
            sizes |= {f"{label}, JSON": len(line), f"{label}, stored": len(layout_of(Path("x.zst")).encode(0, line))}
        plain = len(json.dumps({"schema": 1, "tree": tree.to_json()}, separators=(",", ":")))
        rollouts = sum(len(tree.nodes[i].action.text.encode()) for path in tree.paths for i in path)
        rollouts += sum(len(m.text.encode()) for path in tree.paths for i in path for m in tree.nodes[i].messages)
        rollouts += sum(len(m.text.encode()) for m in tree.messages) * len(tree.leaves)
        rows.append(
            {
                "strategy": name,
                "leaves": len(tree.leaves),
                "turns": len(tree.nodes),
                "unique": sum(len(text.encode()) for text in texts),
                "written out": rollouts,
                "sampled": tree.num_sampled_tokens,
                "tokens": tree.num_unique_tokens,
                "schema 1": plain,
                **sizes,
            }
        )
    return rows, grown


def fill(path: Path, size: int, trees: Sequence[RolloutTree]) -> Row:
    """A store of at least so many bytes: the trees over and over, each a record of its own. They are encoded once and
    numbered anew, for encoding them all would take an hour; the index is written as `append` would."""
    layout, index = layout_of(path), Index(EpisodeStore(path).index_path)
    lines = [write_record(Record(0, {"stage": "improvement", "step": 0}, tree), None) for tree in trees]
    frames = [layout.encode(0, line) for line in lines]
    summaries = [TreeSummary.of(0, {}, tree) for tree in trees]
    number = end = plain = 0
    start = time.perf_counter()
    with path.open("wb") as file:
        while end < size:
            entries = []
            for _ in range(1000):
                which = number % len(trees)
                data = renumbered(frames[which], number)
                file.write(data)
                labels = {"stage": "improvement" if number % 10 else "midway", "step": number // 64}
                summary = replace(summaries[which], number=number, labels=labels)
                entries.append(Entry(summary, end, end + len(data), opening_key(trees[which])))
                number, end, plain = number + 1, end + len(data), plain + len(lines[which])
            file.flush()
            with index.changing():
                index.add(entries, EpisodeStore(path)._tail(end))
        os.fsync(file.fileno())
    index.close()
    for each in (path, EpisodeStore(path).index_path):
        with each.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # what is measured reads from the disk
    return {
        "trees": number,
        "bytes": end,
        "JSON": plain,
        "index": EpisodeStore(path).index_path.stat().st_size,
        "seconds": time.perf_counter() - start,
    }


def renumbered(frame: bytes, number: int) -> bytes:
    """A record with another number in its header."""
    fields = frame[:8] + struct.pack("<I", number) + frame[12:20]
    return fields + struct.pack("<I", zlib.crc32(fields)) + frame[24:]


def measure(path: Path) -> Row:
    """Seconds of what is done with a large store, in a process that has not yet seen it."""

    def timed(work: Callable[[], Any]) -> tuple[float, Any]:
        start = time.perf_counter()
        value = work()
        return time.perf_counter() - start, value

    store = EpisodeStore(path)
    opened, _ = timed(lambda: next(store.summaries()))
    counted, count = timed(lambda: len(store))
    filtered, found = timed(
        lambda: list(store.summaries(Where(stage="midway", steps=(count // 128, count // 128 + 20))))
    )
    rare, few = timed(lambda: store.matching(Where(returns=(1e9, None))))
    chosen = random.Random(0).sample(range(count), 20)
    reads = [timed(partial(store.read, number))[0] for number in chosen]
    listed, _ = timed(lambda: sum(1 for _ in store.summaries()))
    start = time.perf_counter()
    for place, _ in enumerate(store):
        if place == 200:
            break
    streamed = 200 / (time.perf_counter() - start)
    return {
        "open": opened, "count": counted, "filtered": filtered, "found": len(found), "rare": rare, "few": few,
        "read": median(reads), "slowest read": max(reads), "list": listed, "trees a second": streamed,
    }  # fmt: skip


def render(results: Row) -> str:
    large, timing = results["large"], results["measured"]
    lines = [
        "# Storing trees",
        "",
        "Made by `python benchmarks/store.py`. Medians of the rounds, ratios with the lowest and the highest.",
        "",
        "## Recording",
        "",
        "4 trees of 8 rollouts of the lookup game, grown and then stored, in turns. The nano model has a million",
        "parameters; the script answers at once, so that only environment, tree and tokenizer take time: no policy is",
        "faster. The target is 5% of the rollout.",
        "",
        "| policy | rollout, s | storing, ms a tree | storing ÷ rollout |",
        "|---|---|---|---|",
    ]
    for policy in ("nano", "script"):
        rows = [row for row in results["recording"] if row["policy"] == policy]
        ratios = sorted(row["store"] / row["rollout"] for row in rows)
        each = median(1000 * row["store"] / row["trees"] for row in rows)
        spread = f"{median(ratios):.2%} ({ratios[0]:.2%} to {ratios[-1]:.2%})"
        lines.append(f"| {policy} | {median(row['rollout'] for row in rows):.2f} | {each:.1f} | {spread} |")
    lines += [
        "",
        "## A tree of 64 leaves",
        "",
        "The lookup game, played by the untrained nano model. Unique text is that of the prompt's messages and of",
        "every turn's action and answer, each turn once, as UTF-8; written out is the same for every rollout by",
        "itself. The target is 1.3 times the unique text, for a record without its numbers. Numbers have no text to be",
        "compared with: a token takes 2 bytes, its log-probability 4, which hardly compress; they are most of it.",
        "",
        "| | leaves | turns | unique text | written out | texts, JSON | stored | ÷ unique text | whole record, JSON "
        "| stored | ÷ unique text | unique tokens | sampled | as schema 1 |",
        "|---" * 14 + "|",
    ]
    for row in results["wide"]:
        cells = [row["strategy"], row["leaves"], row["turns"], row["unique"], row["written out"], row["texts, JSON"]]
        cells += [row["texts, stored"], f"{row['texts, stored'] / row['unique']:.2f}", row["whole, JSON"]]
        cells += [row["whole, stored"], f"{row['whole, stored'] / row['unique']:.2f}", row["tokens"], row["sampled"]]
        cells.append(row["schema 1"])
        lines.append("| " + " | ".join(f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in cells) + " |")
    lines += [
        "",
        f"## A store of {large['bytes'] / 1e9:.1f} GB",
        "",
        f"{large['trees']:,} records, {large['JSON'] / 1e9:.1f} GB as JSON, with an index of "
        f"{large['index'] / 1e6:.0f} MB;",
        "the three trees above over and over. Each time is that of a fresh process, the file not in memory; the",
        "target is a second to open it.",
        "",
        "| | |",
        "|---|---|",
        f"| open, first row of the listing | {1000 * timing['open']:.0f} ms |",
        f"| number of trees | {1000 * timing['count']:.0f} ms |",
        f"| listing by stage and steps ({timing['found']} trees) | {1000 * timing['filtered']:.0f} ms |",
        f"| filter that meets no tree | {1000 * timing['rare']:.0f} ms |",
        f"| whole listing | {timing['list']:.1f} s |",
        f"| `read(number)`, median of 20 | {1000 * timing['read']:.1f} ms |",
        f"| the slowest of them | {1000 * timing['slowest read']:.0f} ms |",
        f"| streaming | {timing['trees a second']:.0f} trees a second |",
    ]
    return "\n".join([*lines, "", results["note"]]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=10.0, help="size of the large store (default: 10)")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure)))
        return
    with tempfile.TemporaryDirectory(prefix="treegym-store-") as folder:
        recorded = recording(Path(folder))
        sizes, grown = wide()
        path = Path(folder) / "large.jsonl.zst"
        large = fill(path, int(args.gigabytes * 1e9), grown)
        command = [sys.executable, __file__, "--measure", str(path)]
        measured = json.loads(subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout)
    note = f"{os.cpu_count()} cores; load average {os.getloadavg()[1]:.1f} meanwhile."
    results = {"recording": recorded, "wide": sizes, "large": large, "measured": measured, "note": note}
    text = render(results)
    if args.gigabytes >= 10:
        (RESULTS / "store.json").write_text(json.dumps(results, indent=1) + "\n")
        (RESULTS / "store.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
