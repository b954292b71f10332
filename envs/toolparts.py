"""Tools and reward terms that a ToolEnv's settings name: module:Name, or path/to/file.py:Name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from ..tools import Tool, Toolkit
from ..tools.named import PartNotFound, call_with, named, split_name, written

Named = str | Mapping[str, Any]  # "module:Name", or {"module:Name": {arguments}}


def given_tool(given: Tool | Toolkit | Named) -> Tool | Toolkit:
    """The tool or toolkit that a setting means. A name may be that of a tool or toolkit, which is then copied, or that
    of a class or function, which is then called with the arguments. ValueError, TypeError or PartNotFound say what to
    write instead."""
    if not isinstance(given, str | Mapping):
        return given
    name, arguments = written(given)
    part = _placed(name, f"tools: no tool {name!r}")
    if not _is_tool(part):
        return _made(part, name, arguments)
    if arguments:
        raise ValueError(f"tools: {name} is a tool already, it takes no arguments: {arguments}")
    if not getattr(part, "can_fork", True):
        raise ValueError(f"tools: {name} cannot be copied for each environment: name a function that makes it")
    return part.fork()  # type: ignore[no-any-return]


def _made(make: Any, name: str, arguments: Mapping[str, Any]) -> Tool | Toolkit:
    hint = "name a tool, or what makes one; a function that is a tool itself is marked with @tool"
    if not callable(make):
        raise ValueError(f"tools: {name} is a {type(make).__name__}: {hint}")
    try:
        made = call_with(make, f"tools: {name}", arguments)
    except TypeError as error:
        raise TypeError(f"{error}; {hint}" if inspect.isfunction(make) else str(error)) from error
    if not _is_tool(made):
        raise TypeError(f"tools: {name} makes a {type(made).__name__}: {hint}")
    return made  # type: ignore[no-any-return]


def _is_tool(value: Any) -> bool:
    likeness = all(hasattr(value, name) for name in ("name", "description", "parameters"))
    return not isinstance(value, type) and (likeness or isinstance(value, Toolkit))


def given_term(name: str, given: str | Callable[[Any], float | None]) -> Callable[[Any], float | None]:
    """The function of a reward term, which takes the environment. ValueError, TypeError or PartNotFound say what to
    write instead."""
    function = _placed(given, f"terms: {name}: no function {given!r}") if isinstance(given, str) else given
    if not callable(function):
        raise ValueError(f"terms: {name}: {given!r} is a {type(function).__name__}, not a function of the environment")
    try:
        inspect.signature(function).bind(None)
    except TypeError:
        takes = inspect.signature(function)
        raise TypeError(f"terms: {name}: {given} takes {takes}; a term takes the environment alone") from None
    return function


def _placed(name: str, problem: str) -> Any:
    if not split_name(name)[0]:
        raise ValueError(f"{problem}: write module:Name or path/to/file.py:Name")
    try:
        return named(name)
    except PartNotFound as error:
        raise PartNotFound(f"{problem}: {error}") from error
