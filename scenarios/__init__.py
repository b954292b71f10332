"""Scenario files and the command line."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .build import train
    from .errors import ScenarioError
    from .schema import AlgorithmChoice, Model, Scenario, load_scenario

__all__ = ["AlgorithmChoice", "Model", "Scenario", "ScenarioError", "load_scenario", "train"]


def __getattr__(name: str) -> Any:
    """Imports at first use: the command shows its help without torch, which takes seconds."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import build, schema

    return getattr(build if name == "train" else schema, name)
