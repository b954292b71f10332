"""Advantages and losses give the numbers of the public reference implementations."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from treegym.agents import ROOT, Completion, Node, RolloutTree
from treegym.agents.policies.sampler import entropy
from treegym.agents.rollouts import EntropyBranching, normalized_entropy
from treegym.envs import Message, Task
from treegym.trainers import AdvantageEstimator, Advantages, PolicyLoss, Terms
from treegym.trainers.advantages import (
    AnchorStates,
    BackedUp,
    BestOnly,
    GroupRelative,
    HistoryAnchors,
    Norm,
    PrefixGroups,
    Sum,
    SummedLeaves,
    TokenReturns,
    Whitened,
    anchors,
    bi_level_gae,
    gae,
)
from treegym.trainers.losses import AGGREGATIONS, CispoLoss, ClippedLoss, GeometricLoss, kl

FILE = Path(__file__).parent.parent.parent / "shared" / "golden" / "vectors.json"


@cache
def vectors() -> dict[str, Any]:
    return {record["name"]: record for record in json.loads(FILE.read_text())}


def golden(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Inputs and outputs of a record."""
    if not FILE.is_file():
        pytest.skip("the golden vectors lie beside the repository, in ../shared/golden; there are none here")
    record = vectors()[name]
    return record["inputs"], record["outputs"]


def close(expected: Any) -> Any:
    return pytest.approx(expected, rel=1e-5, abs=1e-6)


def loss_of(
    loss: PolicyLoss, old: Sequence[Sequence[float]], new: Sequence[Sequence[float]], advantages: Any, mask: Any
) -> tuple[float, list[list[float]]]:
    """Batch loss and its gradient by the masked tokens of each rollout, as the learner sums them."""
    rows = [[i for i, kept in enumerate(row) if kept] for row in mask]
    places = [(r, i) for r, row in enumerate(rows) for i in row]
    weights = AGGREGATIONS[loss.aggregation]([len(row) for row in rows])

    def column(values: Any) -> Tensor:
        return torch.tensor([values[r][i] for r, i in places], dtype=torch.float64)

    index = torch.arange(len(places))
    rollout = torch.tensor([r for r, _ in places])
    gaps = [sum(not kept for kept in mask[r][:i]) for r, i in places]  # a turn is a run of sampled tokens
    turn = torch.tensor([sorted(set(gaps)).index(gap) for gap in gaps])
    weight = torch.tensor([weights[r] for r, _ in places], dtype=torch.float64)
    logprobs = column(new).requires_grad_()
    value = (loss(logprobs, Terms(index, rollout, turn, column(advantages), column(old), weight)) * weight).sum()
    value.backward()
    assert logprobs.grad is not None
    gradient = iter(logprobs.grad.tolist())
    return value.item(), [[next(gradient) if kept else 0.0 for kept in row] for row in mask]


def masked(values: Any, mask: Any) -> list[float]:
    """The values of sampled tokens, one row after the other."""
    return [x for row, kept in zip(values, mask, strict=True) for x, k in zip(row, kept, strict=True) if k]


Turn = tuple[float, int, str, str, float]  # reward, tokens, state and situation before it, surprise


def tree_of(rollouts: Sequence[Sequence[Turn]], origins: Sequence[int] = ()) -> RolloutTree:
    """A tree of chains from the root."""
    nodes: list[Node] = []
    leaves = []
    for rollout in rollouts:
        parent = ROOT
        for turn, (reward, tokens, _, _, surprise) in enumerate(rollout):
            after = rollout[turn + 1] if turn + 1 < len(rollout) else (0.0, 0, "end", "end", 0.0)
            action = Completion("", (7,) * tokens, (-surprise,) * tokens)
            told = (Message("tool", after[3]),)
            nodes.append(Node(parent, action, messages=told, reward=reward, state_key=after[2]))
            parent = len(nodes) - 1
        leaves.append(parent)
    first = rollouts[0][0]
    start = (Message("user", first[3]),)
    return RolloutTree(Task("none", 0), (0,), start, tuple(nodes), tuple(leaves), tuple(origins), state_key=first[2])


