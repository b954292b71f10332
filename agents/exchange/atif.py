"""Episodes in the formats of others: one JSON object for each rollout.

What survives a round trip, and what cannot:

- `atif`, the Agent Trajectory Interchange Format 1.7: everything. What it has no field for stands under
  `extra.treegym`, so rollouts of one tree become that tree again; those of other programs become trees of one rollout.
- `openai`, chat messages for supervised fine-tuning: what was said, tools and calls. Where the environment's action
  format is known, actions are tool calls, and the lines of the system message that explain the format are left out; so
  the wording of an action is lost, as are tokens, rewards and the task.
- `verifiers`, the rows of its results.jsonl: the same messages with rewards and terms, and the task under
  `info.treegym`; no tokens, and the wording of actions is lost.
"""

from __future__ import annotations

import codecs
import contextlib
import functools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import gymnasium

from .. import __version__
from ..envs import Action, ActionFormat, Message, OpenAIFormat, Task, ToolEnv
from ..tools import Tool, ToolCall
from .policies.messages import read_message
from .policy import Completion
from .store.frames import StoreError
from .store.records import Record, from_json
from .tree import ROOT, Cost, Node, RolloutTree, tool_results

Row = dict[str, Any]
Steps = tuple[tuple[Message, ...], dict[int, Node], Row]  # a trajectory's prompt, nodes, and what the tree's info keeps
ATIF = "ATIF-v1.7"
COPIED = "is_copied_context"
_STEP = ("timestamp", "model_name", "reasoning_effort", "llm_call_count", COPIED)  # what a node's info keeps of a step
IMPORTED = "imported/"  # opens the environment of a tree whose own is not known


@dataclass(frozen=True, slots=True)
class Exchange:
    """A format: a row for each rollout of a record, and records of rows."""

    write: Callable[[Record], Iterator[Row]]
    read: Callable[[Iterable[Row]], Iterator[Record]]


def read_episodes(path: Path, format: str) -> Iterator[Record]:
    """The episodes of a JSON lines file, of one JSON object or of an array. StoreError names the place of a fault."""
    place = "line 1"

    def values() -> Iterator[Any]:
        nonlocal place
        with path.open("rb") as file:
            lines = ((number, line) for number, line in enumerate(file, start=1) if line.strip())
            number, line = next(lines, (1, b"[]"))
            place = f"line {number}"
            first = _whole(line, file)
            for row_number, value in enumerate(first if isinstance(first, list) else [first], start=1):
                place = f"row {row_number}" if isinstance(first, list) else place
                yield value
            for number, line in lines:
                place = f"line {number}"
                yield from_json(line)

    def rows() -> Iterator[Row]:
        for value in values():
            if not isinstance(value, dict):
                raise ValueError(f"an episode is a JSON object, and this is {value!r:.40}")
            yield value

    try:
        yield from EXCHANGES[format].read(rows())
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        said = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise StoreError(f"{path}, {place}: no episode in the format {format}: {said}") from error


def _whole(line: bytes, file: BinaryIO) -> Any:
    """The value that a file begins with, which may go on after its first line."""
    line = line.removeprefix(codecs.BOM_UTF8)
    try:
        return from_json(line)
    except json.JSONDecodeError:
        return from_json(line + file.read())


# how an environment's actions read


@dataclass(frozen=True, slots=True)
class Grammar:
    """How actions are written, and what they can call."""

    format: ActionFormat
    tools: Mapping[str, Tool]
    instructions: str  # the lines of the system message that say so


def grammar(task: Task) -> Grammar | None:
    """None where the environment cannot be made here, or has no action format."""
    if task.env.startswith(IMPORTED):
        return Grammar(OpenAIFormat(), {}, "")
    return _grammar(task.env, json.dumps(dict(task.settings)))


@functools.lru_cache(maxsize=32)
def _grammar(name: str, settings: str) -> Grammar | None:
    try:
        env = Task(name, 0, settings=json.loads(settings)).make()
    except (ImportError, OSError, TypeError, ValueError, gymnasium.error.Error):
        return None
    with contextlib.closing(env):
        if not isinstance(made := env.unwrapped, ToolEnv):
            return None
        return Grammar(made.format, dict(made.tools), made.format.instructions(made.tools))


