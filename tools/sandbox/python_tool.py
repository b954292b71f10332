"""The tool `python`: code in an interpreter that keeps its variables and forks with its episode."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from ..protocol import ToolResult, only_text
from .interface import Limits
from .session import Session

PARAMETERS: Mapping[str, Any] = {
    "type": "object",
    "properties": {"code": {"type": "string"}},
    "required": ["code"],
    "additionalProperties": False,
}


class PythonTool:
    """`python(code)`, in a sandbox."""

    name = "python"
    description = "Run Python code; variables stay. Print what you want to see."
    parameters = PARAMETERS

    def __init__(
        self, sandbox: str = "strongest", limits: Limits | None = None, *, session: Session | None = None
    ) -> None:
        self.session = session or Session(sandbox, limits or Limits())

    def __call__(self, /, **arguments: Any) -> ToolResult:
        return self.session.run(only_text(self.name, "code", arguments))

    def fork(self) -> Self:
        return type(self)(session=self.session.fork())

    def reset(self, seed: int) -> None:
        self.session.reset(seed)

    def close(self) -> None:
        self.session.close()
