"""In a notebook trees and runs show what is in them, as text, and a run's rollouts are a table."""

from __future__ import annotations

import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest
from test_memory_reflect import group

from treegym.agents import Run
from treegym.agents.notebook import SHOWN
from treegym.envs import Message

TREE = group(("left", "on", 1.0), ("<script>alert(1)</script>", "off", 0.5))


def test_a_tree_shows_its_rollouts_as_text() -> None:
    shown = TREE._repr_html_()
    assert "tests/Doors-v0, seed 0: 2 rollouts, 4 turns" in shown and shown.count("<details>") == 3
    assert "rollout 1: return 0.50, 2 turns, answered" in shown
    assert "<script>" not in shown and "&lt;script&gt;alert(1)" in shown


def test_many_rollouts_and_long_messages_are_cut() -> None:
    shown = group(*[(f"{i} " * 5_000, "on", 1.0) for i in range(SHOWN + 3)])._repr_html_()
    assert "and 3 more" in shown and "more characters]" in shown and len(shown) < SHOWN * 12_000


def test_a_run_shows_its_stages(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.trees.append(TREE, stage="improvement", step=0)
    assert "not finished, 1 tree" in run._repr_html_()
    success = {"mean": 0.5, "low": 0.25, "high": 0.75}
    run.summarize({"stages": {"trained": {"tasks": 9, "success": success}}})
    assert "<td>trained</td><td>9</td><td>50.0%</td><td>25.0%</td><td>75.0%</td>" in run._repr_html_()


def test_a_run_is_a_table_of_its_rollouts(tmp_path: Path) -> None:
    pytest.importorskip("pandas")
    run = Run(tmp_path)
    run.trees.append(TREE, stage="warmed up", step=0)
    run.trees.append(TREE, stage="improvement", step=3)
    table = run.frame()
    assert [*table.columns[:4]] == ["tree", "rollout", "stage", "step"] and len(table) == 4
    assert table.groupby("stage")["return"].mean().to_dict() == {"warmed up": 0.75, "improvement": 0.75}
    assert [*table["turns"]] == [2] * 4 and [*table["step"]] == [0, 0, 3, 3] and table["terminated"].all()


def test_a_listing_says_what_was_asked(tmp_path: Path) -> None:
    """Of the environment's own words, on one line; an index of an older version is made anew."""
    run = Run(tmp_path)
    run.trees.append(TREE, stage="improvement", step=0)
    told = Message("user", "Pass the\n  gate.\nNote of an earlier attempt; it may be wrong: hurry")
    run.trees.append(replace(TREE, messages=(*TREE.messages, told)), stage="improvement", step=1)
    run.close()
    assert [summary.question for summary in run.trees.summaries()][1] == "Pass the gate."
    with sqlite3.connect(tmp_path / "trees.jsonl.zst.index") as index:
        index.execute("PRAGMA user_version = 3")
    assert [summary.question for summary in Run(tmp_path).trees.summaries()] == [
        "Pass the gate and the lamp. At the gate: left or right?",
        "Pass the gate.",
    ]
