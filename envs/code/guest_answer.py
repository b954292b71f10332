"""Finds the program in an answer. Sent into a sandbox as text, so it imports the standard library alone.

What counts is the first of these:

1. the whole answer, where it is a program that defines a function that the tests call;
2. the last fenced block that is such a program, after the imports, functions and classes of the blocks before it;
3. a program between lines of words: it begins at the first line that looks like an import or a definition;
4. the rest of the function that the question begins, indented or not: the last fenced block that fits, or the answer.

Where nothing fits, it is the answer as it stands.
"""

import ast
import itertools
import re
import symtable
import textwrap
import warnings
from collections.abc import Iterator

FENCE = re.compile(r"(?P<margin>[ \t]*).*?(?P<marks>`{3,}|~{3,})[^`]*")  # words may stand before the marks
BEGINS = re.compile(r"@\w|import \w|from [\w.]+ import |class \w|(async )?def \w")
CLOSING_WORDS = 50  # lines that may follow a program outside of fences
# What is kept of the blocks before the program.
KEPT = ast.Import | ast.ImportFrom | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def programs(answer: str, functions: "list[str]", start: str) -> "list[str]":
    """Sources to run one after the other: what the question gives, what other blocks define, the program itself.

    `start` is the code that the question gives; what stands there before the functions belongs to the answer too.
    """
    text = answer.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    blocks = fenced(text)
    preamble = before_functions(start, functions)
    if not text.lstrip().startswith(("```", "~~~")) and defines(whole := textwrap.dedent(text), functions):
        return [preamble, whole]  # `~~~python` alone is Python
    for number in reversed(range(len(blocks))):
        if defines(blocks[number], functions):
            return [preamble, *map(definitions, blocks[:number]), blocks[number]]
    rest = (code for body in bodies(text, blocks) for code in completed(start, body))
    for code in itertools.chain(unquoted(text), rest):
        if defines(code, functions):
            return [preamble, code]
    return [preamble, text]


def fenced(text: str) -> "list[str]":
    """What the fences hold, without common indentation. A fence that does not close holds all to the end."""
    blocks: list[str] = []
    lines: list[str] = []
    fence: re.Match[str] | None = None
    for line in text.split("\n"):
        if fence is None:
            fence, lines = FENCE.fullmatch(line), []
        elif closes(line, fence):
            blocks.append("\n".join(lines))
            fence = None
        else:
            lines.append(line)
    if fence is not None:
        blocks.append("\n".join(lines).rstrip().removesuffix(fence["marks"]))
    return [textwrap.dedent(block) for block in blocks]


def closes(line: str, fence: "re.Match[str]") -> bool:
    """Whether the line closes the block. A fence in a docstring is indented deeper and does not."""
    marks = line.strip()
    near = len(line) - len(line.lstrip()) <= len(fence["margin"]) + 3
    return near and len(marks) >= len(fence["marks"]) and set(marks) == {fence["marks"][0]}


def unquoted(text: str) -> "Iterator[str]":
    """Stretches of lines from the first that begins a program, the longest first."""
    lines = text.split("\n")
    first = next((number for number, line in enumerate(lines) if BEGINS.match(line)), len(lines))
    for end in range(len(lines), max(first, len(lines) - CLOSING_WORDS), -1):
        yield "\n".join(lines[first:end])


def bodies(text: str, blocks: "list[str]") -> "Iterator[str]":
    yield from reversed(blocks)
    yield text
    yield re.split(r"(?m)^[ \t]*(?:```|~~~)", text)[0]  # before a fence that was never opened


def completed(start: str, body: str) -> "Iterator[str]":
    """The start of a function with its rest: as it stands, indented as a whole, or in its first line alone."""
    last = start.rstrip().rpartition("\n")[2]
    margin = last[: len(last) - len(last.lstrip())] or "    "
    for rest in (body, textwrap.indent(textwrap.dedent(body), margin), margin + body.lstrip()):
        yield f"{start.rstrip()}\n{rest}"


def before_functions(start: str, functions: "list[str]") -> str:
    """The imports and helpers of the start."""
    names = "|".join(map(re.escape, functions))
    place = re.search(rf"^(@.*\n)*(async )?def +({names})\b", start, re.MULTILINE)
    return start[: place.start()] if place else start


def definitions(code: str) -> str:
    """The imports, functions and classes of a block; empty where the block is no program."""
    tree = parsed(code)
    kept: list[ast.stmt] = [node for node in tree.body if isinstance(node, KEPT)] if tree else []
    return ast.unparse(ast.Module(kept, []))


def defines(code: str, functions: "list[str]") -> bool:
    """Whether the code is a program that defines one of the functions."""
    if parsed(code) is None:
        return False
    names = symtable.symtable(code, "answer", "exec").get_symbols()
    return any(name.get_name() in functions and (name.is_assigned() or name.is_imported()) for name in names)


def parsed(code: str) -> "ast.Module | None":
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escapes
            compile(code, "answer", "exec", dont_inherit=True)  # which refuses a `return` outside of a function
            return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
