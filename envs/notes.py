"""Notes: what earlier attempts have taught, and the words in which an agent is told it."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from ..tools import ToolCall

MAX_TEXT, MAX_WHEN = 400, 200  # characters
HEADING = "Notes of earlier attempts; they may be wrong:"  # of the list in the prompt
MENTION = "Note of an earlier attempt; it may be wrong: "  # opens the line of a note that is told alone
ITEM = "- "

Place = Literal["turn", "prompt"]  # where notes with a phrase are told: behind what they speak of, or all in the prompt
PLACES: tuple[Place, ...] = ("turn", "prompt")
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


def read_notes(spelled: Sequence[Note | Mapping[str, str]]) -> tuple[Note, ...]:
    """The notes, each once, where some may be written as JSON has them. ValueError for other spellings."""
    if isinstance(spelled, str | Mapping) or not isinstance(spelled, Sequence):
        raise ValueError(f"notes are a list, such as [{{text: …}}], not {spelled!r:.80}")
    return tuple(dict.fromkeys(map(_read_note, spelled)))


def _read_note(spelled: Any) -> Note:
    if isinstance(spelled, Note):
        return spelled
    if not isinstance(spelled, Mapping) or not {"text"} <= spelled.keys() <= {field.name for field in fields(Note)}:
        raise ValueError(
            f"write a note as {{text: …, when: …, id: …}}, where text alone is needed, not {spelled!r:.80}"
        )
    return Note(**spelled)


def with_notes(notes: Sequence[Note], place: Place = "turn") -> tuple[str, dict[str, Any]]:
    """The entry of a task's wrappers that tells these notes, as JSON."""
    written = [{name: value for name, value in asdict(note).items() if value} for note in notes]
    return "WithNotes", {"notes": written, "place": place}


def listed(notes: Sequence[Note]) -> str:
    """What stands behind a prompt to tell these notes; empty without notes."""
    lines = (f'When you read "{note.when}": {note.text}' if note.when else note.text for note in notes)
    return "\n\n" + "\n".join([HEADING, *(ITEM + line for line in lines)]) if notes else ""


def mentioned(notes: Iterable[Note]) -> str:
    """What stands behind an observation in which the notes' phrases occur."""
    return "".join(f"\n{MENTION}{note.text}" for note in notes)


def own_text(text: str) -> str:
    """What the environment itself said, without the notes behind it."""
    lines = text.split("\n")
    while (end := _end_of_own(lines)) < len(lines):
        del lines[end:]
    return "\n".join(lines)


def _end_of_own(lines: Sequence[str]) -> int:
    """How many lines there are before the last notes, which are lines of MENTION or a list."""
    end = len(lines)
    while end > 1 and lines[end - 1].startswith(MENTION):
        end -= 1
    if end < len(lines):
        return end
    first = end
    while first > 1 and lines[first - 1].startswith(ITEM):
        first -= 1
    return first - 2 if 3 <= first < end and [*lines[first - 2 : first]] == ["", HEADING] else end


def advice(calls: Sequence[ToolCall]) -> str:
    """These calls as the text of a note: `choose red`, or with several arguments `move(from="a", to="b")`. Empty where
    there is none, or no line could hold them."""
    text = ", then ".join(map(_in_words, calls))
    return "" if why_not_a_line(text, MAX_TEXT) else text


def _in_words(call: ToolCall) -> str:
    match list(call.arguments.values()):
        case []:
            return call.name
        case [str(value)]:
            return f"{call.name} {value}"
    told = ", ".join(f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in call.arguments.items())
    return f"{call.name}({told})"
