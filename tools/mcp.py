"""MCP both ways: a server's tools as tools, and tools served to any MCP client."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib.util
import json
import logging
import math
import os
import shlex
import socket
import sys
import tempfile
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn, Self, TextIO

from .calls import call_tool
from .looping import LoopThread
from .protocol import Tool, ToolCall, ToolError, ToolResult

if TYPE_CHECKING:
    import anyio
    from jsonschema import ValidationError
    from jsonschema.protocols import Validator
    from mcp import types
    from mcp.client import Transport
    from mcp.client._transport import TransportStreams
    from mcp.server.lowlevel import Server

Transports = Sequence[Callable[[TextIO], "Transport"]]

MAX_DEPTH = 100  # of arguments; at some 250 a session breaks down
CLOSE_SECONDS = 5  # to end a session; ending a process has bounds of its own
WAY_OUT = (
    "A command should run in a terminal and wait for input; a URL is the endpoint, which often ends in /mcp or /sse."
)
SILENCE = 86400.0  # seconds in which a server may have nothing to say over SSE; a call has a deadline of its own
LAST_BYTES = 2000  # of what a server wrote to its standard error, in an error

# Otherwise each line of garbage that a server writes is a traceback on the user's terminal.
logging.getLogger("mcp.client").addHandler(logging.NullHandler())


class ServerUnavailable(ConnectionError):
    """A server that cannot be started or reached, which is not the agent's doing; says what to do."""


