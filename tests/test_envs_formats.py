"""Action formats: any text is read, and what is written is read back."""

import json
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from treegym.envs import Action, ActionFormat, FormatError, action_format, format_of
from treegym.envs.formats.families import ParameterFormat
from treegym.envs.formats.tagged import FORMATS
from treegym.tools import Tool, ToolCall, tool
from treegym.tools.calls import call_tool


@tool
def search(query: str) -> str:
    """Find."""
    return query


@tool
def open_door(number: int) -> str:
    """Open."""
    return str(number)


@tool
def move(x: int, y: int = 0) -> str:
    """Move."""
    return f"{x} {y}"


@tool
def look() -> str:
    """Look."""
    return "a room"


@tool
def run(code: str) -> str:
    """Run."""
    return code


@tool
def say(word: str = "hello") -> str:
    """Say."""
    return word


TOOLS: dict[str, Tool] = {t.name: t for t in (search, open_door, move, look, run, say)}


@dataclass(frozen=True)
class Described:
    """A tool by its schema, as a server describes one."""

    name: str
    parameters: Mapping[str, Any]
    description: str = "Does it."

    def __call__(self, **arguments: Any) -> str:
        return json.dumps(arguments)

    def fork(self) -> "Described":
        return self


MARKS = (  # of every format, its escapes, and what JSON and Markdown make of them
    *("<search>", "</search>", "<answer>", "</answer>", "<a-b>", "</a-b>", "</tool_call>", "&lt;", "&amp;lt;", "&"),
    *("Thought: ", "\nThought:", "\nAction: ", "\nAction 1: search[x]", "\nAction Input: ", "\nFinal Answer: "),
    *("\n**Action:** ", "\nObservation:", "\\Action: ", "\n\\\\ Thought: ", "Finish[x]", "\n\u017ffinal answer:"),
    *("```", "````", "\n```\n", "\n```search\n", "\n ```answer\n", "\n\\```", "\n    ```\n", "~~~", "`"),
    *('{"query": "x"}', '{"a": 1}', "{}", "null", "true", "1e999", "NaN", "-0", "\\ud800", '"', "'", "\\"),
    *(
        "<think>",
        "</think>",
        "<tool_call>",
        "&lt;answer>",
        "<function=x>",
        "<parameter=x>",
        "\n</parameter>",
        "</function>",
    ),
    *(
        "<arg_key>",
        "</arg_key>",
        "<arg_value>",
        "</arg_value>",
        "[TOOL_CALLS]",
        "[ARGS]",
        "&lsqb;TOOL_CALLS]",
        "look{}",
    ),
    *(
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁call▁begin｜>",
        "<｜tool▁sep｜>",
        "<｜tool▁call▁end｜>",
        "<｜tool▁calls▁end｜>",
    ),
    *("<|tool_call>", "<tool_call|>", '<|"|>', "<escape>", "<start_function_call>", "call:look{}", "<|python_tag|>"),
    *("[look()", "look()", "```tool_code\n", "&grave;``tool_code\n", "<|tool_call_start|>", '{"name":', '[{"name":'),
    *("<|channel|>", "<|message|>", "<|end|>", "<|call|>", "<|start|>", "analysis", "assistantfinal", "<|im_end|>"),
    *("{", "}", "[", "]", ",", ":", "\n", "\r\n", "\t", " ", "*", "\x00", "\x0b", "\x85", "\u2028", "\ufeff"),
)
TRICKY = st.sampled_from(MARKS)
TEXT = st.lists(TRICKY | st.text(st.characters(exclude_categories=["Cs"]), max_size=8)).map("".join)
SCALARS: dict[str, st.SearchStrategy[Any]] = {
    "string": TEXT,
    "integer": st.integers() | st.just(10**4000),
    "number": st.floats(allow_nan=False, allow_infinity=False),
    "boolean": st.booleans(),
}
RESERVED = {"answer", "tool_call", "finish"}
NAMES: st.SearchStrategy[str] = st.from_regex(r"[a-zA-Z_][\w./-]{0,8}", fullmatch=True).filter(
    lambda name: name.lower() not in RESERVED
)
KINDS = {
    **SCALARS,
    "array": st.lists(TEXT | st.integers() | st.none(), max_size=3),
    "object": st.just({"a": {"b": []}}),
}


@st.composite
def tools_and_actions(draw: st.DrawFn) -> tuple[dict[str, Tool], Action]:
    """Tools with none, one or several parameters, some of them optional, and an action that uses them."""
    tools: dict[str, Tool] = {}
    for name in draw(st.lists(NAMES, min_size=1, max_size=4, unique_by=str.lower)):
        kinds = draw(st.dictionaries(st.sampled_from(["code", "x", "ÿ z"]), st.sampled_from(sorted(KINDS)), max_size=3))
        required = [parameter for parameter in kinds if draw(st.booleans())]
        properties = {parameter: {"type": kind} for parameter, kind in kinds.items()}
        tools[name] = Described(name, {"type": "object", "properties": properties, "required": required})
    thought = draw(TEXT)
    if draw(st.booleans()):
        return tools, Action(answer=draw(TEXT), thought=thought)
    calls = []
    for name in draw(st.lists(st.sampled_from(sorted(tools)), min_size=1, max_size=8)):
        schema = tools[name].parameters
        given = [p for p in schema["properties"] if p in schema["required"] or draw(st.booleans())]
        calls.append(ToolCall(name, {p: draw(KINDS[schema["properties"][p]["type"]]) for p in given}))
    return tools, Action(tuple(calls), thought=thought)


