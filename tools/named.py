"""Parts by name: `module:Name`, or `path/to/file.py:Name`, looked for along Python's path."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib.util
import inspect
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

_IMPORTING = threading.RLock()


class PartNotFound(ImportError):
    """There is no part of that name, or its module cannot be imported. The message is one line."""


def split_name(name: str) -> tuple[str, str]:
    """(place, name within it): "shop.rewards:Brevity" is ("shop.rewards", "Brevity"). No colon: the place is empty."""
    place, _, attribute = name.rpartition(":")
    return place, attribute


def named(name: str, *folders: Path) -> Any:
    """What `module:Name` or `path/to/file.py:Name` names, by `import_place`. PartNotFound if there is no such thing."""
    place, attribute = split_name(name)
    module = import_place(place, *folders)
    try:
        return getattr(module, attribute)
    except AttributeError as error:
        near = difflib.get_close_matches(attribute, dir(module), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise PartNotFound(f"{place} ({module.__file__}) has no {attribute!r}{hint}") from error


def written(part: Any) -> tuple[str, dict[str, Any]]:
    """(name, arguments) of a part as JSON has it: name, {name: {arguments}} or [name, {arguments}]. ValueError for
    anything else."""
    match part:
        case str():
            return part, {}
        case Mapping() if len(part) == 1:
            [(name, arguments)] = part.items()
        case [name, arguments]:
            pass
        case _:
            name, arguments = None, None
    if not isinstance(name, str) or not isinstance(arguments, Mapping | None):
        raise ValueError(f"write a name, or {{name: {{argument: value}}}}, not {part!r}")
    return name, dict(arguments or {})


def call_with(make: Callable[..., Any], what: str, arguments: Mapping[str, Any], *first: Any) -> Any:
    """What a class or function makes of `first` and these arguments. TypeError where it does not take them."""
    signature = inspect.signature(make)
    try:
        signature.bind(*first, **arguments)
    except TypeError as error:
        takes = ", ".join([*signature.parameters][len(first) :]) or "none"
        raise TypeError(f"{what}: {error}; its arguments: {takes}") from None
    return make(*first, **arguments)


def import_place(place: str, *folders: Path) -> ModuleType:
    """The module of this name or file, from the first of the folders that has it, otherwise from Python's path.

    The folders, and that of a file, stay on Python's path, so that a module finds what lies beside it. PartNotFound
    where there is no such module, or importing it fails.
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
        if not folders and (file := getattr(top, "__file__", None)):
            folders = [Path(file).parent]
    installed = {Path(path).resolve() for path in sysconfig.get_paths().values()}
    return next((str(folder.resolve()) for folder in folders if folder.resolve() not in installed), "")


def _found(place: str) -> Iterator[tuple[Path, Path]]:
    """Each folder on Python's path, and then the current one, that has a place ending in .py; with the file's path."""
    for folder in (Path(entry or ".") for entry in [*sys.path, "."]):
        if (folder / place).is_file():
            yield folder, (folder / place).resolve()


def look_in(*folders: Path) -> None:
    """Puts these folders at the beginning of Python's path."""
    places = dict.fromkeys(str(folder.resolve()) for folder in folders)
    sys.path[:] = [*places, *(entry for entry in sys.path if entry not in places)]
    importlib.invalidate_caches()


def _name(file: Path) -> str:
    """The name under which a file is imported: its own or, where that means another module, one that no other has."""
    try:
        spec = importlib.util.find_spec(file.stem)
    except ValueError:  # the module of that name has none, as __main__
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
