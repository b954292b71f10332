"""Packed and written-out rollouts give the same loss and the same gradients."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch.nn.functional import rms_norm, scaled_dot_product_attention
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from treegym.agents import ROOT, Completion, Node, RolloutTree
from treegym.agents.inference import attention
from treegym.agents.inference.acceptance import bring_attention
from treegym.agents.inference.attention import causal_attention
from treegym.envs import Task
from treegym.trainers import Advantages
from treegym.trainers.learner import forward
from treegym.trainers.learner.cpu.llama import LlamaPredict, trains_in_place
from treegym.trainers.learner.forward import TransformersPredict
from treegym.trainers.learner.learner import Learner, Optimization
from treegym.trainers.losses.terms import (
    AGGREGATIONS,
    AggregationName,
    CispoLoss,
    ClippedLoss,
    GeometricLoss,
    MaskedRatios,
    PolicyLoss,
    ReinforceLoss,
    SapoLoss,
    TruncatedImportance,
    WithEntropy,
    WithKL,
)
from treegym.trainers.packing import Pack, Segment, Terms, TreeAttend, pack, score, split
from treegym.trainers.packing import attention as tree_attention


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of logits and of queries: as many parts as a real model's have."""
    monkeypatch.setattr(forward, "COLUMNS", 7)
    monkeypatch.setattr(attention, "BLOCK", 3)
    monkeypatch.setattr(tree_attention, "BLOCK", 3)


