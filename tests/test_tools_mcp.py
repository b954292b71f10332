"""MCP: servers, sound, broken and of others, as tools; and tools served to clients."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import gymnasium
import pytest

from treegym.agents import ChatRenderer, RolloutTree, Sampling, grow_trees
from treegym.agents.models.nano import build_nano
from treegym.agents.policies import ScriptedPolicy
from treegym.agents.rollouts import TreeExpansion
from treegym.envs import HermesFormat, MazeEnv, TaggedFormat, Task, ToolEnv, check_env
from treegym.envs.formats.tagged import Action
from treegym.tools import MCPServer, ServerUnavailable, Stateful, ToolCall, ToolError, ToolResult, call_tool

pytest.importorskip("mcp")
PATHS = {"PYTHONPATH": os.pathsep.join(sys.path)}  # a server finds what the tests found

# A server in the protocol's own words, without the SDK: it begins in milliseconds and can break every rule.
SCRIPT = r"""
import json, os, sys, time

NUMBER = {"type": "object", "properties": {"by": {"type": "integer"}}, "additionalProperties": False}
NAMES = "add pid die sleep garbage huge fail refuse nonsense show".split()
TOOLS = [{"name": name, "description": name + "!", "inputSchema": NUMBER} for name in NAMES]
TOOLS.append({"name": "odd", "inputSchema": {"type": "object", "properties": {"x": {"type": 7}}}})
PAGES = {None: {"tools": TOOLS[:5], "nextCursor": "rest"}, "rest": {"tools": TOOLS[5:]}}
SHOWN = [
    {"type": "text", "text": "two lines\nof text"},
    {"type": "image", "mimeType": "image/png", "data": "AAAA"},
    {"type": "resource", "resource": {"uri": "memo://1", "text": "a memo"}},
    {"type": "resource_link", "uri": "memo://2", "name": "two"},
]
total = 0


def say(**answer):
    print(json.dumps({"jsonrpc": "2.0", "id": message["id"], **answer}), flush=True)


def text(value, **more):
    say(result={"content": [{"type": "text", "text": str(value)}], **more})


for line in sys.stdin:
    message = json.loads(line)
    parameters = message.get("params", {})
    if "id" not in message:
        continue
    if message["method"] == "initialize":
        about = {"serverInfo": {"name": "script", "version": "1"}, "capabilities": {"tools": {}}}
        say(result={"protocolVersion": "2025-06-18", **about})
    elif message["method"] == "tools/list":
        say(result=PAGES[parameters.get("cursor")])
    elif message["method"] != "tools/call":
        say(error={"code": -32601, "message": "no such method"})
    elif parameters["name"] == "add":
        total += parameters["arguments"].get("by", 1)
        text(total, structuredContent={"total": total})
    elif parameters["name"] == "pid":
        text(os.getpid())
    elif parameters["name"] == "odd":
        text(json.dumps(parameters["arguments"]))
    elif parameters["name"] == "die":
        sys.exit(3)
    elif parameters["name"] == "sleep":
        time.sleep(3600)
    elif parameters["name"] == "garbage":
        print("\x00 <html> not JSON", "{", "[1, 2]", '{"jsonrpc": "2.0"}', "", sep="\n", flush=True)
        sys.stdout.buffer.write(b"caf\xe9 in Latin-1\n\xff\xfe")  # and bytes before the answer
        sys.stdout.buffer.flush()
        text("after garbage")
    elif parameters["name"] == "huge":
        text("x" * 5_000_000)
    elif parameters["name"] == "fail":
        text("out of paper", isError=True)
    elif parameters["name"] == "refuse":
        say(error={"code": -32602, "message": "not today"})
    elif parameters["name"] == "nonsense":
        say(result={"content": 7})
    elif parameters["name"] == "show":
        say(result={"content": SHOWN})
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    path = tmp_path_factory.mktemp("mcp") / "server.py"
    path.write_text(SCRIPT)
    return [sys.executable, "-I", str(path)]


@pytest.fixture
def server(script: list[str]) -> Iterator[MCPServer]:
    with MCPServer(script) as server:
        yield server


def call(server: MCPServer, tool: str, **arguments: Any) -> ToolResult:
    return call_tool(ToolCall(tool, arguments), {tool.name: tool for tool in server.tools})


def pid(server: MCPServer) -> int:
    return int(call(server, "pid").text)


