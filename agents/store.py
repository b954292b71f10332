"""EpisodeStore: an append-only file of rollout trees, one JSON object a line."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from .tree import RolloutTree, tool_results

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class TreeSummary:
    """What a listing tells of a stored tree."""

    number: int  # its place in the store, from 0
    labels: Mapping[str, Any]  # stage, step, ...
    env: str
    seed: int  # of the task
    rollouts: int
    nodes: int
    mean_return: float
    best_return: float
    terms: Mapping[str, float]  # reward terms by name: means over the rollouts
    causes: Mapping[str, int]  # of truncation, by name: how many rollouts
    sampled_tokens: int  # each once
    tool_calls: int  # each once

    @classmethod
    def of(cls, number: int, labels: Mapping[str, Any], tree: RolloutTree) -> TreeSummary:
        names = sorted({name for node in tree.nodes for name in node.reward_terms})
        return cls(
            number=number,
            labels=labels,
            env=tree.task.env,
            seed=tree.task.seed,
            rollouts=len(tree.leaves),
            nodes=len(tree.nodes),
            mean_return=fmean(tree.returns),
            best_return=max(tree.returns),
            terms={name: fmean(tree.term(name)) for name in names},
            causes=Counter(str(tree.nodes[i].info.get("cause")) for i in tree.leaves if tree.nodes[i].truncated),
            sampled_tokens=tree.num_sampled_tokens,
            tool_calls=sum(tool_results(node.messages) for node in tree.nodes),
        )


class EpisodeStore:
    """Trees in the order of writing, each with labels such as its stage and step."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, tree: RolloutTree, **labels: Any) -> None:
        """Writes one line; a crash loses at most that line."""
        append_line(self.path, {"schema": SCHEMA, **labels, "tree": tree.to_json()})

    def __iter__(self) -> Iterator[tuple[dict[str, Any], RolloutTree]]:
        """(labels, tree) of every whole line."""
        for row in read_lines(self.path):
            row.pop("schema")
            tree = RolloutTree.from_json(row.pop("tree"))
            yield row, tree

    def __len__(self) -> int:
        return sum(1 for _ in read_lines(self.path))

    def read(self, number: int) -> tuple[dict[str, Any], RolloutTree]:
        """(labels, tree) of the tree at a place. IndexError where there is none."""
        for place, found in enumerate(self):
            if place == number:
                return found
        raise IndexError(f"{self.path} holds no tree {number}")

    def summaries(self) -> Iterator[TreeSummary]:
        """Of every tree, in the order of writing."""
        for number, (labels, tree) in enumerate(self):
            yield TreeSummary.of(number, labels, tree)

    @property
    def size(self) -> int:
        """Bytes written so far."""
        return self.path.stat().st_size if self.path.exists() else 0

    def truncate(self, size: int) -> None:
        """Forgets what was written after the file had this size."""
        if self.path.exists():
            os.truncate(self.path, size)


def append_line(path: Path, row: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n")


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a JSON lines file; a last line that was cut off is left out."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)
