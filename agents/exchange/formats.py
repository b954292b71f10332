"""Episodes in the formats of others: one JSON object for each rollout.

What survives a round trip, and what cannot:

- `atif`, the Agent Trajectory Interchange Format 1.7: everything survives. What the format has no field for stands
  under `extra.treegym`, so that the rollouts of one tree become that tree again. Rollouts that other programs wrote
  become trees of one rollout.
- `openai`, chat messages for supervised fine-tuning: what was said, the tools and their calls survive. Where the
  environment's action format is known, actions are written as tool calls, without the lines of the system message that
  explain the format. The wording of an action is lost, and so are tokens, rewards and the task.
- `verifiers`, the rows of its results.jsonl: the same messages survive, with rewards and terms, and with the task under
  `info.treegym`. Tokens and the wording of actions are lost.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..store.frames import StoreError
from ..store.records import Record, from_json
from .atif import read_atif, write_atif
from .grammar import Row
from .openai import read_openai, write_openai
from .verifiers import read_verifiers, write_verifiers


@dataclass(frozen=True, slots=True)
class Exchange:
    """A format: `write` makes a row of each rollout of a record; `read` makes records of rows."""

    write: Callable[[Record], Iterator[Row]]
    read: Callable[[Iterable[Row]], Iterator[Record]]


def read_episodes(path: Path, format: str) -> Iterator[Record]:
    """The episodes of a file of JSON lines, one JSON object or one array. StoreError names the place of a fault."""
    place = "line 1"

    def values() -> Iterator[Any]:
        nonlocal place
        with path.open("rb") as file:
            lines = ((number, line) for number, line in enumerate(file, start=1) if line.strip())
            number, line = next(lines, (1, b"[]"))
            place = f"line {number}"
            first = _whole(line, file)
            for row_number, value in enumerate(first if isinstance(first, list) else [first], start=1):
                place = f"row {row_number}" if isinstance(first, list) else place
                yield value
            for number, line in lines:
                place = f"line {number}"
                yield from_json(line)

    def rows() -> Iterator[Row]:
        for value in values():
            if not isinstance(value, dict):
                raise ValueError(f"an episode is a JSON object, and this is {value!r:.40}")
            yield value

    try:
        yield from EXCHANGES[format].read(rows())
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        said = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise StoreError(f"{path}, {place}: no episode in the format {format}: {said}") from error


def _whole(line: bytes, file: BinaryIO) -> Any:
    """The JSON value that a file begins with; it may span several lines, of which `line` is the first."""
    line = line.removeprefix(codecs.BOM_UTF8)
    try:
        return from_json(line)
    except json.JSONDecodeError:
        return from_json(line + file.read())


EXCHANGES: Mapping[str, Exchange] = {
    "atif": Exchange(write_atif, read_atif),
    "openai": Exchange(write_openai, read_openai),
    "verifiers": Exchange(write_verifiers, read_verifiers),
}
