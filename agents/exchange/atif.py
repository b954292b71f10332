"""ATIF, the Agent Trajectory Interchange Format 1.7: everything that a tree holds."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace

from ... import __version__
from ...envs import Message, Task
from ...tools import ToolCall
from ..policy import Completion
from ..store.records import Record
from ..tree import ROOT, Cost, Node, RolloutTree, tool_results
from .grammar import (
    IMPORTED,
    Grammar,
    Row,
    action_of,
    call_ids,
    grammar_of,
    imported_info,
    in_order,
    plain_text,
    text_of,
    tool_definitions,
)

# The messages before the first reply; a node for each reply, by its number; what the tree's info keeps.
Steps = tuple[tuple[Message, ...], dict[int, Node], Row]
ATIF = "ATIF-v1.7"
COPIED = "is_copied_context"
# The fields of a step that an imported node's info keeps.
KEPT = ("timestamp", "model_name", "reasoning_effort", "llm_call_count", COPIED)


def write_atif(record: Record) -> Iterator[Row]:
    """A trajectory for each rollout, with the whole prompt in each."""
    tree, grammar = record.tree, grammar_of(record.tree.task)
    tools = tool_definitions(tree, grammar)
    copied = imported_info(tree, tree).get("copied", ())
    prompt = [
        {**_spoken(message), **({COPIED: True} if place in copied else {})}
        for place, message in enumerate(tree.messages)
    ]
    for rollout, path in enumerate(tree.paths):
        turns = [_step(tree, path, turn, grammar, record.values) for turn in range(len(path))]
        steps = [{"step_id": place, **step} for place, step in enumerate([*prompt, *turns], start=1)]
        asked = [step["metrics"]["prompt_tokens"] for step in turns]
        said = [step["metrics"]["completion_tokens"] for step in turns]
        yield {
            "schema_version": ATIF,
            "trajectory_id": f"tree-{record.number}.{rollout}",
            "agent": {"name": "treegym", "version": __version__, **({"tool_definitions": tools} if tools else {})},
            "steps": steps,
            "final_metrics": {
                "total_prompt_tokens": sum(asked),
                "total_completion_tokens": sum(said),
                "total_steps": len(steps),
                "extra": {"reward": tree.returns[rollout]},
            },
            "extra": {
                "treegym": {
                    "tree": record.number,
                    "rollout": rollout,
                    "labels": record.labels,
                    "task": asdict(tree.task),
                    "prompt": tree.prompt,
                    "origin": tree.origins[rollout] if tree.origins else None,
                    "state_key": tree.state_key,
                    "info": dict(tree.info),
                    "cost": asdict(tree.cost),
                    "advantages": record.advantages[rollout] if record.advantages is not None else None,
                    **({"lessons": record.lessons} if record.lessons else {}),
                }
            },
        }


def _spoken(message: Message) -> Row:
    """A message as a step, all but its number."""
    source = "system" if message.role == "system" else "user"
    return {"source": source, "message": message.text, "extra": {"treegym": {"role": message.role}}}


def _step(
    tree: RolloutTree,
    path: Sequence[int],
    turn: int,
    grammar: Grammar | None,
    values: Sequence[Sequence[float]] | None = None,
) -> Row:
    """A turn of the rollout along `path` as a step, all but its number. `values` are by node and token."""
    node = tree.nodes[path[turn]]
    action, said, kept = action_of(tree, node, grammar), node.action, imported_info(tree, node)
    calls = action.calls if action else ()
    given = call_ids(tree, node, turn, action) if calls else []
    ids = [name or f"call{10 * turn + place:05}" for place, name in enumerate(given)]
    metrics: Row = {"prompt_tokens": len(tree.tokens(tuple(path[:turn]))), "completion_tokens": len(said.token_ids)}
    if said.token_ids:
        metrics |= {"completion_token_ids": said.token_ids, "logprobs": said.logprobs}
    metrics["extra"] = {"reward": node.reward, "reward_terms": dict(node.reward_terms), "entropies": said.entropies}
    step: Row = {"source": "agent", "message": said.text, "llm_call_count": 1, "metrics": metrics}
    step |= {name: kept[name] for name in KEPT if name in kept}
    if calls:
        step["tool_calls"] = [
            {"tool_call_id": name, "function_name": call.name, "arguments": dict(call.arguments)}
            for name, call in zip(ids, calls, strict=True)
        ]
    matched = iter(ids if len(ids) == tool_results(node.messages) else ())
    results = []
    for message in node.messages:
        name = next(matched, None) if message.role == "tool" else None
        source = {"source_call_id": name} if name else {}
        results.append({**source, "content": message.text, "extra": {"treegym": {"role": message.role}}})
    if results:
        step["observation"] = {"results": results}
    ours = {"node": path[turn], "observation": node.observation, "terminated": node.terminated}
    ours |= {"truncated": node.truncated, "state_key": node.state_key, "info": dict(node.info)}
    ours |= {"stop_reason": said.stop_reason, "weights_version": said.weights_version}
    later = {"last_weights_version": said.last_weights_version, "speaker": node.speaker}
    ours |= {name: value for name, value in later.items() if value not in (None, "")}
    if node.calls:
        ours["calls"] = [asdict(call) for call in node.calls]
    if values is not None:
        ours["values"] = values[path[turn]]
    return {**step, "extra": {"treegym": ours}}


def read_atif(rows: Iterable[Row]) -> Iterator[Record]:
    """The trees of trajectories; rollouts of one tree must follow each other, as they are written."""
    for number, group in enumerate(_trees((row, _checked(row)) for row in rows)):
        yield _read_trajectories(number, group)


def _checked(row: Row) -> Steps:
    """The steps of a trajectory. ValueError where its version cannot be read."""
    version = str(row["schema_version"])
    if not version.startswith("ATIF-v1."):
        raise ValueError(f"schema_version {version!r} is none of ATIF-v1.x")
    return _read_steps(row["steps"])


def _trees(rows: Iterable[tuple[Row, Steps]]) -> Iterator[list[tuple[Row, Steps]]]:
    """The trajectories, grouped by tree."""
    group: list[tuple[Row, Steps]] = []
    for row, steps in rows:
        if group and not _follows(_ours(row), _ours(group[-1][0])):
            yield group
            group = []
        group.append((row, steps))
    if group:
        yield group


def _follows(ours: Row, last: Row) -> bool:
    """Whether a trajectory is of the same tree as the last one.

    The numbers of a tree's rollouts grow. Where they begin again, this is another run's tree with the same number.
    """
    same = bool(ours) and all(ours[name] == last.get(name) for name in ("tree", "task"))
    return same and bool(ours["rollout"] > last["rollout"])


def _ours(part: Row) -> Row:
    """What treegym wrote beside the format's own fields of a trajectory, step or result."""
    ours: Row = (part.get("extra") or {}).get("treegym") or {}
    return ours


