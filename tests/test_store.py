"""Stored trees: the same when read, none lost without a word, whatever happens to the bytes."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import functools
import io
import json
import math
import os
import pkgutil
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from treegym.agents import (
    ROOT,
    ChatRenderer,
    Completion,
    Cost,
    EpisodeStore,
    Node,
    RolloutTree,
    Run,
    Sampling,
    grow_trees,
)
from treegym.agents.models.nano import build_nano
from treegym.agents.policies.sampler import TransformersPolicy
from treegym.agents.rollouts import EntropyBranching
from treegym.agents.store import (
    DamagedStore,
    Loss,
    Record,
    StoreError,
    StoreLocked,
    TreeSummary,
    Where,
    append_line,
    migrate,
    salvage,
)
from treegym.agents.store.frames import Frames
from treegym.agents.store.records import SCHEMA, SHARED, pack_floats, pack_ints, unpack
from treegym.agents.store.store import CUT_OFF
from treegym.envs import Message, Task
from treegym.tools import ToolCall

SYSTEM = "Find the word at the end of the chain of words. Each turn, write one of the actions below."


def tree(seed: int, *, env: str = "tests/Some-v0", nodes: int = 3) -> RolloutTree:
    """A chain and a fork at its first turn."""
    said = tuple(Message("tool", f"it leads to {word}") for word in ("a", "b"))
    turns = [
        Node(
            parent=i - 1,
            action=Completion(f"look {seed} {i}", (seed, i, 70_000 * (i == 1)), (-0.5, -0.1, 0.0), (), "length", seed),
            observation=(1, 2, 3) if i else (),
            messages=said if i else (),
            reward=0.1 * i,
            reward_terms={"exact": float(seed % 2), "speed": None} if i == nodes - 1 else {},
            terminated=i == nodes - 1,
            state_key=f"{seed}-{i}",
            info={"calls": i},
        )
        for i in range(nodes)
    ]
    fork = replace(turns[-1], parent=0, truncated=True, terminated=False, info={"cause": "turn limit"})
    return RolloutTree(
        task=Task(env, seed, {"split": "train"}, {"hops": [1]}),
        prompt=(*range(40), seed),
        messages=(Message("system", SYSTEM), Message("user", f"Begin at {seed}.")),
        nodes=(*turns, fork),
        leaves=(nodes - 1, nodes),
        origins=(0, 0),
        state_key=f"{seed}",
        info={"hops": 1},
        cost=Cost(leaves=2, forks=1),
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "trees.jsonl.zst"


def fill(path: Path, count: int = 4) -> list[tuple[dict[str, Any], RolloutTree]]:
    """A store of so many trees, closed; what it holds."""
    store = EpisodeStore(path)
    held = [({"stage": "some", "step": i // 2}, tree(i)) for i in range(count)]
    for labels, grown in held:
        store.append(grown, advantages=[[0.1] * len(path) for path in grown.paths], **labels)
    store.close()
    return held


def bounds(path: Path) -> list[int]:
    """Where the records end, the file's beginning first."""
    with sqlite3.connect(path.with_name(f"{path.name}.index")) as index:
        found = [end for [end] in index.execute("SELECT finish FROM trees ORDER BY number")]
    index.close()
    return [0, *found]


# what is written is read

texts = st.text(st.characters(), max_size=8)  # lone surrogates among them
floats = st.floats(allow_nan=False) | st.floats(width=32, allow_nan=False)
ids = st.integers(0, (1 << 32) - 1) | st.integers(0, 60_000)
infos = st.dictionaries(texts, st.none() | st.booleans() | st.integers() | floats | texts, max_size=2)
messages = st.lists(st.builds(Message, st.sampled_from(["system", "user", "tool"]), texts), max_size=3).map(tuple)


@st.composite
def trees(draw: st.DrawFn) -> RolloutTree:
    nodes = []
    for number in range(draw(st.integers(1, 5))):
        tokens = draw(st.lists(ids, max_size=4))
        numbers = st.lists(floats, min_size=len(tokens), max_size=len(tokens)).map(tuple)
        action = Completion(
            draw(texts | st.just("stop")), tuple(tokens), draw(numbers), draw(numbers | st.just(())),
            draw(st.sampled_from(["stop", "length"])), draw(st.integers(0, 3)),
        )  # fmt: skip
        parent = draw(st.integers(ROOT, number - 1))
        nodes.append(
            Node(
                parent,
                action,
                draw(st.lists(ids, max_size=3).map(tuple)),
                draw(messages),
                draw(floats),
                draw(st.dictionaries(texts, st.none() | floats, max_size=2)),
                draw(st.booleans()),
                draw(st.booleans()),
                draw(texts | st.just("stop")),
                draw(infos),
            )
        )
    leaves = draw(st.lists(st.integers(0, len(nodes) - 1), min_size=1, max_size=4))
    return RolloutTree(
        Task(draw(texts), draw(st.integers(0, 1 << 64)), draw(infos), draw(infos)),
        draw(st.lists(ids, max_size=5).map(tuple)), draw(messages), tuple(nodes), tuple(leaves),
        draw(st.just(()) | st.just(tuple(leaves))), draw(texts), draw(infos), draw(st.builds(Cost)),
    )  # fmt: skip


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(trees(), min_size=1, max_size=4), st.booleans(), st.randoms())
def test_what_is_written_is_read(grown: list[RolloutTree], plain: bool, random: Any) -> None:
    with TemporaryStore(".jsonl" if plain else ".jsonl.zst") as store:
        advantages = [[[random.gauss(0, 1) for _ in path] for path in each.paths] for each in grown]
        for i, each in enumerate(grown):
            store.append(each, advantages[i] if i % 2 else None, step=i)
        assert [(labels["step"], found) for labels, found in store] == list(enumerate(grown))
        for i in range(len(grown)):
            record = store.record(i)
            assert record.tree == grown[i]
            expected = None if i % 2 == 0 else tuple(tuple(rollout) for rollout in advantages[i])
            assert record.advantages == expected