def alive(process: int) -> bool:
    return Path(f"/proc/{process}").exists()


def test_tools_are_listed_page_by_page(server: MCPServer) -> None:
    names = "add pid die sleep garbage huge fail refuse nonsense show odd".split()
    assert [tool.name for tool in server.tools] == names
    assert (server.tools[0].description, server.tools[0].parameters["properties"]) == (
        "add!",
        {"by": {"type": "integer"}},
    )


def test_what_is_no_schema_takes_any_object(server: MCPServer) -> None:
    assert server.tools[-1].parameters == {"type": "object"}
    assert call(server, "odd", a=[1], self=None).text == '{"a": [1], "self": null}'


def test_a_session_lives_from_call_to_call(server: MCPServer) -> None:
    assert [call(server, "add", by=2).text for _ in range(3)] == ["2", "4", "6"]


def test_structured_content_is_data_and_what_is_no_text_is_named(server: MCPServer) -> None:
    assert call(server, "add").data == {"total": 1}
    assert call(server, "show").text == (
        "two lines\nof text\n[image: image/png, 3 bytes]\n[resource: memo://1]\na memo\n[resource: memo://2]"
    )


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"by": "many"}, "add: by: 'many' is not of type 'integer'"),
        ({"self": 1}, "add: .*'self'"),
        ({"by": 1, "\ud800": 1}, "add: .*half of a surrogate pair"),
        ({"by": json.loads("[" * 300 + "]" * 300)}, "add: .*more than 100 deep"),
        ({"by": json.loads("[" * 900 + "]" * 900)}, "add: .*more than 100 deep"),
    ],
)
def test_bad_arguments_do_not_reach_the_server(server: MCPServer, arguments: dict[str, Any], complaint: str) -> None:
    result = call(server, "add", **arguments)
    assert result.failed and re.match(complaint, result.text)
    assert call(server, "add").text == "1"


@pytest.mark.parametrize(
    ("tool", "says"),
    [("fail", "out of paper"), ("refuse", "refuse: not today"), ("garbage", "after garbage")],
)
def test_errors_are_results_and_leave_the_session_alone(server: MCPServer, tool: str, says: str) -> None:
    call(server, "add")
    result = call(server, tool)
    assert (result.text, result.failed) == (says, tool != "garbage")
    assert call(server, "add").text == "2"


@pytest.mark.parametrize(("tool", "says"), [("die", "ended before it answered"), ("nonsense", "failed")])
def test_a_server_that_breaks_is_an_observation_and_starts_again(server: MCPServer, tool: str, says: str) -> None:
    call(server, "add")
    first = pid(server)
    result = call(server, tool)
    assert result.failed and says in result.text and "state is lost" in result.text
    assert call(server, "add").text == "1"
    assert pid(server) != first and not alive(first)


def test_a_deadline_is_an_observation_and_ends_the_process(script: list[str]) -> None:
    with MCPServer(script, seconds=1) as server:
        first = pid(server)
        result = call(server, "sleep")
        assert result.failed and "did not answer within 1 seconds" in result.text
        assert not alive(first)
        assert call(server, "add").text == "1"


def test_a_shared_servers_other_calls_go_on_where_one_is_late(script: list[str]) -> None:
    with MCPServer(script, stateless=True, seconds=2) as server, ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda i: call(server, "sleep" if i == 3 else "pid"), range(24)))
        late = [i for i, result in enumerate(results) if result.failed]
        assert 3 in late and len(late) <= 8  # a thread waits behind it once at most, then another process serves


def test_a_huge_text_is_cut_and_the_session_goes_on(server: MCPServer) -> None:
    result = call(server, "huge")
    assert result.truncated and "of 5000000 characters" in result.text
    assert call(server, "add").text == "1"


def test_nothing_is_left_after_close(script: list[str]) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with MCPServer(script) as server:
        process = pid(server)
    assert not alive(process)
    assert len(os.listdir("/proc/self/fd")) <= before
    server.close()
    assert pid(server) != process  # a later call starts it again
    server.close()


