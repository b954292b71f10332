"""Episodes in other formats: valid there, and what can come back comes back."""

from __future__ import annotations

import asyncio
import json
import math
import random
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_scenarios import command
from test_store import fill, tree, trees

from treegym.agents import ChatRenderer, EpisodeStore, RolloutTree, Run, Sampling, grow_trees
from treegym.agents.exchange import EXCHANGES, read_episodes
from treegym.agents.models.nano import build_nano
from treegym.agents.policies import ScriptedPolicy
from treegym.agents.rollouts import TreeExpansion
from treegym.agents.store import Record, StoreError, append_line
from treegym.agents.store.records import json_line
from treegym.envs import Task, ToolEnv, action_format, registered
from treegym.tools.browser import BrowserUnavailable

FORMATS = ["tagged", "hermes", "react", "fenced", "openai"]


def to_text(format: str, row: Any) -> Any:
    """As it is read back from a file."""
    return json.loads(json.dumps(row))


def round_trip(format: str, records: list[Record]) -> list[Record]:
    written = [to_text(format, row) for record in records for row in EXCHANGES[format].write(record)]
    return list(EXCHANGES[format].read(written))


def played(format: str) -> list[RolloutTree]:
    """Trees of the lookup game, of right moves, wrong moves and no moves at all."""
    tasks = [Task("treegym/Lookup-v0", seed, {}, {"hops": [2], "format": format}) for seed in range(3)]
    oracle = tasks[0].make()
    assert isinstance(oracle, ToolEnv)
    texts = [message.text for task in tasks for message in task.make().reset(seed=task.seed)[1]["messages"]]
    renderer = ChatRenderer(build_nano(texts)[1])

    def script(text: str, seed: int) -> str:
        draw = random.Random(f"{text} {seed}")
        known = [word for word in text.split() if word.isalpha()]
        oracle.reset(seed=0)
        ways = [oracle.write_call("lookup", word=draw.choice(known)), oracle.write_answer("it"), "nothing to say"]
        return draw.choice([ways[0], *ways])

    policy = ScriptedPolicy(renderer, script)
    sampling = Sampling(max_context=1 << 20)
    return asyncio.run(grow_trees(tasks, TreeExpansion(2, 2, 1), policy, renderer, sampling))


@pytest.fixture(scope="module")
def records() -> list[Record]:
    grown = [each for format in FORMATS for each in played(format)]
    return [Record(i, {"stage": "some", "step": i}, each) for i, each in enumerate(grown)]


# ATIF


def test_trees_come_back_from_atif_as_they_were(records: list[Record]) -> None:
    scored = [
        replace(record, advantages=tuple(tuple(0.5 + i for i in path) for path in record.tree.paths))
        for record in records[:2]
    ]
    assert round_trip("atif", [*scored, *records[2:]]) == [*scored, *records[2:]]


def test_what_belongs_to_tokens_comes_back_from_atif(records: list[Record]) -> None:
    """Advantages and values of tokens, lessons, speakers, the version of the last token's weights, calls."""
    record = records[0]
    sizes = [len(node.action.token_ids) for node in record.tree.nodes]
    nodes = tuple(
        replace(node, speaker="planner", action=replace(node.action, last_weights_version=7))
        for node in record.tree.nodes
    )
    assert any(node.calls for node in nodes)
    told = replace(
        record,
        tree=replace(record.tree, nodes=nodes),
        advantages=tuple(tuple((0.25,) * sizes[i] if i else 0.5 for i in path) for path in record.tree.paths),
        values=tuple((0.125,) * size for size in sizes),
        lessons=("look twice",),
    )
    assert round_trip("atif", [told]) == [told]


def test_siblings_that_say_the_same_stay_apart(records: list[Record], tmp_path: Path) -> None:
    """Sampled by other weights, in a store and in every format: a rollout for each, with its own numbers."""
    tree = records[0].tree
    ends = tuple(replace(node, parent=node.parent + len(tree.nodes) * (node.parent >= 0)) for node in tree.nodes)
    newer = tuple(replace(node, action=replace(node.action, weights_version=3, logprobs=())) for node in ends)
    leaves = (*tree.leaves, *(leaf + len(tree.nodes) for leaf in tree.leaves))
    twins = replace(records[0], tree=replace(tree, nodes=tree.nodes + newer, leaves=leaves, origins=()))
    store = EpisodeStore(tmp_path / "trees.jsonl.zst")
    store.append(twins.tree)
    assert [found for _, found in store] == [twins.tree]
    assert round_trip("atif", [twins]) == [twins]
    for format in ("openai", "verifiers"):
        rows = [*EXCHANGES[format].write(twins)]
        assert len(rows) == 2 * len(tree.leaves)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(trees())
