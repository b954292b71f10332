"""Ways in which agents write code, and empty answers."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable

from treegym.envs.code.problems import CodeProblem

Dress = Callable[[CodeProblem], str]


def fenced(code: str, info: str = "python") -> str:
    return f"```{info}\n{code}\n```"


def drafted(problem: CodeProblem) -> str:
    name = problem.functions[0]
    draft = "\n".join(f"def {name}(*arguments):\n    return 'a draft'" for name in problem.functions)
    blocks = [fenced(draft), fenced(problem.solution), fenced(f"print({name})"), fenced("5", "")]
    return "First a draft.\n{}\nBetter:\n{}\nTry it:\n{}\nwhich prints\n{}\n".format(*blocks)


def unimported(problem: CodeProblem) -> str:
    place = re.search(rf"^def {problem.functions[0]}\b", problem.solution, re.MULTILINE)
    assert place
    return problem.solution[place.start() :]


def rest(problem: CodeProblem) -> str:
    assert problem.solution.startswith(problem.start)
    return problem.solution[len(problem.start) :]


DRESSES: dict[str, Dress] = {
    "words around a fence": lambda p: f"Here it is:\n\n{fenced(p.solution)}\n\nIt loops over `x`.",
    "blanks in the info string": lambda p: f"``` python \n{p.solution}\n``` ",
    "tildes": lambda p: f"~~~python\n{p.solution}\n~~~",
    "a byte order mark and CRLF": lambda p: "\ufeff" + fenced(p.solution).replace("\r\n", "\n").replace("\n", "\r\n"),
    "a draft, then the code, then its use": drafted,
}
RARE: dict[str, Dress] = {
    "a fence that does not close": lambda p: f"Sure.\n```py\n{p.solution}",
    "tildes that do not close": lambda p: f"~~~python\n{p.solution}",
    "a fence that only closes": lambda p: f"{p.solution}\n```\nThat is all.",
    "a fence at the end of a line": lambda p: f"The code: ```python\n{p.solution}\n```",
    "a fence longer than those inside": lambda p: f'````\n{p.solution}\nNOTE = """\n```\n"""\n````',
    "words and no fence": lambda p: f"Sure, here is the code:\n\n{p.solution}\n\nHope that helps!",
    "in a list": lambda p: "1. The code:\n\n" + textwrap.indent(fenced(p.solution), "   ") + "\n\n2. Done",
    "bare": lambda p: p.solution,
}
CONTINUED: dict[str, Dress] = {  # where the question begins the function
    "the body alone": rest,
    "the body alone, not indented": lambda p: textwrap.dedent(rest(p)).strip(),
    "the body alone, its first line not indented": lambda p: rest(p).strip(),
    "the body alone, fenced": lambda p: f"The rest:\n\n{fenced(textwrap.dedent(rest(p)))}\n",
    "the question's own imports left out": unimported,
}


def dresses(problem: CodeProblem) -> dict[str, Dress]:
    return DRESSES | (CONTINUED if f"def {problem.functions[0]}" in problem.start else {})


EMPTY: dict[str, Dress] = {
    "pass": lambda p: "pass",
    "functions that return None": lambda p: fenced("\n".join(f"def {n}(*a): return None" for n in p.functions)),
    "what the question gives": lambda p: p.start,
}
