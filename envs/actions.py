"""What an agent does in a turn, and how the arguments of its calls stand in a text."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..tools import Tool, ToolCall

MAX_CALLS = 8  # in one action
MAX_DEPTH = 64  # of JSON: what was read can be written, copied and pickled again
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
    """A way to write actions. Parsing what was rendered gives the action back, up to blanks around its texts.

    Any text is parsed in a time linear in its length.
    """

    def parse(self, text: str, tools: Tools) -> Action | FormatError: ...

    def render(self, action: Action, tools: Tools) -> str: ...

    def instructions(self, tools: Tools) -> str: ...  # for the system message


class Malformed(Exception):
    """Carries a FormatError's text out of a parser."""


def one_action(thought: str, calls: Sequence[ToolCall], answers: Sequence[str]) -> Action:
    """The action of what was found in a text."""
    if answers and len(calls) + len(answers) > 1:
        raise Malformed("An answer stands alone, once.")
    if answers:
        return Action(answer=answers[0], thought=thought)
    if not calls:
        raise Malformed("No action found.")
    if len(calls) > MAX_CALLS:
        raise Malformed(f"At most {MAX_CALLS} calls in a turn, got {len(calls)}.")
    return Action(tuple(calls), thought=thought)


def read_arguments(body: str, tool: Tool) -> dict[str, Any]:
    """The only parameter as it stands, if the tool has one and it is a scalar, else a JSON object; blank: none."""
    only = _only_parameter(tool)
    if only is None:
        return json_object(body) if body.strip() else {}
    name, kind = only
    if not body.strip() and name not in tool.parameters.get("required", ()):
        return {}
    value = _json_or_text(body) if kind != "string" or body.lstrip().startswith("{") else body
    if isinstance(value, dict) and value.keys() == {name}:
        return value
    return {name: body if kind == "string" else value}


def write_arguments(arguments: Mapping[str, Any], tool: Tool) -> str:
    """What `read_arguments` reads: as plain as can be."""
    if not arguments:
        return ""
    written = json.dumps(dict(arguments), ensure_ascii=False)
    only = _only_parameter(tool)
    if only and arguments.keys() == {only[0]}:
        value = arguments[only[0]]
        plain = value if isinstance(value, str) else json.dumps(value)
        return plain if read_arguments(plain, tool) == arguments else written
    return written


def shown_arguments(tool: Tool) -> str:
    """Stands for the arguments in an example."""
    only = _only_parameter(tool)
    names = tool.parameters.get("properties", {})
    return only[0] if only else "{" + ", ".join(f'"{name}": ...' for name in names) + "}" if names else ""


def json_object(text: str) -> dict[str, Any]:
    value = _json(text)
    if not isinstance(value, dict):
        raise Malformed(f"Expected a JSON object, got {text[:40]!r}.")
    return value


def _only_parameter(tool: Tool) -> tuple[str, str] | None:
    """Name and type of the parameter, if the tool has one and it is a scalar."""
    properties = tool.parameters.get("properties", {})
    if len(properties) != 1:
        return None
    name, schema = next(iter(properties.items()))
    kind = schema.get("type") if isinstance(schema, Mapping) else None
    return (name, kind) if isinstance(kind, str) and kind in SCALARS else None


def _json_or_text(body: str) -> Any:
    """The JSON value, or the text itself for the tool to refuse."""
    try:
        return _json(body)
    except Malformed:
        return body


def _json(text: str) -> Any:
    try:
        value = json.loads(text, parse_constant=_refuse, parse_float=_finite)
        if re.search(r"\\u[dD][89a-fA-F]", text):
            json.dumps(value, ensure_ascii=False).encode()  # raises for half of a surrogate pair, which is no text
    except (ValueError, RecursionError) as error:
        raise Malformed(f"Not JSON: {error}.") from None
    if not _shallow(value, MAX_DEPTH):
        raise Malformed(f"Not JSON: nested deeper than {MAX_DEPTH}.")
    return value


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _finite(digits: str) -> float:
    if math.isinf(value := float(digits)):
        raise ValueError(f"{digits[:40]} is too large")
    return value


def _shallow(value: Any, levels: int) -> bool:
    if not isinstance(value, dict | list):
        return True
    inner = value.values() if isinstance(value, dict) else value
    return levels > 0 and all(_shallow(item, levels - 1) for item in inner)