def by_token(trees: Sequence[RolloutTree], advantages: Sequence[Advantages]) -> list[list[list[float]]]:
    """[tree][rollout][token]."""
    return [
        [
            [
                x
                for node, advantage in zip(path, turns, strict=True)
                for x in np.broadcast_to(advantage, len(tree.nodes[node].action.token_ids)).tolist()
            ]
            for path, turns in zip(tree.paths, rollouts, strict=True)
        ]
        for tree, rollouts in zip(trees, advantages, strict=True)
    ]


def groups(keys: Sequence[str]) -> list[list[int]]:
    return [[i for i, key in enumerate(keys) if key == wanted] for wanted in dict.fromkeys(keys)]


def one_turn(estimator: AdvantageEstimator, inputs: Any, origins: Sequence[str] | None = None) -> list[float]:
    """Advantages of sampled tokens, where every row is a rollout of one turn."""
    members = groups(inputs["index"] if "index" in inputs else inputs["uid"])
    rewards, masks = inputs["token_level_rewards"], inputs["response_mask"]
    trees = [
        tree_of(
            [[(sum(rewards[i]), int(sum(masks[i])), "s", "s", 0.0)] for i in rows],
            [sorted(set(origins)).index(origins[i]) for i in rows] if origins else (),
        )
        for rows in members
    ]
    found = by_token(trees, estimator(trees))
    rows = (i for group in members for i in group)
    by_row = dict(zip(rows, (scores for tree in found for scores in tree), strict=True))
    return [x for i in sorted(by_row) for x in by_row[i]]


def by_step(
    estimator: AdvantageEstimator, inputs: Any, rewards: Sequence[float], monkeypatch: pytest.MonkeyPatch
) -> list[float]:
    """Advantages of rows that are turns; a trajectory of the vectors may begin anywhere, so states are looked up."""
    rows_of = {}
    trees, states = [], []
    for group in groups(inputs["index"]):
        rollouts = [[group[i] for i in rows] for rows in groups([inputs["traj_index"][i] for i in group])]
        tree = tree_of([[(rewards[i], 1, "", "", 0.0) for i in rollout] for rollout in rollouts])
        rows_of.update({(len(trees), r, t): i for r, rollout in enumerate(rollouts) for t, i in enumerate(rollout)})
        states.append([[inputs.get("anchor_obs", inputs["index"])[i] for i in rollout] for rollout in rollouts])
        trees.append(tree)
    known = {id(tree): table for tree, table in zip(trees, states, strict=True)}
    monkeypatch.setattr(anchors, "state", lambda tree, rollout, turn: known[id(tree)][rollout][turn])
    found = estimator(trees)
    scores = {row: found[tree][rollout][turn] for (tree, rollout, turn), row in rows_of.items()}
    return [float(scores[row]) for row in sorted(scores)]


def rewards_of(returns: Sequence[float], trajectories: Sequence[str], discount: float) -> list[float]:
    """The rewards that have these step returns."""
    after: dict[str, float] = {}
    rewards = list(returns)
    for i in reversed(range(len(returns))):
        rewards[i] = returns[i] - discount * after.get(trajectories[i], 0.0)
        after[trajectories[i]] = returns[i]
    return rewards


@pytest.mark.parametrize("name", ["verl/grpo", "verl/dr_grpo_adv"])
def test_verl_advantages(name: str) -> None:
    inputs, outputs = golden(name)
    estimator = GroupRelative(Norm(divide=inputs["norm_adv_by_std_in_grpo"], alone="raw"))
    if inputs["norm_adv_by_std_in_grpo"]:
        assert estimator == GroupRelative.verl() and estimator.norm.eps == inputs["epsilon"]
    assert one_turn(estimator, inputs) == close(masked(outputs["advantages"], inputs["response_mask"]))


@pytest.mark.parametrize(
    ("name", "estimator"),
    [
        ("verl/rloo", GroupRelative(Norm(divide=False, alone="raw"), baseline="others")),
        ("verl/opo", GroupRelative(Norm(divide=False, alone="raw"), baseline="length")),
        ("verl/grpo_passk", BestOnly()),
        ("verl/reinforce_plus_plus_gamma1.0", Whitened(TokenReturns())),
    ],
)
def test_verl_s_other_advantages(name: str, estimator: AdvantageEstimator) -> None:
    inputs, outputs = golden(name)
    assert one_turn(estimator, inputs) == close(masked(outputs["advantages"], inputs["response_mask"]))


