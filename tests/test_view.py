"""The viewer: what the server tells, and what a real browser shows."""

from __future__ import annotations

import json
import re
import shutil
import sqlite3
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import replace
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode

import pytest

from treegym.agents import Completion, EpisodeStore, Node, RolloutTree, Run
from treegym.agents.memory import Effect, Evidence, Lesson, LessonStore
from treegym.agents.models.nano import build_nano
from treegym.agents.store import TreeSummary, Where, append_line
from treegym.envs import Message, Note, Task, with_notes
from treegym.scenarios.commands.cli import main
from treegym.scenarios.viewer.shelf import Reading, Shelf, pieces
from treegym.scenarios.viewer.site import Site, ViewServer, exported, serve
from treegym.tools import ToolCall

SCENARIO = "environment: {{id: treegym/Lookup-v0, success: exact}}\nalgorithm: {{name: {}}}\nseed: 3\n"
HOSTILE = (
    "<script>window.hacked=1</script><img src=x onerror='window.hacked=1'></script><!-- "
    "\x1b[2J\x1b]0;owned\x07 \u202eevil\u202c \u2066x\u2069 javascript:alert(1)"
)
MANY = 10_000
SOME = 1_000


def node(parent: int, text: str, reward: float = 0.0, key: str = "", **fields: Any) -> Node:
    """A turn that a tool answers, or that ends the episode where a reward or a truncation says so."""
    size = len(text.split())
    tokens = tuple(range(size))
    action = Completion(text, tokens, (-0.5,) * size, (0.25,) * size)
    [call] = re.findall(r"^<(\w+)>(.*)</\1>$", text) or [None]
    return Node(
        parent,
        action,
        calls=(ToolCall(call[0], {"query": call[1]}),) if call else (),
        observation=(1, 2),
        messages=(Message("tool", f"answer to {text}"),),
        reward=reward,
        reward_terms={"exact": reward},
        terminated="truncated" not in fields and bool(fields.pop("end", reward)),
        state_key=key or text,
        **fields,
    )


def branching(seed: int = 1, **fields: Any) -> RolloutTree:
    """Three rollouts: two share their first turn and then part, the third meets one of them in a state."""
    nodes = (
        node(-1, "<search>red box</search>", key="s1"),
        node(0, "<search>key</search>", key="s2"),
        node(1, "<answer>gold</answer>", 1.0),
        node(0, "<search>lid</search>", key="s3"),
        node(3, "<answer>lead</answer>", end=True),
        node(-1, "<search>map</search>", key="s3"),
        node(5, "<search>door</search>", truncated=True, info={"cause": "turn limit"}),
    )
    tree = RolloutTree(
        Task("treegym/Lookup-v0", seed),
        (1, 2, 3),
        (Message("system", "Find what is in the box."), Message("user", "What is in the red box?")),
        nodes,
        (2, 4, 6),
        state_key="s0",
    )
    return replace(tree, **fields)


def hostile() -> RolloutTree:
    return RolloutTree(
        Task("treegym/Lookup-v0", 1 << 62, {"note": HOSTILE}),
        (1,),
        (Message("user", HOSTILE), Message(HOSTILE, HOSTILE)),
        (node(-1, HOSTILE, reward=1.0, info={"note": HOSTILE, "cause": HOSTILE}),),
        (0,),
        info={"lessons": [HOSTILE, {"text": HOSTILE}]},
    )


def simple(seed: int) -> RolloutTree:
    won = float(seed % 3 == 0)
    return RolloutTree(
        Task("treegym/Maze-v0" if seed % 5 == 0 else "treegym/Lookup-v0", seed),
        (1,),
        (Message("user", f"task {seed}"),),
        (node(-1, f"go {seed}", won, end=True),),
        (0,),
    )


def noted(seed: int, notes: Any) -> RolloutTree:
    """A branching tree whose task tells notes."""
    return replace(branching(), task=Task("treegym/Lookup-v0", seed, wrappers=(("WithNotes", {"notes": notes}),)))


def teach(run: Path) -> None:
    """Five lessons: one measured, one retired, one that replaced another, and one that was forgotten."""
    seen = Evidence(str(run), 0, (1,), (1.0, 0.0), (1, 2), in_force=(2,))
    lost, other = replace(seen, tree=99), replace(seen, run="runs/elsewhere")
    with LessonStore(run / "lessons.sqlite", "training", clock=lambda: 86_400.0) as store:
        store.add(Lesson("Search for the key.", LOOKUP, "red box", ("site:elm",), "Contrast", (seen, lost, other)))
        store.change(1, reason="9 pairs", effect=Effect(0.25, -0.1, 0.6, 9), state="active")
        store.add(Lesson("Look under the lid.", LOOKUP))
        store.retire(2, "it misleads")
        store.add(Lesson("Open it.", LOOKUP))
        store.add(Lesson("Open the box.", LOOKUP))
        store.retire(3, "said better", replaced_by=4)
        store.add(Lesson("Ann lives at the mill.", LOOKUP))
        store.forget(5, "it names a person")


LOOKUP = "treegym/Lookup-v0"


