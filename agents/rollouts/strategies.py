"""Rollout strategies: where the trees of a task start, fork and stop."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from ..policy import Completion, Context, Sample
from .engine import GrowingTree, Turn

MAX_IDLE = 3  # Budgeted gives up after this many consecutive rounds that consumed none of the limited resources


class RolloutStrategy(Protocol):
    """Decides where a tree starts, forks and stops."""

    async def grow(self, tree: GrowingTree) -> None:
        """Plays the tree's rollouts, all of them by the time it returns."""
        ...


@dataclass(frozen=True, slots=True)
class Chains:
    """Independent rollouts from the root: GRPO's group."""

    n: int

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"n must be at least 1, got {self.n}")

    async def grow(self, tree: GrowingTree) -> None:
        await tree.together(*(tree.rollout(tree.root, number) for number in range(self.n)))


@dataclass(frozen=True, slots=True)
class SomeChains:
    """Of the rollouts of Chains, those with these numbers alone."""

    numbers: tuple[int, ...]

    async def grow(self, tree: GrowingTree) -> None:
        await tree.together(*(tree.rollout(tree.root, number) for number in self.numbers))


@dataclass(frozen=True, slots=True)
class FollowOracle:
    """One rollout that the environment's oracle plays: a demonstration. ValueError where the oracle knows none."""

    async def grow(self, tree: GrowingTree) -> None:
        turn = tree.root
        while not turn.done:
            action = turn.env.oracle() if turn.env else None
            if action is None:
                raise ValueError(f"the oracle of {tree.task.env} knows no action at turn {turn.depth} of {tree.task}")
            tokens = tree.renderer.reply(action)
            turn = await tree.attach(turn, Sample(Completion(action, tokens), Context(tokens, turn.context)))
        tree.end(0, turn)


