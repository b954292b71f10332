"""The desk in Chromium: one world with the simulation, to the byte, for every template."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator
from typing import Any

import pytest

from treegym.envs import DeskBrowserEnv, DeskEnv, Task, check_env
from treegym.envs.desk.tasks import TEMPLATES
from treegym.envs.screen import KEYS, TYPED
from treegym.envs.web.desk import DeskSite
from treegym.tools import EpisodeLost
from treegym.tools.browser import BrowserUnavailable, Request, close_browser
from treegym.tools.browser.chromium import chromium_path

try:
    chromium_path()
except BrowserUnavailable as missing:
    pytest.skip(str(missing), allow_module_level=True)
pytest.importorskip("playwright", reason="pip install 'treegym[browser]'")

ID, DESK = "treegym/Browser-v0", {"tasks": "desk"}
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


def test_the_oracle_does_a_task_in_chromium_with_what_is_in_its_way() -> None:
    """The two-application task, with as many nuisances as there can be."""
    with contextlib.closing(Task(ID, 0, settings=DESK).make()) as env:
        _, info = env.reset(seed=5, options={"template": "mail_to_cart", "nuisance": 1.0})
        assert info["template"] == "mail_to_cart"
        while (action := env.oracle()) is not None:
            *_, info = env.step(action)
        assert info["reward_terms"] == {"exact": 1.0, "goals": 1.0, "harm": 0.0, "format": 1.0} and info["difference"]


def test_settings_and_options_are_those_of_the_simulation() -> None:
    settings = {"apps": ["shop"], "nuisance": 0.5, "oracle_error": 0.2, "chars": 300}
    for options in ({}, {"split": "heldout"}, {"apps": "mail", "split": "templates"}):
        one, two = Task("treegym/Desk-v0", 3, options, settings), Task(ID, 3, options, {**settings, **DESK})
        with contextlib.closing(one.make()) as simulation, contextlib.closing(two.make()) as chromium:
            both = simulation, chromium
            first, second = (env.reset(seed=3, options=dict(options)) for env in both)
            assert first == second
            assert simulation.oracle() == chromium.oracle() and not chromium.can_fork
    with pytest.raises(ValueError, match="no application 'bank'"):
        Task(ID, 0, settings={**DESK, "apps": ["bank"]}).make()


@pytest.mark.skipif("TREEGYM_SLOW" not in os.environ, reason="a minute; TREEGYM_SLOW=1 runs it")
def test_the_desk_in_chromium_keeps_the_promises_of_every_environment() -> None:
    check_env(lambda: DeskBrowserEnv(apps=["files"], max_turns=6), options={"template": "files_rename"}, seeds=[0])


def test_a_browser_that_dies_truncates_the_episode_and_what_changed_is_still_told() -> None:
    with contextlib.closing(DeskBrowserEnv()) as env:
        env.reset(seed=0)
        env._page._lost = EpisodeLost("browser died", "the browser has ended")
        *_, truncated, info = env.step(env.write_call("click", number=1))
        assert truncated and (info["cause"], info["difference"]) == ("browser died", {})


def test_the_site_answers_whatever_a_browser_asks() -> None:
    env = DeskEnv()
    env.reset(seed=0, options={"template": "shop_put"})
    site = DeskSite(env.desk)
    assert site.answer(Request("GET", "/favicon.ico")).status == 404
    assert b"There is no such page." in site.answer(Request("GET", "/nowhere?x=%ff")).body
    reply = site.answer(Request("POST", "/shop", body=b"button=steal&q=%ff&q=2&nothing"))
    assert (reply.status, reply.headers["Location"], site.desk) == (303, "/shop", env.desk)
    assert b"This form is out of date." in site.answer(Request("GET", "/shop")).body
    assert b"out of date" not in site.answer(Request("GET", "/shop")).body
