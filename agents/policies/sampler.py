"""TransformersPolicy: a causal language model in this process, sampled with continuous batching.

Each pass feeds every row its pending tokens: a whole new span for a context that is new, one token
for a row that is decoding. Keys and values of a context are kept while the context is alive, so a
prompt is computed once for its group, and a turn adds only what is new. Requests that continue one
context are one row until they draw different tokens: what a group says alike is decoded once.
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

from ..chat import ChatRenderer
from ..inference.acceptance import bring_attention
from ..inference.cpu.native import forward_for
from ..inference.forward import native_dtype
from ..inference.kv import Line
from ..policy import Completion, Context, Sample, Sampling, uniform

MOMENT = 0.002  # seconds that a pass waits for callers which were just answered: most tools take less


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
    """Requests of one context and sampling that have drawn the same tokens so far, decoded in a slab row."""

    requests: list[_Request]
    row: int
    tokens: list[int] = field(default_factory=list)  # sampled; the last is not yet in the slab
    logprobs: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)

    @property
    def position(self) -> int:
        """The position of the next token to sample."""
        return self.context.length + len(self.tokens)

    @property
    def context(self) -> Context:
        return self.requests[0].context

    @property
    def sampling(self) -> Sampling:
        return self.requests[0].sampling

    def part(self, draws: Sequence[int], free: Iterator[int]) -> list[tuple[_Row, int]]:
        """The rows that this one becomes, each with the token it goes on with; the first keeps the slab row."""
        drawn: dict[int, list[_Request]] = {}
        for request, token in zip(self.requests, draws, strict=True):
            drawn.setdefault(token, []).append(request)
        rows = [
            _Row(requests, self.row if i == 0 else next(free), [*self.tokens], [*self.logprobs], [*self.entropies])
            for i, requests in enumerate(drawn.values())
        ]
        return list(zip(rows, drawn, strict=True))


class TransformersPolicy:
    """Samples from `model`, in `dtype`, for up to `max_rows` requests at a time.

    A pass waits a moment for callers that were just answered, and never for slow tools. With `lockstep` it waits until
    every expected caller has asked: what is in a batch, and so the last bits of the logits, then does not depend on how
    long tools take. Where the forward pass gives the same bits in any batch, there is nothing to gain from that.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        renderer: ChatRenderer,
        *,
        dtype: torch.dtype | None = None,  # native_dtype of the model's device
        max_rows: int = 64,
        max_prefill: int = 2048,  # tokens of new spans in one pass
        lockstep: bool = False,
    ) -> None:
        self.renderer = renderer
        self.weights_version = 0
        dtype = dtype or native_dtype(model.device)
        self._model = model
        self._forward = forward_for(model, dtype)
        self._max_rows = max_rows
        self._max_prefill = max_prefill
        self._lockstep = lockstep
        self._device = model.device
        self._slab = self._forward.slab()
        self._spans: WeakKeyDictionary[Context, _Span] = WeakKeyDictionary()
        self._unanswered: list[_Request] = []
        self._pending: list[_Request] = []  # unanswered ones that are not yet in a row
        self._rows: list[_Row] = []
        self._callers = 0
        self._answered = False  # whether the last pass answered anybody
        self._server: asyncio.Task[None] | None = None
        self._stirred = asyncio.Event()
        self.prefilled_tokens = 0  # counts of work done, for metrics
        self.sampled_tokens = 0  # each once, however many rollouts drew it after the same tokens

    @property
    def repeatable(self) -> bool:
        """Whether equal seeds give equal tokens however long tools take."""
        return self._lockstep or self._forward.batch_invariant

    @property
    def kernels(self) -> str:
        """The name of what computes its passes: torch, or C for code of ours."""
        return self._forward.kernels

    async def push(self, model: PreTrainedModel, version: int) -> None:
        """As refresh; `model` is the one that it samples from."""
        self.refresh(version)

    def refresh(self, weights_version: int) -> None:
        """Takes over the model's present weights and forgets what older ones computed."""
        self._forward.refresh()
        self._spans.clear()
        if not self._rows:
            self._slab.clear()  # a number that is not finite would spread even where its weight is 0
        self.weights_version = weights_version

    def release(self) -> None:
        """Gives back the memory of weights and caches until the next refresh."""
        self._forward.release()
        self._spans.clear()
        self._slab.clear()

    def expect(self, callers: int) -> None:
        self._callers += callers
        self._stirred.set()

    async def sample(self, context: Context, seed: int, sampling: Sampling) -> Sample:
        bring_attention(self._model, context.length + sampling.max_tokens)
        loop = asyncio.get_running_loop()
        request = _Request(context, seed, sampling, loop.create_future())
        self._unanswered.append(request)
        self._pending.append(request)
        self._stirred.set()
        if self._server is None or self._server.done():
            self._stirred = asyncio.Event()  # events belong to the loop they were first awaited in
            self._server = loop.create_task(self._serve())
        return await request.reply

    async def _serve(self) -> None:
        try:
            while self._pending or self._rows:
                if self._lockstep or self._answered:
                    await self._gather(None if self._lockstep else MOMENT)
                self._pass()
                await asyncio.sleep(0)
        except BaseException as error:  # whoever waits must hear of it, and nothing be left for the next loop
            for request in self._unanswered:
                if not request.reply.done():
                    request.reply.set_exception(error)
            self._unanswered, self._pending, self._rows = [], [], []
            if not isinstance(error, Exception):
                raise

    async def _gather(self, seconds: float | None) -> None:
        """Waits until every expected caller has asked, or that many seconds have passed."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self._callers > len(self._unanswered):
                    self._stirred.clear()
                    await self._stirred.wait()

    @torch.inference_mode()
    def _pass(self) -> None:
        """Feeds all rows and new contexts, then samples one token for each request."""
        fed = self._rows
        ready, fresh = self._admit()
        self._make_room([*fed, *ready, *(row for group in fresh.values() for row in group)])
        for row in ready:
            self._load(row.context, row.row)
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
            rows = self._draw(rows, torch.stack([*logits[: len(fed)], *(self._after(row.context) for row in ready)]))
        self._rows = [row for row in rows if not self._finish(row)]
        self._answered = len(self._rows) < len(rows)
        self._unanswered = [*self._pending, *(request for row in self._rows for request in row.requests)]

    def _admit(self) -> tuple[list[_Row], dict[Context, list[_Row]]]:
        """Gives rows to requests: to those whose context is computed, and to new contexts."""
        free = self._free(self._rows)
        room = self._max_rows - sum(len(row.requests) for row in self._rows)  # each may come to need a row of its own
        self._pending.sort(key=lambda request: (-request.context.length, request.seed))  # not by arrival
        opened: dict[tuple[Context, Sampling], _Row] = {}
        ready: list[_Row] = []
        fresh: dict[Context, list[_Row]] = {}
        claimed: set[Context] = set()  # spans that this pass will compute
        waiting: list[_Request] = []
        prefill = 0
        for request in self._pending:
            missing = self._missing(request.context)
            cost = sum(len(span.token_ids) for span in missing)
            new = request.context not in fresh
            if not room or (new and (claimed.intersection(missing) or (fresh and prefill + cost > self._max_prefill))):
                waiting.append(request)
                continue
            room -= 1
            key = request.context, request.sampling
            if key in opened:
                opened[key].requests.append(request)
                continue
            opened[key] = _Row([request], next(free))
            if missing:
                fresh.setdefault(request.context, []).append(opened[key])
                claimed.update(missing)
                prefill += cost if new else 0
            else:
                ready.append(opened[key])
        self._pending = waiting
        return ready, fresh

    def _free(self, rows: list[_Row]) -> Iterator[int]:
        """Slab rows that `rows` leave free."""
        taken = {row.row for row in rows}
        return (row for row in range(self._max_rows) if row not in taken)

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
            sizes = [(row.context.length, row.sampling) for row in rows]
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
        self.prefilled_tokens += sum(len(line.tokens) for line in lines if len(line.tokens) > 1)
        return list(self._forward(self._slab, lines))

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

    def _draw(self, rows: list[_Row], logits: Tensor) -> list[_Row]:
        """Samples a token for each request from its row's logits [rows, vocabulary]; the rows that these become."""
        samplings = [row.sampling for row in rows]
        temperatures = [s.temperature or 1.0 for s in samplings]
        logits = logits.float()
        if set(temperatures) != {1.0}:
            logits = logits / torch.tensor(temperatures, device=self._device)[:, None]
        logprobs = logits.log_softmax(-1)
        draws = [[uniform(request.seed, row.position) for request in row.requests] for row in rows]
        most = max(map(len, draws))
        padded = torch.tensor([draw + [0.0] * (most - len(draw)) for draw in draws], device=self._device)
        chosen = draw(logprobs, padded)
        if greedy := [i for i, s in enumerate(samplings) if s.temperature == 0]:
            chosen[greedy] = logprobs[greedy].argmax(-1, keepdim=True)
        picked = logprobs.gather(1, chosen).tolist()
        entropies: dict[int, float] = {}
        for top in {s.entropy_top for s in samplings if s.entropy}:
            wanted = [i for i, s in enumerate(samplings) if s.entropy and s.entropy_top == top]
            entropies |= zip(wanted, entropy(logprobs[wanted], top).tolist(), strict=True)
        free = self._free(rows)
        parted: list[_Row] = []
        for i, (row, tokens) in enumerate(zip(rows, chosen.tolist(), strict=True)):
            logprob = dict(zip(tokens, picked[i], strict=True))
            for part, token in row.part(tokens[: len(row.requests)], free):
                if part.row != row.row:
                    self._slab.copy(row.row, part.row, row.position)
                part.tokens.append(token)
                part.logprobs.append(logprob[token])
                if i in entropies:
                    part.entropies.append(entropies[i])
                parted.append(part)
        self.sampled_tokens += len(parted)
        return parted

    def _finish(self, row: _Row) -> bool:
        """Answers the row's requests if its turn has ended."""
        ended = self.renderer.ended(row.tokens) or self.renderer.stopped(row.tokens, row.sampling.stop)
        if not ended and len(row.tokens) < row.sampling.max_tokens:
            return False
        context = Context(tuple(row.tokens), row.context)
        self._spans[context] = _Span(self._slab.read(row.row, row.context.length, context.length - 1))
        completion = Completion(
            text=self.renderer.text(row.tokens),
            token_ids=tuple(row.tokens),
            logprobs=tuple(row.logprobs),
            entropies=tuple(row.entropies),
            stop_reason="stop" if ended else "length",
            weights_version=self.weights_version,
        )
        for request in row.requests:
            if not request.reply.done():  # done: its caller was cancelled
                request.reply.set_result(Sample(completion, context))
        return True


def draw(logprobs: Tensor, uniforms: Tensor) -> Tensor:
    """Inverse-CDF draws: logprobs [R, V], uniforms [R, K] in [0, 1) -> token ids [R, K]."""
    cumulative = logprobs.exp().cumsum(-1)
    tokens = torch.searchsorted(cumulative, uniforms * cumulative[:, -1:], right=True)
    return tokens.clamp_(max=logprobs.shape[1] - 1)


def entropy(logprobs: Tensor, top: int = 0) -> Tensor:
    """Entropies [...] of logprobs [..., V], nats; with `top`, over the likeliest tokens alone, not renormalised."""
    if top:
        logprobs = logprobs.topk(min(top, logprobs.shape[-1])).values
    return -(logprobs.exp() * logprobs).sum(-1)
