"""Losses over the sums of rollouts: packed and written out they are the same, in one pack and in many."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from test_packing import gradients, random_tree, small_parts, tiny_model
from test_training import trainer
from torch import Tensor
from transformers import PreTrainedModel

from treegym.agents import ROOT, Completion, Node, RolloutTree, Sampling
from treegym.agents.rollouts import Chains, TreeExpansion
from treegym.envs import Task
from treegym.scenarios import ScenarioError, load_scenario
from treegym.trainers import (
    Algorithm,
    HeldOut,
    Improvement,
    Learner,
    Optimization,
    Plan,
    PolicyLoss,
    TaskSet,
    Warmup,
)
from treegym.trainers.advantages import GroupRelative
from treegym.trainers.losses import (
    ClippedLoss,
    Compared,
    Comparisons,
    DpoLoss,
    Groups,
    GvpoLoss,
    ReinforceLoss,
    Siblings,
    SumLoss,
    Sums,
)
from treegym.trainers.packing import Pack
from treegym.trainers.stages.improve import _distance

__all__ = ["small_parts"]
TRAINING = (Path(__file__).parent.parent / "docs" / "training.md").read_text(encoding="utf-8")
PAGE = TRAINING.partition("### Losses that compare rollouts")[2].partition("### A part of your own")[0]
GOLDEN = Path(__file__).parent.parent.parent / "shared" / "golden"
STILL = Optimization(0.0, max_grad_norm=math.inf)  # leaves the weights and the gradients as they are


def golden(file: str, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Inputs and outputs of a record."""
    if not (GOLDEN / file).is_file():
        pytest.skip("the golden vectors lie beside the repository, in ../shared/golden; there are none here")
    [record] = [each for each in json.loads((GOLDEN / file).read_text()) if each["name"] == name]
    return record["inputs"], record["outputs"]


# packed and written out


