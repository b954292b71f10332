"""Whether two answers mean the same: plain values by exact arithmetic, formulas by math-verify in a sandbox.

Numbers come in many dresses: `\\boxed{1{,}234}`, "**Answer:** $18", "18 dollars", `\\frac{10}{2}`, 90°, 1½, 2e3, 50 %.
A dress changes nothing. Two values differ if both have units and the units differ; a percentage equals its number and,
beside a number without a percent sign, also its hundredth. Formulas stand in LaTeX or in Python's notation, and are
equal only if they are so exactly. A decimal that was rounded is another number, with one exception: beside a number
that no decimal is, such as 7 pi, it counts if it agrees to 14 digits, as what Python prints does.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib.util
import os
import re
import threading
import unicodedata
from dataclasses import dataclass, replace
from fractions import Fraction
from importlib import resources

from ...tools.sandbox import Execution, ForkRefused, Interpreter, Limits, SandboxError, open_sandbox
from .latex import to_latex

CHECK = Limits(seconds=60, cpu=5, memory=2 << 30)  # of a comparison by math-verify, whose input may be hostile
MAX_TEXT = 4000  # characters of an answer in its dress; a longer one is wrong
MAX_ANSWER = 200  # characters without it
MAX_UNITS = 5  # words after a number

SAID = re.compile(
    r"[*_\s]*(?:(?:so|thus|hence|therefore)\b[, ]*)?(?:(?:the|my|our)\s+)?(?:final\s+)?(?:answer|result)"
    r"(?:\s*[*:]+\s*|\s+(?:is|equals|to\b.{0,40}\bis)\b\s*|\s*=\s*)[:*\s]*|####\s*|=\s*",
    re.IGNORECASE,
)
AROUND = [("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), *((sign, sign) for sign in ("**", "__", *"*_`'\""))]
COMMAND = re.compile(r"\\(boxed|fbox|text|mbox|textbf|textrm|textit|mathrm|mathbf|operatorname)\s*\{")
SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
SIGNS = str.maketrans(dict.fromkeys("‐‑‒–—−﹣－", "-") | dict.fromkeys("÷⁄∕", "/") | {  # noqa: RUF001
    "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ",  # noqa: RUF001
    "π": r"\pi ", "∞": r"\infty ", "°": r"^\circ ", "≤": r"\le ", "≥": r"\ge ", "∪": r"\cup ",  # noqa: RUF001
    "’": "'", "“": '"', "”": '"', "\u200b": "", "\ufeff": "",  # noqa: RUF001
})  # fmt: skip
SPACES = re.compile(r"\\[,;:! ]|\\q?quad\b|~|\s+")

NUMBER = r"(?:\d{1,3}(?:,\d{3})+(?:\.\d*)?|\d+(?:\.\d*)?|\.\d+)"
VALUE = re.compile(
    rf"(?P<sign>[+-]?)\s*(?P<money>(?:[$€£¥]|(?:USD|EUR|GBP) )?)\s*(?P<inner>[+-]?)"
    rf"(?:(?P<digits>\d[0-9A-Za-z]*)_(?:(?P<base>[2-9])|\{{(?P<braced>[1-9]\d?)\}})"
    rf"|(?:(?P<whole>\d+)\s*)?\\frac\{{\s*(?P<above>[+-]?{NUMBER})\s*\}}\s*\{{\s*(?P<below>[+-]?{NUMBER})\s*\}}"
    rf"|(?P<mixed>\d+)\s+(?P<part>\d+\s*/\s*\d+)"
    rf"|(?P<plain>{NUMBER})(?:\s*/\s*(?P<under>{NUMBER})"
    rf"|[eE](?P<e>[+-]?\d{{1,3}})|\s*(?:\\times|\\cdot|x|\*)\s*10\s*(?:\^|\*\*)\s*\{{?(?P<ten>[+-]?\d{{1,3}})\}}?)?)"
    rf"(?P<unit>(?!\d).*)"
)
SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}  # powers of ten
UNITS = {
    "$": "dollar", "usd": "dollar", "buck": "dollar", "€": "euro", "eur": "euro", "£": "pound", "gbp": "pound",
    "¥": "yen", "¢": "cent", "%": "percent", "circ": "degree", "deg": "degree", "mm": "millimeter",
    "cm": "centimeter", "m": "meter", "km": "kilometer", "in": "inch", "inche": "inch", "ft": "foot", "feet": "foot",
    "yd": "yard", "mi": "mile", "mg": "milligram", "g": "gram", "kg": "kilogram", "lb": "pound", "oz": "ounce",
    "ml": "milliliter", "l": "liter", "s": "second", "sec": "second", "min": "minute", "h": "hour", "hr": "hour",
    "sq": "square", "squared": "square", "cubed": "cubic", "^2": "square", "^3": "cubic", "mph": "mile per hour",
    "percent": "percent",
}  # fmt: skip
POWERS = ("squared", "cubed")  # of the number where they follow it, otherwise of a unit
MEASURES = frozenset(UNITS.values())
NO_UNITS = frozenset(
    "or and to not but about around approximately between than plus minus times over by is are was if modulo mod "
    "sin cos tan cot sec csc log ln exp sqrt pi infty infinity oo factorial choose gcd lcm max min dozen half "
    "halve third quarter fourth fifth sixth seventh eighth ninth tenth hundredth thousandth millionth".split()
)


@dataclass(frozen=True, slots=True)
class Value:
    """A plain number and what it counts."""

    number: Fraction
    units: frozenset[str] = frozenset()  # words in the singular, "percent" among them

    def same(self, other: Value) -> bool:
        if self.units and other.units:
            return self.number == other.number and _agree(self.units, other.units)
        one, two = (side.number / 100 if "percent" in side.units else side.number for side in (self, other))
        return self.number == other.number or one == two


def _agree(one: frozenset[str], two: frozenset[str]) -> bool:
    """Whether two sets of units may mean the same: dollars and dollars per ticket do; dollars and cents, or apples and
    pears, do not."""
    return one & MEASURES == two & MEASURES and (one <= two or two <= one)


def same_answer(given: str, expected: str) -> bool:
    """Whether the answer means what was expected; see the top of this file. An answer of more than 4000 characters, or
    200 without its dress, is wrong."""
    if len(given) > MAX_TEXT:
        return False
    given, expected = undressed(given), undressed(expected)
    if not given or len(given) > MAX_ANSWER:
        return not (given or expected)
    values = plain_value(given), plain_value(expected)
    if values[0] and values[1]:
        return values[0].same(values[1])
    if _compact(given) == _compact(expected):
        return True
    if _is_name(expected):
        return _compact(given).casefold() == _compact(expected).casefold()
    if values[1] and not (re.search(r"\d|\\|pi", given) and importlib.util.find_spec("math_verify")):
        return False  # prose; a number's formula has digits or commands
    return _verified(*(to_latex(text) for text in (expected, given)))


def undressed(text: str) -> str:
    """The answer without the words and signs around it, its signs those of ASCII and LaTeX."""
    text = _plain_signs(text)
    boxes = {_braced(text, match.end()) for match in re.finditer(r"\\(?:boxed|fbox)\s*\{", text)}
    if len(boxes) == 1:  # whatever prose is around it
        text = boxes.pop()
    while (bare := _without_layer(text.strip())) != text:
        text = bare
    return text


def _without_layer(text: str) -> str:
    if said := SAID.match(text):
        return text[said.end() :]
    if text[-1:] in (".", ",", ";", "。") and not text.endswith(r"\,"):
        return text[:-1]
    if text.count("**") == 1 and text.endswith("**"):  # the end of bold text that began before the answer
        return text[:-2]
    for left, right in AROUND:
        inner = text[len(left) : -len(right)]
        if text.startswith(left) and text.endswith(right) and inner.strip() and left not in inner:
            return inner
    if (command := COMMAND.match(text)) and command.end() + len(inner := _braced(text, command.end())) + 1 == len(text):
        return inner
    return text


def _braced(text: str, start: int) -> str:
    """The text from `start`, where a brace was opened, to the brace that closes it."""
    depth = 1
    for place in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0) * (text[place - 1] != "\\")
        if not depth:
            return text[start:place]
    return text[start:]


def _plain_signs(text: str) -> str:
    text = re.sub(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+", lambda found: f"^{{{found[0].translate(SUPERSCRIPTS)}}}", text)
    text = re.sub(r"(?<=\d)(?=[¼-¾⅐-⅞])", " ", text)
    text = re.sub(r"√\s*(?:\(([^()]*)\)|(\w+))", lambda found: rf"\sqrt{{{found[1] or found[2]}}}", text)
    return unicodedata.normalize("NFKC", text.translate(SIGNS)).translate(SIGNS)


@functools.lru_cache(4096)
def plain_value(text: str) -> Value | None:
    """The value of an undressed text; None if it is no plain number."""
    match = VALUE.fullmatch(_readable(text))
    if not match or (match["sign"] and match["inner"]):
        return None
    try:
        number = _number(match)
    except (ValueError, ZeroDivisionError):
        return None
    value = _with_units(number, match["unit"], match["money"])
    return value and (replace(value, number=-value.number) if "-" in match["sign"] + match["inner"] else value)


def _readable(text: str) -> str:
    """LaTeX's spaces, sizes and upright words as plain text."""
    text = re.sub(r",\\!\s*|\{,\}", ",", text).replace(r"\$", "$").replace(r"\%", "%")
    text = re.sub(r"(?<=\d)\\,(?=\d{3}(?!\d))", "", text)
    text = re.sub(r"\\(?:left|right|displaystyle)\b", "", text)
    text = re.sub(r"\\[dtc]frac", r"\\frac", text)
    text = re.sub(r"\\frac\s*(\d)", r"\\frac{\1}", text)
    text = re.sub(r"(\\frac\{[^{}]*\})\s*(\d)", r"\1{\2}", text)
    text = re.sub(r"^([+-]?)\s*\(([^(),]*)\)$", r"\1\2", text.strip())
    text = re.sub(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degree\b|\\circ\b", " circ ", text)
    text = re.sub(r"\\(?:text|mbox|textrm|textbf|mathrm)\s*\{([^{}]*)\}", r" \1 ", text)
    return SPACES.sub(" ", text).strip()


def _number(match: re.Match[str]) -> Fraction:
    if digits := match["digits"]:
        return Fraction(int(digits, int(match["base"] or match["braced"])))
    if plain := match["plain"]:
        return (
            _fraction(plain) / _fraction(match["under"] or "1") * Fraction(10) ** int(match["e"] or match["ten"] or 0)
        )
    if mixed := match["mixed"]:
        return Fraction(mixed) + Fraction(match["part"].replace(" ", ""))
    return Fraction(match["whole"] or 0) + _fraction(match["above"]) / _fraction(match["below"])


def _fraction(digits: str) -> Fraction:
    return Fraction(digits.replace(",", ""))


def _with_units(number: Fraction, text: str, money: str) -> Value | None:
    """The number with the units that follow it; None where something else follows it."""
    glued = re.match(r"[A-Za-z]+", text)
    if glued and (len(glued[0]) == 1 or _unit(glued[0]) not in MEASURES):
        return None  # 2k and 15x are products
    words = re.findall(r"\^\{?[23]\}?|[A-Za-z]+|[^\s/{}-]", text)
    if (words and words[0].lower() in POWERS) or text.lstrip().startswith("^"):
        return None
    if words and (power := SCALES.get(words[0].lower())):
        return _with_units(number * 10**power, text.partition(words[0])[2], money)
    units = [_unit(word) for word in (*money.split(), *words)]
    if len(units) > MAX_UNITS or None in units:
        return None
    return Value(number, frozenset(filter(None, units)))


def _unit(word: str) -> str | None:
    """The word as a unit in the singular; None where it is no unit."""
    word = re.sub("[{}]", "", word.lower())
    single = word[:-1] if word.endswith("s") and len(word) > 2 else word
    known = UNITS.get(word) or UNITS.get(single)
    return known or (single if len(word) > 2 and word.isalpha() and not {word, single} & NO_UNITS else None)


def _compact(text: str) -> str:
    return re.sub(r"\s+", "", text)


def _is_name(text: str) -> bool:
    """Whether the text is words, as of a person or a choice, and no formula."""
    words = re.findall(r"[A-Za-z]+", text)
    plain = re.fullmatch(r"[A-Za-z .,'()-]+", text) is not None
    return plain and any(len(word) > 3 and word.lower() not in NO_UNITS for word in words)


@functools.lru_cache(4096)
def _verified(expected: str, given: str) -> bool:
    outcome = _checker(os.getpid()).run(f"equal({expected!r}, {given!r})")
    return outcome.text.splitlines()[-1:] == ["True"]


class _Checker:
    """An interpreter that has read math-verify, which takes seconds. Each comparison runs in a fork of it."""

    def __init__(self) -> None:
        self._ready: Interpreter | None = None
        self._lock = threading.Lock()

    def run(self, code: str) -> Execution:
        with contextlib.closing(self._fork()) as checker:
            return checker.run(code)

    def _fork(self) -> Interpreter:
        with self._lock:
            if self._ready is None:
                self._ready = _start()
            try:
                return self._ready.fork()
            except ForkRefused:  # where the sandbox cannot, or the interpreter was ended from outside
                ready, self._ready = self._ready, None
                return ready


def _start() -> Interpreter:
    checker = open_sandbox().start(CHECK, 0)
    outcome = checker.run(resources.files(__package__).joinpath("guest_check.py").read_text() + WARM_UP)
    if "ModuleNotFoundError" in outcome.text:
        checker.close()
        raise SandboxError("answers that are no numbers are compared by math-verify: pip install 'treegym[math]'")
    atexit.register(checker.close)
    return checker


WARM_UP = "\nequal('x^2 + \\\\sqrt{2}', '\\\\frac{x}{2} + 0.5')"  # what is imported at first use is there in each fork
_checker = functools.cache(lambda process: _Checker())
