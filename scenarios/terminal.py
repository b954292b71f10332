"""The terminal: one console, and texts printed as they stand."""

from __future__ import annotations

import unicodedata

from rich.console import Console

console = Console()


def say(text: str) -> None:
    """Prints a text without markup or wrapping; control characters, which could move the cursor, as escapes."""
    console.print("".join(map(_visible, text)), markup=False, emoji=False, highlight=False, soft_wrap=True)


def _visible(character: str) -> str:
    if character in "\n\t" or not unicodedata.category(character).startswith("C"):
        return character
    return character.encode("unicode_escape").decode()
