"""Action formats by name: any text parses to an Action or to a FormatError value."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...tools import Tool, ToolCall
from .actions import (
    THOUGHT_END,
    Action,
    ActionFormat,
    FormatError,
    Malformed,
    Marks,
    Tools,
    json_object,
    one_action,
    read_arguments,
    read_call,
    read_reply,
    shown_arguments,
    write_arguments,
)
from .families import (
    DeepSeekFormat,
    GemmaFormat,
    HarmonyFormat,
    HermesFormat,
    LlamaFormat,
    MistralFormat,
    ParameterFormat,
    PythonicFormat,
    marks_of,
    shown,
)
from .text import FencedFormat, ReactFormat


@dataclass(frozen=True)
class TaggedFormat:
    """A tag per tool and <answer>: `<search>capital of Japan</search>`.

    A tool's only parameter stands in the tag as it is; a tool with several takes a JSON object. An argument that has
    one of the tags in it stands in a JSON object as well, with `\\u003c` for their `<`.
    """

    def parse(self, text: str, tools: Tools) -> Action | FormatError:
        try:
            return read_reply(text, lambda text, place: self._read(text, place, tools))
        except Malformed as error:
            return FormatError(f"{error} Write {self._ways(tools)}.")

    def render(self, action: Action, tools: Tools) -> str:
        tags = _tags(tools)
        lines = [tags.hide(action.thought)] if action.thought else []
        for call in action.calls:
            arguments = write_arguments(call.arguments, tools[call.name], tags.pattern)
            lines.append(f"<{call.name}>{arguments}</{call.name}>")
        if action.answer is not None:
            lines.append(f"<answer>{_tags(tools, THOUGHT_END).hide(action.answer)}</answer>")
        return "\n".join(lines)

    def instructions(self, tools: Tools) -> str:
        lines = [f"{_example(tool)} {tool.description}" for tool in tools.values()]
        return "\n".join(["Each turn, write one of:", *lines, "<answer>text</answer> Give the final answer."])

    def _read(self, text: str, place: int, tools: Tools) -> Action:
        tags = _tags(tools)
        start, elements = _elements(text, place, [*tools, "answer"])
        calls = [ToolCall(name, read_arguments(body, tools[name])) for name, body in elements if name != "answer"]
        answers = [_tags(tools, THOUGHT_END).show(body) for name, body in elements if name == "answer"]
        return one_action(tags.show(text[:start].strip()), calls, answers)

    def _ways(self, tools: Tools) -> str:
        return " or ".join([*map(_example, tools.values()), "<answer>text</answer>"])


@dataclass(frozen=True)
class OpenAIFormat:
    """The assistant's message of OpenAI's chat completions, as JSON.

    With `tool_calls`, `content` is the thought before them; alone, `content` is the final answer, and a thought before
    it stands in `reasoning_content`. Calls get ids by their place in the turn.
    """

    def parse(self, text: str, tools: Tools) -> Action | FormatError:
        try:
            return read_reply(text, lambda text, place: self._read(text, place, tools))
        except Malformed as error:
            return FormatError(f"{error} Write {OPENAI_CALL} or {OPENAI_ANSWER}.")

    def _read(self, text: str, place: int, tools: Tools) -> Action:
        message = json_object(text[place:])
        if unknown := sorted(key for key in message.keys() - _MESSAGE if message[key]):
            raise Malformed(f'A message has no {unknown[0][:40]!r}; a call stands in "tool_calls".')
        content, reasoning = _text(message, "content"), _text(message, "reasoning_content")
        thoughts = [text[:place].strip(), reasoning]
        if calls := [read_call(call, tools) for call in _tool_calls(message)]:
            return one_action("\n".join(filter(None, [*thoughts, content])), calls, [])
        return one_action("\n".join(filter(None, thoughts)), [], [] if content is None else [content])

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
        functions = [{"type": "function", "function": shown(tool)} for tool in tools.values()]
        ways = f"Each turn, write {OPENAI_CALL} or, to finish, {OPENAI_ANSWER}."
        return "\n".join(["Tools:", *(json.dumps(function, ensure_ascii=False) for function in functions), ways])


_MESSAGE = frozenset({"role", "content", "reasoning_content", "tool_calls", "function_call"})
OPENAI_CALL = '{"tool_calls": [{"type": "function", "function": {"name": ..., "arguments": "{...}"}}]}'
OPENAI_ANSWER = '{"content": "the answer"}'
DEFAULT = "tagged"
FORMATS: Mapping[str, ActionFormat] = {
    "tagged": TaggedFormat(),
    "hermes": HermesFormat(),
    "react": ReactFormat(),
    "fenced": FencedFormat(),
    "openai": OpenAIFormat(),
    "llama": LlamaFormat(),
    "pythonic": PythonicFormat(),
    "gemma": PythonicFormat("```tool_code\n", "\n", "\n```"),
    "gemma4": GemmaFormat("<|tool_call>", "<tool_call|>", '<|"|>', marks_of(r"\|tool_call>")),
    "functiongemma": GemmaFormat(
        "<start_function_call>", "<end_function_call>", "<escape>", marks_of("start_function_call>")
    ),
    "lfm2": PythonicFormat("<|tool_call_start|>[", ", ", "]<|tool_call_end|>"),
    "mistral": MistralFormat(named=False),
    "mistral-named": MistralFormat(named=True),
    "deepseek": DeepSeekFormat(fenced=True),
    "deepseek-v3.1": DeepSeekFormat(fenced=False),
    "glm": ParameterFormat(
        ("<tool_call>", "</tool_call>"),
        ("{name}\n", ""),
        ("<arg_key>{name}</arg_key>\n<arg_value>", "</arg_value>\n"),
        marks_of("tool_call>"),
    ),
    "qwen-coder": ParameterFormat(
        ("<tool_call>", "</tool_call>"),
        ("\n<function={name}>\n", "</function>\n"),
        ("<parameter={name}>\n", "\n</parameter>\n"),
        marks_of("tool_call>", "function="),
    ),
    "harmony": HarmonyFormat(),
}


# (texts, format): models whose chat template has all the texts were trained on the format. The first that fits counts.
TEMPLATES = (
    (("<|channel|>", "functions."), "harmony"),
    (("<｜tool▁calls▁begin｜>", "```json"), "deepseek"),
    (("<｜tool▁calls▁begin｜>",), "deepseek-v3.1"),
    (("<function=",), "qwen-coder"),
    (("<arg_key>",), "glm"),
    (("[ARGS]",), "mistral-named"),
    (("[TOOL_CALLS]",), "mistral"),
    (("<|tool_call>",), "gemma4"),
    (("<start_function_call>",), "functiongemma"),
    (("<|tool_call_start|>",), "lfm2"),
    (("<|tool_list_start|>",), "lfm2"),
    (("<tool_call>",), "hermes"),
    (("<|python_start|>",), "pythonic"),
    (('"parameters": ', "<|start_header_id|>"), "llama"),
    (("<start_of_turn>",), "gemma"),
)


def format_of(template: str | Mapping[str, str] | None) -> str:
    """The name of the format in which models with this chat template write calls; `tagged` where it shows none."""
    text = "\n".join(template.values()) if isinstance(template, Mapping) else template or ""
    return next((name for marks, name in TEMPLATES if all(mark in text for mark in marks)), DEFAULT)


def action_format(name: str) -> ActionFormat:
    """The format registered under the name."""
    if name not in FORMATS:
        raise ValueError(f"no action format {name!r}; formats: {', '.join(FORMATS)}")
    return FORMATS[name]


def _tags(tools: Tools, *others: str) -> Marks:
    names = "|".join(map(re.escape, [*tools, "answer"]))
    return Marks({"<": "|".join([f"/?(?:{names})>", *(re.escape(other[1:]) for other in others)])})


_ELEMENT = re.compile(r"<([\w.-]{1,40})>(?=[^<]*</\1>)")  # of a name that is no tool's


def _elements(text: str, place: int, names: list[str]) -> tuple[int, list[tuple[str, str]]]:
    """Where the first tag stands, and the (name, body) of each element; only blanks may follow an element."""
    tags = list(re.compile(rf"<(/?)({'|'.join(map(re.escape, names))})>").finditer(text, place))
    if not tags:
        other = _ELEMENT.search(text, place)
        raise Malformed(f"There is no tool {other[1]!r}." if other else "No action found.")
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
            elements.append((name, after.strip()))
        elif after.strip():
            raise Malformed(f"There is text after </{name}>.")
    return tags[0].start(), elements


def _example(tool: Tool) -> str:
    return f"<{tool.name}>{shown_arguments(tool)}</{tool.name}>"


def _text(message: Mapping[str, Any], key: str) -> str | None:
    value = message.get(key)
    if not isinstance(value, str | None):
        raise Malformed(f'"{key}" is a text or null.')
    return value and value.strip()


def _tool_calls(message: Mapping[str, Any]) -> Sequence[Any]:
    """The calls, and the one in `function_call`, in which a message could hold one before there was `tool_calls`."""
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list):
        raise Malformed('"tool_calls" is a list.')
    return [*calls, *([message["function_call"]] if message.get("function_call") else [])]