@dataclass(frozen=True, slots=True)
class EntropyBranching:
    """Rollouts that fork where the policy is unsure after a tool result (ARPO, arXiv:2507.19849 sec. 3.2).

    `roots` rollouts start from the prompt. In every round each live rollout takes a turn; then, in order, each may
    fork, with the probability `base + weight * (H - H0)`, or, given a `threshold`, where that number exceeds it. A
    fork adds `beam - 1` rollouts, as long as there are fewer than `budget`. Where none is live and there are still
    fewer, one more starts from the prompt.

    H is the mean entropy of the first `tokens` tokens of the turn that follows a tool result, over ln |V|, and H0 that
    of the rollout's first turn; forks go back to before the turn. `measured="call"` is the public code's way: H is
    that of the turn that made the call, and forks go on after its result.

    `top` takes entropies over this many of the likeliest tokens, as the public code does. That code also keeps the H0
    of the first batch it sees for all later ones; `initial` is a number in place of every H0.

    AEPO (arXiv:2510.14545) is `penalty=0.05`: that number shrinks by that share for every round in a row in which the
    tree has grown, and a fork is drawn as its code draws it. With its `allocation=0.5` rollout 0 is played first, and
    the less unsure it was on the way the more roots there are: sigmoid(allocation * (H of its first turn - mean H of
    the others)) of the budget.
    """

    roots: int = 8
    budget: int = 16
    beam: int = 2
    base: float = 0.5
    weight: float = 0.2
    threshold: float | None = None
    tokens: int = 20
    measured: Literal["result", "call"] = "result"
    total: bool = False  # the sum over the tokens in place of their mean, as in the public code
    top: int = 0  # 0: the whole distribution
    initial: float | None = None
    penalty: float | None = None
    allocation: float | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.roots <= self.budget or self.beam < 2:
            raise ValueError(f"roots must be between 1 and budget, and beam at least 2, got {self}")

    async def grow(self, tree: GrowingTree) -> None:
        ahead = [] if self.allocation is None else await self._play(tree)
        roots = self.roots_for([self._entropy(turn, tree) for turn in ahead])
        live = dict.fromkeys(range(roots), tree.root)
        first: dict[int, float] = {}  # H0 by rollout
        origin: dict[int, int] = {}  # by rollout, of those that are forks
        started, streak, round = roots, 0, 0
        while live or (started < self.budget and not tree.out_of_time):
            before = started
            if not live:
                live[started] = tree.root
                started += 1
            played = {0: ahead.pop(0)} if ahead else {}
            rest = {number: turn for number, turn in live.items() if number not in played}
            taken = await tree.together(*(self._extend(tree, turn, number) for number, turn in rest.items()))
            turns = played | dict(zip(rest, taken, strict=True))
            forks: dict[int, Turn] = {}
            for number, turn in turns.items():
                entropy = self._entropy(turn, tree)
                begun = first.setdefault(number, entropy if self.initial is None else self.initial)
                at = live[number] if self.measured == "result" else turn
                if at is tree.root or at.done or started >= self.budget:
                    continue
                if self.forks(tree.seed("fork", round, number) / 2**63, entropy - begun, streak):
                    for _ in range(min(self.beam - 1, self.budget - started)):
                        forks[started], first[started] = at, begun
                        origin[started] = origin.get(number, number)
                        started += 1
            streak = streak + 1 if started > before else 0
            for number, turn in turns.items():
                if turn.done:
                    tree.end(number, turn, origin.get(number))
            live = {number: turn for number, turn in turns.items() if not turn.done} | forks
            round += 1

    def forks(self, uniform: float, change: float, streak: int = 0) -> bool:
        """Whether a rollout forks, from a draw in [0, 1), the change of entropy, and rounds of growth in a row."""
        if self.threshold is not None:
            return self.base + self.weight * change > self.threshold
        if self.penalty is None:
            return min(max(uniform - self.weight * change, 0.0), 1.0) <= self.base
        shrunk = (uniform + self.weight * change) * max(0.0, 1 - self.penalty * streak)
        return min(max(shrunk, 0.0), 1.0) >= self.base

    def roots_for(self, entropies: Sequence[float]) -> int:
        """How many rollouts start from the prompt, from the entropies of a rollout's turns."""
        if self.allocation is None or len(entropies) < 2:
            return self.roots
        change = entropies[0] - math.fsum(entropies[1:]) / (len(entropies) - 1)
        return min(int(self.budget / (1 + math.exp(-self.allocation * change))) + 1, self.budget)

    async def _play(self, tree: GrowingTree) -> list[Turn]:
        """The turns of rollout 0."""
        turns: list[Turn] = []
        while not turns or not turns[-1].done:
            turns.append(await self._extend(tree, turns[-1] if turns else tree.root, 0))
        return turns

    async def _extend(self, tree: GrowingTree, turn: Turn, number: int) -> Turn:
        return await tree.extend(turn, number, entropy=True, entropy_top=self.top)

    def _entropy(self, turn: Turn, tree: GrowingTree) -> float:
        entropies = turn.node.action.entropies[: self.tokens] if turn.node else ()
        return normalized_entropy(entropies, len(tree.renderer.tokenizer), total=self.total)


def normalized_entropy(entropies: Sequence[float], vocabulary: int, *, total: bool = False) -> float:
    """Mean (or sum) of the entropies of tokens, nats, in units of ln(vocabulary); 0 where there are none."""
    summed = math.fsum(entropies) / math.log(vocabulary)
    return summed if total or not entropies else summed / len(entropies)