def _action(tree: RolloutTree, node: Node, known: Grammar | None) -> Action | None:
    """What the turn did; None where that is not known, or no action."""
    if "message" in _kept(tree, node) and not _calls(_kept(tree, node)["message"]):
        return None  # its text is an answer, whatever it reads like
    parsed = known.format.parse(node.action.text, known.tools) if known else None
    return parsed if isinstance(parsed, Action) else None


def _kept(tree: RolloutTree, part: Node | RolloutTree) -> Mapping[str, Any]:
    """What a node of the tree, or the tree itself, keeps of the messages it was imported from."""
    return part.info if tree.task.env.startswith(IMPORTED) else {}


def _ids(tree: RolloutTree, node: Node, turn: int, action: Action | None) -> list[str | None]:
    """Of a turn's calls: those they came with, or nine letters and digits, which some chat templates insist on."""
    if message := _kept(tree, node).get("message"):
        return [call.get("id") for call in _calls(message)]
    return [f"call{10 * turn + place:05}" for place in range(len(action.calls))] if action else []


def _definitions(tree: RolloutTree, known: Grammar | None) -> list[Row]:
    """The tools as OpenAI's API describes them."""
    if tree.task.env.startswith(IMPORTED):
        return list(tree.info.get("tools", ()))
    tools = known.tools.values() if known else ()
    described = ({"name": t.name, "description": t.description, "parameters": dict(t.parameters)} for t in tools)
    return [{"type": "function", "function": each} for each in described]


def _nodes(tree: RolloutTree, rollout: int) -> list[Node]:
    return [tree.nodes[i] for i in tree.paths[rollout]]


# chat messages


def _prompt(tree: RolloutTree, known: Grammar | None) -> list[Row]:
    """The prompt, without the lines that explain how a tool is called in text."""
    if "prompt" in (kept := _kept(tree, tree)):
        return list(kept["prompt"])
    rows = []
    for message in tree.messages:
        text = message.text
        if known and known.instructions and message.role == "system":
            text = text.removesuffix(known.instructions).rstrip()
        if text or message.role != "system":
            rows.append({"role": message.role, "content": text})
    return rows


def _turns(tree: RolloutTree, rollout: int, known: Grammar | None) -> Iterator[Row]:
    """What policy and environment said in turn."""
    for turn, node in enumerate(_nodes(tree, rollout)):
        action, kept = _action(tree, node, known), _kept(tree, node)
        ids = _ids(tree, node, turn, action)
        if "message" in kept:
            yield {"role": "assistant", **kept["message"]}
        elif known and action:
            said = json.loads(OpenAIFormat().render(action, known.tools))
            for call, name in zip(said.get("tool_calls", ()), ids, strict=True):
                call["id"] = name
            yield {"role": "assistant", "content": None, **said}
        else:
            yield {"role": "assistant", "content": node.action.text}
        yield from kept.get("answers") or _answers(node.messages, ids)


def _answers(messages: Sequence[Message], ids: Sequence[str | None]) -> Iterator[Row]:
    """Results have the ids of their calls; where those are not known, they are the user's, for a tool's message needs
    one."""
    matched = iter(ids if len(ids) == tool_results(messages) else ())
    for message in messages:
        if not message.text and message.role != "tool":
            continue  # an environment that has nothing to say when the episode ends
        source = next(matched, None) if message.role == "tool" else None
        role = "user" if message.role == "tool" and source is None else message.role
        yield {"role": role, **({"tool_call_id": source} if source else {}), "content": message.text}


def _calls(message: Row) -> list[Row]:
    """An assistant's calls; `function_call` is what there was before `tool_calls`."""
    if old := message.get("function_call"):
        return [{"type": "function", "function": old}]
    calls = message.get("tool_calls") or []
    return [json.loads(call) if isinstance(call, str) else call for call in calls]  # verifiers saves texts


def _said(message: Row) -> str:
    """An assistant's message as one text: its content if that is all, else JSON, which `OpenAIFormat` reads."""
    said = read_message({**message, "tool_calls": _calls(message), "function_call": None})
    return json.dumps(said, ensure_ascii=False) if said.keys() - {"content"} else str(said.get("content", ""))


