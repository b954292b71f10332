"""Rows of verifiers' results.jsonl: OpenAI's messages with rewards and terms."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from ...envs import Task
from ..store.records import Record
from .grammar import IMPORTED, Row, grammar_of, imported_info, nodes_of, tool_definitions
from .openai import chain, conversation, prompt_of, rest, turns_of


def write_verifiers(record: Record) -> Iterator[Row]:
    """A row for each rollout; `example_id` is the tree's number."""
    tree, grammar = record.tree, grammar_of(record.tree.task)
    kept = imported_info(tree, tree)
    names = sorted({name for node in tree.nodes for name in node.reward_terms})
    for rollout, total in enumerate(tree.returns):
        nodes = nodes_of(tree, rollout)
        metrics = {name: tree.term(name)[rollout] for name in names}
        yield {
            "example_id": record.number,
            "task": tree.task.env,
            "prompt": prompt_of(tree, grammar),
            "completion": list(turns_of(tree, rollout, grammar)),
            "reward": _finite(total),
            "metrics": {name: _finite(value) for name, value in metrics.items()},
            "is_completed": nodes[-1].terminated or nodes[-1].truncated,
            "is_truncated": nodes[-1].truncated,
            "stop_condition": nodes[-1].info.get("cause"),
            "tool_defs": [tool["function"] for tool in tool_definitions(tree, grammar)],
            "info": {
                "treegym": {
                    "task": asdict(tree.task),
                    "labels": record.labels,
                    "rollout": rollout,
                    "rewards": [node.reward for node in nodes],
                    "terms": [dict(node.reward_terms) for node in nodes],
                    **({"from": kept["from"]} if "from" in kept else {}),
                }
            },
            **kept.get("row", {}),
        }


def _finite(value: float) -> float | None:
    """None for what JSON has no number for."""
    return value if math.isfinite(value) else None


def read_verifiers(rows: Iterable[Row]) -> Iterator[Record]:
    """A tree of one rollout for each row. Where other programs wrote the row, the last turn has its whole reward."""
    for number, row in enumerate(rows):
        messages, nodes, kept = conversation(row["completion"], row["prompt"])
        ours = (row.get("info") or {}).get("treegym", {})
        rewards = ours.get("rewards") or [0.0] * (len(nodes) - 1) + [_reward(row["reward"])]
        terms: Sequence[Mapping[str, float | None]]
        terms = ours.get("terms") or [{}] * (len(nodes) - 1) + [_metrics(row.get("metrics") or {})]
        truncated, cause = row.get("is_truncated", False), row.get("stop_condition")
        scored = [
            replace(node, reward=reward, reward_terms=named, terminated=False)
            for node, reward, named in zip(nodes, rewards, terms, strict=True)
        ]
        scored[-1] = replace(
            scored[-1],
            terminated=not truncated and row.get("is_completed", True),
            truncated=truncated,
            info={**scored[-1].info, **({"cause": cause} if truncated and cause else {})},
        )
        origin = {name: row[name] for name in ("task", "answer", "info") if row.get(name)}
        info = {
            "tools": [{"type": "function", "function": function} for function in row.get("tool_defs") or ()],
            "from": ours["from"] if "from" in ours else ours.get("task") or origin,
            **kept,
            **rest(row, *FIELDS),
        }
        example = row.get("example_id", number)
        seed = ours["task"]["seed"] if ours else example if isinstance(example, int) else number
        task = Task(f"{IMPORTED}verifiers", seed)
        yield Record(number, ours.get("labels", {}), chain(task, messages, scored, info))


FIELDS = (
    "example_id", "task", "prompt", "completion", "reward", "metrics", "is_completed", "is_truncated",
    "stop_condition", "tool_defs", "info", "answer",
)  # fmt: skip


def _reward(value: Any) -> float:
    """The reward of a row. ValueError where it is no number."""
    if value is None:
        raise ValueError("the reward is null: a rollout that was not scored; leave it out, or give it a number")
    return _metrics({"reward": value})["reward"] or 0.0


def _metrics(values: Mapping[str, Any]) -> dict[str, float | None]:
    """The metrics of a row. ValueError where one is no number, nor null."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float | None):
            raise ValueError(f"{name} is {json.dumps(value)}, which is no number")
    return dict(values)
