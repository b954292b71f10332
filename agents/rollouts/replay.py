"""Replay: recorded trees played again: verified, scored anew, or continued by another policy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ...envs import Message, Task, TextEnv
from ...envs.rewards import number_or_none
from ...tools import Cassette
from ..policy import Completion, Context, Sample
from ..tree import ROOT, Node, RolloutTree
from .engine import CUTS, GrowingTree, Turn
from .response import (
    STATE,
    STRICT,
    Difference,
    ReplayMismatch,
    Response,
    Strictness,
    act,
    closed_on_error,
    open_task,
    response_of,
)


@dataclass(frozen=True, slots=True)
class Divergence:
    """Where a branch of a tree first answered otherwise than was recorded."""

    rollout: int  # the first one through the turn
    turn: int  # from 1; 0 is the prompt
    difference: Difference

    def __str__(self) -> str:
        return f"rollout {self.rollout}, turn {self.turn}: {self.difference}"


def verify(
    tree: RolloutTree,
    strictness: Strictness = STRICT,
    cassette: Cassette | None = None,
    *,
    rollout: int | None = None,  # this one alone; None: all
) -> list[Divergence]:
    """Takes every recorded action again and compares what the environment answers.

    One divergence for each branch that has any, in the order of the tree's nodes; what follows it is not played, nor
    are the `lost_turns`.
    OutsideSource where an environment reads from outside and no cassette is given.
    """
    if rollout is not None:
        path = tree.paths[rollout]
        nodes = (replace(tree.nodes[number], parent=place - 1) for place, number in enumerate(path))
        alone = replace(tree, nodes=tuple(nodes), leaves=(len(path) - 1,), origins=())
        return [replace(divergence, rollout=rollout) for divergence in verify(alone, strictness, cassette)]
    return [divergence for _, _, divergence in played(tree, strictness, cassette) if divergence]


@dataclass(frozen=True, slots=True)
class LostTurn:
    """A turn in which what the episode played in failed (a page hung, a browser died), and which ended it."""

    rollout: int  # the first one through the turn
    turn: int  # from 1
    cause: str


def lost_turns(tree: RolloutTree, rollout: int | None = None) -> list[LostTurn]:
    """The turns, of one rollout or of all, that cannot be verified, because a replay does not fail as they did."""
    ends = {path[-1]: (number, len(path)) for number, path in reversed([*enumerate(tree.paths)]) if path}
    lost = [LostTurn(*place, str(tree.nodes[i].info["cause"])) for i, place in ends.items() if _is_lost(tree.nodes[i])]
    return sorted((each for each in lost if rollout in (None, each.rollout)), key=lambda each: each.rollout)


def _is_lost(node: Node) -> bool:
    return node.truncated and "lost" in node.info


def played(
    tree: RolloutTree, strictness: Strictness = STRICT, cassette: Cassette | None = None
) -> Iterator[tuple[int, TextEnv, Divergence | None]]:
    """(node, environment after it, what was not as recorded) of every turn; ROOT first, for the prompt.

    A turn is played once where the environment can fork, else once for each branch that goes on from it. What follows
    a divergence is left out. Look at an environment before you ask for the next turn: then it steps on or is closed.
    """
    children = Counter(node.parent for node in tree.nodes)
    first = {number: rollout for rollout, path in reversed([*enumerate(tree.paths)]) for number in path}
    env, response = open_task(tree.task, cassette, sealed=True)
    held = {ROOT: env}  # by node, in the states that later turns start from
    try:
        difference = strictness.first(response_of(tree), response)
        yield ROOT, env, Divergence(0, 0, difference) if difference else None
        lost = {ROOT} if difference else set[int]()
        for number, node in enumerate(tree.nodes):
            if node.parent in lost:
                lost.add(number)
                continue
            children[node.parent] -= 1
            env = _taken(tree, node.parent, held, last=not children[node.parent], cassette=cassette)
            held[number] = env
            difference = _again(env, node, strictness)
            yield number, env, Divergence(first[number], len(tree.path(number)), difference) if difference else None
            if difference:
                lost.add(number)
            if difference or not children[number]:
                held.pop(number).close()
    finally:
        for env in held.values():
            env.close()


def _taken(
    tree: RolloutTree, parent: int, held: dict[int, TextEnv], *, last: bool, cassette: Cassette | None
) -> TextEnv:
    """An environment in the state after a node, for a child to step."""
    if parent in held and (last or not held[parent].can_fork):
        return held.pop(parent)
    if parent in held:
        return held[parent].fork()
    env, _ = open_task(tree.task, cassette)
    with closed_on_error(env):
        for number in tree.path(parent):
            env.step(tree.nodes[number].action.text)
    return env


def _again(env: TextEnv, node: Node, strictness: Strictness) -> Difference | None:
    """Takes a turn again; an exception is a difference too. A lost turn is not taken."""
    if _is_lost(node):
        return None
    try:
        response = act(env, node.action.text)
    except Exception as error:  # of the environment's; it raised none when the turn was recorded
        return Difference("exception", "(nothing)", f"{type(error).__name__}: {error}")
    cause = str(node.info.get("cause"))
    if cause in CUTS and node.truncated and not response.over:
        response = response.cut(cause)
    return strictness.first(response_of(node), response)


# new rewards


@dataclass(frozen=True, slots=True)
class Episode:
    """An episode up to the end of one of its turns: what a reward term is a function of."""

    task: Task
    prompt: tuple[Message, ...]
    turns: tuple[Node, ...]  # so far; never empty

    @property
    def actions(self) -> tuple[str, ...]:
        return tuple(node.action.text for node in self.turns)

    @property
    def messages(self) -> tuple[Message, ...]:
        """The whole chat, the agent's replies among it."""
        said = ((Message("assistant", node.action.text), *node.messages) for node in self.turns)
        return self.prompt + tuple(message for part in said for message in part)

    @property
    def terms(self) -> Mapping[str, float | None]:
        """The recorded terms of the last turn."""
        return self.turns[-1].reward_terms

    @property
    def over(self) -> bool:
        return self.turns[-1].terminated or self.turns[-1].truncated


