"""Packing: the trees of a batch laid out as one sequence of unique tokens.

Every unique token goes through the model once, attention sees ancestors only, positions are depths.
A loss sees the rollouts written out, one term per rollout and sampled token; terms of shared tokens
read the same log-probability. So any loss is exact, whatever it does with a term.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...agents import ROOT
from .terms import ScoredTree, Terms


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of packed tokens. Each sees the ones before it in the run, and all tokens of the ancestors."""

    length: int
    ancestors: tuple[int, ...] = ()  # numbers of earlier segments


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
        """Appends tokens; the packed index of the first."""
        start = len(self.tokens)
        self.tokens.extend(tokens)
        self.positions.extend(range(depth, depth + len(tokens)))
        return start

    def close(self, start: int, ancestors: tuple[int, ...]) -> tuple[int, ...]:
        """Ends the segment that began at `start`. Returns the ancestors of the segments that follow it in the tree."""
        if len(self.tokens) == start:
            return ancestors
        self.segments.append(Segment(len(self.tokens) - start, ancestors))
        return (*ancestors, len(self.segments) - 1)

    def add(self, scored: ScoredTree, shared: int, ancestors: tuple[int, ...]) -> None:
        """Lays out a tree. The first `shared` tokens of its prompt are there already, in the segments `ancestors`."""
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
    """One sequence for all trees. What all prompts begin with is laid out once. The terms have the `dtype`."""
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


def split(batch: Sequence[ScoredTree], max_tokens: int) -> list[list[ScoredTree]]:
    """The trees in order, in groups of at most `max_tokens` unique tokens.

    A larger tree is parted between its rollouts; a larger rollout has a group of its own.
    """
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
    """How many tokens both prompts begin with."""
    return len(os.path.commonprefix([a.tree.prompt, b.tree.prompt]))