def _conversation(rows: Any, prompt: Any = ()) -> tuple[tuple[Message, ...], list[Node], Row]:
    """The prompt and what comes before the first reply; a node for each reply; what the tree's info keeps."""
    asked = _chat(prompt)
    turns: list[tuple[Row, list[Row]]] = []
    for row in _chat(rows):
        if row["role"] == "assistant":
            turns.append((row, []))
        else:
            (turns[-1][1] if turns else asked).append(row)
    if not turns:
        raise ValueError("no message is the assistant's")
    messages = tuple(map(_message, asked))
    nodes = [
        _reply(number - 1, row, answers, last=number == len(turns) - 1) for number, (row, answers) in enumerate(turns)
    ]
    plain = [{"role": message.role, "content": message.text} for message in messages]
    kept = plain != asked or {"role": "system", "content": ""} in plain  # which is not written by itself
    return messages, nodes, {"prompt": asked} if kept else {}


def _chat(rows: Any) -> list[Row]:
    """The messages of a chat, which are objects with a role."""
    if isinstance(rows, str) or not isinstance(rows, Sequence):
        raise ValueError(f"messages are a list, and this is {rows!r:.40}")
    for row in rows:
        if not (isinstance(row, dict) and isinstance(row.get("role"), str)):
            raise ValueError(f"a message is an object with a role, and this is {row!r:.40}")
    return list(rows)


def _reply(parent: int, row: Row, answers: Sequence[Row], *, last: bool) -> Node:
    """A turn. What its text and messages do not say is kept: calls as they came, `refusal`, `weight`, parts, names."""
    message = {name: value for name, value in row.items() if name != "role"}
    text, calls = _said(row), _calls(row)
    messages = tuple(map(_message, _in_order(answers, [call.get("id") for call in calls])))
    kept: Row = {}
    if message != {"content": text} or text.lstrip().startswith("{"):
        kept["message"] = message
    if list(_answers(messages, [call.get("id") for call in calls])) != answers:
        kept["answers"] = answers
    return Node(parent, Completion(text), messages=messages, terminated=last, info=kept)


def _in_order(answers: Sequence[Row], ids: Sequence[Any], name: str = "tool_call_id") -> list[Row]:
    """The answers to a turn, results in the order of their calls. ValueError where one answers none of them."""
    known = [str(id) for id in ids if id]
    results = [row for row in answers if row.get(name)]
    asked = [str(row[name]) for row in results]
    if ids and not known:  # calls without ids are answered in their order
        return list(answers)
    if wrong := [id for id in asked if id not in known]:
        raise ValueError(f"{name} {wrong[0]!r} is that of no call before it; calls: {', '.join(known) or 'none'}")
    if len(set(asked)) < len(asked) or len(set(known)) < len(known):
        raise ValueError(f"ids of a turn's calls, and of its results, must differ: {known}, {asked}")
    ordered = iter(sorted(results, key=lambda row: known.index(str(row[name]))))
    return [next(ordered) if row.get(name) else row for row in answers]


def _message(row: Row) -> Message:
    role = "tool" if row["role"] == "function" else row["role"]
    return Message(role, _said(row) if role == "assistant" else _text(row.get("content")))


def _text(content: Any) -> str:
    """A message's text; of several parts, those that are text."""
    if isinstance(content, list):
        return "\n".join(part["text"] for part in content if part.get("text"))
    return "" if content is None else str(content)


def write_openai(record: Record) -> Iterator[Row]:
    known = grammar(record.tree.task)
    tools = _definitions(record.tree, known)
    for rollout in range(len(record.tree.leaves)):
        messages = [*_prompt(record.tree, known), *_turns(record.tree, rollout, known)]
        kept = _kept(record.tree, record.tree)
        told = {"tools": tools} if tools or "tools" in kept else {}
        yield {"messages": messages, **told, **kept.get("row", {})}


def read_openai(rows: Iterable[Row]) -> Iterator[Record]:
    for number, row in enumerate(rows):
        messages, nodes, kept = _conversation(row["messages"])
        info = {**({"tools": row["tools"]} if "tools" in row else {}), **kept, **_rest(row, "messages", "tools")}
        yield Record(number, {}, _chain(Task(f"{IMPORTED}openai", number), messages, nodes, info))


def _rest(row: Row, *read: str) -> Row:
    """What else a row says, which is written again."""
    rest = {name: value for name, value in row.items() if name not in read}
    return {"row": rest} if rest else {}


