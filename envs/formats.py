"""How an agent writes tool calls and answers: any text parses to an Action or to a FormatError value."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from ..tools import Tool, ToolCall

MAX_CALLS = 8  # in one action
SCALARS = frozenset({"string", "integer", "number", "boolean"})
Tools = Mapping[str, Tool]


@dataclass(frozen=True, slots=True)
class Action:
    """What the agent does in a turn: calls tools, or answers and so ends the episode."""

    calls: tuple[ToolCall, ...] = ()
    answer: str | None = None  # None when it calls tools
    thought: str = ""  # free text before


@dataclass(frozen=True, slots=True)
class FormatError:
    """Why a text is no action, as the agent reads it."""

    text: str


class ActionFormat(Protocol):
    """A way to write actions. Parsing what was rendered gives the action back, up to blanks around its texts."""

    def parse(self, text: str, tools: Tools) -> Action | FormatError: ...

    def render(self, action: Action, tools: Tools) -> str: ...

    def instructions(self, tools: Tools) -> str: ...  # for the system message


class _Malformed(Exception):
    """Carries a FormatError's text out of a parser."""


@dataclass(frozen=True)
class TaggedFormat:
    """A tag per tool and <answer>: `<search>capital of Japan</search>`.

    A tool's only parameter stands in the tag as it is; a tool with several takes a JSON object.
    """

    def parse(self, text: str, tools: Tools) -> Action | FormatError:
        try:
            thought, elements = _elements(text, [*tools, "answer"])
            return _action(thought, elements, lambda name, body: ToolCall(name, _arguments(body, tools[name])))
        except _Malformed as error:
            return FormatError(f"{error} Write {self._ways(tools)}.")

    def render(self, action: Action, tools: Tools) -> str:
        bodies = [(call.name, _body(call.arguments, tools[call.name])) for call in action.calls]
        return _render(action, bodies)

    def instructions(self, tools: Tools) -> str:
        lines = [f"{_example(tool)} {tool.description}" for tool in tools.values()]
        return "\n".join(["Each turn, write one of:", *lines, "<answer>text</answer> Give the final answer."])

    def _ways(self, tools: Tools) -> str:
        return " or ".join([*map(_example, tools.values()), "<answer>text</answer>"])