class TemporaryStore:
    """A store in a folder of its own, for hypothesis runs a test many times in one tmp_path."""

    def __init__(self, suffix: str) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.store = EpisodeStore(Path(self.folder.name) / f"trees{suffix}")

    def __enter__(self) -> EpisodeStore:
        return self.store

    def __exit__(self, *_: object) -> None:
        self.store.close()
        self.folder.cleanup()


@given(st.lists(st.floats()), st.lists(st.integers(-5, 1 << 34)))
def test_packed_numbers_are_exact(numbers: list[float], whole: list[int]) -> None:
    unpacked = unpack(pack_floats(numbers))
    assert repr(unpacked) == repr(tuple(map(float, numbers)))
    assert unpack(pack_ints(whole)) == tuple(whole)


def test_four_bytes_serve_where_they_lose_nothing() -> None:
    assert pack_floats([-0.5, 1.25]).startswith("f4:") and pack_floats([0.1]).startswith("f8:")
    assert str(pack_ints([65_535]))[:3] == "u2:" and str(pack_ints([65_536]))[:3] == "u4:"


def test_zstdcat_shows_json_lines(path: Path) -> None:
    held = fill(path)
    shown = subprocess.run(["zstdcat", path], capture_output=True, text=True, check=True).stdout
    rows = [json.loads(line) for line in shown.splitlines()]
    assert [row["labels"] for row in rows] == [labels for labels, _ in held]
    assert {row["schema"] for row in rows} == {SCHEMA}
    assert rows[0]["tree"]["nodes"][0]["action"]["text"] == "look 0 0"


def test_the_opening_of_prompts_is_stored_once_in_a_while(path: Path) -> None:
    store = EpisodeStore(path)
    for i in range(SHARED + 2):
        store.append(tree(i, env=f"tests/{i % 2}-v0"), step=i)
    shown = subprocess.run(["zstdcat", path], capture_output=True, text=True, check=True).stdout
    assert shown.count(SYSTEM) == 4  # of either environment, twice
    for i in (0, 1, SHARED - 1, SHARED, SHARED + 1):
        assert EpisodeStore(path).read(i)[1] == tree(i, env=f"tests/{i % 2}-v0")


# schemas


