"""Formats of marked lines (ReAct) and of fenced blocks."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from ...tools import Tool, ToolCall
from .actions import (
    Action,
    FormatError,
    Malformed,
    Tools,
    one_action,
    read_arguments,
    read_reply,
    shown_arguments,
    write_arguments,
)

# Each quantifier over blanks is possessive: tried once, a line costs its length.
_WORDS = r"(thought|action input|action|final answer|observation)[ \t]*+\d*+[ \t]*+:\**+"
_ANY = re.IGNORECASE | re.ASCII | re.MULTILINE
MARKER = re.compile(rf"^[ \t*]*+{_WORDS}", _ANY)  # "Thought:", "Action 1:", "**Action:**"
MARKED = re.compile(rf"^(?=[ \t*\\]*+{_WORDS})", _ANY)  # a backslash keeps a line of text from being a marker
ESCAPED = re.compile(rf"^\\(?=[ \t*\\]*+{_WORDS})", _ANY)

FENCE = re.compile(r"([ \t]*+)(`{3,}+)([^`]*+)")
FENCED = re.compile(r"^(?=[ \t\\]*+`{3})", re.MULTILINE)
ESCAPED_FENCE = re.compile(r"^\\(?=[ \t\\]*+`{3})", re.MULTILINE)
ITEM = re.compile(r"[ \t]*+(?:[-*+]|\d{1,9}[.)])[ \t]++(?=\S)")  # of a list, up to what it says
PYTHON = frozenset({"python", "python3", "py"})


@dataclass(frozen=True)
class ReactFormat:
    r"""Thought, Action and Action Input on lines of their own (Yao et al., arXiv:2210.03629), Final Answer for the end.

    The input is the only parameter as it stands, or a JSON object. Read as well: numbered markers, markers in any case
    or in bold, `Action: search[capital of Japan]`, `Action: Finish[Tokyo]`. In thought and answer, a line that looks
    like a marker starts with a backslash; an argument with such a line stands in a JSON object.
    """

    def parse(self, text: str, tools: Tools) -> Action | FormatError:
        try:
            return read_reply(text, lambda text, place: _react(text, place, tools))
        except Malformed as error:
            return FormatError(f"{error} Write {' or '.join(map(_react_call, tools.values()))} or Final Answer: text")

    def render(self, action: Action, tools: Tools) -> str:
        lines = [f"Thought: {_mark(action.thought)}"] if action.thought.strip() else []
        for call in action.calls:
            lines.append(f"Action: {call.name}")
            if call.arguments:
                lines.append(f"Action Input: {write_arguments(call.arguments, tools[call.name], MARKED)}")
        if action.answer is not None:
            lines.append(f"Final Answer: {_mark(action.answer)}")
        return "\n".join(lines)

    def instructions(self, tools: Tools) -> str:
        lines = [f"{_react_call(tool)}\n{tool.description}" for tool in tools.values()]
        return "\n".join(["Each turn, write Thought: and then one of:", *lines, "Final Answer: text"])


def _react_call(tool: Tool) -> str:
    shown = shown_arguments(tool)
    return f"Action: {tool.name}" + (f"\nAction Input: {shown}" if shown else "")


def _react(text: str, place: int, tools: Tools) -> Action:
    marks = list(MARKER.finditer(text, place))
    thoughts = [text[: marks[0].start() if marks else None].strip()]
    actions: list[tuple[str, str | None]] = []  # what stands after Action and after Action Input
    answers: list[str] = []
    for i, mark in enumerate(marks):
        body = text[mark.end() : marks[i + 1].start() if i + 1 < len(marks) else None].strip()
        match mark[1].lower():
            case "thought" if actions or answers:
                raise Malformed("Thoughts stand before the first Action.")
            case "thought":
                thoughts.append(body)
            case "action":
                actions.append((body, None))
            case "action input":
                if not actions or actions[-1][1] is not None:
                    raise Malformed("Action Input stands right after an Action.")
                actions[-1] = (actions[-1][0], body)
            case "final answer":
                answers.append(_unmark(body))
            case _:
                raise Malformed("Observations come from the tools; stop after Action Input.")
    calls = []
    for written, tool_input in actions:
        name, tool_input = _named(written, tool_input, tools)
        if name.lower() == "finish":
            answers.append(tool_input or "")
        else:
            calls.append(ToolCall(name, _arguments(tool_input, tools.get(name))))
    return one_action(_unmark("\n".join(filter(None, thoughts))), calls, answers)


def _named(written: str, tool_input: str | None, tools: Tools) -> tuple[str, str | None]:
    """The tool's name as it is registered, and its input, which may stand in brackets."""
    written = written.strip("`*\"' ")
    if tool_input is None and written.endswith("]"):
        written, _, tool_input = written[:-1].partition("[")
        tool_input = tool_input.strip()
    name = {tool.lower(): tool for tool in tools}.get(written.lower(), written) if written not in tools else written
    if name not in tools and not re.fullmatch(r"[\w./-]+", name):
        raise Malformed(f"After Action: stands the name of a tool alone, not {written[:40]!r}.")
    return name, tool_input


