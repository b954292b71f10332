"""Reflection: what the rollouts of a batch teach, from where rollouts of one task chose differently."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Protocol

from ...envs import Message
from ...envs.notes import MAX_WHEN, advice, own_text, why_not_a_line
from ..tree import ROOT, Node, RolloutTree
from .curate import Add, Delete, Keep, Operation, Update
from .lesson import IN_FORCE, Evidence, Lesson, near_words, tags_of
from .telling import lessons_of

_SENTENCE_END = re.compile(r"(?<=[.!?]) ")


@dataclass(frozen=True, slots=True)
class Seen:
    """A tree from which something may be learned."""

    run: str  # its folder or name
    number: int  # of the tree in the run's store
    tree: RolloutTree

    @property
    def tags(self) -> tuple[str, ...]:
        return tags_of(self.tree.info)


Ask = Callable[[Sequence[Message], int], Awaitable[str]]  # what a policy replies to a chat; the number seeds it


@dataclass(frozen=True, slots=True)
class Reflection:
    """What a batch of trees teaches."""

    groups: Sequence[Sequence[Operation]]  # each what one tree, or all of them, call for
    failures: Sequence[str] = ()  # why something could not be had, one for each attempt


class Reflector(Protocol):
    """Writes down what a batch of trees teaches."""

    async def reflect(self, batch: Sequence[Seen], known: Sequence[Lesson], ask: Ask) -> Reflection:
        """What is to be done with the lessons. `known` are those in force with the tags of a task of the batch, or with
        none. `ask` is for reflectors that have a policy write."""
        ...


@dataclass(frozen=True, slots=True)
class Topic:
    """What a lesson of ours can be about: a situation in an environment, named by a phrase that it is read by."""

    env: str
    tags: tuple[str, ...]
    when: str  # empty: everywhere


@dataclass(frozen=True, slots=True)
class Comparison:
    """Rollouts of one tree that did something in a situation, and the others that were in it."""

    place: Seen
    nodes: tuple[int, ...]  # where they did so
    returns: tuple[float, float]  # the mean return of those who did so, and of the others
    counts: tuple[int, int]

    @property
    def gain(self) -> float:
        return self.returns[0] - self.returns[1]

    @property
    def evidence(self) -> Evidence:
        seen, tree = self.place, self.place.tree
        split, told = tree.split or "train", tuple(map(int, lessons_of(tree.task)))
        return Evidence(seen.run, seen.number, self.nodes, self.returns, self.counts, split=split, in_force=told)


Found = Mapping[Topic, Mapping[str, Sequence[Comparison]]]  # by what was done, as advice


@dataclass(frozen=True, slots=True)
class Contrast:
    """Lessons from returns alone, without a model.

    Wherever rollouts of a group chose differently in one state (children of a node, nodes of equal `state_key`), the
    gain of a choice is the mean return of the rollouts that made it less that of the others. Gains are summed over the
    batch, by what the agent read in that state. The best choice becomes a lesson, where its sum reaches `threshold`.
    Of the lessons in force with that phrase and the very tags of the task, those whose choice falls below `-threshold`
    are deleted, and those that say otherwise than the best are updated.
    Habits (turns that cannot be read, an action again in the same state, an answer before any tool) are compared in the
    same way, rollouts with them against rollouts without.
    """

    threshold: float = 0.2  # summed gain of a choice, in the unit of returns
    least: int = 2  # rollouts of the batch on both sides of a comparison
    habits: bool = True

    def __post_init__(self) -> None:
        if self.threshold <= 0 or self.least < 1:
            raise ValueError(f"a threshold is more than 0 and least 1 or more, got {self.threshold}, {self.least}")

    async def reflect(self, batch: Sequence[Seen], known: Sequence[Lesson], ask: Ask) -> Reflection:
        parts = [choices(seen) for seen in batch] + [habits(seen) for seen in batch if self.habits]
        found = _collected(parts)
        by_topic: dict[Topic, list[Lesson]] = defaultdict(list)
        for lesson in known:
            if lesson.state in IN_FORCE:
                by_topic[Topic(lesson.env, lesson.tags, lesson.when)].append(lesson)
        return Reflection([[*self._decided(topic, found[topic], by_topic[topic])] for topic in found])

    def _decided(
        self, topic: Topic, done: Mapping[str, Sequence[Comparison]], known: Sequence[Lesson]
    ) -> Iterator[Operation]:
        gains = {text: sum(one.gain for one in compared) for text, compared in done.items() if self._enough(compared)}
        won = sorted((text for text in gains if gains[text] >= self.threshold), key=gains.__getitem__, reverse=True)
        if topic.when:
            del won[1:]  # in one state there is one thing to do
        by_words = {tuple(near_words(text)): text for text in done}
        rivals: list[int] = []
        for lesson in known:
            text = by_words.get(tuple(near_words(lesson.text)), lesson.text)  # in the words of the choice
            if topic.when and won and _rival(text, won[0], done):
                rivals.append(lesson.id)
            elif gains.get(text, 0.0) <= -self.threshold:
                yield Delete(lesson.id, f"those who did so returned {-gains[text]:.2f} less")
            elif text in gains and text not in won:
                yield Keep(lesson.id)
        for text in won:
            evidence = tuple(one.evidence for one in done[text])
            yield from (Update(id, text, evidence=evidence) for id in rivals)
            if not rivals:
                yield Add(Lesson(text, topic.env, topic.when, topic.tags, type(self).__name__, evidence))

    def _enough(self, compared: Sequence[Comparison]) -> bool:
        return min(sum(one.counts[side] for one in compared) for side in (0, 1)) >= self.least


def _rival(text: str, best: str, done: Collection[str]) -> bool:
    """Whether a lesson has one do something else in the situation: what others did, or the same tool otherwise."""
    return text != best and (text in done or _tool(text) == _tool(best))


def _tool(text: str) -> str:
    """The name of the first call of an advice."""
    return re.split(r"\W", text, maxsplit=1)[0]


def _collected(parts: Iterable[Found]) -> dict[Topic, dict[str, list[Comparison]]]:
    found: dict[Topic, dict[str, list[Comparison]]] = defaultdict(lambda: defaultdict(list))
    for part in parts:
        for topic, done in part.items():
            for text, compared in done.items():
                found[topic][text] += compared
    return found


# choices


def choices(seen: Seen) -> Found:
    """The comparisons of the calls that were made in each state of a tree."""
    tree = seen.tree
    values, counts = _values(tree)
    states: dict[str, list[int]] = defaultdict(list)  # nodes by the state in which they were chosen
    for i, node in enumerate(tree.nodes):
        if counts[i]:
            states[_state_before(tree, node)].append(i)
    found: dict[Topic, dict[str, list[Comparison]]] = defaultdict(lambda: defaultdict(list))
    for nodes in states.values():
        when = phrase(_read_before(tree, tree.nodes[nodes[0]]))
        by_choice: dict[str, list[int]] = defaultdict(list)
        for i in nodes:
            by_choice[advice(tree.nodes[i].calls)].append(i)
        for text, chosen in by_choice.items():
            others = [i for i in nodes if i not in chosen]
            if text and when and others:
                topic = Topic(tree.task.env, seen.tags, when)
                found[topic][text].append(_compared(seen, chosen, others, values, counts))
    return found


def _compared(
    seen: Seen, chosen: Sequence[int], others: Sequence[int], values: Sequence[float], counts: Sequence[int]
) -> Comparison:
    def mean(nodes: Sequence[int]) -> tuple[float, int]:
        total = sum(counts[i] for i in nodes)
        return sum(values[i] * counts[i] for i in nodes) / total, total

    (one, n), (other, m) = mean(chosen), mean(others)
    return Comparison(seen, tuple(chosen), (one, other), (n, m))


def _values(tree: RolloutTree) -> tuple[list[float], list[int]]:
    """Of each node: the mean return of the rollouts through it, and their number."""
    sums, counts = [0.0] * len(tree.nodes), [0] * len(tree.nodes)
    for path, total in zip(tree.paths, tree.returns, strict=True):
        for i in path:
            sums[i] += total
            counts[i] += 1
    return [total / max(count, 1) for total, count in zip(sums, counts, strict=True)], counts


def _state_before(tree: RolloutTree, node: Node) -> str:
    """Names the state in which a turn was taken: by its key, or where there is none, by the turn before."""
    key = tree.state_key if node.parent == ROOT else tree.nodes[node.parent].state_key
    return key or f"after {node.parent}"


def _read_before(tree: RolloutTree, node: Node) -> str:
    """What the environment itself had just said."""
    messages = tree.messages if node.parent == ROOT else tree.nodes[node.parent].messages
    return own_text(messages[-1].text) if messages else ""


def phrase(text: str) -> str:
    """The phrase of a text by which what it speaks of is known again: the last sentence of its last line."""
    lines = [line for line in text.splitlines() if line.strip()]
    last = _SENTENCE_END.split(lines[-1].strip())[-1] if lines else ""
    return "" if why_not_a_line(last, MAX_WHEN) else last


# habits

UNREADABLE = "Write every action exactly in the format that was asked for."
REPEATED = "Do not repeat an action where nothing has changed since: try another one."
HASTY = "Call a tool before you answer."


def habits(seen: Seen) -> Found:
    """The comparisons of rollouts without a habit against those that have it."""
    tree, topic = seen.tree, Topic(seen.tree.task.env, (), "")
    found: dict[str, Sequence[Comparison]] = {}
    for text, has in ((UNREADABLE, _unreadable), (REPEATED, _repeats), (HASTY, _hasty)):
        sides = defaultdict[bool, list[int]](list)  # rollouts by whether they have it
        for rollout, path in enumerate(tree.paths):
            sides[has(tree, path)].append(rollout)
        if len(sides) == 2:
            returns = tuple(fmean(tree.returns[i] for i in sides[side]) for side in (False, True))
            nodes = tuple(sorted({tree.leaves[i] for i in sides[True]}))
            counts = len(sides[False]), len(sides[True])
            found[text] = [Comparison(seen, nodes, (returns[0], returns[1]), counts)]
    return {topic: found}


def _unreadable(tree: RolloutTree, path: Sequence[int]) -> bool:
    return any(tree.nodes[i].info.get("malformed") for i in path)


def _repeats(tree: RolloutTree, path: Sequence[int]) -> bool:
    done = [(_state_before(tree, tree.nodes[i]), advice(tree.nodes[i].calls)) for i in path if tree.nodes[i].calls]
    return len(set(done)) < len(done)


def _hasty(tree: RolloutTree, path: Sequence[int]) -> bool:
    """Whether it answered, and had not called a tool."""
    return bool(path) and tree.nodes[path[-1]].terminated and not any(tree.nodes[i].calls for i in path)