def stripped(value: Any) -> Any:
    """The same with no blanks around its texts, and newlines as the line ends of thought and answer."""
    if isinstance(value, Action):
        answer = None if value.answer is None else value.answer.replace("\r\n", "\n").strip()
        calls = tuple(ToolCall(call.name, stripped(dict(call.arguments))) for call in value.calls)
        return Action(calls, answer, value.thought.replace("\r\n", "\n").strip())
    if isinstance(value, dict):
        return {name: item.strip() if isinstance(item, str) else item for name, item in value.items()}
    raise TypeError(value)


@pytest.fixture(params=FORMATS, scope="module")
def form(request: pytest.FixtureRequest) -> ActionFormat:
    return action_format(request.param)


@settings(max_examples=50)
@given(tools_and_actions())
def test_what_is_rendered_parses_back(form: ActionFormat, case: tuple[dict[str, Tool], Action]) -> None:
    tools, action = case
    parsed = form.parse(form.render(action, tools), tools)
    assert isinstance(parsed, Action), parsed
    assert stripped(parsed) == stripped(action)


def test_every_mark_is_read_back_wherever_it_stands(form: ActionFormat) -> None:
    for text in (place.replace("X", mark) for mark in MARKS for place in ("X", "XX", "aXb", "a\nXb", "a\n X\nb")):
        calls = [ToolCall("search", {"query": text}), ToolCall("run", {"code": text}), ToolCall("say", {"word": text})]
        for action in (Action((*calls, ToolCall("say", {})), thought=text), Action(answer=text, thought=text)):
            parsed = form.parse(form.render(action, TOOLS), TOOLS)
            assert isinstance(parsed, Action), (text, parsed)
            assert stripped(parsed) == stripped(action)


WAYS = {"react": "Final Answer:", "fenced": "```answer", "openai": "content", "harmony": "<|channel|>final"}
WAYS = {name: WAYS.get(name, "<answer>") for name in FORMATS}


def check_any_text(form: ActionFormat, text: str) -> None:
    """An action, which can be written, kept and read again; or a reason that shows the way."""
    parsed = form.parse(text, TOOLS)
    if isinstance(parsed, FormatError):
        assert next(way for name, way in WAYS.items() if FORMATS[name] is form) in parsed.text
        return
    assert (parsed.answer is None) == bool(parsed.calls)
    assert pickle.loads(pickle.dumps(parsed)) == parsed
    if all(call.name in TOOLS for call in parsed.calls):
        assert form.parse(form.render(parsed, TOOLS), TOOLS) == parsed


@settings(max_examples=50)
@given(st.lists(TRICKY | st.text(st.characters(), max_size=5), max_size=12).map("".join) | st.text(st.characters()))
@example("\ud800")
@example("Action: search\nAction Input: \ud800")
@example("```search\n\x00\ud800\n```")
@example('{"content": "\\ud83d"}')
def test_any_text_is_an_action_or_a_reason(form: ActionFormat, text: str) -> None:
    check_any_text(form, text)


ACTIONS = st.builds(
    lambda calls, thought: Action(tuple(calls), thought=thought),
    st.lists(
        st.one_of(
            st.builds(lambda query: ToolCall("search", {"query": query}), TEXT),
            st.builds(lambda x, y: ToolCall("move", {"x": x, "y": y}), st.integers(), st.integers()),
            st.just(ToolCall("look", {})),
        ),
        min_size=1,
        max_size=3,
    ),
    TEXT,
)


@settings(max_examples=50)
@given(ACTIONS, st.lists(st.tuples(st.floats(0, 1), st.floats(0, 0.1), TRICKY), min_size=1, max_size=3))
def test_a_damaged_action_is_an_action_or_a_reason(
    form: ActionFormat, action: Action, damage: list[tuple[float, float, str]]
) -> None:
    text = form.render(action, TOOLS)
    for place, share, put in damage:
        start = int(place * len(text))
        text = text[:start] + put + text[start + int(share * len(text)) :]
    check_any_text(form, text)


@pytest.mark.parametrize("thought", ["\\ ```answer", "\\  Action: x", "\\\\ ```answer\n"])
def test_blanks_that_an_escape_hid_are_no_part_of_a_thought(form: ActionFormat, thought: str) -> None:
    call = form.render(Action((ToolCall("look", {}),)), TOOLS)
    check_any_text(form, f"{thought}\n{call}")


def call_of_move(form: ActionFormat, x: str) -> str:
    """What a call of `move` would be, had its argument been this text."""
    text = form.render(Action((ToolCall("move", {"x": 77}),)), TOOLS)
    return text.replace("77", x)