def _read_trajectories(number: int, trajectories: Sequence[tuple[Row, Steps]]) -> Record:
    """The tree whose rollouts these trajectories are."""
    rows = [row for row, _ in trajectories]
    nodes: dict[int, Node] = {}  # by their numbers in the tree that was written
    leaves: list[int] = []
    messages: tuple[Message, ...] = ()
    for _, (messages, path, copied) in trajectories:  # noqa: B007
        nodes |= path
        leaves.append(next(reversed(path)))
    order = {old: new for new, old in enumerate(sorted(nodes))}
    placed = [(nodes[old], order.get(nodes[old].parent, ROOT)) for old in order]
    ours, first = _ours(rows[0]), rows[0]
    extras = [_ours(row) for row in rows]
    origins = tuple(extra["origin"] for extra in extras) if ours and ours["origin"] is not None else ()
    scored = [extra["advantages"] for extra in extras] if ours and ours["advantages"] is not None else None
    advantages = scored and tuple(
        tuple(tuple(turn) if isinstance(turn, list) else turn for turn in rollout) for rollout in scored
    )
    steps = (step for row in rows for step in row["steps"] if step["source"] == "agent")
    by_node = {_ours(step)["node"]: tuple(_ours(step)["values"]) for step in steps if "values" in _ours(step)}
    values = tuple(by_node[old] for old in order) if by_node else None
    kept = {"agent": first["agent"], "tools": first["agent"].get("tool_definitions", []), **copied}
    prompt = ours["prompt"] if ours else _prompt_tokens(first["steps"])
    tree = RolloutTree(
        task=Task(**ours["task"]) if ours else Task(f"{IMPORTED}atif", number),
        prompt=tuple(prompt),
        messages=messages,
        nodes=tuple(replace(node, parent=parent) for node, parent in placed),
        leaves=tuple(order[leaf] for leaf in leaves),
        origins=origins,
        state_key=ours.get("state_key", ""),
        info=ours.get("info", kept),
        cost=Cost(**ours.get("cost", {})),
    )
    return Record(number, ours.get("labels", {}), tree, advantages, False, values, tuple(ours.get("lessons", ())))


