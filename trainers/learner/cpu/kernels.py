"""Kernels: what a Llama-like layer does between its products, with torch or in C."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_float, c_int
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad, silu

from ....agents.inference.cpu.compiler import Array, Library, Parameters, Source, floats, reals
from ....agents.inference.forward import rotate
from ...packing import Segment, TreeAttend, last_seers

SPAN = 32  # keys at a time; the buffers of kernels.c hold a whole multiple of it
_NORM: Parameters = {"n": c_int, "least": c_float, "x": floats("n", "width"), "weight": floats("width")}
_PASS: Parameters = {
    "tokens": c_int,
    "padded": c_int,
    "until": Array(torch.int32, ("padded",)),
    "turns": floats("tokens", 2, "pairs"),
    "joint": reals("tokens", "qkv"),
}
_ROOM = reals("kv_heads", "padded", "dim")  # for the keys of all heads, or for their values
_SEEN, _LENGTHS = reals("tokens", "seen"), floats("heads", "tokens")
SOURCE = Source(
    Path(__file__).with_name("kernels.c"),
    {
        "norm": {**_NORM, "y": reals("n", "width")},
        "norm_backward": {
            **_NORM,
            "gradient": reals("n", "width"),
            "above": floats("n", "width"),
            "sums": floats("threads", "width"),
            "of_weight": floats("width"),
            "out": floats("n", "width"),
        },
        "gate": {"n": c_int, "inner": reals("n", "inner"), "out": reals("n", "hidden")},
        "gate_backward": {
            "n": c_int,
            "inner": reals("n", "inner"),
            "gradient": reals("n", "hidden"),
            "out": reals("n", "hidden"),
            "of_inner": reals("n", "inner"),
        },
        "learn": {
            "tokens": c_int,
            "padded": c_int,
            "outputs": c_int,
            "inputs": c_int,
            "gradient": Array(None, ("tokens", "outputs"), apart="stride"),
            "stride": c_int,
            "x": reals("tokens", "inputs"),
            "across": reals("outputs", "padded"),
            "pairs": reals("inputs", "padded"),
            "out": floats("outputs", "inputs"),
        },
        "attend": {**_PASS, "keys": _ROOM, "values": _ROOM, "seen": _SEEN, "lengths": _LENGTHS},
        "attend_backward": {
            **_PASS,
            "seen": _SEEN,
            "lengths": _LENGTHS,
            "gradient": _SEEN,
            "keys": _ROOM,
            "values": _ROOM,
            "across": _ROOM,
            "sums": floats("threads", "padded", 2, "dim"),
            "within": reals("tokens", "qkv"),
        },
    },
)
Heads = tuple[int, int, int]  # of queries, of keys, and the width d of one


class Kernels(Protocol):
    """What one pass over T packed tokens computes. x and `above`, the gradient that comes from the layers above,
    [T, width], are at least float32, all else is in `dtype`. All are contiguous, except that the rows of the gradients
    that `learn` takes may be apart."""

    dtype: torch.dtype

    def norm(self, x: Tensor, norm: Any) -> Tensor:
        """RMSNorm."""
        ...

    def norm_backward(self, x: Tensor, norm: Any, gradient: Tensor, above: Tensor) -> Tensor:
        """`above` plus the gradient of x, from that of the norm's result; adds up the gradient of the norm's weight."""
        ...

    def attend(self, joint: Tensor) -> tuple[Tensor, Tensor]:
        """joint [T, QKV]: queries, keys and values side by side, not yet turned -> seen [T, heads * d], and what
        else `attend_backward` needs."""
        ...

    def attend_backward(self, joint: Tensor, seen: Tensor, kept: Tensor, gradient: Tensor) -> Tensor:
        """The gradient of joint, from that of seen."""
        ...

    def gate(self, inner: Tensor) -> Tensor:
        """inner [T, 2 * hidden] -> silu(first half) * second half."""
        ...

    def gate_backward(self, inner: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """What `gate` gave, computed again, and the gradient of inner."""
        ...

    def learn(self, total: Tensor, gradient: Tensor, inputs: Tensor) -> None:
        """Adds a weight's gradient to `total` [outputs, width]: gradient [T, outputs], inputs [T, width]."""
        ...


