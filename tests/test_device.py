"""Where a model computes: FlexAttention on trees, plain autograd off the CPU, and everything on the model's device."""

from __future__ import annotations

import contextlib
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import test_packing
import torch
import torch.distributed as dist
from test_packing import CONFIGS, gradients, packed, random_batch, tiny_model, written_out
from test_sampler import PROMPTS, ask, model_of
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.attention import flex_attention
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config

from treegym.agents import ROOT, ChatRenderer, Context, Node, RolloutTree, Sampling
from treegym.agents.inference import attention
from treegym.agents.inference.acceptance import bring_attention
from treegym.agents.inference.attention import block_attention
from treegym.agents.inference.forward import Forward, LlamaForward, TransformersForward, device_named
from treegym.agents.inference.kv import Line
from treegym.agents.policies.sampler import TransformersPolicy
from treegym.envs import Task
from treegym.scenarios import ScenarioError, build
from treegym.scenarios.build import load_model, settled
from treegym.scenarios.changes import changes
from treegym.scenarios.schema import Model, Scenario
from treegym.trainers import Learner, Optimization, TaskSet
from treegym.trainers.learner import forward
from treegym.trainers.learner.forward import LeanPredict, TransformersPredict, predict_with
from treegym.trainers.losses import AGGREGATIONS, ClippedLoss
from treegym.trainers.losses.terms import PolicyLoss, ReinforceLoss, WithEntropy
from treegym.trainers.packing import Pack, Segment, TreeAttend, blocks_of, pack, score, tree_mask

CPU = torch.device("cpu")
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


def forest(seed: int, longest: int) -> list[Segment]:
    """Segments of several trees, depth first."""
    draw, segments = random.Random(seed), list[Segment]()

    def grow(ancestors: tuple[int, ...]) -> None:
        number = len(segments)
        segments.append(Segment(draw.randint(1, longest), ancestors))
        for _ in range(draw.randint(0, 3) if len(ancestors) < 4 else 0):
            grow((*ancestors, number))

    for _ in range(3):
        grow(())
    return segments


def ancestors_only(segments: list[Segment]) -> Tensor:
    """[T, T]: whether a token sees another, by the definition."""
    of = [number for number, segment in enumerate(segments) for _ in range(segment.length)]
    return torch.tensor(
        [[j <= i and b in (a, *segments[a].ancestors) for j, b in enumerate(of)] for i, a in enumerate(of)]
    )