def test_schema_1_is_read_listed_and_gone_on_with(tmp_path: Path) -> None:
    old = tmp_path / "trees.jsonl"
    for i in range(3):
        append_line(old, {"schema": 1, "stage": "some", "step": i, "tree": json.loads(json.dumps(tree(i).to_json()))})
    run = Run(tmp_path)
    assert run.trees.path == old
    assert list(run.trees) == [({"stage": "some", "step": i}, tree(i)) for i in range(3)]
    run.trees.append(tree(3), stage="more", step=0)
    assert run.trees.read(3) == ({"stage": "more", "step": 0}, tree(3)) and run.trees.read(1)[1] == tree(1)
    summaries = list(run.trees.summaries())
    run.close()

    migrate(EpisodeStore(old), tmp_path / "trees.jsonl.zst")
    assert {found.name for found in tmp_path.iterdir()} == {"trees.jsonl.zst", "trees.jsonl.zst.index"}
    assert [found for _, found in Run(tmp_path).trees] == [tree(i) for i in range(4)]
    assert list(Run(tmp_path).trees.summaries()) == summaries


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.zst"])
def test_a_newer_schema_is_named(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / f"trees.{suffix}"
    fill(path, 2)
    monkeypatch.setattr("treegym.agents.store.records.SCHEMA", SCHEMA + 1)
    EpisodeStore(path).append(tree(2))
    monkeypatch.undo()
    end = bounds(path)[2]
    named = rf"{path.name}: record 2 at byte {end} has schema {SCHEMA + 1}, this treegym knows 1 to {SCHEMA}"
    with pytest.raises(StoreError, match=named):
        list(EpisodeStore(path))
    with pytest.raises(StoreError, match=named):
        salvage(EpisodeStore(path))


# the index


def test_summaries_are_those_of_the_trees(path: Path) -> None:
    held = fill(path)
    expected = [TreeSummary.of(i, *each) for i, each in enumerate(held)]
    assert list(EpisodeStore(path).summaries()) == expected
    EpisodeStore(path).index_path.unlink()
    assert list(EpisodeStore(path).summaries()) == expected  # built again
    store = EpisodeStore(path)
    records = list(store.records())
    for start in range(6):
        assert list(store.summaries(start=start)) == expected[start:] and list(store.records(start)) == records[start:]


def test_filters_choose_as_a_reader_of_the_trees_would(path: Path) -> None:
    store = EpisodeStore(path)
    for i in range(12):
        store.append(tree(i, env=f"tests/{i % 2}-v0", nodes=2 + i % 3), stage="odd" if i % 2 else "even", step=i)
    everything = list(store.summaries())
    cases: list[tuple[Where, Callable[[TreeSummary], bool]]] = [
        (Where(stage="odd"), lambda s: s.labels["stage"] == "odd"),
        (Where(steps=(3, 7)), lambda s: 3 <= s.labels["step"] <= 7),
        (Where(steps=(None, 2), env="tests/1-v0"), lambda s: s.labels["step"] <= 2 and s.env == "tests/1-v0"),
        (Where(returns=(0.2, None)), lambda s: s.mean_return >= 0.2),
        (Where(terms={"exact": (1.0, None)}), lambda s: s.terms["exact"] >= 1),
        (Where(terms={"exact": (None, 0.5), "speed": (0, 0)}), lambda s: s.terms["exact"] <= 0.5),
        (Where(rollouts=(3, None)), lambda s: False),
        (Where(terms={"no such": (0, None)}), lambda s: False),
        (Where(success="all", success_term="exact"), lambda s: s.terms["exact"] == 1),
        (Where(success="none", success_term="no such"), lambda s: False),
        (Where(cause="turn limit", steps=(3, 3)), lambda s: s.labels["step"] == 3),
        (Where(cause="another"), lambda s: False),
        (Where(text="BEGIN at 1"), lambda s: s.seed in (1, 10, 11)),
        (Where(text="look 4 0", stage="odd"), lambda s: False),
    ]
    for where, meant in cases:
        assert list(store.summaries(where)) == [s for s in everything if meant(s)]
        assert store.matching(where) == len(list(store.summaries(where)))


numbers = st.sampled_from([-1.0, 0.0, 0.5, 1 - 1e-9, 1.0, 2.0])
ranges = st.tuples(st.none() | numbers, st.none() | numbers)
wheres = st.builds(
    Where,
    stage=st.none() | st.sampled_from(["some", "", "\ud800"]),
    steps=ranges,
    env=st.none() | st.just("tests/0-v0"),
    returns=ranges,
    terms=st.dictionaries(st.sampled_from(["exact", "é\"'"]), ranges, max_size=2),
    rollouts=ranges,
)
SCORES = (0.0, 0.5, sum([0.1] * 10), math.nan, math.inf)


@pytest.fixture(scope="module")
def odd_store() -> Iterator[EpisodeStore]:
    """Trees with labels, returns and reward terms of every kind that a filter can come upon."""
    with TemporaryStore(".jsonl.zst") as store:
        for number, score in enumerate(SCORES * 6):
            terms: dict[str, float | None] = {"exact": score, "é\"'": float(number % 3)} if number % 7 else {}
            node = replace(tree(number).nodes[0], reward=score, reward_terms=terms)
            grown = replace(tree(number, env=f"tests/{number % 2}-v0"), nodes=(node,), leaves=(0,), origins=(0,))
            labels: list[dict[str, Any]] = [{"stage": "some", "step": 1}, {"stage": "\ud800", "step": math.nan}]
            store.append(grown, **[*labels, {}, {"step": "1"}, {"stage": 0, "step": True}][number % 5 - number // 10])
        yield store


@settings(max_examples=200, deadline=None)
@given(where=wheres)
def test_the_index_narrows_to_no_fewer_than_those_that_pass(odd_store: EpisodeStore, where: Where) -> None:
    numbers = [summary.number for summary in odd_store.summaries() if where.passes(summary)]
    assert [summary.number for summary in odd_store.summaries(where)] == numbers


def test_what_is_no_number_lies_in_no_range_that_has_an_end(path: Path) -> None:
    summary = TreeSummary.of(
        0, {"step": "3"}, replace(tree(1), nodes=(Node(-1, Completion("go"), reward=math.nan),), leaves=(0,))
    )
    assert math.isnan(summary.mean_return) and Where().passes(summary)
    for where in (Where(returns=(None, 1)), Where(steps=(3, None)), Where(terms={"exact": (None, 1)})):
        assert not where.passes(summary)


@pytest.mark.parametrize(
    ("conditions", "where"),
    [
        ({}, Where()),
        ({"steps": "3"}, Where(steps=(3, 3))),
        (
            {"steps": "3:", "returns": " : 0.5", "rollouts": "1..2"},
            Where(steps=(3, None), returns=(None, 0.5), rollouts=(1, 2)),
        ),
        ({"term": "exact=0.5:, a b=-1"}, Where(terms={"exact": (0.5, None), "a b": (-1, -1)})),
        ({"success": "mixed"}, Where(success="mixed", success_term="exact")),
        ({"stage": "", "env": "a", "cause": "b", "text": "3:4"}, Where(stage="", env="a", cause="b", text="3:4")),
    ],
)
def test_conditions_are_read_from_texts(conditions: dict[str, str], where: Where) -> None:
    assert Where.parse(conditions, "exact") == replace(where, success_term="exact")


@pytest.mark.parametrize(
    ("conditions", "says"),
    [
        ({"steps": "one"}, "steps: a number or LOW:HIGH .*, got 'one'"),
        ({"steps": ""}, "steps: .*, got ''"),
        ({"returns": ":"}, "returns: .*, got ':'"),
        ({"rollouts": "1:2:3"}, "rollouts: .*, got '1:2:3'"),
        ({"returns": "nan:"}, "returns: .*, got 'nan:'"),
        ({"term": "exact"}, "term: NAME=LOW:HIGH .*, got 'exact'"),
        ({"term": "exact=1:,=2"}, "term: NAME=LOW:HIGH .*, got '=2'"),
        ({"term": "exact=x"}, "term exact: .*, got 'x'"),
        ({"term": "exact=1:,exact=:2"}, "term: one range for each name, got two for exact"),
        ({"success": "most"}, "success: one of all, some, mixed, none, got 'most'"),
        ({"success": "all"}, "success: success_term names the reward term"),
        ({"step": "3"}, "step: no condition has this name; there are steps, "),
    ],
)
def test_a_condition_that_cannot_be_read_is_named(conditions: dict[str, str], says: str) -> None:
    with pytest.raises(ValueError, match=f"^{says}"):
        Where.parse(conditions)


def test_the_index_follows_what_is_appended_and_forgotten(path: Path) -> None:
    fill(path, 2)
    reader, size = EpisodeStore(path), EpisodeStore(path).size
    assert len(reader) == 2
    index = reader.index_path.read_bytes()
    writer = EpisodeStore(path)
    for i in (2, 3):
        writer.append(tree(i), step=9)
    assert len(reader) == 4 and reader.read(3)[1] == tree(3)
    writer.close()
    reader.close()
    reader.index_path.write_bytes(index)  # behind, as after a kill between tree and index
    assert [s.number for s in EpisodeStore(path).summaries()] == [0, 1, 2, 3]
    reader.index_path.write_bytes(b"no database" * 100)
    assert len(EpisodeStore(path)) == 4

    writer.truncate(size)
    assert len(reader) == 2 and [found for _, found in reader] == [tree(0), tree(1)]
    writer.append(tree(7), step=1)
    assert reader.read(2) == ({"step": 1}, tree(7))
    with pytest.raises(IndexError, match="holds no tree 3; it has 3"):
        reader.read(3)


def test_an_index_of_another_file_is_not_believed(path: Path) -> None:
    fill(path, 4)
    other = path.with_name("other.zst")
    store = EpisodeStore(other)
    for i in range(9):
        store.append(tree(i + 10, nodes=5))
    store.close()
    path.write_bytes(other.read_bytes())
    assert [found for _, found in EpisodeStore(path)] == [tree(i + 10, nodes=5) for i in range(9)]
    assert EpisodeStore(path).read(8)[1] == tree(18, nodes=5)
    assert len(EpisodeStore(path)) == 9


def test_a_spoilt_index_is_built_anew(path: Path) -> None:
    held = fill(path)
    index = EpisodeStore(path).index_path
    whole = index.read_bytes()
    index.write_bytes(whole[:4096] + b"spoilt" * ((len(whole) - 4096) // 6))
    assert [found for _, found in EpisodeStore(path)] == [each for _, each in held]
    assert EpisodeStore(path).read(3) == held[3] and len(EpisodeStore(path)) == 4


def test_no_flipped_byte_of_the_index_is_believed(path: Path) -> None:
    """Whatever is asked first of it."""
    held = fill(path, 14)
    where = Where(stage="some", steps=(2, 4), returns=(0, None), terms={"exact": (1, None)})
    questions: list[Callable[[EpisodeStore], Any]] = [
        lambda store: list(store.summaries()),
        lambda store: list(store.summaries(where)),
        lambda store: store.matching(Where(env="tests/Some-v0")),
        lambda store: store.read(9),
        lambda store: [len(store), store.cut_off],
        lambda store: [store.append(tree(20), step=20), *store],
        lambda store: [store.truncate(ends[7]), store.append(tree(20), step=20), *store],
    ]
    index, whole, ends = EpisodeStore(path).index_path, path.read_bytes(), bounds(path)
    sound, answers = index.read_bytes(), []
    for place in [None, *range(0, len(sound), 31)]:
        for question in questions if place is None else [questions[place % len(questions)]]:
            path.write_bytes(whole)
            flipped = bytearray(sound)
            if place is not None:
                flipped[place] ^= 1 << place % 8
            index.write_bytes(flipped)
            with contextlib.closing(EpisodeStore(path)) as store:
                answer = question(store)
            if place is None:
                answers.append(answer)
            assert answer == answers[questions.index(question)], place
    assert answers[5] == [14, *held, ({"step": 20}, tree(20))]


def test_an_opening_that_was_damaged_meanwhile_is_not_built_on(path: Path) -> None:
    store = EpisodeStore(path)
    store.append(tree(0))
    store.close()
    data = bytearray(path.read_bytes())
    data[60] ^= 1
    path.write_bytes(data)
    EpisodeStore(path).append(tree(1))
    assert EpisodeStore(path).read(1)[1] == tree(1)
    with pytest.raises(DamagedStore, match="record 0 at byte 0"):
        EpisodeStore(path).read(0)


ODD = [{"step": 1 << 63}, {"step": -(1 << 70)}, {"step": True}, {"stage": "\ud800"}, {"stage": "\0"}, {"step": -0.0}]


@pytest.mark.parametrize("labels", ODD)
def test_what_an_index_cannot_hold_is_stored(path: Path, labels: dict[str, Any]) -> None:
    store = EpisodeStore(path)
    for i in range(3):
        store.append(tree(i, env="tests/\ud800-v0"), **labels)
    assert list(EpisodeStore(path)) == [(labels, tree(i, env="tests/\ud800-v0")) for i in range(3)]
    assert [found.labels for found in EpisodeStore(path).summaries()] == [labels] * 3
    assert store.matching(Where(stage=labels.get("stage"), steps=(labels.get("step"), None))) == 3


@pytest.mark.parametrize("where", ["treegym.agents.store.store.write", "treegym.agents.store.index.Index.add"])
def test_a_tree_whose_writing_was_interrupted_keeps_its_number(
    path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = EpisodeStore(path)
    store.append(tree(0))
    module, _, name = where.rpartition(".")
    original = pkgutil.resolve_name(where)

    def interrupted(*given: Any) -> None:
        original(*given)
        raise KeyboardInterrupt

    monkeypatch.setattr(pkgutil.resolve_name(module), name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.append(tree(1))
    monkeypatch.undo()
    store.append(tree(2))
    assert [found for _, found in EpisodeStore(path)] == [tree(i) for i in range(3)]


def test_what_prompts_begin_with_is_read_anew_where_another_process_wrote_it(path: Path) -> None:
    def began(seed: int, text: str) -> RolloutTree:
        return replace(tree(seed), messages=(Message("system", SYSTEM), Message("user", text)))

    reader, writer = EpisodeStore(path), EpisodeStore(path)
    for text in ("one", "two", "six"):  # of equal length, so that the records lie where the others did
        with writer.exclusively():
            writer.truncate(0)
            for seed in range(3):
                writer.append(began(seed, text))
        assert reader.read(2)[1] == began(2, text)
        reader.append(began(3, text))
        assert EpisodeStore(path).read(3)[1] == began(3, text)
        reader.close()


def test_threads_read_side_by_side() -> None:
    frames = Frames()
    lines = [random.Random(number).randbytes(1 << 19).hex().encode() for number in range(4)]
    written = [frames.encode(number, line) for number, line in enumerate(lines)] * 16

    def read(data: bytes) -> bytes | None:
        return piece.line if (piece := frames.read(io.BytesIO(data), 0)) else None

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(read, written)) == lines * 16


def test_misshapen_advantages_are_refused(tmp_path: Path) -> None:
    store = EpisodeStore(tmp_path / "trees.jsonl")
    with pytest.raises(ValueError, match=r"advantages are \[rollout\]\[turn\] of the tree"):
        store.append(tree(0), advantages=[[0.5], [0.25] * 4])
    assert store.size == 0
    store.append(tree(0), advantages=[[0.5] * len(path) for path in tree(0).paths])
    five, four = (json.dumps(pack_floats([0.5] * count)) for count in (5, 4))
    store.path.write_text(store.path.read_text().replace(five, four))
    store.index_path.unlink()
    store.close()
    with pytest.raises(DamagedStore, match=r"record 0 at byte 0 is damaged: .* its 4 advantages are not those"):
        list(EpisodeStore(store.path))


def test_a_tree_that_cannot_be_summed_up_is_not_written(path: Path) -> None:
    store = EpisodeStore(path)
    with pytest.raises(ValueError, match="has no rollout"):
        store.append(replace(tree(0), leaves=()))
    assert store.size == 0
    store.append(tree(1))
    assert len(store) == 1


def test_a_store_in_a_folder_that_cannot_be_written_is_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = fill(path)
    EpisodeStore(path).index_path.unlink()
    connect = sqlite3.connect

    def refuse(database: Any, **named: Any) -> sqlite3.Connection:
        return (
            connect("file:/nowhere/index?mode=ro", uri=True) if database != ":memory:" else connect(database, **named)
        )

    monkeypatch.setattr(sqlite3, "connect", refuse)
    assert [s.number for s in EpisodeStore(path).summaries()] == [0, 1, 2, 3]
    assert EpisodeStore(path).read(2) == held[2]


# damage


def test_every_flipped_byte_is_named(path: Path) -> None:
    """One record is flipped at each byte; the others are still read, and the loss is told."""
    held = fill(path, 3)
    whole, ends = path.read_bytes(), bounds(path)
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :])
        record = next(i for i in range(3) if place < ends[i + 1])
        read = []
        with pytest.raises(
            DamagedStore, match=rf"trees\.jsonl\.zst: record {record} at byte {ends[record]} is damaged"
        ):
            for each in EpisodeStore(path):
                read.append(each)
        assert read == held[:record]
        if place % 7 == 0:
            store = EpisodeStore(path)
            store.index_path.unlink()
            losses, damaged = salvage(store)
            lost = [0, 1, 2] if record == 0 else [record]  # the others share their opening with the first
            assert [n for loss in losses for n in loss.records] == lost
            assert [found for _, found in EpisodeStore(path)] == [held[i][1] for i in range(3) if i not in lost]
            assert damaged is not None and damaged.read_bytes()[place] != whole[place]
            damaged.unlink()
            EpisodeStore(path).index_path.unlink()


def test_every_cut_loses_only_the_record_it_hits(path: Path) -> None:
    """Without its index, a cut is that of a crash: the next tree is appended after the last whole one."""
    held = fill(path, 3)
    whole, ends = path.read_bytes(), bounds(path)
    index = EpisodeStore(path).index_path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        kept = sum(end <= size for end in ends[1:])
        if size % 5 == 0 or size in ends:
            EpisodeStore(path).index_path.write_bytes(index)
            with pytest.raises(DamagedStore, match=f"ends at byte {size}, .* records {kept} to 2 are missing"):
                list(EpisodeStore(path))
        EpisodeStore(path).index_path.unlink(missing_ok=True)
        survey = list(EpisodeStore(path).survey())
        assert [found.tree for found in survey if isinstance(found, Record)] == [each for _, each in held[:kept]]
        cut = [Loss(ends[kept], size - ends[kept], range(kept, kept + 1), CUT_OFF)] if size not in ends else []
        assert [found for found in survey if isinstance(found, Loss)] == cut
        if size % 5 == 0:
            store = EpisodeStore(path)
            assert store.cut_off == size - ends[kept]
            store.append(tree(8))
            store.close()
            assert [found for _, found in EpisodeStore(path)] == [*(each for _, each in held[:kept]), tree(8)]


def test_repair_tells_what_the_index_knew_of(path: Path) -> None:
    held = fill(path, 4)
    ends = bounds(path)
    os.truncate(path, ends[2] + 5)
    losses, _ = salvage(EpisodeStore(path))
    assert [(loss.offset, loss.size, loss.records) for loss in losses] == [(ends[2], 5, range(2, 4))]
    assert list(EpisodeStore(path)) == held[:2] and len(EpisodeStore(path)) == 2


@functools.cache
def six_trees() -> tuple[list[Any], bytes, bytes]:
    """What a store holds, its bytes and those of its index."""
    with TemporaryStore(".jsonl.zst") as store:
        held = fill(store.path, 6)
        return held, store.path.read_bytes(), store.index_path.read_bytes()


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_no_damage_is_silent(data: st.DataObject) -> None:
    """Bytes are overwritten, cut out or put in: what is then read are trees that were written, in their order, and
    where one is missing before others or the index knew of it, that is an error."""
    with TemporaryStore(".jsonl.zst") as store:
        path = store.path
        held, whole, index = six_trees()
        store.index_path.write_bytes(index)
        start = data.draw(st.integers(0, len(whole) - 1))
        end = data.draw(st.integers(start, min(len(whole), start + 900)))
        damaged = whole[:start] + data.draw(st.binary(max_size=60)) + whole[end:]
        path.write_bytes(damaged)
        if data.draw(st.booleans()):
            store.index_path.unlink()
        indexed = store.index_path.exists()
        read: list[Any] = []
        try:
            for each in EpisodeStore(path):
                read.append(each)
            told = False
        except DamagedStore:
            told = True
        assert read == held[: len(read)]
        kept = [found for found in EpisodeStore(path).survey() if isinstance(found, Record)]
        losses = [found for found in EpisodeStore(path).survey() if isinstance(found, Loss)]
        lost = [number for loss in losses for number in loss.records]
        crashed = not indexed and (damaged == whole[:start] or [loss.why for loss in losses] == [CUT_OFF])
        assert told or len(read) == 6 or crashed
        assert all((record.labels, record.tree) == held[record.number] for record in kept)
        survivors = {record.number for record in kept} | set(lost)
        assert survivors >= set(range(max(survivors, default=0)))
        assert not told or lost or len(kept) == 6
        salvage(EpisodeStore(path))
        assert list(EpisodeStore(path)) == [held[record.number] for record in kept]


def test_repair_does_not_believe_the_index_of_a_longer_file(path: Path) -> None:
    other = path.with_name("other.zst")
    fill(other, 9)
    held = [({"step": i}, tree(i, nodes=2 + i)) for i in range(3)]
    with contextlib.closing(EpisodeStore(path)) as store:
        for labels, grown in held:
            store.append(grown, **labels)
    EpisodeStore(other).index_path.replace(EpisodeStore(path).index_path)
    os.truncate(path, store.size - 5)
    losses, damaged = salvage(EpisodeStore(path))
    assert [loss.why for loss in losses] == [CUT_OFF] and damaged is None
    assert list(EpisodeStore(path)) == held[:2]
    assert list(EpisodeStore(path).summaries()) == [TreeSummary.of(i, *each) for i, each in enumerate(held[:2])]


def test_a_repaired_file_is_on_the_disk_before_the_damaged_one_is_gone(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(path, 3)
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file).st_ino))
    salvage(EpisodeStore(path))
    assert synced == [path.stat().st_ino]


def test_plain_lines_that_are_broken_are_named(tmp_path: Path) -> None:
    path = tmp_path / "trees.jsonl"
    held = fill(path, 3)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1].replace(b'"schema":%d' % SCHEMA, b'"schema":[', 1) + lines[2])
    with pytest.raises(DamagedStore, match=f"record 1 at byte {len(lines[0])} is damaged"):
        list(EpisodeStore(path))
    losses, _ = salvage(EpisodeStore(path))
    assert [loss.records for loss in losses] == [range(1, 2)]
    assert [found for _, found in EpisodeStore(path)] == [held[0][1], held[2][1]]


