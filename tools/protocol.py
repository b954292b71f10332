"""What an agent can call: a Tool, the call it gets and the result it gives; and tools that share a state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable


class ToolError(Exception):
    """What the agent reads when its call cannot be served; any other exception is a bug and propagates."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call as the agent wrote it; the arguments are not yet checked."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ToolResult:
    """What came back, as the agent reads it."""

    text: str
    failed: bool = False
    data: Any = None  # JSON, for rewards and replay; the agent does not see it
    elapsed: float = field(default=0.0, compare=False)  # seconds
    truncated: bool = False  # text was cut at the tool's cap


class Tool(Protocol):
    """A callable with a name, a description and a JSON schema of its parameters."""

    @property
    def name(self) -> str: ...

    @property
    def description(self) -> str: ...

    @property
    def parameters(self) -> Mapping[str, Any]: ...  # JSON schema of type "object"

    def __call__(self, /, **arguments: Any) -> str | ToolResult:
        """Raises ToolError with a text for the agent."""
        ...

    def fork(self) -> Tool:
        """An independent copy of the state; the tool itself when it has none.

        A tool that cannot be copied has an attribute can_fork = False; a ToolEnv that is given it cannot fork either.
        """
        ...


@runtime_checkable
class Stateful(Protocol):
    """What a tool or toolkit has too if its answers depend on the calls before."""

    def reset(self, seed: int) -> None:
        """Begins anew, for a new episode."""
        ...

    def close(self) -> None:
        """Gives back what it holds; twice does nothing more."""
        ...


@runtime_checkable
class Toolkit(Stateful, Protocol):
    """Tools over one state, which forks as a whole."""

    @property
    def tools(self) -> Sequence[Tool]: ...

    def fork(self) -> Toolkit: ...
