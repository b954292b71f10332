"""Parts by name: `module:Name`, or `path/to/file.py:Name`, looked for along Python's path."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib.util
import sys
import sysconfig
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

_IMPORTING = threading.RLock()


class PartNotFound(ImportError):
    """A named part that there is not, or whose module cannot be imported; one line."""


def split_name(name: str) -> tuple[str, str]:
    """(place, name within it): "shop.rewards:Brevity" is ("shop.rewards", "Brevity"). No colon: no place."""
    place, _, attribute = name.rpartition(":")
    return place, attribute


def named(name: str, *folders: Path) -> Any:
    """What `module:Name` or `path/to/file.py:Name` names, looked for as `import_place` does. PartNotFound."""
    place, attribute = split_name(name)
    module = import_place(place, *folders)
    try:
        return getattr(module, attribute)
    except AttributeError as error:
        near = difflib.get_close_matches(attribute, dir(module), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise PartNotFound(f"{place} ({module.__file__}) has no {attribute!r}{hint}") from error


def import_place(place: str, *folders: Path) -> ModuleType:
    """The module of this name, or of this file, from the first of the folders that has it, else from Python's path.

    The folders, and that of a file, stay on Python's path, so that a module finds what lies beside it. PartNotFound.
    """
    with _IMPORTING:  # environments are made in many threads
        return _imported(place, folders)


def _imported(place: str, folders: Sequence[Path]) -> ModuleType:
    if folders:
        look_in(*folders)
    if not place.endswith(".py"):
        return _import(place, folders)
    _, file = next(_found(place), (None, None))
    if file is None:
        raise PartNotFound(f"no file {place!r} in {_told(folders)}")
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))
        importlib.invalidate_caches()
    name = _name(file)
    if name != file.stem and name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec and spec.loader
        sys.modules[name] = importlib.util.module_from_spec(spec)
        with _telling(place, folders):
            try:
                spec.loader.exec_module(sys.modules[name])
            except BaseException:
                del sys.modules[name]
                raise
    return _import(name, folders)


def folder_of(place: str) -> str:
    """The folder in which a place was found; empty for an installed module, and where nothing was imported."""
    if place.endswith(".py"):
        folders = [folder for folder, _ in _found(place) if not Path(place).is_absolute()]
    else:
        top = sys.modules.get(place.partition(".")[0])
        folders = [Path(folder).parent for folder in getattr(top, "__path__", ())]  # of a package
        if not folders and (own := getattr(top, "__file__", None)):
            folders = [Path(own).parent]
    installed = {Path(path).resolve() for path in sysconfig.get_paths().values()}
    return next((str(folder.resolve()) for folder in folders if folder.resolve() not in installed), "")


def _found(place: str) -> Iterator[tuple[Path, Path]]:
    """The folders on Python's path, then the current one, that have a place ending in .py, and what it is there."""
    for folder in (Path(entry or ".") for entry in [*sys.path, "."]):
        if (folder / place).is_file():
            yield folder, (folder / place).resolve()


def look_in(*folders: Path) -> None:
    """Puts these folders at the beginning of Python's path."""
    places = dict.fromkeys(str(folder.resolve()) for folder in folders)
    sys.path[:] = [*places, *(entry for entry in sys.path if entry not in places)]
    importlib.invalidate_caches()


def _name(file: Path) -> str:
    """Under which a file is imported: its own name, or, where that means another module, one that no other has."""
    try:
        spec = importlib.util.find_spec(file.stem)
    except ValueError:  # a module that was made without one, such as __main__
        spec = None
    if spec and spec.origin and Path(spec.origin).resolve() == file:
        return file.stem
    return f"{file.stem}_{hashlib.blake2b(str(file).encode(), digest_size=4).hexdigest()}"


def _import(module: str, folders: Sequence[Path]) -> ModuleType:
    with _telling(module, folders):
        return importlib.import_module(module)


@contextlib.contextmanager
def _telling(module: str, folders: Sequence[Path]) -> Iterator[None]:
    """Whatever is raised while a module is imported becomes PartNotFound."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise PartNotFound(f"the module {module!r} imports another one: {error}") from error
        raise PartNotFound(f"no module {module!r} in {_told(folders)} or among those installed") from error
    except (Exception, SystemExit) as error:  # whatever the module does when it is imported
        raise PartNotFound(f"the module {module!r} cannot be imported: {type(error).__name__}: {error}") from error


def _told(folders: Sequence[Path]) -> str:
    return ", ".join(dict.fromkeys(str(folder.resolve()) for folder in folders or [Path.cwd()]))
