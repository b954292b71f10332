"""The door to the C refuses every tensor that is not what C would read there, by name."""

from __future__ import annotations

import ctypes
import gc
import re
import shutil
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from processors import compiled_for
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedModel

from treegym.agents.inference.cpu import compiler, native
from treegym.agents.inference.cpu.compiler import Array, Library, Pointers, Sizes, choose_kernels, library_for
from treegym.agents.inference.cpu.native import NativeForward, forward_for
from treegym.agents.inference.forward import LlamaForward
from treegym.trainers import Learner, Optimization
from treegym.trainers.learner.cpu import kernels

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler, as `cc`")

SIZES = Sizes(width=64, hidden=96, heads=2, kv_heads=1, dim=32, bfloat16=False)
SOURCES = {"native.c": native.SOURCE, "kernels.c": kernels.SOURCE}
CALLS = [(file, function) for file, source in SOURCES.items() for function in source.functions]
FREE = {"n": 3, "tokens": 3, "padded": 32, "outputs": 32, "inputs": 32, "layers": 1, "slab_rows": 2, "capacity": 128}


def arguments(library: Library, function: str) -> dict[str, Any]:
    """All that the function takes of a caller, by name, as C would read it; never to be called."""
    sizes = {**library.sizes.named(), **FREE, "threads": torch.get_num_threads()}
    given: dict[str, Any] = {}
    for name in library._passed[function]:
        kind = library._functions[function][name]
        if isinstance(kind, Array):
            shape = [sizes[size] if isinstance(size, str) else size for size in kind.shape]
            given[name] = torch.zeros(shape, dtype=kind.dtype or library.sizes.dtype)
            if kind.pointers:
                given[name] = Pointers([[None] * shape[1]] * shape[0])
        else:
            given[name] = 0
    return given


def spoiled(tensor: Tensor) -> dict[str, Tensor]:
    """By what an error must say of it."""
    with_gaps = torch.stack((tensor, tensor), -1)[..., 0]
    assert not with_gaps.is_contiguous()
    other = torch.complex128 if tensor.is_complex() else torch.float64
    return {
        str(other).removeprefix("torch."): tensor.to(other),
        "not contiguous": with_gaps,
        "on meta": tensor.to("meta"),
    }


@pytest.mark.parametrize(("file", "function"), CALLS, ids=[" ".join(call) for call in CALLS])
def test_what_c_would_misread_is_refused_by_name(file: str, function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if file == "kernels.c" and function == "learn":  # which only a processor that multiplies tiles has
        monkeypatch.setattr(ctypes.CDLL, "__getattr__", lambda self, name: SimpleNamespace())
    library = compiled_for("native", SOURCES[file], SIZES, monkeypatch)
    good = arguments(library, function)
    tensors = [name for name, value in good.items() if isinstance(value, Tensor)]
    for name in tensors:
        for said, bad in spoiled(good[name]).items():
            place = f"{file}: {function}: {name} is "
            with pytest.raises(ValueError, match=f"{re.escape(place)}.*{re.escape(said)}.*C takes .*, on cpu"):
                library.call(function, *{**good, name: bad}.values())
        for bad in (good[name][None], torch.cat((good[name], good[name]))):  # the other tensors say what is right
            with pytest.raises(ValueError, match=f"{file}: {function}: .* C takes"):
                library.call(function, *{**good, name: bad}.values())
    for name in good.keys() - tensors:
        with pytest.raises(TypeError, match=f"{re.escape(f'{file}: {function}: {name}')} is a Tensor"):
            library.call(function, *{**good, name: torch.zeros(1, 10, dtype=torch.int64)}.values())
    with pytest.raises(ValueError, match="zip"):
        library.call(function, *[*good.values()][:-1])


def llama(**settings: Any) -> PreTrainedModel:
    small = {"vocab_size": 60, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    config = LlamaConfig(**small, num_attention_heads=2, num_key_value_heads=1, **settings)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    return model


def test_weights_that_c_would_misread_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    library = compiled_for("native", native.SOURCE, SIZES, monkeypatch)
    with pytest.raises(ValueError, match=r"native.c: layer: weight 1 is int32 \[.*C takes int32 \["):
        NativeForward(llama(), torch.float64, library)
    forward = NativeForward(llama(), torch.float32, library)
    changed: Any = forward._model
    changed.model.layers[1].mlp.gate_proj = torch.nn.Linear(64, 64, bias=False)
    with pytest.raises(ValueError, match=r"layer: weight 6 is int32 .*C takes int32"):
        forward.refresh()


def test_a_pass_keeps_the_weights_that_c_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refresh during a pass takes no memory from under it."""
    forward = NativeForward(llama(), torch.float32, compiled_for("native", native.SOURCE, SIZES, monkeypatch))
    table = forward._table
    weight = weakref.ref(forward._layers[0][1][0])
    forward.refresh()
    assert weight() is not None and int(table.addresses[0, 1]) == weight().data_ptr()
    del table
    gc.collect()
    assert weight() is None


def test_torch_is_chosen_without_a_compiler_being_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    choose_kernels(model, "torch")
    monkeypatch.setattr(compiler, "compiled", lambda *given: pytest.fail("it compiles"))
    assert type(forward_for(model, torch.float32)) is LlamaForward
    predict: Any = Learner(model, Optimization(), dtype=torch.float32)._predict
    assert predict._library is None


@pytest.mark.parametrize(
    ("model", "dtype", "reason"),
    [
        (llama(), torch.float64, "float32 or bfloat16, not float64"),
        (llama(head_dim=16), torch.float32, "multiples of 32"),
        (llama().to("meta"), torch.float32, "on meta"),
        (AutoModelForCausalLM.from_config(GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=60)), None, "gpt2"),
        (llama(), torch.float32, "no-compiler.*install a C compiler.*CC"),
    ],
)
def test_c_is_refused_where_it_cannot_be(
    model: PreTrainedModel, dtype: torch.dtype, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", "no-compiler")
    choose_kernels(model, "c")
    with pytest.raises(ValueError, match=f"no kernels in C: .*{reason}.*`torch` do without"):
        library_for(native.SOURCE, model, dtype or torch.float32, "")
    choose_kernels(model, "auto")
    assert library_for(native.SOURCE, model, dtype or torch.float32, "") is None


def test_c_is_c() -> None:
    model = llama()
    choose_kernels(model, "c")
    assert isinstance(forward_for(model, torch.float32), NativeForward)
    predict: Any = Learner(model, Optimization(), dtype=torch.float32)._predict
    assert predict._library is not None
