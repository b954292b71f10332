"""Formats of families of models, which write tool calls as they were trained to. <answer> ends the episode."""

from __future__ import annotations

import functools
import json
import keyword
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ...tools import Tool, ToolCall
from .actions import (
    THOUGHT_END,
    Action,
    FormatError,
    Malformed,
    Marks,
    Tools,
    after_blanks,
    json_at,
    json_object,
    one_action,
    read_arguments,
    read_call,
    read_reply,
    write_json,
)
from .literals import distinct, past_comma, read_literal, read_mapping, write_literal

# Tokens that end a turn. A server may leave one in its text, and some models write others than their template does.
ENDS = (
    *("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|eot|>", "<|eom|>", "<|end|>", "</s>", "<eos>"),
    *("<end_of_turn>", "<turn|>", "<|tool_response>", "<start_function_response>", "<｜end▁of▁sentence｜>"),
    *("<|user|>", "<|observation|>", "<|endoftext|>", "<|end_of_text|>"),
)
NAME = r"[\w./-]++"
IN_ANSWER = Marks({"<": "/?answer>|/think>"})


class ModelFormat(ABC):
    """A thought, then calls as a family of models writes them, or <answer>. Tokens that end a turn are cut off."""

    marks: Marks  # what begins calls and answers
    tokens: tuple[str, ...] = ()  # texts of the format that may be special tokens of the model

    @abstractmethod
    def way(self) -> str:
        """How a call is written, as the agent reads it."""

    @abstractmethod
    def read_calls(self, text: str, place: int, tools: Tools) -> tuple[list[ToolCall], int]:
        """The calls that begin at a mark, and where they end."""

    @abstractmethod
    def write_calls(self, calls: tuple[ToolCall, ...], tools: Tools) -> str: ...

    def read_bare(self, text: str, place: int, tools: Tools) -> tuple[list[ToolCall], int]:
        """The calls in a text without marks: a server may have left out special tokens."""
        return [], place

    def parse(self, text: str, tools: Tools) -> Action | FormatError:
        try:
            return read_reply(_without_ends(text), lambda text, place: self._read(text, place, tools))
        except Malformed as error:
            return FormatError(f"{error} Write {self.way()} or <answer>text</answer>.")

    def render(self, action: Action, tools: Tools) -> str:
        if action.answer is not None:
            body = f"<answer>{IN_ANSWER.hide(action.answer)}</answer>"
        else:
            body = self.write_calls(action.calls, tools)
        return "\n".join(filter(None, [self.marks.hide(action.thought), body]))

    def instructions(self, tools: Tools) -> str:
        ways = f"Each turn, write {self.way()} or, to finish, <answer>text</answer>."
        return "\n".join(["Tools:", *(json.dumps(shown(tool), ensure_ascii=False) for tool in tools.values()), ways])

    def _read(self, text: str, place: int, tools: Tools) -> Action:
        mark = self.marks.pattern.search(text, place)
        calls: list[ToolCall] = []
        answers: list[str] = []
        start = mark.start() if mark else place
        if mark is None:
            calls, end = self.read_bare(text, after_blanks(text, place), tools)
        elif mark[0] == "</answer>":
            raise Malformed("</answer> closes nothing.")
        elif mark[0] == "<answer>":
            answer, end = _read_answer(text, mark.end())
            answers.append(answer)
        else:
            calls, end = self.read_calls(text, start, tools)
        if (calls or answers) and (rest := text[end:].strip()):
            raise Malformed(
                "An answer stands alone, once." if rest.startswith("<answer>") else "There is text after it."
            )
        return one_action(self.marks.show(text[:start]).strip(), calls, answers)


def shown(tool: Tool) -> dict[str, Any]:
    return {"name": tool.name, "description": tool.description, "parameters": tool.parameters}


def _without_ends(text: str) -> str:
    end = len(text)
    while True:
        while end and text[end - 1].isspace():
            end -= 1
        token = next((token for token in ENDS if text.endswith(token, 0, end)), None)
        if token is None:
            return text[:end]
        end -= len(token)


