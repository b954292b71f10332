"""Records: a tree with its labels and advantages as one JSON object, and back, for every schema there was.

Schema 3 leaves out what is at its default, and writes numbers as text: "u2:", "u4:", "f4:" or "f8:", then base64 of the
little-endian array, f8 only where f4 would change a value. What a tree says more than once is said once: a node whose
messages or observation are those of an earlier node has that node's number in their place. The beginning that the
prompts of many trees share, above all the system message, stands in one record of 64; the others name that record's
offset, `opening`, and how many messages and tokens they share with it. So reading a tree takes at most one record
besides its own, and damage to that record costs at most 63 others. Schema 2 is the same without calls, speakers,
values, lessons and advantages of tokens.
"""

from __future__ import annotations

import itertools
import json
import math
import struct
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, dataclass, fields
from hashlib import blake2b
from typing import Any

import numpy as np

from ...envs import Message, Task
from ...tools import ToolCall
from ..policy import Completion
from ..tree import Advantages, Cost, Node, RolloutTree

SCHEMA = 3
SHARED = 64  # records that one opening serves at most

Numbers = Sequence[Sequence[float | Sequence[float]]]  # Advantages without numpy


class UnknownSchema(Exception):
    """A record is newer than this code."""


@dataclass(frozen=True, slots=True)
class Record:
    """What is stored of a tree."""

    number: int  # its place in the store, from 0
    labels: dict[str, Any]
    tree: RolloutTree
    advantages: Numbers | None = None  # None: not recorded
    shares: bool = False  # whether it was written with another record's opening
    values: Sequence[Sequence[float]] | None = None  # [node][token], of the state before each sampled token
    lessons: tuple[str, ...] = ()  # names of the lessons that were in force

    def __post_init__(self) -> None:
        if self.advantages is not None and [*map(len, self.advantages)] != [*map(len, self.tree.paths)]:
            raise ValueError("advantages are [rollout][turn] of the tree")
        if any(not isinstance(turn, float | int) and len(turn) != n for turn, n in self._turns()):
            raise ValueError("the advantages of a turn's tokens are as many as it has sampled tokens")
        sizes = [len(node.action.token_ids) for node in self.tree.nodes]
        if self.values is not None and [*map(len, self.values)] != sizes:
            raise ValueError("values are [node][sampled token] of the tree")

    def _turns(self) -> Iterator[tuple[float | Sequence[float], int]]:
        """The advantage of every turn of every rollout, and how many tokens were sampled in it."""
        for path, rollout in zip(self.tree.paths, self.advantages or (), strict=False):
            for node, turn in zip(path, rollout, strict=True):
                yield turn, len(self.tree.nodes[node].action.token_ids)


def plain(advantages: Advantages | Numbers) -> Numbers:
    """The same numbers without numpy."""
    rows = [[np.asarray(turn, dtype=float) for turn in rollout] for rollout in advantages]
    return [[tuple(turn.tolist()) if turn.ndim else float(turn) for turn in row] for row in rows]


@dataclass(frozen=True, slots=True)
class Opening:
    """A record's messages and prompt; later records name how much of their beginning they share."""

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
        row["advantages"] = _packed_advantages([turn for rollout in record.advantages for turn in rollout])
    if record.values is not None:
        row["values"] = pack_floats([value for node in record.values for value in node])
    if record.lessons:
        row["lessons"] = record.lessons
    row["tree"] = _tree_row(record.tree, opening)
    return json_line(row)


def _packed_advantages(turns: Sequence[float | Sequence[float]]) -> str | list[float | str]:
    """One text of all turns; where some have an advantage for each token, a list with a text for each of those."""
    numbers = [turn for turn in turns if isinstance(turn, float | int)]
    if len(numbers) == len(turns):
        return pack_floats(numbers)
    return [turn if isinstance(turn, float | int) else pack_floats(turn) for turn in turns]


