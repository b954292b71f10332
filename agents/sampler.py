"""TransformersPolicy: a causal language model in this process, sampled with continuous batching.

Each pass feeds every row its pending tokens: a whole new span for a context that is new, one token
for a row that is decoding. Keys and values of a context are kept while the context is alive, so a
prompt is computed once for its group, and a turn adds only what is new.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .chat import ChatRenderer
from .forward import forward_for
from .kv import KVSlab, Line, SlabAttend
from .policy import Completion, Context, Sample, Sampling, uniform


@dataclass(slots=True)
class _Span:
    """What is computed of one context's own tokens."""

    kv: Tensor  # [layers, 2, kv heads, n, d], of the first n tokens
    logits: Tensor | None = None  # [vocabulary], after the last token


@dataclass(slots=True, eq=False)
class _Request:
    context: Context
    seed: int
    sampling: Sampling
    reply: asyncio.Future[Sample]


@dataclass(slots=True, eq=False)
class _Row:
    """A request that is being decoded in a slab row."""

    request: _Request
    row: int
    tokens: list[int] = field(default_factory=list)  # sampled; the last is not yet in the slab
    logprobs: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)

    @property
    def position(self) -> int:
        """Of the next token to sample."""
        return self.request.context.length + len(self.tokens)


class TransformersPolicy:
    """Samples from `model`, in `dtype`, up to `max_rows` contexts at a time.

    With `lockstep`, a pass waits until every rollout has asked (see Policy.rollout): the batches, and
    so the last bits of the logits, then never depend on how long tools take.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        renderer: ChatRenderer,
        *,
        dtype: torch.dtype = torch.bfloat16,
        max_rows: int = 64,
        max_prefill: int = 2048,  # tokens of new spans in one pass
        lockstep: bool = True,
    ) -> None:
        self.renderer = renderer
        self.weights_version = 0
        self._forward = forward_for(model, dtype)
        self._max_rows = max_rows
        self._max_prefill = max_prefill
        self._lockstep = lockstep
        config = model.config
        kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self._device = model.device
        self._slab = KVSlab(config.num_hidden_layers, kv_heads, dim, dtype, model.device)
        self._spans: WeakKeyDictionary[Context, _Span] = WeakKeyDictionary()
        self._asked: list[_Request] = []  # not yet answered
        self._pending: list[_Request] = []  # of these, not yet in a row
        self._rows: list[_Row] = []
        self._callers = 0
        self._server: asyncio.Task[None] | None = None
        self._stirred = asyncio.Event()
        self.prefilled_tokens = 0  # counts of work done, for metrics
        self.sampled_tokens = 0

    def refresh(self, weights_version: int) -> None:
        """Takes over the model's present weights and forgets what older ones computed."""
        self._forward.refresh()
        self._spans.clear()
        self.weights_version = weights_version

    def release(self) -> None:
        """Gives back the memory of weights and caches until the next refresh."""
        self._forward.release()
        self._spans.clear()
        self._slab.clear()

    @contextlib.contextmanager
    def rollout(self) -> Iterator[None]:
        self._callers += 1
        try:
            yield
        finally:
            self._callers -= 1
            self._stirred.set()

    async def sample(self, context: Context, seed: int, sampling: Sampling) -> Sample:
        loop = asyncio.get_running_loop()
        request = _Request(context, seed, sampling, loop.create_future())
        self._asked.append(request)
        self._pending.append(request)
        self._stirred.set()
        if self._server is None or self._server.done():
            self._stirred = asyncio.Event()  # events belong to the loop they were first awaited in
            self._server = loop.create_task(self._serve())
        return await request.reply

    async def _serve(self) -> None:
        try:
            while self._pending or self._rows:
                while self._lockstep and self._callers > len(self._pending) + len(self._rows):
                    self._stirred.clear()
                    await self._stirred.wait()
                self._pass()
                await asyncio.sleep(0)
        except Exception as error:  # whoever waits must hear of it
            for request in self._asked:
                if not request.reply.done():
                    request.reply.set_exception(error)
            self._asked, self._pending, self._rows = [], [], []

    @torch.no_grad()
    def _pass(self) -> None:
        """Feeds all rows and new contexts, then samples one token for each."""
        fed = self._rows
        ready, fresh = self._admit()
        self._make_room([*fed, *ready, *(row for group in fresh.values() for row in group)])
        for row in ready:
            self._load(row.request.context, row.row)
        lines = [Line(row.row, row.position - 1, row.tokens[-1:]) for row in fed]
        lines += [self._open(context, group[0].row) for context, group in fresh.items()]
        logits = self._run(lines) if lines else []
        for (context, group), last in zip(fresh.items(), logits[len(fed) :], strict=True):
            self._keep(context, group[0].row, last)
            for row in group[1:]:
                self._slab.copy(group[0].row, row.row, context.length)
            ready += group
        rows = [*fed, *ready]
        if rows:
            self._draw(rows, torch.stack([*logits[: len(fed)], *(self._after(row.request.context) for row in ready)]))
        self._rows = [row for row in rows if not self._finish(row)]
        self._asked = [*self._pending, *(row.request for row in self._rows)]

    def _admit(self) -> tuple[list[_Row], dict[Context, list[_Row]]]:
        """Gives free rows to requests: to those whose context is computed, and to new contexts."""
        taken = {row.row for row in self._rows}
        free = [row for row in range(self._max_rows) if row not in taken]
        self._pending.sort(key=lambda request: (-request.context.length, request.seed))  # not by arrival
        ready: list[_Row] = []
        fresh: dict[Context, list[_Row]] = {}
        claimed: set[Context] = set()  # spans that this pass will compute
        waiting: list[_Request] = []
        prefill = 0
        for request in self._pending:
            missing = self._missing(request.context)
            cost = sum(len(span.token_ids) for span in missing)
            new = request.context not in fresh
            if not free or (new and (claimed.intersection(missing) or (fresh and prefill + cost > self._max_prefill))):
                waiting.append(request)
            elif missing:
                fresh.setdefault(request.context, []).append(_Row(request, free.pop(0)))
                claimed.update(missing)
                prefill += cost if new else 0
            else:
                ready.append(_Row(request, free.pop(0)))
        self._pending = waiting
        return ready, fresh

    def _missing(self, context: Context) -> list[Context]:
        """Contexts of the lineage with tokens, or final logits, yet to compute."""
        missing = []
        for span in context.lineage():
            done = self._spans.get(span)
            if done is None or done.kv.shape[3] < len(span.token_ids) or (span is context and done.logits is None):
                missing.append(span)
        return missing

    def _make_room(self, rows: list[_Row]) -> None:
        """Room for the longest that the rows may become."""
        if rows:
            sizes = [(row.request.context.length, row.request.sampling) for row in rows]
            longest = max(max(length + sampling.max_tokens, sampling.max_context) for length, sampling in sizes)
            self._slab.reserve(self._max_rows, longest, [(row.row, row.position) for row in self._rows])

    def _load(self, context: Context, row: int) -> int:
        """Copies what is computed of the context into the row; the number of tokens copied."""
        start = 0
        for span in context.lineage():
            done = self._spans.get(span)
            if done is None:
                break
            self._slab.write(row, start, done.kv)
            start += done.kv.shape[3]
            if done.kv.shape[3] < len(span.token_ids):
                break
        return start

    def _open(self, context: Context, row: int) -> Line:
        start = min(self._load(context, row), context.length - 1)  # the last token is fed, for its logits
        return Line(row, start, context.tokens()[start:])

    def _run(self, lines: list[Line]) -> Sequence[Tensor]:
        attend = SlabAttend(self._slab, lines)
        tokens = torch.tensor([token for line in lines for token in line.tokens], device=self._device)
        self.prefilled_tokens += sum(len(line.tokens) for line in lines if len(line.tokens) > 1)
        return list(self._forward(tokens, attend.positions, attend, attend.last))

    def _keep(self, context: Context, row: int, logits: Tensor) -> None:
        """Stores the spans of the lineage that the pass computed in this row."""
        end = 0
        for span in context.lineage():
            start, end = end, end + len(span.token_ids)
            done = self._spans.get(span)
            if done is None or done.kv.shape[3] < len(span.token_ids):
                self._spans[span] = _Span(self._slab.read(row, start, end))
        self._spans[context].logits = logits.clone()  # not a view that keeps the whole batch

    def _after(self, context: Context) -> Tensor:
        """Logits [vocabulary] after a computed context."""
        logits = self._spans[context].logits
        assert logits is not None
        return logits

    def _draw(self, rows: list[_Row], logits: Tensor) -> None:
        """Samples a token for each row from logits [rows, vocabulary]."""
        samplings = [row.request.sampling for row in rows]
        temperature = torch.tensor([s.temperature or 1.0 for s in samplings], device=self._device)
        logprobs = torch.log_softmax(logits.float() / temperature[:, None], dim=-1)
        draws = [uniform(row.request.seed, row.position) for row in rows]
        chosen = draw(logprobs, torch.tensor(draws, device=self._device))
        greedy = torch.tensor([s.temperature == 0 for s in samplings], device=self._device)
        chosen = torch.where(greedy, logprobs.argmax(-1), chosen)
        picked = logprobs.gather(1, chosen[:, None])[:, 0].tolist()
        wanted = [i for i, s in enumerate(samplings) if s.entropy]
        entropies = dict(zip(wanted, entropy(logprobs[wanted]).tolist(), strict=True)) if wanted else {}
        self.sampled_tokens += len(rows)
        for i, (row, token) in enumerate(zip(rows, chosen.tolist(), strict=True)):
            row.tokens.append(token)
            row.logprobs.append(picked[i])
            if i in entropies:
                row.entropies.append(entropies[i])

    def _finish(self, row: _Row) -> bool:
        """Answers the request if its turn has ended."""
        ended = row.tokens[-1] == self.renderer.end_of_turn
        if not ended and len(row.tokens) < row.request.sampling.max_tokens:
            return False
        context = Context(tuple(row.tokens), row.request.context)
        start = row.request.context.length
        self._spans[context] = _Span(self._slab.read(row.row, start, context.length - 1))
        completion = Completion(
            text=self.renderer.text(row.tokens),
            token_ids=tuple(row.tokens),
            logprobs=tuple(row.logprobs),
            entropies=tuple(row.entropies),
            stop_reason="stop" if ended else "length",
            weights_version=self.weights_version,
        )
        if not row.request.reply.done():  # done: its caller was cancelled
            row.request.reply.set_result(Sample(completion, context))
        return True


def draw(logprobs: Tensor, uniforms: Tensor) -> Tensor:
    """Inverse-CDF draw: logprobs [R, V], uniforms [R] in [0, 1) -> token ids [R]."""
    cumulative = logprobs.exp().cumsum(-1)
    tokens = torch.searchsorted(cumulative, (uniforms * cumulative[:, -1])[:, None], right=True)[:, 0]
    return tokens.clamp_(max=logprobs.shape[1] - 1)


def entropy(logprobs: Tensor) -> Tensor:
    """Nats per row of logprobs [R, V]."""
    return -(logprobs.exp() * logprobs).sum(-1)