@pytest.fixture
def eager_flex(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention by its own mathematics: on a CPU it has no kernel for gradients, and takes a minute to compile."""
    monkeypatch.setattr(attention, "_compiled_flex", lambda: flex_attention.flex_attention)
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)


class Flexible(TreeAttend):
    """As on CUDA."""

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        mask = tree_mask(self._segments, query.device)
        return attention.flexible_attention(query, key, value, scale, mask)


@pytest.mark.parametrize("longest", [3, 60])
@pytest.mark.parametrize("seed", range(5))
def test_flexattention_sees_ancestors_alone(seed: int, longest: int) -> None:
    segments = forest(seed, longest)
    visible = ancestors_only(segments)
    mask = tree_mask(segments, CPU)
    places = torch.arange(len(visible))
    seen = torch.stack([mask.mask_mod(places[:1], places[:1], query, places) for query in places])
    assert torch.equal(seen, visible)
    size, blocks = mask.BLOCK_SIZE[0], -(-len(visible) // mask.BLOCK_SIZE[0])
    padded = torch.zeros(blocks * size, blocks * size, dtype=torch.bool)
    padded[: len(visible), : len(visible)] = visible
    some = padded.view(blocks, size, blocks, size).any(3).any(1)
    assert torch.equal(mask.to_dense()[0, 0].bool(), some)  # no block with a visible key is left out


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.usefixtures("eager_flex")
def test_flexattention_is_attention_by_blocks(seed: int, dtype: torch.dtype, tolerance: float) -> None:
    segments = forest(seed, 40)
    given = some_heads(segments, dtype, CPU)
    expected = block_attention(*given, 0.3, blocks_of(segments))
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
    found = Flexible(segments)(0, *given, 0.3)
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)
    for ours, theirs in zip(*(torch.autograd.grad(x, given, upstream) for x in (found, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, atol=10 * tolerance, rtol=0)


def some_heads(segments: list[Segment], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Queries of six heads, and keys and values of two, with gradients."""
    draw, tokens = torch.Generator().manual_seed(0), sum(segment.length for segment in segments)
    given = [torch.randn(heads, tokens, 32, generator=draw).to(device, dtype) for heads in (6, 2, 2)]
    return [x.requires_grad_() for x in given]


@pytest.mark.parametrize("attend", [TreeAttend, Flexible])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.usefixtures("eager_flex")
def test_plain_autograd_is_the_written_out_rollouts(
    name: str, attend: type[TreeAttend], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way of a model on CUDA, here on the CPU: losses and gradients in float64."""
    monkeypatch.setattr(forward, "TreeAttend", attend)
    model, batch = tiny_model(name), random_batch(5)
    learner = Learner(model, Optimization(), dtype=torch.float64)
    learner._predict = TransformersPredict(model, torch.float64, 1.0)
    for loss in (ReinforceLoss(), WithEntropy(ClippedLoss(0.1, 0.15), 0.01)):
        expected = written_out(model, batch, loss, reference=model)
        exact = gradients(model)
        model.set_attn_implementation("treegym")
        assert packed(model, batch, loss, 10_000, learner) == pytest.approx(expected, abs=1e-9)
        for got, wanted in zip(gradients(model), exact, strict=True):
            torch.testing.assert_close(got, wanted, atol=1e-9, rtol=0)


def test_what_cannot_be_drawn_has_no_gradient_and_adds_nothing() -> None:
    """A logit of -inf, and one too far away for float32."""
    logits = torch.tensor([[0.0, 1.0, float("-inf"), -500.0]], requires_grad=True)
    entropies = forward._entropies(logits.log_softmax(-1))
    entropies.sum().backward()
    left = torch.tensor([0.0, 1.0]).log_softmax(-1)
    torch.testing.assert_close(entropies, -(left.exp() * left).sum()[None])
    assert logits.grad is not None and logits.grad.isfinite().all() and not logits.grad[0, 2:].any()


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def trained(predict: Any, whole: Pack) -> None:
    logprobs, _ = predict(whole)
    (logprobs[whole.terms.logprob] * whole.terms.advantage).sum().backward()


def tiny_qwen() -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(Qwen2Config(**test_packing.SMALL))
    bring_attention(model)
    return model


@pytest.mark.parametrize("wrapper", ["DDP", "FSDP2"])
@pytest.mark.usefixtures("one_process")
def test_a_wrapped_model_gets_the_same_gradients(wrapper: str) -> None:
    """Twice, because DDP refuses a second pass if the first one's gradients did not all come through autograd."""
    whole = pack(score(random_batch(4), AGGREGATIONS["token-mean"]))
    alone, model = tiny_qwen(), tiny_qwen()
    trained(LeanPredict(alone, torch.float32, 0.8), whole)
    wrapped: Any = model
    if wrapper == "DDP":
        wrapped = DistributedDataParallel(model)
    else:
        for part in (*wrapped.model.layers, wrapped):
            fully_shard(part, mesh=init_device_mesh("cpu", (1,)))
    for _ in range(2):
        model.zero_grad()
        trained(TransformersPredict(wrapped, torch.float32, 0.8), whole)
    for ours, theirs in zip(model.parameters(), alone.parameters(), strict=True):
        found: Any = ours.grad
        found = found.full_tensor() if wrapper == "FSDP2" else found
        torch.testing.assert_close(found, theirs.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.usefixtures("one_process")
def test_the_example_of_the_page_runs() -> None:
    page = (Path(__file__).parent.parent / "docs/models.md").read_text(encoding="utf-8")
    [example] = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    whole = pack(score(random_batch(4), AGGREGATIONS["token-mean"]))
    names: dict[str, Any] = {"torch": torch, "model": tiny_qwen(), "packed": whole}
    exec(example, names)
    names["logprobs"].sum().backward()
    assert all(p.grad is not None for p in names["model"].parameters())


@pytest.fixture
def no_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which the meta device has none of."""
    monkeypatch.setattr(torch, "autocast", lambda *given, **options: contextlib.nullcontext())


@pytest.mark.usefixtures("no_autocast")
def test_off_the_cpu_a_learner_is_plain_and_on_one_device() -> None:
    """Meta has no numbers, and mixes with no other device."""
    model = tiny_qwen().to("meta")
    predict = predict_with(model, torch.float32, 0.8)
    assert type(predict) is TransformersPredict
    whole = pack(score(random_batch(4), AGGREGATIONS["token-mean"])).to(model.device)
    logprobs, entropies = predict(whole, entropy=True)
    assert logprobs.shape == whole.target.shape and entropies.shape == whole.rows.shape
    terms = whole.terms
    ((ClippedLoss()(logprobs[terms.logprob], terms) * terms.weight).sum() + entropies.sum()).backward()
    gradient = {p.grad.device.type if p.grad is not None else "none" for p in model.parameters()}
    assert {logprobs.device.type, entropies.device.type, *gradient} == {"meta"}


@pytest.mark.usefixtures("no_autocast")
@pytest.mark.parametrize("way", [TransformersForward, LlamaForward])
def test_off_the_cpu_a_sampler_is_on_one_device(way: type[Any]) -> None:
    passes: Forward = way(tiny_qwen().to("meta"), torch.float32)
    slab = passes.slab()
    slab.reserve(3, 32)
    logits = passes(slab, [Line(0, 0, [1, 2, 3]), Line(2, 4, [5])])
    assert logits.shape == (2, 60) and {logits.device.type, slab.data.device.type} == {"meta"}


def test_a_device_that_is_not_here_is_refused_with_those_that_are(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device_named("cpu") == CPU
    for name in ("hpu", "cuda:99", "gpu", "meta"):
        with pytest.raises(ValueError, match=f"no device '{name}' here; there is cpu"):
            device_named(name)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [str(device_named(name)) for name in ("auto", "cuda", "cuda:1", "cpu")] == ["cuda", "cuda", "cuda:1", "cpu"]
    with pytest.raises(ValueError, match="no device 'cuda:2' here; there is cpu, cuda:0, cuda:1"):
        device_named("cuda:2")


def scenario(**settings: Any) -> Scenario:
    return Scenario(TaskSet("treegym/Lookup-v0"), Model("nano", **settings))


def test_a_scenario_places_its_model_before_anything_runs_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    proved: list[str] = []
    monkeypatch.setattr(build, "device_named", lambda name: torch.device("meta" if name == "mock:1" else name))
    monkeypatch.setattr(build, "bring_attention", lambda model, length: proved.append(model.device.type))
    for weights in ("full", "lora"):
        model, _ = load_model(scenario(device="mock:1", weights=weights))
        assert {p.device.type for p in model.parameters()} == {"meta"}
    assert proved == ["meta", "meta"]


def test_a_scenario_names_the_device_that_is_missing() -> None:
    with pytest.raises(ScenarioError, match=r"^model.device: no device 'cuda:99' here; there is cpu"):
        load_model(scenario(device="cuda:99"))


def test_a_run_records_where_it_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    recorded = settled(scenario(), torch.float32)
    assert recorded.model.device == "cpu"
    assert not changes(recorded, scenario())  # it goes on where it was, unless told otherwise
    assert [change.field for change in changes(recorded, scenario(device="cuda"))] == ["model.device"]


def test_kernels_that_cannot_be_had_are_refused_in_their_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-compiler")
    wanted = scenario(kernels="c")
    with pytest.raises(ScenarioError, match=r"^model.kernels: no kernels in C: .*no-compiler.*install a C compiler"):
        build.computing(wanted, load_model(wanted)[0])


@cuda
@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05)], ids=str)
def test_on_cuda_trees_are_attended_by_flexattention(dtype: torch.dtype, tolerance: float) -> None:
    device = torch.device("cuda")
    for seed in range(3):  # of three lengths: the kernel is compiled for any
        segments = forest(seed, 90)
        theirs, ours = some_heads(segments, torch.float32, CPU), some_heads(segments, dtype, device)
        assert attention.runs_flexible(ours[0])
        expected, found = (TreeAttend(segments)(0, *given, 0.3) for given in (theirs, ours))
        torch.testing.assert_close(found.float().cpu(), expected, atol=tolerance, rtol=tolerance)
        upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
        exact = torch.autograd.grad(expected, theirs, upstream)
        for got, wanted in zip(torch.autograd.grad(found, ours, upstream.to(device, dtype)), exact, strict=True):
            assert (got.float().cpu() - wanted).norm() <= tolerance * wanted.norm()


@cuda
@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 0.1)], ids=str)
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_on_cuda_the_sampler_draws_from_the_learners_distribution(
    kind: str, dtype: torch.dtype, tolerance: float
) -> None:
    model, tokenizer = model_of(kind)
    model.to(torch.device("cuda"))  # type: ignore[arg-type]
    renderer = ChatRenderer(tokenizer)
    policy = TransformersPolicy(model, renderer, dtype=dtype, max_rows=5)
    prompt = renderer.prompt(PROMPTS[0])
    context = Context(prompt)
    samples = ask(policy, [(context, seed) for seed in range(6)], Sampling(max_tokens=12))
    nodes = tuple(Node(ROOT, sample.completion, ()) for sample in samples)
    tree = RolloutTree(Task("none", 0), tuple(prompt), (), nodes, tuple(range(len(nodes))))
    own = Learner(model, Optimization(), dtype=dtype).with_own_logprobs(tree)
    for sampled, learnt in zip(tree.nodes, own.nodes, strict=True):
        assert learnt.action.logprobs == pytest.approx(sampled.action.logprobs, abs=tolerance)


@cuda
@pytest.mark.gpu
def test_on_cuda_a_model_of_half_a_billion_weights_takes_a_step(record_property: Any) -> None:
    shape: dict[str, Any] = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24}
    heads: dict[str, Any] = {"num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True}
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(Qwen2Config(**shape, **heads, vocab_size=151936))
    assert sum(p.numel() for p in model.parameters()) > 4.9e8
    loss: PolicyLoss = ClippedLoss()
    learner = Learner(model, Optimization(learning_rate=1e-4, max_tokens=4096), dtype=torch.bfloat16)
    before = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    metrics = learner.update(random_batch(1), loss)
    record_property("peak memory, GiB", torch.cuda.max_memory_allocated() / 2**30)
    assert metrics["skipped_updates"] == 0 and metrics["grad_norm"] > 0
    assert not torch.equal(before, model.model.layers[0].mlp.up_proj.weight)
