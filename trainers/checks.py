"""Checks of settings."""

from __future__ import annotations

STRICT = {"extra": "forbid"}  # what pydantic reads where settings are validated


def at_least(least: int, **values: float) -> None:
    """ValueError where one of the values is smaller."""
    for name, value in values.items():
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
