"""Functions to write or to repair: generated ones, and files of HumanEval, HumanEvalFix and MBPP."""

from __future__ import annotations

import ast
import gzip
import hashlib
import json
import random
import warnings
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TESTS = 8  # of a generated problem


@dataclass(frozen=True, slots=True)
class CodeProblem:
    """What to write, and the tests that tell whether it was written."""

    id: str
    question: str
    functions: tuple[str, ...]  # functions and classes that the tests call
    solution: str
    tests: str  # hidden: source of assertions
    examples: str = ""  # visible: source of assertions
    before: str = ""  # source that the tests need, the functions' own excepted; trusted
    wrong: str = ""  # what to repair; or, for an imperfect oracle, a near miss
    repair: bool = False
    start: str = ""  # code that the question gives, which an answer may leave out or go on from


def generate(rng: random.Random, steps: int, *, heldout: bool = False) -> CodeProblem:
    """A problem about a function of a list of integers, which takes so many steps and then a last one.

    Held-out problems have orders of steps (the last included) that others never have. Half of all problems are repairs.
    The wrong code fails the first test.
    """
    while (problem := _drawn(rng, steps, heldout)) is None:  # a list sorted the wrong way has the same sum
        pass
    return problem


def _drawn(rng: random.Random, steps: int, heldout: bool) -> CodeProblem | None:
    """A problem; None where its wrong code does the same as the solution on every list."""
    while True:
        kinds = [rng.choice(list(_STEPS)) for _ in range(steps)]
        last = rng.choice(list(_LAST))
        if (zlib.crc32(" ".join([*kinds, last]).encode()) % 4 == 0) == heldout:
            break
    parts = [_STEPS[kind](rng) for kind in kinds]
    end = _LAST[last]
    lines = [f"numbers = {code}" for _, code, _ in parts] + [f"return {end[1]}"]
    near = [f"numbers = {code}" for _, _, code in parts] + [f"return {end[2]}"]
    place = rng.randrange(len(lines))
    name = rng.choice(NAMES)
    solution = _function(name, lines)
    wrong = _function(name, [*lines[:place], near[place], *lines[place + 1 :]])
    told = f"takes a list of integers, {', '.join(text for text, _, _ in parts)} and returns {end[0]}"
    repair = rng.random() < 0.5
    question = f"Write a function {name}(numbers) that {told}."
    if repair:
        question = f"{name}(numbers) {told}. Repair it:\n{wrong}"
    cases = _cases(rng, solution, wrong, name)
    if not cases:
        return None
    id = hashlib.sha256(question.encode()).hexdigest()[:12]
    return CodeProblem(
        id,
        question,
        (name,),
        solution,
        tests="\n".join(cases),
        examples=cases[0],
        wrong=wrong,
        repair=repair,
        start=_function(name, []),
    )


NAMES = "compute process convert collect measure reduce gather solve".split()


def _keeps(rng: random.Random) -> tuple[str, str, str]:
    name, rest, other = rng.choice([("even", 0, 1), ("odd", 1, 0)])
    return (
        f"keeps the {name} ones",
        f"[x for x in numbers if x % 2 == {rest}]",
        f"[x for x in numbers if x % 2 == {other}]",
    )


def _filters(rng: random.Random) -> tuple[str, str, str]:
    limit = rng.randint(1, 9)
    name, sign, other = rng.choice([("greater", ">", "<"), ("less", "<", ">")])
    code = "[x for x in numbers if x {} {}]"
    return f"keeps those {name} than {limit}", code.format(sign, limit), code.format(other, limit)


def _multiplies(rng: random.Random) -> tuple[str, str, str]:
    factor = rng.randint(2, 9)
    return f"multiplies each by {factor}", f"[x * {factor} for x in numbers]", f"[x + {factor} for x in numbers]"


def _adds(rng: random.Random) -> tuple[str, str, str]:
    more = rng.randint(2, 9)
    return f"adds {more} to each", f"[x + {more} for x in numbers]", f"[x - {more} for x in numbers]"


def _squares(rng: random.Random) -> tuple[str, str, str]:
    return "squares each", "[x * x for x in numbers]", "[x + x for x in numbers]"


def _drops(rng: random.Random) -> tuple[str, str, str]:
    count = rng.randint(1, 3)
    return f"drops the first {count}", f"numbers[{count}:]", f"numbers[:{count}]"


