"""Records: a tree with its labels and advantages as one JSON object, and back, for every schema there was.

Schema 2 leaves out what is at its default, and writes numbers as text: "u2:", "u4:", "f4:" or "f8:", then base64 of the
little-endian array, f8 only where f4 would change a value. What a tree says more than once is said once: a node whose
messages or observation are those of an earlier node has that node's number in their place. What the prompts of many
trees begin with, the system message above all, stands in one record of 64; the others name it by its offset, `opening`,
and the messages and tokens that they share with it. So a tree takes at most one record besides its own to read, and
damage to that one takes at most 63 others along.
"""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..envs import Message, Task
from .policy import Completion
from .tree import Cost, Node, RolloutTree

SCHEMA = 2
SHARED = 64  # records that one opening serves at most

Advantages = Sequence[Sequence[float]]  # [rollout][turn]


class UnknownSchema(Exception):
    """A record is newer than this code."""


@dataclass(frozen=True, slots=True)
class Record:
    """What is stored of a tree."""

    number: int  # its place in the store, from 0
    labels: dict[str, Any]
    tree: RolloutTree
    advantages: Advantages | None = None  # None: not recorded
    shares: bool = False  # whether it was written with another record's opening


@dataclass(frozen=True, slots=True)
class Opening:
    """What later records may begin as."""

    messages: tuple[Message, ...]
    prompt: tuple[int, ...]


def opening_key(tree: RolloutTree) -> str:
    """Equal where prompts begin alike: same environment, same first message. Empty without messages."""
    if not tree.messages:
        return ""
    text = repr((tree.task.env, tree.messages[0]))
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def write_record(record: Record, opening: tuple[int, Opening] | None) -> bytes:
    """The line of a record; `opening`, with its offset, is one that it shares."""
    row: dict[str, Any] = {"schema": SCHEMA, "labels": record.labels}
    if record.advantages is not None:
        row["advantages"] = pack_floats([x for rollout in record.advantages for x in rollout])
    row["tree"] = _tree_row(record.tree, opening)
    return json_line(row)