@dataclass(eq=False)
class MCPServer:
    """A server's tools. It runs from the first use to close(), and is started again where it ended or did not answer.

    An environment with tools of a server that is not stateless cannot fork: it takes an MCPServer of its own, whose
    process or session begins anew with each episode, and rollouts play its actions again. A stateless server may be
    shared by any number of environments and threads; its tools do not close it.
    """

    server: Sequence[str] | str  # a command and its arguments, or the URL of a streamable HTTP or SSE endpoint
    prefix: str = ""  # of the tools' names
    stateless: bool = False  # no answer depends on the calls before
    seconds: float = 30.0  # a call may take
    start_seconds: float = 60.0  # starting may take
    env: Mapping[str, str] = field(default_factory=dict, repr=False)  # a command inherits PATH, HOME and little else
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)  # for a URL
    _connection: _Connection | None = field(default=None, init=False, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.server, str) and not self.server.startswith(("http://", "https://")):
            raise ValueError(f"{self.server!r} is no http URL; a command is a list: {shlex.split(self.server)}")
        if not self.server:
            raise ValueError("an MCP server needs a command or a URL, got none")

    def __str__(self) -> str:
        return f"the MCP server {self.server if isinstance(self.server, str) else shlex.join(self.server)}"

    @property
    def tools(self) -> tuple[MCPTool, ...]:
        """In the server's order. ServerUnavailable where it cannot be started."""
        connection = self._join()
        self._leave(connection)
        kind = MCPTool if self.stateless else EpisodeTool
        return tuple(kind(self, tool.name, tool.description or "", tool.input_schema) for tool in connection.tools)

    def call(self, name: str, arguments: Mapping[str, Any]) -> ToolResult:
        """What the server's tool gives; a failed result where the server fails."""
        from mcp import MCPError

        connection = self._join()
        connection.used = lost = True
        try:
            answer = connection.call(name, dict(arguments), self.seconds)
            lost = False
        except MCPError as error:
            if not connection.over(self.seconds):
                lost = False
                raise ToolError(f"{name}: {error.message}") from None
            fault = "the server ended before it answered"
        except TimeoutError:
            fault = f"the server did not answer within {self.seconds:g} seconds"
        except Exception as error:  # of many kinds: what the client makes of what a broken server sent
            fault = f"the server failed: {str(error) or type(error).__name__}"
        finally:
            self._leave(connection, lost)
        if lost:
            state = "" if self.stateless else "; its state is lost"
            return ToolResult(f"{name}: {fault}{state}; the next call starts it again", failed=True)
        return _result(answer)

    def reset(self) -> None:
        """Ends a server that was called, so that the next call finds a fresh one."""
        if self._connection and self._connection.used:
            self.close()

    def close(self) -> None:
        """Ends process or session; a later call starts it again."""
        with self._lock:
            connection, self._connection = self._connection, None
        if connection:
            connection.closed()

    def _join(self) -> _Connection:
        """The connection, on which one more call begins. It is made where there is none."""
        with self._lock:
            if self._connection is None:
                self._connection = self._connect()
            self._connection.calls += 1
            return self._connection

    def _connect(self) -> _Connection:
        connection = _Connection(str(self), _transports(self.server, self.env, self.headers), self.start_seconds)
        connection.closed = weakref.finalize(self, connection.close)  # at the latest when Python ends
        return connection

    def _leave(self, connection: _Connection, lost: bool = False) -> None:
        """Ends a call; a lost connection closes with the last of its calls, while others go on with a new one."""
        with self._lock:
            connection.calls -= 1
            if lost and self._connection is connection:
                self._connection = None
            ended = self._connection is not connection and not connection.calls
        if ended:
            connection.closed()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        if not self.stateless and self._connection and self._connection.used:
            raise TypeError(f"{self} holds the state of an episode, which cannot be pickled")
        return self.__dict__ | {"_connection": None, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | {"_lock": threading.Lock()}


@dataclass(eq=False)
class MCPTool:
    """A tool of a server that is stateless."""

    server: MCPServer
    remote_name: str  # without the prefix
    description: str
    parameters: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.server.prefix + self.remote_name

    @property
    def outside(self) -> str:
        return str(self.server)

    def __call__(self, /, **arguments: Any) -> ToolResult:
        self._check(arguments)
        return self.server.call(self.remote_name, arguments)

    def _check(self, arguments: dict[str, Any]) -> None:
        """ToolError where the arguments do not fit the schema."""
        from referencing.exceptions import Unresolvable

        if _deeper(arguments, MAX_DEPTH):
            raise ToolError(f"{self.name}: the arguments are nested more than {MAX_DEPTH} deep")
        try:
            json.dumps(arguments, ensure_ascii=False).encode()
            faults = [_fault(error) for error in self._validator.iter_errors(arguments)]
        except UnicodeEncodeError:
            raise ToolError(f"{self.name}: a text holds half of a surrogate pair") from None
        except (Unresolvable, RecursionError):  # the schema refers to another document, or to itself without end
            return
        if faults:
            raise ToolError(f"{self.name}: {'; '.join(faults)}")

    @functools.cached_property
    def _validator(self) -> Validator:
        from jsonschema import Draft202012Validator
        from jsonschema.validators import validator_for
        from referencing import Registry

        kind = validator_for(self.parameters, default=Draft202012Validator)
        return kind(dict(self.parameters), registry=Registry())  # an empty one: nothing is fetched

    def fork(self) -> Self:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_validator"}


class EpisodeTool(MCPTool):
    """A tool of a server that keeps a state: its environment has the server for itself and cannot fork."""

    can_fork = False

    @property
    def owner(self) -> MCPServer:
        """The server, whose state all calls share."""
        return self.server

    def fork(self) -> NoReturn:
        raise NotImplementedError(
            f"the state of {self.server} cannot be copied: the environment says can_fork = False, or the server is "
            "declared stateless=True"
        )

    def reset(self, seed: int) -> None:
        self.server.reset()

    def close(self) -> None:
        self.server.close()


class _Connection:
    """A client session, on an event loop of its own. It refers to no MCPServer, which it would keep alive."""

    closed: Callable[[], object]  # closes it once

    def __init__(self, server: str, transports: Transports, start_seconds: float) -> None:
        _require_mcp()
        self.calls = 0  # how many have begun and not ended
        self.used = False
        self.tools: list[types.Tool] = []
        self._scope: anyio.CancelScope | None = None
        self._ready: Future[None] = Future()
        self._stop = asyncio.Event()
        self._loop = LoopThread(server)
        try:
            self._loop.start(self._live(server, transports, start_seconds))
            self._ready.result()
        except BaseException:
            self.close()
            raise

    async def _live(self, server: str, transports: Transports, start_seconds: float) -> None:
        """The session from beginning to end, then the end of the loop: calls that still wait for an answer fail."""
        try:
            await self._speak(server, transports, start_seconds)
        finally:
            self._loop.close()

    async def _speak(self, server: str, transports: Transports, start_seconds: float) -> None:
        """The session over the first transport that the server does not refuse."""
        with tempfile.TemporaryFile("w+") as log:
            faults: list[BaseException] = []
            for transport in transports:
                try:
                    return await self._session(transport(log), start_seconds)
                except BaseException as error:
                    faults.append(error)
                    if self._ready.done() or not _refused(error):
                        break
            if not self._ready.done():  # after the start, those who call hear of it
                self._ready.set_exception(_unavailable(server, faults[0], start_seconds, log.fileno()))

    async def _session(self, transport: Transport, start_seconds: float) -> None:
        """In one task, because scopes of cancellation nest in a task."""
        import anyio
        from mcp import Client

        with anyio.fail_after(start_seconds) as self._scope:
            async with Client(transport) as self._client:
                await self._list_tools()
                self._scope.deadline = math.inf
                self._ready.set_result(None)
                await self._stop.wait()
                await self._end()

    async def _list_tools(self) -> None:
        cursor = None
        while True:
            page = await self._client.list_tools(cursor=cursor)
            for tool in page.tools:
                tool.input_schema = _schema(tool.input_schema)
            self.tools += page.tools
            if not (cursor := page.next_cursor):
                return

    def call(self, name: str, arguments: dict[str, Any], seconds: float) -> types.CallToolResult:
        return self._loop.wait(self._client.call_tool(name, arguments), seconds)

    def over(self, seconds: float) -> bool:
        """Whether an error was the session's rather than the call's: then it does not list its tools either."""
        try:
            self._loop.wait(self._client.list_tools(cache_mode="bypass"), seconds)
        except Exception:  # of as many kinds as a call's
            return True
        return False

    def close(self) -> None:
        """Ends the session, which has CLOSE_SECONDS for it, and with it the loop."""
        with contextlib.suppress(RuntimeError):  # the session has ended, or is that of the process whose fork this is
            self._loop.start(self._end())
        self._loop.join()

    async def _end(self) -> None:
        import anyio

        self._stop.set()
        if self._scope:
            self._scope.deadline = anyio.current_time() + CLOSE_SECONDS


def _require_mcp() -> None:
    if importlib.util.find_spec("mcp") is None:
        raise ServerUnavailable("MCP needs the package mcp: pip install 'treegym[mcp]'")


def _transports(server: Sequence[str] | str, env: Mapping[str, str], headers: Mapping[str, str]) -> Transports:
    """The ways to speak with a server, the newest first; each takes the log for a command's standard error."""
    if isinstance(server, str):
        return [functools.partial(way, server, dict(headers)) for way in (_over_streams, _over_events)]
    return [functools.partial(_over_pipes, tuple(server), dict(env))]


def _over_pipes(command: Sequence[str], env: dict[str, str], log: TextIO) -> Transport:
    from mcp import StdioServerParameters, stdio_client

    program, *arguments = command
    # A byte that is no UTF-8 is dropped, or it would end the session; a line that is no message is skipped as it is.
    parameters = StdioServerParameters(command=program, args=arguments, env=env, encoding_error_handler="ignore")
    return stdio_client(parameters, errlog=log)


@contextlib.asynccontextmanager
async def _over_streams(url: str, headers: dict[str, str], log: TextIO) -> AsyncIterator[TransportStreams]:
    import httpx2
    from mcp.client.streamable_http import streamable_http_client

    async with (
        httpx2.AsyncClient(headers=headers, timeout=None) as client,  # the call has a deadline
        streamable_http_client(url, http_client=client) as streams,
    ):
        yield streams


def _over_events(url: str, headers: dict[str, str], log: TextIO) -> Transport:
    from mcp.client.sse import sse_client

    return sse_client(url, headers, sse_read_timeout=SILENCE)


def _refused(error: BaseException) -> bool:
    """Whether the server got the first message and refused it over this transport."""
    from mcp import MCPError

    return isinstance(_cause(error), MCPError)


def _cause(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _unavailable(server: str, error: BaseException, start_seconds: float, log: int) -> ServerUnavailable:
    error = _cause(error)
    if isinstance(error, TimeoutError):
        reason = f"no answer within {start_seconds:g} seconds, which start_seconds can raise"
    else:
        reason = str(error) or type(error).__name__
    size = os.fstat(log).st_size
    wrote = os.pread(log, LAST_BYTES, max(0, size - LAST_BYTES)).decode(errors="replace").strip()
    lines = f"; its last lines:\n{wrote}\n" if wrote else ". "
    return ServerUnavailable(f"{server} did not start: {reason}{lines}{WAY_OUT}")


def _deeper(value: Any, levels: int) -> bool:
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return not levels or any(_deeper(item, levels - 1) for item in inside)


def _schema(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema, or one that any object fits where the server's is none."""
    from jsonschema import Draft202012Validator, SchemaError
    from jsonschema.validators import validator_for

    try:
        validator_for(schema, default=Draft202012Validator).check_schema(schema)
    except SchemaError:
        return {"type": "object"}
    return schema


def _fault(error: ValidationError) -> str:
    """What is wrong, after the field's name."""
    return ": ".join(filter(None, [".".join(map(str, error.absolute_path)), error.message]))


def _result(answer: types.CallToolResult) -> ToolResult:
    text = "\n".join(map(_text, answer.content))
    data = answer.structured_content
    if not text and data is not None:
        text = json.dumps(data, ensure_ascii=False)
    return ToolResult(text or "(no text)", failed=bool(answer.is_error), data=data)


def _text(block: types.ContentBlock) -> str:
    """A text as it is, a resource by name and with its text, anything else named in a line."""
    if block.type == "text":
        return block.text
    if block.type == "resource":
        text = getattr(block.resource, "text", None)  # a binary one has none
        return "\n".join(filter(None, [f"[resource: {block.resource.uri}]", text]))
    if block.type == "resource_link":
        return f"[resource: {block.uri}]"
    return f"[{block.type}: {block.mime_type}, {len(block.data) * 3 // 4} bytes]"


def serve_tools(
    tools: Mapping[str, Tool], *, instructions: str = "", port: int | None = None, host: str = "127.0.0.1"
) -> None:
    """Serves tools to one client over standard input and output, until it ends; with a port (0: any that is free), to
    any number over streamable HTTP, until interrupted. Calls run one at a time, in the order in which they came.

    Whoever reaches the port can call the tools. In stdio mode what a tool prints goes to standard error.
    """
    _require_mcp()
    server = _server(tools, instructions)
    if port is None:
        asyncio.run(_over_stdio(server))
    else:
        _over_http(server, port, host)


def _server(tools: Mapping[str, Tool], instructions: str) -> Server[Any]:
    from anyio import Lock, to_thread
    from mcp import types
    from mcp.server.lowlevel import Server

    lock = Lock()
    listed = [
        types.Tool(name=name, description=tool.description, input_schema=dict(tool.parameters))
        for name, tool in tools.items()
    ]

    async def list_tools(context: Any, parameters: Any) -> types.ListToolsResult:
        return types.ListToolsResult(tools=listed)

    async def call(context: Any, parameters: types.CallToolRequestParams) -> types.CallToolResult:
        asked = ToolCall(parameters.name, parameters.arguments or {})
        async with lock:
            result = await to_thread.run_sync(call_tool, asked, tools)
        return types.CallToolResult(content=[types.TextContent(type="text", text=result.text)], is_error=result.failed)

    return Server("treegym", instructions=instructions or None, on_list_tools=list_tools, on_call_tool=call)


async def _over_stdio(server: Server[Any]) -> None:
    from mcp.server.stdio import stdio_server

    wire = os.dup(0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)  # what tools read is not the protocol
    os.close(nothing)
    lines: Any = _lines(wire)  # the server asks a file for its lines alone
    try:
        async with stdio_server(stdin=lines) as (reading, writing):
            await server.run(reading, writing, server.create_initialization_options())
    finally:
        os.dup2(wire, 0)
        os.close(wire)


async def _lines(fd: int) -> AsyncIterator[str]:
    """Lines of a pipe, terminal or file. The library's own reader waits in a thread, which no Ctrl-C ends."""
    unread = b""
    while True:
        await _readable(fd)
        part = os.read(fd, 1 << 16)
        *lines, unread = (unread + part).split(b"\n")
        for line in lines:
            yield line.decode(errors="replace")
        if not part:
            break


async def _readable(fd: int) -> None:
    loop, ready = asyncio.get_running_loop(), asyncio.Event()
    try:
        loop.add_reader(fd, ready.set)
    except PermissionError:  # a file, which always is
        return
    try:
        await ready.wait()
    finally:
        loop.remove_reader(fd)


def _over_http(server: Server[Any], port: int, host: str) -> None:
    import uvicorn

    app = server.streamable_http_app(host=host)
    try:
        listening = socket.create_server((host, port))
    except OSError as error:
        raise ServerUnavailable(f"cannot listen at {host}, port {port}: {error.strerror or error}") from error
    with listening:
        url = f"http://{host}:{listening.getsockname()[1]}/mcp"
        print(f"serving at {url}", file=sys.stderr, flush=True)
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=CLOSE_SECONDS)
        uvicorn.Server(config).run(sockets=[listening])