@pytest.mark.parametrize("depth", [1, 60, 200, 900, 960, 1000, 100_000])
def test_depth_is_taken_or_refused(form: ActionFormat, depth: int) -> None:
    check_any_text(form, call_of_move(form, "[" * depth + "]" * depth))
    check_any_text(form, call_of_move(form, '{\\"a\\":' * depth + "1" + "}" * depth))


@pytest.mark.parametrize("number", ["1" * 5000, "-" + "1" * 5000, "1e999", "-1e999", "NaN", "Infinity"])
def test_a_number_that_is_none_is_refused(form: ActionFormat, number: str) -> None:
    """By the format, or by the tool, where parameters are texts of any kind."""
    parsed = form.parse(call_of_move(form, number), TOOLS)
    if isinstance(parsed, Action):
        assert isinstance(form, ParameterFormat) and call_tool(parsed.calls[0], TOOLS).failed
    else:
        assert "Not JSON" in parsed.text or "Not a value" in parsed.text


NEARLY = (
    "Thought" + " " * 200_000,
    "Thought 1" + " " * 200_000,
    "Thought " + "1" * 200_000,
    "Action: look[" + "]x" * 100_000,
    ("\n" + " " * 1000) * 200,
    "\n".join(["Action: look"] * 20_000),
    "```look\n```\n" * 20_000,
    "`" * 100_000 + "x" + "`" * 100_000,
    "<look></look>" * 20_000,
    "&" + "amp;" * 50_000,
    "<" + "/a" * 100_000,
    '{"tool_calls": [' + "{}," * 50_000 + "{}]}",
    '{"content": "' + "\\u0041" * 30_000 + '"}',
    "<tool_call>" + '{"name": "look"}' * 12_000,
    "<tool_call><function=look>" + "<parameter=x>" * 15_000,
    "<tool_call><function=look><parameter=x>" + "\n</parameter> " * 13_000,
    "<tool_call>look<arg_key>x</arg_key><arg_value>" + "</arg_value>" * 16_000,
    "<tool_call>look<arg_key>x</arg_key><arg_value>" + "</arg_value> <arg_key>x</arg_key><arg_value>" * 4_000,
    "[look(" * 30_000,
    "[look(x=" + "(" * 200_000,
    "[look(" + "x='a'," * 30_000,
    "[look(" + "'" * 200_000,
    "[look(x='" + "\\'" * 100_000,
    "[look(), " * 20_000,
    "<|tool_call>call:look{" + "a:" * 100_000,
    "<|tool_call>call:look{x:[" + "1," * 100_000,
    "call:look{x:" + "a b " * 50_000,
    "[TOOL_CALLS]look[ARGS]{}" * 8_000,
    "<｜tool▁call▁begin｜>look<｜tool▁sep｜>{}<｜tool▁call▁end｜>" * 4_000,
    "<|channel|>analysis<|message|>x<|end|><|start|>assistant" * 4_000,
    "<think>" * 15_000 + "</think>" * 15_000,
)


