"""Every reference answer of the mathematics files in eight dresses, and against all others of its file; the figures are
written to docs/results/answers.md.

    python benchmarks/answers.py FOLDER [--sample N]

FOLDER holds files in the fields of GSM8K, SVAMP, MATH or AIME. A dress must change nothing, and two different answers
must be equal only if they are: the pairs that are equal are listed, to be looked at. Half an hour on a busy core.
"""

from __future__ import annotations

import argparse
import itertools
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from treegym.envs.math.answers import plain_value, same_answer, undressed
from treegym.envs.math.problems import read_problems
from treegym.tools.search.index import progress

RESULTS = Path(__file__).parent.parent / "docs" / "results" / "answers.md"


def with_words(answer: str) -> str:
    """A plain number counted in dollars, or with a thousands separator; anything else ends a sentence."""
    value = plain_value(undressed(answer))
    if value is None:
        return f"{answer}."
    if value.number.denominator == 1 and abs(value.number) >= 1000:
        return f"{value.number.numerator:,}"
    return answer if value.units or "_" in answer else f"{answer} dollars"


def otherwise(answer: str) -> str:
    """A plain number as another fraction, in LaTeX; of anything else the notation changed where that is easy."""
    value = plain_value(undressed(answer))
    if value is not None:
        above, below = 2 * value.number.numerator, 2 * value.number.denominator
        return rf"{'-' * (above < 0)}\dfrac{{{abs(above)}}}{{{below}}}"
    for text, python in PYTHON.items():
        answer = answer.replace(text, python)
    return answer


PYTHON = {r"\left": "", r"\right": "", r"\frac": r"\dfrac", "^5 ": "^{5} ", "-": "−", r"\infty": "∞", r"\pi": "π"}  # noqa: RUF001
DRESSES: dict[str, Callable[[str], str]] = {
    "as it is": lambda answer: answer,
    r"\boxed{18}": lambda answer: rf"\boxed{{{answer}}}",
    "$18$": lambda answer: f"${answer}$",
    r"\(18\)": lambda answer: rf"\({answer}\)",
    "**18**": lambda answer: f"**{answer}**",
    "The answer is 18.": lambda answer: f"The answer is {answer}.",
    "18 dollars; 1,234; a full stop": with_words,
    r"\dfrac{36}{2}; signs in Unicode": otherwise,
}


@dataclass
class Count:
    """Of a file."""

    answers: list[str]  # that differ as texts
    dressed: int = 0
    refused: list[tuple[str, str]] = field(default_factory=list)  # answer, dress
    pairs: int = 0  # both ways round
    equal: list[tuple[str, str]] = field(default_factory=list)


def measure(answers: list[str]) -> Count:
    """Each answer in all dresses, and all pairs, with a bar on a terminal."""
    count = Count(answers)
    for answer, (name, dress) in progress(list(itertools.product(answers, DRESSES.items())), "Dresses", True):
        count.dressed += 1
        if not same_answer(dress(answer), answer):
            count.refused.append((answer, name))
    for one, two in progress(list(itertools.permutations(answers, 2)), "Pairs", True):
        count.pairs += 1
        if same_answer(one, two):
            count.equal.append((one, two))
    return count


def drawn(file: Path, size: int | None) -> list[str]:
    """The file's different answers, or as many of them."""
    answers = list(dict.fromkeys(problem.answer for problem in read_problems(file)))
    return answers if size is None else random.Random(0).sample(answers, min(size, len(answers)))


def report(counts: dict[str, Count]) -> Iterator[str]:
    yield "# Reference answers, compared"
    yield ""
    yield "Made by `python benchmarks/answers.py FOLDER`. Dresses: " + ", ".join(f"`{name}`" for name in DRESSES) + "."
    yield ""
    yield "| file | different answers | in a dress | of them refused | pairs, both ways | of them equal |"
    yield "|---|---|---|---|---|---|"
    for name, count in counts.items():
        figures = len(count.answers), count.dressed, len(count.refused), count.pairs, len(count.equal)
        yield f"| {name} | " + " | ".join(map(str, figures)) + " |"
    for name, count in counts.items():
        yield from (f"\n{name}: refused is `{answer}` as `{dress}`" for answer, dress in count.refused)
    yield "\nPairs that are equal, as given and expected:\n"
    for name, count in counts.items():
        yield from (f"- {name}: `{one}` and `{two}`" for one, two in count.equal)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sample", type=int, help="answers of each file")
    chosen = parser.parse_args()
    counts = {}
    for file in sorted(chosen.folder.glob("*.json*")):
        start = time.monotonic()
        counts[file.name] = measure(drawn(file, chosen.sample))
        print(f"{file.name}: {time.monotonic() - start:.0f} s", flush=True)
    text = "\n".join(report(counts))
    print(text)
    if chosen.sample is None:
        RESULTS.write_text(text + "\n")


if __name__ == "__main__":
    main()
