"""Formulas in Python's notation as LaTeX: `7*pi`, `x**2 + 7*x + 10`, `(2, oo)`. Nothing is evaluated."""

from __future__ import annotations

import ast
import re

NAMES = {"pi": r"\pi", "E": "e", "I": "i", "oo": r"\infty", "inf": r"\infty", "infinity": r"\infty"}
NAMED = ("sin", "cos", "tan", "cot", "sec", "csc", "ln", "arcsin", "arccos", "arctan", "sinh", "cosh", "tanh", "gcd")
CALLS = {name: rf"\{name}\left({{}}\right)" for name in NAMED} | {
    "sqrt": r"\sqrt{{{}}}",
    "cbrt": r"\sqrt[3]{{{}}}",
    "exp": "e^{{{}}}",
    "log": r"\ln\left({}\right)",
    "log2": r"\log_{{2}}\left({}\right)",
    "log10": r"\log_{{10}}\left({}\right)",
    "asin": r"\arcsin\left({}\right)",
    "acos": r"\arccos\left({}\right)",
    "atan": r"\arctan\left({}\right)",
    "abs": r"\left|{}\right|",
    "factorial": r"\left({}\right)!",
    "Rational": r"\frac{{{}}}{{{}}}",
    "Fraction": r"\frac{{{}}}{{{}}}",
    "binomial": r"\binom{{{}}}{{{}}}",
    "comb": r"\binom{{{}}}{{{}}}",
    "Eq": "{} = {}",
}
SIGNS = {ast.Add: "{} + {}", ast.Sub: "{} - {}", ast.Mult: r"{} \cdot {}", ast.Div: r"\frac{{{}}}{{{}}}"}
RELATIONS = {ast.Eq: "=", ast.Lt: "<", ast.Gt: ">", ast.LtE: r"\le", ast.GtE: r"\ge", ast.NotEq: r"\ne"}
BRACKETS = {ast.Tuple: r"\left({}\right)", ast.List: "[{}]", ast.Set: r"\{{{}\}}"}


class _NotPython(ValueError):
    """The text is no formula that Python could have printed."""


def to_latex(text: str) -> str:
    """The formula as LaTeX. LaTeX comes back as it is; in another text that is not in Python's notation, only
    infinities, pi, unions, powers and products are rewritten."""
    if "\\" in text or "^" in text:
        return text
    sides = text.split("=") if re.search(r"[^=<>!]=[^=]", text) else [text]
    try:
        return " = ".join(_side(ast.parse(side.strip(), mode="eval").body) for side in sides)
    except (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError):
        text = re.sub(r"\b(?:oo|inf|infinity)\b", r"\\infty ", text, flags=re.IGNORECASE)
        text = re.sub(r"(?<![A-Za-z])pi\b", r"\\pi ", text)
        text = re.sub(r"(?<=[)\]])\s*U\s*(?=[(\[])", r" \\cup ", text)
        return re.sub(r"\*\*\s*([+-]?\w+)", r"^{\1}", text).replace("*", r" \cdot ")


def _side(node: ast.expr) -> str:
    if isinstance(node, ast.Tuple) and node.elts and node.elts[0].col_offset == node.col_offset:  # without brackets
        return ", ".join(map(_written, node.elts))
    return _written(node)


def _written(node: ast.expr) -> str:
    match node:
        case ast.Constant(value=int() | float() | complex() as value) if not isinstance(value, bool):
            return _digits(value)
        case ast.Name(id=name) if name in NAMES or len(name) == 1:
            return NAMES.get(name, name)
        case ast.Attribute(value=ast.Name(), attr=name) if name in NAMES:  # math.pi
            return NAMES[name]
        case ast.UnaryOp(op=ast.USub() | ast.UAdd() as sign, operand=inside):
            return ("-" if isinstance(sign, ast.USub) else "") + _operand(inside)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            return f"{{{_operand(left)}}}^{{{_written(right)}}}"
        case ast.BinOp(left=left, op=ast.Div(), right=right):
            return SIGNS[ast.Div].format(_written(left), _written(right))
        case ast.BinOp(left=left, op=sign, right=right) if type(sign) in SIGNS:
            return SIGNS[type(sign)].format(_operand(left), _operand(right))
        case ast.Compare(left=left, ops=ops, comparators=rest) if all(type(op) in RELATIONS for op in ops):
            signs = zip(ops, rest, strict=True)
            return " ".join([_written(left), *(f"{RELATIONS[type(op)]} {_written(side)}" for op, side in signs)])
        case ast.Tuple(elts=items) | ast.List(elts=items) | ast.Set(elts=items) if items:
            return BRACKETS[type(node)].format(", ".join(map(_written, items)))
        case ast.Call(func=function, args=arguments, keywords=[]):
            return _call(function, arguments)
    raise _NotPython


def _digits(value: complex) -> str:
    if isinstance(value, complex):
        return f"{_digits(value.imag)}i"
    written = repr(int(value) if value == int(value) and abs(value) < 1e15 else value)
    return re.sub(r"e\+?(-?)0*(\d+)", r" \\cdot 10^{\1\2}", written)


def _operand(node: ast.expr) -> str:
    """A part of a larger formula, in brackets where it is a sum, a product or has a sign."""
    written = _written(node)
    bare = isinstance(node, ast.Constant | ast.Name | ast.Call | ast.Tuple | ast.List | ast.Set)
    return written if bare else rf"\left({written}\right)"


def _call(function: ast.expr, arguments: list[ast.expr]) -> str:
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")  # math.sqrt, sqrt
    if name == "Matrix" and len(arguments) == 1 and isinstance(arguments[0], ast.List):
        rows = [row.elts if isinstance(row, ast.List) else [row] for row in arguments[0].elts]
        cells = r" \\ ".join(" & ".join(map(_written, row)) for row in rows)
        return rf"\begin{{pmatrix}} {cells} \end{{pmatrix}}"
    form = CALLS.get(name, "")
    if form.replace("{{", "").replace("}}", "").count("{}") != len(arguments) or not form:
        raise _NotPython
    return form.format(*map(_written, arguments))
