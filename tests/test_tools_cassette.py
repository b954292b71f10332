"""Cassettes: what was answered once is answered again, to every branch alike, though the source is gone."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import http.server
import itertools
import json
import pickle
import random
import resource
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gymnasium
import pytest

from treegym.agents import ChatRenderer, RolloutTree, Sampling, grow_trees
from treegym.agents.models.nano import build_nano
from treegym.agents.policies import ScriptedPolicy
from treegym.agents.rollouts import Chains, OutsideSource, TreeExpansion, verify
from treegym.envs import Task, ToolEnv
from treegym.tools import (
    Cassette,
    FunctionTool,
    NotOnTape,
    Playhead,
    Recorded,
    ToolCall,
    ToolError,
    ToolResult,
    TransientError,
    call_tools,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cassette.jsonl"


def counter() -> Callable[[], int]:
    """A source that never answers the same."""
    return itertools.count().__next__


def test_a_tape_answers_what_was_answered_and_asks_nobody(path: Path) -> None:
    source, recording = counter(), Playhead(Cassette(path))
    answers = [recording.ask("time", question, source) for question in ("a", "b", "a", "a")]
    assert answers == [0, 1, 2, 3]
    playing = Playhead(Cassette(path, "play"))
    assert [playing.ask("time", question, pytest.fail) for question in ("a", "a", "b", "a")] == [0, 2, 1, 3]


def test_a_question_that_the_tape_does_not_hold_is_named(path: Path) -> None:
    Playhead(Cassette(path)).ask("time", "a", counter())
    playing = Playhead(Cassette(path, "play"))
    for source, question in (("time", "b"), ("judge", "a")):
        with pytest.raises(NotOnTape, match=f'cassette.jsonl has no answer to .*"{question}"'):
            playing.ask(source, question, pytest.fail)
    playing.ask("time", "a", pytest.fail)
    with pytest.raises(NotOnTape, match='"before": 1'):
        playing.ask("time", "a", pytest.fail)


def test_branches_ask_in_any_order(path: Path) -> None:
    """The n-th asking in a branch has one answer, whichever branch comes with it first."""
    source, trunk = counter(), Playhead(Cassette(path))
    trunk.ask("time", "a", source)
    branches = [trunk.fork() for _ in range(3)]
    orders = [list("aab"), list("baa"), list("aba")]
    heard = [
        [(q, branch.ask("time", q, source)) for q in order] for branch, order in zip(branches, orders, strict=True)
    ]
    assert all(sorted(answers) == sorted(heard[0]) for answers in heard)
    assert trunk.ask("time", "a", source) == heard[0][0][1]  # the forks' askings are not the trunk's


def test_episodes_have_answers_of_their_own(path: Path) -> None:
    source, playhead = counter(), Playhead(Cassette(path), "one")
    assert playhead.ask("time", "a", source) == 0
    playhead.rewind("two")
    assert playhead.ask("time", "a", source) == 1
    playhead.rewind("one")
    assert playhead.ask("time", "a", source) == 0


def test_a_source_with_a_state_is_asked_after_all_before(path: Path) -> None:
    source, trunk = counter(), Playhead(Cassette(path))
    other = trunk.fork()
    assert [trunk.ask("game", move, source, stateful=True) for move in "lr"] == [0, 1]
    assert [other.ask("game", move, source, stateful=True) for move in "rr"] == [2, 3]  # r after r is not r after l
    heard: list[str] = []
    late = Playhead(Cassette(path))
    for move, answer in (("l", 0), ("r", 1), ("l", "new")):  # the tape's answers; the source hears all the same
        assert late.ask("game", move, lambda move=move: heard.append(move) or "new", stateful=True) == answer
    assert heard == ["l", "r", "l"]
    again = Playhead(Cassette(path, "play"))
    assert [again.ask("game", move, pytest.fail, stateful=True) for move in "lrl"] == [0, 1, "new"]


def test_threads_ask_each_question_once(path: Path) -> None:
    cassette, source = Cassette(path), counter()
    gate = threading.Barrier(8)

    def ask(_: int) -> list[int]:
        gate.wait()
        playhead = Playhead(cassette)
        return [playhead.ask("time", question % 5, source) for question in range(50)]

    with ThreadPoolExecutor(8) as pool:
        heard = list(pool.map(ask, range(8)))
    assert all(answers == heard[0] for answers in heard) and source() == 50
    assert len(path.read_text().splitlines()) == 50


def test_a_source_that_fails_leaves_no_answer(path: Path) -> None:
    playhead = Playhead(Cassette(path))
    with pytest.raises(ZeroDivisionError):
        playhead.ask("time", "a", lambda: 1 // 0)
    assert playhead.ask("time", "a", lambda: 7) == 7 and len(path.read_text().splitlines()) == 1


def test_a_killed_recording_goes_on(path: Path) -> None:
    source, playhead = counter(), Playhead(Cassette(path))
    answers = [playhead.ask("time", question, source) for question in "abc"]
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        kept = whole[:size].count(b"\n")
        resumed = Playhead(Cassette(path))
        assert [resumed.ask("time", question, lambda: 9) for question in "abc"] == answers[:kept] + [9] * (3 - kept)
        assert len([json.loads(line) for line in path.read_text().splitlines()]) == 3


def test_a_full_disk_leaves_no_torn_line(path: Path) -> None:
    playhead = Playhead(Cassette(path))
    playhead.ask("time", "a", lambda: 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            playhead.ask("time", "b", lambda: 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert playhead.ask("time", "c", lambda: 3) == 3
    again = Playhead(Cassette(path, "play"))
    assert [again.ask("time", question, pytest.fail) for question in "ac"] == [1, 3]


def test_modes_say_what_there_must_be(path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no tape"):
        Cassette(path, "play")
    Playhead(Cassette(path, "record")).ask("time", "a", counter())
    with pytest.raises(FileExistsError, match="holds a tape already"):
        Cassette(path, "record")


def test_copies_are_the_same_cassette(path: Path) -> None:
    cassette = Cassette(path, "record")
    Playhead(cassette).ask("time", "a", counter())
    assert copy.deepcopy(cassette) is cassette
    assert Playhead(pickle.loads(pickle.dumps(cassette))).ask("time", "a", pytest.fail) == 0


# tools


def faulty(kind: int) -> str | ToolResult:
    """Answers in one of its ways."""
    if kind == 0:
        raise ToolError("not so")
    if kind == 1:
        raise TransientError("not now")
    return "text" if kind == 2 else ToolResult("more", failed=True, data=[1, "x"], truncated=True)


def test_a_tool_on_tape_answers_and_fails_as_it_did(path: Path) -> None:
    recording = {"faulty": Recorded(FunctionTool(faulty), Playhead(Cassette(path)))}
    calls = [ToolCall("faulty", {"kind": kind}) for kind in (0, 1, 2, 3)] + [ToolCall("faulty", {})]
    live = call_tools(calls, {"faulty": FunctionTool(faulty)})
    assert call_tools(calls, recording) == live
    gone = FunctionTool(lambda kind: pytest.fail())
    gone.function.__name__ = "faulty"
    assert call_tools(calls, {"faulty": Recorded(gone, Playhead(Cassette(path, "play")))}) == live


# environments


@contextlib.contextmanager
def moody_server() -> Iterator[str]:
    """A search server whose every answer is another."""
    serial, lock = itertools.count(), threading.Lock()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                found = [
                    [{"document": {"id": query, "contents": f"news\n{query}, edition {next(serial)}"}, "score": 1.0}]
                    for query in request["queries"]
                ]
            body = json.dumps({"result": found}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/retrieve"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def renderer() -> ChatRenderer:
    return ChatRenderer(build_nano(["search news answer"])[1])


def script(text: str, seed: int) -> str:
    turn = text.count("assistant")
    choice = random.Random(seed + turn).random()
    return (
        "<answer>x</answer>" if turn > 4 or choice < 0.1 else f"<search>{'moss' if choice < 0.7 else 'fern'}</search>"
    )


def searched(renderer: ChatRenderer, url: str, cassette: Cassette | None, folder: Path) -> list[RolloutTree]:
    questions = folder / "questions.jsonl"
    questions.write_text(
        "".join(
            json.dumps({"id": f"q{i}", "question": f"q{i}?", "answers": ["x"], "supporting": []}) + "\n"
            for i in range(3)
        )
    )
    settings = {"server": url, "questions": str(questions)}
    tasks = [Task("treegym/FactSearch-v0", 0, {"question": f"q{i}"}, settings) for i in range(2)]
    policy = ScriptedPolicy(renderer, script)
    sampling, trees = Sampling(max_context=1 << 20), []
    for seed, strategy in enumerate((Chains(4), TreeExpansion(2, 3, 2))):
        trees += asyncio.run(grow_trees(tasks, strategy, policy, renderer, sampling, seed=seed, cassette=cassette))
    return trees


def test_episodes_with_a_server_are_verified_without_it(renderer: ChatRenderer, path: Path, tmp_path: Path) -> None:
    with moody_server() as url:
        trees = searched(renderer, url, Cassette(path), tmp_path)
        texts = {message.text for tree in trees for node in tree.nodes for message in node.messages}
        assert len([text for text in texts if "edition" in text]) > 8
        resumed = searched(renderer, url, Cassette(path), tmp_path)
        assert [tree.nodes for tree in resumed] == [tree.nodes for tree in trees]
        untaped = searched(renderer, url, None, tmp_path)
        assert [tree.nodes for tree in untaped] != [tree.nodes for tree in trees]
    for tree in trees:
        assert verify(tree, cassette=Cassette(path, "play")) == []
        with pytest.raises(OutsideSource, match=f"reads from {url}, and there is no tape"):
            verify(tree)
    lines = path.read_text().splitlines(True)
    path.write_text("".join(lines[:-1]))
    [found] = [found for tree in trees for found in verify(tree, cassette=Cassette(path, "play"))][:1]
    assert found.difference.field == "exception" and "NotOnTape" in found.difference.replayed


class JudgedEnv(ToolEnv):
    """A judge from outside says how good an answer is, and a user how the talk goes on."""

    sources = ("judge", "user")
    moods = itertools.count()

    def begin(self, options: Any) -> str:
        self.mood = self.consult("user", "hello", self.moods.__next__)
        return f"mood {self.mood}"

    def score(self, answer: str) -> dict[str, float]:
        return {"exact": float(self.consult("judge", {"answer": answer, "mood": self.mood}, self.moods.__next__))}


gymnasium.register("tests/Judged-v0", JudgedEnv)


def test_judges_and_users_go_over_the_tape(renderer: ChatRenderer, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = ScriptedPolicy(renderer, lambda text, seed: f"<answer>{seed % 3}</answer>")
    tasks = [Task("tests/Judged-v0", seed) for seed in range(3)]
    grown = grow_trees(tasks, Chains(8), policy, renderer, Sampling(max_context=1 << 20), cassette=Cassette(path))
    trees = asyncio.run(grown)
    assert len({tree.messages for tree in trees}) == 3
    monkeypatch.setattr(JudgedEnv, "moods", iter(()))
    for tree in trees:
        assert verify(tree, cassette=Cassette(path, "play")) == []
        with pytest.raises(OutsideSource, match="judge, user"):
            verify(tree)
