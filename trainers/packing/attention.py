"""Attention of a pack: each token sees its ancestors in the tree and itself, and no other."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from ...agents.inference.attention import (
    BLOCK,
    Block,
    block_attention,
    block_gradients,
    causal_attention,
    flexible_attention,
    runs_flexible,
)
from .layout import Segment


class TreeAttend:
    """Attention of packed tokens to the earlier tokens of their segment and to the segment's ancestors.

    It runs on a CPU by blocks of queries, on CUDA by FlexAttention, and elsewhere segment by segment.
    """

    def __init__(self, segments: Sequence[Segment]) -> None:
        self._segments = segments
        self._mask: BlockMask | None = None

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        if query.device.type == "cpu":
            return block_attention(query, key, value, scale, self._blocks)
        if runs_flexible(query):
            if self._mask is None:
                self._mask = tree_mask(self._segments, query.device)
            return flexible_attention(query, key, value, scale, self._mask)
        return self._by_segment(query, key, value, scale)

    def gradients(
        self, gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float | None
    ) -> Sequence[Tensor]:
        """The gradients of query, key and value, from the gradient of the attention's result. On a CPU; one dtype."""
        return block_gradients(gradient, query, key, value, scale, self._blocks)

    @cached_property
    def _blocks(self) -> list[Block]:
        return blocks_of(self._segments)

    def _by_segment(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        lengths = [segment.length for segment in self._segments]
        queries, keys, values = (torch.split(x, lengths, dim=1) for x in (query, key, value))
        out = []
        for number, segment in enumerate(self._segments):
            seen = (*segment.ancestors, number)
            seen_keys, seen_values = (torch.cat([x[i] for i in seen], dim=1) for x in (keys, values))
            out.append(causal_attention(queries[number], seen_keys, seen_values, scale))
        return torch.cat(out, dim=1)


def tree_mask(segments: Sequence[Segment], device: torch.device) -> BlockMask:
    """The mask for FlexAttention: token q sees token k where k <= q < until[k], with `until` from `last_seers`."""
    until = last_seers(segments).to(device)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < until[key])

    return create_block_mask(sees, None, None, len(until), len(until), device)


def last_seers(segments: Sequence[Segment]) -> Tensor:
    """For each token [T], the end (exclusive) of the run of tokens that attend to it: tokens i to until[i] - 1 see i.

    ValueError where segments are not laid out depth first.
    """
    ends = np.cumsum([segment.length for segment in segments]).tolist()
    last, below = list(range(len(segments))), [0] * len(segments)
    for number, segment in enumerate(segments):
        for ancestor in segment.ancestors:
            last[ancestor], below[ancestor] = number, below[ancestor] + 1
    if any(last[n] - n != below[n] for n in range(len(segments))):
        raise ValueError("segments must be laid out depth first")
    lengths = torch.tensor([segment.length for segment in segments])
    return torch.tensor([ends[n] for n in last]).repeat_interleave(lengths)


def blocks_of(segments: Sequence[Segment]) -> list[Block]:
    """The queries in blocks of at most BLOCK. Short neighbouring segments share a block; a long one has several."""
    starts = np.cumsum([0, *(segment.length for segment in segments)]).tolist()
    groups: list[list[int]] = []
    room = 0
    for number, segment in enumerate(segments):
        if segment.length > room:
            groups.append([])
            room = BLOCK
        groups[-1].append(number)
        room -= segment.length
    return [
        _block(segments, starts, group, start, min(start + BLOCK, starts[group[-1] + 1]))
        for group in groups
        for start in range(starts[group[0]], starts[group[-1] + 1], BLOCK)
    ]


def _block(segments: Sequence[Segment], starts: Sequence[int], group: Sequence[int], start: int, end: int) -> Block:
    """The queries from `start` to `end`, which belong to the segments `group`, with the keys that they see."""
    runs: list[slice] = []
    for number in sorted({*group, *(ancestor for one in group for ancestor in segments[one].ancestors)}):
        begin, stop = starts[number], min(starts[number + 1], end)
        if runs and runs[-1].stop == begin:
            runs[-1] = slice(runs[-1].start, stop)
        else:
            runs.append(slice(begin, stop))
    places = torch.cat([torch.arange(run.start, run.stop) for run in runs])
    segment_of = torch.bucketize(places, torch.tensor(starts[1:]), right=True)
    seen = places <= torch.arange(start, end)[:, None]
    for number in group:
        rows = slice(max(starts[number], start) - start, starts[number + 1] - start)
        seen[rows] &= torch.isin(segment_of, torch.tensor([number, *segments[number].ancestors]))
    hidden = ~seen
    first = int(hidden.any(0).int().argmax()) if hidden.any() else len(places)  # every query sees what is before
    mask = torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf"))[:, first:].contiguous()
    return Block(slice(start, end), tuple(runs), mask)
