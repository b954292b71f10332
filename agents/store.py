"""EpisodeStore: an append-only file of rollout trees, one JSON object a line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .tree import RolloutTree

SCHEMA = 1


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
            tree = RolloutTree.from_json(row.pop("tree"))
            yield row, tree

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