def _read_answer(text: str, place: int) -> tuple[str, int]:
    end = text.find("</answer>", place)
    body = text[place : end if end >= 0 else None]
    if "<answer>" in body:
        raise Malformed("<answer> is not closed before <answer>.")
    if end < 0:
        raise Malformed("<answer> is not closed.")
    return IN_ANSWER.show(body.strip()), end + len("</answer>")


def marks_of(*openings: str, **others: str) -> Marks:
    """The marks of a format: <answer>, </answer>, and what the patterns match. `openings` are patterns of what follows
    a `<`; `others` are patterns of what follows another first character, their keyword."""
    return Marks({"<": "|".join(["/?answer>", *openings]), **others})


# calls as JSON objects


def read_json_calls(text: str, place: int, tools: Tools) -> tuple[list[ToolCall], int]:
    """The calls in JSON objects and lists of them that follow each other, and where they end."""
    calls: list[ToolCall] = []
    while text[(start := after_blanks(text, place)) : start + 1] in ("{", "["):
        value, place = json_at(text, start)
        calls += [read_call(item, tools) for item in (value if isinstance(value, list) else [value])]
        if text[(start := after_blanks(text, place)) : start + 1] in (";", ","):
            place = start + 1
    return calls, place


def _call(call: ToolCall, key: str = "arguments") -> str:
    return write_json({"name": call.name, key: dict(call.arguments)})


class TaggedCalls(ModelFormat):
    """Calls within a pair of tags. JSON is read there in any case: a family's own way cannot hold everything."""

    tags: tuple[str, str]

    @property
    def alone(self) -> bool:
        """Whether calls in the family's own way are read without the tags as well."""
        return False

    def read_own(self, text: str, place: int, tools: Tools) -> tuple[ToolCall, int] | None:
        """The call at the place in the family's own way, and where it ends."""
        return None

    def read_calls(self, text: str, place: int, tools: Tools) -> tuple[list[ToolCall], int]:
        calls: list[ToolCall] = []
        inside, end = False, place
        while True:
            place = after_blanks(text, place)
            edge = self.tags[inside]
            if text.startswith(edge, place):
                inside, place = not inside, place + len(edge)
            elif inside and text[place : place + 1] in ("{", "["):
                found, place = read_json_calls(text, place, tools)
                calls += found
            elif (inside or self.alone) and (own := self.read_own(text, place, tools)):
                calls.append(own[0])
                place = own[1]
            elif inside:
                fault = "holds no call" if self.tags[1] in text[place:] else "is not closed"
                raise Malformed(f"{self.tags[0]} {fault}{_at(text, place)}.")
            else:
                return calls, end
            end = place


def _at(text: str, place: int) -> str:
    return f" at {text[place : place + 40]!r}" if text[place:] else ""


@dataclass(frozen=True)
class HermesFormat(TaggedCalls):
    """JSON calls as Hermes and Qwen write them, and <answer> for the end.

    `<tool_call>{"name": "search", "arguments": {"query": "capital of Japan"}}</tool_call>`
    """

    tags = ("<tool_call>", "</tool_call>")
    tokens = ("<tool_call>", "</tool_call>")
    marks = marks_of("tool_call>")

    def way(self) -> str:
        return '<tool_call>{"name": ..., "arguments": {...}}</tool_call>'

    def write_calls(self, calls: tuple[ToolCall, ...], tools: Tools) -> str:
        return "\n".join(f"<tool_call>{_call(call)}</tool_call>" for call in calls)


_OBJECT = r'\{\s*+"(?:name|type|function)"\s*+:'  # how a call begins