def _prompt_tokens(steps: Sequence[Row]) -> Sequence[int]:
    """The tokens of the prompt, where the first reply's metrics have them."""
    metrics: Row = next((step.get("metrics") or {} for step in steps if step["source"] == "agent"), {})
    tokens: Sequence[int] = metrics.get("prompt_token_ids") or ()
    return tokens


def _read_steps(steps: Sequence[Row]) -> Steps:
    """What a trajectory's steps say. The parent of each node is the one before it."""
    messages: list[Message] = []
    copied: list[int] = []  # places of the messages that are marked as copied from another trajectory
    turns: list[tuple[Row, list[Message], list[int]]] = []
    for step in steps:
        results = (step.get("observation") or {}).get("results") or ()
        if step["source"] == "agent":
            ids = [call.get("tool_call_id") for call in step.get("tool_calls") or ()]
            turns.append((step, _heard(in_order(results, ids, "source_call_id")), []))
            continue
        said = Message(str(_ours(step).get("role", step["source"])), plain_text(step["message"]))
        _, here, marked = turns[-1] if turns else (step, messages, copied)
        if step.get(COPIED):
            marked.append(len(here))
        here += [said, *_heard(results)]
    if not turns:
        raise ValueError("no step is the agent's")
    nodes: dict[int, Node] = {}
    parent = ROOT
    for number, (step, heard, marked) in enumerate(turns):
        here_number = _ours(step).get("node", number)
        node = _read_node(step, heard, parent, last=number == len(turns) - 1)
        nodes[here_number] = replace(node, info={**node.info, "copied": marked}) if marked else node
        parent = here_number
    return tuple(messages), nodes, {"copied": copied} if copied else {}


def _heard(results: Iterable[Row]) -> list[Message]:
    """The messages that a step's results are."""
    return [Message(str(_ours(row).get("role", "tool")), plain_text(row.get("content"))) for row in results]


def _read_node(step: Row, heard: Sequence[Message], parent: int, *, last: bool) -> Node:
    """A turn. What ended its episode is not told where another program wrote it: then the last turn ended it."""
    ours, metrics = _ours(step), step.get("metrics") or {}
    extra = metrics.get("extra") or {}
    text, info = plain_text(step["message"]), ours.get("info", {})
    if not ours:
        calls = [
            {
                "id": call.get("tool_call_id"),
                "function": {"name": call["function_name"], "arguments": json.dumps(call["arguments"])},
                "type": "function",
            }
            for call in step.get("tool_calls") or ()
        ]
        said = {"content": text or None, "reasoning_content": step.get("reasoning_content"), "tool_calls": calls}
        message = {name: value for name, value in said.items() if value}
        info = {name: step[name] for name in KEPT if name in step}
        text = text_of(message)
        if message.keys() != {"content"} or text.lstrip().startswith("{"):
            info["message"] = message
    return Node(
        parent=parent,
        action=Completion(
            text,
            tuple(metrics.get("completion_token_ids") or ()),
            tuple(metrics.get("logprobs") or ()),
            tuple(extra.get("entropies") or ()),
            ours.get("stop_reason", "stop"),
            ours.get("weights_version", 0),
            ours.get("last_weights_version"),
        ),
        observation=tuple(ours.get("observation", ())),
        messages=tuple(heard),
        reward=extra.get("reward", 0.0) if ours else 0.0,
        reward_terms=extra.get("reward_terms", {}) if ours else {},
        terminated=ours.get("terminated", last),
        truncated=ours.get("truncated", False),
        state_key=ours.get("state_key", ""),
        info=info,
        calls=tuple(ToolCall(**call) for call in ours.get("calls", ())),
        speaker=ours.get("speaker", ""),
    )
