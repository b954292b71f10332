"""What a layer does between its products is in C what it is in torch, by every way that there is to multiply."""

from __future__ import annotations

import itertools
import random
import shutil
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from processors import WAYS, compiled_for
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen2Config

from treegym.agents import ROOT, Completion, Node, RolloutTree
from treegym.agents.inference.cpu.compiler import Sizes
from treegym.envs import Task
from treegym.trainers import Advantages, Learner, Optimization
from treegym.trainers.learner.cpu.kernels import SOURCE, Kernels, NativeKernels, TorchKernels
from treegym.trainers.learner.cpu.llama import LlamaPredict
from treegym.trainers.losses import AGGREGATIONS, ReinforceLoss
from treegym.trainers.packing import Segment, last_seers, pack, score

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler, as `cc`")

WIDTH, HIDDEN = 96, 160
HEADS = {"grouped": (6, 2, 32), "one each": (2, 2, 64), "one key": (5, 1, 96)}


def forest(lengths: tuple[int, int], seed: int = 0) -> list[Segment]:
    """Segments of several trees, depth first."""
    draw = random.Random(seed)
    segments: list[Segment] = []

    def grow(ancestors: tuple[int, ...], depth: int) -> None:
        segments.append(Segment(draw.randint(*lengths), ancestors))
        below = (*ancestors, len(segments) - 1)
        for _ in range(draw.randint(1, 3) if depth < 3 else 0):
            grow(below, depth + 1)

    for _ in range(2):
        grow((), 0)
    return segments


FORESTS = {
    "a token": [Segment(1)],
    "short": forest((1, 7)),
    "long": forest((1, 40)),
    "chains": [Segment(65), Segment(194)],  # one block of queries and a token
}


