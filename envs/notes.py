"""Notes: what earlier attempts have taught, and the words in which an agent is told it."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass

MAX_TEXT, MAX_WHEN = 400, 200  # characters
_UNSEEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})  # Unicode's controls, formats, surrogates and ends of lines
_JOINERS = "\u200c\u200d"  # formats that words of some scripts need


@dataclass(frozen=True, slots=True)
class Note:
    """Something that earlier attempts have taught, as an agent is told it. ValueError for what does not fit a line."""

    text: str  # at most MAX_TEXT characters
    when: str = ""  # a phrase: the note is told where the environment has said it; empty: in the prompt
    id: str = ""  # of the lesson that the note comes from

    def __post_init__(self) -> None:
        for name in ("text", "when", "id"):
            if not isinstance(value := getattr(self, name), str):
                raise ValueError(f"a note's {name} is {value!r:.80}: write a text")
        if not self.text.strip():
            raise ValueError("a note's text is empty: write what the agent is to be told")
        for name, most in (("text", MAX_TEXT), ("when", MAX_WHEN)):
            if refusal := why_not_a_line(getattr(self, name), most):
                raise ValueError(f"a note's {name} {refusal}")


def why_not_a_line(text: str, most: int) -> str:
    """Why the text is no line of at most so many characters, and the way out; empty where it is one."""
    if len(text) > most:
        return f"has {len(text)} characters: shorten it to {most}"
    unseen = (c for c in text if unicodedata.category(c) in _UNSEEN and c not in _JOINERS)
    if (found := next(unseen, None)) is not None:
        return f"has the control character U+{ord(found):04X}: write one line without such"
    return ""
