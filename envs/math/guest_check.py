"""Compares two formulas, exactly, after math-verify has read them. Sent into a sandbox as text."""

import logging
from typing import Any

import sympy
from math_verify import LatexExtractionConfig, grader, parse, verify

DIGITS = 2000  # of two numbers that are computed because no rule of algebra tells them apart
FLOAT = 14  # digits that a decimal shares with the number it stands for, where no decimal is that number
MAX_SIZE = 100_000  # of an exponent, and of the argument of a factorial

solve = grader.sympy_solve_and_compare
logging.disable()  # math-verify warns that it has no deadlines: here the sandbox has them


def equal(expected: str, given: str) -> bool:
    """Whether the LaTeX texts mean the same. Each is read as a whole: no number is picked out of it."""
    config = [LatexExtractionConfig(boxed_match_priority=-1)]
    sides = [parse(f"${text}$", config, "no_fallback", parsing_timeout=None) for text in (expected, given)]
    if any(_is_huge(part) for side in sides for part in side):
        return False
    return bool(verify(*([_with_one_i(part) for part in side] for side in sides), timeout_seconds=None))


def _is_huge(side: Any) -> bool:
    """Whether an exponent or the argument of a factorial is beyond computing. Inner parts are looked at first."""
    for part in sympy.postorder_traversal(side):
        if isinstance(part, sympy.Pow | sympy.factorial):
            size = part.args[-1]
            if size.is_number and not abs(sympy.re(size.evalf(5))) < MAX_SIZE and size.is_finite:
                return True
    return False


def _with_one_i(side: Any) -> Any:
    """The formula with `i` as the imaginary unit and real symbols; math-verify reads `5 i` like that, but not `5i`."""
    names = {symbol: symbol.name for symbol in side.free_symbols if symbol.name == "i" or not symbol.is_real}
    symbols = {symbol: sympy.I if name == "i" else sympy.Symbol(name, real=True) for symbol, name in names.items()}
    return side.subs(symbols) if symbols else side


def _same_number(a: Any, b: Any, *rounding: int) -> bool:
    """Takes the place of math-verify's comparison to 6 or 15 digits, which 1/2^98 and 1/2^99 pass."""
    a, b = a.doit(), b.doit()
    if isinstance(a, sympy.MatrixBase) or isinstance(b, sympy.MatrixBase):
        return a.shape == b.shape and all(_same_number(x, y) for x, y in zip(a.flat(), b.flat(), strict=True))
    exact = [side.replace(lambda part: part.is_Float, lambda part: sympy.Rational(str(part))) for side in (a, b)]
    difference = sympy.expand(exact[0] - exact[1])
    if difference.is_Rational or not difference.is_number:
        return bool(difference == 0)
    digits = FLOAT if a.has(sympy.Float) or b.has(sympy.Float) else DIGITS
    values = [side.evalf(digits + 20) for side in exact]
    return bool(abs(values[0] - values[1]) < sympy.Float(10) ** -digits * abs(values[0]))


def _same_solutions(gold: Any, pred: Any, *rounding: int) -> bool:
    """Whether two equations have the same solutions. Two equations without a solution are not the same."""
    return bool(sympy.solve(gold, gold.free_symbols)) and solve(gold, pred, *rounding)


grader.sympy_numeric_eq = _same_number
grader.sympy_solve_and_compare = _same_solutions
