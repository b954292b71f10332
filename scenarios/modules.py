"""Modules that scenarios and commands name: where they are looked for, and what is said where they are not found."""

from __future__ import annotations

import importlib
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import yaml

from .errors import ScenarioError


def import_named(module: str, *folders: Path) -> ModuleType:
    """The module from the first of these folders that has it, else from the current one, else an installed one.

    The folders stay on Python's path, so that the module finds what lies beside it. Raises ScenarioError.
    """
    look_in(*folders)
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise ScenarioError(f"the module {module!r} imports another one: {error}") from error
        places = dict.fromkeys(str(folder.resolve()) for folder in (*folders, Path.cwd()))
        hint = f"; write {module.removesuffix('.py')!r}" if module.endswith(".py") else ""
        raise ScenarioError(f"no module {module!r} in {', '.join(places)} or among those installed{hint}") from error
    except (Exception, SystemExit) as error:  # whatever the module does when it is imported
        raise ScenarioError(f"the module {module!r} cannot be imported: {type(error).__name__}: {error}") from error


def look_in(*folders: Path) -> None:
    """Puts these folders, then the current one, at the beginning of Python's path."""
    places = dict.fromkeys(str(folder.resolve()) for folder in (*folders, Path.cwd()))
    sys.path[:] = [*places, *(entry for entry in sys.path if entry not in places)]
    importlib.invalidate_caches()


def bring_module(run: Path) -> None:
    """Imports the module of a run's environment, from where it was when the run began or from beside the run.

    Raises ScenarioError where the run's scenario names a module that is nowhere.
    """
    environment, folder = _recorded(run / "scenario.yaml")
    folders = [run / folder, run] if folder else [run]
    if module := module_of(environment):
        import_named(module, *folders)
    else:
        look_in(*folders)  # trees may be of other environments


def _recorded(scenario: Path) -> tuple[str, str]:
    """(environment.id, look_in) of a scenario, which may be of another version, or missing."""
    try:
        content = yaml.safe_load(scenario.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return "", ""
    fields = content if isinstance(content, dict) else {}
    environment = fields.get("environment")
    id = environment.get("id") if isinstance(environment, dict) else ""
    return str(id or ""), str(fields.get("look_in") or "")


def module_of(environment: str) -> str:
    """The module that an environment's id names: that of `module:id`, else none."""
    return environment.rpartition(":")[0]


def folder_of(environment: str) -> str:
    """The folder in which the module of `module:id` was found; empty for an installed one, or where there is none."""
    top = sys.modules.get(module_of(environment).partition(".")[0])
    places = [Path(place).parent for place in getattr(top, "__path__", ())]  # of a package
    if not places and (file := getattr(top, "__file__", None)):
        places = [Path(file).parent]
    installed = {Path(path).resolve() for path in sysconfig.get_paths().values()}
    return next((str(place.resolve()) for place in places if place.resolve() not in installed), "")