def json_line(row: Mapping[str, Any]) -> bytes:
    """A line of JSON, which `from_json` reads. Numbers that JSON lacks are objects: {"__float__": "nan"}."""
    try:
        text = json.dumps(row, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except ValueError:
        row = _marked(row)
        text = json.dumps(row, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    try:
        return (text + "\n").encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which only JSON's escapes can write
        return (json.dumps(row, separators=(",", ":")) + "\n").encode()


def from_json(line: bytes) -> Any:
    """The value of `json_line`, or of any JSON. ValueError for what is no JSON, such as a bare NaN."""
    return json.loads(line, parse_constant=_refuse, object_hook=_float if _FLOAT.encode() in line else None)


_FLOAT = "__float__"


def _marked(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return {_FLOAT: str(value)}
    if isinstance(value, Mapping):
        return {key: _marked(item) for key, item in value.items()}
    return [_marked(item) for item in value] if isinstance(value, list | tuple) else value


def _float(value: dict[str, Any]) -> Any:
    return float(value[_FLOAT]) if value.keys() == {_FLOAT} else value


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def read_record(number: int, line: bytes, opening_at: Callable[[int], Opening]) -> Record:
    """A line's record. UnknownSchema where it is newer than this code, ValueError and its like where it is none."""
    row = json.loads(line, object_hook=_float if _FLOAT.encode() in line else None)  # older ones hold bare NaN
    schema = row["schema"]
    if schema not in _READERS:
        raise UnknownSchema(f"has schema {schema!r}, this treegym knows 1 to {SCHEMA}: a newer treegym reads it")
    return _READERS[schema](number, row, opening_at)


def _read_first(number: int, row: dict[str, Any], opening_at: Callable[[int], Opening]) -> Record:
    labels = {name: value for name, value in row.items() if name not in ("schema", "tree")}
    return Record(number, labels, RolloutTree.from_json(row["tree"]))


def _read_later(number: int, row: dict[str, Any], opening_at: Callable[[int], Opening]) -> Record:
    tree = _tree(row["tree"], opening_at)
    return Record(
        number,
        row["labels"],
        tree,
        _advantages(row["advantages"], tree) if "advantages" in row else None,
        "opening" in row["tree"],
        _values(row["values"], tree) if "values" in row else None,
        tuple(row.get("lessons", ())),
    )


def _advantages(packed: str | list[float | str], tree: RolloutTree) -> Numbers:
    turns = unpack(packed) if isinstance(packed, str) else [unpack(x) if isinstance(x, str) else x for x in packed]
    if len(turns) != sum(map(len, tree.paths)):
        raise ValueError(f"its {len(turns)} advantages are not those of its turns")
    flat = iter(turns)
    return tuple(tuple(next(flat) for _ in path) for path in tree.paths)


def _values(packed: str, tree: RolloutTree) -> Sequence[Sequence[float]]:
    flat = iter(unpack(packed))
    return tuple(tuple(itertools.islice(flat, len(node.action.token_ids))) for node in tree.nodes)


_READERS = {1: _read_first, 2: _read_later, 3: _read_later}


def _tree_row(tree: RolloutTree, opening: tuple[int, Opening] | None) -> dict[str, Any]:
    row: dict[str, Any] = {"task": _changed(tree.task)}
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
        action = cells["action"] = _changed(node.action)
        for name, pack in (("token_ids", pack_ints), ("logprobs", pack_floats), ("entropies", pack_floats)):
            if name in action:
                action[name] = pack(action[name])
        cells |= _changed(node, _OF_NODE)
        if node.observation:
            first = seen.setdefault(node.observation, number)
            cells["observation"] = first if first < number else pack_ints(node.observation)
        if node.calls:
            cells["calls"] = [(call.name, call.arguments) for call in node.calls]
        if node.messages:
            first = said.setdefault(node.messages, number)
            cells["messages"] = first if first < number else _pairs(node.messages)
        nodes.append(cells)
    row["leaves"] = tree.leaves
    row |= _changed(tree, _OF_TREE)
    if cost := _changed(tree.cost):
        row["cost"] = cost
    return row


def _tree(row: Mapping[str, Any], opening_at: Callable[[int], Opening]) -> RolloutTree:
    messages, prompt = _messages(row["messages"]), unpack(row["prompt"])
    if "opening" in row:
        offset, same_messages, same_tokens = row["opening"]
        shared = opening_at(offset)
        messages, prompt = shared.messages[:same_messages] + messages, shared.prompt[:same_tokens] + prompt
    nodes: list[Node] = []
    for number, written in enumerate(row["nodes"]):
        cells: dict[str, Any] = {"parent": number - 1, **written}
        action = dict(cells["action"])
        for name in ("token_ids", "logprobs", "entropies"):
            if name in action:
                action[name] = unpack(action[name])
        cells["action"] = Completion(**action)
        if "calls" in cells:
            cells["calls"] = tuple(ToolCall(name, arguments) for name, arguments in cells["calls"])
        if "observation" in cells:
            at = cells["observation"]
            cells["observation"] = nodes[at].observation if isinstance(at, int) else unpack(at)
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


def _changed(value: Any, without: frozenset[str] = frozenset()) -> dict[str, Any]:
    """The fields of a dataclass that are not at their default."""
    cells = {}
    for name, default in _FIELDS[type(value)]:
        if name not in without and (cell := getattr(value, name)) != default:
            cells[name] = cell
    return cells


_FIELDS: dict[type, list[tuple[str, Any]]] = {  # with their defaults, or MISSING
    kind: [
        (field.name, field.default if field.default_factory is MISSING else field.default_factory())
        for field in fields(kind)
    ]
    for kind in (Task, Completion, Node, RolloutTree, Cost)
}
_OF_NODE = frozenset({"parent", "action", "calls"})  # fields that are written in another way
_OF_TREE = frozenset({"task", "prompt", "messages", "nodes", "leaves", "cost"})


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
    for kind in ("u2", "u4"):
        with suppress(struct.error):  # too large, or negative
            return _packed(kind, values)
    return list(values)


def pack_floats(values: Sequence[float]) -> str:
    """As f4 where that is exact for all, else as f8."""
    with suppress(OverflowError):
        form = f"<{len(values)}f"
        data = struct.pack(form, *values)
        if struct.unpack(form, data) == tuple(values):
            return _text("f4", data)
    return _packed("f8", values)


def _packed(kind: str, values: Sequence[float]) -> str:
    return _text(kind, struct.pack(f"<{len(values)}{_CODES[kind]}", *values))


def _text(kind: str, data: bytes) -> str:
    return f"{kind}:{b64encode(data).decode()}"


def unpack(packed: str | list[int]) -> tuple[Any, ...]:
    """The numbers of pack_ints and pack_floats."""
    if isinstance(packed, list):
        return tuple(packed)
    kind, _, text = packed.partition(":")
    data = b64decode(text, validate=True)
    return struct.unpack(f"<{len(data) // int(kind[1:])}{_CODES[kind]}", data)


_CODES = {"u2": "H", "u4": "I", "f4": "f", "f8": "d"}
