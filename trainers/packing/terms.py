"""Terms: what a loss reads of a batch, one for each rollout and sampled token; and what each of them weighs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from ...agents import Advantages, RolloutTree

Aggregation = Callable[[Sequence[int]], list[float]]  # sampled tokens of each rollout -> weight of each of its terms


@dataclass(frozen=True, slots=True)
class ScoredTree:
    """A tree and what its loss needs: an advantage and a weight for the terms of every rollout's turns."""

    tree: RolloutTree
    advantages: Advantages
    weights: Sequence[float]  # [rollout], of each of its terms
    numbers: Sequence[int]  # [rollout], counted over all rollouts of the batch, also those that are left out

    @property
    def num_unique_tokens(self) -> int:
        """The tokens of the prompt and of every turn on the way to a leaf, each counted once."""
        used = {node for path in self.tree.paths for node in path}
        nodes = [self.tree.nodes[i] for i in used]
        return len(self.tree.prompt) + sum(len(n.action.token_ids) + len(n.observation) for n in nodes)

    def only(self, rollouts: Sequence[int]) -> ScoredTree:
        """The same tree with these rollouts alone."""
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
    nats, of the present distribution, with its gradient; and the columns that the user gave the learner.
    """

    logprob: Tensor  # index of the term's prediction
    rollout: Tensor  # number of the rollout within the batch
    turn: Tensor  # number of the turn within the rollout
    advantage: Tensor  # float
    old_logprob: Tensor  # float, nats, when sampled; NaN where it was not recorded
    weight: Tensor  # float, in the sum that is the loss
    extras: Mapping[str, Tensor] = field(default_factory=dict)

    def column(self, name: str) -> Tensor:
        """The column that a loss `needs` by this name."""
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


def score(
    batch: Sequence[tuple[RolloutTree, Advantages]], aggregation: Aggregation, *, keep_zeros: bool = False
) -> list[ScoredTree]:
    """Weights every rollout as the aggregation says for the whole batch, then leaves some rollouts out.

    A rollout without sampled tokens is left out. So is one whose advantages are all zero, because it has no gradient,
    unless `keep_zeros`.
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
