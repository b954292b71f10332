"""Laws of every advantage estimator, and brute force over small trees."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

import numpy as np
import pytest

from treegym.agents import ROOT, Completion, Node, RolloutTree
from treegym.envs import Task
from treegym.trainers import AdvantageEstimator, gigpo
from treegym.trainers.advantages import (
    AnchorStates,
    BackedUp,
    BestOnly,
    GroupedGAE,
    GroupRelative,
    HistoryAnchors,
    Norm,
    PrefixGroups,
    SharedMean,
    Sum,
    SummedLeaves,
    TokenReturns,
    Whitened,
    bi_level_gae,
    gae,
)

COMPARING: list[AdvantageEstimator] = [  # they give nothing where all rollouts earn the same
    GroupRelative(),
    GroupRelative(Norm(divide=False), baseline="others"),
    GroupRelative(baseline="length"),
    GroupRelative(per="turn"),
    GroupRelative(within="origin"),
    BestOnly(),
    SharedMean(GroupRelative()),
    BackedUp(),
    BackedUp("leaves", "parent"),
    SummedLeaves(),
    PrefixGroups(),
]
ESTIMATORS: list[AdvantageEstimator] = [
    *COMPARING,
    AnchorStates(),
    AnchorStates(similarity=0.9),
    GroupedGAE(),
    HistoryAnchors(),
    TokenReturns(0.9),
    Whitened(TokenReturns()),
    gigpo().advantage,
]


def random_tree(seed: int, *, chains: bool = False, equal: bool = False) -> RolloutTree:
    """Forks at the first, inner and last turns, states that are visited again, a rollout that occurs twice."""
    rng = random.Random(seed)
    nodes: list[Node] = []
    leaves: list[int] = []

    def grow(parent: int, depth: int) -> None:
        for _ in range(1 if chains and depth else rng.choice([1, 2, 3]) + (parent == ROOT)):
            tokens = tuple(rng.randrange(50) for _ in range(rng.randint(seed % 2, 4)))  # some replies are empty
            logprobs = tuple(-rng.random() for _ in tokens)
            last = depth == 3 or rng.random() < 0.25
            reward = 1.0 if equal and last else rng.choice([0.0, 0.5, 1.0]) if last else 0.0
            action = Completion("", tokens, logprobs)
            nodes.append(Node(parent, action, (1,), reward=reward, terminated=last, state_key=rng.choice("abc")))
            if last:
                leaves.append(len(nodes) - 1)
            else:
                grow(len(nodes) - 1, depth + 1)

    grow(ROOT, 0)
    leaves.append(leaves[0])
    return RolloutTree(Task("none", 0), (0,), (), tuple(nodes), tuple(leaves), state_key="a")


def flat(turns: Sequence[object]) -> list[float]:
    return [float(x) for turn in turns for x in np.ravel(np.asarray(turn, dtype=float))]


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
def test_every_turn_has_an_advantage_whatever_the_order_of_the_rollouts(estimator: AdvantageEstimator) -> None:
    for seed in range(8):
        tree = random_tree(seed)
        [found] = estimator([tree])
        assert [len(turns) for turns in found] == [len(path) for path in tree.paths]
        assert np.isfinite([x for turns in found for x in flat(turns)]).all()
        order = random.Random(seed).sample(range(len(tree.leaves)), len(tree.leaves))
        origins = [tree.origins or tuple(range(len(tree.leaves)))][0]
        shuffled = replace(tree, leaves=tuple(tree.leaves[i] for i in order), origins=tuple(origins[i] for i in order))
        if isinstance(estimator, BestOnly):  # of equal best rollouts one stands for all
            continue
        if getattr(estimator, "similarity", 1) < 1:  # clusters form in order of appearance
            continue
        for place, rollout in enumerate(order):
            assert flat(estimator([shuffled])[0][place]) == pytest.approx(flat(found[rollout]), abs=1e-9)


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
def test_the_names_of_nodes_do_not_matter(estimator: AdvantageEstimator) -> None:
    """Any order of the nodes in which parents come first is the same tree."""
    for seed in range(8):
        tree, rng = random_tree(seed), random.Random(seed)
        order: list[int] = []
        while len(order) < len(tree.nodes):
            ready = [i for i, n in enumerate(tree.nodes) if i not in order and n.parent in (ROOT, *order)]
            order.append(rng.choice(ready))
        name = {old: new for new, old in enumerate(order)} | {ROOT: ROOT}
        nodes = tuple(replace(tree.nodes[old], parent=name[tree.nodes[old].parent]) for old in order)
        renamed = replace(tree, nodes=nodes, leaves=tuple(name[leaf] for leaf in tree.leaves))
        for found, expected in zip(estimator([renamed])[0], estimator([tree])[0], strict=True):
            assert flat(found) == pytest.approx(flat(expected), abs=1e-9)


@pytest.mark.parametrize("estimator", COMPARING, ids=str)
def test_equal_returns_leave_nothing_to_learn(estimator: AdvantageEstimator) -> None:
    for seed in range(4):
        [found] = estimator([random_tree(seed, equal=True)])
        assert [x for turns in found for x in flat(turns)] == pytest.approx([0] * sum(map(len, found)), abs=1e-12)


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
def test_a_lone_rollout(estimator: AdvantageEstimator) -> None:
    nodes = (Node(ROOT, Completion("", (1, 2), (-1.0, -1.0))), Node(0, Completion("", (3,), (-1.0,)), reward=1.0))
    [[turns]] = estimator([RolloutTree(Task("none", 0), (0,), (), nodes, (1,))])
    assert len(turns) == 2 and np.isfinite(flat(turns)).all()


def test_a_group_of_chains_is_plain_grpo() -> None:
    """On chains the tree's estimators that compare whole returns have nothing else to compare."""
    for seed in range(4):
        tree = random_tree(seed, chains=True)
        returns = np.array(tree.returns)
        plain = (returns - returns.mean()) / (returns.std(ddof=1) + 1e-6)
        [found] = GroupRelative()([tree])
        assert [turns[0] for turns in found] == pytest.approx(plain.tolist())
        assert sum(plain) == pytest.approx(0, abs=1e-9)