@dataclass(frozen=True, slots=True)
class RewardTerm:
    """A named part of the reward, scored after each turn; None where it has nothing to say."""

    name: str
    function: Callable[..., float | None]  # of an Episode and, if live, of the environment, unwrapped, after the turn
    live: bool = False


def rescore(
    tree: RolloutTree,
    terms: Sequence[RewardTerm],
    weights: Mapping[str, float] | None = None,
    *,
    live: bool = False,
    cassette: Cassette | None = None,
) -> RolloutTree:
    """The tree with these terms computed for every turn. They replace recorded terms of the same name; others stay.

    A turn's reward is the weighted sum of the new terms (1.0 each, unless `weights` says otherwise) and of those
    recorded terms that `weights` names. Live terms are None unless `live`, which plays the tree again: ReplayMismatch
    where an environment answers otherwise than was recorded.
    """
    envs: Iterable[tuple[int, TextEnv | None]]
    envs = _played_alike(tree, cassette) if live else ((number, None) for number in range(len(tree.nodes)))
    factors = {**{term.name: 1.0 for term in terms}, **(weights or {})}
    nodes = list(tree.nodes)
    for number, env in envs:
        episode = Episode(tree.task, tree.messages, tuple(tree.nodes[i] for i in tree.path(number)))
        values = {**episode.terms, **{term.name: _value(term, episode, env) for term in terms}}
        reward = sum(factors[name] * value for name, value in values.items() if name in factors and value is not None)
        nodes[number] = replace(nodes[number], reward=float(reward), reward_terms=values)
    return replace(tree, nodes=tuple(nodes))


def _value(term: RewardTerm, episode: Episode, env: TextEnv | None) -> float | None:
    if not term.live:
        return number_or_none(term.name, term.function(episode))
    return None if env is None else number_or_none(term.name, term.function(episode, env.unwrapped))


def _played_alike(tree: RolloutTree, cassette: Cassette | None) -> Iterator[tuple[int, TextEnv]]:
    for number, env, divergence in played(tree, STATE, cassette):
        if divergence:
            raise _mismatch(tree, divergence)
        if number != ROOT:
            yield number, env


def _mismatch(tree: RolloutTree, divergence: Divergence) -> ReplayMismatch:
    return ReplayMismatch(f"{tree.task.env}, seed {tree.task.seed}, {divergence}")


# another future


@dataclass(frozen=True, slots=True)
class Continuation:
    """A rollout strategy: the first turns of a recorded rollout, then `n` rollouts that go on from there.

    The recorded tokens are kept where the renderer's tokenizer reads and writes them as they were, which `same_tokens`
    tells; otherwise the recorded replies are tokenised again. ReplayMismatch where the environment answers otherwise.
    """

    recorded: RolloutTree
    rollout: int
    turn: int  # after which the rollouts go on; 0: the prompt
    n: int = 8
    recorded_end: bool = False  # instead, one rollout goes on with the recorded turns

    @property
    def prefix(self) -> tuple[int, ...]:
        return self.recorded.paths[self.rollout][: self.turn]

    def same_tokens(self, tree: GrowingTree) -> bool:
        """Whether prompt and prefix are the same tokens to the present renderer as they were when recorded."""
        renderer = tree.renderer

        def same(node: Node) -> bool:
            said = node.action
            answered = renderer.observation(node.messages, ended=renderer.ended(said.token_ids))
            read = renderer.text(said.token_ids) == said.text or renderer.reply(said.text) == said.token_ids
            return read and answered == node.observation

        prompt = renderer.prompt(self.recorded.messages)
        return prompt == self.recorded.prompt and all(same(self.recorded.nodes[i]) for i in self.prefix)

    async def grow(self, tree: GrowingTree) -> None:
        turn, keep = tree.root, self.same_tokens(tree)
        self._compare(0, response_of(self.recorded), tree.prompt.response)
        for number in self.prefix:
            turn = await self._take(tree, turn, number, keep)
            if turn.done:
                assert turn.node is not None
                raise ValueError(f"the episode ends at turn {turn.depth}: {turn.node.info.get('cause', 'the end')}")
        if not self.recorded_end:
            await tree.together(*(tree.rollout(turn, number) for number in range(self.n)))
            return
        for number in self.recorded.paths[self.rollout][self.turn :]:
            turn = await self._take(tree, turn, number, keep)
        tree.end(0, turn)

    async def _take(self, tree: GrowingTree, turn: Turn, number: int, keep: bool) -> Turn:
        """Takes a recorded turn again."""
        node = self.recorded.nodes[number]
        action = node.action if keep else Completion(node.action.text, tree.renderer.reply(node.action.text))
        child = await tree.attach(turn, Sample(action, Context(action.token_ids, turn.context)))
        assert child.node is not None
        self._compare(child.depth, response_of(node), response_of(child.node))
        return child

    def _compare(self, depth: int, recorded: Response, replayed: Response) -> None:
        if difference := STATE.first(recorded, replayed):
            raise _mismatch(self.recorded, Divergence(self.rollout, depth, difference))
