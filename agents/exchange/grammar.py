"""What the formats share: how an environment's actions read, and how messages of others do."""

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
IMPORTED = "imported/"  # opens the environment of a tree whose own is not known


@dataclass(frozen=True, slots=True)
class Grammar:
    """How actions are written, and what they can call."""

    format: ActionFormat
    tools: Mapping[str, Tool]
    instructions: str  # the lines of the system message that say so


def grammar_of(task: Task) -> Grammar | None:
    """None where the environment cannot be made here, or has no action format."""
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
    """What the turn did; None where that is not known, or no action."""
    if "message" in imported_info(tree, node) and not calls_of(imported_info(tree, node)["message"]):
        return None  # its text is an answer, whatever it reads like
    parsed = grammar.format.parse(node.action.text, grammar.tools) if grammar else None
    return parsed if isinstance(parsed, Action) else None


def imported_info(tree: RolloutTree, part: Node | RolloutTree) -> Mapping[str, Any]:
    """What a node of the tree, or the tree itself, keeps of the messages it was imported from."""
    return part.info if tree.task.env.startswith(IMPORTED) else {}


def call_ids(tree: RolloutTree, node: Node, turn: int, action: Action | None) -> list[str | None]:
    """Of a turn's calls: those they came with, or nine letters and digits, which some chat templates insist on."""
    if message := imported_info(tree, node).get("message"):
        return [call.get("id") for call in calls_of(message)]
    return [f"call{10 * turn + place:05}" for place in range(len(action.calls))] if action else []


def tool_definitions(tree: RolloutTree, grammar: Grammar | None) -> list[Row]:
    """The tools as OpenAI's API describes them."""
    if tree.task.env.startswith(IMPORTED):
        return list(tree.info.get("tools", ()))
    tools = grammar.tools.values() if grammar else ()
    described = ({"name": t.name, "description": t.description, "parameters": dict(t.parameters)} for t in tools)
    return [{"type": "function", "function": each} for each in described]


def nodes_of(tree: RolloutTree, rollout: int) -> list[Node]:
    return [tree.nodes[i] for i in tree.paths[rollout]]


def calls_of(message: Row) -> list[Row]:
    """An assistant's calls; `function_call` is what there was before `tool_calls`."""
    if old := message.get("function_call"):
        return [{"type": "function", "function": old}]
    calls = message.get("tool_calls") or []
    return [json.loads(call) if isinstance(call, str) else call for call in calls]  # verifiers saves texts


def text_of(message: Row) -> str:
    """An assistant's message as one text: its content if that is all, else JSON, which `OpenAIFormat` reads."""
    said = read_message({**message, "tool_calls": calls_of(message), "function_call": None})
    return json.dumps(said, ensure_ascii=False) if said.keys() - {"content"} else str(said.get("content", ""))


def in_order(answers: Sequence[Row], ids: Sequence[Any], name: str = "tool_call_id") -> list[Row]:
    """The answers to a turn, results in the order of their calls. ValueError where one answers none of them."""
    known = [str(id) for id in ids if id]
    results = [row for row in answers if row.get(name)]
    asked = [str(row[name]) for row in results]
    if ids and not known:  # calls without ids are answered in their order
        return list(answers)
    if wrong := [id for id in asked if id not in known]:
        raise ValueError(f"{name} {wrong[0]!r} is that of no call before it; calls: {', '.join(known) or 'none'}")
    if len(set(asked)) < len(asked) or len(set(known)) < len(known):
        raise ValueError(f"ids of a turn's calls, and of its results, must differ: {known}, {asked}")
    ordered = iter(sorted(results, key=lambda row: known.index(str(row[name]))))
    return [next(ordered) if row.get(name) else row for row in answers]


def plain_text(content: Any) -> str:
    """A message's text; of several parts, those that are text."""
    if isinstance(content, list):
        return "\n".join(part["text"] for part in content if part.get("text"))
    return "" if content is None else str(content)
