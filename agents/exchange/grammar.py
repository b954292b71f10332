"""What the formats share: how an environment writes its actions, and how the messages of a chat become texts."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium

from ...envs import Action, ActionFormat, OpenAIFormat, Task, ToolEnv
from ...tools import Tool
from ..policies.messages import read_message
from ..tree import Node, RolloutTree

Row = dict[str, Any]
IMPORTED = "imported/"  # begins the environment's name in a tree that was imported without its task


@dataclass(frozen=True, slots=True)
class Grammar:
    """How actions are written, and what they can call."""

    format: ActionFormat
    tools: Mapping[str, Tool]
    instructions: str  # the lines of the system message that explain how actions are written


def grammar_of(task: Task) -> Grammar | None:
    """How actions are written in a task; None where its environment cannot be made here, or has no action format."""
    if task.env.startswith(IMPORTED):
        return Grammar(OpenAIFormat(), {}, "")
    return _made(task.env, json.dumps(dict(task.settings)))


@functools.lru_cache(maxsize=32)
def _made(name: str, settings: str) -> Grammar | None:
    try:
        env = Task(name, 0, settings=json.loads(settings)).make()
    except (ImportError, OSError, TypeError, ValueError, gymnasium.error.Error):
        return None
    with contextlib.closing(env):
        if not isinstance(made := env.unwrapped, ToolEnv):
            return None
        return Grammar(made.format, dict(made.tools), made.format.instructions(made.tools))


def action_of(tree: RolloutTree, node: Node, grammar: Grammar | None) -> Action | None:
    """The action of a turn; None where the grammar is not known, or the reply is no action."""
    if "message" in imported_info(tree, node) and not calls_of(imported_info(tree, node)["message"]):
        return None  # it came without calls: its text is an answer, even where it looks like an action
    parsed = grammar.format.parse(node.action.text, grammar.tools) if grammar else None
    return parsed if isinstance(parsed, Action) else None


def imported_info(tree: RolloutTree, part: Node | RolloutTree) -> Mapping[str, Any]:
    """What a node, or the tree itself, keeps of the messages that it was imported from."""
    return part.info if tree.task.env.startswith(IMPORTED) else {}


def call_ids(tree: RolloutTree, node: Node, turn: int, action: Action | None) -> list[str | None]:
    """An id for each call of a turn: the one that it was imported with, otherwise nine letters and digits.

    Some chat templates insist on nine. An imported call may have no id.
    """
    if message := imported_info(tree, node).get("message"):
        return [call.get("id") for call in calls_of(message)]
    return [f"call{10 * turn + place:05}" for place in range(len(action.calls))] if action else []


def tool_definitions(tree: RolloutTree, grammar: Grammar | None) -> list[Row]:
    """The tools as OpenAI's API describes them."""
    if tree.task.env.startswith(IMPORTED):
        return list(tree.info.get("tools", ()))
    tools = grammar.tools.values() if grammar else ()
    described = ({"name": t.name, "description": t.description, "parameters": dict(t.parameters)} for t in tools)
    return [{"type": "function", "function": function} for function in described]


def nodes_of(tree: RolloutTree, rollout: int) -> list[Node]:
    return [tree.nodes[i] for i in tree.paths[rollout]]


def calls_of(message: Row) -> list[Row]:
    """The calls of an assistant's message: its `tool_calls`, or the one `function_call` of the older API."""
    if old := message.get("function_call"):
        return [{"type": "function", "function": old}]
    calls = message.get("tool_calls") or []
    return [json.loads(call) if isinstance(call, str) else call for call in calls]  # verifiers saves JSON texts


def text_of(message: Row) -> str:
    """An assistant's message as one text: its content if it has nothing else, otherwise JSON for `OpenAIFormat`."""
    said = read_message({**message, "tool_calls": calls_of(message), "function_call": None})
    return json.dumps(said, ensure_ascii=False) if said.keys() - {"content"} else str(said.get("content", ""))


def in_order(answers: Sequence[Row], ids: Sequence[Any], name: str = "tool_call_id") -> list[Row]:
    """The answers to a turn, with its tool results in the order of their calls.

    `ids` are those of the calls; a result has the id of its call under `name`. ValueError where there is no such call.
    """
    calls = [str(id) for id in ids if id]
    results = [row for row in answers if row.get(name)]
    answered = [str(row[name]) for row in results]
    if ids and not calls:  # calls without ids are answered in their order
        return list(answers)
    if wrong := [id for id in answered if id not in calls]:
        raise ValueError(f"{name} {wrong[0]!r} is that of no call before it; calls: {', '.join(calls) or 'none'}")
    if len(set(answered)) < len(answered) or len(set(calls)) < len(calls):
        raise ValueError(f"ids of a turn's calls, and of its results, must differ: {calls}, {answered}")
    ordered = iter(sorted(results, key=lambda row: calls.index(str(row[name]))))
    return [next(ordered) if row.get(name) else row for row in answers]


def plain_text(content: Any) -> str:
    """The content of a message as text. Of a content in several parts, the parts that are text."""
    if isinstance(content, list):
        return "\n".join(part["text"] for part in content if part.get("text"))
    return "" if content is None else str(content)
