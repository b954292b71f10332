"""Outcomes: what a policy did on tasks, rollout by rollout."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import Any

from ...envs import Action, Task, TextEnv, ToolEnv
from ..tree import RolloutTree, is_success, tool_results

Difficulty = int | float | str
_DIFFICULTY = ("difficulty", "hops", "steps")  # keys of reset's info, the first that is there


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one rollout."""

    success: bool
    total: float  # the return
    terms: Mapping[str, float]  # reward terms, summed over its turns
    turns: int
    tool_calls: int
    failed_calls: int
    malformed: int  # turns that were no action
    cut: int  # replies that reached the limit of their tokens
    sampled_tokens: int
    sent_tokens: int  # contexts of all its turns, as a server that is asked turn by turn counts its prompts
    cause: str | None  # of truncation
    answer: str | None = None  # None: it gave none, or nobody asked
    episode: str = ""  # TREE.ROLLOUT in the store


@dataclass(frozen=True, slots=True)
class TaskOutcome:
    """What came of a task, rollout by rollout."""

    tree: int  # its number in the store
    task: Task
    split: str
    difficulty: Difficulty | None
    rollouts: tuple[Outcome, ...]
    problem: str = ""  # equal: seeds drew the same problem; empty: it is like no other
    drawn: int = 1  # tasks that drew the problem, whose rollouts these are

    @classmethod
    def of(
        cls, number: int, tree: RolloutTree, term: str, answer: Callable[[Task, str], str | None] | None = None
    ) -> TaskOutcome:
        """`term` is the reward term that is 1 (or more) where a rollout succeeded; `answer` reads that of an action."""
        return cls(
            tree=number,
            task=tree.task,
            split=tree.split,
            difficulty=difficulty(tree.info),
            rollouts=tuple(
                replace(_outcome(tree, path, term, answer), episode=f"{number}.{rollout}")
                for rollout, path in enumerate(tree.paths)
            ),
            problem=_problem(tree),
        )

    @property
    def successes(self) -> int:
        return sum(rollout.success for rollout in self.rollouts)

    @property
    def share(self) -> float:
        """The share of its rollouts that succeeded; 0 where all of them failed to be played."""
        return self.successes / len(self.rollouts) if self.rollouts else 0.0

    @property
    def tries(self) -> int:
        """Rollouts of a task; those that drew the same problem do not add to it."""
        return len(self.rollouts) // self.drawn

    @property
    def key(self) -> str:
        """Equal keys: the same task, in whatever format its actions are written and whatever wrappers are around it."""
        task = asdict(self.task)
        task["settings"].pop("format", None)
        del task["wrappers"]
        return json.dumps(task, sort_keys=True, ensure_ascii=False)


def _problem(tree: RolloutTree) -> str:
    """Names the problem that a task's seed drew: by the state after reset and what the agent was told of it."""
    task = tree.task
    told = [message.text for message in tree.messages]
    named = [task.env, dict(task.settings), dict(task.options), task.wrappers, tree.state_key, told]
    return json.dumps(named, sort_keys=True, ensure_ascii=False) if tree.state_key else ""


def distinct(tasks: Sequence[TaskOutcome]) -> list[TaskOutcome]:
    """Every problem once. An environment with a list of problems draws them again and again; tasks that drew the same
    one are one task with the rollouts of all."""
    groups: dict[str | int, list[TaskOutcome]] = {}
    for number, task in enumerate(tasks):
        groups.setdefault(task.problem or number, []).append(task)
    return [
        replace(group[0], rollouts=tuple(chain(*(task.rollouts for task in group))), drawn=sum(t.drawn for t in group))
        for group in groups.values()
    ]


def _outcome(
    tree: RolloutTree, path: tuple[int, ...], term: str, read: Callable[[Task, str], str | None] | None
) -> Outcome:
    nodes = [tree.nodes[i] for i in path]
    names = sorted({name for node in nodes for name in node.reward_terms})
    terms = {name: sum(node.reward_terms.get(name) or 0.0 for node in nodes) for name in names}
    sent, context = 0, len(tree.prompt)
    for node in nodes:
        sent += context
        context += len(node.action.token_ids) + len(node.observation)
    last = nodes[-1] if nodes else None
    return Outcome(
        success=is_success(terms.get(term, 0.0)),
        total=sum(node.reward for node in nodes),
        terms=terms,
        turns=len(nodes),
        tool_calls=sum(tool_results(node.messages) for node in nodes),
        failed_calls=sum(int(node.info.get("failed_calls", 0)) for node in nodes),
        malformed=sum(int(node.info.get("malformed", 0)) for node in nodes),
        cut=sum(node.action.stop_reason == "length" for node in nodes),
        sampled_tokens=sum(len(node.action.token_ids) for node in nodes),
        sent_tokens=sent,
        cause=str(last.info.get("cause")) if last and last.truncated else None,
        answer=read(tree.task, last.action.text) if read and last and last.terminated else None,
    )


def difficulty(info: Mapping[str, Any]) -> Difficulty | None:
    """What reset's info tells of how hard a task is."""
    return next((info[key] for key in _DIFFICULTY if isinstance(info.get(key), int | float | str)), None)


class AnswerReader:
    """The answer in the action that ended an episode, blanks and case aside. Close it: it makes environments."""

    def __init__(self) -> None:
        self._envs: dict[str, TextEnv] = {}

    def __call__(self, task: Task, action: str) -> str:
        key = json.dumps([task.env, dict(task.settings)], sort_keys=True)
        env = (self._envs.get(key) or self._envs.setdefault(key, replace(task, wrappers=()).make())).unwrapped
        parsed = env.format.parse(action, env.tools) if isinstance(env, ToolEnv) else None
        text = parsed.answer if isinstance(parsed, Action) and parsed.answer is not None else action
        return " ".join(text.split()).casefold()

    def close(self) -> None:
        for env in self._envs.values():
            env.close()


def succeeded(tree: RolloutTree, term: str) -> list[bool]:
    """Whether each rollout reached 1 in a reward term, as `is_success` tells."""
    return [is_success(value) for value in tree.term(term)]
