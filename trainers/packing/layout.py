"""Packing: the trees of a batch as one sequence of unique tokens, and the terms of their loss.

Every unique token goes through the model once, attention sees ancestors only, positions are depths.
A loss sees the rollouts written out, one term per rollout and sampled token; terms of shared tokens
read the same log-probability. So any loss is exact, whatever it does with a term.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from ..agents import ROOT, Advantages, RolloutTree
from ..agents.inference.attention import (
    BLOCK,
    Block,
    block_attention,
    block_gradients,
    causal_attention,
    flexible_attention,
    runs_flexible,
)

Aggregation = Callable[[Sequence[int]], list[float]]  # sampled tokens of each rollout -> weight of each of its terms


@dataclass(frozen=True, slots=True)
class ScoredTree:
    """A tree and what its loss needs: an advantage and a weight for the terms of every rollout's turns."""

    tree: RolloutTree
    advantages: Advantages
    weights: Sequence[float]  # [rollout], of each of its terms
    numbers: Sequence[int]  # [rollout], among all rollouts of the batch, those that are left out included

    @property
    def num_unique_tokens(self) -> int:
        used = {node for path in self.tree.paths for node in path}
        nodes = [self.tree.nodes[i] for i in used]
        return len(self.tree.prompt) + sum(len(n.action.token_ids) + len(n.observation) for n in nodes)

    def only(self, rollouts: Sequence[int]) -> ScoredTree:
        """The same with some of the rollouts."""
        leaves = tuple(self.tree.leaves[i] for i in rollouts)
        return ScoredTree(
            replace(self.tree, leaves=leaves, origins=()),
            [self.advantages[i] for i in rollouts],
            [self.weights[i] for i in rollouts],
            [self.numbers[i] for i in rollouts],
        )


@dataclass(frozen=True, slots=True)
class Terms:
    """One entry per rollout and sampled token, rollouts written out one after the other; all tensors are [N].

    `extras` has the columns that a loss `needs` by name: "reference", nats, under the reference weights; "entropy",
    nats, of the present distribution, with its gradient; and those that the user gave the learner.
    """

    logprob: Tensor  # index of the term's prediction
    rollout: Tensor  # number of the rollout within the batch
    turn: Tensor  # number of the turn within the rollout
    advantage: Tensor  # float
    old_logprob: Tensor  # float, nats, when sampled; NaN where it was not recorded
    weight: Tensor  # float, in the sum that is the loss
    extras: Mapping[str, Tensor] = field(default_factory=dict)

    def column(self, name: str) -> Tensor:
        """What a loss `needs` by this name."""
        return self.old_logprob if name in ("sampled", "old") else self.extras[name]

    def to(self, device: torch.device) -> Terms:
        return Terms(
            self.logprob.to(device),
            self.rollout.to(device),
            self.turn.to(device),
            self.advantage.to(device),
            self.old_logprob.to(device),
            self.weight.to(device),
            {name: column.to(device) for name, column in self.extras.items()},
        )


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of packed tokens, which also sees these earlier segments."""

    length: int
    ancestors: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Pack:
    """U unique tokens, P predictions (a token said after a prefix), N terms."""

    tokens: Tensor  # [U]
    positions: Tensor  # [U], depth in the tree
    segments: tuple[Segment, ...]
    rows: Tensor  # [R], packed tokens whose logits are needed
    row: Tensor  # [P], index into rows
    target: Tensor  # [P], the token predicted
    terms: Terms

    def to(self, device: torch.device) -> Pack:
        return Pack(
            self.tokens.to(device),
            self.positions.to(device),
            self.segments,
            self.rows.to(device),
            self.row.to(device),
            self.target.to(device),
            self.terms.to(device),
        )


class _Packer:
    """Lays tokens out depth first; a run of turns without a fork is one segment."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.positions: list[int] = []
        self.segments: list[Segment] = []
        self.predictions: list[tuple[int, int]] = []  # (packed token, token predicted after it)
        self.terms: list[tuple[int, int, int, float, float, float]] = []

    def put(self, tokens: Sequence[int], depth: int) -> int:
        """Appends tokens; their packed index."""
        start = len(self.tokens)
        self.tokens.extend(tokens)
        self.positions.extend(range(depth, depth + len(tokens)))
        return start

    def close(self, start: int, ancestors: tuple[int, ...]) -> tuple[int, ...]:
        """Ends the segment that began at start; what its children see."""
        if len(self.tokens) == start:
            return ancestors
        self.segments.append(Segment(len(self.tokens) - start, ancestors))
        return (*ancestors, len(self.segments) - 1)

    def add(self, scored: ScoredTree, shared: int, ancestors: tuple[int, ...]) -> None:
        """Lays out a tree whose first `shared` prompt tokens are in the given ancestors."""
        tree = scored.tree
        children: dict[int, list[int]] = {}
        for node in sorted({node for path in tree.paths for node in path}):
            children.setdefault(tree.nodes[node].parent, []).append(node)
        first: dict[int, int] = {}  # node -> its first prediction

        def lay(node: int, previous: int, depth: int) -> int:
            first[node] = len(self.predictions)
            action, observation = tree.nodes[node].action.token_ids, tree.nodes[node].observation
            inputs = action + observation if node in children else action[:-1]  # nothing follows a leaf's last token
            start = self.put(inputs, depth)
            before = [previous, *range(start, start + len(action) - 1)]  # each token is predicted at the one before it
            self.predictions += zip(before[: len(action)], action, strict=True)
            return depth + len(inputs)

        def grow(node: int, begin: int, depth: int, ancestors: tuple[int, ...]) -> None:
            while len(following := children.get(node, [])) == 1:
                node = following[0]
                depth = lay(node, len(self.tokens) - 1, depth)
            seen = self.close(begin, ancestors)
            previous = len(self.tokens) - 1
            for child in following:
                begin = len(self.tokens)
                grow(child, begin, lay(child, previous, depth), seen)

        grow(ROOT, self.put(tree.prompt[shared:], shared), len(tree.prompt), ancestors)
        rows = zip(tree.paths, scored.advantages, scored.weights, scored.numbers, strict=True)
        for path, advantages, weight, rollout in rows:
            for turn, (node, advantage) in enumerate(zip(path, advantages, strict=True)):
                action = tree.nodes[node].action
                old = action.logprobs or (math.nan,) * len(action.token_ids)
                each = np.broadcast_to(advantage, len(old)).tolist()
                for token, (logprob, own) in enumerate(zip(old, each, strict=True)):
                    self.terms.append((first[node] + token, rollout, turn, own, logprob, weight))