def test_reinforce_plus_plus_carries_returns_over_observations() -> None:
    inputs, outputs = golden("verl/reinforce_plus_plus_gap_new")
    trees = [tree_of([[(0.0, 2, "", "", 0.0), (1.0, 2, "", "", 0.0)]]), tree_of([[(1.0, 4, "", "", 0.0)]])]
    assert inputs["response_mask"] == [[1, 1, 0, 0, 1, 1], [1, 1, 1, 1, 0, 0]]
    for estimator, values in (
        (TokenReturns(inputs["gamma"]), outputs["returns"]),
        (Whitened(TokenReturns(inputs["gamma"])), outputs["advantages"]),
    ):
        found = [x for [rollout] in by_token(trees, estimator(trees)) for x in rollout]
        assert found == close(masked(values, inputs["response_mask"]))


@pytest.mark.parametrize(
    ("part", "weights"), [("inter_tree", (1.0, 0.0)), ("intra_tree", (0.0, 1.0)), ("advantages", (1.0, 1.0))]
)
def test_tree_grpo(part: str, weights: tuple[float, float]) -> None:
    inputs, outputs = golden("tree_grpo/adv_tree")
    raw = Norm(alone="raw")
    estimator = Sum((weights[0], GroupRelative(raw)), (weights[1], GroupRelative(raw, within="origin")))
    expected = close(masked(outputs[part], inputs["response_mask"]))
    assert one_turn(estimator, inputs, inputs["tree_uid"]) == expected


def test_gigpo_step_returns() -> None:
    inputs, outputs = golden("gigpo/step_returns")
    for rows in groups(inputs["traj_uid"]):
        tree = tree_of([[(inputs["rewards"][i], 1, "", "", 0.0) for i in rows]])
        assert anchors.step_returns(tree, inputs["gamma"])[0] == close([outputs["returns"][i] for i in rows])


def test_gigpo_similar_states() -> None:
    inputs, outputs = golden("gigpo/step_groups_similarity_0.95")
    assert anchors.similar(inputs["anchor_obs"], inputs["similarity_thresh"]) == outputs["group_id_canonical"]


