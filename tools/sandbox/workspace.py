"""Files, a shell and Python in one sandbox, for each episode."""

from __future__ import annotations

import base64
import functools
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Annotated, Any, Self

from annotated_types import Ge

from ..function import FunctionTool, tool
from ..protocol import ToolResult
from .interface import Limits
from .session import Session

TOOLS = ("read_file", "write_file", "patch_file", "list_files", "shell", "python")


class Workspace:
    """Tools over the files of an episode. `files`, text by path, are there when it begins.

    The agent's programs run where its Python does: no network, no host, the sandbox's limits. Forks copy the files.
    """

    def __init__(
        self,
        files: Mapping[str, str] | None = None,
        *,
        tools: Sequence[str] = TOOLS,
        sandbox: str = "strongest",
        limits: Limits | None = None,
        session: Session | None = None,
    ) -> None:
        if unknown := set(tools) - set(TOOLS):
            raise ValueError(f"a workspace has no tool {sorted(unknown)[0]!r}; tools: {', '.join(TOOLS)}")
        self.files = dict(files or {})
        self.names = tuple(tools)
        self.session = session or Session(sandbox, limits or Limits())

    @property
    def tools(self) -> Sequence[FunctionTool]:
        return [getattr(self, name) for name in self.names]

    @tool
    def read_file(
        self, path: str, first_line: Annotated[int, Ge(1)] = 1, lines: Annotated[int, Ge(1)] = 200
    ) -> ToolResult:
        """Read lines of a file."""
        return self._do("read", path, first_line, lines)

    @tool
    def write_file(self, path: str, text: str) -> ToolResult:
        """Write a file, with the folders on its way."""
        if len(text) > (most := self.session.limits.file_size):
            return ToolResult(f"{len(text)} characters; a file has at most {most} bytes", failed=True)
        return self._do("write", path, text)

    @tool
    def patch_file(self, path: str, changes: str) -> ToolResult:
        """Change a file by the hunks of a unified diff."""
        return self._do("patch", path, changes)

    @tool
    def list_files(self, folder: str = ".") -> ToolResult:
        """List the files in a folder and below it, with their sizes in bytes."""
        return self._do("list_", folder)

    @tool
    def shell(self, command: str) -> ToolResult:
        """Run a command line in bash, or in sh where there is no bash. What it leaves running is ended with it."""
        return self._do("shell", command, 0.8 * self.session.limits.seconds)  # before the call itself is ended

    @tool
    def python(self, code: str) -> ToolResult:
        """Run Python code; variables stay. Print what you want to see."""
        return self.session.run(code)

    def _do(self, function: str, *arguments: Any) -> ToolResult:
        given = base64.b64encode(json.dumps(arguments, ensure_ascii=False).encode("utf-8", "surrogatepass")).decode()
        return self.session.run(f"{_inside()}\n{function}(*given({given!r}))", apart=True)

    def fork(self) -> Self:
        return type(self)(self.files, tools=self.names, session=self.session.fork())

    def reset(self, seed: int) -> None:
        self.session.reset(seed)
        for path, text in self.files.items():
            if (result := self._do("write", path, text)).failed:
                raise ValueError(f"the file {path!r} cannot be written: {result.text}")

    def close(self) -> None:
        self.session.close()


@functools.cache
def _inside() -> str:
    return resources.files(__package__).joinpath("guest_files.py").read_text()
