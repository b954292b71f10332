"""Rewards: the sum of named terms; and how well a text answers: SQuAD's normalisation, exact match and token F1."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping

RewardTerms = Mapping[str, float | None]  # None: the term has nothing to say

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def number_or_none(term: str, value: object) -> float | None:
    """The value of a reward term. TypeError where it is another thing."""
    if value is not None and not isinstance(value, int | float):
        raise TypeError(f"the reward term {term} gave {value!r:.80}; it is a number or None")
    return None if value is None else float(value)


def added(terms: RewardTerms, more: RewardTerms) -> dict[str, float | None]:
    """The terms of both; of one that both know, the sum."""
    total = dict(terms)
    for name, given in more.items():
        value = number_or_none(name, given)
        total[name] = total.get(name) if value is None else (total.get(name) or 0.0) + value
    return total


def weighed(terms: RewardTerms, weights: Mapping[str, float]) -> float:
    """The sum of the terms times their weights. ValueError for a term without a weight, which `format` alone may be."""
    if unknown := terms.keys() - weights.keys() - {"format"}:
        raise ValueError(f"no reward weight for {sorted(unknown)}; weights: {dict(weights)}")
    return float(sum(weights.get(name, 0.0) * value for name, value in terms.items() if value is not None))


def normalize_answer(text: str) -> str:
    """Lower case, without punctuation, articles and extra blanks: "The  Yen." -> "yen"."""
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, answers: Iterable[str]) -> float:
    """1.0 if the prediction equals one of the answers after normalisation, else 0.0."""
    return float(normalize_answer(prediction) in map(normalize_answer, answers))


def token_f1(prediction: str, answers: Iterable[str]) -> float:
    """The best F1 of shared words over the answers; two empty texts score 1.0."""
    return max(
        (_f1(normalize_answer(prediction).split(), normalize_answer(answer).split()) for answer in answers), default=0.0
    )


def _f1(predicted: list[str], expected: list[str]) -> float:
    if not predicted or not expected:
        return float(predicted == expected)
    shared = sum((Counter(predicted) & Counter(expected)).values())
    return 2 * shared / (len(predicted) + len(expected))
