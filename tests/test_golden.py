"""Advantages and losses give the numbers of the public reference implementations."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from treegym.trainers import AGGREGATIONS, ClippedLoss, GroupRelative, Terms

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


def clipped_loss(
    loss: ClippedLoss, old: Sequence[Sequence[float]], new: Sequence[Sequence[float]], advantages: Any, mask: Any
) -> tuple[float, list[list[float]]]:
    """Batch loss and its gradient by the masked tokens of each rollout, as the learner sums them."""
    rows = [[i for i, kept in enumerate(row) if kept] for row in mask]
    places = [(r, i) for r, row in enumerate(rows) for i in row]
    weights = AGGREGATIONS[loss.aggregation]([len(row) for row in rows])

    def column(values: Any) -> Tensor:
        return torch.tensor([values[r][i] for r, i in places], dtype=torch.float64)

    index = torch.arange(len(places))
    rollout, turn = torch.tensor([r for r, _ in places]), torch.zeros_like(index)
    weight = torch.tensor([weights[r] for r, _ in places], dtype=torch.float64)
    logprobs = column(new).requires_grad_()
    value = (loss(logprobs, Terms(index, rollout, turn, column(advantages), column(old), weight)) * weight).sum()
    value.backward()
    assert logprobs.grad is not None
    gradient = iter(logprobs.grad.tolist())
    return value.item(), [[next(gradient) if kept else 0.0 for kept in row] for row in mask]


@pytest.mark.parametrize("name", ["verl/grpo", "verl/dr_grpo_adv"])
def test_verl_advantages(name: str) -> None:
    inputs, outputs = golden(name)
    estimator = GroupRelative(divide=inputs["norm_adv_by_std_in_grpo"], alone="raw")
    if inputs["norm_adv_by_std_in_grpo"]:
        assert estimator == GroupRelative.verl() and estimator.eps == inputs["epsilon"]
    groups: dict[str, list[int]] = {}
    for number, group in enumerate(inputs["index"]):
        groups.setdefault(group, []).append(number)
    for numbers in groups.values():
        scores = estimator.standardize([sum(inputs["token_level_rewards"][i]) for i in numbers])
        for number, score in zip(numbers, scores, strict=True):
            mask = inputs["response_mask"][number]
            assert [score * kept for kept in mask] == close(outputs["advantages"][number])


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
        scores = GroupRelative.trl().standardize([sum(rewards[i]) for i in kept])
        assert scores == close([outputs["advantages"][i] for i in kept])


@pytest.mark.parametrize("name", ["loss_vanilla", "loss_vanilla_token-sum", "loss_vanilla_seq-mean-token-mean"])
def test_verl_loss(name: str) -> None:
    inputs, outputs = golden(f"verl/{name}")
    loss = ClippedLoss(
        inputs["clip_ratio_low"], inputs["clip_ratio_high"], inputs["clip_ratio_c"], inputs["loss_agg_mode"]
    )
    value, gradient = clipped_loss(
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
    value, gradient = clipped_loss(
        ClippedLoss(inputs["epsilon_low"], inputs["epsilon_high"], aggregation=aggregation),
        inputs["old_per_token_logps"],
        inputs["per_token_logps"],
        advantages,
        inputs["completion_mask"],
    )
    assert value / constant == close(outputs["loss"])
    for got, wanted in zip(gradient, outputs["grad"], strict=True):
        assert [x / constant for x in got] == close(wanted)


def test_verl_aggregations() -> None:
    """A rollout without sampled tokens, which a tree cannot hold, is left out: as in verl since 2026."""
    inputs, outputs = golden("verl/agg_loss_versions")
    rows = [
        [value for value, kept in zip(*row, strict=True) if kept]
        for row in zip(inputs["loss_mat"], inputs["loss_mask"], strict=True)
    ]
    rows = [row for row in rows if row]
    for name, aggregate in AGGREGATIONS.items():
        value = sum(w * sum(row) for w, row in zip(aggregate([len(row) for row in rows]), rows, strict=True))
        assert value == close(outputs[name]["verl_aug2026"])
