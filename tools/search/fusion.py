"""Reciprocal rank fusion: several retrievers as one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .index import Hit, Passage, Retriever


@dataclass(frozen=True)
class Fused:
    """A passage scores the sum, over the retrievers that find it, of 1 / (k + rank), with ranks from 1.

    Cormack, Clarke and Büttcher, "Reciprocal rank fusion outperforms Condorcet and individual rank learning methods",
    SIGIR 2009; k = 60 is theirs. Passages are told apart by their ids; equal scores stand in the order of ids.
    """

    retrievers: Sequence[Retriever]
    k: int = 60
    depth: int = 100  # ranks of each retriever that count; as many as are asked for, if that is more

    @property
    def outside(self) -> str:
        return ", ".join(filter(None, (getattr(retriever, "outside", "") for retriever in self.retrievers)))

    def search(self, query: str, k: int) -> list[Hit]:
        return self.search_many([query], k)[0]

    def search_many(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        if k < 1:
            return [[] for _ in queries]
        rankings = [retriever.search_many(queries, max(k, self.depth)) for retriever in self.retrievers]
        return [self._fuse(lists)[:k] for lists in zip(*rankings, strict=True)]

    def _fuse(self, rankings: Sequence[Sequence[Hit]]) -> list[Hit]:
        terms: dict[str, list[float]] = {}
        passages: dict[str, Passage] = {}
        for ranking in rankings:
            for rank, hit in enumerate(ranking, 1):
                passages.setdefault(hit.passage.id, hit.passage)
                terms.setdefault(hit.passage.id, []).append(1 / (self.k + rank))
        scores = {id: math.fsum(parts) for id, parts in terms.items()}  # the same in any order of the retrievers
        return [Hit(passages[id], scores[id]) for id in sorted(scores, key=lambda id: (-scores[id], id))]