def _sorts(rng: random.Random) -> tuple[str, str, str]:
    return "sorts them", "sorted(numbers)", "sorted(numbers, reverse=True)"


_STEPS: dict[str, Callable[[random.Random], tuple[str, str, str]]] = {  # text, code, a near miss
    "keeps": _keeps,
    "filters": _filters,
    "multiplies": _multiplies,
    "adds": _adds,
    "squares": _squares,
    "drops": _drops,
    "sorts": _sorts,
}
_LAST = {
    "sum": ("their sum", "sum(numbers)", "max(numbers, default=0)"),
    "count": ("how many there are", "len(numbers)", "sum(numbers)"),
    "largest": ("the largest, or 0 if there is none", "max(numbers, default=0)", "min(numbers, default=0)"),
    "list": ("them", "numbers", "numbers[::-1]"),
}


def _function(name: str, lines: Sequence[str]) -> str:
    return "\n    ".join([f"def {name}(numbers):", *lines])


def _cases(rng: random.Random, solution: str, wrong: str, name: str) -> list[str]:
    """Assertions that the solution satisfies. The wrong code fails the first one. Empty where it passes them all."""
    right, other = (_loaded(code, name) for code in (solution, wrong))
    drawn = [[rng.randint(-9, 20) for _ in range(rng.randint(3, 8))] for _ in range(4 * TESTS)]
    drawn.sort(key=lambda numbers: right(list(numbers)) == other(list(numbers)))
    if right(list(drawn[0])) == other(list(drawn[0])):
        return []
    return [f"assert {name}({numbers}) == {right(list(numbers))!r}" for numbers in [*drawn[: TESTS - 1], []]]


def _loaded(code: str, name: str) -> Callable[[list[int]], Any]:
    names: dict[str, Any] = {}
    exec(code, names)
    function: Callable[[list[int]], Any] = names[name]
    return function


def read_problems(path: Path) -> list[CodeProblem]:
    """Problems of a JSON or JSONL file, which may be .gz, in the fields of HumanEval, HumanEvalFix (buggy_solution) or
    MBPP, whole or sanitized. ValueError names file, row and field."""
    opener: Any = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8-sig") as file:
        text = file.read()
    try:
        rows = json.loads(text) if text.lstrip().startswith("[") else list(map(json.loads, text.splitlines()))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: {error}") from None
    return [_problem(row, path, number) for number, row in enumerate(rows, 1)]


def _problem(row: Any, path: Path, number: int) -> CodeProblem:
    try:
        return _humaneval(row) if "entry_point" in row else _mbpp(row)
    except (AttributeError, KeyError, TypeError, SyntaxError) as error:
        raise ValueError(f"{path}, row {number}: no {error} in the fields of HumanEval, HumanEvalFix or MBPP") from None


def _humaneval(row: Any) -> CodeProblem:
    name, start, wrong = row["entry_point"], row["prompt"], row.get("buggy_solution", "")
    solution = start + row["canonical_solution"]
    tests = row["test"] if f"check({name})" in row["test"].split("\n")[-1] else f"{row['test']}\ncheck({name})"
    question = f"Repair {name}:\n{start}{wrong}" if wrong else f"Complete {name}:\n{start}"
    return CodeProblem(
        str(row["task_id"]),
        question,
        (name,),
        solution,
        tests,
        examples=row.get("example_test", ""),
        before=solution,
        wrong=start + wrong if wrong else "",
        repair=bool(wrong),
        start=start,
    )


def _mbpp(row: Any) -> CodeProblem:
    tests, solution = row["test_list"], row["code"]
    setup = "\n".join(row.get("test_imports", [])) or row.get("test_setup_code", "")
    before = f"{setup}\n{solution}"
    with warnings.catch_warnings(action="ignore"):  # about escapes, in some solutions
        nodes = ast.parse(solution).body
    defined = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    used = {node.id for test in tests for node in ast.walk(ast.parse(test)) if isinstance(node, ast.Name)}
    functions = tuple(sorted(defined & used))
    if not functions:
        raise KeyError("function that the tests call")
    question = f"{row.get('prompt', row.get('text'))}\nFor example: {tests[0]}"
    return CodeProblem(
        str(row["task_id"]), question, functions, solution, "\n".join(tests), tests[0], before, start=setup
    )