def _arguments(tool_input: str | None, tool: Tool | None) -> dict[str, object]:
    """The arguments; none for a tool that does not exist, as the agent will be told."""
    return read_arguments(tool_input, tool) if tool and tool_input is not None else {}


def _mark(text: str) -> str:
    return MARKED.sub(r"\\", text.strip())


def _unmark(text: str) -> str:
    return ESCAPED.sub("", text).strip()


@dataclass(frozen=True)
class FencedFormat:
    r"""Fenced blocks as in Markdown: the info string names the tool, or `answer` for the end.

    A block holds the tool's only parameter as it stands, or a JSON object; its fence is longer than any within. A block
    of Python is for the tool `python` or, without it, for the one whose only parameter is `code`. Other blocks belong
    to the thought before; there, a line that begins a block only in appearance starts with a backslash. In a list, a
    block is indented as the item is; its lines lose the indentation of its fence.
    """

    def parse(self, text: str, tools: Tools) -> Action | FormatError:
        try:
            return read_reply(text, lambda text, place: self._read(text, place, tools))
        except Malformed as error:
            return FormatError("\n".join([f"{error} Write one of:", *map(_example, tools.values()), ANSWER]))

    def render(self, action: Action, tools: Tools) -> str:
        blocks = [_block(call.name, write_arguments(call.arguments, tools[call.name])) for call in action.calls]
        if action.answer is not None:
            blocks = [_block("answer", action.answer)]
        thought = FENCED.sub(r"\\", action.thought.strip())
        return "\n".join([thought, *blocks] if thought else blocks)

    def instructions(self, tools: Tools) -> str:
        lines = [f"{_example(tool)}\n{tool.description}" for tool in tools.values()]
        return "\n".join(["Each turn, write one of:", *lines, ANSWER, "Give the final answer."])

    def _read(self, text: str, place: int, tools: Tools) -> Action:
        before, blocks = _blocks(text[place:], lambda info: _tool_of(info, tools))
        thought = ESCAPED_FENCE.sub("", (text[:place] + before).strip()).strip()
        calls = [ToolCall(name, read_arguments(body, tools[name])) for name, body in blocks if name != "answer"]
        return one_action(thought, calls, [body.strip() for name, body in blocks if name == "answer"])


def _block(name: str, body: str) -> str:
    longest = max(map(len, re.findall("`+", body)), default=0)
    fence = "`" * max(3, longest + 1)
    return "\n".join([f"{fence}{name}", *([body] if body else []), fence])


def _example(tool: Tool) -> str:
    return _block(tool.name, shown_arguments(tool))


ANSWER = _block("answer", "text")


def _tool_of(info: str, tools: Tools) -> str | None:
    """The tool that a block is for, or `answer`; None where the block belongs to the thought."""
    word = next(iter(info.split()), "")
    if word in tools or word == "answer":
        return word
    if word not in PYTHON:
        return None
    takers = [name for name, tool in tools.items() if list(tool.parameters.get("properties", {})) == ["code"]]
    return "python" if "python" in tools else takers[0] if len(takers) == 1 else None


def _blocks(text: str, name_of: Callable[[str], str | None]) -> tuple[str, list[tuple[str, str]]]:
    """The text before the first block that has a name, and the (name, body) of each; only blanks may follow one."""
    thought: list[str] = []
    blocks: list[tuple[str, list[str]]] = []
    items: list[int] = []  # the columns where the lists that are open have their text
    fence, indent, lines = "", "", thought  # of the block that is open, and where its lines go
    for line in text.split("\n"):
        mark = FENCE.fullmatch(line)
        width = _width(line)
        if not fence and line.strip():
            items = [column for column in items if column <= width]
        if mark and width - max(items, default=0) > 3:
            mark = None
        if fence and mark and len(mark[2]) >= len(fence) and not mark[3].strip():
            if lines is thought:
                thought.append(line)
            fence, indent, lines = "", "", thought
        elif not fence and mark and (name := name_of(mark[3])):
            indent, fence, lines = mark[1], mark[2], []
            blocks.append((name, lines))
        elif not fence and blocks and line.strip():
            raise Malformed(f"There is text after the block {blocks[-1][0]}.")
        else:
            if not fence and (item := ITEM.match(line)):
                items.append(len(item[0].expandtabs(4)))
            fence = fence or (mark[2] if mark else "")
            lines.append(_dedent(line, indent))
    if fence:
        raise Malformed(f"A block that {fence[:40]} begins is not closed.")
    return "\n".join(thought), [(name, "\n".join(body)) for name, body in blocks]


def _width(line: str) -> int:
    """The columns before a line's first character that is no blank."""
    return len(line[: len(line) - len(line.lstrip(" \t"))].expandtabs(4))


def _dedent(line: str, indent: str) -> str:
    """The line without the indentation, or without as much of it as there is."""
    return line[: len(indent)].lstrip(" \t") + line[len(indent) :]