def test_a_forgotten_server_ends_with_its_object_or_with_python(script: list[str]) -> None:
    server = MCPServer(script)
    process = pid(server)
    del server
    assert not alive(process)
    code = f"from treegym.tools import MCPServer; s = MCPServer({script}); print(s.tools[1]().text)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not alive(int(found.stdout)) and not found.stderr


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["no-such-program-at-all"], "no-such-program-at-all did not start: .*No such file"),
        ([sys.executable, "-c", "import sys; sys.exit('a key is missing')"], "its last lines:\na key is missing"),
        ([sys.executable, "-c", "import time; time.sleep(60)"], "no answer within 1 seconds, which start_seconds"),
        ("http://127.0.0.1:9/mcp", "127.0.0.1:9/mcp did not start: .*endpoint"),
    ],
)
def test_a_server_that_cannot_start_says_why(command: list[str] | str, says: str) -> None:
    server = MCPServer(command, start_seconds=1 if "sleep" in command[-1] else 60)
    with pytest.raises(ServerUnavailable) as raised:
        _ = server.tools
    assert re.search(says, str(raised.value), re.DOTALL)
    assert "MCP server" in str(raised.value)


def test_a_command_given_as_a_text_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a command is a list: \['mcp-server-time', '--help'\]"):
        MCPServer("mcp-server-time --help")


def test_a_server_of_others(tmp_path: Path) -> None:
    """mcp-server-time, as it is on the package index."""
    pytest.importorskip("mcp_server_time", reason="pip install mcp-server-time")
    with MCPServer([sys.executable, "-m", "mcp_server_time", "--local-timezone", "UTC"], prefix="time_") as server:
        assert [tool.name for tool in server.tools] == ["time_get_current_time", "time_convert_time"]
        asked = {"source_timezone": "Asia/Tokyo", "time": "12:30", "target_timezone": "Asia/Kathmandu"}
        result = call(server, "time_convert_time", **asked)
        assert not result.failed and json.loads(result.text)["time_difference"] == "-3.25h"
        assert call(server, "time_convert_time", **asked | {"time": "noon"}).failed
        assert "'target_timezone' is a required property" in call(server, "time_convert_time", time="1:00").text


class Counting(ToolEnv):
    """Count to three with a server's tool."""

    instructions = "Count."
    max_turns = 4

    def __init__(self, command: list[str], stateless: bool = False, **settings: Any) -> None:
        tools = MCPServer(command, stateless=stateless).tools
        super().__init__(tools=[tool for tool in tools if tool.name in ("add", "pid")], **settings)

    def begin(self, options: Mapping[str, Any]) -> str:
        return "count to 3"

    def score(self, answer: str) -> dict[str, float]:
        return {"exact": float(answer == "3" == self.transcript[-1].result.text if self.transcript else False)}

    def oracle(self) -> str | None:
        if self.over:
            return None
        done = [exchange.result.text for exchange in self.transcript]
        return self.write_answer("3") if done[-1:] == ["3"] else self.write_call("add")


gymnasium.register("test/Counting-v0", entry_point=Counting)


def test_an_environment_with_a_server_that_keeps_a_state_is_sound_and_cannot_fork(script: list[str]) -> None:
    check_env(lambda: Counting(script), seeds=[0])
    with contextlib.closing(Counting(script)) as env:
        assert not env.can_fork and isinstance(env.given_tools[0], Stateful)
        env.reset(seed=0)
        assert env.step("<add></add>")[0] == "1"
        with pytest.raises(NotImplementedError, match="stateless"):
            env.fork()
        with pytest.raises(TypeError, match="cannot be pickled"):
            pickle.dumps(env)
        process = int(env.step("<pid></pid>")[0])
        env.reset(seed=0)
        assert not alive(process)
        assert env.step("<add></add>")[0] == "1"
        process = int(env.step("<pid></pid>")[0])
    assert not alive(process)


def test_rollouts_play_again_where_a_server_keeps_a_state(script: list[str]) -> None:
    task = Task("test/Counting-v0", 0, settings={"command": script})
    with contextlib.closing(task.make()) as env:
        words = [message.text for message in env.reset(seed=0)[1]["messages"]]
    renderer = ChatRenderer(build_nano([*words, "0 1 2 3 4 5 6 7 8 9"])[1])

    def act(text: str, seed: int) -> str:
        turns = text.count("assistant")
        return f"<answer>{seed % 1000}</answer>" if turns > 3 else f"<add>{[1, 10, 100][(seed >> turns) % 3]}</add>"

    async def grow() -> list[RolloutTree]:
        policy = ScriptedPolicy(renderer, act)
        return await grow_trees([task], TreeExpansion(2, 2, 1), policy, renderer, Sampling(), seed=1)

    [tree] = asyncio.run(grow())
    assert tree.cost.replays > 0 == tree.cost.forks
    for path in tree.paths:
        sums = 0
        for node in (tree.nodes[i] for i in path[:-1]):
            [said] = node.messages
            sums += int(re.sub(r"\D", "", node.action.text))
            assert said.text == str(sums)  # each branch counts on its own
    assert not [name for name in children() if "server.py" in name]