def pack(batch: Sequence[ScoredTree], dtype: torch.dtype = torch.float32) -> Pack:
    """One sequence for all trees; what all prompts begin with is laid out once. `dtype` is the terms' float type."""
    packer = _Packer()
    prompts = [scored.tree.prompt for scored in batch]
    shared = len(os.path.commonprefix(prompts)[: min(map(len, prompts)) - 1]) if len(batch) > 1 else 0
    packer.put(prompts[0][:shared], 0)
    ancestors = packer.close(0, ())
    for scored in batch:
        packer.add(scored, shared, ancestors)
    after = torch.tensor([row for row, _ in packer.predictions], dtype=torch.long)
    rows, row = torch.unique(after, return_inverse=True)
    prediction, rollout, turn, advantage, old, weight = zip(*packer.terms, strict=True)
    return Pack(
        tokens=torch.tensor(packer.tokens),
        positions=torch.tensor(packer.positions),
        segments=tuple(packer.segments),
        rows=rows,
        row=row,
        target=torch.tensor([token for _, token in packer.predictions]),
        terms=Terms(
            torch.tensor(prediction),
            torch.tensor(rollout),
            torch.tensor(turn),
            torch.tensor(advantage, dtype=dtype),
            torch.tensor(old, dtype=dtype),
            torch.tensor(weight, dtype=dtype),
        ),
    )


def score(
    batch: Sequence[tuple[RolloutTree, Advantages]], aggregation: Aggregation, *, keep_zeros: bool = False
) -> list[ScoredTree]:
    """Weights every rollout as the aggregation of the whole batch says.

    Rollouts without sampled tokens are then left out, and those whose advantages are all zero, for they have no
    gradient, unless `keep_zeros`.
    """
    lengths = [[sum(len(tree.nodes[i].action.token_ids) for i in path) for path in tree.paths] for tree, _ in batch]
    weights = iter(aggregation([n for tree in lengths for n in tree]))
    numbers = itertools.count()
    scored = []
    for (tree, advantages), tokens in zip(batch, lengths, strict=True):
        whole = ScoredTree(tree, advantages, [next(weights) for _ in tokens], [next(numbers) for _ in tokens])
        moving = [i for i, n in enumerate(tokens) if n and (keep_zeros or any(map(np.any, advantages[i])))]
        scored.append(whole.only(moving))
    return [s for s in scored if s.tree.leaves]


def check_recorded(batch: Sequence[ScoredTree], reader: str) -> None:
    """ValueError where a turn has no log-probabilities that `reader`, the name of a loss, could compare with."""
    for scored in batch:
        tree = scored.tree
        for turn, action in ((turn, tree.nodes[i].action) for path in tree.paths for turn, i in enumerate(path)):
            if action.token_ids and not action.logprobs:
                raise ValueError(
                    f"{tree.task.env}, seed {tree.task.seed}: turn {turn + 1} of a rollout has no log-probabilities, "
                    f"which {reader} compares with: it was not sampled (an oracle's), or its sampler recorded none (a "
                    "chat server's); train it with a loss that reads none, such as ReinforceLoss"
                )


