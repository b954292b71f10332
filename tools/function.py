"""Functions as tools: a schema from the type hints, a description from the docstring, errors the agent can read."""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import operator
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast, overload

from .protocol import MAX_CHARS, RETURNS, Conduct, ToolError

if TYPE_CHECKING:
    from pydantic import TypeAdapter

Function = Callable[..., Any]
NOT_JSON = frozenset(  # names of what a function may say it returns, and no agent can read
    "bytes bytearray memoryview complex set frozenset Set FrozenSet AbstractSet Coroutine Awaitable Future Task "
    "Iterator Generator AsyncIterator AsyncGenerator AsyncIterable".split()
)


@dataclass(frozen=True, eq=False)
class FunctionTool:
    """A function, or a method bound to its instance, as a Tool; calling it checks the arguments first.

    Agents give arguments by name; code may give them by place, too.
    """

    function: Function
    instance: object = None
    conduct: Conduct = Conduct()

    def __get__(self, instance: object, owner: type | None = None) -> FunctionTool:
        if self.conduct.pure:
            raise ValueError(
                f"{self.name}: a method's result depends on more than its arguments; only functions are pure"
            )
        return FunctionTool(self.function, instance, self.conduct)

    @property
    def name(self) -> str:
        return self.function.__name__

    @property
    def description(self) -> str:
        return inspect.getdoc(self.function) or ""

    @property
    def parameters(self) -> Mapping[str, Any]:
        return _schema(self.function)

    def __call__(self, /, *values: Any, **arguments: Any) -> Any:
        from pydantic import ValidationError

        if values:
            arguments = self._named(values, arguments)
        try:
            checked = _arguments(self.function).validate_python(arguments)
        except ValidationError as error:
            faults = [f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()]
            raise ToolError(f"{self.name}: {'; '.join(faults)}") from None
        return self.function(**checked) if self.instance is None else self.function(self.instance, **checked)

    def _named(self, values: Sequence[Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
        """All arguments by name. TypeError where there are too many, or one is given twice."""
        places = [one.name for one in _parameters(self.function) if one.kind is one.POSITIONAL_OR_KEYWORD]
        if len(values) > len(places):
            raise TypeError(f"{self.name} takes {len(places)} arguments by place, got {len(values)}")
        given = dict(zip(places, values, strict=False))
        if twice := given.keys() & arguments.keys():
            raise TypeError(f"{self.name} got two values of {min(twice)!r}")
        return {**given, **arguments}

    def fork(self) -> FunctionTool:
        return self  # an environment binds its methods anew in each fork

    def __deepcopy__(self, memo: dict[int, Any]) -> FunctionTool:
        return replace(self, instance=copy.deepcopy(self.instance, memo))

    def __reduce__(self) -> tuple[Any, ...]:
        module, name = self.function.__module__, self.function.__qualname__
        if "<locals>" in name or (module == "__main__" and "." in name):  # cloudpickle writes such classes by value
            return FunctionTool, (self.function, self.instance, self.conduct)
        return _restored, (module, name, self.instance, self.conduct)


def _restored(module: str, name: str, instance: object, conduct: Conduct) -> FunctionTool:
    """The tool of a function whose name the tool has taken, where it decorates it."""
    found = operator.attrgetter(name)(importlib.import_module(module))
    return FunctionTool(found.function if isinstance(found, FunctionTool) else found, instance, conduct)


@overload
def tool(function: Function, /) -> FunctionTool: ...


@overload
def tool(
    *,
    deadline: float | None = None,
    max_chars: int = MAX_CHARS,
    pure: bool = False,
    at_once: int | None = None,
    retries: int = 0,
) -> Callable[[Function], FunctionTool]: ...


def tool(function: Function | None = None, /, **conduct: Any) -> FunctionTool | Callable[[Function], FunctionTool]:
    """Decorates a function, or a method of a ToolEnv, as a tool of the same name; the options are those of Conduct.

    TypeError where no agent could call the function: a parameter without a type hint, one that has no name to the
    caller (`*args`, `**kwargs`, before `/`), an async function or a generator, or a return type that JSON cannot hold.
    """
    if function is not None:
        return _checked(function, Conduct())
    return functools.partial(_checked, conduct=Conduct(**conduct))


def _checked(function: Function, conduct: Conduct) -> FunctionTool:
    name = getattr(function, "__qualname__", repr(function))
    for parameter in _parameters(function):
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise TypeError(
                f"@tool {name}: an agent gives arguments by name, which {parameter} ({parameter.kind.description}) does"
                " not take; give each argument a parameter of its own, and write no /"
            )
        if parameter.annotation is parameter.empty:
            raise TypeError(f"@tool {name}: the parameter {parameter.name!r} needs a type hint, such as "
                            f"{parameter.name}: str, from which the agent's schema is made")  # fmt: skip
    kind = _unreadable(function)
    if kind:
        raise TypeError(f"@tool {name} returns {kind}; a tool returns {RETURNS}")
    return FunctionTool(function, conduct=conduct)


def _parameters(function: Function) -> list[inspect.Parameter]:
    """Those that a caller gives, so without a method's own instance."""
    parameters = list(inspect.signature(function).parameters.values())
    within = getattr(function, "__qualname__", "").rpartition(".")[0]
    method = within and not within.endswith("<locals>")
    own = (
        method and parameters and (parameters[0].name == "self" or parameters[0].annotation is inspect.Parameter.empty)
    )
    return parameters[1:] if own else parameters


def _unreadable(function: Function) -> str:
    """What the function returns, if no agent can read it."""
    if inspect.iscoroutinefunction(function):
        return "a coroutine, which nobody awaits: call asyncio.run in a plain function"
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        return "a generator: return a list"
    hint = getattr(function, "__annotations__", {}).get("return")
    written = hint if isinstance(hint, str) else getattr(typing.get_origin(hint) or hint, "__name__", "")
    named = written.partition("[")[0].rpartition(".")[2].strip()
    return named if named in NOT_JSON else ""


@functools.cache
def _arguments(function: Callable[..., object]) -> TypeAdapter[dict[str, Any]]:
    """A checker of the keyword arguments; made at first use, for pydantic is slow to import."""
    from pydantic import ConfigDict, TypeAdapter
    from typing_extensions import TypedDict  # pydantic takes typing's from Python 3.12 on only

    hints = typing.get_type_hints(function, include_extras=True)
    fields = {
        one.name: hints[one.name] if one.default is one.empty else typing.NotRequired[hints[one.name]]
        for one in _parameters(function)
        if one.name in hints
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
