"""The options by which a command chooses trees, the same in every command that does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ..terminal import UsageError

if TYPE_CHECKING:
    from ...agents.store import Where

Stage = Annotated[str | None, typer.Option(help="Only trees of this stage, such as improvement.")]
Steps = Annotated[
    str | None, typer.Option(metavar="LOW:HIGH", help="Only trees of these steps; either end can be left out.")
]
Env = Annotated[str | None, typer.Option(help="Only trees of this environment.")]
Returns = Annotated[str | None, typer.Option(metavar="LOW:HIGH", help="Only trees whose mean return is in this range.")]
Terms = Annotated[
    list[str] | None,
    typer.Option(
        "--term",
        metavar="NAME=LOW:HIGH",
        help="Only trees with such a mean of a reward term; repeatable.",
    ),
]
Rollouts = Annotated[str | None, typer.Option(metavar="LOW:HIGH", help="Only trees with so many rollouts.")]
Success = Annotated[
    str | None, typer.Option(metavar="all|some|mixed|none", help="Only trees of which so many rollouts succeeded.")
]
Cause = Annotated[str | None, typer.Option(help="Only trees with a rollout that this truncated, as 'turn limit'.")]
Text = Annotated[str | None, typer.Option(help="Only trees with this text in a message or an action, in any case.")]


def conditions(
    stage: str | None,
    steps: str | None,
    env: str | None,
    returns: str | None,
    terms: list[str] | None,
    rollouts: str | None,
    success: str | None,
    cause: str | None,
    text: str | None,
) -> dict[str, str]:
    """The conditions that were given, by the names that `Where.parse` knows."""
    options = dict(stage=stage, steps=steps, env=env, returns=returns, rollouts=rollouts, success=success)
    options |= dict(cause=cause, text=text, term=",".join(terms) if terms else None)
    return {name: value for name, value in options.items() if value is not None}


def where(conditions: dict[str, str], success_term: str) -> Where:
    """Reads the conditions. UsageError that names the option if one cannot be read."""
    from ...agents.store import Where

    try:
        return Where.parse(conditions, success_term)
    except ValueError as error:
        raise UsageError(f"--{error}") from error