def split(batch: Sequence[ScoredTree], max_tokens: int) -> list[list[ScoredTree]]:
    """Groups of at most max_tokens unique tokens, in order. A larger tree is parted between its rollouts;
    a larger rollout stands alone."""
    groups: list[list[ScoredTree]] = []
    room = 0
    for scored in batch:
        size = scored.num_unique_tokens
        rollouts = range(len(scored.tree.leaves))
        half = len(rollouts) // 2
        shared = _shared(groups[-1][0], scored) if groups else 0
        if size > max_tokens and half:
            groups += split([scored.only(rollouts[:half]), scored.only(rollouts[half:])], max_tokens)
            room = 0
        elif size - shared <= room:
            groups[-1].append(scored)
            room -= size - shared
        else:
            groups.append([scored])
            room = max_tokens - size
    return groups


def _shared(a: ScoredTree, b: ScoredTree) -> int:
    """Tokens that both prompts begin with."""
    return len(os.path.commonprefix([a.tree.prompt, b.tree.prompt]))


class TreeAttend:
    """Attention of packed tokens to their own segment's past and to all of its ancestors.

    It runs on a CPU by blocks of queries, on CUDA by FlexAttention, and elsewhere segment by segment.
    """

    def __init__(self, segments: Sequence[Segment]) -> None:
        self._segments = segments
        self._mask: BlockMask | None = None

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        if query.device.type == "cpu":
            return block_attention(query, key, value, scale, self._blocks)
        if runs_flexible(query):
            if self._mask is None:
                self._mask = tree_mask(self._segments, query.device)
            return flexible_attention(query, key, value, scale, self._mask)
        return self._by_segment(query, key, value, scale)

    def gradients(
        self, gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float | None
    ) -> Sequence[Tensor]:
        """Those of query, key and value, all of one dtype, from the gradient of what came of them; on a CPU."""
        return block_gradients(gradient, query, key, value, scale, self._blocks)

    @cached_property
    def _blocks(self) -> list[Block]:
        return blocks_of(self._segments)

    def _by_segment(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        lengths = [segment.length for segment in self._segments]
        queries, keys, values = (torch.split(x, lengths, dim=1) for x in (query, key, value))
        out = []
        for number, segment in enumerate(self._segments):
            seen = (*segment.ancestors, number)
            seen_keys, seen_values = (torch.cat([x[i] for i in seen], dim=1) for x in (keys, values))
            out.append(causal_attention(queries[number], seen_keys, seen_values, scale))
        return torch.cat(out, dim=1)


def tree_mask(segments: Sequence[Segment], device: torch.device) -> BlockMask:
    """What FlexAttention shows: token q sees token k where k <= q < until[k], until as last_seers has it."""
    until = last_seers(segments).to(device)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < until[key])

    return create_block_mask(sees, None, None, len(until), len(until), device)


def last_seers(segments: Sequence[Segment]) -> Tensor:
    """For each token [T], the end (exclusive) of the run of tokens that attend to it: tokens i to until[i] - 1 see i.

    ValueError where segments are not laid out depth first.
    """
    ends = np.cumsum([segment.length for segment in segments]).tolist()
    last, below = list(range(len(segments))), [0] * len(segments)
    for number, segment in enumerate(segments):
        for ancestor in segment.ancestors:
            last[ancestor], below[ancestor] = number, below[ancestor] + 1
    if any(last[n] - n != below[n] for n in range(len(segments))):
        raise ValueError("segments must be laid out depth first")
    lengths = torch.tensor([segment.length for segment in segments])
    return torch.tensor([ends[n] for n in last]).repeat_interleave(lengths)


def blocks_of(segments: Sequence[Segment]) -> list[Block]:
    """Short segments that follow each other in one block, long ones in several: a block is up to BLOCK queries."""
    starts = np.cumsum([0, *(segment.length for segment in segments)]).tolist()
    groups: list[list[int]] = []
    room = 0
    for number, segment in enumerate(segments):
        if segment.length > room:
            groups.append([])
            room = BLOCK
        groups[-1].append(number)
        room -= segment.length
    return [
        _block(segments, starts, group, start, min(start + BLOCK, starts[group[-1] + 1]))
        for group in groups
        for start in range(starts[group[0]], starts[group[-1] + 1], BLOCK)
    ]


def _block(segments: Sequence[Segment], starts: Sequence[int], group: Sequence[int], start: int, end: int) -> Block:
    """The queries from start to end, which are of these segments."""
    runs: list[slice] = []
    for number in sorted({*group, *(ancestor for one in group for ancestor in segments[one].ancestors)}):
        begin, stop = starts[number], min(starts[number + 1], end)
        if runs and runs[-1].stop == begin:
            runs[-1] = slice(runs[-1].start, stop)
        else:
            runs.append(slice(begin, stop))
    places = torch.cat([torch.arange(run.start, run.stop) for run in runs])
    segment_of = torch.bucketize(places, torch.tensor(starts[1:]), right=True)
    seen = places <= torch.arange(start, end)[:, None]
    for number in group:
        rows = slice(max(starts[number], start) - start, starts[number + 1] - start)
        seen[rows] &= torch.isin(segment_of, torch.tensor([number, *segments[number].ancestors]))
    hidden = ~seen
    first = int(hidden.any(0).int().argmax()) if hidden.any() else len(places)  # all see what is before it
    mask = torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf"))[:, first:].contiguous()
    return Block(slice(start, end), tuple(runs), mask)
