"""docs/architecture.md names every file of the rooms with its first line, and no file that there is not."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
ROOMS = ("tools", "envs", "agents", "trainers", "scenarios")


def opening(file: Path) -> str:
    """The first paragraph of a module's docstring, on one line."""
    return (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").split("\n\n")[0].replace("\n", " ")


def test_every_file_stands_on_the_page_with_its_first_line() -> None:
    for room in ROOMS:
        section = PAGE.partition(f"\n### {room}/\n")[2].partition("\n### ")[0]
        told = dict(re.findall(r"^\| `([\w/]+\.py)` \| (.*) \|$", section, re.MULTILINE))
        files = [file for file in sorted((ROOT / room).rglob("*.py")) if file.name != "__init__.py"]
        assert told == {str(file.relative_to(ROOT / room)): opening(file) for file in files}


def test_the_ways_name_files_and_folders_that_there_are() -> None:
    ways = PAGE.partition("## The way of a task")[2].partition("## Words")[0]
    named = re.findall(rf"`((?:{'|'.join(ROOMS)})/[\w/.]+)", ways)
    assert len(named) > 40 and [name for name in named if not (ROOT / name.rstrip(".")).exists()] == []
