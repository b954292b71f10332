"""Household: sound houses, an oracle that does not cheat, states that come back."""

from __future__ import annotations

from typing import Any

import pytest

from treegym.envs import HouseholdEnv, check_env
from treegym.envs.household import SINK, is_heldout


def start(seed: int = 0, split: str = "train", **settings: Any) -> HouseholdEnv:
    env = HouseholdEnv(**settings)
    env.reset(seed=seed, options={"split": split})
    return env


def test_the_smallest_house_keeps_the_promises_of_every_environment() -> None:
    check_env(lambda: HouseholdEnv(rooms=2, things=1, oracle_error=0.0), options={"split": "heldout"})


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_every_task_can_be_done_and_belongs_to_its_split(split: str) -> None:
    for seed in range(100):
        env = start(seed, split)
        assert is_heldout(env.thing, env.goal) == (split == "heldout") and not env.solved
        turns, action = 0, env.oracle()
        while action is not None:
            _, reward, terminated, _, _ = env.step(action)
            turns, action = turns + 1, env.oracle()
        assert terminated and reward == 1.0 and env.solved and turns < env.max_turns


def test_the_oracle_knows_no_more_than_it_has_seen() -> None:
    """Where what was never seen is arranged otherwise, it does the same."""
    for seed in range(20):
        env = start(seed)
        while (action := env.oracle()) is not None:
            other = env.fork()
            unseen = [p for p, room in env.room_of.items() if p in env.closed or room not in env.visited]
            for thing, place in env.place_of.items():
                if place in unseen:
                    other.place_of[thing] = next(p for p in unseen if p not in (SINK, env.goal))
            assert other.oracle() == action
            env.step(action)


def test_a_walk_there_and_back_leads_to_the_same_state() -> None:
    env = start()
    here, key = env.room, env.state_key()
    env.step(env.write_call("go", name=env.ways[here][0]))
    assert env.state_key() != key
    env.step(env.write_call("go", name=here))
    assert env.state_key() == key


def test_saying_that_it_is_done_does_not_make_it_so() -> None:
    _, reward, terminated, _, info = start().step("<answer>done</answer>")
    assert terminated and reward == 0.0 and info["reward_terms"]["exact"] == 0.0


def test_nothing_can_be_done_from_afar() -> None:
    """Other rooms' places, closed places' contents and things that one does not hold are out of reach."""
    env = start(3)
    elsewhere = next(place for place, room in env.room_of.items() if room != env.room)
    far = next(room for room in env.ways if room not in (env.room, *env.ways[env.room]))
    hidden = next(thing for thing in env.place_of if thing not in env._lying())
    key = env.state_key()
    for tool, name in [("go", far), ("go", "moon"), ("open", elsewhere), ("take", hidden), ("wash", hidden)]:
        *_, info = env.step(env.write_call(tool, name=name))
        assert info["failed_calls"] == 1 and env.state_key() == key
    *_, info = env.step(env.write_call("put", name=env.goal))
    assert info["messages"][0].text.startswith("your hand is empty. ")


def test_too_large_a_house_is_refused() -> None:
    with pytest.raises(ValueError, match="9 rooms and 6 things: expected 2 to 8 and 1 to 16"):
        HouseholdEnv(rooms=9)
    with pytest.raises(ValueError, match="split 'test': expected one of train, heldout"):
        start(split="test")
