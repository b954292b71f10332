"""What an agent can call: the tool protocol, functions as tools, search, Python in a sandbox, MCP servers."""

from .calls import Backoff, call_tool, call_tools
from .cassette import Cassette, NotOnTape, Playhead, Recorded
from .deadline import left_behind
from .function import FunctionTool, tool
from .mcp import EpisodeTool, MCPServer, MCPTool, ServerUnavailable, serve_tools
from .protocol import Conduct, Stateful, Tool, ToolCall, ToolError, Toolkit, ToolResult, TransientError
from .sandbox.backends import open_sandbox
from .sandbox.interface import ForkRefused, Interpreter, Limits, Outcome, Sandbox, SandboxError, SandboxUnavailable
from .sandbox.python_tool import PythonTool
from .sandbox.session import Session
from .sandbox.workspace import Workspace
from .search.client import RemoteSearch
from .search.dense import DenseIndex, Encoder, StaticEncoder, TransformerEncoder
from .search.fusion import Fused
from .search.index import Hit, Passage, Retriever, SearchError, SearchIndex, SearchTool

__all__ = [
    "Backoff",
    "Cassette",
    "Conduct",
    "DenseIndex",
    "Encoder",
    "EpisodeTool",
    "ForkRefused",
    "FunctionTool",
    "Fused",
    "Hit",
    "Interpreter",
    "Limits",
    "MCPServer",
    "MCPTool",
    "NotOnTape",
    "Outcome",
    "Passage",
    "Playhead",
    "PythonTool",
    "Recorded",
    "RemoteSearch",
    "Retriever",
    "Sandbox",
    "SandboxError",
    "SandboxUnavailable",
    "SearchError",
    "SearchIndex",
    "SearchTool",
    "ServerUnavailable",
    "Session",
    "Stateful",
    "StaticEncoder",
    "Tool",
    "ToolCall",
    "ToolError",
    "ToolResult",
    "Toolkit",
    "TransformerEncoder",
    "TransientError",
    "Workspace",
    "call_tool",
    "call_tools",
    "left_behind",
    "open_sandbox",
    "serve_tools",
    "tool",
]