class Case:
    """What goes into the kernels of a pass."""

    def __init__(self, heads: tuple[int, int, int], segments: list[Segment], dtype: torch.dtype) -> None:
        draw = torch.Generator().manual_seed(0)
        tokens = sum(segment.length for segment in segments)

        def some(*shape: int) -> Tensor:
            return torch.randn(shape, generator=draw)

        query_heads, kv_heads, dim = heads
        angles = some(tokens, dim // 2).tile(2)
        self.tables = angles.cos(), angles.sin()
        self.x, self.above = some(tokens, WIDTH) * 3, some(tokens, WIDTH)
        self.scales = some(WIDTH) + 1
        self.of_normed, self.inner, self.of_opened = some(tokens, WIDTH), some(tokens, 2 * HIDDEN), some(tokens, HIDDEN)
        self.inner *= 4
        self.joint, self.of_seen = some(tokens, (query_heads + 2 * kv_heads) * dim), some(tokens, query_heads * dim)
        for name in ("of_normed", "inner", "of_opened", "joint", "of_seen"):
            setattr(self, name, getattr(self, name).to(dtype))

    def found(self, kernels: Kernels, wide: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """All that the kernels give; what lies in float32 as `wide`."""
        norm: Any = SimpleNamespace(weight=self.scales.to(wide), variance_epsilon=1e-5)
        norm.weight.grad = torch.ones_like(norm.weight)
        x, above = self.x.to(wide), self.above.to(wide)
        given = (y.to(kernels.dtype) for y in (self.of_normed, self.inner, self.of_opened, self.joint, self.of_seen))
        of_normed, inner, of_opened, joint, of_seen = given
        found = {"norm": kernels.norm(x, norm), "of x": kernels.norm_backward(x, norm, of_normed, above)}
        found |= {"of norm": norm.weight.grad, "gate": kernels.gate(inner)}
        found["gate again"], found["of inner"] = kernels.gate_backward(inner, of_opened)
        found["seen"], kept = kernels.attend(joint)
        found["of joint"] = kernels.attend_backward(joint, found["seen"], kept, of_seen)
        found["of weight"] = torch.ones(HIDDEN, WIDTH, dtype=wide)
        kernels.learn(found["of weight"], inner[:, HIDDEN:], of_normed)
        return found


@pytest.fixture(params=list(itertools.product(WAYS, (torch.float32, torch.bfloat16))), ids=str)
def way(request: pytest.FixtureRequest) -> tuple[str, torch.dtype]:
    given: tuple[str, torch.dtype] = request.param
    return given


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("segments", FORESTS.values(), ids=FORESTS)
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@torch.no_grad()
def test_kernels_in_c_are_as_exact_as_torchs(
    way: tuple[str, torch.dtype],
    heads: tuple[int, int, int],
    segments: list[Segment],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name, dtype = way
    case = Case(heads, segments, dtype)
    library = compiled_for(name, SOURCE, Sizes(WIDTH, HIDDEN, *heads, dtype == torch.bfloat16), monkeypatch)
    exact = case.found(TorchKernels(torch.float64, heads, segments, case.tables), torch.float64)
    theirs = case.found(TorchKernels(dtype, heads, segments, case.tables))
    native = NativeKernels(library, dtype, heads, segments, case.tables)
    ours, again = case.found(native), case.found(native)
    for key, truth in exact.items():
        wrong, usual = ((found[key] - truth).norm() / truth.norm() for found in (ours, theirs))
        assert wrong <= 2 * usual + 1e-6, key
        assert torch.equal(ours[key], again[key]), key


def test_a_gradient_of_more_tokens_than_stay_near(
    way: tuple[str, torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, dtype = way
    draw, tokens = torch.Generator().manual_seed(0), 6001
    gradient, inputs = (torch.randn(tokens, width, generator=draw).to(dtype) for width in (64, WIDTH))
    heads, segments, tables = HEADS["grouped"], [Segment(tokens)], (torch.ones(tokens, 32), torch.zeros(tokens, 32))
    library = compiled_for(name, SOURCE, Sizes(WIDTH, HIDDEN, *heads, dtype == torch.bfloat16), monkeypatch)
    if not hasattr(library, "learn"):
        pytest.skip("torch multiplies: C has no tiles here")
    total = torch.ones(64, WIDTH)
    NativeKernels(library, dtype, heads, segments, tables).learn(total, gradient, inputs)
    torch.testing.assert_close(total.double(), 1 + gradient.double().T @ inputs.double(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("part", ["query", "key"])
@torch.no_grad()
def test_what_is_no_number_is_not_hidden(
    way: tuple[str, torch.dtype], part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A learner whose weights have come to nothing must see it."""
    name, dtype = way
    heads, segments = HEADS["grouped"], [Segment(70), Segment(9, (0,)), Segment(20, (0,))]
    case = Case(heads, segments, dtype)
    case.joint[75, 0 if part == "query" else heads[0] * heads[2]] = float("nan")
    library = compiled_for(name, SOURCE, Sizes(WIDTH, HIDDEN, *heads, dtype == torch.bfloat16), monkeypatch)
    native = NativeKernels(library, dtype, heads, segments, case.tables)
    seen, kept = native.attend(case.joint)
    touched = seen.isnan().any(1)
    assert touched.nonzero().flatten().tolist() == ([75] if part == "query" else [75, 76, 77, 78])
    assert native.attend_backward(case.joint, seen, kept, case.of_seen)[75].isnan().any()


def test_a_token_is_seen_by_what_lies_below_it() -> None:
    segments = [Segment(2), Segment(1, (0,)), Segment(3, (0, 1)), Segment(2, (0,)), Segment(1)]
    assert last_seers(segments).tolist() == [8, 8, 6, 6, 6, 6, 8, 8, 9]
    with pytest.raises(ValueError, match="depth first"):
        last_seers([Segment(2), Segment(1, (0,)), Segment(1), Segment(1, (0,))])


def tree(draw: random.Random) -> RolloutTree:
    """Three turns, of which each has two continuations."""

    def some(n: int) -> tuple[int, ...]:
        return tuple(draw.randrange(300) for _ in range(n))

    nodes = [Node(i // 2 - 1 if i > 1 else ROOT, Completion("", some(9), (-5.5,) * 9), some(11)) for i in range(14)]
    return RolloutTree(Task("none", 0), some(40), (), tuple(nodes), tuple(range(6, 14)))


SHAPE: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
CONFIGS = {
    "three parts of a tied output layer": LlamaConfig(**SHAPE, head_dim=32, vocab_size=4160, tie_word_embeddings=True),
    "outputs in no whole tiles": LlamaConfig(**SHAPE, head_dim=32, vocab_size=300),
    "biased": Qwen2Config(**SHAPE | {"hidden_size": 192}, vocab_size=300),
}


@pytest.mark.parametrize(
    ("dtype", "config"),
    [(torch.float32, config) for config in CONFIGS.values()] + [(torch.bfloat16, CONFIGS["outputs in no whole tiles"])],
    ids=[*CONFIGS, "in bfloat16"],
)
def test_a_whole_update_moves_along_the_exact_gradient(dtype: torch.dtype, config: PreTrainedConfig) -> None:
    grown = tree(random.Random(0))
    advantages: Advantages = [[(-1.0) ** i * (i + 1)] * len(path) for i, path in enumerate(grown.paths)]
    found = []
    for precision in (dtype, torch.float64):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)  # biases begin as zeros
        model.to(torch.promote_types(precision, torch.float32))
        learner = Learner(model, Optimization(), dtype=precision)
        predict = learner._predict
        assert isinstance(predict, LlamaPredict) and bool(predict._library) == (precision == dtype)
        learner.accumulate(pack(score([(grown, advantages)], AGGREGATIONS["token-mean"])), ReinforceLoss())
        found.append(torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None]))
    ours, exact = found
    assert (
        len(ours) == len(exact) and (ours - exact).norm() <= (1e-5 if dtype == torch.float32 else 0.03) * exact.norm()
    )


def test_without_a_compiler_torch_does_it(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("CC", "no-compiler")
    config = LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1
    )
    predict: Any = Learner(AutoModelForCausalLM.from_config(config), Optimization(), dtype=torch.float32)._predict
    assert predict._library is None and "no-compiler" in caplog.text