# writers

WRITER = """
import sys
from pathlib import Path
from treegym.agents import EpisodeStore
from tests_of_store import tree
store = EpisodeStore(Path(sys.argv[1]))
store.append(tree(5), by="child")
print("written", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def child(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that has appended a tree and keeps the store open."""
    code = WRITER.replace("from tests_of_store", f"sys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom test_store")
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "written\n"
        yield process
        process.kill()


def test_two_writers_are_kept_apart(path: Path, child: subprocess.Popen[str]) -> None:
    store = EpisodeStore(path)
    assert store.read(0) == ({"by": "child"}, tree(5))  # reading goes on
    for write in (lambda: store.append(tree(1)), lambda: store.truncate(0), lambda: salvage(store)):
        with pytest.raises(StoreLocked, match=rf"{path.name} is locked: process {child.pid} writes to it"):
            write()
    child.send_signal(signal.SIGKILL)
    child.wait()
    store.append(tree(1), by="parent")
    with pytest.raises(StoreLocked, match="this process writes to it"):
        EpisodeStore(path).append(tree(2))
    assert [labels["by"] for labels, _ in store] == ["child", "parent"]


LIMITED = """
import resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_store import tree
from treegym.agents import EpisodeStore
from treegym.agents.store import StoreError
store = EpisodeStore(Path(sys.argv[1]))
store.append(tree(0))
store.append(tree(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (store.size + 100, resource.RLIM_INFINITY))
for _ in range(2):
    try:
        store.append(tree(2))
    except StoreError as error:
        print(error)
print(len(store), store.cut_off)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
store.append(tree(2))
print(len(store))
"""


