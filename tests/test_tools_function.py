"""Functions as tools: what the schema says, what is refused, who sees which error, and how calls are made."""

import copy
import pickle
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import treegym.tools.calls
from treegym.tools import (
    Backoff,
    Cassette,
    Conduct,
    FunctionTool,
    Playhead,
    Recorded,
    Tool,
    ToolCall,
    ToolError,
    ToolResult,
    TransientError,
    call_tool,
    call_tools,
    left_behind,
    tool,
)
from treegym.tools.sandbox import PythonTool


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


@tool(at_once=2)
def ask(question: str) -> str:
    return question


def echo(word: str) -> str:
    return word


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
        ({"city": "Oslo", "nights": 1, "self": 5}, "self"),
    ],
)
def test_a_refusal_names_the_field(arguments: dict[str, Any], field: str) -> None:
    with pytest.raises(ToolError, match=f"book: {field}: "):
        book(**arguments)


def test_an_argument_may_bear_the_name_of_a_method_s_first() -> None:
    assert "self" in call_tool(ToolCall("book", {"city": "Oslo", "nights": 1, "self": 2}), TOOLS).text


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        ({}, "code: missing"),
        ({"code": 3}, "code: expected a text, got 3"),
        ({"code": "1", "self": 2}, "self: no such argument, the only one is code"),
    ],
)
def test_tools_with_a_written_schema_name_the_field_too(arguments: dict[str, Any], fault: str) -> None:
    assert call_tool(ToolCall("python", arguments), {"python": PythonTool()}).text == f"python: {fault}"


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
    @tool(max_chars=10)
    def talk() -> ToolResult:
        return ToolResult("x" * 100, data=[1])

    result = call_tool(ToolCall("talk", {}), {"talk": talk})
    assert result.truncated
    assert result.text == "x" * 10 + "\n[cut: 10 of 100 characters]"
    assert result.data == [1]


@given(st.text(), st.dictionaries(st.text() | st.just("self"), JSON))
def test_whatever_the_agent_writes_gives_a_result(name: str, arguments: dict[str, Any]) -> None:
    for called in (name, "book"):
        assert isinstance(call_tool(ToolCall(called, arguments), {"book": book}), ToolResult)


def called(tool: Tool, **arguments: Any) -> ToolResult:
    return call_tool(ToolCall(tool.name, arguments), {tool.name: tool})


def together(*calls: tuple[Tool, Mapping[str, Any]]) -> list[ToolResult]:
    return call_tools([ToolCall(tool.name, given) for tool, given in calls], {tool.name: tool for tool, _ in calls})


def in_threads(works: list[Callable[[], Any]]) -> list[threading.Thread]:
    threads = [threading.Thread(target=work) for work in works]
    for thread in threads:
        thread.start()
    return threads


def test_tools_pickle_and_copy_with_their_conduct() -> None:
    for twin in (pickle.loads(pickle.dumps(ask)), copy.deepcopy(ask)):
        assert isinstance(twin, FunctionTool)
        assert (twin.function, twin.conduct) == (ask.function, Conduct(at_once=2))
    assert pickle.loads(pickle.dumps(tool(echo)))(word="a") == "a"
    counter = Counter()
    add = pickle.loads(pickle.dumps(counter.add))
    add(copy=2)
    assert (counter.count, add.instance.count) == (0, 2)


@pytest.mark.parametrize("conduct", [{"deadline": 0}, {"at_once": 0}, {"retries": -1}, {"max_chars": -1}])
def test_a_conduct_that_cannot_be_is_refused(conduct: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(conduct))):
        tool(**conduct)


def test_a_deadline_ends_an_endless_loop() -> None:
    @tool(deadline=0.05)
    def spin() -> str:
        threads.append(threading.current_thread())
        while True:
            pass

    threads: list[threading.Thread] = []
    result = called(spin)
    assert result.failed
    assert "0.05 s" in result.text
    threads[0].join()
    assert left_behind() == 0


def test_a_call_that_blocks_is_left_behind_and_counted_until_it_ends() -> None:
    @tool(deadline=0.05)
    def block() -> str:
        threads.append(threading.current_thread())
        lock.acquire()  # in C, where no exception reaches it
        steps.append("went on")
        return ""

    threads: list[threading.Thread] = []
    steps: list[str] = []
    lock = threading.Lock()
    with lock:
        assert "0.05 s" in called(block).text
        assert threads[0].daemon
        assert left_behind() == 1
    threads[0].join()
    assert steps == []  # it stopped at its next step
    assert left_behind() == 0


