"""Calls tools under their Conduct (deadline, retries, caps). The calls of one turn run side by side."""

from __future__ import annotations

import difflib
import functools
import json
import random
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from .deadline import Slots, call_within
from .function import FunctionTool
from .protocol import Conduct, Stateful, Tool, ToolCall, ToolError, ToolResult, TransientError, as_result

THREADS = 32  # for calls side by side, in the process
KEPT_RESULTS = 4096  # of pure tools, in the process
PLAIN = Conduct()


@dataclass(frozen=True)
class Backoff:
    """Waits before the next try: a time between 0 and a bound that doubles with every try, all equally likely."""

    first: float = 0.5  # seconds, the bound after the first try
    longest: float = 30.0
    draw: Callable[[float, float], float] = random.SystemRandom().uniform
    sleep: Callable[[float], None] = time.sleep

    def wait(self, tries: int) -> None:
        self.sleep(self.draw(0.0, min(self.longest, self.first * 2.0 ** (tries - 1))))


def call_tool(call: ToolCall, tools: Mapping[str, Tool], backoff: Backoff = Backoff()) -> ToolResult:
    """The call's result; a failed one where the agent erred. Any exception but ToolError propagates."""
    start = time.perf_counter()
    conduct, key = PLAIN, None
    try:
        tool = _find(call.name, tools)
        conduct = getattr(tool, "conduct", PLAIN)
        if conduct.pure:
            key = _function_of(tool) or tool, json.dumps(dict(call.arguments), sort_keys=True)
            if known := _results.get(key):
                return known
        answer = as_result(_tried(tool, call.arguments, conduct, backoff), call.name)
    except ToolError as error:
        answer = ToolResult(str(error), failed=True)
    result = _cut(answer, conduct.max_chars)
    if key and not result.failed:
        _results.put(key, replace(result, elapsed=0.0, cached=True))
    return replace(result, elapsed=time.perf_counter() - start)


def call_tools(calls: Sequence[ToolCall], tools: Mapping[str, Tool]) -> list[ToolResult]:
    """The results, in the order of the calls, which run side by side.

    Calls on one thing that keeps state (the instance of a method, a stateful tool or what it names as its `owner`) run
    in their order. The first exception that is no ToolError propagates, after the others have finished.
    """
    if len(calls) == 1:
        return [call_tool(calls[0], tools)]
    lanes = _lanes(calls, tools)
    results: dict[int, ToolResult] = {}
    errors: dict[int, Exception] = {}

    def run(lane: Sequence[int]) -> None:
        for place in lane:
            try:
                results[place] = call_tool(calls[place], tools)
            except Exception as error:
                errors[place] = error
                return

    others = [(lane, _pool().submit(run, lane)) for lane in lanes[1:]]
    for lane in lanes[:1]:
        run(lane)
    for lane, future in others:
        if future.cancel():  # no thread was free. Waiting for the pool within the pool could deadlock
            run(lane)
        else:
            future.result()
    if errors:
        raise errors[min(errors)]
    return [results[place] for place in range(len(calls))]


def _lanes(calls: Sequence[ToolCall], tools: Mapping[str, Tool]) -> list[list[int]]:
    """Lanes of places in `calls`. Lanes may run side by side, each in its order; lanes with a state come first."""
    lanes: dict[int, list[int]] = {}
    for place, call in enumerate(calls):
        owner = _owner(tools.get(call.name))
        lanes.setdefault(~place if owner is None else id(owner), []).append(place)  # ~place is negative, an id never
    return [lanes[key] for key in sorted(lanes, key=lambda key: key < 0)]


def _owner(tool: Tool | None) -> object:
    """What keeps the state that a call depends on."""
    if isinstance(tool, FunctionTool):
        return tool.instance
    return getattr(tool, "owner", tool if isinstance(tool, Stateful) else None)


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(THREADS, "tool calls")


def _tried(tool: Tool, arguments: Mapping[str, Any], conduct: Conduct, backoff: Backoff) -> Any:
    for tries in range(1, conduct.retries + 1):
        try:
            return _once(tool, arguments, conduct)
        except TransientError:
            backoff.wait(tries)
    return _once(tool, arguments, conduct)


def _once(tool: Tool, arguments: Mapping[str, Any], conduct: Conduct) -> Any:
    if conduct.deadline is None and conduct.at_once is None:
        return tool(**arguments)
    slots = _slots(tool, conduct.at_once) if conduct.at_once else Slots()
    slots.take()
    if conduct.deadline is not None:
        return call_within(conduct.deadline, lambda: tool(**arguments), slots)
    try:
        return tool(**arguments)
    finally:
        slots.give()


_lock = threading.Lock()
_slots_of: dict[Hashable, Slots] = {}


def _slots(tool: Tool, number: int) -> Slots:
    """The slots for calls of a function or, for other tools, of all that share class and name, forks among them."""
    key = (_function_of(tool) or (type(tool), tool.name), number)
    with _lock:
        return _slots_of.setdefault(key, Slots(number))


def _function_of(tool: Tool) -> Callable[..., object] | None:
    return tool.function if isinstance(tool, FunctionTool) else None


class _Results:
    """Keeps the results that were used last."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.kept: OrderedDict[Hashable, ToolResult] = OrderedDict()
        self.lock = threading.Lock()

    def get(self, key: Hashable) -> ToolResult | None:
        with self.lock:
            if key in self.kept:
                self.kept.move_to_end(key)
            return self.kept.get(key)

    def put(self, key: Hashable, result: ToolResult) -> None:
        with self.lock:
            self.kept[key] = result
            self.kept.move_to_end(key)
            if len(self.kept) > self.size:
                self.kept.popitem(last=False)


_results = _Results(KEPT_RESULTS)


def _find(name: str, tools: Mapping[str, Tool]) -> Tool:
    if name in tools:
        return tools[name]
    near = difflib.get_close_matches(name[:80], tools, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ";"
    raise ToolError(f"no tool {name[:80]!r}{hint} tools: {', '.join(tools) or 'none'}")


def _cut(result: ToolResult, max_chars: int) -> ToolResult:
    if len(result.text) <= max_chars:
        return result
    text = f"{result.text[:max_chars]}\n[cut: {max_chars} of {len(result.text)} characters]"
    return replace(result, text=text, truncated=True)