def make_run(folder: Path, trees: list[tuple[RolloutTree, Mapping[str, Any]]], algorithm: str = "grpo") -> Run:
    run = Run(folder)
    (folder / "scenario.yaml").write_text(SCENARIO.format(algorithm))
    for tree, labels in trees:
        run.trees.append(tree, **labels)
    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four runs: one of branching trees, one of hostile ones, one of a thousand small ones and one of ten thousand."""
    root = tmp_path_factory.mktemp("runs")
    improving: dict[str, Any] = {"stage": "improvement"}
    advantages = [[0.8, 0.8, 0.8], [-0.4, -0.4, -0.4], [-0.4, -0.4]]
    informed = branching(9, info={"lessons": ["Look under the lid first."]})
    first = make_run(
        root / "first",
        [
            (branching(1), {**improving, "step": 0, "advantages": advantages}),
            (informed, {**improving, "step": 1}),
            (simple(2), {"stage": "trained", "step": 0}),
        ],
    )
    for step in range(30):
        append_line(
            first.path / "metrics.jsonl",
            {
                "stage": "improvement",
                "step": step,
                "success": step / 30,
                "loss": float("nan"),
                "seconds": {"rollout": 1.5},
            },
        )
    interval = {"mean": 0.5, "low": 0.4, "high": 0.6}
    first.summarize({"stages": {"trained": {"success": interval}}, "gain": interval})
    bad = make_run(root / "deep" / "hostile", [(hostile(), {"stage": HOSTILE, "step": 0})], algorithm="gigpo")
    with LessonStore(bad.path / "lessons.sqlite") as store:
        text = HOSTILE.translate({ord(c): None for c in "\x1b\x07\u202e\u202c\u2066\u2069"})
        store.add(
            Lesson(text, text[:99], text, (text,), text[:99], (Evidence(text, 0, (0,), (1.0, 0.0), (1, 1)),)), text
        )
    some = make_run(root / "some", [(simple(n), {"stage": "trained", "step": n // 10}) for n in range(SOME)])
    change = {"mean": 0.0, "low": -0.1, "high": 0.1}
    some.summarize({"stages": {"model": {"success": interval}}, "gain": change})
    told = with_notes([Note("Search for the key.", "red box", "1"), Note("Be brief.")])[1]["notes"]
    taught = make_run(root / "taught", [(noted(1, told), {}), (noted(2, [HOSTILE, 7, {"when": "x"}]), {})])
    teach(taught.path)
    make_run(root / "many", [(simple(n), {"stage": "trained", "step": n // 100}) for n in range(MANY)])
    return root


def shelf_of(root: Path) -> Shelf:
    return Shelf(root, lambda path: Run(path).trees)


@contextmanager
def serving(root: Path) -> Iterator[ViewServer]:
    with serve(shelf_of(root)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def server(runs: Path) -> Iterator[ViewServer]:
    with serving(runs) as server:
        yield server


def fetch(server: ViewServer, path: str, host: str = "localhost") -> tuple[int, Mapping[str, str], bytes]:
    connection = HTTPConnection("127.0.0.1", server.server_address[1], timeout=30)
    try:
        connection.request("GET", path, headers={"Host": host})
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()
    finally:
        connection.close()


def ask(server: ViewServer, path: str, **question: Any) -> Any:
    status, _, body = fetch(server, f"/api/{path}?{urlencode(question)}")
    content = json.loads(body)
    assert status == 200, content
    return content


def whole(server: ViewServer, **question: Any) -> Any:
    """The listing once everything is read."""
    while not (found := ask(server, "trees", **question))["complete"]:
        pass
    return found


# the server


def test_runs_are_found_wherever_they_lie_and_named_by_their_place(server: ViewServer) -> None:
    found = {run["name"]: run for run in ask(server, "runs")["runs"]}
    assert list(found) == ["deep/hostile", "first", "many", "some", "taught"]
    assert found["first"]["algorithm"] == "grpo" and found["first"]["finished"]
    assert not found["many"]["finished"]


def test_one_run_is_a_shelf_of_its_own(runs: Path) -> None:
    assert list(shelf_of(runs / "first").volumes()) == ["first"]


def test_pages_join_to_the_whole_list(server: ViewServer) -> None:
    whole(server, run="many")
    pages = [ask(server, "trees", run="many", offset=offset, limit=999)["rows"] for offset in range(0, MANY, 999)]
    assert [row["number"] for page in pages for row in page] == list(range(MANY))
    assert len(ask(server, "trees", run="many", limit=5 * MANY)["rows"]) < MANY


QUESTIONS: list[tuple[dict[str, str], Callable[[int], Any]]] = [  # and the numbers that the run `some` answers with
    ({"steps": "3:4"}, lambda n: 30 <= n < 50),
    ({"steps": "3..4"}, lambda n: 30 <= n < 50),  # as addresses of earlier pages have it
    ({"steps": "99:"}, lambda n: n >= 990),
    ({"env": "treegym/Maze-v0"}, lambda n: n % 5 == 0),
    ({"returns": "0.5:"}, lambda n: n % 3 == 0),
    ({"term": "exact=1:"}, lambda n: n % 3 == 0),
    ({"term": "exact=:0.5"}, lambda n: n % 3),
    ({"term": "format=0:"}, lambda n: False),
    ({"rollouts": "2:"}, lambda n: False),
    ({"success": "none", "steps": "0"}, lambda n: n % 3 and n < 10),
    ({"success": "mixed"}, lambda n: False),
    ({"cause": "turn limit"}, lambda n: False),
    ({"text": "ANSWER to go 77"}, lambda n: str(n).startswith("77")),
    ({"text": "go 7", "env": "treegym/Maze-v0"}, lambda n: str(n).startswith("7") and n % 5 == 0),
    ({"stage": "improvement"}, lambda n: False),
]


@pytest.mark.parametrize(("question", "expected"), QUESTIONS)
def test_filters_choose_trees(server: ViewServer, question: dict[str, str], expected: Any) -> None:
    found = whole(server, run="some", **question)
    numbers = [n for n in range(SOME) if expected(n)]
    assert found["matching"] == len(numbers)
    assert [row["number"] for row in found["rows"]] == numbers


def test_a_filter_of_causes_finds_what_was_cut_short(server: ViewServer) -> None:
    assert [row["number"] for row in whole(server, run="first", cause="turn limit")["rows"]] == [0, 1]


def test_an_order_holds_over_all_pages_and_a_tree_is_found_in_it(server: ViewServer) -> None:
    found = whole(server, run="some", order="-success", offset=300, limit=100, at=0)
    assert [row["success"] for row in found["rows"]] == [1.0] * 34 + [0.0] * 66
    assert found["place"] == 0
    assert whole(server, run="some", order="success", at=0)["place"] == SOME - 334


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/api/trees?run=some&steps=x", 400),
        ("/api/trees?run=some&step=3", 400),
        ("/api/trees?run=some&success=maybe", 400),
        ("/api/trees?run=some&order=labels", 400),
        ("/api/trees?run=some&offset=-1", 400),
        ("/api/trees?run=nowhere", 404),
        ("/api/trees?run=../../etc", 404),
        ("/api/tree?run=first&tree=99", 404),
        ("/api/lessons?run=first", 404),
        ("/api/lessons?run=taught&state=x", 400),
        ("/api/lesson?run=taught&lesson=6", 404),
        ("/api/lesson?run=taught&lesson=x", 400),
        ("/api/nothing", 404),
        ("/../scenarios/commands/view.py", 404),
        ("/..%2f..%2fetc/passwd", 404),
        ("//etc/passwd", 404),
        ("/first/trees.jsonl", 404),
        ("/view.py", 404),
        ("http://[bad/", 400),
    ],
)
def test_what_there_is_not_is_refused_in_words(server: ViewServer, path: str, status: int) -> None:
    found, _, body = fetch(server, path)
    assert found == status and json.loads(body)["error"]


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "localhost.evil"])
def test_a_name_that_somebody_else_made_lead_here_is_refused(server: ViewServer, host: str) -> None:
    status, _, body = fetch(server, "/api/runs", host)
    assert status == 403 and b"first" not in body


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.1:7171", "[::1]:7171"])
def test_addresses_of_the_machine_are_answered(server: ViewServer, host: str) -> None:
    assert fetch(server, "/api/runs", host)[0] == 200


def test_every_answer_forbids_what_the_page_does_not_need(server: ViewServer) -> None:
    for path in ("/", "/app.js", "/api/runs", "/nothing"):
        _, headers, _ = fetch(server, path)
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy and "script-src 'self'" in policy and "unsafe" not in policy
        assert headers["X-Content-Type-Options"] == "nosniff"


def test_damage_is_told_in_words(tmp_path: Path) -> None:
    run = make_run(tmp_path / "spoilt", [(simple(n), {"step": n}) for n in range(3)])
    run.close()
    data = bytearray(run.trees.path.read_bytes())
    data[len(data) // 2] ^= 1
    run.trees.path.write_bytes(data)
    answer = Site(shelf_of(tmp_path)).answer("/api/tree?run=spoilt&tree=1")
    assert answer.status == 500 and "record 1 at byte" in json.loads(answer.body)["error"]


def test_numbers_reach_a_browser_as_they_are(server: ViewServer) -> None:
    assert ask(server, "tree", run="deep/hostile", tree=0)["task"]["seed"] == str(1 << 62)
    assert ask(server, "curves", run="first")["metrics"][0]["loss"] is None  # NaN is no JSON


def test_a_growing_run_is_read_on_and_a_shorter_one_anew(tmp_path: Path) -> None:
    run = make_run(tmp_path, [(simple(n), {"step": n}) for n in range(3)])
    volume = shelf_of(tmp_path).volume(tmp_path.name)
    assert volume.numbers(Where(text="go 1")) == [1]
    run.trees.append(simple(10), step=3)
    assert volume.numbers(Where()) == [0, 1, 2, 3] and volume.numbers(Where(text="go 1")) == [1, 3]
    run.trees.truncate(0)
    run.close()
    make_run(tmp_path, [(simple(n), {"step": n}) for n in range(20, 26)])
    assert [row["seed"] for row in volume.listing(Where())["rows"]] == list(range(20, 26))


def test_a_store_that_cannot_be_read_on_says_so_every_time(tmp_path: Path) -> None:
    store = EpisodeStore(tmp_path / "trees.jsonl")
    store.append(simple(0))

    def broken(start: int) -> Iterator[int]:
        yield 1
        raise ValueError("damaged")

    reading = Reading(store, broken)
    for _ in range(3):
        with pytest.raises(ValueError, match="damaged"):
            reading.read_on()
    assert reading.known == [1]


def test_a_reading_that_is_interrupted_goes_on_where_it_was(tmp_path: Path) -> None:
    store = EpisodeStore(tmp_path / "trees.jsonl")
    for number in range(5):
        store.append(simple(number))
    begun = []

    def read(start: int) -> Iterator[TreeSummary]:
        begun.append(start)
        return store.summaries(start=start)

    reading = Reading(store, read)
    answers = [reading.read_on(seconds=0) for _ in range(6)]
    assert answers == [False] * 5 + [True] and begun == [0]
    assert [summary.seed for summary in reading.known] == list(range(5))
    store.append(simple(5))
    assert reading.read_on() and begun == [0, 4] and len(reading.known) == 6  # the last known is compared


def test_searches_side_by_side_all_come_to_their_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path, [(simple(n), {"step": n}) for n in range(5)])
    volume = shelf_of(tmp_path).volume(tmp_path.name)
    monkeypatch.setattr(Reading.read_on, "__defaults__", (0.0,))  # one tree a question
    for _ in range(7):
        answers = [volume.listing(Where(text=f"go {n}")) for n in range(4)]
    assert [(answer["complete"], answer["matching"]) for answer in answers] == [(True, 1)] * 4


@pytest.mark.parametrize(
    "text", ["go left, then 12 right", "Săcele 東京 🙂 naïve", "<answer>a</answer>", " ", "\n\t x"]
)
@pytest.mark.parametrize("ended", [True, False])
def test_pieces_join_to_the_text(text: str, ended: bool) -> None:
    _, tokenizer = build_nano(["go left right"])
    tokens = tokenizer.encode(text, add_special_tokens=False) + [tokenizer.eos_token_id] * ended
    found = pieces(tokenizer.backend_tokenizer, tokens, text)
    assert found is not None and len(found) == len(tokens)
    assert "".join(found[:-1] if ended else found) == text
    assert pieces(tokenizer.backend_tokenizer, tokens, f"{text}.") is None


def test_tokens_of_another_vocabulary_leave_the_text_unshaded() -> None:
    _, tokenizer = build_nano(["go left right"])
    assert pieces(tokenizer.backend_tokenizer, [1_000_000, 3], "go") is None


# lessons

LESSONS_ASKED: list[tuple[dict[str, str], list[int]]] = [  # and the ids that the run `taught` answers with
    ({}, [1, 4]),
    ({"state": "all"}, [1, 2, 3, 4]),
    ({"state": "active"}, [1]),
    ({"state": "replaced"}, [3]),
    ({"words": "SITE:ELM key"}, [1]),
    ({"words": "open", "state": "all"}, [3, 4]),
    ({"words": "lookup box"}, [1, 4]),
    ({"words": "no such"}, []),
]


@pytest.mark.parametrize(("question", "ids"), LESSONS_ASKED)
def test_lessons_are_chosen_by_state_and_words(server: ViewServer, question: dict[str, str], ids: list[int]) -> None:
    found = ask(server, "lessons", run="taught", **question)
    assert [row["id"] for row in found["rows"]] == ids and found["matching"] == len(ids)
    assert found["known"] == len(ask(server, "lessons", run="taught", state=question.get("state", ""))["rows"])


def test_a_lesson_is_told_with_its_evidence_and_history(server: ViewServer) -> None:
    page = ask(server, "lesson", run="taught", lesson=1)
    assert page["lesson"]["effect"] == {"mean": 0.25, "low": -0.1, "high": 0.6, "pairs": 9}
    # of this run, of a tree that there is not, of another run
    assert [piece["rollouts"] for piece in page["lesson"]["evidence"]] == [[0], None, None]
    assert [(change["kind"], change["reason"]) for change in page["history"]] == [("add", ""), ("change", "9 pairs")]


def test_of_a_forgotten_lesson_there_is_no_text(server: ViewServer) -> None:
    status, _, body = fetch(server, "/api/lesson?run=taught&lesson=5")
    assert status == 200 and json.loads(body)["lesson"] is None and b"Ann" not in body
    assert [change["kind"] for change in json.loads(body)["history"]] == ["add", "forget"]


def test_lessons_are_read_and_not_written(tmp_path: Path) -> None:
    teach(make_run(tmp_path / "taught", [(branching(), {})]).path)
    file = tmp_path / "taught" / "lessons.sqlite"
    before, site = file.read_bytes(), Site(shelf_of(tmp_path))
    for path in ("runs", "lessons?run=taught", "lesson?run=taught&lesson=1", "tree?run=taught&tree=0"):
        assert site.answer(f"/api/{path}").status == 200
    assert file.read_bytes() == before


@pytest.mark.parametrize("spoilt", ["UPDATE lessons SET body = '{'", "PRAGMA user_version = 9", ""])
def test_a_store_that_cannot_be_read_is_one_line_and_the_rest_is_there(spoilt: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "taught", [(branching(), {})]).path
    teach(run)
    if spoilt:
        with closing(sqlite3.connect(run / "lessons.sqlite", isolation_level=None)) as connection:
            connection.execute(spoilt)
    else:
        (run / "lessons.sqlite").write_bytes(b"no SQLite at all" * 99)
    shelf = shelf_of(tmp_path)
    for path in ("lessons?run=taught", "lesson?run=taught&lesson=1"):
        answer = Site(shelf).answer(f"/api/{path}")
        said = json.loads(answer.body)["error"]
        assert answer.status == 500 and "lessons.sqlite" in said and "\n" not in said
    assert Site(shelf).answer("/api/tree?run=taught&tree=0").status == 200
    assert "lessons.sqlite" in exported(shelf, {"taught": [0]})


def test_evidence_of_a_run_that_was_moved_is_found_and_that_of_a_namesake_is_not(tmp_path: Path) -> None:
    teach(make_run(tmp_path / "a" / "0", [(branching(), {})]).path)

    def rollouts(run: str) -> Any:
        shelf = shelf_of(tmp_path)
        page = json.loads(Site(shelf).answer(f"/api/lesson?{urlencode({'run': run, 'lesson': 1})}").body)
        return page["lesson"]["evidence"][0]["rollouts"]

    shutil.copytree(tmp_path / "a" / "0", tmp_path / "b" / "0")
    assert (rollouts("a/0"), rollouts("b/0")) == ([0], None)
    shutil.rmtree(tmp_path / "a")
    assert rollouts("b/0") == [0]


# the command


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nowhere"], "no folder nowhere"),
        (["."], "no runs in ."),
        (["first", "--export", "x.html", "--success", "maybe"], "--success: one of all"),
        (["first", "--export", "x.html", "--returns", "x"], "--returns: a number or LOW:HIGH"),
        (["first", "--export", "x.html", "--return", "3:"], "Possible options: --env, --returns"),
        (["first", "--export", "x.html", "--tree", "7"], "first: no tree 7 meets the conditions"),
        (["first", "--tree", "1"], "go with --export"),
    ],
)
def test_usage_errors_are_one_line(
    arguments: list[str], says: str, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    shutil.copytree(runs / "first", tmp_path / "there" / "first")
    monkeypatch.chdir(tmp_path if arguments == ["."] else tmp_path / "there")
    if arguments == ["."]:
        shutil.rmtree(tmp_path / "there")
    monkeypatch.setattr("sys.argv", ["treegym", "view", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    [line] = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and says in line


def test_a_port_that_is_taken_is_said(
    server: ViewServer, runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("sys.argv", ["treegym", "view", str(runs), "--port", str(server.server_address[1])])
    with pytest.raises(SystemExit):
        main()
    assert "--port 0 takes a free one" in capsys.readouterr().err


def test_an_export_holds_the_trees_that_pass_and_nothing_that_ends_its_data(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "some.html"
    monkeypatch.setattr(
        "sys.argv", ["treegym", "view", str(runs), "--export", str(file), "--success", "some", "--limit", "2"]
    )
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code
    page = file.read_text(encoding="utf-8")
    [data] = re.findall(r'<script type="application/json" id="data">([^<]*)</script>', page)
    trees = json.loads(data)["trees"]
    assert {run: list(numbers) for run, numbers in trees.items()} == {
        "first": ["0", "1"],
        "many": ["0", "3"],
        "some": ["0", "3"],
        "taught": ["0", "1"],
        "deep/hostile": ["0"],
    }
    assert not re.search(r'(src|href)="(?!data:)', page)


# the page, in a browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage"
).split()
WAIT = 60_000  # ms; a busy machine is no failure


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("needs Chromium in PATH: apt-get install --no-install-recommends chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


class Visitor:
    """A page, and what must not happen on it."""

    def __init__(self, browser: Any, **options: Any) -> None:
        self.context = browser.new_context(viewport={"width": 1280, "height": 800}, **options)
        self.troubles: list[str] = []
        self.requests: list[str] = []
        self.open()

    def open(self) -> None:
        self.page = self.context.new_page()
        self.page.set_default_timeout(WAIT)
        self.page.on("console", lambda message: self.troubles.append(message.text) if message.type == "error" else None)
        self.page.on("pageerror", lambda error: self.troubles.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.troubles.append(f"dialog {dialog.message}"), dialog.dismiss()))
        self.page.on("request", lambda request: self.requests.append(request.url))

    def goto(self, url: str) -> None:
        self.page.goto(url)
        self.settle()

    def settle(self) -> None:
        self.page.wait_for_selector("main[aria-busy=false]:not(:has([aria-busy=true]))")

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)
            self.page.evaluate("() => new Promise(setTimeout)")  # an address that changed is heard of later
            self.settle()

    def text(self, selector: str) -> str:
        return str(self.page.inner_text(selector))

    def hash(self) -> dict[str, str]:
        view, _, query = self.page.url.partition("#")[2].partition("?")
        return {"view": view, **dict(parse_qsl(query))}


@pytest.fixture
def visitor(browser: Any) -> Iterator[Visitor]:
    visitor = Visitor(browser)
    yield visitor
    visitor.context.close()
    assert visitor.troubles == []


def test_from_the_runs_to_a_tree_by_keyboard(visitor: Visitor, server: ViewServer) -> None:
    visitor.goto(server.url)
    assert "finished" in visitor.text("tr:has-text('first')")
    cells = (visitor.page.locator(row).all_inner_texts() for row in ("thead th", "tr:has-text('some') > *"))
    row = dict(zip(*cells, strict=True))
    assert (row["evaluated"], row["trained"], row["gain, points"]) == ("50.0%", "\N{EN DASH}", "0")
    visitor.press("j")
    visitor.page.wait_for_selector("tr.at:has-text('first')")
    visitor.page.wait_for_selector("figure:has-text('success') svg[aria-label*='first from 0 to 0.97']")
    visitor.press("Enter")
    visitor.page.wait_for_selector(".list .row.at")
    visitor.press("ArrowDown", "Enter")
    visitor.page.wait_for_selector("svg.tree")
    assert visitor.hash() == {"view": "tree", "run": "first", "tree": "1"}
    assert "Look under the lid first." in visitor.text(".panel .lessons")


def test_a_tree_is_walked_by_keyboard_and_tells_what_is_there(visitor: Visitor, server: ViewServer) -> None:
    visitor.goto(f"{server.url}#tree?run=first&tree=0")

    def at() -> str:
        return str(visitor.page.get_attribute(".node.at", "aria-label"))

    walk = {"l": "turn 1, search red box", "ArrowRight": "turn 2, search key", "j": "turn 2, search lid"}
    for key, place in walk.items():
        visitor.press(key)
        assert at().startswith(place)
    assert "state A" in at() and "entropy 0.25" in at()
    assert [label.split(",")[1].strip() for label in labels(visitor, ".node.peer")] == ["search map"]
    visitor.press("j")
    assert at().startswith("turn 2, search door")
    visitor.press("k", "k", "h")
    assert at().startswith("turn 1, search red box") and "forks into 2" in at() and "winning path" in at()
    visitor.press("w")
    assert at().startswith("turn 2") is False and "reward 1.00" in at()
    assert "#0 +0.80" in visitor.text(".panel")
    assert len(labels(visitor, ".node.winning")) == 3
    assert visitor.page.locator(".end").all_text_contents() == [
        "#0  1.00  success  A +0.80  best",
        "#1  0.00  failed  A \N{MINUS SIGN}0.40",
        "#2  0.00  turn limit  A \N{MINUS SIGN}0.40",
    ]
    visitor.press("Enter")
    assert visitor.hash() == {"view": "episode", "run": "first", "tree": "0", "rollout": "0", "turn": "3"}


def labels(visitor: Visitor, selector: str) -> list[str]:
    return [str(each.get_attribute("aria-label")) for each in visitor.page.locator(selector).all()]


def test_an_episode_is_a_conversation(visitor: Visitor, server: ViewServer) -> None:
    visitor.goto(f"{server.url}#episode?run=first&tree=0&rollout=2")
    said = visitor.text("article")
    order = [
        "Find what is in the box.",
        "What is in the red box?",
        "search>map",
        "answer to <search>map",
        "search>door",
    ]
    assert [said.index(part) for part in order] == sorted(said.index(part) for part in order)
    assert "truncated: turn limit" in visitor.text(".ending")
    assert "\N{MINUS SIGN}0.50 nats a token" in said and "advantage \N{MINUS SIGN}0.40" in said
    assert "no tokenizer" in visitor.text(".tools")
    visitor.press("j", "j")
    assert visitor.page.get_attribute(".turn.at", "id") == "turn2"
    visitor.press("h")
    assert visitor.hash()["rollout"] == "1"
    visitor.press("t")
    assert visitor.hash()["view"] == "tree"
    visitor.press("Escape", "Escape")
    assert visitor.hash() == {"view": "runs", "run": "first"}


def test_tokens_are_shaded_by_what_was_recorded(visitor: Visitor, tmp_path: Path, browser: Any) -> None:
    _, tokenizer = build_nano(["go left right"])
    tokens = tuple(tokenizer.encode("go left", add_special_tokens=False))
    action = Completion("go left", (*tokens, int(tokenizer.eos_token_id)), (-0.01, -3.9, -1.0), (0.1, 2.0, 4.0))
    tree = RolloutTree(
        Task("treegym/Lookup-v0", 1), (1,), (Message("user", "?"),), (Node(-1, action, terminated=True),), (0,)
    )
    run = make_run(tmp_path / "shaded", [(tree, {})])
    tokenizer.save_pretrained(run.path / "model")
    with serving(run.path) as server:
        levels = {}
        for shade in ("log-probability", "entropy"):
            visitor.goto(f"{server.url}#episode?run=shaded&tree=0&shade={shade}")
            found = visitor.page.locator(".token").all()
            levels[shade] = [(each.inner_text().strip(), str(each.get_attribute("class")).split()[1]) for each in found]
    assert levels["log-probability"] == [("go", "h0"), ("left", "h8"), ("<|im_end|>", "h2")]
    assert levels["entropy"] == [("go", "h0"), ("left", "h4"), ("<|im_end|>", "h8")]


def test_a_turn_s_own_terms_are_shown_with_the_turn(visitor: Visitor, tmp_path: Path) -> None:
    turns = (
        replace(node(-1, "<search>red</search>", -0.02), reward_terms={"calls": 1.0, "style": None}, terminated=False),
        replace(node(0, "<answer>red</answer>", 1.0), reward_terms={"exact": 1.0}),
    )
    task = Task("treegym/Lookup-v0", 1, wrappers=(("Hint", {"text": "Look."}), ("TurnLimit", {"turns": 3})))
    tree = RolloutTree(task, (1,), (Message("user", "?"),), turns, (1,))
    with serving(make_run(tmp_path / "steps", [(tree, {})]).path) as server:
        visitor.goto(f"{server.url}#episode?run=steps&tree=0")
        assert [visitor.text(f"#turn{i} p.reward").split("info")[0].split() for i in (1, 2)] == [
            ["reward", "\N{MINUS SIGN}0.02", "calls", "1"],
            ["reward", "+1.00", "exact", "1"],
        ]
        visitor.goto(f"{server.url}#tree?run=steps&tree=0&node=0")
        assert "\N{MINUS SIGN}0.02: calls 1" in visitor.text(".panel")
        visitor.goto(f"{server.url}#tree?run=steps&tree=0")
        assert "Hint text Look. · TurnLimit turns 3" in visitor.text(".panel")


def test_turns_that_say_the_same_are_told_apart_by_their_weights(visitor: Visitor, tmp_path: Path) -> None:
    older = node(-1, "<answer>red</answer>", 1.0)
    newer = replace(older, action=replace(older.action, weights_version=3))
    midway = replace(older, action=replace(older.action, weights_version=3, last_weights_version=4))
    tree = RolloutTree(
        Task("treegym/Lookup-v0", 1), (1,), (Message("user", "?"),), (older, newer, midway), (0, 1, 1, 2)
    )
    with serving(make_run(tmp_path / "twins", [(tree, {})]).path) as server:
        told = []
        for number in range(3):
            visitor.goto(f"{server.url}#tree?run=twins&tree=0&node={number}")
            told.append(visitor.text(".panel"))
    assert "version" not in told[0] and "#1 #2" in told[1] and "version 3" in told[1] and "versions 3 to 4" in told[2]


def test_a_list_of_many_trees_draws_what_is_in_sight(visitor: Visitor, server: ViewServer) -> None:
    visitor.goto(f"{server.url}#trees?run=many")
    assert visitor.text(".count") == "10,000 trees"
    assert visitor.page.locator(".space .row").count() < 100
    visitor.press("End")
    visitor.page.wait_for_selector(".row.at:has-text('9999')")
    assert visitor.page.locator(".space .row").count() < 100
    visitor.press("k")
    assert visitor.hash()["at"] == "9998"
    visitor.press("Enter")
    assert "task 9998" in visitor.text(".panel")
    visitor.press("]")
    visitor.page.wait_for_selector("h1:has-text('tree 9999')")


def test_filters_narrow_the_list_and_stand_in_the_address(visitor: Visitor, server: ViewServer) -> None:
    visitor.goto(f"{server.url}#trees?run=some")
    visitor.press("/")
    visitor.page.keyboard.type("go 77")
    visitor.page.wait_for_selector(".count:has-text('11 of 1,000 trees')")
    visitor.page.select_option("select[name=success]", "all")
    visitor.page.wait_for_selector(".count:has-text('3 of 1,000 trees')")  # 771, 774, 777
    visitor.page.fill("input[name=steps]", "77:")
    visitor.page.fill("input[name=returns]", ":1")
    visitor.settle()
    assert visitor.page.locator(".space .row .c-number").all_inner_texts() == ["771", "774", "777"]
    visitor.page.fill("input[name=steps]", "7x")
    visitor.page.wait_for_selector("[role=alert]:has-text(\"got '7x'\")")
    assert visitor.hash() == {
        "view": "trees",
        "run": "some",
        "text": "go 77",
        "success": "all",
        "steps": "7x",
        "returns": ":1",
    }
    visitor.troubles.clear()  # the browser notes the refusal
    visitor.page.click("text=clear")
    visitor.page.wait_for_selector(".count:text-is('1,000 trees')")
    visitor.page.click(".head button[data-order=success]")
    visitor.page.wait_for_selector("[aria-sort=descending] >> text=success")
    visitor.page.wait_for_selector(".row.at:has-text('100%')")


@pytest.mark.parametrize(
    "address",
    [
        "#runs?run=first&with=some",
        "#trees?run=some&steps=3:8&order=-success&at=36",
        "#tree?run=first&tree=0&node=3",
        "#tree?run=first&tree=0&node=3&labels=off",
        "#episode?run=first&tree=0&rollout=1&turn=2&shade=off",
        "#compare?a=first%3A0.0&b=first%3A0.1",
        "#compare?a=first&b=deep%2Fhostile",
        "#lessons?run=taught&state=all&words=box&at=3",
        "#lesson?run=taught&state=all&lesson=3",
    ],
)
def test_a_link_shows_the_same_page_anew(address: str, visitor: Visitor, server: ViewServer) -> None:
    visitor.goto(server.url + address)
    visitor.page.wait_for_selector("h1")
    before, url = visitor.text("main"), visitor.page.url
    visitor.open()
    visitor.goto(url)
    assert visitor.text("main") == before
    assert visitor.page.url == url == server.url + address


def test_two_episodes_are_compared_and_the_first_difference_is_marked(visitor: Visitor, server: ViewServer) -> None:
    visitor.goto(f"{server.url}#episode?run=first&tree=0&rollout=0")
    visitor.press("c", "l", "c")
    assert visitor.hash() == {"view": "compare", "a": "first:0.0", "b": "first:0.1"}
    assert visitor.text("h1 .quiet") == "first difference: turn 2, action, character 9"
    first = visitor.page.locator(".pair.first")
    assert first.count() == 1
    assert first.locator("mark").all_inner_texts() == ["key", "lid"]
    assert visitor.page.locator(".pair.first ~ .pair.same").count() < visitor.page.locator(".pair.same").count()
    visitor.press("j")
    assert "answer to" in visitor.text(".pair.at")
    visitor.goto(f"{server.url}#compare?a=first%3A0.0&b=first%3A1.0")
    assert visitor.text("h1 .quiet") == "the episodes are equal"


def test_an_episode_that_is_kept_goes_along_until_it_is_dropped(visitor: Visitor, server: ViewServer) -> None:
    scrolled = "() => document.getElementById('main').scrollTop"
    visitor.goto(f"{server.url}#episode?run=first&tree=0&rollout=0")
    visitor.page.set_viewport_size({"width": 1280, "height": 300})
    visitor.page.evaluate(f"{scrolled} = 40")
    visitor.press("c")
    assert visitor.page.evaluate(scrolled) == 40 and visitor.text(".tools button") == "compare with the kept one"
    visitor.page.click(".chip:text-is('#1')")
    visitor.page.wait_for_selector("h1:has-text('episode 0.1')")
    assert visitor.hash()["keep"] == "first:0.0"
    visitor.page.click("[aria-label='keep it no longer']")
    visitor.settle()
    assert visitor.page.evaluate("() => document.activeElement.id") == "main"
    visitor.page.click(".chip:text-is('#2')")
    visitor.page.wait_for_selector("h1:has-text('episode 0.2')")
    assert "keep" not in visitor.hash()


def test_two_runs_are_compared(visitor: Visitor, server: ViewServer) -> None:
    visitor.goto(f"{server.url}#compare?a=first&b=deep%2Fhostile")
    assert "algorithm.name" in visitor.text("tr.first")
    assert visitor.page.locator("tr.first mark").all_inner_texts() == ['"grpo"', '"gigpo"']
    assert "metrics part at improvement, step 0" in visitor.text("h1")


def test_from_a_run_to_a_lesson_to_its_evidence_and_back(visitor: Visitor, server: ViewServer) -> None:
    visitor.goto(f"{server.url}#trees?run=taught")
    visitor.press("m")
    assert visitor.text(".count") == "2 lessons in force"
    first = visitor.text("tr.at")
    for said in (
        "active",
        "+0.25",
        "\N{MINUS SIGN}0.10 … +0.60",
        "3",
        "Lookup-v0 site:elm",
        "red box",
        "Search for the key.",
    ):
        assert said in first
    visitor.press("j")
    assert "Open the box." in visitor.text("tr.at") and "not measured" in visitor.text("tr.at")
    visitor.press("Enter", "[")
    visitor.page.wait_for_selector("h1:has-text('lesson 1')")
    assert visitor.hash() == {"view": "lesson", "run": "taught", "lesson": "1"}
    shown = visitor.text("main")
    assert "runs/elsewhere tree 0" in shown and "1970-01-02 00:00" in shown and "9 pairs" in shown
    assert visitor.page.locator("[aria-label=evidence] a[href*=episode]").all_inner_texts() == ["0.0"]
    visitor.page.click("text='0.0'")
    visitor.page.wait_for_selector("h1:has-text('episode 0.0')")
    notes = visitor.page.locator("section.lessons li").all_inner_texts()
    assert notes == ["when you read “red box”: Search for the key. lesson 1", "Be brief."]
    visitor.page.click("text='lesson 1'")
    visitor.page.wait_for_selector("h1:has-text('lesson 1')")
    visitor.press("Escape", "Escape")
    assert visitor.hash() == {"view": "trees", "run": "taught"}


def test_lessons_are_searched_in_the_page_and_in_an_exported_file(
    visitor: Visitor, server: ViewServer, runs: Path, tmp_path: Path
) -> None:
    (tmp_path / "page.html").write_text(exported(shelf_of(runs), {"taught": [0]}), encoding="utf-8")
    for base in (server.url, (tmp_path / "page.html").as_uri()):
        for question, ids in LESSONS_ASKED:
            visitor.goto(f"{base}#lessons?{urlencode({'run': 'taught', **question})}")
            assert visitor.page.locator(".lesson-list tbody th").all_inner_texts() == list(map(str, ids))
        visitor.page.fill("input[name=words]", "open")
        visitor.page.select_option("select[name=state]", "replaced")
        visitor.page.wait_for_selector(".count:text-is('1 of 1 lesson replaced')")
        assert visitor.hash() == {"view": "lessons", "run": "taught", "state": "replaced", "words": "open"}
        visitor.press("Escape")
        visitor.page.click(".lesson-list tbody tr")
        visitor.page.wait_for_selector("h1:has-text('lesson 3')")
        assert "replaced by lesson 4" in visitor.text(".facts").replace("\n", " ") and "said better" in visitor.text(
            "main"
        )


def test_lessons_that_cannot_be_read_are_one_line_of_the_page(visitor: Visitor, tmp_path: Path) -> None:
    run = make_run(tmp_path / "taught", [(branching(), {})])
    (run.path / "lessons.sqlite").write_bytes(b"no SQLite at all" * 99)
    with serving(run.path) as server:
        for address in ("lessons?run=taught", "lesson?run=taught&lesson=1"):
            visitor.goto(f"{server.url}#{address}")
            assert "lessons.sqlite" in visitor.text("[role=alert]")
        visitor.page.goto("about:blank")
    visitor.troubles.clear()  # the browser notes the refusals


HOSTILE_PAGES = [
    "#runs?run=deep%2Fhostile",
    "#trees?run=deep%2Fhostile",
    "#tree?run=deep%2Fhostile&tree=0",
    "#tree?run=deep%2Fhostile&tree=0&node=0",
    "#episode?run=deep%2Fhostile&tree=0&rollout=0",
    "#compare?a=deep%2Fhostile%3A0.0&b=first%3A0.0",
    "#lessons?run=deep%2Fhostile",
    "#lesson?run=deep%2Fhostile&lesson=1",
    "#episode?run=taught&tree=1",
    "#" + urlencode({"": HOSTILE})[1:],
    "#episode?" + urlencode({"run": HOSTILE, "tree": "1"}),
]


@pytest.mark.parametrize("kind", ["served", "exported"])
def test_hostile_texts_are_shown_and_not_run(
    kind: str, visitor: Visitor, server: ViewServer, runs: Path, tmp_path: Path
) -> None:
    base = server.url
    if kind == "exported":
        shelf = shelf_of(runs)
        picked = {
            "deep/hostile": shelf.volume("deep/hostile").numbers(Where()),
            "first": shelf.volume("first").numbers(Where()),
            "taught": shelf.volume("taught").numbers(Where()),
        }
        (tmp_path / "page.html").write_text(exported(shelf, picked), encoding="utf-8")
        base = (tmp_path / "page.html").as_uri()
    for address in HOSTILE_PAGES:
        visitor.open()
        visitor.goto(base + address)
        for summary in visitor.page.locator("main summary").all():
            summary.click()
        shown = visitor.text("main")
        if "tree=0" in address or "%3A0.0" in address or "lesson" in address:
            assert "<script>window.hacked=1</script>" in shown and "onerror=" in shown
        if "tree=0" in address or "%3A0.0" in address:
            assert r"\x1b[2J" in shown and r"\u202eevil" in shown
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", shown)
        assert visitor.page.locator("main script, main img, main iframe").count() == 0
        # Window properties of the page itself, which an evaluation in the isolated main world can read.
        assert visitor.page.evaluate("() => window.hacked") is None
    assert [url for url in visitor.requests if not url.startswith((base.partition("#")[0], "data:"))] == []
    if kind == "served":
        visitor.troubles = [text for text in visitor.troubles if "404" not in text]  # of the run that there is not


def test_the_policy_of_a_page_runs_no_planted_script(
    visitor: Visitor, server: ViewServer, runs: Path, tmp_path: Path
) -> None:
    shelf = shelf_of(runs)
    (tmp_path / "page.html").write_text(exported(shelf, {"first": [0]}))
    plant = "() => { const e = document.createElement('script'); e.textContent = 'window.hacked=1';"
    plant += " document.body.append(e);"
    plant += " document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=window.hacked=1>'); }"
    for url in (server.url, (tmp_path / "page.html").as_uri()):
        visitor.goto(url)
        visitor.page.evaluate(plant)
        assert visitor.page.evaluate("() => window.hacked") is None
        assert any("Content Security Policy" in text for text in visitor.troubles)
        visitor.troubles.clear()


def test_an_exported_file_works_without_a_server(visitor: Visitor, runs: Path, tmp_path: Path) -> None:
    shelf = shelf_of(runs)
    picked = {
        "first": shelf.volume("first").numbers(Where()),
        "some": shelf.volume("some").numbers(Where(steps=(30, 39))),
    }
    file = tmp_path / "some file.html"
    file.write_text(exported(shelf, picked), encoding="utf-8")
    visitor.goto(f"{file.as_uri()}#trees?run=some&success=all&order=-number")
    assert visitor.text(".count") == "34 of 100 trees"
    visitor.press("j", "Enter")
    assert "task 396" in visitor.text(".panel")
    visitor.goto(f"{file.as_uri()}#trees?run=some&text=GO 37")
    assert visitor.text(".count") == "10 of 100 trees"
    visitor.goto(f"{file.as_uri()}#tree?run=first&tree=0")
    visitor.press("l", "l", "Enter")
    assert "answer to" in visitor.text("article")
    assert {url.partition("#")[0] for url in visitor.requests if not url.startswith("data:")} == {file.as_uri()}


def test_an_exported_file_chooses_trees_as_the_server_does(visitor: Visitor, runs: Path, tmp_path: Path) -> None:
    file = tmp_path / "some.html"
    shelf = shelf_of(runs)
    picked = {"some": range(SOME), "first": shelf.volume("first").numbers(Where())}
    file.write_text(exported(shelf, picked), encoding="utf-8")
    asked = [("some", SOME, question, sum(map(bool, map(expected, range(SOME))))) for question, expected in QUESTIONS]
    asked += [("first", 3, {"cause": "turn limit"}, 2), ("first", 3, {"rollouts": "2:", "success": "mixed"}, 2)]
    for run, total, question, matching in asked:
        visitor.goto(f"{file.as_uri()}#trees?{urlencode({'run': run, **question})}")
        assert visitor.text(".count") == f"{matching:,} of {total:,} trees", question
    for question in ({"steps": "1:2:3"}, {"term": "exact"}, {"returns": ":"}, {"term": "a=1,a=2"}):
        visitor.goto(f"{file.as_uri()}#trees?{urlencode({'run': 'some', **question})}")
        refused = json.loads(Site(shelf).answer(f"/api/trees?{urlencode({'run': 'some', **question})}").body)
        assert visitor.text(".count [role=alert]") == refused["error"].replace('"', "'")


def test_a_link_of_an_earlier_page_still_names_its_steps(visitor: Visitor, server: ViewServer) -> None:
    visitor.goto(f"{server.url}#trees?run=some&step=3..4")
    assert visitor.text(".count") == "20 of 1,000 trees"
    assert visitor.page.input_value("input[name=steps]") == "3..4"


def test_dark_and_light_follow_the_system_until_one_is_chosen(browser: Any, server: ViewServer) -> None:
    ground = "() => getComputedStyle(document.body).backgroundColor"
    grounds = {}
    for scheme in ("light", "dark"):
        visitor = Visitor(browser, color_scheme=scheme)
        visitor.goto(server.url)
        grounds[scheme] = visitor.page.evaluate(ground)
        visitor.press("d")
        other = visitor.page.evaluate(ground)
        visitor.goto(f"{server.url}#trees?run=first")
        visitor.page.reload()
        visitor.settle()
        assert visitor.page.evaluate(ground) == other != grounds[scheme]
        visitor.context.close()
        assert visitor.troubles == []
    assert grounds["light"] != grounds["dark"]


def test_help_lists_the_keys_of_the_page(visitor: Visitor, server: ViewServer) -> None:
    visitor.goto(f"{server.url}#tree?run=first&tree=0")
    visitor.press("?")
    assert "parent, first child" in visitor.text("dialog")
    visitor.page.keyboard.press("Escape")
    visitor.page.wait_for_selector("dialog", state="hidden")
    assert visitor.hash()["view"] == "tree"


def test_a_run_that_grows_is_shown_as_it_grows(visitor: Visitor, tmp_path: Path) -> None:
    run = make_run(tmp_path / "growing", [(simple(1), {"step": 0})])
    with serving(run.path) as server:
        visitor.goto(server.url)
        assert visitor.text(".curves > .quiet") == "no metrics yet"
        append_line(run.path / "metrics.jsonl", {"stage": "improvement", "step": 0, "success": 0.5})
        visitor.page.wait_for_selector("figure:has-text('success') svg[aria-label*='growing from 0.50 to 0.50']")
        visitor.goto(f"{server.url}#trees?run=growing")
        assert visitor.text(".count") == "1 tree"
        visitor.page.route("**/api/trees?*", lambda route: route.abort(), times=1)
        visitor.page.wait_for_selector(".count [role=alert]")
        visitor.troubles.clear()  # the browser notes the failure
        run.trees.append(simple(2), step=1)
        visitor.page.wait_for_selector(".count:has-text('2 trees')")
        visitor.page.wait_for_selector(".row:nth-child(2):has-text('1')")
        visitor.page.goto("about:blank")


def test_a_tree_in_the_address_is_sought_until_it_is_read(
    visitor: Visitor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Reading.read_on, "__defaults__", (0.0,))  # one tree a question
    run = make_run(tmp_path / "some", [(simple(n), {"step": n}) for n in range(6)])
    with serving(run.path) as server:
        visitor.goto(f"{server.url}#trees?run=some&steps=1:&at=4")
        assert visitor.page.locator(".row.at .c-number").all_inner_texts() == ["4"]
        visitor.page.goto("about:blank")