@dataclass(frozen=True)
class LlamaFormat(ModelFormat):
    """JSON as Llama 3 writes it: `{"name": "search", "parameters": {"query": "capital of Japan"}}`.

    Several are separated by semicolons. <|python_tag|> may stand before; calls as Python are read as well.
    """

    marks = marks_of(
        r"\|python_tag\|>",
        **{"[": rf"(?=\s*+(?:{_OBJECT}|{NAME}\(|\Z))", "{": rf"(?={_OBJECT[2:]})"},
    )

    def way(self) -> str:
        return '{"name": ..., "parameters": {...}}'

    def read_calls(self, text: str, place: int, tools: Tools) -> tuple[list[ToolCall], int]:
        calls: list[ToolCall] = []
        while True:
            tagged = text.startswith("<|python_tag|>", start := after_blanks(text, place))
            start += len("<|python_tag|>") if tagged else 0
            read = read_python_calls if PYTHON_CALL.match(text, start) else read_json_calls
            found, end = read(text, start, tools)
            if not found:
                return calls, place
            calls, place = calls + found, end

    def write_calls(self, calls: tuple[ToolCall, ...], tools: Tools) -> str:
        return "; ".join(_call(call, "parameters") for call in calls)


@dataclass(frozen=True)
class MistralFormat(ModelFormat):
    """JSON after [TOOL_CALLS]: a list of calls or, if `named` (from tokenizer 11 on), each call's name and arguments.

    `[TOOL_CALLS][{"name": "search", "arguments": {"query": "Japan"}}]`, `[TOOL_CALLS]search[ARGS]{"query": "Japan"}`
    """

    named: bool
    marks = marks_of(**{"[": r"TOOL_CALLS\]"})
    tokens = ("[TOOL_CALLS]", "[ARGS]")

    def way(self) -> str:
        return "[TOOL_CALLS]name[ARGS]{...}" if self.named else '[TOOL_CALLS][{"name": ..., "arguments": {...}}]'

    def read_calls(self, text: str, place: int, tools: Tools) -> tuple[list[ToolCall], int]:
        calls: list[ToolCall] = []
        while text.startswith("[TOOL_CALLS]", start := after_blanks(text, place)):
            found, place = self._read_one(text, start + len("[TOOL_CALLS]"), tools)
            calls += found
        return calls, place

    def _read_one(self, text: str, place: int, tools: Tools) -> tuple[list[ToolCall], int]:
        if named := _NAMED.match(text, place):
            arguments, end = _read_object(text, named.end())
            return [ToolCall(named[1], arguments)], end
        calls, end = read_json_calls(text, place, tools)
        if not calls:
            raise Malformed(f"[TOOL_CALLS] holds no call{_at(text, place)}.")
        return calls, end

    def read_bare(self, text: str, place: int, tools: Tools) -> tuple[list[ToolCall], int]:
        if text.startswith("[", place):
            return read_json_calls(text, place, tools)
        calls: list[ToolCall] = []
        while (named := _NAMED.match(text, place)) and named[1] in tools:
            arguments, place = _read_object(text, named.end())
            calls.append(ToolCall(named[1], arguments))
        return calls, place

    def write_calls(self, calls: tuple[ToolCall, ...], tools: Tools) -> str:
        if self.named:
            return "".join(f"[TOOL_CALLS]{call.name}[ARGS]{write_json(dict(call.arguments))}" for call in calls)
        return f"[TOOL_CALLS][{', '.join(map(_call, calls))}]"


_NAMED = re.compile(rf"\s*+({NAME})(?:\[CALL_ID\]\w*+)?\s*+(?:\[ARGS\])?\s*+(?=\{{)")


def _read_object(text: str, place: int) -> tuple[dict[str, Any], int]:
    value, end = json_at(text, place)
    if not isinstance(value, dict):
        raise Malformed(f"Expected a JSON object, got {text[place : place + 40]!r}.")
    return value, end


