"""Lookup: a closed vocabulary, and an oracle that errs as often as it is told to."""

import pytest

from treegym.envs import LookupEnv, lookup


def play(env: LookupEnv, seed: int, **options: object) -> tuple[list[str], dict[str, float]]:
    texts = [env.reset(seed=seed, options=options)[0]]
    while action := env.oracle():
        observation, *_, info = env.step(action)
        texts += [action, observation]
    return texts, info["reward_terms"]


def test_all_texts_are_made_of_the_vocabulary() -> None:
    known = set(lookup.vocabulary())
    assert len(known) < 200
    env = LookupEnv()
    for seed in range(50):
        texts, _ = play(env, seed)
        for odd in (*lookup.MALFORMED, "<lookup>nowhere</lookup>"):
            env.reset(seed=seed)
            texts.append(env.step(odd)[0])
        assert {piece for text in texts for piece in lookup.pieces(text)} <= known


@pytest.mark.parametrize("hops", [1, 2, 3, 11])
def test_the_links_lead_to_a_word_not_passed_before(hops: int) -> None:
    texts, terms = play(LookupEnv(), 0, hops=[hops])
    assert terms == {"exact": 1.0, "format": 1.0}
    assert len(texts) == 1 + 2 * (hops + 1)
    words = [texts[i] for i in range(2, len(texts) - 1, 2)]
    assert len(set(words)) == hops


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_the_oracle_errs_at_its_rate(rate: float) -> None:
    env = LookupEnv(oracle_error=rate)
    exact = [play(env, seed)[1]["exact"] for seed in range(300)]
    assert sum(exact) / 300 == pytest.approx(1 - rate, abs=0.08)
    assert exact == [play(env, seed)[1]["exact"] for seed in range(300)]


def test_impossible_tables_are_refused() -> None:
    with pytest.raises(ValueError, match="12 links in a table of 12"):
        LookupEnv(hops=[12]).reset(seed=0)