def children() -> list[str]:
    """The command lines of this process's children."""
    with os.scandir("/proc") as entries:
        processes = [entry.name for entry in entries if entry.name.isdigit()]
    lines = []
    for process in processes:
        with contextlib.suppress(OSError):
            if f"\nPPid:\t{os.getpid()}\n" in Path(f"/proc/{process}/status").read_text():
                lines.append(Path(f"/proc/{process}/cmdline").read_text().replace("\0", " "))
    return lines


def test_a_stateless_servers_tools_are_shared_by_forks_and_pickle(script: list[str]) -> None:
    with MCPServer(script, stateless=True) as server:
        env = ToolEnvOf(server.tools)
        twin = env.fork()
        assert env.can_fork and twin.given_tools[1] is env.given_tools[1]
        process = int(server.tools[1]().text)
        env.close()
        assert alive(process)  # others may be using it
        other = pickle.loads(pickle.dumps(env)).given_tools[1]
        assert int(other().text) != process
        other.server.close()


class ToolEnvOf(ToolEnv):
    def __init__(self, tools: Any) -> None:
        super().__init__(tools=tools)

    def begin(self, options: Mapping[str, Any]) -> str:
        return "?"

    def score(self, answer: str) -> dict[str, float]:
        return {"exact": 1.0}


def test_tools_of_one_name_are_refused_and_a_prefix_parts_them(script: list[str]) -> None:
    with MCPServer(script) as one, MCPServer(script, prefix="other_") as two:
        with pytest.raises(ValueError, match=r"two tools are named 'add': .*prefix"):
            ToolEnvOf([*one.tools, *one.tools])
        assert "other_add" in ToolEnvOf([*one.tools, *two.tools]).tools
        assert call(two, "other_add").text == "1"


@pytest.mark.parametrize("schema", [True, {}, {"type": "string"}, {"type": ["string", "null"]}])
@pytest.mark.parametrize("format", [TaggedFormat(), HermesFormat()])
def test_formats_take_the_names_and_schemas_of_any_server(format: Any, schema: Any) -> None:
    class Odd:
        name, description, parameters = "get-odd/thing.v1", "", {"type": "object", "properties": {"x": schema}}

    tools: Any = {Odd.name: Odd()}
    assert Odd.name in format.instructions(tools)
    for arguments in ({"x": "a </get-odd/thing.v1> b"}, {}):
        action = Action(calls=(ToolCall(Odd.name, arguments),))
        assert format.parse(format.render(action, tools), tools) == action


SERVING = """
import os, subprocess, sys, time
from treegym.tools import ToolError, serve_tools, tool

total = 0
print("printed before")


@tool
def add(by: int) -> str:
    '''Add to the total.'''
    global total
    before = total
    time.sleep(0.001)
    total = before + by
    return str(total)


@tool
def talk() -> str:
    print("printed by a tool", flush=True)
    os.write(1, b"written by a tool")
    subprocess.run(["echo", "written by a process"])
    return "half a pair: \\ud800"


@tool
def refuse() -> str:
    raise ToolError("by: 7 is too much")


@tool
def bug() -> str:
    return str(1 / 0)


serve_tools({"add": add, "talk": talk, "refuse": refuse, "bug": bug}, port=int(sys.argv[1]) if sys.argv[1:] else None)
"""


@contextlib.contextmanager
def http(command: list[str]) -> Iterator[str]:
    """The URL that the command says it serves at."""
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            found = re.search(r"serving at (http://127\.0\.0\.1:\d+/\w+)", next(process.stderr, ""))
            assert found, process.stderr.read()
            yield found[1]
        finally:
            process.terminate()


