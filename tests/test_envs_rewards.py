"""Text rewards follow SQuAD's rule."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treegym.envs import exact_match, normalize_answer, token_f1


@pytest.mark.parametrize(
    ("text", "normal"),
    [("The  Yen.", "yen"), ("an A-B, the", "ab"), ("+81", "81"), ("Theatre", "theatre"), ("a", ""), ("É", "é")],
)
def test_normalisation(text: str, normal: str) -> None:
    assert normalize_answer(text) == normal


def test_the_best_of_several_answers_counts() -> None:
    assert exact_match("the yen", ["Japanese Yen", "Yen"]) == 1.0
    assert exact_match("yen yen", ["Japanese Yen", "Yen"]) == 0.0
    assert token_f1("Japanese", ["Japanese Yen", "Dollar"]) == pytest.approx(2 / 3)
    assert token_f1("Japanese", []) == 0.0


@given(st.text(), st.text())
def test_exact_match_is_full_f1_and_f1_is_symmetric(one: str, two: str) -> None:
    assert 0.0 <= token_f1(one, [two]) == token_f1(two, [one]) <= 1.0
    assert exact_match(one, [two]) <= token_f1(one, [two])
    assert token_f1(one, [one]) == exact_match(one, [one]) == 1.0
