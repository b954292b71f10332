"""Answers are compared by what they mean: in whatever dress, exactly, and whatever somebody writes."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import treegym.envs.math.answers
from treegym.envs.math.answers import plain_value, same_answer, undressed
from treegym.envs.math.latex import to_latex

ROOT = Path(__file__).parent.parent
DATA = ROOT.parent / "shared" / "data" / "math"
sys.path.insert(0, str(ROOT / "benchmarks"))

pytestmark = pytest.mark.filterwarnings("ignore:the sandbox 'local'")

DRESSED = [
    r"18 18. 18.0 018 +18 1.8e1 \boxed{18} \fbox{18} $18$ $$18$$ \(18\) \[18\] \[\boxed{18}\] **18** `18` (18)",
    r"#### 18|= 18|x = 18|Answer: 18|**Answer:** 18|**Answer**: $18$|The answer is 18.|\text{18}|\left(18\right)",
    r"Therefore, the answer is **18**.|The final answer is: \boxed{18}. I hope it is correct.|The answer to it is 18",
    r"We add 9 and 9. So \boxed{18} apples.|18 dollars|$18|\$18|$18.00|18 USD|USD 18|18€|18 apples|18 miles per hour",
    r"$18$ apples|18\text{ cm}|18 cm^2|18%|18 \%|\frac{36}{2}|\dfrac{36}{2}|36/2|17 \frac{2}{2}|18^\circ|18°",
    r"18 degrees|１８|2*9|sqrt(324)|20 - 2|\sqrt{324}",  # noqa: RUF001
]


@pytest.mark.parametrize("dressed", [one for line in DRESSED for one in line.split("|" if "|" in line else " ")])
def test_a_dress_changes_no_number(dressed: str) -> None:
    assert same_answer(dressed, "18")
    assert not same_answer(dressed, "19")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (".5", "0.5"),
        ("-.5", "-0.5"),
        ("$.50", ".50"),
        ("$1,234.50", "1234.5"),
        ("1,080", "1080"),
        ("1{,}234", "1234"),
        (r"1\,234", "1234"),
        (r"11,\! 111,\! 111,\! 100", "11111111100"),
        ("−18", "-18"),  # noqa: RUF001
        ("- 18", "-18"),
        ("-(1/2)", "-0.5"),
        (r"\frac{-1}{2}", r"-\frac12"),
        ("1½", r"1\frac{1}{2}"),
        ("1 3/4", "1.75"),
        (r"\frac9{19}", "9/19"),
        ("50%", "50"),
        ("50 percent", "0.5"),
        ("3 million dollars", r"\$3,\!000,\!000"),
        (r"1.89 \times 10^1", r"\$18.90"),
        ("1.89*10**1", "18.9"),
        ("5.4", r"5.4 \text{ cents}"),
        ("5.4 cents", r"5.4 \text{ cents}"),
        ("15cm²", r"15\mbox{ cm}^2"),
        ("15 square centimeters", r"15\mbox{ cm}^2"),
        ("18.90 dollars per ticket", r"\$18.90"),
        ("2516_{8}", "2516_8"),
        ("evelyn.", r"\text{Evelyn}"),
        ("A", r"\text{(A)}"),
        ("7*pi", r"7\pi"),
        ("math.pi*7", r"7\pi"),
        ("7 pi", r"7\pi"),
        ("21.991148575128552", r"7\pi"),
        ("x**2 + 7*x + 10", "x^2+7x+10"),
        ("(x+2)*(x+5)", "x^2 + 7x + 10"),
        ("x²", "x^2"),
        ("y = 2*x + 3", "y = 2x + 3"),
        ("5", "x=5"),
        ("11√2", r"11\sqrt2"),
        ("3**(1/2)/3", r"\frac{\sqrt{3}}{3}"),
        ("cot(x)", r"\cot x"),
        ("6 - 5*I", "6-5i"),
        ("6-5j", "6 - 5i"),
        ("-2**2", "-4"),
        ("2**3**2", "512"),
        ("(2, oo)", r"(2,\infty)"),
        ("(-inf, 2) U (3, inf)", r"(-\infty, 2) \cup (3, \infty)"),
        ("4, 3", "3,4"),
        ("Matrix([[-7], [16], [5]])", r"\begin{pmatrix} -7 \\ 16 \\ 5 \end{pmatrix}"),
        (r"\frac{\pi}{2}", r"\pi/2"),
        (r"(3, \frac{\pi}{2})", r"\left( 3, \frac{\pi}{2} \right)"),
        (r"\sqrt{5+2\sqrt6}", r"\sqrt2+\sqrt3"),
    ],
)
def test_what_means_the_same_is_the_same(given: str, expected: str) -> None:
    assert same_answer(given, expected)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (".5", "5"),
        ("$.50", "50"),
        ("7", "72"),
        ("", "72"),
        ("about 72", "72"),
        ("72 or 73", "72"),
        ("72-73", "72"),
        (r"\boxed{71} or \boxed{72}", "72"),
        ("72 million", "72"),
        ("72!", "72"),
        ("72k", "72"),
        ("72^2", "72"),
        ("72²", "72"),
        ("72^{3}", "72"),
        ("72 squared", "72"),
        ("72 hundredths", "72"),
        ("72 dozen", "72"),
        ("72 times 2", "72"),
        ("-72", "72"),
        ("12,34", "1234"),
        ("(1,234)", "1234"),
        ("1e99", "72"),
        ("1/0", "72"),
        (r"\frac{1}{0}", "72"),
        ("0.333333", "1/3"),
        ("72.0000001", "72"),
        ("5000%", "50%"),
        ("0.5%", "50"),
        ("5.4 dollars", r"5.4 \text{ cents}"),
        ("36 cents", r"\$36"),
        ("15 cm", r"15\mbox{ cm}^2"),
        ("2k", "2"),
        ("2516", "2516_8"),
        ("nylevE", r"\text{Evelyn}"),
        ("1+1/e^{100}", "1-1/e^{100}"),
        ("1+1/e", "1-1/e"),
        ("1/2006!", "1/2004!"),
        ("1/2^98", "1/2^99"),
        ("1/2**98", "1/2^{99}"),
        (r"x+\frac{1}{2^{98}}y", r"x+\frac{1}{2^{99}}y"),
        ("(1, 1/2^{98})", "(1, 1/2^{99})"),
        (r"\sqrt{1+e^{-300}}", "1"),
        ("10^{-30}", "0"),
        ("0.577350", r"\frac{\sqrt{3}}{3}"),
        ("3.141593", r"\pi"),
        ("x^2=-1", "x^2=-2"),
        ("(3,4)", "(3,4]"),
        ("(4,3)", "(3,4)"),
        ("y=5", "x=5"),
        (r"\frac{\pi}{3}", r"\pi/2"),
    ],
)
def test_what_differs_is_not_the_same(given: str, expected: str) -> None:
    assert not same_answer(given, expected)


@pytest.mark.parametrize("expected", ["72", r"\pi/2"])
@pytest.mark.parametrize(
    "given",
    [
        "9**9**9**9",
        "10**10**10!",
        "10^{10^{10}}!",
        "factorial(factorial(20))",
        "1e999",
        "9" * 500,
        "9" * 3_000_000,
        "(" * 90 + "1" + ")" * 90,
        "-" * 190 + "1",
        r"\frac{" * 30 + "1",
        r"\boxed{" * 500 + "1",
        "\ud800",
        "1\x00",
        "__import__('os').system('true')",
        "$'); print(True); ('$",
    ],
    ids=lambda text: text[:12].encode("ascii", "replace").decode().replace("\x00", "0"),
)
def test_hostile_answers_are_wrong_and_end(given: str, expected: str) -> None:
    assert not same_answer(given, expected)


@given(st.text() | st.text(alphabet="0123456789.,+-*/()[]{}$\\^_ =<>xeijpiqrtonfcsal\"'%!|"))
def test_any_text_is_read(text: str) -> None:
    plain_value(undressed(text))
    to_latex(text)


def test_numbers_are_compared_where_math_verify_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    treegym.envs.math.answers._verified.cache_clear()
    assert same_answer(r"\boxed{18}", "18")
    assert not same_answer("2*9 apples", "18")


@pytest.mark.skipif(not DATA.exists(), reason=f"no {DATA}")
@pytest.mark.parametrize("name", ["gsm8k_train.jsonl.gz", "svamp.json.gz", "math500.jsonl", "aime2024.jsonl"])
def test_reference_answers_equal_themselves_in_every_dress_and_no_other(name: str) -> None:
    from answers import drawn, measure

    count = measure(drawn(DATA / name, 8))
    assert not count.refused
    assert not [pair for pair in count.equal if len(set(map(plain_value, pair))) > 1]
