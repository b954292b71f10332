"""What an agent can call: the tool protocol, functions as tools, search, Python in a sandbox, MCP servers."""

from .backends import open_sandbox
from .calls import Backoff, call_tool, call_tools
from .deadline import left_behind
from .function import FunctionTool, tool
from .mcp import EpisodeTool, MCPServer, MCPTool, ServerUnavailable, serve
from .protocol import Conduct, Stateful, Tool, ToolCall, ToolError, Toolkit, ToolResult, TransientError
from .python import PythonTool
from .sandbox import ForkRefused, Interpreter, Limits, Outcome, Sandbox, SandboxError, SandboxUnavailable
from .search import Hit, Passage, SearchIndex, SearchTool
from .session import Session
from .workspace import Workspace

__all__ = [
    "Backoff",
    "Conduct",
    "EpisodeTool",
    "ForkRefused",
    "FunctionTool",
    "Hit",
    "Interpreter",
    "Limits",
    "MCPServer",
    "MCPTool",
    "Outcome",
    "Passage",
    "PythonTool",
    "Sandbox",
    "SandboxError",
    "SandboxUnavailable",
    "SearchIndex",
    "SearchTool",
    "ServerUnavailable",
    "Session",
    "Stateful",
    "Tool",
    "ToolCall",
    "ToolError",
    "ToolResult",
    "Toolkit",
    "TransientError",
    "Workspace",
    "call_tool",
    "call_tools",
    "left_behind",
    "open_sandbox",
    "serve",
    "tool",
]