def test_a_call_that_refuses_to_stop_does_no_harm() -> None:
    @tool(deadline=0.05)
    def stubborn() -> str:
        threads.append(threading.current_thread())
        while not over.is_set():
            try:
                over.wait()
            except BaseException:
                stops.append(1)
        return "late"

    threads: list[threading.Thread] = []
    stops: list[int] = []
    over = threading.Event()
    assert called(stubborn).failed
    over.set()
    threads[0].join()
    assert stops == [1]
    assert left_behind() == 0


def test_within_its_deadline_a_call_is_as_any() -> None:
    @tool(deadline=60)
    def halve(number: int) -> str:
        if number % 2:
            raise ToolError(f"{number} is odd")
        return str(1 // number)

    assert called(halve, number=2).text == "0"
    assert called(halve, number=3).text == "3 is odd"
    assert "number" in called(halve, number="x").text
    with pytest.raises(ZeroDivisionError):
        called(halve, number=0)


def test_many_calls_at_their_deadline_end_one_way_or_the_other() -> None:
    """The stop may come at any instruction, the last ones included; a thread that it kills would warn."""

    @tool(deadline=0.002)
    def brief(steps: int) -> str:
        for _ in range(steps):
            pass
        return "done"

    results = [called(brief, steps=1000 * place) for place in range(200)]
    assert all(result.failed != (result.text == "done") for result in results)


def test_no_more_calls_run_than_may_at_once() -> None:
    @tool(at_once=3)
    def count() -> str:
        with lock:
            running.append(1)
            most.append(len(running))
        full.wait()  # three at a time, or never
        with lock:
            running.pop()
        return ""

    running: list[int] = []
    most: list[int] = []
    lock = threading.Lock()
    full = threading.Barrier(3, timeout=60)
    for thread in in_threads([lambda: called(count)] * 9):
        thread.join()
    assert max(most) == 3
    assert len(most) == 9


def test_a_slot_comes_back_after_an_error_and_a_call_left_behind_keeps_its_own() -> None:
    """The slots are those of the function: every binding of a method shares them."""

    class Desk:
        @tool(at_once=1, deadline=0.05)
        def sit(self, how: str) -> str:
            if how == "raise":
                raise ToolError("no")
            if how == "block":
                threads.append(threading.current_thread())
                lock.acquire()
            return "sat"

    threads: list[threading.Thread] = []
    lock = threading.Lock()
    assert called(Desk().sit, how="raise").text == "no"
    with lock:
        assert "0.05 s" in called(Desk().sit, how="block").text
        assert "busy" in called(Desk().sit, how="").text
    threads[0].join()
    assert called(Desk().sit, how="").text == "sat"


class Flaky:
    """A server that is down for a number of calls."""

    def __init__(self, failures: int, error: Exception) -> None:
        self.failures, self.error, self.calls = failures, error, 0

    @tool(retries=3)
    def get(self) -> str:
        self.calls += 1
        if self.calls <= self.failures:
            raise self.error
        return "here"


@pytest.mark.parametrize(
    ("failures", "error", "text", "bounds"),
    [
        (0, TransientError("down"), "here", []),
        (2, TransientError("down"), "here", [1.0, 2.0]),
        (9, TransientError("down"), "down", [1.0, 2.0, 3.0]),
        (9, ToolError("no such page"), "no such page", []),
    ],
)
def test_transient_errors_are_retried_after_waits_that_double(
    failures: int, error: Exception, text: str, bounds: list[float]
) -> None:
    drawn: list[tuple[float, float]] = []
    slept: list[float] = []

    def draw(low: float, high: float) -> float:
        drawn.append((low, high))
        return high / 4

    server = Flaky(failures, error)
    backoff = Backoff(first=1.0, longest=3.0, draw=draw, sleep=slept.append)
    result = call_tool(ToolCall("get", {}), {"get": server.get}, backoff)
    assert (result.text, result.failed) == (text, text != "here")
    assert drawn == [(0.0, bound) for bound in bounds]
    assert slept == [bound / 4 for bound in bounds]
    assert server.calls == len(bounds) + 1


def test_a_pure_tool_runs_once_for_the_same_arguments() -> None:
    @tool(pure=True)
    def square(number: float, sign: str = "") -> ToolResult:
        runs.append((number, sign))
        return ToolResult(f"{sign}{number**2}", data=[number])

    @tool(pure=True)
    def cube(number: float, sign: str = "") -> str:
        return f"{sign}{number**3}"

    runs: list[tuple[float, str]] = []
    first = called(square, number=2, sign="-")
    again = called(square, sign="-", number=2)
    assert first == again
    assert (first.cached, again.cached, again.elapsed) == (False, True, 0.0)
    assert called(cube, number=2, sign="-").text == "-8.0"
    assert called(square, number=True).text == "1.0"
    assert called(square, number=1).text == "1.0"
    assert runs == [(2.0, "-"), (1.0, ""), (1.0, "")]


def test_failures_and_plain_tools_are_not_remembered() -> None:
    @tool(pure=True)
    def fetch() -> str | ToolResult:
        runs.append("fetch")
        if len(runs) == 1:
            raise ToolError("down")
        return ToolResult("down", failed=True) if len(runs) == 2 else "here"

    @tool
    def draw() -> str:
        runs.append("draw")
        return str(len(runs))

    runs: list[str] = []
    assert [called(fetch).text for _ in range(4)] == ["down", "down", "here", "here"]
    assert called(draw) != called(draw)
    assert runs == ["fetch"] * 3 + ["draw"] * 2


def test_the_results_used_last_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(treegym.tools.calls, "_results", treegym.tools.calls._Results(2))

    @tool(pure=True)
    def name(number: int) -> str:
        return str(number)

    for number in (1, 2, 1, 3):
        called(name, number=number)
    assert [called(name, number=number).cached for number in (1, 3, 2)] == [True, True, False]


def test_a_method_is_not_pure() -> None:
    class Table:
        @tool(pure=True)
        def look(self) -> str:
            return "wood"

    with pytest.raises(ValueError, match="look: a method"):
        _ = Table().look


def test_eight_calls_run_side_by_side_and_answer_in_their_order() -> None:
    """Each ends only when the one after it has ended."""

    @tool
    def wait(place: int) -> str:
        if place < 7:
            assert ended[place + 1].wait(60)
        order.append(place)
        ended[place].set()
        return str(place)

    order: list[int] = []
    ended = [threading.Event() for _ in range(8)]
    results = together(*((wait, {"place": place}) for place in range(8)))
    assert [result.text for result in results] == list("01234567")
    assert order == [7, 6, 5, 4, 3, 2, 1, 0]


def test_calls_on_one_owner_keep_their_order_beside_others() -> None:
    """The counters wait for a call that comes after them, and go on in order."""

    @tool
    def release() -> str:
        go.set()
        return "go"

    class Log:
        def __init__(self) -> None:
            self.lines: list[str] = []

        @tool
        def write(self, line: str) -> str:
            assert go.wait(60)
            self.lines.append(line)
            return ",".join(self.lines)

        @tool
        def read(self) -> str:
            return ",".join(self.lines)

    go = threading.Event()
    log = Log()
    results = together(
        (log.write, {"line": "a"}), (log.read, {}), (release, {}), (log.write, {"line": "b"}), (log.read, {})
    )
    assert [result.text for result in results] == ["a", "a", "go", "a,b", "a,b"]


class Notes:
    """A tool with a state of its own, as an object."""

    name, description = "note", "Write a line."
    parameters: Mapping[str, Any] = {"type": "object", "properties": {"line": {"type": "string"}}}

    def __init__(self) -> None:
        self.lines = ""
        self.go = threading.Event()

    def __call__(self, /, **arguments: Any) -> str:
        assert arguments["line"] != "a" or self.go.wait(60)
        self.lines += arguments["line"]
        return self.lines

    def fork(self) -> "Notes":
        return self

    def reset(self, seed: int) -> None: ...

    def close(self) -> None: ...


def test_a_stateful_tool_takes_its_calls_in_order() -> None:
    @tool
    def release() -> str:
        notes.go.set()
        return "go"

    notes = Notes()
    results = together(*((notes, {"line": line}) for line in "abc"), (release, {}), (notes, {"line": "d"}))
    assert [result.text for result in results] == ["a", "ab", "abc", "go", "abcd"]


class Handle(Notes):
    """One of several tools over the same notes."""

    def __init__(self, owner: Notes, name: str) -> None:
        self.owner, self.name = owner, name

    def __call__(self, /, **arguments: Any) -> str:
        return self.owner(**arguments)


def test_tools_of_one_owner_take_their_calls_in_order() -> None:
    @tool
    def release() -> str:
        notes.go.set()
        return "go"

    notes = Notes()
    first, second = Handle(notes, "first"), Handle(notes, "second")
    results = together((first, {"line": "a"}), (second, {"line": "b"}), (release, {}), (first, {"line": "c"}))
    assert [result.text for result in results] == ["a", "ab", "go", "abc"]


def test_a_lane_alone_runs_where_it_is_called() -> None:
    class Place:
        @tool
        def where(self) -> str:
            return threading.current_thread().name

    place = Place()
    assert {result.text for result in together(*[(place.where, {})] * 8)} == {threading.current_thread().name}


def test_the_first_exception_propagates_when_the_others_have_finished() -> None:
    @tool
    def work(place: int) -> str:
        if place in (2, 5):
            raise ZeroDivisionError(place)
        if place:
            assert begun.wait(60)
        else:
            begun.set()
        done.append(place)
        return ""

    done: list[int] = []
    begun = threading.Event()
    with pytest.raises(ZeroDivisionError, match="2"):
        together(*((work, {"place": place}) for place in range(8)))
    assert sorted(done) == [0, 1, 3, 4, 6, 7]


def test_calls_within_calls_wait_for_no_thread_that_waits_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    @tool
    def branch(depth: int) -> str:
        if depth == 0:
            return "leaf"
        return " ".join(result.text for result in together(*[(branch, {"depth": depth - 1})] * 4))

    with ThreadPoolExecutor(1) as pool:
        monkeypatch.setattr(treegym.tools.calls, "_pool", lambda: pool)
        assert called(branch, depth=3).text == " ".join(["leaf"] * 64)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3, "3"),
        (0.5, "0.5"),
        (True, "true"),
        (None, "null"),
        ([1, "ü"], '[1, "ü"]'),
        ({"a": (1, 2)}, '{"a": [1, 2]}'),
        ("as it is", "as it is"),
        (ToolResult("so", data=[1]), "so"),
        ("half \ud83d of a pair", "half ? of a pair"),
        (["\udc00"], '["?"]'),
    ],
)
def test_a_value_is_read_as_its_json(value: Any, text: str, tmp_path: Path) -> None:
    @tool
    def give() -> Any:
        return value

    taped = Recorded(give, Playhead(Cassette(tmp_path / "tape.jsonl")))
    for result in (called(give), called(taped)):
        assert (result.text, result.failed) == (text, False)