class Discounted:
    """Whole rollouts in pairs, whose turns count less and less; their first tokens count half, their last ones not."""

    makes: ClassVar[Any] = "pair"

    def compare(self, trees: Sequence[RolloutTree]) -> list[Compared]:
        return [self._compare(replace(tree, leaves=tree.leaves[: len(tree.leaves) // 2 * 2])) for tree in trees]

    def _compare(self, tree: RolloutTree) -> Compared:
        coefficients = [
            [0.7**turn * self._of(len(tree.nodes[node].action.token_ids)) for turn, node in enumerate(path)]
            for path in tree.paths
        ]
        scores = [float(i % 2) for i in range(len(tree.leaves))]
        return Compared(tree, coefficients, scores, [i // 2 for i in range(len(tree.leaves))])

    def _of(self, tokens: int) -> Any:
        return np.array([0.5, *[1.0] * tokens, 0.0][:tokens])


def rewarded_trees(seed: int) -> list[RolloutTree]:
    """Trees with forks at several depths and a common start of their prompts, every turn with a reward; the first
    rollout says nothing."""
    rng = random.Random(seed)
    start = tuple(rng.randrange(60) for _ in range(4))
    trees = [random_tree(rng, (*start, i)) for i in range(6)]
    silent = Node(ROOT, Completion(""), terminated=True)
    trees[0] = replace(trees[0], nodes=(*trees[0].nodes, silent), leaves=(len(trees[0].nodes), *trees[0].leaves))
    return [replace(t, nodes=tuple(replace(n, reward=rng.choice([0.0, 0.3, 1.0])) for n in t.nodes)) for t in trees]


def moved_model(name: str) -> PreTrainedModel:
    """Other weights than the reference has."""
    model, generator = tiny_model(name), torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def sums_of(model: PreTrainedModel, one: Compared) -> list[Tensor]:
    """S of every compared rollout, run by itself through the plain model."""
    model.set_attn_implementation("sdpa")
    found = []
    for path, coefficients in zip(one.tree.paths, one.coefficients, strict=True):
        sequence = torch.tensor(one.tree.tokens(path))
        logprobs = torch.log_softmax(model(input_ids=sequence[None]).logits[0], -1)
        at, total = len(one.tree.prompt), torch.zeros((), dtype=torch.float64)
        for index, coefficient in zip(path, coefficients, strict=True):
            node = one.tree.nodes[index]
            said = torch.arange(at, at + len(node.action.token_ids))
            total = total + (torch.as_tensor(coefficient) * logprobs[said - 1, sequence[said]]).sum()
            at += len(node.action.token_ids) + len(node.observation)
        found.append(total)
    return found


def recorded(one: Compared) -> list[float]:
    """The same as the sampler recorded it."""
    return [
        math.fsum(math.fsum(c * np.asarray(one.tree.nodes[i].action.logprobs)) for i, c in zip(path, row, strict=True))
        for path, row in zip(one.tree.paths, one.coefficients, strict=True)
    ]


def written_out(model: PreTrainedModel, reference: PreTrainedModel, batch: Sequence[Compared], loss: SumLoss) -> Tensor:
    """The loss from its formula, comparison by comparison."""
    total, pairs = torch.zeros((), dtype=torch.float64), 0
    for one in batch:
        own = sums_of(model, one)
        with torch.no_grad():
            theirs, old = sums_of(reference, one), recorded(one)
        for group in sorted(set(one.groups)):
            members = [i for i, number in enumerate(one.groups) if number == group]
            if isinstance(loss, DpoLoss):
                good, bad = sorted(members, key=lambda i: -one.scores[i])
                total = total - torch.sigmoid(loss.beta * (own[good] - theirs[good] - own[bad] + theirs[bad])).log()
                pairs += 1
            elif isinstance(loss, GvpoLoss) and len(members) > 1:
                n = len(members)
                change = [loss.beta * (own[i] - old[i]) for i in members]
                better = [one.scores[i] - sum(one.scores[j] for j in members) / n for i in members]
                apart = [c - sum(change) / n - b for c, b in zip(change, better, strict=True)]
                total = total + sum(0.5 * x**2 for x in apart) / (n - 1)
    return total / max(pairs, 1)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize(
    ("comparisons", "loss"),
    [(Groups(), GvpoLoss(0.3)), (Siblings(), DpoLoss(0.3)), (Discounted(), DpoLoss(0.3))],
    ids=["GVPO over groups", "DPO over siblings", "DPO with coefficients of tokens"],
)
def test_packed_equals_written_out(name: str, comparisons: Comparisons, loss: SumLoss) -> None:
    """Loss and all gradients, to nine digits; pairs and groups are parted between packs."""
    model, reference = moved_model(name), tiny_model(name)
    trees = rewarded_trees(7)
    batch = comparisons.compare(trees)
    expected = written_out(model, reference, batch, loss)
    expected.backward()  # type: ignore[no-untyped-call]
    exact = gradients(model)
    assert max(gradient.abs().max() for gradient in exact) > 1e-3
    learner = Learner(tiny_model(name), STILL, dtype=torch.float64, reference=True)
    learner.model.load_state_dict(model.state_dict())
    for max_tokens, fewest in ((10_000, 1), (25, 20)):
        learner.optimization = replace(STILL, max_tokens=max_tokens)
        packs: list[Pack] = []
        metrics = learner.compare(batch, loss, on_pack=packs.append)
        print(f"{len(packs)} packs, {len(trees)} trees, {sum(len(one.groups) for one in batch)} compared rollouts")
        assert len(packs) == 1 if fewest == 1 else len(packs) >= fewest
        assert metrics["loss"] == pytest.approx(expected.item(), abs=1e-9)
        for got, wanted in zip(gradients(learner.model), exact, strict=True):
            torch.testing.assert_close(got, wanted, atol=1e-9, rtol=0)


# the losses and the comparisons by themselves


def sums(logprob: Sequence[float], score: Sequence[float], group: Sequence[int], **extras: Sequence[float]) -> Sums:
    floats = {name: torch.tensor(values, dtype=torch.float64) for name, values in extras.items()}
    own = torch.tensor(logprob, dtype=torch.float64, requires_grad=True)
    ones = torch.ones(len(group), dtype=torch.long)
    return Sums(own, torch.tensor(score, dtype=torch.float64), torch.tensor(group), ones, floats)


def test_dpo_gives_the_golden_numbers() -> None:
    inputs, outputs = golden("examples2.json", "pref/dpo")
    losers_first = sums(
        [*inputs["rejected"], *inputs["chosen"]], [0.0, 0.2, 1.0, 0.3], [0, 1, 0, 1],
        reference=[*inputs["ref_rejected"], *inputs["ref_chosen"]],
    )  # fmt: skip
    value = DpoLoss(inputs["beta"]).of_sums(losers_first)
    assert value.item() == pytest.approx(sum(outputs["losses"]) / 2, abs=1e-9)
    [slope] = torch.autograd.grad(2 * value, losers_first.logprob)
    assert slope.tolist() == pytest.approx([*outputs["grad_rejected"], *outputs["grad_chosen"]], abs=1e-9)


def test_gvpo_gives_the_golden_numbers() -> None:
    inputs, outputs = golden("vectors.json", "gvpo/loss")
    mask = np.array(inputs["response_mask"])
    own, old = ((np.array(inputs[name]) * mask).sum(1).tolist() for name in ("log_prob", "old_log_prob"))
    scores = [row[0] for row in inputs["advantages_mean_centred"]]
    groups = sums(own, scores, [0, 0, 1, 1], sampled=old)
    value = GvpoLoss(inputs["beta"]).of_sums(groups)
    assert value.item() == pytest.approx(outputs["loss"], rel=1e-6)
    [slope] = torch.autograd.grad(value, groups.logprob)
    assert (slope.numpy()[:, None] * mask).tolist() == [
        pytest.approx(row, rel=1e-5, abs=1e-7) for row in outputs["grad_log_prob"]
    ]


def test_gvpo_by_hand() -> None:
    """d = 0.1, -0.3, 0.2 of mean 0; returns 1, 0, 2 of mean 1. A group of one adds nothing."""
    groups = sums([1.0, -3.0, 2.0, 5.0], [1.0, 0.0, 2.0, 9.0], [0, 0, 0, 1], sampled=[0.0] * 4)
    value = GvpoLoss(0.1).of_sums(groups)
    assert value.item() == pytest.approx((0.1**2 + 0.7**2 + 0.8**2) / 4, abs=1e-12)
    [slope] = torch.autograd.grad(value, groups.logprob)
    assert slope.tolist() == pytest.approx([0.1 * 0.1 / 2, 0.1 * 0.7 / 2, 0.1 * -0.8 / 2, 0.0], abs=1e-12)


def test_gvpo_s_optimum_is_where_log_ratios_differ_as_returns_do() -> None:
    at_optimum = sums([10 * r - 7 for r in (0.2, 1.0, 0.5)], [0.2, 1.0, 0.5], [0] * 3, sampled=[0.0] * 3)
    value = GvpoLoss(0.1).of_sums(at_optimum)
    [slope] = torch.autograd.grad(value, at_optimum.logprob)
    assert value.item() == pytest.approx(0, abs=1e-12) and slope.tolist() == pytest.approx([0.0] * 3, abs=1e-12)


def test_a_pair_is_two() -> None:
    with pytest.raises(ValueError, match="a pair is two rollouts, and comparison 1 has 3"):
        DpoLoss().of_sums(sums([-1.0] * 5, [0.0, 1.0, 0.0, 1.0, 2.0], [0, 0, 1, 1, 1], reference=[-1.0] * 5))


def grown(parents: Sequence[int], leaves: Sequence[int], rewards: Sequence[float], said: bool = True) -> RolloutTree:
    """Turns of two tokens each; without `said` nothing is known of how likely they were."""
    actions = [Completion("", (10 + i, 3), (-4.0, -4.1) if said else ()) for i in range(len(parents))]
    nodes = [Node(p, a, (7,), reward=r) for p, a, r in zip(parents, actions, rewards, strict=True)]
    return RolloutTree(Task("tests/Grown-v0", 5), (1, 2, 3), (), tuple(nodes), tuple(leaves))


def test_siblings_are_the_best_and_the_worst_turn_of_a_fork() -> None:
    """The golden tree: x with x1 and x2 below it, y with y1. Shared turns do not count."""
    tree = grown([ROOT, ROOT, 0, 0, 1], [2, 3, 4], [0.0, 0.0, 1.0, 0.0, 0.0])
    _, outputs = golden("examples2.json", "pairs/tree")
    names = dict(enumerate(["x", "y", "x1", "x2", "y1"]))
    [found] = Siblings().compare([tree])
    named = [names[leaf] for leaf in found.tree.leaves]
    assert [named[:2], named[2:]] == outputs["sibling_pairs"] and list(found.groups) == [0, 0, 1, 1]
    assert dict(zip(named, found.scores, strict=True)) == {n: outputs["values"][n] for n in named}
    assert found.coefficients == [[1.0], [1.0], [0.0, 1.0], [0.0, 1.0]]


def test_equal_siblings_are_no_pair_and_three_make_one() -> None:
    tree = grown([ROOT] * 4, [0, 1, 2, 3], [0.5, 0.0, 1.0, 0.0])
    [found] = Siblings().compare([tree])
    assert found.tree.leaves == (2, 1) and found.scores == [1.0, 0.0]
    assert not Siblings(gap=1.1).compare([tree])[0].tree.leaves
    alike = grown([ROOT] * 3, [0, 1, 2], [0.1 + 0.2, 0.3, 0.3])  # up to a rounding
    assert not Siblings().compare([alike])[0].tree.leaves
    with pytest.raises(ValueError, match="gap must be above 0"):
        Siblings(gap=0)


def test_siblings_that_say_the_same_count_as_one_turn() -> None:
    """The first turn was sampled twice, by older and newer weights: its score is the mean over both."""
    tree = grown([ROOT] * 4, [0, 1, 2, 3], [1.0, 0.6, 0.0, 0.0])
    newer = replace(tree.nodes[0].action, weights_version=1)
    nodes = (*tree.nodes[:3], replace(tree.nodes[3], action=newer))
    [found] = Siblings().compare([replace(tree, nodes=nodes)])
    assert found.tree.leaves == (1, 2) and found.scores == [0.6, 0.0]
    [found] = Siblings().compare([replace(tree, nodes=(tree.nodes[0], nodes[3]), leaves=(0, 1))])
    assert not found.tree.leaves  # a turn is no pair with itself


def test_siblings_can_be_told_apart_by_a_reward_term() -> None:
    """By the return the first would win."""
    tree = grown([ROOT, ROOT], [0, 1], [1.0, 0.0])
    nodes = tuple(replace(n, reward_terms={"exact": x}) for n, x in zip(tree.nodes, (0.0, 1.0), strict=True))
    [found] = Siblings(term="exact").compare([replace(tree, nodes=nodes)])
    assert found.tree.leaves == (1, 0)


# what a loss needs


def learner(max_tokens: int = 1024, **more: Any) -> Learner:
    return Learner(tiny_model(), replace(STILL, max_tokens=max_tokens), dtype=torch.float64, **more)


def test_ratio_losses_refuse_turns_that_were_not_sampled() -> None:
    """Others train them, and the same as if they had been."""
    tree = grown([ROOT, 0, 0], [1, 2], [0.0, 1.0, 0.0])
    silent = grown([ROOT, 0, 0], [1, 2], [0.0, 1.0, 0.0], said=False)
    mixed = replace(tree, nodes=(*tree.nodes[:2], silent.nodes[2]))
    ones = [[1.0, 1.0], [1.0, 1.0]]
    named = r"tests/Grown-v0, seed 5: turn 2 of a rollout has no log-probabilities, which {} compares with"
    with pytest.raises(ValueError, match=named.format("ClippedLoss")):
        learner().update([(mixed, ones)], ClippedLoss())
    with pytest.raises(ValueError, match=named.format("GvpoLoss")):
        learner().compare(Groups().compare([mixed]), GvpoLoss())
    learner().update([(mixed, [ones[0], [0.0, 0.0]])], ClippedLoss())  # the rollout is left out
    filled = learner()
    own = filled.with_own_logprobs(silent)
    filled.update([(own, ones)], ClippedLoss(old="learner"))
    assert set(_distance([silent], [own]).values()) == {0} and min(_distance([tree], [own]).values()) >= 0
    known, unknown = learner(reference=True), learner(reference=True)
    for one, its in ((known, tree), (unknown, silent)):
        one.update([(its, ones)], ReinforceLoss())
    compare_gradients(known, unknown)
    for one, its in ((known, tree), (unknown, silent)):
        one.compare(Siblings().compare([its]), DpoLoss())
    compare_gradients(known, unknown)


def compare_gradients(a: Learner, b: Learner) -> None:
    ours, theirs = gradients(a.model), gradients(b.model)
    assert any(gradient.any() for gradient in ours)
    assert all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))


def test_a_loss_that_reads_what_it_does_not_declare_moves_nothing() -> None:
    class Undeclared(ReinforceLoss):
        def __call__(self, logprobs: Tensor, terms: Any) -> Tensor:
            return -(logprobs - terms.old_logprob).exp() * terms.advantage

    metrics = learner().update([(grown([ROOT], [0], [1.0], said=False), [[1.0]])], Undeclared())
    assert metrics["skipped_updates"] == 1


def test_columns_are_a_user_s() -> None:
    """The page's, in terms and in sums; a name that the learner does not know is refused with those that it knows."""

    class Seen(DpoLoss):
        needs = frozenset({"discount"})

        def of_sums(self, sums: Sums) -> Tensor:
            seen.append(sums)
            return sums.logprob.sum()

    page: dict[str, Any] = {"__name__": "page"}
    exec(re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)[0], page)
    less: PolicyLoss = page["LessAndLess"]("token-sum")
    seen: list[Sums] = []
    tree = grown([ROOT, 0, 0], [1, 2], [0.0, 1.0, 0.0])
    discounted, plain = learner(columns={"discount": page["discount"]}), learner()
    discounted.update([(tree, [[1.0, 1.0], [-1.0, 0.4]])], less)
    plain.update([(tree, [[1.0, 0.5], [-1.0, 0.2]])], ReinforceLoss("token-sum"))
    for ours, theirs in zip(gradients(discounted.model), gradients(plain.model), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    discounted.compare(Siblings().compare([tree]), Seen())
    assert seen[0].extras["discount"].tolist() == [1.0, 1.0]  # two tokens of the second turn
    assert seen[0].tokens.tolist() == [2, 2]
    for loss in (less, Seen()):
        with pytest.raises(ValueError, match=r"needs 'discount', which the learner does not have; it has .*old, "):
            learner().check(loss)
    with pytest.raises(ValueError, match="reference=True"):
        learner().check(DpoLoss())
    with pytest.raises(ValueError, match="'entropy' is a name of the learner's own"):
        learner(columns={"entropy": page["discount"]})


def test_nothing_to_compare_moves_nothing() -> None:
    metrics = learner(reference=True).compare(Siblings().compare([grown([ROOT], [0], [1.0])]), DpoLoss())
    assert metrics["learning_rate"] == metrics["loss"] == 0


# algorithms of them


def test_an_algorithm_s_loss_takes_what_is_compared() -> None:
    for advantage, loss in ((Groups(), DpoLoss()), (GroupRelative(), GvpoLoss()), (Siblings(), ClippedLoss())):
        with pytest.raises(ValueError, match=f"{type(loss).__name__} takes .*s, and {type(advantage).__name__} makes"):
            Algorithm(Chains(2), advantage, loss)  # type: ignore[arg-type]


def test_scenarios_name_them(tmp_path: Path) -> None:
    file = tmp_path / "some.yaml"

    def algorithm(text: str) -> Algorithm:
        file.write_text(f"environment: {{id: treegym/Lookup-v0}}\nalgorithm: {text}\n")
        return load_scenario(file).plan().algorithm

    chosen = algorithm("{name: tree_grpo, advantage: {Siblings: {gap: 0.5}}, loss: {DpoLoss: {beta: 0.2}}}")
    assert isinstance(chosen.rollout, TreeExpansion)
    assert (chosen.advantage, chosen.loss) == (Siblings(gap=0.5), DpoLoss(0.2))
    assert algorithm("{name: grpo, advantage: Groups, loss: GvpoLoss}").loss == GvpoLoss()
    [example] = re.findall(r"^```yaml\nalgorithm:\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    chosen = algorithm(f"\n{example}")
    assert (chosen.advantage, chosen.loss) == (Siblings("exact"), DpoLoss())
    (tmp_path / "hinges.py").write_text(HINGES)
    own = algorithm('{advantage: "hinges.py:Ends", loss: {"hinges.py:Hinge": {margin: 2.0}}}')
    assert isinstance(own.advantage, Comparisons) and isinstance(own.loss, SumLoss)
    assert own.loss.of_sums(sums([-3.0, -2.5], [1.0, 0.0], [0, 0])).item() == 2.5  # margin 2, the loser ahead by 0.5
    for text, reason in (
        ('{loss: "hinges.py:Half"}', "hinges.py:Half makes no SumLoss: it has no couples"),
        ("{loss: GvpoLoss}", "some.yaml:2: algorithm: GvpoLoss takes groups, and GroupRelative makes advantages"),
        ("{loss: {WithKL: {loss: DpoLoss}}}", "algorithm.loss.WithKL.loss: no PolicyLoss 'DpoLoss'"),
        ("{advantage: {Whitened: {of: Groups}}}", "algorithm.advantage.Whitened.of: no AdvantageEstimator 'Groups'"),
    ):
        with pytest.raises(ScenarioError, match=reason):
            algorithm(text)


HINGES = """
class Ends:
    makes = "pair"
    def compare(self, trees):
        return []

class Half:
    needs = frozenset()
    def of_sums(self, sums):
        return sums.logprob.sum()

class Hinge(Half):
    couples = "pair"
    def __init__(self, margin: float = 1.0):
        self.margin = margin
    def of_sums(self, sums):
        winners, losers = sums.pairs()
        return (self.margin - sums.logprob[winners] + sums.logprob[losers]).clamp(min=0).sum()
"""


@pytest.mark.parametrize(
    "algorithm", [Algorithm(Chains(8), Groups(), GvpoLoss()), Algorithm(Chains(8), Siblings(), DpoLoss())], ids=str
)
def test_comparisons_teach_what_demonstrations_leave_open(algorithm: Algorithm, tmp_path: Path) -> None:
    """The demonstrations are right half of the time; what is compared then teaches the right half."""
    plan = Plan(
        TaskSet("tests/Bandit-v0"),
        algorithm,
        Sampling(max_tokens=8),
        Warmup(96, optimization=Optimization(1e-3, warmup_steps=2)),
        Improvement(16, tasks_per_step=2, updates_per_step=2, optimization=Optimization(3e-4, warmup_steps=2)),
        HeldOut(40, untrained=0),
    )
    results = trainer(plan, tmp_path, ["<answer>red blue</answer> Choose. Red or blue?"]).train()
    before, after = (results[stage].success.mean for stage in ("warmed up", "trained"))
    print(f"{before:.2f} -> {after:.2f}")
    assert before < 0.75 and after > 0.75 and after - before > 0.2
