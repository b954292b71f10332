"""Modules that scenarios and commands name: where they are looked for, and where a run's were found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from ..tools.named import PartNotFound, folder_of, import_place, look_in, named, split_name
from .errors import ScenarioError


def import_named(place: str, *folders: Path) -> ModuleType:
    """The module, or the file, from the first of these folders that has it, else from the current one, else an
    installed one. ScenarioError."""
    try:
        return import_place(place, *folders, Path.cwd())
    except PartNotFound as error:
        raise ScenarioError(str(error)) from error


def part_named(name: str, place: str) -> Any:
    """What `module:Name` or `path/to/file.py:Name`, written at a place of a scenario, names. ScenarioError."""
    try:
        return named(name)
    except PartNotFound as error:
        raise ScenarioError(f"{place}: {error}") from error


def bring_module(run: Path) -> None:
    """Imports the module of a run's environment, from where it was when the run began or from beside the run; there
    the other modules that its scenario and its trees name are found too.

    Raises ScenarioError where the run's scenario names a module that is nowhere.
    """
    environment, looked = _recorded(run / "scenario.yaml")
    folders = [*(run / folder for folder in looked), run]
    if place := split_name(environment)[0]:
        import_named(place, *folders)
    else:
        look_in(*folders, Path.cwd())  # trees may be of other environments


def _recorded(scenario: Path) -> tuple[str, list[str]]:
    """(environment.id, look_in) of a scenario, which may be of another version, or missing."""
    try:
        content = yaml.safe_load(scenario.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return "", []
    fields = content if isinstance(content, dict) else {}
    environment = fields.get("environment")
    id = environment.get("id") if isinstance(environment, dict) else ""
    return str(id or ""), as_folders(fields.get("look_in"))


def as_folders(look_in: Any) -> list[str]:
    """What stands under look_in, which may be one folder, as a list."""
    return [look_in] if look_in and isinstance(look_in, str) else [*map(str, look_in or ())]


def folders_of(scenario: Any) -> tuple[str, ...]:
    """The folders in which the modules and files were found that a scenario, as plain data, names."""
    places = dict.fromkeys(split_name(text)[0] for text in _texts(scenario))
    return tuple(dict.fromkeys(filter(None, map(folder_of, filter(None, places)))))


def _texts(content: Any) -> Iterator[str]:
    if isinstance(content, str):
        yield content
    elif isinstance(content, Mapping):
        yield from _texts([*content.keys(), *content.values()])
    elif isinstance(content, list | tuple):
        for part in content:
            yield from _texts(part)
