"""Grades code inside sandboxes. Sent there as text, so it imports the standard library alone.

The code under test runs in one sandbox, the tests in another. Calls go over as data and so do their results: whatever
the code does to its own process, the tests see values of plain types, and the code sees arguments and no tests.
"""

import ast
import collections
import json
import os
import random
import re
import sys
from collections.abc import Callable
from typing import Any

PLAIN = (type(None), bool, str)
TYPES = {kind.__name__: kind for kind in (int, float, complex, bool, str, bytes, list, tuple, set, dict)}
SEQUENCES = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset, "deque": collections.deque}


class Made:
    """Stands for an object of a class of the code: the class's name, and the arguments from the tests."""

    def __init__(self, name: str, arguments: "tuple[Any, ...]", keywords: "dict[str, Any]") -> None:
        self.parts = name, arguments, keywords


class Unsendable(TypeError):
    """A value of a type that no test compares."""


def encode(value: Any, depth: int = 0) -> Any:
    """JSON of a value: subclasses as what they extend, numpy's numbers and arrays as Python's, iterators as lists,
    matches of regular expressions as the tuple of their groups."""
    if depth > 100:
        raise Unsendable("nested too deeply")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return {"int": hex(int.__int__(value))}
    if isinstance(value, float):
        return {"float": float.__repr__(value)}
    if isinstance(value, complex):
        return {"complex": [value.real.hex(), value.imag.hex()]}
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": bytes(value).hex()}
    if isinstance(value, dict):
        return {"dict": [[encode(k, depth + 1), encode(v, depth + 1)] for k, v in dict.items(value)]}
    for name, kind in SEQUENCES.items():
        if isinstance(value, kind):
            return {name: [encode(item, depth + 1) for item in kind.__iter__(value)]}
    if isinstance(value, Made):
        return {"made": encode(value.parts, depth + 1)}
    if isinstance(value, re.Match):
        return encode((value[0], *value.groups()), depth + 1)
    if isinstance(value, type) and value in TYPES.values():
        return {"type": value.__name__}
    if hasattr(value, "tolist"):
        return encode(value.tolist(), depth + 1)
    if isinstance(value, range) or hasattr(value, "__next__"):
        return {"list": [encode(item, depth + 1) for _, item in zip(range(100_000), value, strict=False)]}
    raise Unsendable(f"a {type(value).__name__}")


def decode(data: Any, names: "dict[str, Any] | None" = None) -> Any:
    """The value; `names` has the classes of objects that the tests make."""
    if isinstance(data, PLAIN):
        return data
    ((name, inner),) = data.items()
    if name == "int":
        return int(inner, 16)
    if name == "float":
        return float(inner)
    if name == "complex":
        return complex(*map(float.fromhex, inner))
    if name == "bytes":
        return bytes.fromhex(inner)
    if name == "type":
        return TYPES[inner]
    if name == "dict":
        return {decode(key, names): decode(value, names) for key, value in inner}
    if name == "made":
        made, arguments, keywords = decode(inner, names)
        return (names or {})[made](*arguments, **keywords)
    return SEQUENCES[name](decode(item, names) for item in inner)


# Beside the code under test


def answer(names: "dict[str, Any]", call: str) -> None:
    """Calls a function of the code. Prints what it returned, or its error's name, and nothing else."""
    name, arguments, keywords = json.loads(call)
    try:
        values = {key: decode(x, names) for key, x in keywords.items()}
        value = names[name](*[decode(x, names) for x in arguments], **values)
        reply = {"value": encode(value)}
    except Exception as error:
        reply = {"error": type(error).__name__}
    text = json.dumps(reply)
    sys.stdout.flush()
    os.ftruncate(1, 0)  # drops what the code printed
    print(text)


# Beside the tests