def test_long_texts_of_marks_are_read(form: ActionFormat) -> None:
    """Stops at the test's time limit where a pattern goes back over what it read: 200 kB squared are hours."""
    for text in [*(mark * (200_000 // len(mark)) for mark in MARKS), *NEARLY]:
        form.parse(text, TOOLS)
        answer = text.replace("\r\n", "\n").strip()
        assert form.parse(form.render(Action(answer=text), TOOLS), TOOLS) == Action(answer=answer), text[:20]


def test_tags_take_text_numbers_and_objects() -> None:
    text = (
        "I look first.\n<search> capital of Japan </search><open_door>3</open_door>"
        '<move>{"x": 1, "y": 2}</move>\n<look></look><search>{"query": "x"}</search>'
    )
    assert action_format("tagged").parse(text, TOOLS) == Action(
        (
            ToolCall("search", {"query": "capital of Japan"}),
            ToolCall("open_door", {"number": 3}),
            ToolCall("move", {"x": 1, "y": 2}),
            ToolCall("look", {}),
            ToolCall("search", {"query": "x"}),
        ),
        thought="I look first.",
    )


def test_hermes_reads_json_calls() -> None:
    text = (
        'So:\n<tool_call>\n{"name": "move", "arguments": {"x": 1}}\n</tool_call>\n<tool_call>{"name": "no"}</tool_call>'
    )
    expected = Action((ToolCall("move", {"x": 1}), ToolCall("no", {})), thought="So:")
    assert action_format("hermes").parse(text, TOOLS) == expected


SEARCHED = Action((ToolCall("search", {"query": "capital of Japan"}),), thought="I search.")


@pytest.mark.parametrize(
    ("text", "action"),
    [
        ("Thought: I search.\nAction: search\nAction Input: capital of Japan", SEARCHED),
        ('I search.\nAction: search\nAction Input: {"query": "capital of Japan"}', SEARCHED),
        ("Thought 1: I search.\nAction 1: Search[capital of Japan]", SEARCHED),
        ("**Thought:** I search.\r\n**Action:** `search`\r\n**Action Input:** capital of Japan\r\n", SEARCHED),
        ("thought: I search.\n  action : search\n  action input:\ncapital of Japan\n", SEARCHED),
        ("Action: look", Action((ToolCall("look", {}),))),
        ("Action: look\nAction Input: {}", Action((ToolCall("look", {}),))),
        ("Action: nothing\nAction Input: x", Action((ToolCall("nothing", {}),))),
        ("Action: open_door[3]", Action((ToolCall("open_door", {"number": 3}),))),
        (
            "Action: run\nAction Input: print(1)\nprint(2)\nAction: look",
            Action((ToolCall("run", {"code": "print(1)\nprint(2)"}), ToolCall("look", {}))),
        ),
        ("Thought: Done.\nFinal Answer: Tokyo\nor Edo", Action(answer="Tokyo\nor Edo", thought="Done.")),
        ("Thought: Done.\nAction: Finish[Tokyo]", Action(answer="Tokyo", thought="Done.")),
    ],
)
def test_react_reads_the_usual_ways_of_writing_it(text: str, action: Action) -> None:
    assert action_format("react").parse(text, TOOLS) == action


def test_react_escapes_only_lines_that_look_like_markers() -> None:
    thought = "Thought, then\nAction: none\n\\Final Answer:\nand Action: too"
    text = action_format("react").render(Action(answer="x", thought=thought), TOOLS)
    assert text == ("Thought: Thought, then\n\\Action: none\n\\\\Final Answer:\nand Action: too\nFinal Answer: x")


@pytest.mark.parametrize(
    ("text", "action"),
    [
        ("I search.\n\n```search\ncapital of Japan\n```\n", SEARCHED),
        ("I search.\n````search\ncapital of Japan\n`````  ", SEARCHED),
        ("```python\nif x:\n    print(1)\n```", Action((ToolCall("run", {"code": "if x:\n    print(1)"}),))),
        ('```move\n{"x": 1}\n```\n```look\n```', Action((ToolCall("move", {"x": 1}), ToolCall("look", {})))),
        ("As in\n```sql\nselect 1\n```\n```answer\n1\n```", Action(answer="1", thought="As in\n```sql\nselect 1\n```")),
        ("````md\n```look\n```\n````\n```answer\n1\n```", Action(answer="1", thought="````md\n```look\n```\n````")),
    ],
)
def test_fences_are_read_as_commonmark_has_them(text: str, action: Action) -> None:
    assert action_format("fenced").parse(text, TOOLS) == action


def test_a_fence_is_longer_than_those_within() -> None:
    code = 'print("""\n```\n````\n""")'
    text = action_format("fenced").render(Action((ToolCall("run", {"code": code}),)), TOOLS)
    assert text == f"`````run\n{code}\n`````"


def test_a_block_of_python_is_for_python_before_others() -> None:
    @tool
    def python(source: str) -> str:
        """Run."""
        return source

    tools = {**TOOLS, "python": python}
    assert action_format("fenced").parse("```py\n1\n```", tools) == Action((ToolCall("python", {"source": "1"}),))


def test_openai_renders_the_message_of_the_interface() -> None:
    text = action_format("openai").render(
        Action((ToolCall("move", {"x": 1}), ToolCall("look", {})), thought="Off."), TOOLS
    )
    assert json.loads(text) == {
        "content": "Off.",
        "tool_calls": [
            {"id": "call00000", "type": "function", "function": {"name": "move", "arguments": '{"x": 1}'}},
            {"id": "call00001", "type": "function", "function": {"name": "look", "arguments": "{}"}},
        ],
    }


@pytest.mark.parametrize(
    ("message", "action"),
    [
        ({"role": "assistant", "content": "Tokyo", "tool_calls": None}, Action(answer="Tokyo")),
        ({"content": "", "tool_calls": []}, Action(answer="")),
        ({"content": "x", "reasoning_content": "So."}, Action(answer="x", thought="So.")),
        (
            {"content": None, "tool_calls": [{"id": "a", "function": {"name": "look", "arguments": ""}}]},
            Action((ToolCall("look", {}),)),
        ),
        (
            {
                "content": "b",
                "reasoning_content": "a",
                "tool_calls": [{"function": {"name": "no", "arguments": {"x": 1}}}],
            },
            Action((ToolCall("no", {"x": 1}),), thought="a\nb"),
        ),
    ],
)
def test_openai_reads_what_servers_send(message: dict[str, Any], action: Action) -> None:
    assert action_format("openai").parse(json.dumps(message), TOOLS) == action


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("tagged", "Tokyo", "No action"),
        ("tagged", "<search>a", "not closed"),
        ("tagged", "a</search>", "closes nothing"),
        ("tagged", "<search><search>a</search></search>", "not closed before"),
        ("tagged", "<search>a</answer>", "not closed before"),
        ("tagged", "<search>a</search> then", "text after"),
        ("tagged", "<search>a</search><answer>b</answer>", "stands alone"),
        ("tagged", "<answer>a</answer><answer>b</answer>", "stands alone"),
        ("tagged", "<look></look>" * 9, "At most 8"),
        ("tagged", "<move>1, 2</move>", "JSON"),
        ("tagged", "<move>[1, 2]</move>", "JSON object"),
        ("hermes", "<tool_call>{</tool_call>", "JSON"),
        ("hermes", "<tool_call>" + "[" * 100_000 + "</tool_call>", "JSON"),
        ("hermes", '<tool_call>{"name": "move", "arguments": {"x": NaN}}</tool_call>', "NaN"),
        ("hermes", '<tool_call>{"name": "a", "arguments": {"x": "\\udc00"}}</tool_call>', "JSON"),
        ("hermes", '<tool_call>{"name": 1}</tool_call>', '"name"'),
        ("hermes", '<tool_call>{"name": "move", "arguments": 1}</tool_call>', '"arguments"'),
        ("react", "Tokyo", "No action"),
        ("react", "Thought: only", "No action"),
        ("react", "Action: look\nThought: then", "before the first Action"),
        ("react", "Action: look\nObservation: a room", "come from the tools"),
        ("react", "Action Input: x", "right after an Action"),
        ("react", "Action: look\nAction Input: {}\nAction Input: {}", "right after an Action"),
        ("react", "Action: look around\nAction Input: {}", "'look around'"),
        ("react", "Action: move\nAction Input: 1, 2", "JSON"),
        ("react", "Action: look\nFinal Answer: x", "stands alone"),
        ("react", "Final Answer: x\nFinal Answer: y", "stands alone"),
        ("react", "Action: look\n" * 9, "At most 8"),
        ("fenced", "Tokyo", "No action"),
        ("fenced", "```serach\nx\n```", "No action"),
        ("fenced", "```search\nx", "not closed"),
        ("fenced", "```search\nx\n``", "not closed"),
        ("fenced", "```\n```search\nx\n```", "No action"),
        ("fenced", "```search\nx\n```\nthen", "text after"),
        ("fenced", "```move\n1, 2\n```", "JSON"),
        ("fenced", "```look\n```\n```answer\nx\n```", "stands alone"),
        ("fenced", "```look\n```\n" * 9, "At most 8"),
        ("openai", "Tokyo", "JSON"),
        ("openai", "[]", "JSON object"),
        ("openai", "{}", "No action"),
        ("openai", '{"content": 1}', '"content"'),
        ("openai", '{"tool_calls": 1}', '"tool_calls"'),
        ("openai", '{"tool_calls": [1]}', '"function"'),
        ("openai", '{"tool_calls": [{"function": {"arguments": "{}"}}]}', '"name"'),
        ("openai", '{"tool_calls": [{"function": {"name": "look", "arguments": "["}}]}', "JSON"),
        ("openai", '{"tool_calls": [{"function": {"name": "look", "arguments": [1]}}]}', '"arguments"'),
        (
            "openai",
            '{"tool_calls": [' + '{"function": {"name": "look"}},' * 8 + '{"function": {"name": "look"}}]}',
            "At most 8",
        ),
    ],
)
def test_a_malformed_text_gets_its_reason(name: str, text: str, reason: str) -> None:
    parsed = action_format(name).parse(text, TOOLS)
    assert isinstance(parsed, FormatError)
    assert reason in parsed.text


def test_instructions_show_every_tool_and_the_end(form: ActionFormat) -> None:
    text = form.instructions(TOOLS)
    assert all(name in text and TOOLS[name].description in text for name in TOOLS)
    assert next(way for name, way in WAYS.items() if FORMATS[name] is form) in text


def test_an_unknown_format_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=re.escape("'yaml'; formats: tagged, hermes, react, fenced, openai, llama,")):
        action_format("yaml")


