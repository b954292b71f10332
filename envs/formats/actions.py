"""What an agent does in a turn, and what all formats share: arguments, calls as JSON, marks within texts."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ...tools import Tool, ToolCall

MAX_CALLS = 8  # in one action
MAX_DEPTH = 64  # of JSON, so that what was read can be written, copied and pickled
SCALARS = frozenset({"string", "integer", "number", "boolean"})
ARGUMENTS = ("arguments", "parameters", "args", "input")  # the key under which a call's arguments stand
BESIDE = frozenset({"id", "call_id", "tool_call_id", "type", "index"})  # keys of a call that say nothing of what to do
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
    """A way to write actions. Parsing what was rendered gives the action back: the arguments as they were, up to blanks
    around them; thought and answer up to blanks around them and line ends, which are read as newlines.

    Any text is parsed in a time linear in its length.
    """

    def parse(self, text: str, tools: Tools) -> Action | FormatError: ...

    def render(self, action: Action, tools: Tools) -> str: ...

    def instructions(self, tools: Tools) -> str: ...  # for the system message


class Malformed(Exception):
    """Carries a FormatError's text out of a parser."""


def one_action(thought: str, calls: Sequence[ToolCall], answers: Sequence[str]) -> Action:
    """The action that these parts of a text make. Malformed where they make none."""
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
    """The arguments in a body: the only parameter as it stands, if the tool has just one and it is a scalar, otherwise
    a JSON object. A blank body has no arguments, unless the only parameter is a text that is required."""
    only = _only_parameter(tool)
    if only is None:
        return json_object(body) if body.strip() else {}
    name, kind = only
    if not body.strip() and (kind != "string" or name not in tool.parameters.get("required", ())):
        return {}
    value = _json_or_text(body) if kind != "string" or body.lstrip().startswith("{") else body
    if isinstance(value, dict) and value.keys() == {name}:
        return value
    return {name: body if kind == "string" else value}


def write_arguments(arguments: Mapping[str, Any], tool: Tool, marks: re.Pattern[str] | None = None) -> str:
    """What `read_arguments` reads: the only parameter as it is where that works, otherwise JSON.

    Text with one of the format's `marks` does not stand as it is; in JSON, the marks' `<` is `\\u003c`.
    """
    if not arguments:
        return ""
    only = _only_parameter(tool)
    if only and arguments.keys() == {only[0]}:
        value = arguments[only[0]]
        plain = value if isinstance(value, str) else json.dumps(value)
        if "\r" not in plain and not (marks and marks.search(plain)) and read_arguments(plain, tool) == arguments:
            return plain
    written = json.dumps(dict(arguments), ensure_ascii=False)
    return marks.sub(lambda mark: mark[0].replace("<", "\\u003c"), written) if marks else written


def shown_arguments(tool: Tool) -> str:
    """A text that stands for the arguments in an example."""
    only = _only_parameter(tool)
    names = tool.parameters.get("properties", {})
    return only[0] if only else "{" + ", ".join(f'"{name}": ...' for name in names) + "}" if names else ""


def json_object(text: str) -> dict[str, Any]:
    value = _json(text)
    if not isinstance(value, dict):
        raise Malformed(f"Expected a JSON object, got {text[:40]!r}.")
    return value


def json_at(text: str, place: int) -> tuple[Any, int]:
    """The JSON value that begins at the place or after blanks there, and where it ends."""
    try:
        value, end = _DECODER.raw_decode(text, after_blanks(text, place))
        return _sound(value, text[place:end]), end
    except (ValueError, RecursionError) as error:
        raise Malformed(f"Not JSON: {error}.") from None


def read_call(value: Any, tools: Tools) -> ToolCall:
    """A call from a JSON object, in one of the usual ways to write it. Keys that none of them has are refused."""
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        _refuse_unknown(value.keys() - {"function"})
        value = value["function"]
    name = value.get("name") if isinstance(value, dict) else None
    if not isinstance(name, str):
        raise Malformed('A call needs "name", a text, and "arguments", an object.')
    _refuse_unknown(value.keys() - {"name", *ARGUMENTS})
    keys = [key for key in ARGUMENTS if key in value]
    if len(keys) > 1:
        raise Malformed(f'A call has its arguments once, not under "{keys[0]}" and "{keys[1]}".')
    return ToolCall(name, _arguments(keys[0], value[keys[0]], tools.get(name)) if keys else {})


def _refuse_unknown(keys: Iterable[str]) -> None:
    if unknown := sorted(set(keys) - BESIDE):
        named = ", ".join(f'"{key[:40]}"' for key in unknown[:4])
        raise Malformed(f'A call has "name" and "arguments", not {named}; what a tool takes stands in "arguments".')