class Tests:
    """One run of the tests. Calls get the answers that are known by now; calls without one are noted in `wanted`.

    `hollow` are the assertions that hold for empty answers too and so do not count: place -> bits, the nth bit for the
    nth time that the assertion is reached. With `always` every call gets that answer.
    """

    def __init__(
        self, answers: "dict[str, Any]", hollow: "dict[str, int]", always: "dict[str, Any] | None" = None
    ) -> None:
        self.answers, self.hollow, self.always = answers, hollow, always
        self.reached: dict[str, int] = {}  # place of an assertion -> how often
        self.held: dict[str, int] = {}  # place of an assertion -> bits, the nth for the nth time
        self.wanted: list[str] = []
        self.whole = False  # no exception ended the run

    def function(self, name: str, model: Any) -> "Callable[..., Any]":
        """Stands in for the code's function or class of that name; `model` is the solution's."""
        if isinstance(model, type):
            return lambda *arguments, **keywords: Made(name, arguments, keywords)

        def ask(*arguments: Any, **keywords: Any) -> Any:
            answer = self.always or self.known(name, arguments, keywords)
            if answer is None:
                return None
            if "error" in answer:
                raise RuntimeError(answer["error"])
            return decode(answer["value"])

        return ask

    def known(self, name: str, arguments: "tuple[Any, ...]", keywords: "dict[str, Any]") -> "dict[str, Any] | None":
        call = json.dumps([name, [encode(x) for x in arguments], {k: encode(x) for k, x in keywords.items()}])
        if call not in self.answers and call not in self.wanted:
            self.wanted.append(call)
        return self.answers.get(call)

    def check(self, condition: "Callable[[], Any]", place: str) -> None:
        """Counts an assertion."""
        time = self.reached.get(place, 0)
        self.reached[place] = time + 1
        try:
            holds = bool(condition())
        except Exception:
            return
        self.held[place] = self.held.get(place, 0) | holds << time

    def run(self, before: str, tests: str, functions: "list[str]") -> None:
        names: dict[str, Any] = {"__name__": "tests"}
        exec(compile(before, "before", "exec"), names)
        names |= {name: self.function(name, names.get(name)) for name in functions} | {"__check__": self.check}
        tree = ast.fix_missing_locations(_Counted().visit(ast.parse(tests)))
        random.seed(0)
        try:
            exec(compile(tree, "tests", "exec"), names)
            self.whole = True
        except Exception:
            return

    def counts(self) -> "dict[str, int]":
        """How many assertions were reached and held, and the same without hollow ones."""
        counted = {place: ((1 << times) - 1) & ~self.hollow.get(place, 0) for place, times in self.reached.items()}
        return {
            "reached": sum(self.reached.values()),
            "held": sum(bits.bit_count() for bits in self.held.values()),
            "total": sum(bits.bit_count() for bits in counted.values()),
            "passed": sum((bits & counted[place]).bit_count() for place, bits in self.held.items()),
        }


class _Counted(ast.NodeTransformer):
    """Turns assertions into calls of `check`, which go on where one fails."""

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        arguments = ast.arguments(posonlyargs=[], args=[], kwonlyargs=[], kw_defaults=[], defaults=[])
        condition = ast.Lambda(args=arguments, body=node.test)
        place = ast.Constant(f"{node.lineno}:{node.col_offset}")
        call = ast.Call(func=ast.Name(id="__check__", ctx=ast.Load()), args=[condition, place], keywords=[])
        return ast.copy_location(ast.Expr(value=call), node)


def tally(before: str, tests: str, functions: "list[str]", answers: "dict[str, Any]", hollow: "dict[str, str]") -> None:
    """Prints how many assertions hold, and the calls whose answers are not known."""
    run = Tests(answers, {place: int(bits, 16) for place, bits in hollow.items()})
    run.run(before, tests, functions)
    print(json.dumps({**run.counts(), "wanted": run.wanted}))


def survey(before: str, tests: str, functions: "list[str]", always: "dict[str, Any]") -> None:
    """Prints which assertions hold where every call gets the same answer."""
    run = Tests({}, {}, always)
    run.run(before, tests, functions)
    held = {place: hex(bits) for place, bits in run.held.items() if bits}
    print(json.dumps({"held": held, "reached": run.reached, "whole": run.whole}))