@dataclass(frozen=True)
class DeepSeekFormat(ModelFormat):
    """The tool's name and its arguments as JSON between special tokens; V3 and R1 fence the JSON, V3.1 does not.

    One call of several: `<｜tool▁call▁begin｜>search<｜tool▁sep｜>{"query": "capital of Japan"}<｜tool▁call▁end｜>`.
    """

    fenced: bool
    marks = marks_of("｜tool▁calls?▁begin｜>")
    tokens = (
        *("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>"),
        *("<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>"),
    )

    def way(self) -> str:
        return f"<｜tool▁calls▁begin｜>{self._written('name', '{...}')}<｜tool▁calls▁end｜>"

    def _written(self, name: str, arguments: str) -> str:
        inner = (
            f"function<｜tool▁sep｜>{name}\n```json\n{arguments}\n```"
            if self.fenced
            else f"{name}<｜tool▁sep｜>{arguments}"
        )
        return f"<｜tool▁call▁begin｜>{inner}<｜tool▁call▁end｜>"

    def read_calls(self, text: str, place: int, tools: Tools) -> tuple[list[ToolCall], int]:
        calls: list[ToolCall] = []
        while opened := _DEEPSEEK.match(text, place):
            name = opened[1] or opened[2]
            arguments, place = _read_object(text, opened.end())
            closed = _DEEPSEEK_END.match(text, place)
            if closed is None:
                raise Malformed(f"<｜tool▁call▁begin｜> is not closed{_at(text, place)}.")
            calls.append(ToolCall(name, arguments))
            place = closed.end()
        if not calls:
            raise Malformed("<｜tool▁call▁begin｜> holds no call.")
        return calls, place

    def read_bare(self, text: str, place: int, tools: Tools) -> tuple[list[ToolCall], int]:
        calls: list[ToolCall] = []
        while (opened := _DEEPSEEK_BARE.match(text, place)) and (name := _known(opened[1], tools)):
            arguments, place = _read_object(text, opened.end())
            calls.append(ToolCall(name, arguments))
            place = after_blanks(text, place)
            place += 3 if text.startswith("```", place) else 0
        return calls, place

    def write_calls(self, calls: tuple[ToolCall, ...], tools: Tools) -> str:
        written = "\n".join if self.fenced else "".join
        bodies = written(self._written(call.name, write_json(dict(call.arguments))) for call in calls)
        return f"<｜tool▁calls▁begin｜>{bodies}<｜tool▁calls▁end｜>"


_JSON_FENCE = r"\s*+(?:```(?:json)?\s*+)?"
_DEEPSEEK = re.compile(
    r"\s*+(?:<｜tool▁calls▁begin｜>\s*+)?<｜tool▁call▁begin｜>\s*+"
    rf"(?:({NAME})\s*+<｜tool▁sep｜>(?=\s*+\{{)|\w*+<｜tool▁sep｜>\s*+({NAME}){_JSON_FENCE}(?=\{{))"
)
_DEEPSEEK_END = re.compile(r"\s*+(?:```)?\s*+<｜tool▁call▁end｜>(?:\s*+<｜tool▁calls▁end｜>)?")
_DEEPSEEK_BARE = re.compile(rf"\s*+({NAME}){_JSON_FENCE}(?=\{{)")


def _known(name: str, tools: Tools) -> str | None:
    """The tool of that name. The type of the call may stand before it without a blank: `functionsearch` is `search`."""
    return next((each for each in (name, name.removeprefix("function")) if each in tools), None)


# parameters one by one