ESCAPED = "a &lt; b &amp;lt; &lt;b> &lt;search> &lsqb;TOOL_CALLS]"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tagged", f"<search>{ESCAPED}</search>"),
        ("hermes", f'<tool_call>{{"name": "search", "arguments": {{"query": "{ESCAPED}"}}}}</tool_call>'),
        ("react", f"Action: search\nAction Input: {ESCAPED}"),
        ("fenced", f"```search\n{ESCAPED}\n```"),
        ("llama", f'{{"name": "search", "parameters": {{"query": "{ESCAPED}"}}}}'),
        ("pythonic", f"[search(query='{ESCAPED}')]"),
        ("gemma4", f'<|tool_call>call:search{{query:<|"|>{ESCAPED}<|"|>}}<tool_call|>'),
        ("mistral", f'[TOOL_CALLS][{{"name": "search", "arguments": {{"query": "{ESCAPED}"}}}}]'),
        ("glm", f"<tool_call>search\n<arg_key>query</arg_key>\n<arg_value>{ESCAPED}</arg_value>\n</tool_call>"),
        ("qwen-coder", f"<function=search>\n<parameter=query>\n{ESCAPED}\n</parameter>\n</function>"),
        ("harmony", f'<|channel|>commentary to=functions.search<|message|>{{"query": "{ESCAPED}"}}<|call|>'),
    ],
)
def test_arguments_arrive_as_written(name: str, text: str) -> None:
    assert action_format(name).parse(text, TOOLS) == Action((ToolCall("search", {"query": ESCAPED}),))