def test_shared_turns_have_the_mean_of_the_rollouts_through_them() -> None:
    """Brute force; and the sum over a node's rollouts, which is its gradient while nothing is clipped, stays."""
    for seed in range(6):
        tree = random_tree(seed)
        [soft], [hard] = GroupRelative()([tree]), SharedMean(GroupRelative())([tree])
        for rollout, path in enumerate(tree.paths):
            for turn, node in enumerate(path):
                through = [soft[r][p.index(node)] for r, p in enumerate(tree.paths) if node in p]
                assert hard[rollout][turn] == pytest.approx(fmean(map(float, through)))


def test_values_backed_up_through_leaves_are_means_over_the_leaves_below() -> None:
    for seed in range(6):
        tree = random_tree(seed)
        norm = Norm(ddof=0)(tree.returns)
        [found] = BackedUp("leaves")([tree])
        for rollout, path in enumerate(tree.paths):
            for turn, node in enumerate(path):
                below = [value for value, p in zip(norm, tree.paths, strict=True) if node in p]
                assert found[rollout][turn] == pytest.approx(fmean(below))


def test_anchor_states_compare_turns_of_one_state_only() -> None:
    """By hand: two rollouts pass state s at different turns; their discounted returns there are 0.5 and 0."""

    def node(parent: int, token: int, reward: float, state: str) -> Node:
        return Node(parent, Completion("", (token,), (-1.0,)), reward=reward, state_key=state)

    nodes = (
        node(ROOT, 1, 0, "s"),
        node(0, 2, 1, "end"),
        node(ROOT, 3, 0, "t"),
        node(2, 4, 0, "s"),
        node(3, 5, 0, "end"),
    )
    tree = RolloutTree(Task("none", 0), (0,), (), nodes, (1, 4), state_key="start")
    [found] = AnchorStates(0.5, Norm(divide=False))([tree])
    assert found == [[0.25, 0.5], [-0.25, 0.0, -0.5]]


def test_an_invalid_turn_pays_for_itself_only() -> None:
    nodes = (
        Node(ROOT, Completion("", (1,), (-1.0,)), state_key="s", info={"malformed": 1}),
        Node(0, Completion("", (2,), (-1.0,)), reward=1.0),
        Node(ROOT, Completion("", (3,), (-1.0,)), state_key="s"),
        Node(2, Completion("", (4,), (-1.0,)), reward=1.0),
    )
    tree = RolloutTree(Task("none", 0), (0,), (), nodes, (1, 3), state_key="start")
    [found] = AnchorStates(1.0, Norm(divide=False), invalid_penalty=0.1)([tree])
    assert flat(found[0]) == pytest.approx([-0.05, 0]) and flat(found[1]) == pytest.approx([0.05, 0])


def test_sums_weigh_their_parts() -> None:
    tree = random_tree(3)
    [whole] = Sum((2.0, GroupRelative()), (-0.5, TokenReturns(0.9)))([tree])
    [first], [second] = GroupRelative()([tree]), TokenReturns(0.9)([tree])
    for turns, a, b in zip(whole, first, second, strict=True):
        for got, x, y in zip(turns, a, b, strict=True):
            assert np.ravel(got).tolist() == pytest.approx(np.ravel(2.0 * x - 0.5 * np.asarray(y)).tolist())


def test_gae_without_decay_is_the_return_above_the_state_s_mean() -> None:
    for seed in range(5):
        trees = [random_tree(seed)]
        plain = GroupedGAE(0.95, 1.0, Norm(divide=False))(trees)[0]
        anchored = AnchorStates(0.95, Norm(divide=False))(trees)[0]
        mean = fmean(flat(anchored))
        assert flat(plain) == pytest.approx([x - mean for x in flat(anchored)])


def test_gae_by_hand() -> None:
    """arXiv:1506.02438 eq. 16 with discount 0.5 and lambda 0.5: each advantage is delta + 0.25 times the next one."""
    deltas = [0.0 + 0.5 * 2 - 1, 1.0 + 0.5 * 4 - 2, 8.0 - 4]
    last = deltas[2]
    middle = deltas[1] + 0.25 * last
    first = deltas[0] + 0.25 * middle
    advantages, returns = gae([0.0, 1.0, 8.0], [1.0, 2.0, 4.0], 0.5, 0.5)
    assert advantages == [first, middle, last] and returns == [first + 1, middle + 2, last + 4]


def test_bi_level_gae_with_a_turn_a_token_is_gae_over_turns_twice() -> None:
    """Every token is a turn: a token's advantage is what its turn's return is above its value."""
    rewards, values = [0.5, 0.0, 1.0], [0.1, 0.4, 0.3]
    _, turns = gae(rewards, values, 0.9, 0.8)
    advantages, returns = bi_level_gae(rewards, values, [0, 1, 2], 1.0, 0.8, 0.9)
    assert returns == pytest.approx(turns)
    assert advantages == pytest.approx([r - v for r, v in zip(turns, values, strict=True)])