@dataclass(frozen=True)
class ParameterFormat(TaggedCalls):
    """A pair of tags for each parameter, whose text stands as it is; other values are JSON. Qwen3-Coder, GLM, …

    `<tool_call><function=search><parameter=query>capital of Japan</parameter></function></tool_call>`, on lines.
    What cannot stand as it is (the closing tag, within) makes the whole call a JSON object, as Hermes writes it.
    """

    tags: tuple[str, str]  # around a call
    call: tuple[str, str]  # around the parameters of a call; {name} is the tool's
    parameter: tuple[str, str]  # around a value; {name} is the parameter's
    marks: Marks
    tokens = ("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")

    @property
    def alone(self) -> bool:
        return self.call[0].lstrip().startswith("<")

    @functools.cached_property
    def _patterns(self) -> tuple[re.Pattern[str], re.Pattern[str], re.Pattern[str]]:
        """What opens a call, what opens a parameter and what ends its value."""
        called, opened, closed = self.call[0], *self.parameter
        line_end = r"\n?" if closed.startswith("\n") else ""
        after = f"{_pattern(opened)}|{_pattern(self.call[1] or self.tags[1])}"
        ends = rf"{line_end}{_pattern(closed)}(?=\s*+(?:{after}))"
        return re.compile(_pattern(called)), re.compile(_pattern(opened)), re.compile(ends)

    def way(self) -> str:
        return f"{self.tags[0]}{self._written('tool', {'name': 'value'})}{self.tags[1]}"

    def read_own(self, text: str, place: int, tools: Tools) -> tuple[ToolCall, int] | None:
        called, opened, closed = self._patterns
        call = called.match(text, place)
        if call is None:
            return None
        tool, pairs, place = tools.get(call["name"]), [], after_blanks(text, call.end())
        while parameter := opened.match(text, place):
            start = parameter.end()
            end = closed.search(text, start)
            if end is None:
                raise Malformed(f"The parameter {parameter['name']} of {call['name']} is not closed.")
            value = _typed(text[start : end.start()], _schema(tool, parameter["name"]))
            pairs.append((parameter["name"], value))
            place = after_blanks(text, end.end())
        if not text.startswith(self.call[1].strip(), place):
            raise Malformed(f"The call of {call['name']} is not closed{_at(text, place)}.")
        return ToolCall(call["name"], distinct(pairs)), place + len(self.call[1].strip())

    def write_calls(self, calls: tuple[ToolCall, ...], tools: Tools) -> str:
        return "\n".join(self._write(call, tools) for call in calls)

    def _write(self, call: ToolCall, tools: Tools) -> str:
        written = f"{self.tags[0]}{self._written(call.name, call.arguments)}{self.tags[1]}"
        if THOUGHT_END not in written and "\r" not in written and self._reads(written, call, tools):
            return written
        return f"{self.tags[0]}\n{_call(call)}\n{self.tags[1]}"

    def _reads(self, written: str, call: ToolCall, tools: Tools) -> bool:
        try:
            return self.read_calls(written, 0, tools) == ([call], len(written))
        except Malformed:
            return False

    def _written(self, name: str, arguments: Mapping[str, Any]) -> str:
        parts = [self.call[0].replace("{name}", name)]
        for key, value in arguments.items():
            opening = self.parameter[0].replace("{name}", key)
            plain = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            parts.append(f"{opening}{plain}{self.parameter[1]}")
        return "".join([*parts, self.call[1]])


def _pattern(tag: str) -> str:
    """The tag with any name, and any blanks between its lines; the line end after it is no part of the value."""
    lines = [re.escape(line) for line in tag.strip().split("\n")]
    ending = r"\n?" if tag.endswith("\n") and "{name}" in tag else ""  # before a value
    name = r"(?P<name>[^<>\s](?:[^<>\"\n]*[^<>\"\s])?)"
    joined = r"\s*+".join(lines) + ending
    return joined.replace(r"\{name\}", name)


def _schema(tool: Tool | None, name: str) -> Mapping[str, Any]:
    schema = tool.parameters.get("properties", {}).get(name) if tool else None
    return schema if isinstance(schema, Mapping) else {}


def _typed(text: str, schema: Mapping[str, Any]) -> Any:
    """The value that a parameter's text stands for: the text itself where the schema says so, or it is no JSON."""
    options = [schema, *(each for each in schema.get("anyOf", ()) if isinstance(each, Mapping))]
    kinds = {kind for each in options for kind in _listed(each.get("type"))}
    if kinds == {"string"}:
        return text
    try:
        value, end = _json_or_literal(text)
    except Malformed:
        return text
    if (
        text[end:].strip()
        or isinstance(value, str)
        or ("string" in kinds and not kinds & _KINDS.get(type(value), set()))
    ):
        return text
    return value


_KINDS = {
    bool: {"boolean"},
    int: {"integer", "number"},
    float: {"number"},
    type(None): {"null"},
    list: {"array"},
    dict: {"object"},
}


def _listed(kind: Any) -> list[str]:
    return kind if isinstance(kind, list) else [kind] if isinstance(kind, str) else []


