"""One forward pass for the sampler: transformers' own, or a leaner one for Llama-like models."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear, silu
from transformers import PreTrainedModel

from ..models.lora import merged_weight
from .attention import tree_logits
from .kv import KVSlab, Line, SlabAttend


class Forward(Protocol):
    """A pass of lines of tokens through the model."""

    @property
    def batch_invariant(self) -> bool:
        """Whether a line gets the same logits, to the bit, whatever else the pass feeds."""
        ...

    @property
    def kernels(self) -> str:
        """The name of what computes the pass: torch, or C for code of ours."""
        ...

    def slab(self) -> KVSlab:
        """An empty slab of the kind that a pass takes."""
        ...

    def __call__(self, slab: KVSlab, lines: Sequence[Line]) -> Tensor:
        """Logits [lines, vocabulary] after each line; the lines' keys and values are in the slab afterwards."""
        ...

    def refresh(self) -> None:
        """Takes over the model's present weights."""
        ...

    def release(self) -> None:
        """Gives back the memory that copies of the weights take; refresh comes before the next call."""
        ...


def _has_onednn() -> bool:
    return bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


def positions(model: PreTrainedModel) -> int | None:
    """How many tokens of a sequence the model was made for; None where its configuration does not say."""
    known: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return known


def device_named(name: str) -> torch.device:
    """A device such as `cuda:1`; `auto` is CUDA where there is one, else the CPU. ValueError where it is missing."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    here = _devices()
    with contextlib.suppress(RuntimeError):  # torch raises it for a word that names no device
        device = torch.device(name)
        if any(each.type == device.type and device.index in (None, each.index) for each in here):
            return device
    without = "" if torch.version.cuda else " (this torch is built without CUDA)"
    raise ValueError(f"no device {name!r} here; there is {', '.join(map(str, here))}{without}")


def _devices() -> list[torch.device]:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    kind = accelerator.type if accelerator else ""
    count = torch.accelerator.device_count() if accelerator else 0
    return [torch.device("cpu"), *(torch.device(kind, i) for i in range(count))]


def native_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it, else float32: a CPU without AVX-512 is 8 times slower in bfloat16."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = _has_onednn() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if native else torch.float32


def is_plain_llama(model: PreTrainedModel) -> bool:
    """Whether the model is a Llama, Mistral or Qwen2 without any extra."""
    config = model.config
    return (
        config.model_type in ("llama", "mistral", "qwen2")
        and config.hidden_act == "silu"
        and config.rope_parameters["rope_type"] == "default"
    )


def slab_shape(model: PreTrainedModel) -> tuple[int, int, int]:
    """Layers, kv heads and d."""
    config = model.config
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return config.num_hidden_layers, kv_heads, head_dim(config)


def head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


class TransformersForward:
    """The model's own forward."""

    batch_invariant: ClassVar = False
    kernels: ClassVar = "torch"

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        self._model = model
        self.dtype = dtype

    def slab(self) -> KVSlab:
        return KVSlab(*slab_shape(self._model), self.dtype, self._model.device)

    def refresh(self) -> None:
        """Nothing to do: the weights are the model's."""

    def release(self) -> None:
        """Nothing to do either."""

    def __call__(self, slab: KVSlab, lines: Sequence[Line]) -> Tensor:
        attend = SlabAttend(slab, lines)
        feed = attend.feed
        with torch.autocast(feed.tokens.device.type, self.dtype, enabled=self.dtype == torch.bfloat16):
            return tree_logits(self._model, feed.tokens, feed.positions, attend, feed.last)


