"""Tasks as they are named on the command line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..tools.named import split_name
from .errors import suggest
from .modules import import_named
from .terminal import UsageError

if TYPE_CHECKING:
    from ..envs import Task, TextEnv

Settings = Annotated[
    list[str] | None,
    typer.Option("--setting", metavar="KEY=VALUE", help="A setting of the environment; repeatable."),
]
ENV = "An environment's id, such as treegym/Maze-v0, or module:id; or a scenario, or a run's directory."


def values(name: str, pairs: list[str] | None) -> dict[str, Any]:
    """The pairs of an option that takes KEY=VALUE. UsageError."""
    import yaml

    try:
        return {key: yaml.safe_load(value) for key, value in (pair.split("=", 1) for pair in pairs or ())}
    except (ValueError, yaml.YAMLError) as error:
        raise UsageError(f"{name} takes KEY=VALUE, the value in YAML") from error


def named_task(name: str, seed: int, options: dict[str, Any], settings: dict[str, Any]) -> Task:
    """A task of the environment of this id, or the held-out task number `seed` of a scenario or a run. UsageError.

    The options and settings given here go before those of the scenario.
    """
    from ..envs import Task, registered

    bundled = {file.stem for file in Path(__file__).parent.glob("*.yaml")}
    if name in registered():
        return Task(name, seed, options, settings)
    if name in bundled or Path(name).exists():
        from .schema import load_scenario  # which imports torch

        task = load_scenario(name).environment.task("heldout", seed)
        return replace(task, options={**task.options, **options}, settings={**task.settings, **settings})
    place, _ = split_name(name)
    if not place:
        raise UsageError(
            f"no environment and no scenario {name!r}{suggest(name, [*registered(), *bundled])}; "
            "an environment of another module is module:id, or path/to/file.py:id"
        )
    import_named(place)
    return Task(name, seed, options, settings)


def begin(task: Task) -> tuple[TextEnv, dict[str, Any]]:
    """The environment after reset, and what reset told. UsageError where there is none."""
    import gymnasium

    try:
        env = task.make()
        _, info = env.reset(seed=task.seed, options=dict(task.options))
    except (ImportError, OSError, TypeError, ValueError, gymnasium.error.Error) as error:
        raise UsageError(f"{task.env}: {error}") from error
    return env, info