def _json_or_literal(text: str) -> tuple[Any, int]:
    try:
        return json_at(text, 0)
    except Malformed:
        return read_literal(text, 0)


# calls as Python


def read_python_calls(text: str, place: int, tools: Tools) -> tuple[list[ToolCall], int]:
    """The calls in Python that follow each other, alone or in a list, and where they end."""
    calls: list[ToolCall] = []
    place = after_blanks(text, place)
    listed = text.startswith("[", place)
    place += listed
    while named := _PYTHON_NAME.match(text, place):
        arguments, place = _read_python_arguments(text, named.end(), tools.get(named[1]))
        calls.append(ToolCall(named[1], arguments))
        if text[(start := after_blanks(text, place)) : start + 1] in (";", ","):
            place = start + 1
    if listed:
        place = after_blanks(text, place)
        if not text.startswith("]", place):
            raise Malformed(f"The list of calls is not closed{_at(text, place)}.")
        place += 1
    return calls, place


PYTHON_CALL = re.compile(rf"\s*+\[\s*+{NAME}\(")
_PYTHON_NAME = re.compile(rf"\s*+({NAME})\(")
_KEYWORD = re.compile(r"([^\W\d]\w*+)\s*+=(?!=)")


def _read_python_arguments(text: str, place: int, tool: Tool | None) -> tuple[dict[str, Any], int]:
    """The arguments after an opening parenthesis, by name; those without one are the tool's parameters in turn."""
    names = list(tool.parameters.get("properties", {})) if tool else []
    pairs: list[tuple[str, Any]] = []
    while not text.startswith(")", place := after_blanks(text, place)):
        if named := _KEYWORD.match(text, place):
            value, place = read_literal(text, named.end())
            pairs.append((named[1], value))
        elif text.startswith("**{", place):
            more, place = read_mapping(text, place + 3)
            pairs += more.items()
        elif len(pairs) < len(names):
            value, place = read_literal(text, place)
            pairs.append((names[len(pairs)], value))
        else:
            raise Malformed(f"Arguments have names{_at(text, place)}.")
        place = past_comma(text, place, ")")
    return distinct(pairs), place + 1


@dataclass(frozen=True)
class PythonicFormat(ModelFormat):
    """Calls as Python, with literals: `[search(query="capital of Japan"), look()]`; Llama 3.2 and 4, Gemma 3, LFM2.

    Read with and without the special tokens of these families, and in a block of `tool_code`.
    """

    opening: str = "["
    between: str = ", "
    closing: str = "]"
    marks = marks_of(
        r"\|(?:python_tag|python_start|tool_call_start)\|>",
        **{"[": rf"(?=\s*+{NAME}\()", "`": r"``tool_code\b"},
    )
    tokens = ("<|tool_call_start|>", "<|tool_call_end|>")

    def way(self) -> str:
        return f"{self.opening}tool(name=value){self.closing}"

    def read_calls(self, text: str, place: int, tools: Tools) -> tuple[list[ToolCall], int]:
        calls: list[ToolCall] = []
        while opened := _PYTHON_OPENING.match(text, place):
            found, place = read_python_calls(text, opened.end(), tools)
            closed = _PYTHON_CLOSING.match(text, place)
            if not found or (opened[1] and not (closed and closed[1])):
                raise Malformed(f"{opened[0].strip() or 'The list'} holds no call, or is not closed{_at(text, place)}.")
            calls += found
            place = closed.end() if closed else place
        return calls, place

    def read_bare(self, text: str, place: int, tools: Tools) -> tuple[list[ToolCall], int]:
        named = _PYTHON_NAME.match(text, place)
        return read_python_calls(text, place, tools) if named and named[1] in tools else ([], place)

    def write_calls(self, calls: tuple[ToolCall, ...], tools: Tools) -> str:
        return self.opening + self.between.join(map(_python_call, calls)) + self.closing