def test_answers_keep_all_but_escaped_marks_as_written() -> None:
    for name in ("tagged", "hermes", "mistral"):
        read = action_format(name).parse("<answer>a &lt; &lt;b> but &lt;answer> and &amp;lt;/answer></answer>", TOOLS)
        assert read == Action(answer="a &lt; &lt;b> but <answer> and &lt;/answer>")


NEARLY_JSON = ("hermes", "llama", "mistral", "openai")


def as_called(name: str, call: str) -> str:
    """The text of a call, written as JSON, in a format."""
    ways = {"hermes": "<tool_call>{}</tool_call>", "mistral": "[TOOL_CALLS][{}]", "openai": '{{"tool_calls": [{}]}}'}
    return ways.get(name, "{}").format(call)


@pytest.mark.parametrize("name", NEARLY_JSON)
@pytest.mark.parametrize(
    "call",
    [
        '{"name": "move", "arguments": {"x": 1, "y": 2}}',
        '{"name": "move", "parameters": {"x": 1, "y": 2}, "id": "call00001"}',
        '{"name": "move", "args": {"x": 1, "y": 2}}',
        '{"name": "move", "input": {"x": 1, "y": 2}}',
        '{"name": "move", "arguments": "{\\"x\\": 1, \\"y\\": 2}"}',
        '{"type": "function", "function": {"name": "move", "arguments": {"x": 1, "y": 2}}}',
    ],
)
def test_usual_ways_to_write_a_call_are_read(name: str, call: str) -> None:
    assert action_format(name).parse(as_called(name, call), TOOLS) == Action((ToolCall("move", {"x": 1, "y": 2}),))


@pytest.mark.parametrize("name", NEARLY_JSON)
@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ('{"name": "say", "word": "hi"}', '"word"'),
        ('{"name": "say", "arguments": {}, "kwargs": {"word": "hi"}}', '"kwargs"'),
        ('{"type": "function", "function": {"name": "say"}, "arguments": {"word": "hi"}}', '"arguments"'),
        ('{"name": "say", "arguments": {}, "parameters": {"word": "hi"}}', 'not under "arguments" and "parameters"'),
        ('{"name": "say", "arguments": {"word": "a", "word": "b"}}', "stands twice"),
        ('{"name": "move", "input": "one step"}', "JSON"),
        ('{"name": "say", "arguments": "{\\"word\\": "}', "JSON"),
    ],
)
def test_what_is_no_part_of_a_call_is_refused_by_name(name: str, call: str, reason: str) -> None:
    parsed = action_format(name).parse(as_called(name, call), TOOLS)
    assert isinstance(parsed, FormatError) and reason in parsed.text


def test_an_unknown_part_of_a_message_is_refused() -> None:
    parsed = action_format("openai").parse('{"content": "Tokyo", "tool_call": {"name": "look"}}', TOOLS)
    assert isinstance(parsed, FormatError) and "'tool_call'" in parsed.text


CODE = ToolCall("run", {"code": "if x:\n    print(1)"})


@pytest.mark.parametrize(
    "text",
    [
        "1. Run it:\n   ```python\n   if x:\n       print(1)\n   ```",
        "- Run it:\n\n  ```run\n  if x:\n      print(1)\n  ```\n",
        "* a\n  10. b\n      ```py\n      if x:\n          print(1)\n      ```",
        "- Run it:\n\t```run\n\tif x:\n\t    print(1)\n\t```",
        "  ```run\n  if x:\n      print(1)\n  ```",
        "```run\r\nif x:\r\n    print(1)\r\n```\r\n",
    ],
)
def test_a_block_loses_the_indentation_of_its_fence(text: str) -> None:
    parsed = action_format("fenced").parse(text, TOOLS)
    assert isinstance(parsed, Action) and parsed.calls == (CODE,)


def test_a_block_that_is_indented_as_code_is_no_fence() -> None:
    for text in ("Thus:\n    ```run\n    1\n    ```", "1. Thus:\n\n       ```run\n       1\n       ```"):
        assert isinstance(action_format("fenced").parse(text, TOOLS), FormatError)


def test_line_ends_are_newlines(form: ActionFormat) -> None:
    text = form.render(Action((ToolCall("run", {"code": "a\nb"}), ToolCall("look", {})), thought="x\ny"), TOOLS)
    expected = Action((ToolCall("run", {"code": "a\nb"}), ToolCall("look", {})), thought="x\ny")
    assert form.parse(text.replace("\n", "\r\n"), TOOLS) == expected
    kept = Action((ToolCall("run", {"code": "a\r\nb"}),))
    assert form.parse(form.render(kept, TOOLS), TOOLS) == kept