def _chain(task: Task, messages: tuple[Message, ...], nodes: Sequence[Node], info: Mapping[str, Any]) -> RolloutTree:
    return RolloutTree(task, (), messages, tuple(nodes), (len(nodes) - 1,), info=info)


# verifiers


def write_verifiers(record: Record) -> Iterator[Row]:
    tree, known = record.tree, grammar(record.tree.task)
    kept = _kept(tree, tree)
    names = sorted({name for node in tree.nodes for name in node.reward_terms})
    for rollout, total in enumerate(tree.returns):
        nodes = _nodes(tree, rollout)
        metrics = {name: tree.term(name)[rollout] for name in names}
        yield {
            "example_id": record.number,
            "task": tree.task.env,
            "prompt": _prompt(tree, known),
            "completion": list(_turns(tree, rollout, known)),
            "reward": _finite(total),
            "metrics": {name: _finite(value) for name, value in metrics.items()},
            "is_completed": nodes[-1].terminated or nodes[-1].truncated,
            "is_truncated": nodes[-1].truncated,
            "stop_condition": nodes[-1].info.get("cause"),
            "tool_defs": [tool["function"] for tool in _definitions(tree, known)],
            "info": {
                "treegym": {
                    "task": asdict(tree.task),
                    "labels": record.labels,
                    "rollout": rollout,
                    "rewards": [node.reward for node in nodes],
                    "terms": [dict(node.reward_terms) for node in nodes],
                    **({"from": kept["from"]} if "from" in kept else {}),
                }
            },
            **kept.get("row", {}),
        }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def read_verifiers(rows: Iterable[Row]) -> Iterator[Record]:
    for number, row in enumerate(rows):
        messages, nodes, kept = _conversation(row["completion"], row["prompt"])
        own = (row.get("info") or {}).get("treegym", {})
        rewards = own.get("rewards") or [0.0] * (len(nodes) - 1) + [_reward(row["reward"])]
        terms: Sequence[Mapping[str, float | None]]
        terms = own.get("terms") or [{}] * (len(nodes) - 1) + [_metrics(row.get("metrics") or {})]
        truncated, cause = row.get("is_truncated", False), row.get("stop_condition")
        told = [
            replace(node, reward=reward, reward_terms=named, terminated=False)
            for node, reward, named in zip(nodes, rewards, terms, strict=True)
        ]
        told[-1] = replace(
            told[-1],
            terminated=not truncated and row.get("is_completed", True),
            truncated=truncated,
            info={**told[-1].info, **({"cause": cause} if truncated and cause else {})},
        )
        origin = {name: row[name] for name in ("task", "answer", "info") if row.get(name)}
        info = {
            "tools": [{"type": "function", "function": each} for each in row.get("tool_defs") or ()],
            "from": own["from"] if "from" in own else own.get("task") or origin,
            **kept,
            **_rest(row, *_VERIFIERS),
        }
        example = row.get("example_id", number)
        seed = own["task"]["seed"] if own else example if isinstance(example, int) else number
        task = Task(f"{IMPORTED}verifiers", seed)
        yield Record(number, own.get("labels", {}), _chain(task, messages, told, info))


_VERIFIERS = (
    "example_id", "task", "prompt", "completion", "reward", "metrics", "is_completed", "is_truncated",
    "stop_condition", "tool_defs", "info", "answer",
)  # fmt: skip


def _reward(value: Any) -> float:
    if value is None:
        raise ValueError("the reward is null: a rollout that was not scored; leave it out, or give it a number")
    return _metrics({"reward": value})["reward"] or 0.0


def _metrics(values: Mapping[str, Any]) -> dict[str, float | None]:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float | None):
            raise ValueError(f"{name} is {json.dumps(value)}, which is no number")
    return dict(values)


# ATIF


def write_atif(record: Record) -> Iterator[Row]:
    tree, known = record.tree, grammar(record.tree.task)
    tools = _definitions(tree, known)
    copied = _kept(tree, tree).get("copied", ())
    prompt = [
        {**_spoken(message), **({COPIED: True} if place in copied else {})}
        for place, message in enumerate(tree.messages)
    ]
    for rollout, path in enumerate(tree.paths):
        turns = [_step(tree, path, turn, known, record.values) for turn in range(len(path))]
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
    source = "system" if message.role == "system" else "user"
    return {"source": source, "message": message.text, "extra": {"treegym": {"role": message.role}}}


