"""HouseRules: rules that only failure or notes tell, and pairs of stations that only held-out tasks ask for."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise, permutations, product
from typing import Any

import pytest

from treegym.agents.memory.reflect import phrase
from treegym.agents.models.nano import build_nano
from treegym.envs import HouseRulesEnv, Task, TextEnv, check_env, own_text, with_notes
from treegym.envs.houserules import CHOICES, SITES, STATIONS, is_heldout, right_choice
from treegym.envs.notes import PLACES
from treegym.scenarios import load_scenario
from treegym.scenarios.build import vocabulary


def start(seed: int = 0, **settings: Any) -> HouseRulesEnv:
    env = HouseRulesEnv(**settings)
    env.reset(seed=seed)
    return env


def play(env: TextEnv, *choices: str) -> dict[str, float]:
    for choice in choices:
        *_, info = env.step(f"<choose>{choice}</choose>")
    return dict(info["reward_terms"])


def test_it_keeps_the_promises_of_every_environment() -> None:
    settings: dict[str, Any] = {"world": 3, "moved": 2, "sites": 4, "stations": 6}
    check_env(lambda: HouseRulesEnv(**settings), options={"split": "heldout"}, seeds=[0])


@pytest.mark.parametrize(("stations", "chance"), [(2, 1 / 16), (3, 1 / 64)])
def test_one_of_all_ways_is_exact_and_only_its_end_tells(stations: int, chance: float) -> None:
    for seed in range(3):
        env = start(seed, stations=stations)
        ways = [*product(CHOICES, repeat=stations)]
        ends = [play(env.fork(), *way) for way in ways]
        assert sum(end["exact"] for end in ends) / len(ways) == chance
        right = ways[[end["exact"] for end in ends].index(1.0)]
        for way, end in zip(ways, ends, strict=True):
            assert end["right"] == sum(map(str.__eq__, way, right)) / stations
        texts = {env.fork().step(f"<choose>{choice}</choose>")[:2] for choice in CHOICES}
        assert len(texts) == 1  # a wrong choice reads and earns as a right one does


def test_an_answer_before_the_end_leaves_the_stations_that_are_not_passed_wrong() -> None:
    env = start()
    env.step(str(env.oracle()))
    _, reward, terminated, _, info = env.step("<answer>done</answer>")
    assert terminated and reward == 0.25
    assert info["reward_terms"] == {"exact": 0.0, "right": 0.5, "format": 1.0}


def test_what_is_said_at_a_station_of_a_site_is_the_same_whenever_it_is_met() -> None:
    said: dict[str, set[tuple[str, str]]] = {}
    for seed in range(300):
        env = HouseRulesEnv(stations=6, sites=3)
        text, _ = env.reset(seed=seed)
        for station in env.route:
            said.setdefault(text.splitlines()[-1].partition("Choose ")[2], set()).add((env.site, station))
            text, *_ = env.step("<choose>red</choose>")
        assert text == "You are through."
    assert len(said) == 3 * 6 and all(len(places) == 1 for places in said.values())


@pytest.mark.parametrize("site", SITES)
def test_training_asks_for_every_station_and_never_for_a_held_out_pair(site: str) -> None:
    pairs = [*permutations(STATIONS, 2)]
    heldout = [pair for pair in pairs if is_heldout(site, *pair)]
    assert 4 <= len(heldout) <= 18
    assert {station for pair in pairs if pair not in heldout for station in pair} == {*STATIONS}
    for number in range(2, 7):  # each split has a way of every length
        routes = [{*pairwise(route)} for route in permutations(STATIONS, number)]
        assert {bool(route & {*heldout}) for route in routes} == {True, False}


@pytest.mark.parametrize("stations", [2, 4])
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_a_task_belongs_to_its_split_and_says_so(split: str, stations: int) -> None:
    env = HouseRulesEnv(sites=12)
    seen = set()
    for seed in range(200):
        _, info = env.reset(seed=seed, options={"split": split, "stations": stations})
        assert any(is_heldout(env.site, *pair) for pair in pairwise(env.route)) == (split == "heldout")
        assert len({*env.route}) == stations
        assert (info["split"], info["hops"], info["tags"]) == (split, stations, [f"site:{env.site}"])
        seen.add(env.site)
    assert seen == {*SITES[:12]}


def rules(**settings: Any) -> dict[str, tuple[str, ...]]:
    """The rules of every site that some tasks have met."""
    found: dict[str, set[tuple[str, ...]]] = {}
    for seed in range(200):
        env = start(seed, **settings)
        found.setdefault(env.site, set()).add(env.rules)
    assert {*map(len, found.values())} == {1}  # every task of a site has its rules
    return {site: one for site, [one] in found.items()}


def test_every_world_and_site_has_rules_of_its_own() -> None:
    one, other = rules(world=1), rules(world=2)
    assert len(one) == len(SITES) == len({*one.values()})
    assert all(one[site] != other[site] for site in SITES)
    counts = [sum(site.count(choice) for site in one.values()) for choice in CHOICES]
    assert min(counts) > 20  # of 144: 36 each were it exactly even


def test_without_a_world_every_task_has_rules_of_its_own() -> None:
    drawn = [start(seed, sites=1).rules for seed in range(50)]
    assert len({*drawn}) > 45
    assert [start(seed, sites=1).rules for seed in range(50)] == drawn


@pytest.mark.parametrize("moved", [3, list(SITES[:3])])
def test_at_moved_sites_every_rule_is_another_and_elsewhere_none(moved: Any) -> None:
    before, after = rules(world=1, sites=12), rules(world=1, sites=12, moved=moved)
    for site in SITES[:12]:
        changed = [one != other for one, other in zip(before[site], after[site], strict=True)]
        assert changed == [site in SITES[:3]] * 6


def test_a_world_is_asked_for_by_options_too() -> None:
    env = HouseRulesEnv(world=1)
    env.reset(seed=0, options={"world": 2, "moved": 24})
    assert env.rules == tuple(right_choice(2, env.site, station, moved=True) for station in STATIONS)
    route = env.route
    env.reset(seed=0)
    assert env.route == route  # whose rules hold changes nothing else


@pytest.mark.parametrize("place", ["turn", "prompt"])
def test_the_expert_s_notes_lead_to_the_right_choices(place: Any) -> None:
    for seed in range(20):
        task = Task("treegym/HouseRules-v0", seed, {"split": "heldout", "stations": 3})
        bare = task.make()
        bare.reset(seed=seed, options=dict(task.options))
        assert len(bare.notes()) == len(STATIONS)
        env = replace(task, wrappers=(with_notes(bare.notes(), place),)).make()
        text, info = env.reset(seed=seed, options=dict(task.options))
        listed = dict(re.findall(r'When you read "(.*)": choose (\w+)', text))
        while text != "You are through.":
            assert phrase(own_text(text)) in {note.when for note in bare.notes()}  # as lessons from rollouts have it
            [told] = re.findall(r"be wrong: choose (\w+)", text) or [
                choice for phrase, choice in listed.items() if phrase in own_text(text)
            ]
            text, *_, info = env.step(f"<choose>{told}</choose>")
        assert info["reward_terms"] == {"exact": 1.0, "right": 1.0, "format": 1.0}


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_the_oracle_errs_at_its_rate(rate: float) -> None:
    right = []
    for seed in range(300):
        env = start(seed, oracle_error=rate)
        env.step(str(env.oracle()))
        *_, info = env.step(str(env.oracle()))
        right.append(info["reward_terms"]["right"])
    assert sum(right) / 300 == pytest.approx(1 - rate, abs=0.08)


def test_the_same_problem_has_the_same_state_whichever_seed_drew_it() -> None:
    keys: dict[tuple[str, tuple[str, ...]], set[str]] = {}
    for seed in range(100):
        env = start(seed, world=1, sites=2)
        keys.setdefault((env.site, env.route), set()).add(env.state_key())
    assert {*map(len, keys.values())} == {1}
    assert len({key for [key] in keys.values()}) == len(keys) > 20


def test_nano_reads_every_word_of_it_and_of_its_notes_as_one_token() -> None:
    scenario = load_scenario("maze", ["environment={id: treegym/HouseRules-v0}", "warmup.settings={}"])
    _, tokenizer = build_nano(vocabulary(scenario))
    for seed in range(100):
        bare = start(seed)
        for place in PLACES:
            wrappers = (with_notes(bare.notes(), place),)
            env = Task("treegym/HouseRules-v0", seed, {"split": "heldout"}, wrappers=wrappers).make()
            texts = [env.reset(seed=seed, options={"split": "heldout"})[0]]
            while action := env.oracle():
                texts += [action, env.step(action)[0]]
            for text in texts:
                pieces = {re.sub("[^a-zA-Z]", "", piece) for piece in tokenizer.tokenize(text)}
                assert {*re.findall("[a-zA-Z]+", text)} <= pieces


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"stations": 1}, "1 stations: expected 2 to 6"),
        ({"stations": 7}, "7 stations: expected 2 to 6"),
        ({"sites": 0}, "0 sites: expected 1 to 24"),
        ({"sites": 25}, "25 sites: expected 1 to 24"),
        ({"moved": -1}, "-1 sites: expected 0 to 24"),
        ({"moved": ["elm", "elms"]}, "moved: no site 'elms'; sites: alder, ash,"),
    ],
)
def test_what_there_is_not_is_refused(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        start(**settings)
    with pytest.raises(ValueError, match="split 'test': expected one of train, heldout"):
        HouseRulesEnv().reset(seed=0, options={"split": "test"})
