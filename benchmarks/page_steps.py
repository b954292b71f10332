"""A side of benchmarks/gui.py in a process of its own: resets and clicks on pages of MiniWoB++, timed.

    python benchmarks/page_steps.py treegym|browsergym|selenium [BROWSER]

It runs in the environment that the side is installed in. For every line of input, a list of pages as JSON, it plays an
episode on each and prints the milliseconds of all resets and clicks.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

CLICKS = 3  # an episode
Click = Callable[[], bool]  # clicks on something that can be clicked; whether the episode goes on
Reset = Callable[[int], Click]  # with a seed


def treegym(browser: str) -> Callable[[str], tuple[Reset, Callable[[], None]]]:
    from treegym.envs import BrowserEnv

    env = BrowserEnv()

    def opened(page: str) -> tuple[Reset, Callable[[], None]]:
        def reset(seed: int) -> Click:
            env.reset(seed=seed, options={"page": page})

            def click() -> bool:
                env.step(env.write_call("click", number=1))
                return not env.over

            return click

        return reset, lambda: None

    return opened


def browsergym(browser: str, **settings: Any) -> Callable[[str], tuple[Reset, Callable[[], None]]]:
    import browsergym.miniwob
    import gymnasium

    assert browsergym.miniwob

    def opened(page: str) -> tuple[Reset, Callable[[], None]]:
        env = gymnasium.make(f"browsergym/miniwob.{page}", pw_chromium_kwargs={"executable_path": browser}, **settings)

        def reset(seed: int) -> Click:
            seen = env.reset(seed=seed)[0]

            def click() -> bool:
                nonlocal seen
                elements = seen["extra_element_properties"]
                first = next(bid for bid, about in elements.items() if about["clickable"] and about["visibility"] > 0.5)
                seen, _, terminated, truncated, _ = env.step(f"click('{first}')")
                return not (terminated or truncated)

            return click

        return reset, env.close

    return opened


def browsergym_bare(browser: str) -> Callable[[str], tuple[Reset, Callable[[], None]]]:
    """Without the time that it waits by itself."""
    return browsergym(browser, slow_mo=0, pre_observation_delay=0.0)


def selenium(browser: str) -> Callable[[str], tuple[Reset, Callable[[], None]]]:
    import gymnasium
    import miniwob
    from miniwob.action import ActionTypes

    gymnasium.register_envs(miniwob)

    def opened(page: str) -> tuple[Reset, Callable[[], None]]:
        env = gymnasium.make(f"miniwob/{page}-v1")

        def reset(seed: int) -> Click:
            seen = env.reset(seed=seed)[0]

            def click() -> bool:
                nonlocal seen
                kinds = ("button", "a", "span", "input_text", "input_checkbox", "input_radio", "input_password")
                first = next(one["ref"] for one in seen["dom_elements"] if one["tag"] in kinds and one["ref"] > 0)
                action = env.unwrapped.create_action(ActionTypes.CLICK_ELEMENT, ref=first)
                seen, _, terminated, truncated, _ = env.step(action)
                return not (terminated or truncated)

            return click

        return reset, env.close

    return opened


SIDES = {"treegym": treegym, "browsergym": browsergym, "browsergym_bare": browsergym_bare, "selenium": selenium}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print
    opened = SIDES[sys.argv[1]](sys.argv[2])
    print("{}", file=answers, flush=True)
    for number, line in enumerate(sys.stdin):
        times: dict[str, list[float]] = {"reset": [], "step": []}
        for page in json.loads(line):
            reset, close = opened(page)
            start = time.perf_counter()
            click = reset(number)
            times["reset"].append(since(start))
            for _ in range(CLICKS):
                start = time.perf_counter()
                goes_on = click()
                times["step"].append(since(start))
                if not goes_on:
                    break
            close()
        print(json.dumps(times), file=answers, flush=True)


def since(start: float) -> float:
    return (time.perf_counter() - start) * 1e3


if __name__ == "__main__":
    main()
