"""Action formats: any text is read, and what is written is read back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treegym.envs import Action, ActionFormat, FormatError, action_format
from treegym.tools import Tool, ToolCall, tool


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


TOOLS: dict[str, Tool] = {t.name: t for t in (search, open_door, move, look)}
FORMATS = ["tagged", "hermes"]
TRICKY = st.sampled_from(
    ["<search>", "</search>", "<answer>", "</answer>", "</tool_call>", "&lt;", "&amp;lt;", "&", '"']
)
TEXT = st.lists(TRICKY | st.text(st.characters(exclude_categories=["Cs"]), max_size=8)).map("".join).map(str.strip)
CALL = st.one_of(
    st.builds(lambda query: ToolCall("search", {"query": query}), TEXT),
    st.builds(lambda number: ToolCall("open_door", {"number": number}), st.integers()),
    st.builds(lambda x, y: ToolCall("move", {"x": x, "y": y}), st.integers(), st.integers()),
    st.builds(lambda x: ToolCall("move", {"x": x}), st.integers()),
    st.just(ToolCall("look", {})),
)
ACTION = st.builds(
    lambda calls, thought: Action(tuple(calls), None, thought), st.lists(CALL, min_size=1, max_size=8), TEXT
)
ANSWER = st.builds(lambda answer, thought: Action((), answer, thought), TEXT, TEXT)


@pytest.fixture(params=FORMATS, scope="module")
def form(request: pytest.FixtureRequest) -> ActionFormat:
    return action_format(request.param)


@given(action=ACTION | ANSWER)
def test_what_is_rendered_parses_back(form: ActionFormat, action: Action) -> None:
    assert form.parse(form.render(action, TOOLS), TOOLS) == action


@given(text=st.lists(TRICKY | st.text(), max_size=12).map("".join) | st.text())
def test_any_text_is_an_action_or_a_reason(form: ActionFormat, text: str) -> None:
    parsed = form.parse(text, TOOLS)
    if isinstance(parsed, FormatError):
        assert "<answer>" in parsed.text  # says what is expected
    else:
        assert (parsed.answer is None) == bool(parsed.calls)


def test_tags_take_text_numbers_and_objects() -> None:
    text = (
        "I look first.\n<search> capital of Japan </search><open_door>3</open_door>"
        '<move>{"x": 1, "y": 2}</move>\n<look></look>'
    )
    assert action_format("tagged").parse(text, TOOLS) == Action(
        (
            ToolCall("search", {"query": "capital of Japan"}),
            ToolCall("open_door", {"number": 3}),
            ToolCall("move", {"x": 1, "y": 2}),
            ToolCall("look", {}),
        ),
        thought="I look first.",
    )


def test_hermes_reads_json_calls() -> None:
    text = (
        'So:\n<tool_call>\n{"name": "move", "arguments": {"x": 1}}\n</tool_call>\n<tool_call>{"name": "no"}</tool_call>'
    )
    expected = Action((ToolCall("move", {"x": 1}), ToolCall("no", {})), thought="So:")
    assert action_format("hermes").parse(text, TOOLS) == expected


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
        ("hermes", '<tool_call>{"name": 1}</tool_call>', '"name"'),
        ("hermes", '<tool_call>{"name": "move", "arguments": 1}</tool_call>', '"arguments"'),
    ],
)
def test_a_malformed_text_gets_its_reason(name: str, text: str, reason: str) -> None:
    parsed = action_format(name).parse(text, TOOLS)
    assert isinstance(parsed, FormatError)
    assert reason in parsed.text


def test_instructions_show_every_tool(form: ActionFormat) -> None:
    text = form.instructions(TOOLS)
    assert all(name in text and TOOLS[name].description in text for name in TOOLS)
    assert "<answer>" in text


def test_an_unknown_format_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"'yaml'.*tagged, hermes"):
        action_format("yaml")
