"""How an agent writes tool calls and answers: any text parses to an Action or to a FormatError value."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..tools import Tool, ToolCall
from .actions import (
    Action,
    ActionFormat,
    FormatError,
    Malformed,
    Tools,
    json_object,
    one_action,
    read_arguments,
    shown_arguments,
    write_arguments,
)
from .textformats import FencedFormat, ReactFormat


@dataclass(frozen=True)
class TaggedFormat:
    """A tag per tool and <answer>: `<search>capital of Japan</search>`.

    A tool's only parameter stands in the tag as it is; a tool with several takes a JSON object.
    """

    def parse(self, text: str, tools: Tools) -> Action | FormatError:
        try:
            thought, elements = _elements(text, [*tools, "answer"])
            calls = [ToolCall(name, read_arguments(body, tools[name])) for name, body in elements if name != "answer"]
            return one_action(thought, calls, [body for name, body in elements if name == "answer"])
        except Malformed as error:
            return FormatError(f"{error} Write {self._ways(tools)}.")

    def render(self, action: Action, tools: Tools) -> str:
        bodies = [(call.name, write_arguments(call.arguments, tools[call.name])) for call in action.calls]
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
            calls = [_call(json_object(body)) for name, body in elements if name == "tool_call"]
            return one_action(thought, calls, [body for name, body in elements if name == "answer"])
        except Malformed as error:
            return FormatError(f"{error} Write {HERMES_CALL} or <answer>text</answer>.")

    def render(self, action: Action, tools: Tools) -> str:
        calls = [{"name": call.name, "arguments": dict(call.arguments)} for call in action.calls]
        return _render(action, [("tool_call", json.dumps(call, ensure_ascii=False)) for call in calls])

    def instructions(self, tools: Tools) -> str:
        ways = f"Each turn, write {HERMES_CALL} or, to finish, <answer>text</answer>."
        return "\n".join(["Tools:", *(json.dumps(_shown(tool), ensure_ascii=False) for tool in tools.values()), ways])


@dataclass(frozen=True)
class OpenAIFormat:
    """The assistant's message of OpenAI's chat completions, as JSON.

    With `tool_calls`, `content` is the thought before them; alone, `content` is the final answer, and a thought before
    it stands in `reasoning_content`. Calls get ids by their place in the turn.
    """

    def parse(self, text: str, tools: Tools) -> Action | FormatError:
        try:
            message = json_object(text)
            content, reasoning = _text(message, "content"), _text(message, "reasoning_content") or ""
            if calls := [_call(_function(call)) for call in _tool_calls(message)]:
                return one_action("\n".join(filter(None, [reasoning, content])), calls, [])
            return one_action(reasoning, [], [] if content is None else [content])
        except Malformed as error:
            return FormatError(f"{error} Write {OPENAI_CALL} or {OPENAI_ANSWER}.")

    def render(self, action: Action, tools: Tools) -> str:
        message: dict[str, Any] = {"content": action.thought or None}
        if action.answer is not None:
            message = {"content": action.answer, "reasoning_content": action.thought or None}
        if action.calls:
            message["tool_calls"] = [
                {
                    "id": f"call{place:05}",  # nine letters and digits, which some chat templates insist on
                    "type": "function",
                    "function": {
                        "name": call.name,
                        "arguments": json.dumps(dict(call.arguments), ensure_ascii=False),
                    },
                }
                for place, call in enumerate(action.calls)
            ]
        return json.dumps({key: value for key, value in message.items() if value is not None}, ensure_ascii=False)

    def instructions(self, tools: Tools) -> str:
        functions = [{"type": "function", "function": _shown(tool)} for tool in tools.values()]
        ways = f"Each turn, write {OPENAI_CALL} or, to finish, {OPENAI_ANSWER}."
        return "\n".join(["Tools:", *(json.dumps(function, ensure_ascii=False) for function in functions), ways])


HERMES_CALL = '<tool_call>{"name": ..., "arguments": {...}}</tool_call>'
OPENAI_CALL = '{"tool_calls": [{"type": "function", "function": {"name": ..., "arguments": "{...}"}}]}'
OPENAI_ANSWER = '{"content": "the answer"}'
FORMATS: Mapping[str, ActionFormat] = {
    "tagged": TaggedFormat(),
    "hermes": HermesFormat(),
    "react": ReactFormat(),
    "fenced": FencedFormat(),
    "openai": OpenAIFormat(),
}


def action_format(name: str) -> ActionFormat:
    """The format registered under the name."""
    if name not in FORMATS:
        raise ValueError(f"no action format {name!r}; formats: {', '.join(FORMATS)}")
    return FORMATS[name]


def _elements(text: str, names: list[str]) -> tuple[str, list[tuple[str, str]]]:
    """The text before the first tag, and the (name, body) of each element; only blanks may follow an element."""
    tags = list(re.finditer(rf"<(/?)({'|'.join(map(re.escape, names))})>", text))
    if not tags:
        raise Malformed("No action found.")
    elements = []
    for i, tag in enumerate(tags):
        closes, name = tag.groups()
        if i % 2 == 0 and closes:
            raise Malformed(f"</{name}> closes nothing.")
        if i % 2 == 0 and i + 1 == len(tags):
            raise Malformed(f"<{name}> is not closed.")
        if i % 2 == 1 and (not closes or name != tags[i - 1][2]):
            raise Malformed(f"<{tags[i - 1][2]}> is not closed before {tag[0]}.")
        after = text[tag.end() : tags[i + 1].start() if i + 1 < len(tags) else None]
        if i % 2 == 0:
            elements.append((name, _unescape(after.strip())))
        elif after.strip():
            raise Malformed(f"There is text after </{name}>.")
    return _unescape(text[: tags[0].start()].strip()), elements


def _render(action: Action, bodies: list[tuple[str, str]]) -> str:
    if action.answer is not None:
        bodies = [("answer", action.answer)]
    lines = [_escape(action.thought)] if action.thought else []
    return "\n".join(lines + [f"<{name}>{_escape(body)}</{name}>" for name, body in bodies])


def _example(tool: Tool) -> str:
    return f"<{tool.name}>{shown_arguments(tool)}</{tool.name}>"


def _shown(tool: Tool) -> dict[str, Any]:
    return {"name": tool.name, "description": tool.description, "parameters": tool.parameters}


def _call(function: Mapping[str, Any]) -> ToolCall:
    name, arguments = function.get("name"), function.get("arguments", {})
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise Malformed('A call needs "name", a text, and "arguments", an object.')
    return ToolCall(name, arguments)


def _text(message: Mapping[str, Any], key: str) -> str | None:
    value = message.get(key)
    if not isinstance(value, str | None):
        raise Malformed(f'"{key}" is a text or null.')
    return value and value.strip()


def _tool_calls(message: Mapping[str, Any]) -> Sequence[Any]:
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list):
        raise Malformed('"tool_calls" is a list.')
    return calls


def _function(call: Any) -> Mapping[str, Any]:
    """A call's name and arguments, which are JSON in a text; some servers give the object itself."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise Malformed('A tool call needs "function", an object.')
    arguments = function.get("arguments") or "{}"
    return {**function, "arguments": json_object(arguments) if isinstance(arguments, str) else arguments}


def _escape(text: str) -> str:
    """Keeps what looks like a tag, or like an escape, from being read as one."""
    return re.sub(r"<(?=/?[\w./-]+>)", "&lt;", re.sub(r"&(?=(amp;)*lt;)", "&amp;", text))


def _unescape(text: str) -> str:
    return re.sub(r"&(amp;)?(?=((?:amp;)*)lt;)(?(1)|lt;)", lambda match: "&" if match[1] else "<", text)
