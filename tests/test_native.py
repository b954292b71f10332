"""The passes in C give what torch gives, by every way that native.c has to multiply."""

from __future__ import annotations

import itertools
import random
import shutil
from collections import defaultdict
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from processors import WAYS, compiled_for
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen2Config

from treegym.agents.inference.acceptance import ForkAttend, bring_attention
from treegym.agents.inference.attention import tree_logits
from treegym.agents.inference.cpu.compiler import Sizes, compiled
from treegym.agents.inference.cpu.native import SOURCE, NativeForward, forward_for
from treegym.agents.inference.forward import Forward, LlamaForward
from treegym.agents.inference.kv import Line

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler, as `cc`")

VOCABULARY = 300  # no multiple of a tile
SHAPES = {  # of query heads that share keys, three, one, and more than native.c takes at a time
    "grouped": LlamaConfig(hidden_size=96, num_attention_heads=6, num_key_value_heads=2, head_dim=32),
    "biased": Qwen2Config(hidden_size=128, num_attention_heads=2, num_key_value_heads=2),
    "one key": LlamaConfig(hidden_size=160, num_attention_heads=40, num_key_value_heads=1, head_dim=32),
}


@pytest.fixture(params=SHAPES)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    config = SHAPES[request.param]
    config.update({"intermediate_size": 160, "num_hidden_layers": 2, "vocab_size": VOCABULARY})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = AutoModelForCausalLM.from_config(config).eval()
        for name, parameter in made.named_parameters():
            parameter.data = torch.randn_like(parameter) * (0.15 if "proj" in name else 1.0)
    bring_attention(made)
    return made


@pytest.fixture(params=list(itertools.product(WAYS, (torch.float32, torch.bfloat16))), ids=str)
def native(request: pytest.FixtureRequest, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> NativeForward:
    way, dtype = request.param
    return NativeForward(model, dtype, compiled_for(way, SOURCE, Sizes.of(model.config, dtype), monkeypatch))


def tokens(n: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(VOCABULARY), k=n)


# Contexts that grow over passes and past what is taken at a time, of tokens and of keys.
PASSES = [
    [Line(0, 0, tokens(301)), Line(2, 0, tokens(5, 1))],
    [Line(2, 5, tokens(1, 2)), Line(1, 0, tokens(130, 3)), Line(0, 301, tokens(40, 4))],
    [Line(0, 341, tokens(1, 5)), Line(1, 130, tokens(1, 6)), Line(2, 6, tokens(1, 7))],
]


def fed(forward: Forward, passes: Sequence[Sequence[Line]]) -> torch.Tensor:
    """Logits after each line of each pass, over one slab."""
    slab = forward.slab()
    slab.reserve(4, 600)
    return torch.cat([forward(slab, lines).float() for lines in passes])


def exact(model: PreTrainedModel, passes: Sequence[Sequence[Line]]) -> torch.Tensor:
    """The same by the model itself in float64, from all tokens of a row each time."""
    precise, contexts, logits = deepcopy(model).double(), defaultdict(list), []
    for line in itertools.chain(*passes):
        contexts[line.row] += line.tokens
        whole = torch.tensor(contexts[line.row])
        with torch.no_grad():
            logits.append(tree_logits(precise, whole, torch.arange(len(whole)), ForkAttend(len(whole), 0))[-1])
    return torch.stack(logits)


def test_logits_are_as_exact_as_torchs(native: NativeForward, model: PreTrainedModel) -> None:
    truth = exact(model, PASSES)
    torchs, ours = (fed(forward, PASSES) - truth for forward in (LlamaForward(model, native.dtype), native))
    assert ours.abs().max() < 4 * torchs.abs().max()  # the sums are in another order
    assert ours.abs().max() < (1e-3 if native.dtype == torch.float32 else 0.3) * truth.std()


def test_a_tokens_bits_do_not_depend_on_the_rest_of_the_pass(native: NativeForward) -> None:
    together = fed(native, PASSES)
    one_by_one = [
        [[Line(line.row, line.start + i, [token])] for i, token in enumerate(line.tokens)]
        for line in itertools.chain(*PASSES)
    ]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = fed(native, list(itertools.chain(*one_by_one)))
    finally:
        torch.set_num_threads(threads)
    ends = torch.tensor([len(line) for line in one_by_one]).cumsum(0)
    assert torch.equal(alone[ends - 1], together)


def test_keys_and_values_move_by_the_token(native: NativeForward) -> None:
    slab = native.slab()
    slab.reserve(3, 200)
    shape = slab.data.shape[0], 2, slab.data.shape[3], 200, slab.data.shape[5]
    whole = torch.randn(shape).to(slab.data.dtype)
    for start, end in ((131, 200), (0, 1), (33, 131), (1, 33)):
        slab.write(1, start, whole[..., start:end, :])
    slab.copy(1, 2, 150)
    slab.write(1, 77, -whole[..., 77:78, :])
    slab.reserve(4, 700, [(2, 150)])
    assert torch.equal(slab.read(2, 0, 150), whole[..., :150, :])
    slab.reserve(4, 900, [(2, 140)])
    assert torch.equal(slab.read(2, 129, 140), whole[..., 129:140, :])


@pytest.mark.parametrize("line", [Line(4, 0, [1]), Line(0, 640, [1])], ids=["row", "position"])
def test_nothing_is_written_beyond_the_slab(native: NativeForward, line: Line) -> None:
    slab = native.slab()
    slab.reserve(4, 600)  # 640: a whole number of KEYS
    with pytest.raises(IndexError, match="4 rows of 640 tokens"):
        native(slab, [line])


def test_without_a_compiler_torch_does_it(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CC", "no-compiler")
    assert type(forward_for(model, torch.float32)) is LlamaForward
    assert "no-compiler" in caplog.text


@pytest.mark.parametrize("model", ["grouped"], indirect=True)
def test_what_was_compiled_is_kept(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TREEGYM_CACHE", str(tmp_path))
    sizes = Sizes.of(model.config, torch.float32)
    compiled(SOURCE, sizes)
    [library] = tmp_path.rglob("native.so")
    written = library.stat().st_mtime_ns
    compiled(SOURCE, sizes)
    assert [kept.stat().st_mtime_ns for kept in tmp_path.rglob("native.so")] == [written]
