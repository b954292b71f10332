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


def imports(path: Path, *, runtime: bool = False) -> Iterator[str]:
    """Absolute names of what the file imports, wherever in it; at run time not what is for type checkers alone."""
    package = ["treegym", *path.parent.parts]
    tree = ast.parse((ROOT / path).read_text())
    guarded = [
        node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    skipped = {id(inner) for node in guarded for inner in ast.walk(node)} if runtime else set[int]()
    for node in (node for node in ast.walk(tree) if id(node) not in skipped):
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
    assert rooms <= {*allowed, "REGISTERED", "__version__"}


# What a room consists of, in an order in which each part imports only parts before it.
ORDER = {
    "tools": "named artefacts protocol deadline function cassette search calls looping browser sandbox mcp",
    "envs": "notes base rewards spaces formats toolparts toolenv screen fresh problems wrappers task "
    "factsearch household houserules lookup maze desk code math web check",
    "agents": "policy template models chat notebook tree inference loop rollouts store evaluation serving policies "
    "exchange memory",
    "trainers": "checks packing advantages tasks curriculum losses algorithms learner pipeline stages plan training",
    "scenarios": "errors terminal charts folders viewer modules person secret watch parts schema changes tasks "
    "serving memory build policies evaluation comparison commands",
}


@pytest.mark.parametrize("path", [path for path in FILES if len(path.parts) > 2 or path.stem != "__init__"], ids=str)
def test_a_part_of_a_room_imports_only_parts_before_it(path: Path) -> None:
    room, own = path.parts[0], path.with_suffix("").parts[1]
    order = ORDER[room].split()
    known = {path.with_suffix("").parts[1] for path in FILES if path.parts[0] == room} - {"__init__"}
    assert known == set(order), f"the order of {room} lacks a part, or has one too many: {known ^ set(order)}"
    used = {name.split(".")[2] for name in imports(path, runtime=True) if name.startswith(f"treegym.{room}.")}
    assert not {name for name in used & known if order.index(name) > order.index(own)}


def modules_of_environments() -> set[str]:
    """The modules of concrete environments, and the packages of their families."""
    points = [spec.entry_point for spec in gymnasium.registry.values() if spec.namespace == "treegym"]
    modules = {(load_env_creator(point) if isinstance(point, str) else point).__module__ for point in points}
    return {".".join(module.split(".")[:3]) for module in modules}


@pytest.mark.parametrize("path", [path for path in FILES if path.parts[0] in ("agents", "trainers")], ids=str)
def test_agents_and_trainers_know_no_concrete_environment(path: Path) -> None:
    families = modules_of_environments()
    assert "treegym.envs.factsearch" in families and "treegym.envs.lookup" in families
    used = {name for name in imports(path) if name.startswith("treegym.envs.")}
    things = {getattr(getattr(treegym.envs, name.split(".")[2], None), "__module__", None) or name for name in used}
    assert not [name for name in used | things for family in families if f"{name}.".startswith(f"{family}.")]


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


LIGHT = [
    "envs",
    *(f"agents{part}" for part in ("", ".store", ".evaluation", ".rollouts", ".policies", ".memory")),
]


@pytest.mark.parametrize("module", [*LIGHT, "scenarios.commands.cli"])
def test_what_needs_no_torch_loads_none(module: str) -> None:
    code = f"import sys, treegym.{module}; print({{'torch', 'transformers', 'yaml'}} & set(sys.modules) or '')"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert loaded == ("" if module in LIGHT else "{'yaml'}")