def json_line(row: Mapping[str, Any]) -> bytes:
    try:
        return (json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n").encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which only JSON's escapes can write
        return (json.dumps(row, separators=(",", ":")) + "\n").encode()


def read_record(number: int, line: bytes, opening_at: Callable[[int], Opening]) -> Record:
    """UnknownSchema for a newer one, ValueError and its like where the line is no record."""
    row = json.loads(line)
    schema = row["schema"]
    if schema not in _READERS:
        raise UnknownSchema(f"has schema {schema!r}, this treegym knows 1 to {SCHEMA}: a newer treegym reads it")
    return _READERS[schema](number, row, opening_at)


def _read_first(number: int, row: dict[str, Any], opening_at: Callable[[int], Opening]) -> Record:
    labels = {name: value for name, value in row.items() if name not in ("schema", "tree")}
    return Record(number, labels, RolloutTree.from_json(row["tree"]))


def _read_second(number: int, row: dict[str, Any], opening_at: Callable[[int], Opening]) -> Record:
    tree = _tree(row["tree"], opening_at)
    advantages = None
    if "advantages" in row:
        flat = iter(unpack(row["advantages"]))
        advantages = tuple(tuple(next(flat) for _ in path) for path in tree.paths)
    return Record(number, row["labels"], tree, advantages, "opening" in row["tree"])


_READERS = {1: _read_first, 2: _read_second}


def _tree_row(tree: RolloutTree, opening: tuple[int, Opening] | None) -> dict[str, Any]:
    row: dict[str, Any] = {"task": _given(tree.task)}
    messages, prompt = tree.messages, tree.prompt
    if opening is not None:
        offset, shared = opening
        same = (_common(messages, shared.messages), _common(prompt, shared.prompt))
        row["opening"] = [offset, *same]
        messages, prompt = messages[same[0] :], prompt[same[1] :]
    row |= {"prompt": pack_ints(prompt), "messages": _pairs(messages)}
    said: dict[tuple[Message, ...], int] = {}
    seen: dict[tuple[int, ...], int] = {}
    nodes = row["nodes"] = []
    for number, node in enumerate(tree.nodes):
        cells: dict[str, Any] = {} if node.parent == number - 1 else {"parent": node.parent}
        action = cells["action"] = _given(node.action)
        for name, pack in (("token_ids", pack_ints), ("logprobs", pack_floats), ("entropies", pack_floats)):
            if name in action:
                action[name] = pack(action[name])
        cells |= _given(node, without=("parent", "action"))
        if node.observation:
            first = seen.setdefault(node.observation, number)
            cells["observation"] = first if first < number else pack_ints(node.observation)
        if node.messages:
            first = said.setdefault(node.messages, number)
            cells["messages"] = first if first < number else _pairs(node.messages)
        nodes.append(cells)
    row["leaves"] = tree.leaves
    row |= _given(tree, without=("task", "prompt", "messages", "nodes", "leaves", "cost"))
    if cost := _given(tree.cost):
        row["cost"] = cost
    return row


def _tree(row: Mapping[str, Any], opening_at: Callable[[int], Opening]) -> RolloutTree:
    messages, prompt = _messages(row["messages"]), tuple(unpack(row["prompt"]))
    if "opening" in row:
        offset, same_messages, same_tokens = row["opening"]
        shared = opening_at(offset)
        messages, prompt = shared.messages[:same_messages] + messages, shared.prompt[:same_tokens] + prompt
    nodes: list[Node] = []
    for number, given in enumerate(row["nodes"]):
        cells: dict[str, Any] = {"parent": number - 1, **given}
        action = dict(cells["action"])
        for name in ("token_ids", "logprobs", "entropies"):
            if name in action:
                action[name] = tuple(unpack(action[name]))
        cells["action"] = Completion(**action)
        if "observation" in cells:
            at = cells["observation"]
            cells["observation"] = nodes[at].observation if isinstance(at, int) else tuple(unpack(at))
        if "messages" in cells:
            at = cells["messages"]
            cells["messages"] = nodes[at].messages if isinstance(at, int) else _messages(at)
        nodes.append(Node(**cells))
    return RolloutTree(
        task=Task(**row["task"]),
        prompt=prompt,
        messages=messages,
        nodes=tuple(nodes),
        leaves=tuple(row["leaves"]),
        origins=tuple(row.get("origins", ())),
        state_key=row.get("state_key", ""),
        info=row.get("info", {}),
        cost=Cost(**row.get("cost", {})),
    )


def _given(value: Any, without: Sequence[str] = ()) -> dict[str, Any]:
    """The fields of a dataclass that are not at their default."""
    cells = {name: getattr(value, name) for name in _NAMES[type(value)] if name not in without}
    defaults = _DEFAULTS[type(value)]
    return {name: cell for name, cell in cells.items() if name not in defaults or cell != defaults[name]}


_KINDS = (Task, Completion, Node, RolloutTree, Cost)
_NAMES = {kind: [field.name for field in fields(kind)] for kind in _KINDS}
_DEFAULTS: dict[type, dict[str, Any]] = {
    kind: {
        field.name: field.default if field.default_factory is MISSING else field.default_factory()
        for field in fields(kind)
        if field.default is not MISSING or field.default_factory is not MISSING
    }
    for kind in _KINDS
}


def _common(ones: Sequence[Any], others: Sequence[Any]) -> int:
    """Length of what both begin with."""
    pairs = enumerate(zip(ones, others, strict=False))
    return next((i for i, (one, other) in pairs if one != other), min(len(ones), len(others)))


def _pairs(messages: Sequence[Message]) -> list[tuple[str, str]]:
    return [(message.role, message.text) for message in messages]


def _messages(pairs: Sequence[Sequence[str]]) -> tuple[Message, ...]:
    return tuple(Message(role, text) for role, text in pairs)


def pack_ints(values: Sequence[int]) -> str | list[int]:
    """As u2 or u4; the list itself where a number fits neither."""
    if values and not 0 <= min(values) <= max(values) < 1 << 32:
        return list(values)
    kind = "u2" if not values or max(values) < 1 << 16 else "u4"
    return _packed(kind, np.array(values, dtype=f"<{kind}"))


def pack_floats(values: Sequence[float]) -> str:
    """As f4 where that is exact for all, else as f8."""
    exact = np.array(values, dtype="<f8")
    with np.errstate(all="ignore"):  # an overflow shows in the comparison
        short = exact.astype("<f4")
    same = np.array_equal(short.astype("<f8"), exact, equal_nan=True)
    return _packed("f4", short) if same else _packed("f8", exact)


def _packed(kind: str, array: NDArray[Any]) -> str:
    return f"{kind}:{b64encode(array.tobytes()).decode()}"


def unpack(packed: str | list[int]) -> list[Any]:
    """The numbers of pack_ints and pack_floats."""
    if isinstance(packed, list):
        return packed
    kind, _, text = packed.partition(":")
    values: list[Any] = np.frombuffer(b64decode(text, validate=True), dtype=f"<{kind}").tolist()
    return values
