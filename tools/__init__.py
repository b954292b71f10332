"""What an agent can call: the tool protocol, functions as tools, search, Python in a sandbox, MCP servers."""

from .function import FunctionTool, call_tool, tool
from .mcp import EpisodeTool, MCPServer, MCPTool, ServerUnavailable, serve
from .protocol import StatefulTool, Tool, ToolCall, ToolError, ToolResult
from .python import PythonTool, open_sandbox
from .sandbox import ForkRefused, Interpreter, Limits, Outcome, Sandbox, SandboxError, SandboxUnavailable
from .search import Hit, Passage, SearchIndex, SearchTool

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
    "StatefulTool",
    "Tool",
    "ToolCall",
    "ToolError",
    "ToolResult",
    "call_tool",
    "open_sandbox",
    "serve",
    "tool",
]