MOVED = ToolCall("move", {"x": 1, "y": -2})
FOUND = ToolCall("search", {"query": "capital of Japan"})
LOOKED = ToolCall("look", {})
OPENED = ToolCall("open_door", {"number": 3})
SAMPLES = [  # what models of each family write, its special tokens kept or lost
    (
        "hermes",
        '<tool_call>\n{"name": "search", "arguments": {"query": "capital of Japan"}}\n</tool_call><|im_end|>',
        (FOUND,),
    ),
    ("hermes", '<tool_call>{"name": "look"}\n{"name": "look", "arguments": {}}</tool_call>', (LOOKED, LOOKED)),
    ("hermes", '<tool_call>[{"name": "look"}, {"name": "look"}]</tool_call>', (LOOKED, LOOKED)),
    ("llama", '{"name": "search", "parameters": {"query": "capital of Japan"}}<|eot_id|>', (FOUND,)),
    (
        "llama",
        '<|python_tag|>{"name": "look", "parameters": {}}; {"name": "look", "parameters": {}}<|eom_id|>',
        (LOOKED,) * 2,
    ),
    (
        "llama",
        '{"type": "function", "name": "look", "parameters": {}}\n{"name": "look", "parameters": {}}',
        (LOOKED,) * 2,
    ),
    ("llama", '[{"name": "move", "arguments": {"x": 1, "y": -2}}, {"name": "look"}]', (MOVED, LOOKED)),
    ("llama", "[move(x=1, y=-2), look()]", (MOVED, LOOKED)),
    ("pythonic", "[search(query='capital of Japan'), move(1, y=-2)]", (FOUND, MOVED)),
    ("pythonic", "<|python_start|>[move(x=1, y=-2)]<|python_end|><|eot|>", (MOVED,)),
    ("lfm2", "<|tool_call_start|>[move(x=1, y=-2), look()]<|tool_call_end|><|im_end|>", (MOVED, LOOKED)),
    ("lfm2", "[move(x=1, y=-2), look()]", (MOVED, LOOKED)),
    ("gemma", '```tool_code\nsearch(query="capital of Japan")\nlook()\n```<end_of_turn>', (FOUND, LOOKED)),
    ("gemma", "[move(x=1, y=-2)]", (MOVED,)),
    ("gemma4", '<|tool_call>call:search{query:<|"|>capital of Japan<|"|>}<tool_call|><|tool_response>', (FOUND,)),
    ("gemma4", "<|tool_call>call:move{x:1,y:-2}<tool_call|><|tool_call>call:look{}<tool_call|>", (MOVED, LOOKED)),
    ("gemma4", "call:search{query:capital of Japan}", (FOUND,)),
    (
        "functiongemma",
        "<start_function_call>call:search{query:<escape>capital of Japan<escape>}<end_function_call>",
        (FOUND,),
    ),
    ("mistral", '[TOOL_CALLS] [{"name": "move", "arguments": {"x": 1, "y": -2}, "id": "a1b2c3d4e"}]</s>', (MOVED,)),
    ("mistral", '[{"name": "look", "arguments": {}}, {"name": "look", "arguments": {}}]', (LOOKED, LOOKED)),
    ("mistral", '[TOOL_CALLS]move[ARGS]{"x": 1, "y": -2}', (MOVED,)),
    (
        "mistral-named",
        '[TOOL_CALLS]move[CALL_ID]a1b2c3d4e[ARGS]{"x": 1, "y": -2}[TOOL_CALLS]look[ARGS]{}</s>',
        (MOVED, LOOKED),
    ),
    ("mistral-named", 'move{"x": 1, "y": -2}look{}', (MOVED, LOOKED)),
    (
        "deepseek",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>move\n```json\n"
        '{"x": 1, "y": -2}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>look\n```json\n{}\n```'
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>",
        (MOVED, LOOKED),
    ),
    ("deepseek", 'functionmove\n```json\n{"x": 1, "y": -2}\n```', (MOVED,)),
    (
        "deepseek-v3.1",
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>move<｜tool▁sep｜>{"x": 1, "y": -2}<｜tool▁call▁end｜>'
        "<｜tool▁call▁begin｜>look<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        (MOVED, LOOKED),
    ),
    ("deepseek-v3.1", 'move{"x": 1, "y": -2}', (MOVED,)),
    (
        "glm",
        "<tool_call>move\n<arg_key>x</arg_key>\n<arg_value>1</arg_value>\n<arg_key>y</arg_key>\n<arg_value>-2</arg_value>"
        "\n</tool_call>\n<tool_call>look\n</tool_call><|observation|>",
        (MOVED, LOOKED),
    ),
    ("glm", "<tool_call>open_door<arg_key>number</arg_key><arg_value>3</arg_value></tool_call>", (OPENED,)),
    ("qwen-coder", "<tool_call>\n<function=look>\n</function>\n</tool_call>", (LOOKED,)),
    (
        "qwen-coder",
        "<tool_call>\n<function=move>\n<parameter=x>\n1\n</parameter>\n<parameter=y>\n-2\n</parameter>\n</function>\n"
        "<function=look>\n</function>\n</tool_call><|im_end|>",
        (MOVED, LOOKED),
    ),
    ("qwen-coder", "<function=search><parameter=query>capital of Japan</parameter></function>", (FOUND,)),
    (
        "harmony",
        '<|channel|>commentary to=functions.move <|constrain|>json<|message|>{"x": 1, "y": -2}<|call|>',
        (MOVED,),
    ),
    ("harmony", ' to=functions.move<|channel|>commentary json<|message|>{"x": 1, "y": -2}<|call|>', (MOVED,)),
    ("harmony", 'commentary to=functions.move json{"x": 1, "y": -2}', (MOVED,)),
    ("harmony", "<|channel|>analysis to=run code<|message|>print(1)<|call|>", (ToolCall("run", {"code": "print(1)"}),)),
]


@pytest.mark.parametrize(("name", "text", "calls"), SAMPLES, ids=[f"{n}-{i}" for i, (n, _, _) in enumerate(SAMPLES)])
def test_what_families_of_models_write_is_read(name: str, text: str, calls: tuple[ToolCall, ...]) -> None:
    assert action_format(name).parse(text, TOOLS) == Action(calls)


@pytest.mark.parametrize(
    "text",
    [
        "<|channel|>analysis<|message|>I search.<|end|><|start|>assistant<|channel|>final<|message|>Tokyo<|return|>",
        "analysisI search.assistantfinalTokyo",
    ],
)
def test_harmony_ends_on_the_final_channel(text: str) -> None:
    assert action_format("harmony").parse(text, TOOLS) == Action(answer="Tokyo", thought="I search.")


def test_every_format_has_a_sample() -> None:
    assert {name for name, _, _ in SAMPLES} == FORMATS.keys() - {"tagged", "react", "fenced", "openai"}


STRINGS = {
    "hermes": '<tool_call>{"name": "run", "arguments": {"code": "TEXT"}}</tool_call>',
    "llama": '{"name": "run", "parameters": {"code": "TEXT"}}',
    "mistral": '[TOOL_CALLS][{"name": "run", "arguments": {"code": "TEXT"}}]',
    "mistral-named": '[TOOL_CALLS]run[ARGS]{"code": "TEXT"}',
    "deepseek-v3.1": '<｜tool▁call▁begin｜>run<｜tool▁sep｜>{"code": "TEXT"}<｜tool▁call▁end｜>',
    "pythonic": '[run(code="TEXT")]',
    "gemma4": '<|tool_call>call:run{code:<|"|>TEXT<|"|>}<tool_call|>',
    "qwen-coder": "<tool_call>\n<function=run>\n<parameter=code>\nTEXT\n</parameter>\n</function>\n</tool_call>",
    "glm": "<tool_call>run\n<arg_key>code</arg_key>\n<arg_value>TEXT</arg_value>\n</tool_call>",
    "harmony": '<|channel|>commentary to=functions.run<|message|>{"code": "TEXT"}<|call|>',
}


@pytest.mark.parametrize("name", STRINGS)
@pytest.mark.parametrize(
    "code", ["if x:\n    print(1)\n", "print('</tool_call>')", "</answer> [TOOL_CALLS] </function>"]
)
def test_a_text_within_a_call_may_hold_line_ends_and_marks(name: str, code: str) -> None:
    assert action_format(name).parse(STRINGS[name].replace("TEXT", code), TOOLS) == Action(
        (ToolCall("run", {"code": code}),)
    )


@pytest.mark.parametrize("name", sorted(FORMATS.keys() - {"harmony"}))
@pytest.mark.parametrize("opening", ["<think>", ""])
def test_marks_within_the_thinking_are_none(name: str, opening: str) -> None:
    """A template may write <think> itself, so that the reply begins within."""
    form = action_format(name)
    call = form.render(Action((LOOKED,)), TOOLS)
    thinking = f"{opening}\nPerhaps {call}\nor <answer>x</answer>?\n</think>"
    parsed = form.parse(f"{thinking}\n\n{call}", TOOLS)
    assert parsed == Action((LOOKED,), thought=thinking.strip())


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{{ '<|im_start|>' + message.role }}", "tagged"),
        ("""<tool_call>{"name": <function-name>, "arguments": <args-json-object>}</tool_call>""", "hermes"),
        ("<tool_call>\n<function={{ name }}>\n<parameter=", "qwen-coder"),
        ("<tool_call>{{ name }}\n<arg_key>{{ key }}</arg_key>", "glm"),
        ("""<|start_header_id|>assistant<|end_header_id|>{"name": x, '"parameters": ' }""", "llama"),
        ("[TOOL_CALLS] [{", "mistral"),
        ("[TOOL_CALLS]{{ name }}[ARGS]", "mistral-named"),
        ("<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>x\n```json", "deepseek"),
        ("<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>x<｜tool▁sep｜>", "deepseek-v3.1"),
        ("<start_of_turn>model\n", "gemma"),
        ("<|tool_call>call:{{ name }}", "gemma4"),
        ("<start_of_turn>model\n<start_function_call>call:", "functiongemma"),
        ("<|tool_list_start|>[", "lfm2"),
        ("<|start|>assistant to=functions.{{ name }}<|channel|>commentary", "harmony"),
        ({"default": "plain", "tool_use": "<tool_call>"}, "hermes"),
        (None, "tagged"),
    ],
)
def test_a_template_shows_the_format_of_its_models(template: Any, name: str) -> None:
    assert format_of(template) == name