@dataclass(frozen=True, slots=True)
class TreeExpansion:
    """Trees of whole turns: each begins with `chains` rollouts, then `rounds` times `expansions` more go on from one of
    its turns to the end, and `keep` rollouts of each tree are trained (Tree-GRPO, arXiv:2509.21240 sec. 3.2).

    Turns are drawn uniformly, with replacement, from the prompt and all turns that did not end an episode.
    `choose="unsure"` takes those with the highest mean surprise of their tokens instead, less `crowding` for each
    sibling, and plays them again (AT2PO, arXiv:2601.04767 sec. 3.1).
    """

    trees: int = 2
    expansions: int = 2
    rounds: int = 1
    chains: int = 1
    keep: int | None = None  # all
    choose: Literal["uniform", "unsure"] = "uniform"
    crowding: float = 0.05

    def __post_init__(self) -> None:
        least = min(self.trees, self.expansions, self.chains, 1 if self.keep is None else self.keep)
        if least < 1 or self.rounds < 0:
            raise ValueError(f"trees, expansions, chains and keep must be at least 1, rounds at least 0, got {self}")

    async def grow(self, tree: GrowingTree) -> None:
        origins = range(self.trees)
        firsts = range(self.trees * self.chains)
        await tree.together(*(tree.rollout(tree.root, number, number // self.chains) for number in firsts))
        for round in range(self.rounds):
            if tree.out_of_time:
                break
            starts = [(origin, turn) for origin in origins for turn in self._starts(tree, origin, round)]
            number = max(tree.rollouts, default=-1) + 1
            await tree.together(*(tree.rollout(turn, number + i, of) for i, (of, turn) in enumerate(starts)))
        if self.keep is not None:
            for origin in origins:
                members = [number for number in sorted(tree.rollouts) if tree.origins[number] == origin]
                for number in random.Random(tree.seed("keep", origin)).sample(members, len(members))[self.keep :]:
                    del tree.rollouts[number]

    def _starts(self, tree: GrowingTree, origin: int, round: int) -> Sequence[Turn]:
        turns = tree.turns(origin)  # the prompt first
        inner = [turn for turn in turns if not turn.done]
        if self.choose == "uniform":
            return random.Random(tree.seed("expand", origin, round)).choices(inner, k=self.expansions)
        siblings = Counter(id(turn.parent) for turn in turns)
        ranked = sorted(inner, key=lambda turn: -self._unsureness(turn, siblings[id(turn.parent)] - 1))
        return [(ranked[i % len(ranked)].parent or tree.root) for i in range(self.expansions)]

    def _unsureness(self, turn: Turn, siblings: int) -> float:
        if turn.node is None:  # the prompt
            return 0.0
        logprobs = turn.node.action.logprobs
        return -math.fsum(logprobs) / max(len(logprobs), 1) - self.crowding * siblings


@dataclass(frozen=True, slots=True)
class Budgeted:
    """Another strategy, played on the same prompt with new seeds until its rounds together reach one of the limits.

    A reply counts each time it is given, even where a sibling gave the same one. The last round may exceed the limit.
    """

    strategy: RolloutStrategy
    leaves: int | None = None
    sampled_tokens: int | None = None
    prefill_tokens: int | None = None
    tool_calls: int | None = None

    def __post_init__(self) -> None:
        if not self.limits:
            raise ValueError("a limit is needed: leaves, sampled_tokens, prefill_tokens or tool_calls")
        if min(self.limits.values()) < 1:
            raise ValueError(f"limits must be at least 1, got {self.limits}")

    @property
    def limits(self) -> dict[str, int]:
        names = ("leaves", "sampled_tokens", "prefill_tokens", "tool_calls")
        return {name: limit for name in names if (limit := getattr(self, name)) is not None}

    async def grow(self, tree: GrowingTree) -> None:
        begun = self._counted(tree)
        before, idle, round = begun, 0, 0
        while idle < MAX_IDLE and not (round and tree.out_of_time):
            await tree.grow_more(self.strategy, round)
            now = self._counted(tree)
            if any(now[name] - begun[name] >= limit for name, limit in self.limits.items()):
                break
            before, idle, round = now, idle + 1 if now == before else 0, round + 1

    def _counted(self, tree: GrowingTree) -> dict[str, int]:
        cost = tree.cost
        every = {
            "leaves": cost.leaves,
            "sampled_tokens": cost.sampled_tokens + cost.repeated_tokens,
            "prefill_tokens": cost.prefill_tokens,
            "tool_calls": cost.tool_calls + cost.repeated_calls,
        }
        return {name: every[name] for name in self.limits}
