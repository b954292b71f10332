"""What an agent can call: the tool protocol, functions as tools, search, Python in a sandbox, MCP servers."""

from .backends import open_sandbox
from .function import FunctionTool, call_tool, tool
from .mcp import EpisodeTool, MCPServer, MCPTool, ServerUnavailable, serve
from .protocol import Stateful, Tool, ToolCall, ToolError, Toolkit, ToolResult
from .python import PythonTool
from .sandbox import ForkRefused, Interpreter, Limits, Outcome, Sandbox, SandboxError, SandboxUnavailable
from .search import Hit, Passage, SearchIndex, SearchTool
from .session import Session
from .workspace import Workspace

__all__ = [
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
    "Workspace",
    "call_tool",
    "open_sandbox",
    "serve",
    "tool",
]
