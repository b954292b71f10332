"""Tasks as they are named on the command line."""

from __future__ import annotations

import difflib
from typing import Any

from .terminal import UsageError


def values(name: str, pairs: list[str] | None) -> dict[str, Any]:
    """The pairs of an option that takes KEY=VALUE. UsageError."""
    import yaml

    try:
        return {key: yaml.safe_load(value) for key, value in (pair.split("=", 1) for pair in pairs or ())}
    except (ValueError, yaml.YAMLError) as error:
        raise UsageError(f"{name} takes KEY=VALUE, the value in YAML") from error


def begin(task: Any) -> tuple[Any, dict[str, Any]]:
    """The environment after reset, and what reset told. UsageError where there is none."""
    import gymnasium

    from ..envs import registered

    if task.env not in registered() and ":" not in task.env:
        near = difflib.get_close_matches(task.env, registered(), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(registered())}"
        raise UsageError(f"no environment {task.env!r}; {hint}")
    try:
        env = task.make()
        _, info = env.reset(seed=task.seed, options=dict(task.options))
    except (ImportError, TypeError, ValueError, gymnasium.error.Error) as error:
        raise UsageError(f"{task.env}: {error}") from error
    return env, info
