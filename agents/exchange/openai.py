"""Chat messages as OpenAI's API has them, for supervised fine-tuning: what was said, tools and calls."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ...envs import Message, OpenAIFormat, Task
from ..policy import Completion
from ..store.records import Record
from ..tree import Node, RolloutTree, tool_results
from .grammar import (
    IMPORTED,
    Grammar,
    Row,
    action_of,
    call_ids,
    calls_of,
    grammar_of,
    imported_info,
    in_order,
    nodes_of,
    plain_text,
    text_of,
    tool_definitions,
)


def write_openai(record: Record) -> Iterator[Row]:
    """A row for each rollout: its messages, and the tools if there are any."""
    grammar = grammar_of(record.tree.task)
    tools = tool_definitions(record.tree, grammar)
    for rollout in range(len(record.tree.leaves)):
        messages = [*prompt_of(record.tree, grammar), *turns_of(record.tree, rollout, grammar)]
        kept = imported_info(record.tree, record.tree)
        told = {"tools": tools} if tools or "tools" in kept else {}
        yield {"messages": messages, **told, **kept.get("row", {})}


def read_openai(rows: Iterable[Row]) -> Iterator[Record]:
    """A tree of one rollout for each row."""
    for number, row in enumerate(rows):
        messages, nodes, kept = conversation(row["messages"])
        info = {**({"tools": row["tools"]} if "tools" in row else {}), **kept, **rest(row, "messages", "tools")}
        yield Record(number, {}, chain(Task(f"{IMPORTED}openai", number), messages, nodes, info))


def prompt_of(tree: RolloutTree, grammar: Grammar | None) -> list[Row]:
    """The messages of the prompt, without the lines that explain how to write a call as text."""
    if "prompt" in (kept := imported_info(tree, tree)):
        return list(kept["prompt"])
    rows = []
    for message in tree.messages:
        text = message.text
        if grammar and grammar.instructions and message.role == "system":
            text = text.removesuffix(grammar.instructions).rstrip()
        if text or message.role != "system":
            rows.append({"role": message.role, "content": text})
    return rows


def turns_of(tree: RolloutTree, rollout: int, grammar: Grammar | None) -> Iterator[Row]:
    """The messages after the prompt: each reply of the policy, then the environment's answers."""
    for turn, node in enumerate(nodes_of(tree, rollout)):
        action, kept = action_of(tree, node, grammar), imported_info(tree, node)
        ids = call_ids(tree, node, turn, action)
        if "message" in kept:
            yield {"role": "assistant", **kept["message"]}
        elif grammar and action:
            said = json.loads(OpenAIFormat().render(action, grammar.tools))
            for call, name in zip(said.get("tool_calls", ()), ids, strict=True):
                call["id"] = name
            yield {"role": "assistant", "content": None, **said}
        else:
            yield {"role": "assistant", "content": node.action.text}
        yield from kept.get("answers") or _answers(node.messages, ids)


def _answers(messages: Sequence[Message], ids: Sequence[str | None]) -> Iterator[Row]:
    """The environment's messages. A tool's message must name its call; without ids it becomes the user's."""
    matched = iter(ids if len(ids) == tool_results(messages) else ())
    for message in messages:
        if not message.text and message.role != "tool":
            continue  # the environment had nothing to say when the episode ended
        source = next(matched, None) if message.role == "tool" else None
        role = "user" if message.role == "tool" and source is None else message.role
        yield {"role": role, **({"tool_call_id": source} if source else {}), "content": message.text}


def conversation(rows: Any, prompt: Any = ()) -> tuple[tuple[Message, ...], list[Node], Row]:
    """A chat as what comes before its first reply, a node for each reply, and what the tree's info keeps of it."""
    opening = _chat(prompt)
    turns: list[tuple[Row, list[Row]]] = []
    for row in _chat(rows):
        if row["role"] == "assistant":
            turns.append((row, []))
        else:
            (turns[-1][1] if turns else opening).append(row)
    if not turns:
        raise ValueError("no message is the assistant's")
    messages = tuple(map(_message, opening))
    nodes = [
        _reply(number - 1, row, answers, last=number == len(turns) - 1) for number, (row, answers) in enumerate(turns)
    ]
    plain = [{"role": message.role, "content": message.text} for message in messages]
    differs = plain != opening or {"role": "system", "content": ""} in plain  # from what would be written of `messages`
    return messages, nodes, {"prompt": opening} if differs else {}


def _chat(rows: Any) -> list[Row]:
    """The messages of a chat. ValueError unless they are a list of objects with a role."""
    if isinstance(rows, str) or not isinstance(rows, Sequence):
        raise ValueError(f"messages are a list, and this is {rows!r:.40}")
    for row in rows:
        if not (isinstance(row, dict) and isinstance(row.get("role"), str)):
            raise ValueError(f"a message is an object with a role, and this is {row!r:.40}")
    return list(rows)


def _reply(parent: int, row: Row, answers: Sequence[Row], *, last: bool) -> Node:
    """A turn. Its info keeps what its text and messages do not say: calls as they came, `refusal`, `weight`, names."""
    message = {name: value for name, value in row.items() if name != "role"}
    text, calls = text_of(row), calls_of(row)
    messages = tuple(map(_message, in_order(answers, [call.get("id") for call in calls])))
    kept: Row = {}
    if message != {"content": text} or text.lstrip().startswith("{"):
        kept["message"] = message
    if list(_answers(messages, [call.get("id") for call in calls])) != answers:
        kept["answers"] = answers
    return Node(parent, Completion(text), messages=messages, terminated=last, info=kept)


def _message(row: Row) -> Message:
    role = "tool" if row["role"] == "function" else row["role"]
    return Message(role, text_of(row) if role == "assistant" else plain_text(row.get("content")))


def rest(row: Row, *fields: str) -> Row:
    """What a row says beyond these fields, for the tree's info: it is written again as it came."""
    others = {name: value for name, value in row.items() if name not in fields}
    return {"row": others} if others else {}


def chain(task: Task, messages: tuple[Message, ...], nodes: Sequence[Node], info: Mapping[str, Any]) -> RolloutTree:
    """A tree of one rollout, without tokens."""
    return RolloutTree(task, (), messages, tuple(nodes), (len(nodes) - 1,), info=info)
