"""Functions as tools: what the schema says, what is refused, and who sees which error."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treegym.tools import ToolCall, ToolError, ToolResult, call_tool, tool


@tool
def book(city: str, nights: int, breakfast: bool = False) -> str:
    """Book a room."""
    return f"{city} {nights} {breakfast}"


@tool
def fail() -> str:
    raise ZeroDivisionError


class Counter:
    def __init__(self) -> None:
        self.count = 0

    @tool
    def add(self, copy: int) -> str:
        """A parameter may bear any name, even one of pydantic's."""
        self.count += copy
        return str(self.count)


TOOLS = {"book": book, "fail": fail}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


def test_schema_comes_from_hints_and_description_from_docstring() -> None:
    assert (book.name, book.description) == ("book", "Book a room.")
    assert book.parameters["properties"] == {
        "city": {"type": "string"},
        "nights": {"type": "integer"},
        "breakfast": {"type": "boolean"},
    }
    assert book.parameters["required"] == ["city", "nights"]
    assert book.parameters["additionalProperties"] is False


def test_arguments_become_the_hinted_types() -> None:
    assert book(city="Oslo", nights="3") == "Oslo 3 False"


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"nights": 1}, "city"),
        ({"city": "Oslo", "nights": "many"}, "nights"),
        ({"city": "Oslo", "nights": 1, "stars": 5}, "stars"),
    ],
)
def test_a_refusal_names_the_field(arguments: dict[str, Any], field: str) -> None:
    with pytest.raises(ToolError, match=f"book: {field}: "):
        book(**arguments)


def test_an_argument_may_bear_the_name_of_a_method_s_first() -> None:
    assert "self" in call_tool(ToolCall("book", {"city": "Oslo", "nights": 1, "self": 2}), TOOLS).text


def test_a_method_acts_on_its_own_instance() -> None:
    one, two = Counter(), Counter()
    one.add(copy=2)
    assert (one.count, two.count) == (2, 0)
    assert call_tool(ToolCall("add", {"copy": 3}), {"add": two.add}).text == "3"


def test_an_unknown_tool_is_answered_with_the_tools_there_are() -> None:
    result = call_tool(ToolCall("bok", {}), TOOLS)
    assert result.failed
    assert "'book'" in result.text
    assert "book, fail" in result.text


def test_only_tool_errors_reach_the_agent() -> None:
    assert call_tool(ToolCall("book", {}), TOOLS).failed
    with pytest.raises(ZeroDivisionError):
        call_tool(ToolCall("fail", {}), TOOLS)


def test_long_output_is_cut_and_says_so() -> None:
    @tool
    def talk() -> ToolResult:
        return ToolResult("x" * 100, data=[1])

    result = call_tool(ToolCall("talk", {}), {"talk": talk}, max_chars=10)
    assert result.truncated
    assert result.text == "x" * 10 + "\n[cut: 10 of 100 characters]"
    assert result.data == [1]


@given(st.text(), st.dictionaries(st.text(), JSON))
def test_whatever_the_agent_writes_gives_a_result(name: str, arguments: dict[str, Any]) -> None:
    for called in (name, "book"):
        assert isinstance(call_tool(ToolCall(called, arguments), {"book": book}), ToolResult)