def test_any_tree_comes_back_from_atif(grown: RolloutTree) -> None:
    """Nodes that no rollout visits go: an episode is a rollout."""
    visited = sorted({i for path in grown.paths for i in path})
    place = {-1: -1, **{old: new for new, old in enumerate(visited)}}
    nodes = tuple(replace(grown.nodes[i], parent=place[grown.nodes[i].parent]) for i in visited)
    grown = replace(grown, nodes=nodes, leaves=tuple(place[leaf] for leaf in grown.leaves))
    [found] = round_trip("atif", [Record(0, {}, grown)])
    assert found.tree == grown


STEP = {
    "step_id", "timestamp", "source", "model_name", "reasoning_effort", "message", "reasoning_content", "tool_calls",
    "observation", "metrics", "llm_call_count", "is_copied_context", "extra",
}  # fmt: skip
ROOT = {
    "schema_version", "session_id", "trajectory_id", "agent", "steps", "notes", "final_metrics",
    "continued_trajectory_ref", "extra", "subagent_trajectories",
}  # fmt: skip
METRICS = {
    "prompt_tokens", "completion_tokens", "cached_tokens", "cost_usd", "prompt_token_ids", "completion_token_ids",
    "logprobs", "extra",
}  # fmt: skip


def check_atif(row: dict[str, Any]) -> None:
    """The rules of ATIF 1.7 that concern what is written here."""
    assert row["schema_version"] == "ATIF-v1.7" and row.keys() <= ROOT
    assert row["agent"].keys() <= {"name", "version", "model_name", "tool_definitions", "extra"}
    assert [step["step_id"] for step in row["steps"]] == list(range(1, len(row["steps"]) + 1))
    for step in row["steps"]:
        assert step.keys() <= STEP and isinstance(step["message"], str)
        assert step["source"] in ("system", "user", "agent")
        if step["source"] != "agent":
            assert not step.keys() & {"model_name", "reasoning_effort", "reasoning_content", "tool_calls", "metrics"}
        calls = step.get("tool_calls", [])
        assert all(call.keys() <= {"tool_call_id", "function_name", "arguments", "extra"} for call in calls)
        assert all(isinstance(call["arguments"], dict) for call in calls)
        for result in step.get("observation", {}).get("results", []):
            assert result.keys() <= {"source_call_id", "content", "subagent_trajectory_ref", "extra"}
            assert result.get("source_call_id") in (None, *(call["tool_call_id"] for call in calls))
        metrics = step.get("metrics", {})
        assert metrics.keys() <= METRICS
        if "completion_token_ids" in metrics:
            assert len(metrics["completion_token_ids"]) == metrics["completion_tokens"] == len(metrics["logprobs"])


def test_what_is_written_is_valid_atif(records: list[Record]) -> None:
    for record in records:
        rows = [to_text("atif", row) for row in EXCHANGES["atif"].write(record)]
        assert len(rows) == len(record.tree.leaves)
        for row in rows:
            check_atif(row)


def test_atif_tells_calls_and_their_results(records: list[Record]) -> None:
    for record in records:
        row = next(EXCHANGES["atif"].write(record))
        node = record.tree.nodes[record.tree.paths[0][0]]
        step = next(step for step in row["steps"] if step["source"] == "agent")
        if node.info["calls"]:
            [call], [result] = step["tool_calls"], step["observation"]["results"]
            assert call["function_name"] == "lookup" and call["arguments"]["word"] in node.action.text
            assert result["source_call_id"] == call["tool_call_id"] and result["content"] == node.messages[0].text
        assert row["final_metrics"]["extra"]["reward"] == record.tree.returns[0]


def test_two_files_joined_are_the_trees_of_both(records: list[Record]) -> None:
    """Also where the last tree of one and the first of the other have the same number."""
    first, second = records[3], replace(records[4], number=3)
    rows = [to_text("atif", row) for record in (first, second, second) for row in EXCHANGES["atif"].write(record)]
    assert [found.tree for found in EXCHANGES["atif"].read(rows)] == [first.tree, second.tree, second.tree]


