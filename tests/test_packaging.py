"""What is installed is what the tree holds."""

import importlib
import re
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points, version
from itertools import chain
from pathlib import Path

import treegym

ROOT = Path(__file__).parent.parent
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
ROOMS = ["tools", "envs", "agents", "trainers", "scenarios"]


def test_every_folder_with_python_files_is_listed() -> None:
    folders = {path.parent.relative_to(ROOT) for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    found = {"treegym": ".treegym"} | {f"treegym.{'.'.join(folder.parts)}": folder.as_posix() for folder in folders}
    assert sorted(SETUPTOOLS["packages"]) == sorted(found)
    assert SETUPTOOLS["package-dir"] == found


def test_no_folder_shadows_the_package() -> None:
    assert not (ROOT / "treegym").exists()


def test_every_data_file_is_installed() -> None:
    for package, patterns in SETUPTOOLS["package-data"].items():
        source = ROOT / SETUPTOOLS["package-dir"][package]
        [installed] = importlib.import_module(package).__path__
        for pattern in patterns:
            files = [path.relative_to(source) for path in source.glob(pattern)]
            assert [path for path in files if not (Path(installed) / path).is_file()] == []


def test_package_data_covers_every_other_file() -> None:
    folders = {package: ROOT / folder for package, folder in SETUPTOOLS["package-dir"].items()}
    data = SETUPTOOLS["package-data"].items()
    kept = {path for package, patterns in data for glob in patterns for path in folders[package].glob(glob)}
    files = {path for folder in folders.values() for path in folder.rglob("*") if path.is_file()}
    assert {path for path in files - kept if path.suffix not in (".py", ".pyc")} == set()


def test_version_is_the_changelog_s_newest() -> None:
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest and newest[1] == treegym.__version__ == version("treegym")


def test_command_is_installed() -> None:
    [command] = entry_points(group="console_scripts", name="treegym")
    assert command.value == "treegym.__main__:main"


def test_python_m_treegym_is_the_command() -> None:
    helped = subprocess.run([sys.executable, "-m", "treegym", "--help"], capture_output=True, text=True, check=True)
    assert "treegym" in helped.stdout


def test_constraints_pin_every_requirement() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
    pins = {canonical(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    assert {canonical(line) for line in requirements} <= pins


def canonical(requirement: str) -> str:
    return re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", requirement)[0]).lower()
