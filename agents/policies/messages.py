"""The assistant's messages of OpenAI's chat completions as servers send them: read into one shape, and sent back."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ...envs import Action, ActionFormat, Message, OpenAIFormat
from ...tools import Tool

Row = dict[str, Any]
REASONING = ("reasoning_content", "reasoning")  # servers use one or the other
THINK, THOUGHT = "<think>", "</think>"


def read_message(message: Mapping[str, Any]) -> Row:
    """`content`, `reasoning_content` and `tool_calls`, each where it says something, whatever shape they came in:
    content in parts, a refusal, reasoning under either name, the one `function_call` of older servers."""
    content, thoughts = _joined(message.get("content"))
    for name in REASONING:
        thoughts += _joined(message.get(name))[0]
        if thoughts:
            break
    calls = list(message.get("tool_calls") or ())
    if message.get("function_call"):
        calls.append({"type": "function", "function": message["function_call"]})
    content = content or _joined(message.get("refusal"))[0]
    read = {"content": content, "reasoning_content": thoughts, "tool_calls": calls}
    return {name: value for name, value in read.items() if value}


def reasoning_name(message: Mapping[str, Any]) -> str:
    """Under which name the message has its reasoning; empty where it has none."""
    return next((name for name in REASONING if message.get(name)), "")


def _joined(content: Any) -> tuple[str, str]:
    """The text of a message's content, and the thoughts among its parts; a part that is no text appears as its type."""
    if not isinstance(content, list):
        return "" if content is None else str(content), ""
    texts, thoughts = [], []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        if isinstance(part, str):
            texts.append(part)
        elif kind in ("thinking", "reasoning"):
            thoughts.append(_joined(part.get(kind) or part.get("text"))[0])
        else:
            texts.append(str(part.get("text") or part.get("refusal") or f"[{kind}]"))
    return "".join(texts), "".join(thoughts)


def as_action(message: Row, form: ActionFormat, tools: Mapping[str, Tool]) -> str:
    """The text that says in an action format what the message says; JSON where the format cannot."""
    text = json.dumps({"content": None, **message}, ensure_ascii=False)
    action = OpenAIFormat().parse(text, tools)
    if isinstance(form, OpenAIFormat) or not isinstance(action, Action):
        return text
    if any(call.name not in tools for call in action.calls):
        return text
    thought = with_thinking(message.get("reasoning_content", ""), message.get("content", "") if action.calls else "")
    return form.render(Action(action.calls, action.answer, thought), tools)


def with_thinking(reasoning: str, text: str) -> str:
    """The text after the reasoning, as models write both."""
    return f"{THINK}\n{reasoning}\n{THOUGHT}\n{text}" if reasoning else text


def without_thinking(text: str) -> tuple[str, str]:
    """(reasoning, text after it) of a text that begins with its reasoning, else ("", text)."""
    if text.lstrip().startswith(THINK) and THOUGHT in text:
        reasoning, _, text = text.partition(THOUGHT)
        return reasoning.replace(THINK, "", 1).strip(), text.strip()
    return "", text


def chat_rows(chat: Sequence[Message], form: ActionFormat, tools: Mapping[str, Tool]) -> Iterator[Row]:
    """The chat with the agent's calls as `tool_calls` and the results under their ids.

    The system message comes without the format's instructions for writing calls.
    """
    instructions = form.instructions(tools)
    ids: list[str] = []
    for turn, message in enumerate(chat):
        if message.role == "assistant":
            row = _assistant(message.text, form, tools)
            for place, call in enumerate(row.get("tool_calls", ())):
                call["id"] = call.get("id") or f"call{10 * turn + place:05}"  # nine letters and digits
            ids = [call["id"] for call in row.get("tool_calls", ())]
            yield row
        elif message.role == "tool" and ids:
            yield {"role": "tool", "tool_call_id": ids.pop(0), "content": message.text}
        elif text := message.text.removesuffix(instructions).rstrip() if message.role == "system" else message.text:
            yield {"role": "user" if message.role == "tool" else message.role, "content": text}


def _assistant(text: str, form: ActionFormat, tools: Mapping[str, Tool]) -> Row:
    """What the agent wrote, as its message; a text that is no action is its content."""
    action = form.parse(text, tools)
    if not isinstance(action, Action):
        return {"role": "assistant", "content": text}
    if isinstance(form, OpenAIFormat):
        said = {"role": "assistant", "content": None, **read_message(json.loads(text))}
    else:
        reasoning, thought = without_thinking(action.thought)
        said = {"role": "assistant", **json.loads(OpenAIFormat().render(Action(action.calls, action.answer), tools))}
        said["content"] = action.answer if action.answer is not None else thought or None
        said |= {"reasoning_content": reasoning} if reasoning else {}
        for call in said.get("tool_calls", ()):
            del call["id"]
    for call in said.get("tool_calls", ()):
        function = call["function"]
        if not isinstance(function.get("arguments"), str):
            function["arguments"] = json.dumps(function.get("arguments") or {}, ensure_ascii=False)
    return said