def test_gigpo(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, outputs = golden("gigpo/joint_mean_norm_w1.0")
    rewards = rewards_of(inputs["step_rewards"], inputs["traj_index"], 0.95)
    scores = [sum(row) for row in inputs["token_level_rewards"]]  # the episode's, on each of its rows
    last = {trajectory: i for i, trajectory in enumerate(inputs["traj_index"])}
    assert [rewards[i] for i in last.values()] == close([scores[i] for i in last.values()])
    plain = Norm(divide=False)
    estimator = Sum(
        (1.0, GroupRelative(Norm(divide=False, alone="raw"), per="turn")),
        (inputs["step_advantage_w"], AnchorStates(0.95, plain)),
    )
    found = by_step(estimator, inputs, rewards, monkeypatch)
    assert found == close([row[0] for row in outputs["advantages"]])


@pytest.mark.parametrize(
    ("name", "estimator"),
    [
        ("crossTrue_removestdTrue", GroupRelative(Norm(divide=False, alone="raw"), per="turn")),
        ("crossFalse_removestdFalse", GroupRelative(Norm(alone="raw"))),
    ],
)
def test_gigpo_s_episodes(name: str, estimator: AdvantageEstimator, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, outputs = golden(f"gigpo/episode_norm_{name}")
    scores = [sum(row) for row in inputs["token_level_rewards"]]
    last = {trajectory: i for i, trajectory in enumerate(inputs["traj_index"])}
    rewards = [score if i in last.values() else 0.0 for i, score in enumerate(scores)]
    found = by_step(estimator, inputs, rewards, monkeypatch)
    assert found == close([row[0] for row in outputs["advantages"]])


@pytest.mark.parametrize("name", ["filter_zero_2_mean_std_norm_1.0_False", "no_filter_zero_item"])
def test_hgpo(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, outputs = golden(f"hgpo/{name}")
    assert inputs["mode"] == "mean_std_norm" and not inputs["base_group"]
    estimator = HistoryAnchors(
        0.95, inputs["history_length"], inputs["length_weight_alpha"], keep_zeros=name.startswith("no_filter")
    )
    rewards = rewards_of(inputs["step_rewards"], inputs["traj_index"], 0.95)
    assert by_step(estimator, inputs, rewards, monkeypatch) == close(outputs["advantages"])


def branching(layout: Any) -> tuple[RolloutTree, dict[str, int]]:
    """A tree from {name: (parent, tokens, surprise, reward or None)}, and the node of each name."""
    number = {name: i for i, name in enumerate(layout)}
    nodes = [
        Node(number.get(parent, ROOT), Completion("", (i,) * tokens, (-surprise,) * tokens), reward=reward or 0.0)
        for i, (parent, tokens, surprise, reward) in enumerate(layout.values())
    ]
    leaves = [number[name] for name, (*_, reward) in layout.items() if reward is not None]
    return RolloutTree(Task("none", 0), (0,), (), tuple(nodes), tuple(leaves)), number


def by_name(estimator: AdvantageEstimator, tree: RolloutTree, number: dict[str, int]) -> dict[str, Any]:
    found = {}
    for path, turns in zip(tree.paths, estimator([tree])[0], strict=True):
        found |= dict(zip(path, turns, strict=True))
    return {name: found[node] for name, node in number.items()}


def test_at2po_node_values() -> None:
    _, outputs = golden("at2po/node_advantages")
    tree, number = branching(
        {
            "a": ("root", 3, 0.8, None), "b": ("root", 1, 0.2, 0.0), "c": ("root", 1, 0.5, None),
            "a1": ("a", 1, 0.4, 1.0), "a2": ("a", 1, 1.1, None), "c1": ("c", 1, 0.6, 0.0),
            "a21": ("a2", 1, 0.3, 1.0), "a22": ("a2", 1, 0.9, 0.0),
        }
    )  # fmt: skip
    backups: dict[str, Any] = {"child_softmax": "softmax", "child_mean": "children", "leaf_mean": "leaves"}
    credits: dict[str, Any] = {
        "node_value": "value", "diff_parent": "parent", "diff_global": "root", "diff_localglobal": "both"
    }  # fmt: skip
    for name, values in outputs.items():
        norm, backup, credit = name.split("/")
        if norm == "norm=1":
            found = by_name(BackedUp(backups[backup], credits[credit]), tree, number)
            assert found == close({node: value for node, value in values.items() if node != "root"}), name


def test_treerl_node_values() -> None:
    _, outputs = golden("treerl/node_values")
    tree, number = branching(
        {
            "a": ("root", 10, 0.0, None), "b": ("root", 7, 0.0, 0.0), "a1": ("a", 5, 0.0, 1.0),
            "a2": ("a", 3, 0.0, None), "a21": ("a2", 4, 0.0, 1.0), "a22": ("a2", 6, 0.0, 0.0),
        }
    )  # fmt: skip
    for name, values in outputs.items():
        level, shrink = name.split("/")
        shrinks: dict[str, Any] = {"original": "none"}
        found = by_name(SummedLeaves(level, shrinks.get(shrink, shrink)), tree, number)  # type: ignore[arg-type]
        assert found == close({node: value for node, value in values.items() if node != "root"}), name


def test_treepo_advantages() -> None:
    inputs, outputs = golden("treepo/adv_average")
    rewards, masks = inputs["token_level_rewards"], inputs["response_mask"]
    places = [name.split("#")[1:] for name in inputs["index"]]  # of a rollout: its branch, its leaf there
    tokens = {branch: 1 for branch, _ in places}
    nodes = [Node(ROOT, Completion("", (i,), (0.0,))) for i, _ in enumerate(tokens)]
    leaves = []
    for i, (branch, _) in enumerate(places):
        left = (9,) * (int(sum(masks[i])) - 1)
        nodes.append(Node(list(tokens).index(branch), Completion("", left, (0.0,) * len(left)), reward=sum(rewards[i])))
        leaves.append(len(nodes) - 1)
    tree = RolloutTree(Task("none", 0), (0,), (), tuple(nodes), tuple(leaves))
    found = by_token([tree], Whitened(PrefixGroups("equal"))([tree]))[0]
    assert [x for rollout in found for x in rollout] == close(masked(outputs["advantages"], masks))


@pytest.mark.parametrize("name", ["trl/adv_group", "trl/adv_group_of_one"])
def test_trl_advantages(name: str) -> None:
    """Rollouts without any reward are not in TRL's group; a tree holds only rollouts with one."""
    inputs, outputs = golden(name)
    weights = inputs.get("reward_weights", [1.0])
    rewards = [
        [w * float(x) for w, x in zip(weights, row, strict=True) if not math.isnan(float(x))]
        for row in inputs["rewards_per_func"]
    ]
    n = inputs["num_generations"]
    for start in range(0, len(rewards), n):
        kept = [i for i in range(start, start + n) if rewards[i]]
        scores = GroupRelative.trl().norm([sum(rewards[i]) for i in kept])
        assert scores == close([outputs["advantages"][i] for i in kept])


@pytest.mark.parametrize("name", ["loss_vanilla", "loss_vanilla_token-sum", "loss_vanilla_seq-mean-token-mean"])
def test_verl_loss(name: str) -> None:
    inputs, outputs = golden(f"verl/{name}")
    loss = ClippedLoss(
        inputs["clip_ratio_low"],
        inputs["clip_ratio_high"],
        inputs["clip_ratio_c"],
        aggregation=inputs["loss_agg_mode"],
    )
    value, gradient = loss_of(
        loss, inputs["old_log_prob"], inputs["log_prob"], inputs["advantages"], inputs["response_mask"]
    )
    assert value == close(outputs["loss"])
    for got, wanted in zip(gradient, outputs["grad_log_prob"], strict=True):
        assert got == close(wanted)


@pytest.mark.parametrize(
    ("name", "aggregation"),
    [("grpo", "seq-mean-token-mean"), ("dapo", "token-mean"), ("dr_grpo", "seq-mean-token-sum")],
)
def test_trl_loss(name: str, aggregation: Any) -> None:
    """Dr.GRPO's differs from ours by the constant length that TRL divides by."""
    inputs, outputs = golden(f"trl/loss_{name}")
    assert inputs["beta"] == 0 and inputs["delta"] is None
    constant = inputs["max_completion_length"] if name == "dr_grpo" else 1
    advantages = [[a] * len(row) for a, row in zip(inputs["advantages"], inputs["completion_mask"], strict=True)]
    value, gradient = loss_of(
        ClippedLoss(inputs["epsilon_low"], inputs["epsilon_high"], aggregation=aggregation),
        inputs["old_per_token_logps"],
        inputs["per_token_logps"],
        advantages,
        inputs["completion_mask"],
    )
    assert value / constant == close(outputs["loss"])
    for got, wanted in zip(gradient, outputs["grad"], strict=True):
        assert [x / constant for x in got] == close(wanted)


def test_trl_leaves_tool_results_out() -> None:
    inputs, outputs = golden("trl/loss_dapo_tool_mask")
    masks = zip(inputs["completion_mask"], inputs["tool_mask"], strict=True)
    said = [[a * b for a, b in zip(*row, strict=True)] for row in masks]
    advantages = [[a] * len(row) for a, row in zip(inputs["advantages"], said, strict=True)]
    loss = ClippedLoss(inputs["epsilon_low"], inputs["epsilon_high"], aggregation="token-sum")
    value, gradient = loss_of(loss, inputs["old_per_token_logps"], inputs["per_token_logps"], advantages, said)
    tokens = inputs["num_items_in_batch"]
    assert value / tokens == close(outputs["loss"])
    for got, wanted in zip(gradient, outputs["grad"], strict=True):
        assert [x / tokens for x in got] == close(wanted)


@pytest.mark.parametrize(
    ("name", "loss"),
    [
        ("verl/loss_gspo", ClippedLoss(3e-4, 4e-4, level="sequence")),
        ("verl/loss_geo_mean", GeometricLoss(0.4, 0.4)),
        ("verl/loss_cispo", CispoLoss(0.2, 0.28)),
        ("at2po/loss_gspo_turn_0.2", ClippedLoss(0.2, 0.28, level="turn")),
        ("aepo/policy_loss_clip_only", ClippedLoss(0.2, 0.2, 3.0, keep_gradient=True, aggregation="token-mean")),
    ],
)
def test_other_losses(name: str, loss: PolicyLoss) -> None:
    inputs, outputs = golden(name)
    value, gradient = loss_of(
        loss, inputs["old_log_prob"], inputs["log_prob"], inputs["advantages"], inputs["response_mask"]
    )
    assert value == close(outputs["loss"])
    for got, wanted in zip(gradient, outputs["grad_log_prob"], strict=True):
        assert got == close(wanted)


@pytest.mark.parametrize(
    ("name", "loss"),
    [
        ("trl/loss_cispo", CispoLoss(None, 0.3)),  # TRL's epsilon_high is the bound itself, 1.3
        ("trl/loss_gspo", ClippedLoss(3e-4, 4e-4, level="sequence")),
    ],
)
def test_trl_s_other_losses(name: str, loss: PolicyLoss) -> None:
    inputs, outputs = golden(name)
    advantages = [[a] * len(row) for a, row in zip(inputs["advantages"], inputs["completion_mask"], strict=True)]
    value, gradient = loss_of(
        loss, inputs["old_per_token_logps"], inputs["per_token_logps"], advantages, inputs["completion_mask"]
    )
    assert value == close(outputs["loss"])
    for got, wanted in zip(gradient, outputs["grad"], strict=True):
        assert got == close(wanted)


def test_kl_estimators() -> None:
    inputs, outputs = golden("verl/kl_penalty")
    for name, expected in outputs.items():
        logprobs = torch.tensor(inputs["logprob"], dtype=torch.float64, requires_grad=True)
        value = kl(logprobs, torch.tensor(inputs["ref_logprob"], dtype=torch.float64), name)
        [gradient] = torch.autograd.grad(value.sum(), logprobs)
        assert value.tolist() == close(expected["value"]) and gradient.tolist() == close(expected["grad"])


def test_verl_aggregations() -> None:
    """A rollout without sampled tokens does not count: as in verl since 2026."""
    inputs, outputs = golden("verl/agg_loss_versions")
    rows = [
        [value for value, kept in zip(*row, strict=True) if kept]
        for row in zip(inputs["loss_mat"], inputs["loss_mask"], strict=True)
    ]
    assert not all(rows)
    for name, aggregate in AGGREGATIONS.items():
        value = sum(w * sum(row) for w, row in zip(aggregate([len(row) for row in rows]), rows, strict=True))
        assert value == close(outputs[name]["verl_aug2026"])


def test_gae_skips_observations() -> None:
    inputs, outputs = golden("verl/gae_obs_skip_g1.0_l1.0")
    [rewards], [values], mask = inputs["token_level_rewards"], inputs["values"], inputs["response_mask"]
    said = [masked([row], mask) for row in (rewards, values)]
    advantages, returns = gae(*said, inputs["gamma"], inputs["lam"])
    assert returns == close(masked(outputs["returns"], mask))
    assert whiten(advantages) == close(masked(outputs["advantages_whitened"], mask))


def test_bi_level_gae() -> None:
    inputs, outputs = golden("ragen/bi_level_gae_masked")
    found: list[float] = []
    for row, mask in enumerate(inputs["loss_mask"]):
        rewards, values = (masked([inputs[name][row]], [mask]) for name in ("token_level_rewards", "values"))
        ends = [i for i, reward in enumerate(rewards) if reward]
        parameters = (inputs[name] for name in ("gamma", "lam", "high_level_gamma"))
        advantages, returns = bi_level_gae(rewards, values, ends, *parameters)
        assert returns == close(masked([outputs["returns"][row]], [mask]))
        found += advantages
    assert whiten(found) == close(masked(outputs["advantages_whitened"], inputs["loss_mask"]))


def whiten(values: Sequence[float]) -> list[float]:
    """verl's masked_whiten over the sampled tokens of the batch."""
    scores = np.array(values)
    whitened: list[float] = ((scores - scores.mean()) / np.sqrt(scores.var(ddof=1) + 1e-8)).tolist()
    return whitened


def test_arpo_entropy() -> None:
    inputs, outputs = golden("arpo/entropy")
    for name, expected in outputs["normalised_entropy"].items():
        [key] = [key for key in inputs["top_logprobs_per_position"] if key.partition(" ")[0] == name]
        positions = inputs["top_logprobs_per_position"][key]
        rows = [] if positions == "no tokens" else positions * (25 if "25 positions" in key else 1)
        found = [entropy(torch.tensor(row, dtype=torch.float64), top=11).item() for row in rows]
        first = found[: inputs["max_positions"]]
        assert normalized_entropy(first, inputs["vocab_size"], total=True) == close(expected)


@pytest.mark.parametrize(("name", "penalty"), [("arpo/branch_round", None), ("aepo/branch_round", 0.05)])
def test_a_round_of_branching(name: str, penalty: float | None) -> None:
    inputs, outputs = golden(name)
    strategy = EntropyBranching(
        3, inputs["num_samples"], inputs["beam_size"], inputs["branch_probability"], inputs["entropy_weight"],
        penalty=penalty,
    )  # fmt: skip
    streaks = inputs.get("consecutive_branches", {})
    draws, copied = iter(inputs["uniform_draws"]), []
    started = list(inputs["rollouts_per_sample"])
    for slot in inputs["active_indices"]:
        sample = next(int(s) for s, slots in inputs["sample_to_indices"].items() if slot in slots)
        change = inputs["current_entropy"][str(slot)] - inputs["initial_entropy"][str(slot)]
        if started[sample] < strategy.budget and strategy.forks(next(draws), change, streaks.get(str(sample), 0)):
            copied.append(slot)
            started[sample] += 1
    assert copied == outputs["copied_from"] and started == outputs["rollouts_per_sample"]


def test_branch_probability_in_closed_form() -> None:
    inputs, outputs = golden("arpo/branch_probability_closed_form")
    strategy = EntropyBranching(base=inputs["branch_probability"], weight=inputs["entropy_weight"])
    draws = [(i + 0.5) / 20_000 for i in range(20_000)]
    for change, expected in zip(inputs["delta"], outputs["P_branch"], strict=True):
        found = sum(strategy.forks(draw, change) for draw in draws) / len(draws)
        assert found == pytest.approx(expected, abs=1e-4)


@dataclass(frozen=True)
class Watching(Norm):
    """Keeps what it is asked to compare."""

    seen: list[list[float]] = field(default_factory=list)

    def __call__(self, values: Sequence[float], weights: Sequence[float] = ()) -> list[float]:
        self.seen.append(list(values))
        return list(values)


def test_exact_anchor_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row's reward is its number, and the norm sees the numbers of those that are compared."""
    inputs, outputs = golden("gigpo/step_groups_exact")
    rows = range(len(inputs["index"]))
    watching = Watching()
    by_step(
        AnchorStates(0.0, watching), {**inputs, "traj_index": [*map(str, rows)]}, [float(i) for i in rows], monkeypatch
    )
    number = {int(i): group for group, members in enumerate(sorted(watching.seen)) for i in members}
    assert [number[i] for i in rows] == outputs["group_id_canonical"]


def test_gigpo_s_penalty_of_invalid_actions() -> None:
    """Off the return that an invalid turn is scored by, in both terms; in no other turn."""
    inputs, outputs = golden("gigpo/invalid_action_penalty")
    valid, coefficient = inputs["is_action_valid"], inputs["coef"]
    watching = Watching()
    nodes = tuple(
        Node(i - 1, Completion("", (7,)), reward=reward, info={"malformed": int(not good)}, state_key="s")
        for i, (reward, good) in enumerate(zip([0.0, 0.0, 10.0], valid, strict=True))
    )
    tree = RolloutTree(Task("none", 0), (0,), (), nodes, (2,), state_key="s")
    discount = 0.95
    GroupRelative(watching, per="turn", invalid_penalty=coefficient)([tree])
    AnchorStates(discount, watching, invalid_penalty=coefficient)([tree])
    episode, steps = watching.seen
    assert episode == close([max(row) for row in outputs["token_level_scores"]])
    returns = [10.0 * discount**2, 10.0 * discount, 10.0]
    off = [a - b for a, b in zip(inputs["step_rewards"], outputs["step_rewards"], strict=True)]
    assert steps == close([r - x for r, x in zip(returns, off, strict=True)])
