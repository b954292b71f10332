"""The terminal: one console, texts printed as they stand, and what a command was given wrongly."""

from __future__ import annotations

import os
import unicodedata
from typing import Annotated

import typer
from rich.console import Console

UsageError: type[Exception] = typer.BadParameter.__bases__[0]  # which typer does not export
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object a line.")]
console = Console()
if not console.is_terminal and "COLUMNS" not in os.environ:
    console.width = 400  # names stand whole in a file or a pipe


def say(text: str) -> None:
    """Prints a text without markup or wrapping; control characters, which could move the cursor, as escapes."""
    console.print("".join(map(_visible, text)), markup=False, emoji=False, highlight=False, soft_wrap=True)


def _visible(character: str) -> str:
    if character in "\n\t" or not unicodedata.category(character).startswith("C"):
        return character
    return character.encode("unicode_escape").decode()


def told(error: Exception) -> str:
    """An error in words: the system's without its number, others with their kind."""
    if not isinstance(error, OSError):
        return f"{type(error).__name__}: {error}"
    if error.strerror is None:
        return str(error)
    return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