_PYTHON_OPENING = re.compile(
    rf"\s*+(?:<\|(?:python_tag|python_start|tool_call_start)\|>|(```)tool_code\b|(?=\[\s*+{NAME}\())"
)
_PYTHON_CLOSING = re.compile(r"\s*+(?:<\|(?:python_end|tool_call_end)\|>|(```))")


def _python_call(call: ToolCall) -> str:
    named, others = [], {}
    for key, value in call.arguments.items():
        if key.isidentifier() and not keyword.iskeyword(key):
            named.append(f"{key}={write_literal(value)}")
        else:
            others[key] = value
    return f"{call.name}({', '.join([*named, *([f'**{write_literal(others)}'] if others else [])])})"


@dataclass(frozen=True)
class GemmaFormat(ModelFormat):
    """Special tokens around `call:search{query:<|"|>capital of Japan<|"|>}`, as Gemma 4 and FunctionGemma write it."""

    opening: str
    closing: str
    quote: str
    marks: Marks
    tokens = ("<|tool_call>", "<tool_call|>", '<|"|>', "<start_function_call>", "<end_function_call>", "<escape>")

    def way(self) -> str:
        return f"{self.opening}call:tool{{name:{self.quote}value{self.quote}}}{self.closing}"

    def read_calls(self, text: str, place: int, tools: Tools) -> tuple[list[ToolCall], int]:
        calls: list[ToolCall] = []
        while text.startswith(self.opening, start := after_blanks(text, place)):
            call, place = self._read_one(text, start + len(self.opening), bare=False)
            place = after_blanks(text, place)
            if not text.startswith(self.closing, place):
                raise Malformed(f"{self.opening} is not closed{_at(text, place)}.")
            place += len(self.closing)
            calls.append(call)
        return calls, place

    def read_bare(self, text: str, place: int, tools: Tools) -> tuple[list[ToolCall], int]:
        calls: list[ToolCall] = []
        while text.startswith("call:", start := after_blanks(text, place)):
            call, place = self._read_one(text, start, bare=True)
            calls.append(call)
        return calls, place

    def _read_one(self, text: str, place: int, bare: bool) -> tuple[ToolCall, int]:
        named = _GEMMA_NAME.match(text, place)
        if named is None:
            raise Malformed(f"Expected call:tool{{...}}{_at(text, place)}.")
        arguments, place = read_mapping(text, named.end(), bare=bare)
        return ToolCall(named[1], arguments), place

    def write_calls(self, calls: tuple[ToolCall, ...], tools: Tools) -> str:
        written = (f"call:{call.name}{self._mapping(call.arguments)}" for call in calls)
        return "".join(f"{self.opening}{each}{self.closing}" for each in written)

    def _mapping(self, mapping: Mapping[str, Any]) -> str:
        keys = (key if _PLAIN_KEY.fullmatch(key) else self._value(key) for key in mapping)
        return (
            "{"
            + ",".join(f"{key}:{self._value(value)}" for key, value in zip(keys, mapping.values(), strict=True))
            + "}"
        )

    def _value(self, value: Any) -> str:
        if isinstance(value, str):
            return write_json(value) if _TOKEN.search(value) or "\r" in value else f"{self.quote}{value}{self.quote}"
        if isinstance(value, dict):
            return self._mapping(value)
        return f"[{','.join(map(self._value, value))}]" if isinstance(value, list | tuple) else json.dumps(value)


_GEMMA_NAME = re.compile(rf"\s*+call:({NAME})(?=\{{)\{{")
_PLAIN_KEY = re.compile(NAME)
_TOKEN = re.compile(r"<\||<escape>|</think>")


# channels


