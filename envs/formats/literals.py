"""Values as models write them in calls: Python's and JSON's literals, and texts between quotes of a model's own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from .actions import MAX_DEPTH, Malformed, after_blanks, finite, once, write_json

WORDS: Mapping[str, Any] = {"true": True, "false": False, "null": None, "True": True, "False": False, "None": None}
QUOTES = ('<|"|>', "<escape>", '"""', "'''", '"', "'")  # a quote that another one begins with comes after it
VERBATIM = frozenset({'<|"|>', "<escape>"})  # nothing is escaped between them
STRINGS = {  # what follows the opening quote
    **{quote: re.compile(rf"((?:[^\\{quote}]|\\.)*+){quote}", re.DOTALL) for quote in "\"'"},
    **{
        quote * 3: re.compile(rf"((?:[^\\{quote}]|\\.|{quote}(?!{quote}{quote}))*+){quote * 3}", re.DOTALL)
        for quote in "\"'"
    },
}
NUMBER = re.compile(r"[+-]?+(\d++)?(\.\d*+)?([eE][+-]?+\d++)?")
WORD = re.compile(r"[^\W\d]\w*+")
KEY = re.compile(r"([\w./-]++)\s*+:")
BARE = re.compile(r"[^,:{}\[\]()\"'<>=]++")
ESCAPE = re.compile(r"\\(x[\da-fA-F]{2}|u[\da-fA-F]{4}|U[\da-fA-F]{8}|[0-7]{1,3}|.)", re.DOTALL)
ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "a": "\a", "v": "\v", "\n": "", "\\": "\\"}


def read_literal(text: str, place: int, *, bare: bool = False, levels: int = MAX_DEPTH) -> tuple[Any, int]:
    """The value at the place or after blanks there, and where it ends. `bare`: a text may stand without quotes."""
    place = after_blanks(text, place)
    if levels < 0:
        raise Malformed(f"Not a value: nested deeper than {MAX_DEPTH}.")
    match text[place : place + 1]:
        case "[":
            return _read_items(text, place + 1, "]", bare, levels - 1)
        case "(":
            return _read_items(text, place + 1, ")", bare, levels - 1)
        case "{":
            return read_mapping(text, place + 1, bare=bare, levels=levels - 1)
    for quote in QUOTES:
        if text.startswith(quote, place):
            return _read_string(text, place + len(quote), quote)
    number = NUMBER.match(text, place)
    if number and (number[1] or number[2]):
        return _number(number), number.end()
    word = WORD.match(text, place)
    if word and word[0] in WORDS and not (bare and (BARE.match(text, place) or word)[0].strip() != word[0]):
        return WORDS[word[0]], word.end()
    if bare and (plain := BARE.match(text, place)):
        return plain[0].strip(), plain.end()
    raise Malformed(f"Not a value: {text[place : place + 40]!r}.")


def read_mapping(text: str, place: int, *, bare: bool = False, levels: int = MAX_DEPTH) -> tuple[dict[str, Any], int]:
    """The mapping whose opening brace ends at the place, and where it ends; its keys may stand without quotes."""
    pairs: list[tuple[str, Any]] = []
    while not text.startswith("}", place := after_blanks(text, place)):
        if word := KEY.match(text, place):
            key, place = word[1], word.end()
        else:
            key, place = read_literal(text, place, levels=levels)
            place = _past(":", text, place)
        if not isinstance(key, str):
            raise Malformed(f"A key is a text, not {str(key)[:40]}.")
        value, place = read_literal(text, place, bare=bare, levels=levels)
        pairs.append((key, value))
        place = past_comma(text, place, "}")
    return distinct(pairs), place + 1


def _read_items(text: str, place: int, closing: str, bare: bool, levels: int) -> tuple[list[Any], int]:
    items = []
    while not text.startswith(closing, place := after_blanks(text, place)):
        item, place = read_literal(text, place, bare=bare, levels=levels)
        items.append(item)
        place = past_comma(text, place, closing)
    return items, place + 1


def past_comma(text: str, place: int, closing: str) -> int:
    """The place after the comma that ends an item, or of the closing bracket, which ends the last item as well."""
    place = after_blanks(text, place)
    return place if text.startswith(closing, place) else _past(",", text, place)


def _past(mark: str, text: str, place: int) -> int:
    place = after_blanks(text, place)
    if not text.startswith(mark, place):
        raise Malformed(f"Expected {mark!r} before {text[place : place + 40]!r}.")
    return place + len(mark)


def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    try:
        return once(pairs)
    except ValueError as error:
        raise Malformed(f"{error}.") from None


def _read_string(text: str, place: int, quote: str) -> tuple[str, int]:
    if quote in VERBATIM:
        end = text.find(quote, place)
        if end >= 0:
            return text[place:end], end + len(quote)
    elif found := STRINGS[quote].match(text, place):
        return _unescape(found[1]), found.end()
    raise Malformed(f"A text that {quote} begins is not closed.")


def _unescape(text: str) -> str:
    try:
        plain = ESCAPE.sub(_escaped, text)
        return plain.encode("utf-16", "surrogatepass").decode("utf-16")  # joins pairs, as JSON writes them
    except (ValueError, OverflowError) as error:
        raise Malformed(f"Not a text: {error}.") from None


def _escaped(found: re.Match[str]) -> str:
    code = found[1]
    if code[0] in "xuU" and len(code) > 1:
        return chr(int(code[1:], 16))
    if code[0] in "01234567":
        return chr(int(code, 8))
    return code if code in "'\"" else ESCAPES.get(code, found[0])


def _number(found: re.Match[str]) -> int | float:
    try:
        return finite(found[0]) if found[2] or found[3] else int(found[0])
    except ValueError as error:
        raise Malformed(f"Not a value: {error}.") from None


def write_literal(value: Any) -> str:
    """The value as Python writes it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{write_json(key)}: {write_literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(write_literal, value)) + "]"
    return str(value) if value is None or isinstance(value, bool) else write_json(value)
