"""What an agent can call: the tool protocol, functions as tools, search, Python in a sandbox."""

from .calls import Backoff, call_tool, call_tools
from .deadline import left_behind
from .function import FunctionTool, tool
from .protocol import Conduct, StatefulTool, Tool, ToolCall, ToolError, ToolResult, TransientError
from .python import PythonTool, open_sandbox
from .sandbox import ForkRefused, Interpreter, Limits, Outcome, Sandbox, SandboxError, SandboxUnavailable
from .search import Hit, Passage, SearchIndex, SearchTool

__all__ = [
    "Backoff",
    "Conduct",
    "ForkRefused",
    "FunctionTool",
    "Hit",
    "Interpreter",
    "Limits",
    "Outcome",
    "Passage",
    "PythonTool",
    "Sandbox",
    "SandboxError",
    "SandboxUnavailable",
    "SearchIndex",
    "SearchTool",
    "StatefulTool",
    "Tool",
    "ToolCall",
    "ToolError",
    "ToolResult",
    "TransientError",
    "call_tool",
    "call_tools",
    "left_behind",
    "open_sandbox",
    "tool",
]
