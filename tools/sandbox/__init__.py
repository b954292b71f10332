"""Sandboxes: interpreters that fork with their episode, behind walls that hold; files and shells in them."""

from .backends import open_sandbox
from .interface import Execution, ForkRefused, Interpreter, Limits, Sandbox, SandboxError, SandboxUnavailable
from .python_tool import PythonTool
from .session import Session
from .workspace import Workspace

__all__ = [
    "Execution",
    "ForkRefused",
    "Interpreter",
    "Limits",
    "PythonTool",
    "Sandbox",
    "SandboxError",
    "SandboxUnavailable",
    "Session",
    "Workspace",
    "open_sandbox",
]
