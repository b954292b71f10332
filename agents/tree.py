"""RolloutTree: every turn stored once; a rollout is a path from the root to a leaf."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..envs import Message, Task
from ..tools import ToolCall
from .notebook import tree_html
from .policy import Completion

TurnAdvantage = float | NDArray[np.float64]  # one for all of the turn's sampled tokens, or one for each
Advantages = Sequence[Sequence[TurnAdvantage]]  # [rollout][turn]

ROOT = -1
SLACK = 1e-6  # how far sums of floats may be off: ten turns of 0.1 are 0.9999999999999999


def is_success(value: float) -> bool:
    """Whether a rollout has succeeded, from the sum of its success term: 1 or more, up to SLACK."""
    return value >= 1 - SLACK


@dataclass(frozen=True, slots=True)
class Node:
    """One turn: what the policy said and how the environment answered."""

    parent: int  # index into the tree's nodes; ROOT: the turn follows the prompt
    action: Completion
    observation: tuple[int, ...] = ()  # tokens between this action and the next; empty where the episode ends
    messages: tuple[Message, ...] = ()  # the environment's answer as chat
    reward: float = 0.0
    reward_terms: Mapping[str, float | None] = field(default_factory=dict)
    terminated: bool = False
    truncated: bool = False
    state_key: str = ""  # of the state the action led to
    info: Mapping[str, Any] = field(default_factory=dict)  # JSON; "cause" of a truncation
    calls: tuple[ToolCall, ...] = ()  # those that the environment read in the action
    speaker: str = ""  # who said it, where an environment has several roles


@dataclass(slots=True)
class Cost:
    """What growing a tree took. Turns that rollouts share count once; turns that were pruned count too."""

    leaves: int = 0  # rollouts that ended
    sampled_tokens: int = 0
    prefill_tokens: int = 0  # of the prompt and of observations
    tool_calls: int = 0
    repeated_tokens: int = 0  # of replies that repeat a sibling's reply; an engine that does not join equal
    repeated_calls: int = 0  # replies would compute these tokens and execute these calls once more
    forks: int = 0  # copies of environments
    replays: int = 0  # environments that were played again because they cannot be copied

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, name) + getattr(other, name) for name in Cost.__slots__))


@dataclass(frozen=True)
class RolloutTree:
    """The rollouts of one task. Rollouts that chose the same tokens share their nodes, unless other versions of the
    weights chose them."""

    task: Task
    prompt: tuple[int, ...]  # tokens before the first action
    messages: tuple[Message, ...]  # the prompt as chat
    nodes: tuple[Node, ...]  # parents before their children
    leaves: tuple[int, ...]  # the last node of each rollout; equal rollouts repeat it
    origins: tuple[int, ...] = ()  # [rollout]: the first rollout that started from the same root; empty: each its own
    state_key: str = ""  # of the state before the first action
    info: Mapping[str, Any] = field(default_factory=dict)  # reset's, JSON
    cost: Cost = field(default_factory=Cost)

    def path(self, leaf: int) -> tuple[int, ...]:
        """Node indices from the first turn to this node."""
        path = []
        while leaf != ROOT:
            path.append(leaf)
            leaf = self.nodes[leaf].parent
        return tuple(reversed(path))

    @cached_property
    def paths(self) -> tuple[tuple[int, ...], ...]:
        """One path per rollout."""
        return tuple(self.path(leaf) for leaf in self.leaves)

    def tokens(self, path: tuple[int, ...]) -> tuple[int, ...]:
        """The token sequence of a path: prompt, then actions and observations in turn."""
        nodes = (self.nodes[i] for i in path)
        return self.prompt + tuple(t for n in nodes for t in n.action.token_ids + n.observation)

    @property
    def returns(self) -> tuple[float, ...]:
        """Sum of the rewards along each rollout."""
        return tuple(sum(self.nodes[i].reward for i in path) for path in self.paths)

    @property
    def split(self) -> str:
        """Of the task: as its environment says, or as it was asked for; empty where neither tells."""
        return str(self.info.get("split", self.task.options.get("split", "")))

    def term(self, name: str) -> tuple[float, ...]:
        """A reward term summed along each rollout; turns without it count 0."""
        return tuple(sum(self.nodes[i].reward_terms.get(name) or 0.0 for i in path) for path in self.paths)

    @property
    def num_sampled_tokens(self) -> int:
        """Tokens the policy sampled, each once."""
        return sum(len(node.action.token_ids) for node in self.nodes)

    @property
    def num_unique_tokens(self) -> int:
        return len(self.prompt) + sum(len(n.action.token_ids) + len(n.observation) for n in self.nodes)

    @property
    def num_total_tokens(self) -> int:
        """Tokens of all rollouts written out one by one."""
        return sum(len(self.tokens(path)) for path in self.paths)

    def _repr_html_(self) -> str:
        return tree_html(self)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> RolloutTree:
        return cls(
            task=Task(**row["task"]),
            prompt=tuple(row["prompt"]),
            messages=_messages(row["messages"]),
            nodes=tuple(_node(node) for node in row["nodes"]),
            leaves=tuple(row["leaves"]),
            origins=tuple(row.get("origins", ())),
            state_key=row["state_key"],
            info=row["info"],
            cost=Cost(**row.get("cost", {})),
        )


def turn_key(action: Completion) -> tuple[tuple[int, ...] | str, int, int]:
    """What two replies to the same context must have in common to be one turn: their tokens (their text, where no
    tokens are known), and the weights versions of the first and of the last token. Another version gives the same
    tokens other log-probabilities."""
    first, last = action.weights_version, action.last_weights_version
    return action.token_ids or action.text, first, first if last is None else last


def joined(trees: Sequence[RolloutTree]) -> RolloutTree:
    """The rollouts of trees of one task as one tree, in the order of their origins, as if they had grown together."""
    rollouts = [
        (origin, [tree.nodes[i] for i in path])
        for tree in trees
        for origin, path in zip(tree.origins, tree.paths, strict=True)
    ]
    rollouts.sort(key=lambda rollout: rollout[0])
    nodes: list[Node] = []
    leaves: list[int] = []
    places: dict[tuple[Any, ...], int] = {}  # nodes by parent, turn_key, and whether the episode was cut there
    for _, path in rollouts:
        at = ROOT
        for node in path:
            place = at, turn_key(node.action), node.truncated
            if place not in places:
                places[place] = len(nodes)
                nodes.append(replace(node, parent=at))
            at = places[place]
        leaves.append(at)
    return replace(
        next((tree for tree in trees if tree.leaves), trees[0]),
        nodes=tuple(nodes),
        leaves=tuple(leaves),
        origins=tuple(origin for origin, _ in rollouts),
        cost=sum((tree.cost for tree in trees), Cost()),
    )


def tool_results(messages: Iterable[Message]) -> int:
    """How many of the messages answer a tool call."""
    return sum(message.role == "tool" for message in messages)


def _messages(rows: list[dict[str, str]]) -> tuple[Message, ...]:
    return tuple(Message(**row) for row in rows)


def _node(row: Mapping[str, Any]) -> Node:
    action: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in row["action"].items()
    }
    return Node(
        **{
            **row,
            "action": Completion(**action),
            "observation": tuple(row["observation"]),
            "messages": _messages(row["messages"]),
            "calls": tuple(ToolCall(**call) for call in row.get("calls", ())),
        }
    )