def test_a_file_that_is_replaced_before_it_is_locked_is_not_written(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, other = fill(path, 2), path.with_name("other.zst")
    fill(other, 3)
    flock = fcntl.flock

    def late(file: int, how: int) -> None:
        if other.exists():
            other.replace(path)
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    EpisodeStore(path).append(tree(3))
    assert [found for _, found in EpisodeStore(path)] == [*(each for _, each in held), tree(2), tree(3)]


def test_a_write_that_ends_midway_leaves_the_store_as_it_was(path: Path) -> None:
    """The system stops a file from growing after half of a record: as on a full disk, with a real partial write."""
    command = [sys.executable, "-c", LIMITED, str(path), str(Path(__file__).parent)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    refused = f"{path}: tree 2 could not be written: File too large; the 2 trees before it are whole"
    assert said == [refused, refused, "2 0", "3"]
    assert [found for _, found in EpisodeStore(path)] == [tree(0), tree(1), tree(2)]


def test_a_full_disk_is_said_and_the_store_stays_readable(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = fill(path, 2)
    store = EpisodeStore(path)

    def full(file: int, data: bytes) -> None:
        os.write(file, data[:50])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("treegym.agents.store.store.write", full)
    with pytest.raises(StoreError, match="tree 2 could not be written: No space left on device"):
        store.append(tree(2))
    monkeypatch.undo()
    assert list(EpisodeStore(path)) == held and len(store) == 2
    store.append(tree(2))
    assert store.read(2)[1] == tree(2)


def test_a_resumed_run_cannot_go_back_to_trees_that_are_gone(path: Path) -> None:
    held = fill(path, 3)
    with pytest.raises(DamagedStore, match="trees are missing"):
        EpisodeStore(path).truncate(bounds(path)[3] + 1)
    with pytest.raises(
        DamagedStore, match=f"no record ends at byte {bounds(path)[2] - 5}: the file is not the one it was"
    ):
        EpisodeStore(path).truncate(bounds(path)[2] - 5)
    assert list(EpisodeStore(path)) == held


# size


@pytest.fixture(scope="module")
def wide() -> RolloutTree:
    """A tree of 64 leaves that the untrained nano model grew in the lookup game."""
    task = Task("treegym/Lookup-v0", 1, {}, {"hops": [3]})
    texts = [message.text for message in task.make().reset(seed=1)[1]["messages"]]
    model, tokenizer = build_nano(texts)
    renderer = ChatRenderer(tokenizer)
    policy = TransformersPolicy(model, renderer, max_rows=64)
    sampling = Sampling(max_tokens=8, max_context=4096)
    [grown] = asyncio.run(grow_trees([task], EntropyBranching(16, 64), policy, renderer, sampling))
    return grown


def test_a_wide_tree_takes_little_more_than_its_unique_text(wide: RolloutTree, path: Path) -> None:
    """Without its numbers, which have no text: tokens and their log-probabilities."""
    assert len(wide.leaves) == 64
    bare = replace(
        wide,
        prompt=(),
        nodes=tuple(replace(n, action=Completion(n.action.text), observation=()) for n in wide.nodes),
    )
    store = EpisodeStore(path)
    store.append(bare)
    said = [m.text for m in wide.messages] + [n.action.text for n in wide.nodes]
    said += {m.text for n in wide.nodes for m in n.messages}
    assert store.size < 1.3 * sum(len(text.encode()) for text in said)


def test_what_belongs_to_tokens_comes_back_as_it_was(tmp_path: Path) -> None:
    """Advantages and values of tokens, lessons, versions of weights, speakers, calls."""
    plain_tree = tree(0)
    said = ToolCall("search", {"query": "möön \ud800", "k": [1, 2.5, None]})
    nodes = [
        replace(node, action=replace(node.action, last_weights_version=number + 5), calls=(said,) * number, speaker="b")
        for number, node in enumerate(plain_tree.nodes)
    ]
    told = replace(plain_tree, nodes=tuple(nodes))
    counts = [[len(told.nodes[i].action.token_ids) for i in path] for path in told.paths]
    mixed = [[0.1 if turn % 2 else np.linspace(-1, 1, n) for turn, n in enumerate(row)] for row in counts]
    values = [[random.gauss(0, 1) for _ in node.action.token_ids] for node in told.nodes]
    store = EpisodeStore(tmp_path / "trees.jsonl.zst")
    store.append(told, mixed, values, ["look twice", "ask"], stage="some")
    store.append(plain_tree, [[0.5] * len(row) for row in counts])
    first, second = store.records()
    assert first.tree == told and second.tree == plain_tree and first.lessons == ("look twice", "ask")
    assert first.advantages == tuple(tuple(x if isinstance(x, float) else tuple(x) for x in row) for row in mixed)
    assert first.values == tuple(tuple(row) for row in values)
    assert second.advantages == tuple((0.5,) * len(row) for row in counts) and second.values is None
    assert RolloutTree.from_json(json.loads(json.dumps(told.to_json()))) == told


@pytest.mark.parametrize(
    ("shape", "match"),
    [
        ({"advantages": [[(0.5,) * 99] * 9]}, "advantages are"),
        ({"values": [[0.5]]}, r"values are \[node\]\[sampled token\]"),
    ],
)
def test_misshapen_tokens_are_refused(shape: dict[str, Any], match: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=match):
        EpisodeStore(tmp_path / "trees.jsonl.zst").append(tree(0), **shape)


def test_schema_2_is_read_and_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = EpisodeStore(tmp_path / "trees.jsonl.zst")
    with monkeypatch.context() as patched:
        patched.setattr("treegym.agents.store.records.SCHEMA", 2)
        store.append(tree(0), [[0.5] * len(path) for path in tree(0).paths], stage="old")
    store.append(tree(1), stage="new")
    old, new = store.records()
    assert (old.tree, new.tree) == (tree(0), tree(1)) and old.labels == {"stage": "old"}
    assert old.advantages == tuple((0.5,) * len(path) for path in tree(0).paths)