@pytest.fixture(params=[False, True], ids=["products", "fused"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention goes the one or the other way, whether this processor multiplies tiles or not."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: request.param)


SMALL = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
CONFIGS = {
    "llama": LlamaConfig(**SMALL),
    "qwen2": Qwen2Config(**SMALL),
    "qwen3": Qwen3Config(**SMALL, head_dim=8),
    "gpt2": GPT2Config(
        vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=512, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0
    ),
}


def tiny_model(name: str = "llama") -> PreTrainedModel:
    """In float64 throughout: transformers' RMSNorm would round to float32 on the way."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(CONFIGS[name]).double()
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            norm: Any = module
            norm.forward = partial(
                rms_norm, normalized_shape=norm.weight.shape, weight=norm.weight, eps=norm.variance_epsilon
            )
    return model


def random_tree(rng: random.Random, prompt: tuple[int, ...] | None = None) -> RolloutTree:
    """A tree with forks at several depths, equal rollouts, one-token actions and mixed lengths."""

    def tokens(low: int, high: int) -> tuple[int, ...]:
        return tuple(rng.randrange(60) for _ in range(rng.randint(low, high)))

    nodes: list[Node] = []
    leaves: list[int] = []

    def grow(parent: int, depth: int) -> None:
        for first in rng.sample(range(60), rng.choice([1, 2, 3])):  # siblings differ
            action = (first, *tokens(0, 4))
            last = depth == 3 or rng.random() < 0.3
            logprobs = tuple(-4.1 + rng.uniform(-0.6, 0.6) for _ in action)  # far enough from log(1/60) to be clipped
            nodes.append(Node(parent, Completion("", action, logprobs), () if last else tokens(1, 6), terminated=last))
            index = len(nodes) - 1
            if last:
                leaves.extend([index] * rng.choice([1, 1, 2]))
            else:
                grow(index, depth + 1)

    grow(ROOT, 0)
    return RolloutTree(Task("none", 0), prompt or tokens(2, 6), (), tuple(nodes), tuple(leaves))


def with_twins(tree: RolloutTree) -> RolloutTree:
    """Every rollout once more, in other nodes: sampled by other weights, with other log-probabilities."""
    count = len(tree.nodes)
    twins = []
    for node in tree.nodes:
        said = replace(node.action, logprobs=tuple(x + 0.2 for x in node.action.logprobs), weights_version=1)
        twins.append(replace(node, action=said, parent=node.parent if node.parent == ROOT else node.parent + count))
    leaves = (*tree.leaves, *(leaf + count for leaf in tree.leaves))
    return replace(tree, nodes=(*tree.nodes, *twins), leaves=leaves)


def random_batch(seed: int) -> list[tuple[RolloutTree, Advantages]]:
    """Trees with a common start of their prompts, and advantages that differ by turn, some zero."""
    rng = random.Random(seed)
    start = tuple(rng.randrange(60) for _ in range(4))
    trees = [random_tree(rng, (*start, i)) for i in range(3)]
    return [(tree, [[rng.choice([-1.5, -0.3, 0.0, 0.7, 2.0]) for _ in path] for path in tree.paths]) for tree in trees]


def gradients(model: PreTrainedModel) -> list[torch.Tensor]:
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return found


def written_out(
    model: PreTrainedModel,
    batch: list[tuple[RolloutTree, Advantages]],
    loss: PolicyLoss,
    reference: PreTrainedModel | None = None,
) -> float:
    """The loss of every rollout run by itself through the plain model, gradients left in it."""
    model.set_attn_implementation("sdpa")
    rollouts = [(t, path, advantage) for t, a in batch for path, advantage in zip(t.paths, a, strict=True)]
    lengths = [sum(len(t.nodes[i].action.token_ids) for i in path) for t, path, _ in rollouts]
    total = 0.0
    for number, ((tree, path, advantages), weight) in enumerate(
        zip(rollouts, AGGREGATIONS[loss.aggregation](lengths), strict=True)
    ):
        sequence = torch.tensor(tree.tokens(path))
        logprobs = torch.log_softmax(model(input_ids=sequence[None]).logits[0], -1)
        at, terms = len(tree.prompt), []
        for turn, (index, advantage) in enumerate(zip(path, advantages, strict=True)):
            node = tree.nodes[index]
            for k, old in enumerate(node.action.logprobs):
                terms.append((at + k, turn, advantage, old))
            at += len(node.action.token_ids) + len(node.observation)
        if not terms:
            continue
        positions, turns = (torch.tensor([t[i] for t in terms]) for i in (0, 1))
        chosen = logprobs[positions - 1, sequence[positions]]
        values = [torch.tensor([t[i] for t in terms], dtype=torch.float64) for i in (2, 3)]
        columns = Terms(positions, torch.full_like(positions, number), turns, values[0], values[1], values[0])
        if reference is not None:
            with torch.no_grad():
                theirs = torch.log_softmax(reference(input_ids=sequence[None]).logits[0], -1)
            entropies = -(logprobs.exp() * logprobs).sum(-1)[positions - 1]
            extras = {"reference": theirs[positions - 1, sequence[positions]], "entropy": entropies}
            columns = replace(columns, extras=extras)
        value = (loss(chosen, columns) * weight).sum()
        value.backward()
        total += value.item()
    return total


def packed(
    model: PreTrainedModel,
    batch: list[tuple[RolloutTree, Advantages]],
    loss: PolicyLoss,
    max_tokens: int,
    learner: Learner | None = None,
) -> float:
    model.set_attn_implementation("sdpa")
    bring_attention(model)
    learner = learner or Learner(model, Optimization(), dtype=torch.float64)
    scored = score(batch, AGGREGATIONS[loss.aggregation], keep_zeros=loss.keeps_zeros)
    return sum(learner.accumulate(pack(group, torch.float64), loss)["loss"] for group in split(scored, max_tokens))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_packed_equals_written_out(name: str, aggregation: AggregationName) -> None:
    loss = ClippedLoss(0.1, 0.15, dual_clip=1.2, aggregation=aggregation)
    model = tiny_model(name)
    assert trains_in_place(model) == (name in ("llama", "qwen2"))
    for seed in range(2):
        batch = random_batch(seed)
        expected = written_out(model, batch, loss)
        expected_gradients = gradients(model)
        for max_tokens in (10_000, 25):  # all in one pass, and trees parted between rollouts
            assert packed(model, batch, loss, max_tokens) == pytest.approx(expected, abs=1e-9)
            for got, wanted in zip(gradients(model), expected_gradients, strict=True):
                torch.testing.assert_close(got, wanted, atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    "loss",
    [
        ClippedLoss(0.1, 0.15, level="sequence"),
        ClippedLoss(0.1, 0.15, level="turn"),
        ClippedLoss(0.1, 0.15, keep_gradient=True),
        GeometricLoss(0.1, 0.15),
        CispoLoss(0.1, 0.15),
        CispoLoss(None, 0.15),
        SapoLoss(),
        ReinforceLoss(),
        TruncatedImportance(ClippedLoss(), cap=1.1),
        TruncatedImportance(ClippedLoss(), cap=0.9, ratio="geometric"),
        TruncatedImportance(ReinforceLoss("seq-mean-token-sum"), cap=1.1, ratio="product"),
        MaskedRatios(ClippedLoss(0.1, 0.15), 0.9, 1.2),
        MaskedRatios(ClippedLoss(0.1, 0.15), 0.9, 1.1, ratio="geometric"),
        MaskedRatios(ClippedLoss(0.1, 0.15, level="turn", old="learner"), 0.5, 2.0, ratio="product"),
        MaskedRatios(TruncatedImportance(ReinforceLoss(), 1.2), 0.9, 1.1, ratio="geometric"),
    ],
    ids=str,
)
def test_every_loss_is_the_same_packed(loss: PolicyLoss) -> None:
    """Those over whole turns and rollouts too: a rollout is never parted. Some of the turns have a twin that says the
    same, sampled by other weights."""
    model = tiny_model()
    batch = [(with_twins(tree), [*advantages, *advantages]) for tree, advantages in random_batch(5)]
    expected = written_out(model, batch, loss)
    expected_gradients = gradients(model)
    for max_tokens in (10_000, 25):
        assert packed(model, batch, loss, max_tokens) == pytest.approx(expected, abs=1e-9)
        for got, wanted in zip(gradients(model), expected_gradients, strict=True):
            torch.testing.assert_close(got, wanted, atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    "loss",
    [
        *(WithKL(ClippedLoss(0.1, 0.15), 0.7, estimator) for estimator in ("k1", "abs", "k2", "k3", "k1+", "k3+")),
        WithEntropy(ClippedLoss(0.1, 0.15), 0.3),
        WithEntropy(WithKL(ClippedLoss(0.1, 0.15, level="turn"), 0.7), 0.3),
        TruncatedImportance(WithEntropy(WithKL(ReinforceLoss(), 0.7), 0.3)),
    ],
    ids=str,
)
def test_distance_and_entropy_are_the_same_packed(name: str, loss: PolicyLoss) -> None:
    """Against a plain model that still has the weights that the learner began with."""
    model, reference = tiny_model(name), tiny_model(name)
    learner = Learner(model, Optimization(), dtype=torch.float64, reference=True)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    batch = random_batch(6)
    expected = written_out(model, batch, loss, reference)
    expected_gradients = gradients(model)
    for max_tokens in (10_000, 25):
        assert packed(model, batch, loss, max_tokens, learner) == pytest.approx(expected, abs=1e-9)
        for got, wanted in zip(gradients(model), expected_gradients, strict=True):
            torch.testing.assert_close(got, wanted, atol=1e-9, rtol=0)


@pytest.mark.parametrize(("queries", "keys"), [(300, 340), (128, 128), (5, 9), (1, 7)])
@pytest.mark.usefixtures("tiles")
def test_attention_is_torch_s_own(queries: int, keys: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "BLOCK", 128)
    generator = torch.Generator().manual_seed(0)
    sizes = ((6, queries, 8), (2, keys, 8), (2, keys, 8))
    given = [torch.randn(size, generator=generator, dtype=torch.float64, requires_grad=True) for size in sizes]
    visible = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    shared = (given[0], *(x.repeat_interleave(3, dim=0) for x in given[1:]))
    expected = scaled_dot_product_attention(*shared, visible, scale=0.3)
    found = causal_attention(*given, 0.3)
    torch.testing.assert_close(found, expected)
    with torch.inference_mode():
        attention._mask(queries, keys, torch.float64, given[0].device)  # a sampler's, before a learner's
    masked = attention._fused(*given, attention._mask(queries, keys, torch.float64, given[0].device), 0.3)  # elsewhere
    torch.testing.assert_close(masked, expected)
    upstream = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    exact, *others = (torch.autograd.grad(x, given, upstream) for x in (expected, found, masked))
    for other in others:
        for ours, theirs in zip(other, exact, strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("size", [1, 4, 16, 1000])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.usefixtures("tiles")
def test_a_segment_sees_its_past_and_its_ancestors(seed: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever other segments share its block."""
    monkeypatch.setattr(tree_attention, "BLOCK", size)
    draw = random.Random(seed)
    segments: list[Segment] = []
    for number in range(12):  # roots too: several trees
        parent = draw.randrange(-1, number)
        above = () if parent < 0 else (*segments[parent].ancestors, parent)
        segments.append(Segment(draw.randrange(1, 7), above))
    of = [number for number, segment in enumerate(segments) for _ in range(segment.length)]
    visible = torch.tensor(
        [[j <= i and b in (a, *segments[a].ancestors) for j, b in enumerate(of)] for i, a in enumerate(of)]
    )
    generator = torch.Generator().manual_seed(seed)
    shapes = ((6, len(of), 8), (2, len(of), 8), (2, len(of), 8))
    given = [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]
    shared = (given[0], *(x.repeat_interleave(3, dim=0) for x in given[1:]))
    expected = scaled_dot_product_attention(*shared, visible, scale=0.3)
    attend = TreeAttend(segments)
    upstream = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    exact = torch.autograd.grad(expected, given, upstream)
    for found in attend(0, *given, 0.3), attend._by_segment(*given, 0.3):
        torch.testing.assert_close(found, expected)
        for ours, theirs in zip(torch.autograd.grad(found, given, upstream), exact, strict=True):
            torch.testing.assert_close(ours, theirs)
    with torch.no_grad():
        for ours, theirs in zip(attend.gradients(upstream, *given, 0.3), exact, strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("offset", [0.0, -300.0, 300.0])
def test_entropies_are_exact_whatever_the_logits_have_in_common(offset: float) -> None:
    """In float32, of distributions from flat to peaked."""
    scales = torch.tensor([[0.1], [1.0], [5.0], [30.0]])
    logits = torch.randn(4, 60, generator=torch.Generator().manual_seed(0)) * scales + offset
    picked = forward.Picked(torch.arange(4), torch.arange(4), 1.0, with_entropy=True)
    logprobs, _, entropies = picked.of(lambda columns: logits[:, columns], 60)
    exact = logits.double().log_softmax(-1)
    torch.testing.assert_close(entropies.double(), -(exact.exp() * exact).sum(-1), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(logprobs.double(), exact.diagonal(), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_turns_without_tokens_change_nothing(aggregation: AggregationName) -> None:
    """An empty reply in mid-episode, one at the end, and a rollout of nothing else."""
    said = Completion("", (5, 6), (-3.9, -4.2))
    nodes = (
        Node(ROOT, said, (7, 8)),
        Node(0, Completion(""), (9,)),
        Node(1, said, terminated=True),
        Node(1, Completion(""), terminated=True),
        Node(ROOT, Completion(""), terminated=True),
    )
    tree = RolloutTree(Task("none", 0), (1, 2, 3), (), nodes, (2, 3, 4))
    batch: list[tuple[RolloutTree, Advantages]] = [(tree, [[1.0, 0.5, -1.0], [0.3, 2.0, 1.0], [-0.7]])]
    loss, model = ClippedLoss(aggregation=aggregation), tiny_model()
    expected = written_out(model, batch, loss)
    expected_gradients = gradients(model)
    assert packed(model, batch, loss, 10_000) == pytest.approx(expected, abs=1e-9)
    for got, wanted in zip(gradients(model), expected_gradients, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-9, rtol=0)


def test_a_learner_without_a_reference_says_so() -> None:
    learner = Learner(tiny_model(), Optimization(), dtype=torch.float64)
    with pytest.raises(ValueError, match="reference=True"):
        learner.update(random_batch(0), WithKL(ClippedLoss()))


@pytest.mark.parametrize("name", ["llama", "qwen2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_leaner_pass_is_the_model_s_own(name: str, dtype: torch.dtype) -> None:
    """Both in the same precision: as far from each other as that precision allows."""
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    whole = pack(score(random_batch(4), AGGREGATIONS["token-mean"]))
    found = []
    for way in (LlamaPredict, TransformersPredict):
        model = tiny_model(name).float()
        model.set_attn_implementation("sdpa")
        bring_attention(model)
        logprobs, _ = way(model, dtype, 0.8)(whole)
        (logprobs[whole.terms.logprob] * whole.terms.advantage).sum().backward()
        found.append((logprobs.detach(), torch.cat([gradient.flatten() for gradient in gradients(model)])))
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).norm() <= tolerance * theirs.norm()


@pytest.mark.parametrize("bias", ["attention_bias", "mlp_bias"])
def test_a_model_with_biases_that_the_leaner_pass_lacks_runs_its_own(bias: str) -> None:
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL, **{bias: True}))
    assert not trains_in_place(model) and trains_in_place(tiny_model())


def test_clipping_is_active_on_shared_tokens_of_both_signs() -> None:
    """The batches above exercise what makes packing hard: one token, several advantages, clipped and not."""
    loss = ClippedLoss(0.1, 0.15)
    signs: set[tuple[bool, bool]] = set()
    mixed = False
    for seed in range(3):
        model = tiny_model()
        learner = Learner(model, Optimization(), dtype=torch.float64)
        whole = pack(score(random_batch(seed), AGGREGATIONS["token-mean"]), torch.float64)
        terms = whole.terms
        ratio = (learner.logprobs(whole)[terms.logprob] - terms.old_logprob).exp()
        clipped = torch.where(terms.advantage > 0, ratio > 1 + loss.clip_high, ratio < 1 - loss.clip_low)
        signs |= set(zip((terms.advantage > 0).tolist(), clipped.tolist(), strict=True))
        for prediction in terms.logprob.unique():
            shared = terms.advantage[terms.logprob == prediction]
            mixed |= bool((shared > 0).any() and (shared < 0).any())
    assert signs == {(a, b) for a in (True, False) for b in (True, False)} and mixed


def test_every_unique_token_is_packed_once_at_its_depth() -> None:
    batch = score(random_batch(1), AGGREGATIONS["token-mean"], keep_zeros=True)
    whole = pack(batch)
    prefixes = {
        scored.tree.tokens(path)[: i + 1]
        for scored in batch
        for path in scored.tree.paths
        for i in range(len(scored.tree.tokens(path)) - 1)  # the last token of a rollout is predicted, never fed
    }
    assert len(whole.tokens) == len(prefixes)
    assert sorted(whole.positions.tolist()) == sorted(len(prefix) - 1 for prefix in prefixes)


def test_zero_advantages_cost_nothing_and_change_nothing() -> None:
    batch = random_batch(2)
    silent = [(tree, [[0.0] * len(path) for path in tree.paths]) for tree, _ in random_batch(3)]
    model = tiny_model()
    learner = Learner(model, Optimization(), dtype=torch.float64)
    sizes: list[Pack] = []
    learner.update(silent, ClippedLoss(), on_pack=sizes.append)
    assert not sizes and learner.step == 0
    expected = written_out(model, [*batch, *silent], ReinforceLoss())
    assert packed(model, [*batch, *silent], ReinforceLoss(), 10_000) == pytest.approx(expected, abs=1e-9)


def test_models_without_plain_positions_are_refused_by_name() -> None:
    bloom = AutoModelForCausalLM.from_config(BloomConfig(vocab_size=60, hidden_size=32, n_layer=1, n_head=4))
    with pytest.raises(ValueError, match="BloomForCausalLM"):
        bring_attention(bloom)
    windowed = AutoModelForCausalLM.from_config(MistralConfig(**SMALL, sliding_window=4))
    with pytest.raises(ValueError, match="MistralForCausalLM computes other logits"):
        bring_attention(windowed)


@pytest.fixture(autouse=True)
def _few_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