def _step(
    tree: RolloutTree,
    path: Sequence[int],
    turn: int,
    known: Grammar | None,
    values: Sequence[Sequence[float]] | None = None,
) -> Row:
    node = tree.nodes[path[turn]]
    action, said, kept = _action(tree, node, known), node.action, _kept(tree, node)
    calls = action.calls if action else ()
    given = _ids(tree, node, turn, action) if calls else []
    ids = [name or f"call{10 * turn + place:05}" for place, name in enumerate(given)]
    metrics: Row = {"prompt_tokens": len(tree.tokens(tuple(path[:turn]))), "completion_tokens": len(said.token_ids)}
    if said.token_ids:
        metrics |= {"completion_token_ids": said.token_ids, "logprobs": said.logprobs}
    metrics["extra"] = {"reward": node.reward, "reward_terms": dict(node.reward_terms), "entropies": said.entropies}
    step: Row = {"source": "agent", "message": said.text, "llm_call_count": 1, "metrics": metrics}
    step |= {name: kept[name] for name in _STEP if name in kept}
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
    own = {"node": path[turn], "observation": node.observation, "terminated": node.terminated}
    own |= {"truncated": node.truncated, "state_key": node.state_key, "info": dict(node.info)}
    own |= {"stop_reason": said.stop_reason, "weights_version": said.weights_version}
    later = {"last_weights_version": said.last_weights_version, "speaker": node.speaker}
    own |= {name: value for name, value in later.items() if value not in (None, "")}
    if node.calls:
        own["calls"] = [asdict(call) for call in node.calls]
    if values is not None:
        own["values"] = values[path[turn]]
    return {**step, "extra": {"treegym": own}}


def read_atif(rows: Iterable[Row]) -> Iterator[Record]:
    for number, group in enumerate(_trees((row, _checked(row)) for row in rows)):
        yield _read_trajectories(number, group)


def _checked(row: Row) -> Steps:
    version = str(row["schema_version"])
    if not version.startswith("ATIF-v1."):
        raise ValueError(f"schema_version {version!r} is none of ATIF-v1.x")
    return _read_steps(row["steps"])


def _trees(rows: Iterable[tuple[Row, Steps]]) -> Iterator[list[tuple[Row, Steps]]]:
    """The trajectories of each tree."""
    group: list[tuple[Row, Steps]] = []
    for row, steps in rows:
        if group and not _follows(_own(row), _own(group[-1][0])):
            yield group
            group = []
        group.append((row, steps))
    if group:
        yield group


def _follows(own: Row, last: Row) -> bool:
    """Whether both are rollouts of one tree, and not of two runs that count their trees alike."""
    same = bool(own) and all(own[name] == last.get(name) for name in ("tree", "task"))
    return same and bool(own["rollout"] > last["rollout"])


def _own(part: Row) -> Row:
    own: Row = (part.get("extra") or {}).get("treegym") or {}
    return own


def _read_trajectories(number: int, trajectories: Sequence[tuple[Row, Steps]]) -> Record:
    """The tree of one or more trajectories that say they are its rollouts."""
    rows = [row for row, _ in trajectories]
    nodes: dict[int, Node] = {}  # by their number in the tree that was written
    leaves: list[int] = []
    messages: tuple[Message, ...] = ()
    for _, (messages, path, copied) in trajectories:  # noqa: B007
        nodes |= path
        leaves.append(next(reversed(path)))
    order = {old: new for new, old in enumerate(sorted(nodes))}
    placed = [(nodes[old], order.get(nodes[old].parent, ROOT)) for old in order]
    own, first = _own(rows[0]), rows[0]
    known = [_own(row) for row in rows]
    origins = tuple(each["origin"] for each in known) if own and own["origin"] is not None else ()
    scored = [each["advantages"] for each in known] if own and own["advantages"] is not None else None
    advantages = scored and tuple(
        tuple(tuple(turn) if isinstance(turn, list) else turn for turn in rollout) for rollout in scored
    )
    steps = (step for row in rows for step in row["steps"] if step["source"] == "agent")
    by_node = {_own(step)["node"]: tuple(_own(step)["values"]) for step in steps if "values" in _own(step)}
    values = tuple(by_node[old] for old in order) if by_node else None
    kept = {"agent": first["agent"], "tools": first["agent"].get("tool_definitions", []), **copied}
    prompt = own["prompt"] if own else _asked(first["steps"])
    tree = RolloutTree(
        task=Task(**own["task"]) if own else Task(f"{IMPORTED}atif", number),
        prompt=tuple(prompt),
        messages=messages,
        nodes=tuple(replace(node, parent=parent) for node, parent in placed),
        leaves=tuple(order[leaf] for leaf in leaves),
        origins=origins,
        state_key=own.get("state_key", ""),
        info=own.get("info", kept),
        cost=Cost(**own.get("cost", {})),
    )
    return Record(number, own.get("labels", {}), tree, advantages, False, values, tuple(own.get("lessons", ())))


