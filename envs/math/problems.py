"""Word problems with exact answers: generated ones, and files of GSM8K, SVAMP, MATH and AIME."""

from __future__ import annotations

import hashlib
import json
import random
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..formats.lines import lines_of

NAMES = "Ada Ben Cleo Dan Eva Finn Gina Hugo Iris Jack Kira Leo Mona Noah Olga Paul Rosa Sam Tina Will".split()
THINGS = """
    apples beads books buttons cards coins cups eggs keys marbles pens pins plates rings ropes shells stamps tiles
""".split()


@dataclass(frozen=True, slots=True)
class MathProblem:
    """A question with its answer; where the steps are known, Python that takes them one by one."""

    id: str
    question: str
    answer: str
    steps: tuple[str, ...] = ()  # each sets x; for an oracle
    wrong: tuple[str, ...] = ()  # the same with one step misread


def generate(rng: random.Random, steps: int, *, heldout: bool = False) -> MathProblem:
    """A story of that many steps after its first number. Held-out stories have names, things and orders of steps that
    others never have; a single step has no order."""
    name, thing = (rng.choice(words[-5:] if heldout else words[:-5]) for words in (NAMES, THINGS))
    while True:
        kinds = [rng.choice(list(_STEPS)) for _ in range(steps)]
        if steps == 1 or (zlib.crc32(" ".join(kinds).encode()) % 4 == 0) == heldout:
            break
    value = rng.randint(120, 999)
    story, code = [f"{name} has {value} {thing}."], [f"x = {value}"]
    for kind in kinds:
        text, step, value = _STEPS[kind](rng, value, name, thing)
        story.append(text)
        code.append(step)
    question = f"{' '.join(story)} How many {thing} does {name} have now?"
    places = rng.sample(range(1, len(code)), steps)
    readings = ([*code[:i], _misread(code[i]), *code[i + 1 :]] for i in places)
    wrong = next((reading for reading in readings if _x(reading) != value), [])  # some mistakes change nothing
    id = hashlib.sha256(question.encode()).hexdigest()[:12]
    return MathProblem(id, question, str(value), tuple(code), tuple(wrong))


def _buys(rng: random.Random, value: int, name: str, thing: str) -> tuple[str, str, int]:
    boxes, each = rng.randint(3, 29), rng.randint(4, 36)
    return f"{name} buys {boxes} boxes of {each} {thing}.", f"x = x + {boxes} * {each}", value + boxes * each


def _finds(rng: random.Random, value: int, name: str, thing: str) -> tuple[str, str, int]:
    more = rng.randint(17, 488)
    return f"{name} finds {more} more.", f"x = x + {more}", value + more


def _loses(rng: random.Random, value: int, name: str, thing: str) -> tuple[str, str, int]:
    less = rng.randint(1, max(1, value // 2))
    return f"{name} loses {less} of them.", f"x = x - {less}", value - less


def _multiplies(rng: random.Random, value: int, name: str, thing: str) -> tuple[str, str, int]:
    times = rng.randint(2, 9)
    return f"A year later {name} has {times} times as many.", f"x = x * {times}", value * times


def _shares(rng: random.Random, value: int, name: str, thing: str) -> tuple[str, str, int]:
    bags = rng.randint(2, 9)
    text = f"{name} deals them out evenly into {bags} bags and keeps one bag and what is left over."
    return text, f"x = x // {bags} + x % {bags}", value // bags + value % bags


_STEPS = {"buys": _buys, "finds": _finds, "loses": _loses, "multiplies": _multiplies, "shares": _shares}


def _x(steps: Sequence[str]) -> int:
    names: dict[str, int] = {}
    exec("\n".join(steps), names)
    return names["x"]


def _misread(step: str) -> str:
    for sign, other in ((" // ", " * "), (" - ", " + "), (" + ", " - "), (" * ", " + ")):
        if sign in step:
            return step.replace(sign, other, 1)
    return step


def read_problems(path: Path) -> list[MathProblem]:
    """Problems of a JSON or JSONL file, which may be .gz or .xz, in the fields of GSM8K (question, answer after ####),
    SVAMP (Body, Question, Answer) or MATH and AIME (problem, answer). ValueError names file, line and field."""
    problems: dict[str, MathProblem] = {}
    for place, row in _rows(path):
        problem = _problem(row, path, place)
        if problem.id in problems:
            raise ValueError(f"{path}, row {place}: the id {problem.id!r} is also that of another row; ids must differ")
        problems[problem.id] = problem
    return list(problems.values())


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    lines = [line for _, line in lines_of(path)]
    try:
        if next(filter(str.strip, lines), "").lstrip().startswith("["):
            yield from enumerate(json.loads("".join(lines)), 1)
            return
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: {error}") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: {error}") from None


def _problem(row: Any, path: Path, number: int) -> MathProblem:
    try:
        id = str(row.get("id", row.get("ID", f"{path.name}-{number}")))
        if "Body" in row:
            question, answer = f"{row['Body'].rstrip('. ')}. {row['Question']}", f"{row['Answer']:g}"
        elif "problem" in row:
            question, answer = row["problem"], str(row["answer"])
        else:
            question, answer = row["question"], row["answer"].rpartition("####")[2].strip()
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}, row {number}: no {error} in the fields of GSM8K, SVAMP, MATH or AIME") from None
    return MathProblem(id, question, answer)