@dataclass(frozen=True)
class HermesFormat:
    """JSON calls as Hermes and Qwen write them, and <answer> for the end.

    `<tool_call>{"name": "search", "arguments": {"query": "capital of Japan"}}</tool_call>`
    """

    def parse(self, text: str, tools: Tools) -> Action | FormatError:
        try:
            thought, elements = _elements(text, ["tool_call", "answer"])
            return _action(thought, elements, lambda _, body: _json_call(body))
        except _Malformed as error:
            return FormatError(f"{error} Write {HERMES_CALL} or <answer>text</answer>.")

    def render(self, action: Action, tools: Tools) -> str:
        calls = [{"name": call.name, "arguments": dict(call.arguments)} for call in action.calls]
        return _render(action, [("tool_call", json.dumps(call, ensure_ascii=False)) for call in calls])

    def instructions(self, tools: Tools) -> str:
        functions = [
            {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
            for tool in tools.values()
        ]
        lines = [json.dumps(function, ensure_ascii=False) for function in functions]
        ways = f"Each turn, write {HERMES_CALL} or, to finish, <answer>text</answer>."
        return "\n".join(["Tools:", *lines, ways])


HERMES_CALL = '<tool_call>{"name": ..., "arguments": {...}}</tool_call>'
FORMATS: Mapping[str, ActionFormat] = {"tagged": TaggedFormat(), "hermes": HermesFormat()}


def action_format(name: str) -> ActionFormat:
    """The format registered under the name."""
    if name not in FORMATS:
        raise ValueError(f"no action format {name!r}; formats: {', '.join(FORMATS)}")
    return FORMATS[name]


def _elements(text: str, names: list[str]) -> tuple[str, list[tuple[str, str]]]:
    """The text before the first tag, and the (name, body) of each element; only blanks may follow an element."""
    tags = list(re.finditer(rf"<(/?)({'|'.join(map(re.escape, names))})>", text))
    if not tags:
        raise _Malformed("No action found.")
    elements = []
    for i, tag in enumerate(tags):
        closes, name = tag.groups()
        if i % 2 == 0 and closes:
            raise _Malformed(f"</{name}> closes nothing.")
        if i % 2 == 0 and i + 1 == len(tags):
            raise _Malformed(f"<{name}> is not closed.")
        if i % 2 == 1 and (not closes or name != tags[i - 1][2]):
            raise _Malformed(f"<{tags[i - 1][2]}> is not closed before {tag[0]}.")
        after = text[tag.end() : tags[i + 1].start() if i + 1 < len(tags) else None]
        if i % 2 == 0:
            elements.append((name, _unescape(after.strip())))
        elif after.strip():
            raise _Malformed(f"There is text after </{name}>.")
    return _unescape(text[: tags[0].start()].strip()), elements


def _action(thought: str, elements: list[tuple[str, str]], call: Any) -> Action:
    answers = [body for name, body in elements if name == "answer"]
    if answers and len(elements) > 1:
        raise _Malformed("An answer stands alone, once.")
    if answers:
        return Action(answer=answers[0], thought=thought)
    if len(elements) > MAX_CALLS:
        raise _Malformed(f"At most {MAX_CALLS} calls in a turn, got {len(elements)}.")
    return Action(calls=tuple(call(name, body) for name, body in elements), thought=thought)


def _render(action: Action, bodies: list[tuple[str, str]]) -> str:
    if action.answer is not None:
        bodies = [("answer", action.answer)]
    lines = [_escape(action.thought)] if action.thought else []
    return "\n".join(lines + [f"<{name}>{_escape(body)}</{name}>" for name, body in bodies])


def _only_parameter(tool: Tool) -> tuple[str, str] | None:
    """Name and type of the parameter, if the tool has one and it is a scalar."""
    properties = tool.parameters.get("properties", {})
    if len(properties) != 1:
        return None
    name, schema = next(iter(properties.items()))
    kind = schema.get("type") if isinstance(schema, dict) else None  # a schema may be true, its type a list
    return (name, kind) if isinstance(kind, str) and kind in SCALARS else None


def _arguments(body: str, tool: Tool) -> dict[str, Any]:
    match _only_parameter(tool):
        case (name, _) if not body and name not in tool.parameters.get("required", ()):
            return {}
        case (name, "string"):
            return {name: body}
        case (name, _):
            return {name: _scalar(body)}
    return _json_object(body) if body else {}


def _scalar(body: str) -> Any:
    """The JSON value, or the text itself for the tool to refuse."""
    try:
        return _json(body)
    except _Malformed:
        return body


def _body(arguments: Mapping[str, Any], tool: Tool) -> str:
    only = _only_parameter(tool)
    if only and set(arguments) == {only[0]}:
        value = arguments[only[0]]
        return value if isinstance(value, str) else json.dumps(value)
    return json.dumps(dict(arguments), ensure_ascii=False) if arguments else ""


def _example(tool: Tool) -> str:
    only = _only_parameter(tool)
    names = tool.parameters.get("properties", {})
    body = only[0] if only else "{" + ", ".join(f'"{name}": ...' for name in names) + "}" if names else ""
    return f"<{tool.name}>{body}</{tool.name}>"


def _json_call(body: str) -> ToolCall:
    call = _json_object(body)
    name, arguments = call.get("name"), call.get("arguments", {})
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise _Malformed('A call needs "name", a text, and "arguments", an object.')
    return ToolCall(name, arguments)


def _json_object(text: str) -> dict[str, Any]:
    value = _json(text)
    if not isinstance(value, dict):
        raise _Malformed(f"Expected a JSON object, got {text[:40]!r}.")
    return value


def _json(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise _Malformed(f"Not JSON: {error}.") from None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _escape(text: str) -> str:
    """Keeps what looks like a tag, or like an escape, from being read as one."""
    return re.sub(r"<(?=/?[\w./-]+>)", "&lt;", re.sub(r"&(?=(amp;)*lt;)", "&amp;", text))


def _unescape(text: str) -> str:
    return re.sub(r"&(amp;)?(?=((?:amp;)*)lt;)(?(1)|lt;)", lambda match: "&" if match[1] else "<", text)