def _asked(steps: Sequence[Row]) -> Sequence[int]:
    """The prompt's tokens, where the first reply tells them."""
    metrics: Row = next((step.get("metrics") or {} for step in steps if step["source"] == "agent"), {})
    found: Sequence[int] = metrics.get("prompt_token_ids") or ()
    return found


def _read_steps(steps: Sequence[Row]) -> Steps:
    """Messages before the first reply; nodes by number, each with the one before it as parent; what the tree's info
    keeps."""
    messages: list[Message] = []
    copied: list[int] = []  # places of messages that were copied from another trajectory
    turns: list[tuple[Row, list[Message], list[int]]] = []
    for step in steps:
        results = (step.get("observation") or {}).get("results") or ()
        if step["source"] == "agent":
            ids = [call.get("tool_call_id") for call in step.get("tool_calls") or ()]
            turns.append((step, _heard(_in_order(results, ids, "source_call_id")), []))
            continue
        said = Message(str(_own(step).get("role", step["source"])), _text(step["message"]))
        _, here, marked = turns[-1] if turns else (step, messages, copied)
        if step.get(COPIED):
            marked.append(len(here))
        here += [said, *_heard(results)]
    if not turns:
        raise ValueError("no step is the agent's")
    nodes: dict[int, Node] = {}
    parent = ROOT
    for number, (step, heard, marked) in enumerate(turns):
        here_number = _own(step).get("node", number)
        node = _read_node(step, heard, parent, last=number == len(turns) - 1)
        nodes[here_number] = replace(node, info={**node.info, "copied": marked}) if marked else node
        parent = here_number
    return tuple(messages), nodes, {"copied": copied} if copied else {}


def _heard(results: Iterable[Row]) -> list[Message]:
    return [Message(str(_own(each).get("role", "tool")), _text(each.get("content"))) for each in results]


def _read_node(step: Row, heard: Sequence[Message], parent: int, *, last: bool) -> Node:
    own, metrics = _own(step), step.get("metrics") or {}
    extra = metrics.get("extra") or {}
    text, info = _text(step["message"]), own.get("info", {})
    if not own:
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
        info = {name: step[name] for name in _STEP if name in step}
        text = _said(message)
        if message.keys() != {"content"} or text.lstrip().startswith("{"):
            info["message"] = message
    return Node(
        parent=parent,
        action=Completion(
            text,
            tuple(metrics.get("completion_token_ids") or ()),
            tuple(metrics.get("logprobs") or ()),
            tuple(extra.get("entropies") or ()),
            own.get("stop_reason", "stop"),
            own.get("weights_version", 0),
            own.get("last_weights_version"),
        ),
        observation=tuple(own.get("observation", ())),
        messages=tuple(heard),
        reward=extra.get("reward", 0.0) if own else 0.0,
        reward_terms=extra.get("reward_terms", {}) if own else {},
        terminated=own.get("terminated", last),
        truncated=own.get("truncated", False),
        state_key=own.get("state_key", ""),
        info=info,
        calls=tuple(ToolCall(**call) for call in own.get("calls", ())),
        speaker=own.get("speaker", ""),
    )


EXCHANGES: Mapping[str, Exchange] = {
    "atif": Exchange(write_atif, read_atif),
    "openai": Exchange(write_openai, read_openai),
    "verifiers": Exchange(write_verifiers, read_verifiers),
}
