"""Vectors of environments, as Gymnasium makes them: the same observations in every mode."""

from __future__ import annotations

import copy
from typing import Any

import gymnasium
import pytest
from gymnasium.spaces import Dict
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import create_shared_memory, read_from_shared_memory, write_to_shared_memory

import treegym.envs  # noqa: F401  (registers)
from treegym.envs.spaces import AnyText

MODES = [
    ("async", {}),
    ("async", {"shared_memory": False}),
    ("async", {"copy": False}),
    ("async", {"context": "spawn"}),
]
TEXTS = ["", "ünï©ode 漢字 🙂", "\ud800 half a pair", "\x00\n", "x" * 9, " "]


def played(mode: str, settings: dict[str, Any], **spaces: Any) -> list[Any]:
    """What two environments said over an episode and the beginning of the next."""
    made = gymnasium.make_vec(
        "treegym/Lookup-v0", num_envs=2, vectorization_mode=mode, vector_kwargs=settings, max_turns=2, **spaces
    )
    try:
        observations, info = made.reset(seed=[1, 2])
        said = [(tuple(observations), made.observation_space.contains(tuple(observations)), list(info["messages"]))]
        for actions in (("漢字", "<answer>\ud800</answer>"), ("<lookup>moon</lookup>", ""), ("", "hm")):
            observations, rewards, terminated, truncated, info = made.step(actions)
            said.append((tuple(observations), *map(list, (rewards, terminated, truncated)), list(info["messages"])))
        return said
    finally:
        made.close()


@pytest.mark.parametrize(("mode", "settings"), MODES, ids=str)
def test_environments_side_by_side_say_what_they_say_in_turn(mode: str, settings: dict[str, Any]) -> None:
    expected = played("sync", {})
    assert all(observation for observation in expected[0][0]) and expected[0][1]
    assert played(mode, settings) == expected


def test_episodes_that_end_go_on_the_same_way_in_every_mode() -> None:
    same_step = {"autoreset_mode": AutoresetMode.SAME_STEP}
    assert played("async", same_step) == played("sync", same_step)


def test_any_text_survives_shared_memory() -> None:
    space = Dict({"said": AnyText(20)})
    memory = create_shared_memory(space, n=len(TEXTS))
    texts = read_from_shared_memory(space, memory, n=len(TEXTS))["said"]
    assert list(texts) == [""] * len(TEXTS)
    for place, text in enumerate(TEXTS):
        write_to_shared_memory(space, place, {"said": "longer than what follows"[:20]}, memory)
        write_to_shared_memory(space, place, {"said": text}, memory)
    kept = copy.deepcopy(texts)
    write_to_shared_memory(space, 0, {"said": "later"}, memory)
    assert kept == tuple(TEXTS) and texts[0] == "later" and texts[1:3] == tuple(TEXTS[1:3])
    with pytest.raises(ValueError, match="21 characters; 20 fit"):
        write_to_shared_memory(space, 0, {"said": "x" * 21}, memory)