@dataclass(frozen=True)
class HarmonyFormat:
    """The channels of gpt-oss: analysis for the thought, commentary to a function for a call, final for the answer.

    `<|channel|>commentary to=functions.search <|constrain|>json<|message|>{"query": "capital of Japan"}<|call|>`
    """

    tokens = ("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>", "<|call|>")

    def parse(self, text: str, tools: Tools) -> Action | FormatError:
        try:
            return _harmony(text.replace("\r\n", "\n"), tools)
        except Malformed as error:
            return FormatError(f"{error} Write {HARMONY_CALL} or {HARMONY_ANSWER}.")

    def render(self, action: Action, tools: Tools) -> str:
        parts = [f"<|channel|>analysis<|message|>{HARMONY.hide(action.thought)}<|end|>"] if action.thought else []
        for call in action.calls:
            header = f"<|channel|>commentary to=functions.{call.name} <|constrain|>json"
            parts.append(f"{header}<|message|>{write_json(dict(call.arguments))}<|call|>")
        if action.answer is not None:
            parts.append(f"<|channel|>final<|message|>{HARMONY.hide(action.answer)}")
        return "<|start|>assistant".join(parts)

    def instructions(self, tools: Tools) -> str:
        ways = f"Each turn, write {HARMONY_CALL} or, to finish, {HARMONY_ANSWER}."
        return "\n".join(["Tools:", *(json.dumps(shown(tool), ensure_ascii=False) for tool in tools.values()), ways])


HARMONY = Marks({"<": r"\|(?:start|channel|constrain|message|end|call|return)\|>"})
HARMONY_CALL = "<|channel|>commentary to=functions.name <|constrain|>json<|message|>{...}<|call|>"
HARMONY_ANSWER = "<|channel|>final<|message|>text"
_HARMONY_MARK = re.compile(r"(<\|(?:start|message|end|call|return)\|>)")
_HARMONY_PLAIN = re.compile(r"(?:^|assistant)(analysis|commentary|final)(?:\s*+to=([\w./-]++))?")  # no special tokens
_RECIPIENT = re.compile(r"to=([\w./-]++)")
_CHANNEL = re.compile(r"<\|channel\|>\s*+(\w++)")


def _harmony(text: str, tools: Tools) -> Action:
    thoughts: list[str] = []
    calls: list[ToolCall] = []
    answers: list[str] = []
    for channel, recipient, body in _harmony_messages(text):
        if (calls or answers) and channel != "final" and not recipient:
            raise Malformed("There is text after the call or answer.")
        if recipient:
            name = recipient.removeprefix("functions.")
            calls.append(ToolCall(name, _harmony_arguments(body, tools.get(name))))
        elif channel == "final":
            answers.append(HARMONY.show(body))
        elif body:
            thoughts.append(HARMONY.show(body))
    return one_action("\n".join(thoughts), calls, answers)


def _harmony_messages(text: str) -> Iterator[tuple[str, str, str]]:
    """(channel, recipient or "", text) of each message."""
    if "<|message|>" not in text:
        yield from _harmony_plain(text)
        return
    header, opened = "", False
    pieces = _HARMONY_MARK.split(text)
    for passed, mark in zip(pieces[::2], [*pieces[1::2], ""], strict=True):
        if not opened:
            header, opened = header + passed, mark == "<|message|>"
            continue
        if mark == "<|message|>":
            raise Malformed("<|message|> stands within a message.")
        channel, recipient = _CHANNEL.search(header), _RECIPIENT.search(header)
        yield channel[1] if channel else "", recipient[1] if recipient else "", passed.strip()
        header, opened = "", False
    if header.strip() not in ("", "assistant"):
        raise Malformed(f"A message needs <|message|> after {header.strip()[:40]!r}.")


def _harmony_plain(text: str) -> Iterator[tuple[str, str, str]]:
    """The messages of a text whose special tokens were left out: `analysisI search.assistantcommentary to=…`."""
    marks = list(_HARMONY_PLAIN.finditer(text.strip()))
    for i, mark in enumerate(marks):
        body = text.strip()[mark.end() : marks[i + 1].start() if i + 1 < len(marks) else None]
        yield mark[1], mark[2] or "", re.sub(r"\A\s*+(?:json|code)", "", body).strip() if mark[2] else body.strip()


def _harmony_arguments(body: str, tool: Tool | None) -> dict[str, Any]:
    if tool is None or body.startswith("{") or not body:
        return json_object(body) if body else {}
    return read_arguments(body, tool)  # code for the tool `python` stands as it is
