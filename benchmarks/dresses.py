"""Every canonical solution of the given files in usual dresses, and empty answers: what the tests say of them.

python benchmarks/dresses.py HumanEval.jsonl.gz humanevalfix.jsonl mbpp.jsonl.gz mbpp_sanitized.json

A table for each file: how many of its problems are solved in each dress (all should be), and how many empty answers
pass a test (none should). A quarter of an hour for 727 problems on two cores.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from treegym.envs.code.grade import can_grade, grade
from treegym.envs.code.problems import CodeProblem, read_problems

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from dresses import EMPTY, dresses

AT_ONCE = 2  # problems


def main() -> None:
    faults = sum(report(Path(file)) for file in sys.argv[1:])
    sys.exit(f"{faults} faults" if faults else 0)


def report(file: Path) -> int:
    """Prints the file's tables; the number of faults."""
    problems = read_problems(file)
    tried: dict[str, int] = defaultdict(int)
    failed: dict[str, list[str]] = defaultdict(list)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for number, found in enumerate(pool.map(lambda problem: list(outcomes(problem)), problems), 1):
            for name, fault in found:
                tried[name] += 1
                failed[name] += [fault] * bool(fault)
            if number % 20 == 0:
                print(f"{file.name}: {number} of {len(problems)} problems", file=sys.stderr, flush=True)
    print(f"\n{file.name}, {len(problems)} problems")
    for name, count in tried.items():
        print(f"  {name}: {count - len(failed[name])} of {count} as they should be", *failed[name], flush=True)
    return sum(map(len, failed.values()))


def outcomes(problem: CodeProblem) -> Iterator[tuple[str, str]]:
    """What was tried, and where it is not as it should be the problem's id."""
    gradable = can_grade(problem)
    yield "can be graded", "" if gradable else problem.id
    if gradable:
        for name, dress in dresses(problem).items():
            yield name, "" if grade(problem, dress(problem)).solved else problem.id
        for name, dress in EMPTY.items():
            yield f"empty: {name}", problem.id if grade(problem, dress(problem)).passed else ""


if __name__ == "__main__":
    main()
