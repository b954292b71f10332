"""What an agent can call: the tool protocol, functions as tools, search, Python in a sandbox."""

from .dense import DenseIndex, Encoder, StaticEncoder, TransformerEncoder
from .function import FunctionTool, call_tool, tool
from .fusion import Fused
from .protocol import StatefulTool, Tool, ToolCall, ToolError, ToolResult
from .python import PythonTool, open_sandbox
from .remotesearch import RemoteSearch
from .sandbox import ForkRefused, Interpreter, Limits, Outcome, Sandbox, SandboxError, SandboxUnavailable
from .search import Hit, Passage, Retriever, SearchError, SearchIndex, SearchTool

__all__ = [
    "DenseIndex",
    "Encoder",
    "ForkRefused",
    "FunctionTool",
    "Fused",
    "Hit",
    "Interpreter",
    "Limits",
    "Outcome",
    "Passage",
    "PythonTool",
    "RemoteSearch",
    "Retriever",
    "Sandbox",
    "SandboxError",
    "SandboxUnavailable",
    "SearchError",
    "SearchIndex",
    "SearchTool",
    "StatefulTool",
    "StaticEncoder",
    "Tool",
    "ToolCall",
    "ToolError",
    "ToolResult",
    "TransformerEncoder",
    "call_tool",
    "open_sandbox",
    "tool",
]