@pytest.fixture(scope="module", params=["stdio", "http"])
def serving(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MCPServer]:
    path = tmp_path_factory.mktemp("serving") / "serving.py"
    path.write_text(SERVING)
    with contextlib.ExitStack() as stack:
        command = [sys.executable, str(path)]
        where = command if request.param == "stdio" else stack.enter_context(http([*command, "0"]))
        yield stack.enter_context(MCPServer(where, env=PATHS))


@pytest.mark.parametrize("transport", ["stdio", "http"])
def test_served_tools_are_what_they_are_when_called_directly(transport: str) -> None:
    env = MazeEnv(size=4)
    env.reset(seed=3)
    command = [sys.executable, "-m", "treegym", "serve-tools", "treegym/Maze-v0", "--seed", "3", "--setting", "size=4"]
    with contextlib.ExitStack() as stack:
        where = command if transport == "stdio" else stack.enter_context(http([*command, "--http", "0"]))
        server = stack.enter_context(MCPServer(where, env=PATHS))
        assert [(tool.name, tool.description, tool.parameters) for tool in server.tools] == [
            (tool.name, tool.description, tool.parameters) for tool in env.tools.values()
        ]
        for direction in ("east", "north", "west", "south", "east", "south", "up"):
            asked = ToolCall("go", {"direction": direction})
            there, here = call(server, "go", **asked.arguments), call_tool(asked, env.tools)
            assert (there.text, there.failed) == (here.text, here.failed)
        assert "direction" in call(server, "go", direction=5).text
        assert "'direction' is a required property" in call(server, "go").text
        with pytest.raises(ToolError, match="direction"):
            server.tools[0]()
        assert server.call("go", {}).text.startswith("go: direction: ")  # the server's own refusal


def test_ctrl_c_ends_a_server_that_waits_for_its_client() -> None:
    command = [sys.executable, "-m", "treegym", "serve-tools", "treegym/Maze-v0"]
    hello = {"jsonrpc": "2.0", "id": 1, "method": "ping"}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin and process.stdout and process.stderr
        process.stdin.write(json.dumps(hello).encode() + b"\n")
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["id"] == 1
        process.send_signal(signal.SIGINT)
        try:
            assert process.wait(20) == 130
        finally:
            process.kill()
        assert process.stderr.read() == b""


def test_a_tools_error_and_stray_output_and_bugs_keep_the_protocol(serving: MCPServer) -> None:
    assert call(serving, "refuse") == ToolResult("by: 7 is too much", failed=True)
    assert call(serving, "talk").text == "half a pair: ?"
    assert call(serving, "bug").failed
    assert not call(serving, "add", by=0).failed
    assert "did you mean 'add'" in serving.call("ad", {}).text


def test_calls_of_several_clients_run_one_at_a_time(serving: MCPServer) -> None:
    shared = isinstance(serving.server, str)
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(8) as pool:
        clients = [stack.enter_context(MCPServer(serving.server)) for _ in range(3)] if shared else [serving]
        start = int(call(serving, "add", by=0).text)
        texts = pool.map(lambda i: call(clients[i % len(clients)], "add", by=1).text, range(60))
        assert sorted(map(int, texts)) == list(range(start + 1, start + 61))


def test_a_server_that_went_away_is_an_observation(tmp_path: Path) -> None:
    (tmp_path / "serving.py").write_text(SERVING)
    with contextlib.ExitStack() as stack:
        running = stack.enter_context(contextlib.ExitStack())
        url = running.enter_context(http([sys.executable, str(tmp_path / "serving.py"), "0"]))
        server = stack.enter_context(MCPServer(url))
        assert call(server, "add", by=1).text == "1"
        running.close()
        assert call(server, "add", by=1).failed
        with pytest.raises(ServerUnavailable, match="did not start"):
            call(server, "add", by=1)


class Forgetful(BaseHTTPRequestHandler):
    """A server of sessions, which answers 400 where it does not know one."""

    sessions: ClassVar[set[str]] = set()
    RESULTS: ClassVar[dict[str, Any]] = {
        "initialize": {
            "protocolVersion": "2025-06-18",
            "capabilities": {"tools": {}},
            "serverInfo": {"name": "forgetful", "version": "1"},
        },
        "tools/list": {"tools": [{"name": "hello", "inputSchema": {"type": "object"}}]},
        "tools/call": {"content": [{"type": "text", "text": "hello"}]},
    }

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        known = self.headers.get("Mcp-Session-Id") in self.sessions
        begins = asked["method"] == "initialize"
        if begins:
            self.sessions.add("one")
        status = 202 if known and "id" not in asked else 200 if known or begins else 400
        answer = {"jsonrpc": "2.0", "id": asked.get("id"), "result": self.RESULTS.get(asked["method"])}
        body = json.dumps(answer).encode() if status == 200 else b""
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Mcp-Session-Id", "one")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *parts: object) -> None: ...