def _arguments(key: str, value: Any, tool: Tool | None) -> dict[str, Any]:
    """Arguments that stand under a key: an object, or the same as a text."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return {}
    if isinstance(value, str):
        plain = tool and key != "arguments" and not value.lstrip().startswith("{")
        return read_arguments(value, tool) if tool and plain else json_object(value)
    if not isinstance(value, dict):
        raise Malformed(f'"{key}" of a call is an object.')
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
        return _sound(_DECODER.decode(text), text)
    except (ValueError, RecursionError) as error:
        raise Malformed(f"Not JSON: {error}.") from None


def _sound(value: Any, text: str) -> Any:
    """The value that was read from the text. ValueError where it could not be kept or written."""
    if not shallow(value, MAX_DEPTH):
        raise ValueError(f"nested deeper than {MAX_DEPTH}")
    if re.search(r"\\u[dD][89a-fA-F]", text):
        json.dumps(value, ensure_ascii=False).encode()  # raises for half of a surrogate pair, which is no text
    return value


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def finite(digits: str) -> float:
    if math.isinf(value := float(digits)):
        raise ValueError(f"{digits[:40]} is too large")
    return value


def once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """The pairs as a dict. ValueError where a key stands twice: one of its values would be lost."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key[:40]!r} stands twice")
        found[key] = value
    return found


def shallow(value: Any, levels: int) -> bool:
    if not isinstance(value, dict | list):
        return True
    inner = value.values() if isinstance(value, dict) else value
    return levels > 0 and all(shallow(item, levels - 1) for item in inner)


_DECODER = json.JSONDecoder(  # not strict: models write newlines within strings as they are
    strict=False, parse_constant=_refuse, parse_float=finite, object_pairs_hook=once
)


def after_blanks(text: str, place: int) -> int:
    """The place of the next character that is not a blank, or of the text's end."""
    found = _NO_BLANK.search(text, place)
    return found.start() if found else len(text)


_NO_BLANK = re.compile(r"\S")
_AWKWARD = re.compile(r"<(?=/?(?:answer|think|tool_call)>|[|｜])|\[(?=(?:TOOL_CALLS|ARGS|CALL_ID)\])")


def write_json(value: Any) -> str:
    """JSON without the marks and special tokens of any model: within strings, they begin with an escape."""
    return _AWKWARD.sub(lambda mark: f"\\u{ord(mark[0]):04x}", json.dumps(value, ensure_ascii=False))


# texts with marks in them


ENTITIES = {"<": "lt", "[": "lsqb", "{": "lcub", "`": "grave"}  # as HTML names them
THOUGHT_END = "</think>"


class Marks:
    """The marks of a format: texts that begin and end its calls and answers. A thought and an answer can hold them too,
    with a mark's first character as HTML writes it (`&lt;answer>`, and `&amp;lt;answer>` for that itself). All other
    text stands as it is."""

    def __init__(self, marks: Mapping[str, str]) -> None:
        """`marks` has the first characters of marks, each with the pattern of what follows it."""
        self.marks = dict(marks)
        self.pattern = re.compile("|".join(f"{re.escape(first)}(?:{rest})" for first, rest in marks.items()))

    def hide(self, text: str) -> str:
        for first, rest in self.marks.items():
            text = re.sub(rf"&(?=(?:amp;)*+{ENTITIES[first]};(?:{rest}))", "&amp;", text)
            text = re.sub(rf"{re.escape(first)}(?={rest})", f"&{ENTITIES[first]};", text)
        return text

    def show(self, text: str) -> str:
        for first, rest in reversed(self.marks.items()):
            name = ENTITIES[first]
            hidden = rf"&(?:amp;(?=(?:amp;)*+{name};(?:{rest}))|{name};(?={rest}))"
            text = re.sub(hidden, functools.partial(_shown, first), text)
        return text


def _shown(first: str, found: re.Match[str]) -> str:
    return "&" if found[0] == "&amp;" else first


def read_reply(text: str, read: Callable[[str, int], Action]) -> Action:
    """The action that `read` finds in the reply from a place on. Marks in the model's thinking do not count.

    A reply that begins with <think> is read from </think> on. Another reply is read from there only if it cannot be
    read from its beginning: chat templates may write <think> themselves, so that the reply begins within the thinking.
    """
    text = text.replace("\r\n", "\n")
    thought = text.find(THOUGHT_END) + len(THOUGHT_END) if THOUGHT_END in text else 0
    if thought and text.lstrip().startswith("<think>"):
        return read(text, thought)
    try:
        return read(text, 0)
    except Malformed:
        if not thought:
            raise
    return read(text, thought)
