"""Imports point one way: tools, envs, agents, trainers, scenarios."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import gymnasium
import pytest
from gymnasium.envs.registration import load_env_creator

import treegym.envs

ROOT = Path(__file__).parent.parent
ROOMS = ["tools", "envs", "agents", "trainers", "scenarios"]
FILES = sorted(path.relative_to(ROOT) for room in ROOMS for path in (ROOT / room).rglob("*.py"))
EVERYTHING = [
    *FILES,
    *(p.relative_to(ROOT) for top in ("tests", "benchmarks", "docs") for p in (ROOT / top).rglob("*.py")),
]


def imports(path: Path) -> Iterator[str]:
    """Absolute names of what the file imports, wherever in it."""
    package = ["treegym", *path.parent.parts]
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_room_imports_only_rooms_before_it(path: Path) -> None:
    allowed = ROOMS[: ROOMS.index(path.parts[0]) + 1]
    rooms = {name.split(".")[1] for name in imports(path) if name.startswith("treegym.")}
    assert rooms <= {*allowed, "__version__"}


@pytest.mark.parametrize("path", [path for path in FILES if path.parts[0] in ("agents", "trainers")], ids=str)
def test_agents_and_trainers_know_no_concrete_environment(path: Path) -> None:
    used = {name.split(".")[2] for name in imports(path) if name.startswith("treegym.envs.")}
    things = [getattr(treegym.envs, name) for name in used]
    points = [spec.entry_point for spec in gymnasium.registry.values() if spec.namespace == "treegym"]
    concrete = {(load_env_creator(point) if isinstance(point, str) else point).__module__ for point in points}
    assert not {getattr(thing, "__module__", thing.__name__) for thing in things} & concrete


@pytest.mark.parametrize("path", EVERYTHING, ids=str)
def test_no_file_imports_a_room_as_a_top_level_package(path: Path) -> None:
    """From the repository root `import tools` works, and makes a second copy of every class."""
    assert not {name.split(".")[0] for name in imports(path)} & set(ROOMS)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_code_imports_its_own_rooms_relatively(path: Path) -> None:
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [str(node.module)]
        assert not [name for name in names if name.split(".")[0] == "treegym"]


def test_environments_import_neither_torch_nor_yaml() -> None:
    code = "import sys, treegym.envs; print(sorted({'torch', 'transformers', 'yaml'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