class TorchKernels:
    """Kernels by torch, on any device, in any dtype."""

    def __init__(
        self, dtype: torch.dtype, heads: Heads, segments: Sequence[Segment], tables: tuple[Tensor, Tensor]
    ) -> None:
        """tables: cosines and sines [T, d]."""
        self.dtype = dtype
        self._query_heads, self._kv_heads, self._dim = heads
        self._attend, self._cos, self._sin = TreeAttend(segments), *(table.to(dtype) for table in tables)

    def norm(self, x: Tensor, norm: Any) -> Tensor:
        """In fewer passes over x than torch's own."""
        return (x * _scale(x, norm)).mul_(norm.weight.detach()).to(self.dtype)

    def norm_backward(self, x: Tensor, norm: Any, gradient: Tensor, above: Tensor) -> Tensor:
        weight, scale, gradient = norm.weight.detach(), _scale(x, norm), gradient.to(x.dtype)
        unit = x * scale
        product = gradient * unit
        gradient_of(norm.weight).add_(product.sum(0))
        along = torch.mv(product, weight).div_(-x.shape[-1])[:, None]
        return torch.addcmul(gradient * weight, unit, along).mul_(scale).add_(above)

    def attend(self, joint: Tensor) -> tuple[Tensor, Tensor]:
        return _flat(self._attend(0, *self._turned(joint), None)), joint.new_empty(0)

    def attend_backward(self, joint: Tensor, seen: Tensor, kept: Tensor, gradient: Tensor) -> Tensor:
        query, key, value = self._attend.gradients(self._by_head(gradient), *self._turned(joint), None)
        return _flat(torch.cat([*(rotate(x, self._cos, -self._sin) for x in (query, key)), value]))

    def gate(self, inner: Tensor) -> Tensor:
        gate, up = inner.chunk(2, dim=-1)
        return silu(gate).mul_(up)

    def gate_backward(self, inner: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        within = torch.empty_like(inner)
        (gate, up), (of_gate, of_up) = inner.chunk(2, dim=-1), within.chunk(2, dim=-1)
        opened = silu(gate)
        torch.mul(gradient, opened, out=of_up)
        torch.ops.aten.silu_backward.grad_input(gradient * up, gate, grad_input=of_gate)
        return opened.mul_(up), within

    def learn(self, total: Tensor, gradient: Tensor, inputs: Tensor) -> None:
        _add_product(total, gradient, inputs)

    def _turned(self, joint: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys with their positions, and values: [heads, T, d] each."""
        sizes = [self._query_heads, self._kv_heads, self._kv_heads]
        query, key, value = torch.split(self._by_head(joint), sizes)
        return rotate(query, self._cos, self._sin), rotate(key, self._cos, self._sin), value

    def _by_head(self, x: Tensor) -> Tensor:
        """[T, heads * d] -> [heads, T, d]."""
        return x.view(len(x), -1, self._dim).transpose(0, 1)


def _flat(heads: Tensor) -> Tensor:
    """[heads, T, d] -> [T, heads * d]."""
    return heads.transpose(0, 1).flatten(1)


def _scale(x: Tensor, norm: Any) -> Tensor:
    """1 / sqrt(mean(x²) + eps), as sqrt(width) / hypot(|x|, sqrt(width eps)): [T, 1]."""
    width = x.shape[-1]
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    least = length.new_tensor((width * norm.variance_epsilon) ** 0.5)
    return torch.hypot(length, least).reciprocal_().mul_(width**0.5)


def _add_product(total: Tensor, gradient: Tensor, inputs: Tensor) -> None:
    if total.dtype == inputs.dtype:
        total.addmm_(gradient.T, inputs)
    else:
        total.add_(gradient.T @ inputs)


def gradient_of(parameter: Tensor) -> Tensor:
    """The parameter's gradient, to add to; zeros at first."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


class NativeKernels:
    """Kernels in C, on a CPU: x and weights in float32, all else in that or bfloat16. Each reads and writes its tensors
    once."""

    def __init__(
        self,
        library: Library,
        dtype: torch.dtype,
        heads: Heads,
        segments: Sequence[Segment],
        tables: tuple[Tensor, Tensor],
    ) -> None:
        """tables: cosines and sines [T, d], the second half of each as the first."""
        self.dtype = dtype
        self._library, self._heads = library, heads
        until = last_seers(segments)
        self._until = pad(until, (0, -len(until) % SPAN)).int()
        self._turns = torch.stack([table[:, : heads[2] // 2] for table in tables], dim=1).float()  # [T, 2, d / 2]

    def norm(self, x: Tensor, norm: Any) -> Tensor:
        out = x.new_empty(x.shape, dtype=self.dtype)
        self._library.call("norm", norm.variance_epsilon, x, norm.weight, out)
        return out

    def norm_backward(self, x: Tensor, norm: Any, gradient: Tensor, above: Tensor) -> Tensor:
        out, sums = torch.empty_like(x), x.new_empty(torch.get_num_threads(), x.shape[1])
        gradients = gradient, above, sums, gradient_of(norm.weight)
        self._library.call("norm_backward", norm.variance_epsilon, x, norm.weight, *gradients, out)
        return out

    def attend(self, joint: Tensor) -> tuple[Tensor, Tensor]:
        """What `attend_backward` needs is lengths [heads, T], float32: the log of each softmax's normaliser."""
        heads, _, dim = self._heads
        seen, lengths = joint.new_empty(len(joint), heads * dim), self._turns.new_empty(heads, len(joint))
        rooms = [self._room(joint) for _ in range(2)]
        self._library.call("attend", self._until, self._turns, joint, *rooms, seen, lengths)
        return seen, lengths

    def attend_backward(self, joint: Tensor, seen: Tensor, kept: Tensor, gradient: Tensor) -> Tensor:
        within, rooms = torch.empty_like(joint), [self._room(joint) for _ in range(3)]
        sums = self._turns.new_empty(torch.get_num_threads(), len(self._until), 2, self._heads[2])
        inputs = self._until, self._turns, joint, seen, kept, gradient
        self._library.call("attend_backward", *inputs, *rooms, sums, within)
        return within

    def gate(self, inner: Tensor) -> Tensor:
        out = inner.new_empty(len(inner), inner.shape[1] // 2)
        self._library.call("gate", inner, out)
        return out

    def gate_backward(self, inner: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        out, within = torch.empty_like(gradient), torch.empty_like(inner)
        self._library.call("gate_backward", inner, gradient, out, within)
        return out, within

    def learn(self, total: Tensor, gradient: Tensor, inputs: Tensor) -> None:
        """In C where the processor multiplies tiles; sums are then exact to float32."""
        if not self._library.has("learn") or total.shape[0] % SPAN or total.shape[1] % SPAN:
            _add_product(total, gradient, inputs)
            return
        padded = -(-len(inputs) // SPAN) * SPAN
        across, pairs = (gradient.new_empty(size, padded) for size in total.shape)
        self._library.call("learn", gradient, inputs, across, pairs, total)

    def _room(self, joint: Tensor) -> Tensor:
        _, kv_heads, dim = self._heads
        return joint.new_empty(kv_heads, len(self._until), dim)