@pytest.mark.parametrize("value", [b"bytes", {1, 2}, float("nan"), object(), 1j, {(1, 2): 3}])
def test_a_value_that_json_cannot_hold_is_a_bug_that_is_named(value: Any) -> None:
    @tool
    def give() -> Any:
        return value

    with pytest.raises(TypeError, match=f"the tool give returned {type(value).__name__} .*a tool returns a text"):
        called(give)


def test_a_coroutine_that_a_tool_returns_is_named_and_closed() -> None:
    async def later() -> str:
        return "never"

    @tool
    def give(word: str) -> Any:
        return later()

    with pytest.raises(TypeError, match="the tool give returned coroutine"):
        called(give, word="a")


async def waits(word: str) -> str:
    return word


def yields(word: str) -> Any:
    yield word


def unhinted(word, other: int = 0) -> str:  # type: ignore[no-untyped-def]
    return str(word)


def starred(*words: str) -> str:
    return ""


def keyed(**words: str) -> str:
    return ""


def by_place(word: str, /) -> str:
    return word


def gives_bytes(word: str) -> bytes:
    return word.encode()


def gives_set(word: str) -> "set[str]":
    return {word}


class Unhinted:
    def ask(self, word) -> str:  # type: ignore[no-untyped-def]
        return str(word)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (waits, "waits returns a coroutine.* asyncio.run"),
        (yields, "yields returns a generator"),
        (gives_bytes, "gives_bytes returns bytes; a tool returns a text"),
        (gives_set, "gives_set returns set"),
        (unhinted, "unhinted: the parameter 'word' needs a type hint, such as word: str"),
        (Unhinted.ask, "Unhinted.ask: the parameter 'word' needs a type hint"),
        (starred, r"starred: .*\*words"),
        (keyed, r"keyed: .*\*\*words"),
        (by_place, "by_place: .*positional-only"),
        (lambda word: word, "lambda.*'word' needs a type hint"),
    ],
)
def test_a_function_that_no_agent_can_call_is_refused_where_it_is_decorated(
    function: Callable[..., Any], said: str
) -> None:
    for decorate in (tool, tool(deadline=1.0)):
        with pytest.raises(TypeError, match=said):
            decorate(function)


def test_a_method_s_own_instance_needs_no_hint() -> None:
    class Shelf:
        @tool
        def look(this, place: int) -> int:
            return place

        @tool
        def count(self: Any) -> list[int]:
            return [1, 2]

    assert call_tool(ToolCall("look", {"place": "3"}), {"look": Shelf().look}).text == "3"
    assert call_tool(ToolCall("count", {}), {"count": Shelf().count}).text == "[1, 2]"
    assert Shelf().count.parameters["properties"] == {}