THEIRS = {
    "schema_version": "ATIF-v1.6",
    "session_id": "025B",
    "agent": {"name": "some-agent", "version": "1.0"},
    "steps": [
        {"step_id": 1, "source": "user", "message": [{"type": "text", "text": "What does it cost?"}]},
        {
            "step_id": 2,
            "source": "agent",
            "message": "I will search.",
            "reasoning_content": "Prices change.",
            "tool_calls": [{"tool_call_id": "c1", "function_name": "search", "arguments": {"query": "price"}}],
            "observation": {"results": [{"source_call_id": "c1", "content": "It costs 3."}]},
            "metrics": {"prompt_token_ids": [1, 2], "completion_token_ids": [3, 4], "logprobs": [-0.1, -0.2]},
        },
        {"step_id": 3, "source": "user", "message": "Go on."},
        {"step_id": 4, "source": "agent", "message": "3", "reasoning_content": "It said 3."},
    ],
}


def test_trajectories_of_others_are_read(tmp_path: Path) -> None:
    file = tmp_path / "trajectory.json"
    file.write_text(json.dumps(THEIRS, indent=2))
    [record] = read_episodes(file, "atif")
    assert [message.text for message in record.tree.messages] == ["What does it cost?"]
    first, last = record.tree.nodes
    action = action_format("openai").parse(first.action.text, {})
    assert action.thought == "Prices change.\nI will search." and action.calls[0].arguments == {"query": "price"}  # type: ignore[union-attr]
    assert record.tree.prompt == (1, 2) and first.action.token_ids == (3, 4) and first.action.logprobs == (-0.1, -0.2)
    assert [(m.role, m.text) for m in first.messages] == [("tool", "It costs 3."), ("user", "Go on.")]
    answer = action_format("openai").parse(last.action.text, {})
    assert (answer.thought, answer.answer) == ("It said 3.", "3")  # type: ignore[union-attr]
    assert last.terminated and record.tree.paths == ((0, 1),)


# chat messages


@pytest.mark.parametrize("format", ["openai", "verifiers"])
def test_what_came_in_goes_out_the_same(format: str, records: list[Record]) -> None:
    def shown(row: Any) -> Any:
        row = to_text(format, row)
        own = row.pop("info", {}).get("treegym", {})
        names = ("messages", "tools", "prompt", "completion", "reward", "metrics", "tool_defs", "is_truncated")
        return {name: row[name] for name in names if name in row}, own.get("rewards"), own.get("labels")

    first = [shown(row) for record in records for row in EXCHANGES[format].write(record)]
    second = [shown(row) for record in round_trip(format, records) for row in EXCHANGES[format].write(record)]
    assert len(first) == sum(len(record.tree.leaves) for record in records)
    assert second == first


def test_chat_messages_have_calls_where_the_format_is_known(records: list[Record]) -> None:
    """And tell nothing of how calls would be written in text."""
    for record in records:
        for rollout, row in enumerate(EXCHANGES["openai"].write(record)):
            nodes = [record.tree.nodes[i] for i in record.tree.paths[rollout]]
            said = [m for m in row["messages"] if m["role"] == "assistant"]
            assert [len(m.get("tool_calls", ())) for m in said] == [node.info["calls"] for node in nodes]
            ids = [call["id"] for m in said for call in m.get("tool_calls", ())]
            assert ids == [m["tool_call_id"] for m in row["messages"] if m["role"] == "tool"]
            assert len(set(ids)) == len(ids)
            if nodes[-1].terminated:
                assert row["messages"][-1]["role"] == "assistant"  # nothing follows the answer
            assert [m["role"] for m in row["messages"]][:2] != ["system", "system"]
            system = [m["content"] for m in row["messages"] if m["role"] == "system"]
            assert not any("Each turn, write" in text for text in system)
            assert [tool["function"]["name"] for tool in row["tools"]] == ["lookup"]
            for node, message in zip(nodes, said, strict=True):
                if node.info["malformed"]:
                    assert message["content"] == node.action.text


def test_an_unknown_environment_s_episodes_are_plain_texts() -> None:
    [row, _] = EXCHANGES["openai"].write(Record(0, {}, tree(1)))
    assert "tools" not in row
    assert [(m["role"], m["content"]) for m in row["messages"]][1:4] == [
        ("user", "Begin at 1."),
        ("assistant", "look 1 0"),
        ("assistant", "look 1 1"),
    ]
    assert {m["role"] for m in row["messages"]} == {"system", "user", "assistant"}