EVENTS = """
import socket, sys

import uvicorn
from mcp import types
from mcp.server.lowlevel import Server
from mcp.server.sse import SseServerTransport
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Mount, Route


async def tools(context, parameters):
    return types.ListToolsResult(tools=[types.Tool(name="double", input_schema={"type": "object"})])


async def call(context, parameters):
    text = str(2 * parameters.arguments["number"])
    return types.CallToolResult(content=[types.TextContent(type="text", text=text)])


async def events(request):
    async with sse.connect_sse(request.scope, request.receive, request._send) as (reading, writing):
        await server.run(reading, writing, server.create_initialization_options())
    return Response()


server, sse = Server("old", on_list_tools=tools, on_call_tool=call), SseServerTransport("/messages/")
routes = [Route("/sse", events), Mount("/messages/", app=sse.handle_post_message)]
listening = socket.create_server(("127.0.0.1", 0))
print(f"serving at http://127.0.0.1:{listening.getsockname()[1]}/sse", file=sys.stderr, flush=True)
uvicorn.Server(uvicorn.Config(Starlette(routes=routes), log_level="critical")).run(sockets=[listening])
"""


def test_a_server_of_the_old_transport_is_spoken_to_over_events() -> None:
    with http([sys.executable, "-c", EVENTS]) as url, MCPServer(url) as server:
        assert [call(server, "double", number=number).text for number in (2, 3)] == ["4", "6"]
        server.server = url.replace("/sse", "/mcp")
        server.close()
        with pytest.raises(ServerUnavailable, match="/mcp did not start: Not Found"):
            server.call("double", {})


def test_a_url_that_forgot_the_session_gets_another() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Forgetful) as http_server:
        threading.Thread(target=http_server.serve_forever).start()
        try:
            with MCPServer(f"http://127.0.0.1:{http_server.server_port}/mcp") as server:
                assert call(server, "hello").text == "hello"
                Forgetful.sessions.clear()
                assert "its state is lost" in call(server, "hello").text
                assert call(server, "hello").text == "hello"
        finally:
            http_server.shutdown()


def test_nothing_but_protocol_goes_to_standard_output(tmp_path: Path) -> None:
    """Not even what an environment prints while it is made."""
    (tmp_path / "loud.py").write_text(
        "import gymnasium\nfrom treegym.envs import MazeEnv\nprint('imported')\n\n\nclass Loud(MazeEnv):\n"
        "    def begin(self, options):\n        print('begun')\n        return super().begin(options)\n\n\n"
        "gymnasium.register('Loud-v0', entry_point=Loud)\n"
    )
    command = [sys.executable, "-m", "treegym", "serve-tools", "loud:Loud-v0"]
    paths = os.pathsep.join([str(tmp_path), *sys.path])
    about = {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "test", "version": "1"}}
    asked = {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": about}
    found = subprocess.run(
        command, input=json.dumps(asked) + "\n", capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths}
    )
    assert found.returncode == 0, found.stderr
    [answer] = map(json.loads, found.stdout.splitlines())
    assert answer["result"]["instructions"].startswith("Exit ")  # the task
    assert "imported" in found.stderr and "begun" in found.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["treegym/Mase-v0"], "did you mean 'treegym/Maze-v0'"),
        (["treegym/Maze-v0", "--setting", "size=99"], "size 99"),
        (["treegym/Maze-v0", "--setting", "size"], "--setting takes KEY=VALUE"),
        (["treegym/Maze-v0", "--http", "99999"], "less than or equal to 65535"),
        (["treegym/Maze-v0", "--http", "0", "--host", "192.0.2.1"], "cannot listen at 192.0.2.1"),
    ],
)
def test_what_cannot_be_served_is_said_in_a_line(arguments: list[str], says: str) -> None:
    command = [sys.executable, "-m", "treegym", "serve-tools", *arguments]
    found = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert (found.returncode, found.stdout, found.stderr.count("\n")) == (2, "", 1)
    assert says in found.stderr
