"""Ranking: which lessons of a few fit what the environment has said, by words or by meaning."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ...tools.search import Encoder, StaticEncoder
from ...tools.search.index import STOP_WORDS, unspaced_parts, words

MAX_QUERY = 4000  # characters; the time for a longer one would not be bounded


class Ranker(Protocol):
    """Says how well each of the texts fits a query; greater is better."""

    def __call__(self, query: str, texts: Sequence[str]) -> Sequence[float]: ...


def by_words(query: str, texts: Sequence[str]) -> list[float]:
    """BM25 over these texts, where a word counts once in a text: rare words weigh more, long texts less."""
    asked = _terms(query[:MAX_QUERY])
    held = [_terms(text) for text in texts]
    occurs = Counter(word for terms in held for word in terms & asked)
    weights = {word: math.log(1 + (len(texts) - n + 0.5) / (n + 0.5)) for word, n in occurs.items()}
    average = sum(map(len, held)) / max(1, len(held))
    # summed in order, because the order in a set differs between processes, and with it the rounding
    return [
        sum(weights[word] for word in sorted(terms & asked)) * 2.2 / (1.3 + 0.9 * len(terms) / max(1, average))
        for terms in held
    ]


@functools.lru_cache(maxsize=10_000)
def _terms(text: str) -> frozenset[str]:
    return frozenset((*words(text), *unspaced_parts(text))) - STOP_WORDS


@dataclass(frozen=True)
class ByMeaning:
    """The inner products of embeddings. The static ones, which are the default, need the extra `dense`."""

    encoder: Encoder = field(default_factory=StaticEncoder)

    def __call__(self, query: str, texts: Sequence[str]) -> list[float]:
        asked, *held = (_vector(self.encoder, text) for text in (query[:MAX_QUERY], *texts))
        return [float(asked @ vector) for vector in held]


@functools.lru_cache(maxsize=20_000)
def _vector(encoder: Encoder, text: str) -> NDArray[np.float32]:
    vector: NDArray[np.float32] = encoder([text])[0]
    return vector