def test_verifiers_rows_tell_rewards_and_ends(records: list[Record]) -> None:
    for record in records:
        for rollout, row in enumerate(EXCHANGES["verifiers"].write(record)):
            leaf = record.tree.nodes[record.tree.leaves[rollout]]
            assert row["reward"] == record.tree.returns[rollout] and row["is_truncated"] == leaf.truncated
            assert row["metrics"]["exact"] == record.tree.term("exact")[rollout]
            assert row["info"]["treegym"]["task"]["seed"] == record.tree.task.seed


def test_examples_in_a_prompt_are_none_of_the_agent_s_turns(records: list[Record]) -> None:
    row = to_text("verifiers", next(EXCHANGES["verifiers"].write(records[0])))
    example = [{"role": "user", "content": "What is 1 + 1?"}, {"role": "assistant", "content": "2"}]
    row["prompt"] = [*example, *row["prompt"]]
    [record] = EXCHANGES["verifiers"].read([row])
    assert [(m.role, m.text) for m in record.tree.messages[:2]] == [("user", "What is 1 + 1?"), ("assistant", "2")]
    assert len(record.tree.nodes) == sum(m["role"] == "assistant" for m in row["completion"])
    [again] = EXCHANGES["verifiers"].write(record)
    assert to_text("verifiers", again)["prompt"] == row["prompt"]


WITH_ORACLE = {"treegym/Browser-v0": {"page": "click-button"}}  # options, where not every task has an oracle


@pytest.mark.parametrize("env", registered())
def test_every_environment_s_demonstrations_become_tool_calls(env: str) -> None:
    """At least where it has tools: the oracle's first move is a call or an answer."""
    task = Task(env, 3, WITH_ORACLE.get(env, {}))
    try:
        made = task.make()
        _, info = made.reset(seed=3, options=dict(task.options))
    except (ImportError, BrowserUnavailable) as error:
        pytest.skip(str(error))
    move = made.oracle()
    made.close()
    assert move is not None
    grown = tree(3)
    node = replace(grown.nodes[0], action=replace(grown.nodes[0].action, text=move), messages=(), terminated=True)
    alone = replace(grown, task=task, messages=tuple(info["messages"]), nodes=(node,), leaves=(0,), origins=())
    [row] = EXCHANGES["openai"].write(Record(0, {}, alone))
    assert move not in (said := row["messages"][-1]).values()
    assert said.get("tool_calls") or said["content"] in move


@pytest.mark.parametrize(
    ("format", "text", "fault"),
    [
        ("atif", '{"schema_version": "ATIF-v2.0"}', "schema_version 'ATIF-v2.0' is none of ATIF-v1.x"),
        ("atif", '{"schema_version": "ATIF-v1.7", "agent": {}}', "'steps' is missing"),
        ("openai", '{"messages": []}', "no message is the assistant's"),
        ("openai", "{oh no}", "Expecting property name"),
        ("verifiers", '{"prompt": []}', "'completion' is missing"),
    ],
)
def test_what_is_no_episode_is_named(format: str, text: str, fault: str, tmp_path: Path) -> None:
    file = tmp_path / "some.jsonl"
    file.write_text(text + "\n")
    with pytest.raises(StoreError, match=f"some.jsonl, line 1: no episode in the format {format}: {fault}"):
        list(read_episodes(file, format))


# what others write


def call(id: Any, **arguments: Any) -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": "look", "arguments": json.dumps(arguments)}}