class _Linear:
    """x @ weight.T + bias; on a CPU the weight is laid out once for oneDNN."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight, self._bias = weight, bias
        self._packed = (
            weight.device.type == "cpu"
            and _has_onednn()
            and weight.dtype in (torch.float32, native_dtype(weight.device))
        )
        if self._packed:
            # the layout is chosen for batches of 8 rows, and is as good for hundreds
            self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, 8)

    def __call__(self, x: Tensor) -> Tensor:
        if self._packed:
            out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
            return out
        return linear(x, self._weight, self._bias)


class LlamaForward:
    """Llama, Mistral and Qwen2 blocks with merged projections and pre-packed weights in one dtype.

    Weights are rounded as the learner rounds them, each tensor by itself: a norm's weights, multiplied into those of
    the projections behind it, would round otherwise, and after some updates sampler and learner would be two policies.
    Inside a head, the two dimensions that rotary embedding turns together lie side by side, as one complex number;
    scores do not depend on the order of the dimensions.
    """

    batch_invariant: ClassVar = False
    kernels: ClassVar = "torch"

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        self._model = model
        self.dtype = dtype
        config = model.config
        self._heads: int = config.num_attention_heads
        self._kv_heads: int = config.num_key_value_heads
        self._dim = head_dim(config)
        self._root: float = config.hidden_size**0.5
        self._least = torch.tensor(self._root * config.rms_norm_eps**0.5, device=model.device)  # see _normed
        self.refresh()

    def slab(self) -> KVSlab:
        return KVSlab(*slab_shape(self._model), self.dtype, self._model.device)

    @torch.no_grad()
    def refresh(self) -> None:
        model: Any = self._model
        self._embedding = model.model.embed_tokens.weight.detach().to(self.dtype)
        self._frequencies = model.model.rotary_emb.inv_freq.float()  # [d / 2]
        self._norm = self._scale(model.model.norm)
        self._head = self._merge(model.lm_head)
        self._layers = [self._layer(layer) for layer in model.model.layers]

    def release(self) -> None:
        self._layers = []
        nothing: Any = None
        self._embedding = self._norm = self._head = nothing

    def _scale(self, norm: Any) -> Tensor:
        """The norm's weights, for vectors that were divided by their length."""
        scale: Tensor = norm.weight.detach().float() * self._root
        return scale

    def _merge(self, *modules: torch.nn.Linear, turned: int = 0) -> Any:
        """One linear layer of the modules side by side; rotary embedding turns what the first `turned` of them give."""
        weights = [merged_weight(module) for module in modules]
        biases = [module.bias.detach() for module in modules if module.bias is not None]
        weights[:turned], biases[:turned] = map(self._paired, weights[:turned]), map(self._paired, biases[:turned])
        weight = torch.cat([weight.to(self.dtype) for weight in weights])
        return self._laid_out(weight, torch.cat(biases).to(self.dtype) if biases else None)

    def _laid_out(self, weight: Tensor, bias: Tensor | None) -> Any:
        return _Linear(weight, bias)

    def _paired(self, rows: Tensor) -> Tensor:
        """Rows [heads · d, …] in another order: in each head, row i + d / 2 comes right after row i."""
        return rows.view(-1, 2, self._dim // 2, *rows.shape[1:]).transpose(1, 2).flatten(0, 2)

    def _layer(self, layer: Any) -> tuple[Any, ...]:
        attention, mlp = layer.self_attn, layer.mlp
        return (
            self._scale(layer.input_layernorm),
            self._merge(attention.q_proj, attention.k_proj, attention.v_proj, turned=2),
            self._merge(attention.o_proj),
            self._scale(layer.post_attention_layernorm),
            self._merge(mlp.gate_proj, mlp.up_proj),
            self._merge(mlp.down_proj),
        )

    @torch.no_grad()
    def __call__(self, slab: KVSlab, lines: Sequence[Line]) -> Tensor:
        attend = SlabAttend(slab, lines)
        feed = attend.feed
        x, turns = self._embedded(feed.tokens), self._turns(feed.positions)[:, None]
        keys, values = self._heads, self._heads + self._kv_heads  # the first head of each
        for index, (norm, qkv, out, mlp_norm, gate_up, down) in enumerate(self._layers):
            heads = qkv(self._normed(x, norm)).view(len(x), -1, self._dim)  # [T, heads, d]
            turn(heads[:, :values], turns)
            heads = heads.transpose(0, 1)
            seen = attend(index, heads[:keys], heads[keys:values], heads[values:], None)
            x += out(seen.transpose(0, 1).reshape(len(x), -1))
            gate, up = gate_up(self._normed(x, mlp_norm)).chunk(2, dim=-1)
            x += down(silu(gate).mul_(up))
        logits: Tensor = self._head(self._normed(x[feed.last], self._norm))
        return logits

    def _embedded(self, tokens: Tensor) -> Tensor:
        """[T, width], float32, as in the learner: the blocks add to it what they compute."""
        return embedding(tokens, self._embedding).float()

    def _turns(self, positions: Tensor) -> Tensor:
        """Complex numbers [T, d / 2] that queries and keys are multiplied with."""
        angles = positions[:, None] * self._frequencies
        return torch.polar(torch.ones_like(angles), angles)

    def _normed(self, x: Tensor, scale: Tensor) -> Tensor:
        """RMSNorm of [T, width]: x / sqrt(mean(x²) + eps) is sqrt(width) x / hypot(|x|, sqrt(width eps))."""
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        return (x / torch.hypot(length, self._least) * scale).to(self.dtype)


def turn(heads: Tensor, turns: Tensor) -> None:
    """Rotary position embedding of [T, heads, d], in place, by complex numbers [T, 1, d / 2]."""
    pairs = heads.view(*heads.shape[:2], -1, 2)
    pairs.copy_(torch.view_as_real(torch.view_as_complex(pairs.float()) * turns))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of [heads, T, d]."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin
