"""Which models run on trees: those that are proved to compute there what they compute on plain sequences."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel

from .attention import BROUGHT, tree_logits
from .forward import slab_shape
from .kv import KVSlab, Line, SlabAttend

SHORT = 16  # tokens per path of the first proof
BRANCH = 6  # how many of them come after the fork
_CHANGES = re.compile("window|chunk|original_max_position_embeddings")  # settings that hold a length ...
_STEADY = ("default", "linear", "llama3", "yarn")  # ... after which these kinds of rotary embedding stay the same


@dataclass(frozen=True, slots=True)
class _Proof:
    length: int  # tokens of context up to which the model was proved
    plain: str  # the attention implementation that it had before


_proofs: WeakKeyDictionary[PreTrainedModel, _Proof] = WeakKeyDictionary()


def bring_attention(model: PreTrainedModel, length: int = SHORT) -> None:
    """Switches the model to the attention that callers bring, for contexts of up to `length` tokens.

    Raises ValueError, one line, for models that cannot run on trees of that length; they stay as they were. It is
    proved on forked sequences that positions come through position_ids alone, that attention is full and causal, and
    that the model keeps nothing but keys and values of what it read. Where the config names a window, a chunk or
    another rotation that begins below `length`, a sequence that goes past it is tried as well.
    """
    present: str = model.config._attn_implementation
    proof = _proofs.get(model, _Proof(0, "eager" if present == BROUGHT else present))  # a copy is not in _proofs
    if length <= proof.length:
        if present != BROUGHT:
            model.set_attn_implementation(BROUGHT)
        return
    if kinds := _stateful(model):
        raise ValueError(f"{type(model).__name__} has {kinds} layers, which keep a state that forks cannot share")
    if not getattr(model, "_supports_attention_backend", False):
        raise ValueError(f"{type(model).__name__} has attention of its own; trees need to bring theirs")
    try:
        if not proof.length:
            _prove(model, proof.plain, SHORT // 2, SHORT)
        for change in _changes(model, proof.length, length):
            _prove(model, proof.plain, change, min(length, change + change // 4 + 2 * BRANCH))
        model.set_attn_implementation(BROUGHT)
    except BaseException:
        model.set_attn_implementation(present)
        raise
    _proofs[model] = _Proof(max(length, SHORT), proof.plain)


def _changes(model: PreTrainedModel, proven: int, length: int) -> list[int]:
    """Numbers of tokens, from `proven` to below `length`, after which the config lets the model compute otherwise."""
    config = model.config.get_text_config()
    sizes = set(_sizes(config.to_dict(), getattr(config, "max_position_embeddings", 0)))
    return sorted(size for size in sizes if max(proven, SHORT) <= size < length)


def _sizes(config: Mapping[str, Any], positions: int) -> Iterator[int]:
    if config.get("rope_type") == "dynamic":
        yield positions
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _sizes(value, positions)
        elif isinstance(value, int) and _CHANGES.search(name) and config.get("rope_type") not in _STEADY:
            yield value


@torch.no_grad()
def _prove(model: PreTrainedModel, plain: str, change: int, length: int) -> None:
    """ValueError unless two paths of `length` tokens that fork near their end have the logits that each has on its own.

    They are computed as the learner does, in one pass, and as the sampler does: the tokens before `change`, then the
    rest up to the fork, then both branches, each time onto the keys and values that are cached.
    """
    trunk = length - BRANCH
    vocabulary: int = model.config.get_text_config().vocab_size
    tokens = 1 + torch.arange(trunk + 2 * BRANCH, device=model.device) * 7919 % (vocabulary - 1)
    first, second = tokens[trunk : trunk + BRANCH], tokens[trunk + BRANCH :]
    model.set_attn_implementation(plain)
    paths = [torch.cat((tokens[:trunk], branch)) for branch in (first, second)]
    expected = torch.cat([_plain_logits(model, path) for path in paths])
    model.set_attn_implementation(BROUGHT)
    try:
        ways = _packed(model, tokens, trunk), _cached(model, tokens, min(change - 1, trunk), trunk)
    except (TypeError, AttributeError, LookupError, RuntimeError, ValueError) as error:
        fault = str(error).partition("\n")[0]
        raise ValueError(f"{type(model).__name__} cannot run on trees: {fault}") from error
    way_out = f"; with sampling.max_context up to {change} it may not" if change >= SHORT else ""
    allowed = (3e-4 if model.dtype.itemsize >= 4 else 0.1) * expected.std()
    for logits, way in zip(ways, ("packed in one pass", "onto a cache of keys and values"), strict=True):
        if not (logits.float() - expected).abs().max() <= allowed:
            raise ValueError(
                f"{type(model).__name__} computes other logits on forks of {length} tokens, {way}, than on plain "
                f"sequences{way_out}"
            )


def _plain_logits(model: PreTrainedModel, path: Tensor) -> Tensor:
    """Logits [BRANCH, vocabulary] at the path's end, float32."""
    forward: Any = model
    logits: Tensor = forward(input_ids=path[None], use_cache=False, logits_to_keep=BRANCH).logits[0]
    return logits.float()


def _packed(model: PreTrainedModel, tokens: Tensor, trunk: int) -> Tensor:
    """Logits [2 BRANCH, vocabulary] of the two branches."""
    positions = torch.arange(len(tokens), device=tokens.device)
    rows = positions[trunk:].clone()
    positions[trunk + BRANCH :] -= BRANCH
    return tree_logits(model, tokens, positions, ForkAttend(trunk, BRANCH), rows)


def _cached(model: PreTrainedModel, tokens: Tensor, start: int, trunk: int) -> Tensor:
    """The same logits, where each branch goes on from a slab row that holds the trunk."""
    slab, numbers = KVSlab(*slab_shape(model), model.dtype, model.device), tokens.tolist()
    slab.reserve(2, trunk + BRANCH)
    for begin, end in ((0, start), (start, trunk)):
        if end > begin:
            _feed(model, slab, [Line(0, begin, numbers[begin:end])])
    slab.copy(0, 1, trunk)
    branches = numbers[trunk : trunk + BRANCH], numbers[trunk + BRANCH :]
    return _feed(model, slab, [Line(row, trunk, branch) for row, branch in enumerate(branches)])


def _feed(model: PreTrainedModel, slab: KVSlab, lines: list[Line]) -> Tensor:
    attend = SlabAttend(slab, lines)
    rows = torch.arange(len(attend.feed.tokens), device=model.device)[-2 * BRANCH :]
    return tree_logits(model, attend.feed.tokens, attend.feed.positions, attend, rows)


def _stateful(model: PreTrainedModel) -> str:
    """The kinds of layers, as the config names them, that keep a state other than keys and values; empty if none."""
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or ()
    return ", ".join(sorted({kind for kind in kinds if "attention" not in kind or "linear" in kind}))


class ForkAttend:
    """Full causal attention over a trunk and branches of equal length, none of which sees another."""

    def __init__(self, trunk: int, branch: int) -> None:
        self._trunk, self._branch = trunk, branch

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        place = torch.arange(query.shape[1], device=query.device)
        branch = (place - self._trunk).div(max(self._branch, 1), rounding_mode="floor").clamp(min=-1)  # -1: the trunk
        seen = (place[:, None] >= place) & ((branch == -1) | (branch[:, None] == branch))
        key, value = (x.to(query.dtype).repeat_interleave(len(query) // len(x), 0) for x in (key, value))
        return scaled_dot_product_attention(query, key, value, seen, scale=scale)
