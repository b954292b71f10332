"""The desk in Chromium: one world with the simulation, to the byte, for every template."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator
from typing import Any

import pytest

from treegym.envs import DeskBrowserEnv, DeskEnv
from treegym.envs.desk.tasks import TEMPLATES
from treegym.envs.screen import KEYS, TYPED
from treegym.tools.browser import BrowserUnavailable, close_browser
from treegym.tools.browser.chromium import chromium_path

try:
    chromium_path()
except BrowserUnavailable as missing:
    pytest.skip(str(missing), allow_module_level=True)
pytest.importorskip("playwright", reason="pip install 'treegym[browser]'")

SEEDS, STEPS = (10, 12) if "TREEGYM_SLOW" in os.environ else (1, 6)  # of every template
TEXTS = (
    "lamp",
    "2",
    "0",
    "2 pieces",
    "-1.5e3",
    "2026-05-04",
    "10:30",
    "say \"x\" & <b>'y'</b>",
    "</p><script>document.title = 1</script>",
    "漢字 🙂 ünï",
    "[1] button",
    "a\nb\n",
    "  two  spaces ",
    "",
    "long " * 60,
)


@pytest.fixture(scope="module", autouse=True)
def _ended() -> Iterator[None]:
    yield
    close_browser()


def wandering(env: DeskEnv, dice: random.Random) -> str:
    """A legal action, or what the oracle does."""
    if env.focus and dice.random() < 0.2:
        return env.write_call("press", key="Enter")
    if dice.random() < 0.3 and (move := env.oracle()) and "<answer>" not in move:
        return move
    if not env.shown or dice.random() < 0.3:
        calls = [
            ("press", {"key": dice.choice(["Enter", "Enter", *KEYS])}),
            ("back", {}),
            ("scroll", {}),
            ("wait", {"seconds": dice.choice([0.5, 1, 2])}),
        ]
        name, arguments = dice.choice(calls)
        return env.write_call(name, **arguments)
    number, control = dice.choice(list(enumerate(env.shown, 1)))
    if control.options:
        return env.write_call("select", number=number, option=dice.choice(control.options))
    if control.role in TYPED and dice.random() < 0.9:
        return env.write_call("type", number=number, text=dice.choice(TEXTS))
    kind = dice.choices(["click", "hover", "scroll"], [8, 1, 1])[0]
    return env.write_call("hover" if "disabled" in control.states else kind, number=number)


def told(env: DeskEnv, result: tuple[Any, ...]) -> tuple[Any, ...]:
    return (*result, env.state_key(), env.difference)


def lockstep(simulation: DeskEnv, chromium: DeskBrowserEnv, name: str, seed: int) -> int:
    """Plays both; the number of steps in which they were equal, which are all."""
    options = {"template": name, "nuisance": (0.0, 0.6)[seed % 2]}
    dice = random.Random(f"{name} {seed}")
    both = simulation, chromium
    one, two = (told(env, env.reset(seed=seed, options=options)) for env in both)
    assert one == two
    for step in range(STEPS):
        actions = [wandering(simulation, dice) for _ in range(dice.choice([1, 1, 1, 2]))]
        action = "".join(actions) if step < STEPS - 1 else simulation.write_answer("2")
        one, two = (told(env, env.step(action)) for env in both)
        assert one == two, f"{name} {seed} {step} {action}"
    return STEPS


@pytest.mark.parametrize("name", TEMPLATES)
def test_simulation_and_chromium_are_one_world(name: str) -> None:
    with contextlib.closing(DeskBrowserEnv()) as chromium:
        for seed in range(SEEDS):
            lockstep(DeskEnv(), chromium, name, [*TEMPLATES].index(name) + seed)
