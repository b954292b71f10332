"""treegym: multi-turn text environments with tools, and trainers that learn from trees of rollouts.

Five rooms, each importing only those before it: tools, envs, agents, trainers, scenarios. The usual names are here as
well, imported at first use; the ids of the environments, those of other packages too, are known to Gymnasium.
"""

import os
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

import gymnasium

if TYPE_CHECKING:
    from . import agents, envs, scenarios, tools, trainers
    from .agents import Run
    from .agents.evaluation import evaluate
    from .envs import Message, Task, TextEnv, ToolEnv, check_env
    from .scenarios import Scenario, load_scenario, train
    from .tools import ToolError, tool

# Threads of torch that wait for work shall yield: spinning, they take the cores from whatever else runs, and where
# there are fewer cores than threads from each other. Read by OpenMP when torch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "0.1.0"

_ROOMS = ("tools", "envs", "agents", "trainers", "scenarios")
_NAMES = {
    "Message": "envs",
    "Run": "agents",
    "Scenario": "scenarios",
    "Task": "envs",
    "TextEnv": "envs",
    "ToolEnv": "envs",
    "ToolError": "tools",
    "check_env": "envs",
    "evaluate": "agents.evaluation",
    "load_scenario": "scenarios",
    "tool": "tools",
    "train": "scenarios",
}
__all__ = [
    "Message", "Run", "Scenario", "Task", "TextEnv", "ToolEnv", "ToolError", "agents", "check_env", "envs",
    "evaluate", "load_scenario", "scenarios", "tool", "tools", "train", "trainers",
]  # fmt: skip

ENVIRONMENTS = "treegym.environments"  # the group of entry points by which packages make ids known
_OWN = {
    "Browser": "web.env:browser_env",
    "Code": "code.env:CodeEnv",
    "Desk": "desk.env:DeskEnv",
    "FactSearch": "factsearch.env:FactSearchEnv",
    "HouseRules": "houserules:HouseRulesEnv",
    "Household": "household:HouseholdEnv",
    "Lookup": "lookup:LookupEnv",
    "Maze": "maze:MazeEnv",
    "PythonMath": "math.env:PythonMathEnv",
}


def _register() -> tuple[str, ...]:
    """Makes the environments of treegym and of installed packages known to Gymnasium, without importing them."""
    places = {f"treegym/{name}-v0": f"{__name__}.envs.{place}" for name, place in _OWN.items()}
    for point in entry_points(group=ENVIRONMENTS):
        places.setdefault(point.name, point.value)
    for id, place in places.items():
        if id not in gymnasium.registry:
            gymnasium.register(id, entry_point=place)
    return tuple(places)


REGISTERED = _register()  # Gymnasium ids


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f"{__name__}.{name}")
    if name in _NAMES:
        return getattr(import_module(f"{__name__}.{_NAMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
