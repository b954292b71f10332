"""Functions as tools: a schema from the type hints, a description from the docstring, errors the agent can read."""

from __future__ import annotations

import difflib
import functools
import inspect
import time
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from .protocol import Tool, ToolCall, ToolError, ToolResult

if TYPE_CHECKING:
    from pydantic import TypeAdapter

MAX_CHARS = 8000  # of a result's text


@dataclass(frozen=True, eq=False)
class FunctionTool:
    """A function, or a method bound to its instance, as a Tool; calling it checks the arguments first."""

    function: Callable[..., str | ToolResult]
    instance: object = None

    def __get__(self, instance: object, owner: type | None = None) -> FunctionTool:
        return FunctionTool(self.function, instance)

    @property
    def name(self) -> str:
        return self.function.__name__

    @property
    def description(self) -> str:
        return inspect.getdoc(self.function) or ""

    @property
    def parameters(self) -> Mapping[str, Any]:
        return _schema(self.function)

    def __call__(self, /, **arguments: Any) -> str | ToolResult:
        from pydantic import ValidationError

        try:
            checked = _arguments(self.function).validate_python(arguments)
        except ValidationError as error:
            faults = [f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()]
            raise ToolError(f"{self.name}: {'; '.join(faults)}") from None
        return self.function(**checked) if self.instance is None else self.function(self.instance, **checked)

    def fork(self) -> FunctionTool:
        return self  # an environment binds its methods anew in each fork


def tool(function: Callable[..., str | ToolResult]) -> FunctionTool:
    """Decorates a function, or a method of a ToolEnv, as a tool of the same name."""
    return FunctionTool(function)


def call_tool(call: ToolCall, tools: Mapping[str, Tool], max_chars: int = MAX_CHARS) -> ToolResult:
    """The call's result; a failed one where the agent erred. Any exception but ToolError propagates."""
    start = time.perf_counter()
    try:
        answer = _find(call.name, tools)(**call.arguments)
    except ToolError as error:
        answer = ToolResult(str(error), failed=True)
    result = answer if isinstance(answer, ToolResult) else ToolResult(answer)
    return replace(_cut(result, max_chars), elapsed=time.perf_counter() - start)


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


@functools.cache
def _arguments(function: Callable[..., object]) -> TypeAdapter[dict[str, Any]]:
    """A checker of the keyword arguments; made at first use, for pydantic is slow to import."""
    from pydantic import ConfigDict, TypeAdapter
    from typing_extensions import TypedDict  # pydantic takes typing's from Python 3.12 on only

    hints = typing.get_type_hints(function, include_extras=True)
    fields = {
        name: hints[name] if parameter.default is parameter.empty else typing.NotRequired[hints[name]]
        for name, parameter in inspect.signature(function).parameters.items()
        if name in hints
    }
    shape = cast(Any, TypedDict)(function.__name__, fields)
    shape.__pydantic_config__ = ConfigDict(extra="forbid")
    return TypeAdapter(shape)


@functools.cache
def _schema(function: Callable[..., object]) -> Mapping[str, Any]:
    schema = _arguments(function).json_schema()
    for entry in (schema, *schema.get("properties", {}).values()):
        entry.pop("title", None)
    return schema