def result(id: str, text: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": id, "content": text}


USER = {"role": "user", "content": "Look."}
DONE = {"role": "assistant", "content": "done"}
CHATS: dict[str, list[dict[str, Any]]] = {
    "plain": [USER, DONE],
    "results in another order": [
        {"role": "system", "content": "s"}, USER,
        {"role": "assistant", "content": None, "tool_calls": [call("a", n=1), call("b", n=2), call("c", n=3)]},
        result("c", "three"), result("a", "one"), result("b", "two"), {"role": "user", "content": "and?"}, DONE,
    ],
    "one result of two": [USER, {"role": "assistant", "tool_calls": [call("a"), call("b")]}, result("b", "two"), DONE],
    "calls without ids": [
        USER, {"role": "assistant", "content": "", "tool_calls": [call(None), call(None)]},
        {"role": "tool", "content": "one"}, {"role": "tool", "content": "two"}, DONE,
    ],
    "function call": [
        USER, {"role": "assistant", "content": None, "function_call": {"name": "look", "arguments": '{"n": 1}'}},
        {"role": "function", "name": "look", "content": "one"}, DONE,
    ],
    "refusal": [USER, {"role": "assistant", "content": None, "refusal": "I cannot."}],
    "weight": [USER, {**DONE, "weight": 0}, USER, {**DONE, "weight": 1}],
    "parts and names": [
        {"role": "user", "name": "Ann", "content": [{"type": "text", "text": "This:"}, {"type": "image_url"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "It is"}, {"type": "refusal", "refusal": "no"}]},
    ],
    "an answer that is an object": [USER, {"role": "assistant", "content": '{"content": "x", "answer": 3}'}],
    "an answer that reads like a call": [
        USER, {"role": "assistant", "content": '{"tool_calls": [{"function": {"name": "look", "arguments": "{}"}}]}'},
    ],
    "an answer that reads like a thought": [
        USER, {"role": "assistant", "content": '{"content": "x", "reasoning_content": "y"}'},
    ],
    "thoughts": [USER, {"role": "assistant", "content": "x", "reasoning_content": "y"}],
    "the user says nothing": [USER, DONE, {"role": "user", "content": ""}, DONE, {"role": "user", "content": "bye"}],
    "an example in the prompt": [{"role": "developer", "content": "d"}, USER, DONE, USER, DONE],
}  # fmt: skip


@pytest.mark.parametrize("name", CHATS)
def test_chats_come_in_and_go_out_as_they_were(name: str, tmp_path: Path) -> None:
    rows = [{"messages": CHATS[name], "tools": [], "parallel_tool_calls": False}]
    records = list(EXCHANGES["openai"].read(rows))
    assert [to_text("openai", row) for row in EXCHANGES["openai"].write(records[0])] == rows
    store = EpisodeStore(tmp_path / "trees.jsonl.zst")
    store.append(records[0].tree)
    assert round_trip("openai", [store.record(0)]) == records
    row = {"prompt": [USER], "completion": CHATS[name], "reward": 1.0, "metrics": {"a": None}, "timing": {"total": 1}}
    graded = list(EXCHANGES["verifiers"].read([row]))
    assert round_trip("verifiers", graded) == graded
    [again] = EXCHANGES["verifiers"].write(graded[0])
    first = next((i for i, message in enumerate(CHATS[name]) if message["role"] == "assistant"), 0)
    assert [*again["prompt"], *again["completion"]] == [USER, *CHATS[name]] and again["timing"] == {"total": 1}
    assert len(again["completion"]) == len(CHATS[name]) - first
    trajectories = round_trip("atif", records)
    assert trajectories == records


TEXTS = st.text(max_size=5) | st.sampled_from(['{"a": 1}', '{"content": "x", "b": 2}', "{", "null", " "])


@st.composite
def chats(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Any number of turns with calls, whose results come in any order, some with further fields."""
    rows = [{"role": role, "content": draw(TEXTS)} for role in draw(st.sampled_from([["user"], ["system", "user"]]))]
    for turn in range(draw(st.integers(1, 3))):
        calls = [call(f"{turn}.{n}", n=n) for n in range(draw(st.integers(0, 3)))]
        said = {"role": "assistant", "content": draw(TEXTS | st.none() if calls else TEXTS)}
        said |= {"tool_calls": calls} if calls else {}
        said |= draw(st.sampled_from([{}, {"weight": 0}, {"reasoning_content": "t"}, {"refusal": None}]))
        answers = [result(each["id"], each["id"]) for each in draw(st.permutations(calls))]
        rows += [said, *answers, *draw(st.sampled_from([[], [USER], [{"role": "user", "content": ""}]]))]
    return rows


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(chats())
def test_any_chat_comes_in_and_goes_out_as_it_was(rows: list[dict[str, Any]]) -> None:
    [record] = EXCHANGES["openai"].read([{"messages": rows}])
    assert [to_text("openai", row) for row in EXCHANGES["openai"].write(record)] == [{"messages": rows}]
    for format in EXCHANGES:
        [graded] = round_trip(format, [record])
        assert round_trip(format, [graded]) == [graded]
    for node in record.tree.nodes:
        heard = [message.text for message in node.messages if message.role == "tool"]
        assert heard == sorted(heard)


def test_results_are_those_of_their_calls() -> None:
    [record] = EXCHANGES["openai"].read([{"messages": CHATS["results in another order"]}])
    assert [message.text for message in record.tree.nodes[0].messages] == ["one", "two", "three", "and?"]
    [row] = EXCHANGES["atif"].write(record)
    step = row["steps"][2]
    called = {each["tool_call_id"]: each["arguments"]["n"] for each in step["tool_calls"]}
    heard = {each["source_call_id"]: each["content"] for each in step["observation"]["results"][:3]}
    assert called == {"a": 1, "b": 2, "c": 3} and heard == {"a": "one", "b": "two", "c": "three"}
    step["observation"]["results"] = [*reversed(step["observation"]["results"][:3])]
    del step["extra"]
    [record] = EXCHANGES["atif"].read([{**row, "extra": {}}])
    assert [message.text for message in record.tree.nodes[0].messages] == ["one", "two", "three"]


def test_older_calls_are_calls_and_refusals_are_said() -> None:
    [record] = EXCHANGES["openai"].read([{"messages": CHATS["function call"]}])
    action = action_format("openai").parse(record.tree.nodes[0].action.text, {})
    assert action.calls[0].arguments == {"n": 1}  # type: ignore[union-attr]
    assert [(m.role, m.text) for m in record.tree.nodes[0].messages] == [("tool", "one")]
    [record] = EXCHANGES["openai"].read([{"messages": CHATS["refusal"]}])
    assert record.tree.nodes[0].action.text == "I cannot."


def test_calls_that_verifiers_saved_as_texts_are_calls() -> None:
    said = {"role": "assistant", "content": "", "tool_calls": [json.dumps(call("a", n=1)), json.dumps(call("b", n=2))]}
    row = {"prompt": [USER], "completion": [said, result("b", "two"), result("a", "one"), DONE], "reward": 1}
    [record] = EXCHANGES["verifiers"].read([row])
    action = action_format("openai").parse(record.tree.nodes[0].action.text, {})
    assert [each.arguments for each in action.calls] == [{"n": 1}, {"n": 2}]  # type: ignore[union-attr]
    assert [message.text for message in record.tree.nodes[0].messages] == ["one", "two"]


def test_what_was_copied_from_another_trajectory_is_marked_as_it_was() -> None:
    steps = [dict(step) for step in THEIRS["steps"]]  # type: ignore[attr-defined]
    for place in (0, 1, 2):
        steps[place]["is_copied_context"] = True
    [record] = EXCHANGES["atif"].read([{**THEIRS, "steps": steps}])
    assert record.tree.info["copied"] == [0] and record.tree.nodes[0].info["is_copied_context"]
    assert record.tree.nodes[0].info["copied"] == [1] and "is_copied_context" not in record.tree.nodes[1].info
    [row] = EXCHANGES["atif"].write(record)
    assert [step.get("is_copied_context") for step in row["steps"]] == [True, True, None]
    assert round_trip("atif", [record]) == [record]


@pytest.mark.parametrize("format", EXCHANGES)
def test_no_number_makes_invalid_json(format: str, tmp_path: Path) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    grown = tree(1)
    for value in (math.inf, -math.inf):
        node = replace(grown.nodes[0], reward=value, reward_terms={"exact": value, "none": None}, info={"x": [value]})
        odd = replace(grown, nodes=(node, *grown.nodes[1:]))
        store = EpisodeStore(tmp_path / f"{value}.jsonl")
        store.append(odd, score=value)
        assert list(store) == [({"score": value}, odd)]
        lines = [store.path.read_bytes(), *map(json_line, EXCHANGES[format].write(store.record(0)))]
        rows = [json.loads(line, parse_constant=refuse) for line in lines]
        if format == "verifiers":
            assert rows[1]["reward"] is None
        file = tmp_path / "out.jsonl"
        file.write_bytes(b"".join(lines[1:]))
        for record in read_episodes(file, format):
            assert format == "openai" or record.tree.nodes[0].reward == value
    store = EpisodeStore(tmp_path / "nan.jsonl")
    store.append(replace(grown, info={"x": math.nan, "y": {"__float__": 1, "z": 2}}))
    assert b"NaN" not in store.path.read_bytes()
    assert math.isnan(store.read(0)[1].info["x"]) and store.read(0)[1].info["y"] == {"__float__": 1, "z": 2}


def test_metrics_and_summaries_are_valid_json(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.summarize({"gain": {"mean": math.nan}, "all": [math.inf, 1.5]})
    append_line(tmp_path / "rows.jsonl", {"loss": math.nan, "cost": {"a": (-math.inf, 2)}})
    assert run.summary() == {"gain": {"mean": None}, "all": [None, 1.5]}
    assert (tmp_path / "rows.jsonl").read_text() == '{"loss":null,"cost":{"a":[null,2]}}\n'


ROWS = [{"messages": CHATS["plain"]}, {"messages": CHATS["weight"]}]


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(ROWS),
        json.dumps(ROWS, indent=2),
        f"\n{json.dumps(ROWS)}",
        "[" + ",\n".join(map(json.dumps, ROWS)) + "]\n",
        f"\ufeff{json.dumps(ROWS)}",
        "\ufeff" + "\n\n".join(map(json.dumps, ROWS)),
        "\n".join(map(json.dumps, ROWS)),
    ],
)
def test_an_array_of_rows_is_read_as_rows(text: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text(text, encoding="utf-8")
    assert [record.tree for record in read_episodes(file, "openai")] == [
        record.tree for record in EXCHANGES["openai"].read(ROWS)
    ]


def test_a_fault_in_a_trajectory_is_that_of_its_line(tmp_path: Path) -> None:
    steps = json.loads(json.dumps(THEIRS["steps"]))
    steps[1]["observation"]["results"][0]["source_call_id"] = "c9"
    file = tmp_path / "some.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in (THEIRS, {**THEIRS, "steps": steps}, THEIRS)))
    with pytest.raises(StoreError, match=r"line 2: .*source_call_id 'c9' is that of no call before it; calls: c1"):
        list(read_episodes(file, "atif"))


GRADED = {"prompt": [USER], "completion": [DONE], "reward": 1.0}


@pytest.mark.parametrize(
    ("format", "text", "fault"),
    [
        ("verifiers", json.dumps({**GRADED, "reward": None}), "line 1: .*the reward is null: .* not scored"),
        ("verifiers", json.dumps({**GRADED, "reward": "1"}), 'line 1: .*reward is "1", which is no number'),
        ("verifiers", json.dumps({**GRADED, "metrics": {"a": [1]}}), r"line 1: .*a is \[1\], which is no number"),
        ("verifiers", json.dumps({**GRADED, "reward": float("nan")}), "line 1: .*NaN is no JSON"),
        ("verifiers", json.dumps({**GRADED, "prompt": "Look."}), "line 1: .*messages are a list, and this is 'Look.'"),
        ("verifiers", json.dumps([GRADED, {**GRADED, "reward": None}]), "row 2: .*the reward is null"),
        ("openai", json.dumps(ROWS[0]) + '\n["x"]\n', r"line 2: .*an episode is a JSON object, and this is \['x'\]"),
        ("openai", json.dumps([ROWS[0], 7]), "row 2: .*an episode is a JSON object, and this is 7"),
        ("openai", json.dumps(ROWS[0]) + '\n{"messages"\n', "line 2: .*Expecting"),
        ("openai", json.dumps({"messages": ["x"]}), "line 1: .*a message is an object with a role, and this is 'x'"),
        (
            "openai",
            json.dumps({"messages": [USER, {"role": "assistant", "tool_calls": [call("a")]}, result("b", "x"), DONE]}),
            "line 1: .*tool_call_id 'b' is that of no call before it; calls: a",
        ),
        ("openai", json.dumps({"messages": [USER, DONE, result("b", "x"), DONE]}), "line 1: .*calls: none"),
        (
            "openai",
            json.dumps(
                {"messages": [{"role": "assistant", "tool_calls": [call("a")]}, result("a", "x"), result("a", "y")]}
            ),
            "line 1: .*must differ",
        ),
    ],
)  # fmt: skip
def test_a_fault_is_one_line_that_says_where(format: str, text: str, fault: str, tmp_path: Path) -> None:
    file = tmp_path / "some.jsonl"
    file.write_text(text)
    with pytest.raises(StoreError, match=f"some.jsonl, {fault}") as raised:
        list(read_episodes(file, format))
    assert "\n" not in str(raised.value)


# commands


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "runs" / "some"
    folder.mkdir(parents=True)
    (folder / "scenario.yaml").write_text("seed: 1")
    fill(folder / "trees.jsonl.zst", 6)
    yield folder


SHOWN = {
    ("--success", "some"): ["1", "3", "5"],
    ("--success", "mixed"): [],
    ("--cause", "turn limit", "--rollouts", "2", "--steps", "2:"): ["4", "5"],
    ("--text", "LOOK 3"): ["3"],
    ("--term", "exact=1", "--term", "speed=0"): ["1", "3", "5"],
}


def test_show_lists_the_trees_that_are_meant(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, said, _ = command(capsys, "runs", "show", str(run))
    assert status == 0 and said.endswith("6 trees\n") and "tests/Some-v0" in said
    said = command(capsys, "runs", "show", str(run), "--steps", "1:1", "--term", "exact=1:")[1]
    assert [line.split()[0] for line in said.splitlines()] == ["tree", "3", "1"] and said.endswith("1 tree\n")
    assert "some" in command(capsys, "runs", str(run.parent))[1] == command(capsys, "runs", "list", str(run.parent))[1]
    status, _, error = command(capsys, "runs", "show", str(run), "--steps", "one")
    assert status == 2 and "--steps: a number or LOW:HIGH" in error and "got 'one'" in error
    for options, numbers in SHOWN.items():
        said = command(capsys, "runs", "show", str(run), *options)[1]
        assert [line.split()[0] for line in said.splitlines()[1:-1]] == numbers, options
    status, _, error = command(capsys, "runs", "show", str(run.parent))
    assert status == 2 and "holds no trees" in error


def test_runs_are_listed_with_the_stages_that_they_have(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    half = {"success": {"mean": 0.5, "low": 0.4, "high": 0.6}}
    (run / "summary.json").write_text(json.dumps({"stages": {"z": half}, "gain": None}))
    other = run.parent / "other"
    other.mkdir()
    (other / "scenario.yaml").write_text("seed: 1")
    (other / "summary.json").write_text(json.dumps({"stages": {"before": half, "z": half, "[b]": half}, "gain": None}))
    lines = command(capsys, "runs", str(run.parent))[1].splitlines()
    cells = {row[0]: row[1:] for row in (re.split(r"\s{2,}", line.strip()) for line in lines)}
    assert cells["run"] == ["model", "state", "before", "z", "[b]", "gain (95%)"]
    assert cells["other"] == ["-", "finished", "50.0%", "50.0%", "50.0%", "-"]
    assert cells["some"][1:] == ["finished", "-", "50.0%", "-", "-"]


@pytest.mark.parametrize("format", EXCHANGES)
def test_runs_go_out_and_come_in(format: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, back = run.parent / "out.jsonl", run.parent / "back"
    arguments = ["runs", "export", str(run), "--format", format, "--out", str(out), "--steps", "1:"]
    assert command(capsys, *arguments)[1] == f"8 episodes in {out}\n"
    said = command(capsys, "runs", "import", str(out), "--format", format, "--out", str(back))[1]
    found = [each for _, each in EpisodeStore(back / "trees.jsonl.zst")]
    assert said == f"{len(found)} trees in {back / 'trees.jsonl.zst'}\n"
    if format == "atif":
        assert found == [tree(i) for i in range(2, 6)]
    assert sum(len(each.leaves) for each in found) == 8
    status, _, error = command(capsys, "runs", "import", str(out), "--format", format, "--out", str(back))
    assert status == 2 and "holds trees already" in error


def test_a_damaged_run_is_repaired(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run / "trees.jsonl.zst"
    data = path.read_bytes()
    path.write_bytes(data[:-20] + b"!" + data[-19:])
    status, _, error = command(capsys, "runs", "export", str(run), "--format", "openai", "--out", str(run / "out"))
    assert status == 2 and "record 5 at byte" in error and f"`treegym runs repair {run}`" in error
    status, said, _ = command(capsys, "runs", "repair", str(run))
    assert status == 0 and "lost record 5:" in said and "5 trees are whole" in said
    assert (run / "trees.jsonl.zst.damaged").stat().st_size == len(data)
    assert command(capsys, "runs", "repair", str(run))[1] == "5 trees are whole; nothing was lost\n"


def test_an_old_run_is_migrated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(3):
        append_line(tmp_path / "trees.jsonl", {"schema": 1, "stage": "s", "step": i, "tree": tree(i).to_json()})
    assert "3 trees" in command(capsys, "runs", "show", str(tmp_path))[1]
    status, said, _ = command(capsys, "runs", "migrate", str(tmp_path))
    assert status == 0 and "bytes became" in said and not (tmp_path / "trees.jsonl").exists()
    assert list(EpisodeStore(tmp_path / "trees.jsonl.zst")) == [({"stage": "s", "step": i}, tree(i)) for i in range(3)]
    status, _, error = command(capsys, "runs", "migrate", str(tmp_path))
    assert status == 2 and "nothing to migrate" in error
