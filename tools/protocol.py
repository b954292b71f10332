"""What an agent can call: a Tool, the call it gets and the result it gives; and tools that share a state."""

from __future__ import annotations

import inspect
import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

MAX_CHARS = 8000  # of a result's text
RETURNS = "a text, a ToolResult, or a value that JSON can hold, which the agent reads as JSON"


class ToolError(Exception):
    """What the agent reads when its call cannot be served; any other exception is a bug and propagates."""


class TransientError(ToolError):
    """A ToolError that another try may not meet: the connection was cut, the server was busy."""


class EpisodeLost(Exception):
    """What an episode plays in has failed: a page hangs, a browser has died. The episode ends, truncated.

    It is neither the agent's mistake nor a bug. The environment's info tells the cause.
    """

    def __init__(self, cause: str, text: str) -> None:
        super().__init__(cause, text)
        self.cause = cause  # a few words, the same for all episodes that end so: metrics count by it
        self.text = text

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call as the agent wrote it; the arguments are not yet checked."""

    name: str
    arguments: Mapping[str, Any]


def encodable(text: str) -> str:
    """The text with a question mark for each half of a surrogate pair, which no tokenizer and no file takes."""
    return text.encode("utf-8", "replace").decode()


@dataclass(frozen=True, slots=True)
class ToolResult:
    """What a call gave back. The agent reads its text, made `encodable`."""

    text: str
    failed: bool = False
    data: Any = None  # JSON, for rewards and replay; the agent does not see it
    elapsed: float = field(default=0.0, compare=False)  # seconds
    truncated: bool = False  # text was cut at the tool's cap
    cached: bool = field(default=False, compare=False)  # answered from an earlier call of a pure tool

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", encodable(self.text))


def as_result(answer: Any, tool: str) -> ToolResult:
    """What a tool returned, as a result: a text as it is, other values as their JSON. TypeError where there is none."""
    if isinstance(answer, ToolResult):
        return answer
    if isinstance(answer, str):
        return ToolResult(answer)
    if inspect.iscoroutine(answer):
        answer.close()  # nobody waits for it
    try:
        return ToolResult(json.dumps(answer, ensure_ascii=False, allow_nan=False))
    except (TypeError, ValueError) as error:
        shown = f"{type(answer).__name__} {answer!r:.80}"
        raise TypeError(f"the tool {tool} returned {shown} ({error}); a tool returns {RETURNS}") from None


@dataclass(frozen=True, slots=True)
class Conduct:
    """How calls of a tool are made; a tool that has one holds it as its attribute `conduct`."""

    deadline: float | None = None  # seconds per try; the function may run on, but must change nothing after them
    max_chars: int = MAX_CHARS
    pure: bool = False  # the same arguments give the same result, which is kept
    at_once: int | None = None  # calls that run at the same time in the process
    retries: int = 0  # after a TransientError

    def __post_init__(self) -> None:
        if self.deadline is not None and not 0 < self.deadline < threading.TIMEOUT_MAX:
            raise ValueError(f"deadline={self.deadline}: it is a positive number of seconds, or None for no deadline")
        if self.at_once is not None and self.at_once < 1:
            raise ValueError(f"at_once={self.at_once}: at least one call runs at a time, or None for any number")
        for name in ("max_chars", "retries"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: it is 0 or more")


class Tool(Protocol):
    """A callable with a name, a description and a JSON schema of its parameters."""

    @property
    def name(self) -> str: ...

    @property
    def description(self) -> str: ...

    @property
    def parameters(self) -> Mapping[str, Any]: ...  # JSON schema of type "object"

    def __call__(self, /, **arguments: Any) -> Any:
        """A text, a ToolResult, or a value that JSON can hold. Raises ToolError with a text for the agent."""
        ...

    def fork(self) -> Tool:
        """An independent copy of the state; the tool itself when it has none.

        A tool that cannot be copied has an attribute can_fork = False; a ToolEnv with such a tool cannot fork either.
        A tool whose answers come from outside (a server, a model) has an attribute `outside` that names the source.
        """
        ...


@runtime_checkable
class Stateful(Protocol):
    """What a tool or toolkit has in addition if its answers depend on earlier calls."""

    def reset(self, seed: int) -> None:
        """Starts over, for a new episode."""
        ...

    def close(self) -> None:
        """Gives back what it holds. A second call does nothing."""
        ...


@runtime_checkable
class Toolkit(Stateful, Protocol):
    """Tools over one state, which forks as a whole."""

    @property
    def tools(self) -> Sequence[Tool]: ...

    def fork(self) -> Toolkit: ...


def only_text(tool: str, parameter: str, arguments: Mapping[str, Any]) -> str:
    """The argument of a tool whose only parameter is a text. Otherwise a ToolError names the field and the fault."""
    faults = [f"{name}: no such argument, the only one is {parameter}" for name in arguments if name != parameter]
    value = arguments.get(parameter)
    if parameter not in arguments:
        faults.append(f"{parameter}: missing")
    elif not isinstance(value, str):
        faults.append(f"{parameter}: expected a text, got {value!r:.40}")
    if faults or not isinstance(value, str):
        raise ToolError(f"{tool}: {'; '.join(faults)}")
    return value
