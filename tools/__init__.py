"""What an agent can call: the tool protocol, functions as tools, search."""

from .function import FunctionTool, call_tool, tool
from .protocol import Tool, ToolCall, ToolError, ToolResult
from .search import Hit, Passage, SearchIndex, SearchTool

__all__ = [
    "FunctionTool",
    "Hit",
    "Passage",
    "SearchIndex",
    "SearchTool",
    "Tool",
    "ToolCall",
    "ToolError",
    "ToolResult",
    "call_tool",
    "tool",
]
