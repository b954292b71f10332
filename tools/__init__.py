"""What an agent can call: the tool protocol, functions as tools, search, Python in a sandbox, MCP servers."""

from .calls import Backoff, call_tool, call_tools
from .cassette import Cassette, NotOnTape, Playhead, Recorded
from .deadline import left_behind
from .function import FunctionTool, tool
from .mcp import EpisodeTool, MCPServer, MCPTool, ServerUnavailable, serve_tools
from .protocol import Conduct, EpisodeLost, Stateful, Tool, ToolCall, ToolError, Toolkit, ToolResult, TransientError

__all__ = [
    "Backoff",
    "Cassette",
    "Conduct",
    "EpisodeLost",
    "EpisodeTool",
    "FunctionTool",
    "MCPServer",
    "MCPTool",
    "NotOnTape",
    "Playhead",
    "Recorded",
    "ServerUnavailable",
    "Stateful",
    "Tool",
    "ToolCall",
    "ToolError",
    "ToolResult",
    "Toolkit",
    "TransientError",
    "call_tool",
    "call_tools",
    "left_behind",
    "serve_tools",
    "tool",
]
