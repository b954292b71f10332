"""Code: problems are true to their tests, and no way but a right function passes them."""

from __future__ import annotations

import json
import random
import re
import time
from collections import Counter, OrderedDict, deque
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from dresses import CONTINUED, DRESSES, EMPTY, RARE, dresses
from hypothesis import given
from hypothesis import strategies as st

from treegym.envs import CodeEnv, check_env
from treegym.envs.code.grade import Verdict, grade, try_examples, untested
from treegym.envs.code.guest_answer import programs
from treegym.envs.code.guest_check import Unsendable, decode, encode
from treegym.envs.code.problems import CodeProblem, generate, read_problems
from treegym.tools.sandbox import SandboxUnavailable, open_sandbox

pytestmark = pytest.mark.filterwarnings("ignore:the sandbox 'local'")
DATA = Path(__file__).parent.parent.parent / "shared" / "data" / "code"


def skip_without(sandbox: str) -> None:
    try:
        open_sandbox(sandbox)
    except SandboxUnavailable as error:
        pytest.skip(str(error))


ADD = CodeProblem(
    "add",
    "Write add(a, b), the sum.",
    ("add",),
    "def add(a, b):\n    return a + b",
    tests="def check(candidate):\n"
    "    assert candidate(2, 3) == 5\n"
    "    for i in range(3):\n        assert candidate(i, i) == 2 * i\n"
    "    assert candidate([1], [2]) == [1, 2]\n"
    "check(add)",
    examples="assert add(1, 1) == 2",
)


def test_assertions_are_counted_one_by_one_in_loops_too() -> None:
    assert grade(ADD, ADD.solution) == Verdict(5, 5)
    assert grade(ADD, "def add(a, b):\n    return a + b if isinstance(a, list) else 5") == Verdict(2, 5)
    assert grade(ADD, "def add(a, b):\n    return a * 2") == Verdict(3, 5)
    assert try_examples(ADD, "def add(a, b):\n    return 2") == Verdict(1, 1)


def test_tests_may_call_a_function_on_its_own_answers() -> None:
    problem = CodeProblem(
        "twice", "", ("up",), "def up(x):\n    return x + 1", tests="y = up(up(3))\nassert y == 5\nassert up(y) == 6"
    )
    assert grade(problem, problem.solution) == Verdict(2, 2)
    assert grade(problem, "def up(x):\n    return x + 2") == Verdict(0, 2)


def test_objects_of_the_code_s_own_classes_are_made_beside_it() -> None:
    point = "class P:\n    def __init__(self, x, y=0): self.x, self.y = x, y\n"
    solution = f"{point}def total(ps): return sum(p.x + p.y for p in ps)"
    problem = CodeProblem(
        "total", "", ("P", "total"), solution, "assert total([P(1), P(2, y=3)]) == 6", before=solution
    )
    assert grade(problem, problem.solution).solved
    other = "class P:\n    def __init__(self, a, y=0): self.sum = a + y\ndef total(ps): return sum(p.sum for p in ps)"
    assert grade(problem, other).solved
    assert not grade(problem, "def total(ps): return 6").passed  # there is no P
    assert not grade(problem, "class P:\n    __init__ = lambda *a, **k: None\ndef total(ps): return ps").passed


def test_assertions_that_the_solution_does_not_reach_count_where_they_fail() -> None:
    tests = "for x in small():\n    assert x < 3"
    problem = CodeProblem("small", "", ("small",), "def small():\n    return [1, 2]", tests)
    assert grade(problem, problem.solution) == Verdict(2, 2)
    assert grade(problem, "def small():\n    return [1, 2, 3]") == Verdict(1, 2)
    assert grade(problem, "def small():\n    return [1, 2, 3, 4, 5]") == Verdict(0, 2)


BALANCED = CodeProblem(
    "balanced",
    "",
    ("balanced",),
    "def balanced(x):\n    return x.count('(') == x.count(')')",
    tests="assert balanced('()')\nassert not balanced('(')\nfor x in ('a', '(', 'b'):\n"
    "    assert balanced(x) == (x != '(')\nassert True\nassert balanced(')') in (False, None)",
)


@pytest.mark.parametrize("empty", ["", "pass", "return None", "def balanced(x): pass", "def balanced(x): return None"])
def test_an_empty_answer_passes_no_test(empty: str) -> None:
    assert grade(BALANCED, empty) == Verdict(0, 4)


def test_an_assertion_that_an_empty_answer_passes_earns_nothing_and_may_still_fail() -> None:
    assert grade(BALANCED, BALANCED.solution) == Verdict(4, 4)
    assert grade(BALANCED, "def balanced(x): return False") == Verdict(1, 4)
    assert grade(BALANCED, "def balanced(x): return True") == Verdict(1, 4)  # 3 hold; 2 that do not count fail
    assert not grade(BALANCED, "def balanced(x): return x in ('()', 'a', 'b') or x == ')'").solved


def test_an_assertion_in_a_loop_is_left_out_at_the_times_at_which_an_empty_answer_passes_it() -> None:
    problem = CodeProblem(
        "first",
        "",
        ("first",),
        "def first(x):\n    return x[0] if x else None",
        "for x in ([], [1], [], [2]):\n    assert first(x) == (x[0] if x else None)",
    )
    assert grade(problem, "def first(x): return x[0]") == Verdict(0, 2)  # an exception for an empty list: 2 missed
    assert grade(problem, "def first(x): return x[0] if x and x[0] < 2 else None") == Verdict(1, 2)


def test_problems_whose_tests_an_empty_answer_passes_are_told_of_and_not_drawn(tmp_path: Path) -> None:
    none = ["assert f() is None", "assert True or f()"]
    rows = [
        {"task_id": 1, "text": "one", "code": "def f(): return 1", "test_list": ["assert f() == 1"]},
        {"task_id": 2, "text": "none", "code": "def f(): return None", "test_list": none},
        {"task_id": 3, "text": "not", "code": "def f(): return 0", "test_list": ["assert not f()", "f()"]},
        {"task_id": 4, "text": "loop", "code": "def f(): return [1]", "test_list": ["for x in f():\n    assert x"]},
    ]
    file = tmp_path / "problems.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    with pytest.warns(UserWarning, match=r"problems.jsonl: 2 of 4 problems have no test .*: 2, 3$"):
        env = CodeEnv(file)
    assert {env.reset(seed=seed)[1]["problem"] for seed in range(8)} == {"1", "4"}
    with pytest.raises(ValueError, match="'2' cannot be scored"):
        env.reset(seed=0, options={"problem": "2"})


START = '''import math

def near(x):
    return x

def power(x: float, n: int = 2) -> float:
    """Raise x.

        ```
        power(2, 3)
        ```
    """
'''
POWER = CodeProblem(
    "power",
    f"Complete power:\n{START}",
    ("power",),
    f"{START}    if n:\n        return math.pow(x, n)\n    return near(1.0)\n",
    "assert power(2.0) == 4.0\nassert power(2.0, 3) == 8.0\nassert power(2.0, 0) == 1.0",
    start=START,
)


@pytest.mark.parametrize("name", [*DRESSES, *RARE, *CONTINUED])
def test_code_counts_in_any_dress(name: str) -> None:
    assert grade(POWER, (DRESSES | RARE | CONTINUED)[name](POWER)).solved


@pytest.mark.parametrize("name", EMPTY)
def test_an_empty_answer_in_any_dress_earns_nothing(name: str) -> None:
    assert grade(POWER, EMPTY[name](POWER)) == Verdict(0, 3)


def test_code_counts_in_any_dress_where_the_environment_asks_for_it() -> None:
    env = CodeEnv()
    for seed, dress in enumerate([*DRESSES.values(), *CONTINUED.values()][::2]):
        env.reset(seed=seed)
        tried, *_ = env.step(env.write_call("test", code=dress(env.problem)))
        assert tried.startswith("1 of 1 hold")
        assert env.step(env.write_answer(dress(env.problem)))[4]["reward_terms"]["solved"] == 1.0


QUOTED = "def f():\n    '''\n```\nf()\n```\n    '''"


@pytest.mark.parametrize(
    ("answer", "counts"),
    [
        ("```\ndef f(): return 1\n```\n```\ndef f(): return 2\n```", "def f(): return 2"),
        ("```\nfrom math import gcd as f\n```\n```\nassert f(2, 4) == 2\n```", "from math import gcd as f"),
        ("```\nclass f: pass\n```", "class f: pass"),
        ("```\nf = lambda: 1\n```", "f = lambda: 1"),
        ("  ```py\n  def f():\n    return 1\n  ```", "def f():\n  return 1"),
        ("    def f():\n        return 1", "def f():\n    return 1"),
        ("def f():\r    return 1", "def f():\n    return 1"),
        (QUOTED, QUOTED),
        ("no code", "no code"),
        ("from the list take one", "from the list take one"),
        ("", ""),
        ("(" * 5000, "(" * 5000),
    ],
)
def test_which_code_of_an_answer_counts(answer: str, counts: str) -> None:
    assert programs(answer, ["f"], "")[-1] == counts


def test_blocks_before_the_one_that_counts_give_their_definitions_alone() -> None:
    blocks = "f = 1 +", "import os\nprint(os)\nclass A: pass", "f = A"
    answer = "\n".join(f"```\n{block}\n```" for block in blocks)
    assert programs(answer, ["f"], "") == ["", "", "import os\n\nclass A:\n    pass", "f = A"]


def test_an_import_from_the_future_after_other_blocks_is_no_error() -> None:
    future = "from __future__ import annotations\ndef power(x: Unheard, n=2): return float(x**n)"
    assert grade(POWER, f"```\nimport os\n```\n```\n{future}\n```").solved


def test_the_calls_of_a_grading_have_a_time_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("treegym.envs.code.grade.SECONDS", 0.5)
    tests = "\n".join(f"assert same({i}) == {i}" for i in range(20))
    problem = CodeProblem("same", "", ("same",), "def same(x):\n    return x", tests)
    start = time.monotonic()
    verdict = grade(problem, "import time\ndef same(x):\n    time.sleep(0.3)\n    return x")
    assert verdict == Verdict(2, 20) and time.monotonic() - start < 4


CHEATS = {
    "exit with success": "import sys\nsys.exit(0)",
    "exit in the call": "def add(a, b):\n    import os\n    os._exit(0)",
    "exit at the end": "import atexit, os\natexit.register(os._exit, 0)\ndef add(a, b):\n    raise SystemExit(0)",
    "equal to everything": (
        "class Any:\n"
        "    __eq__ = lambda self, other: True\n"
        "    __bool__ = lambda self: True\n"
        "    __hash__ = None\n"
        "def add(a, b):\n    return Any()"
    ),
    "a list equal to everything": (
        "class Any(list):\n    __eq__ = lambda self, other: True\ndef add(a, b):\n    return Any()"
    ),
    "a number equal to everything": (
        "class Any(int):\n"
        "    __eq__ = lambda self, other: True\n"
        "    __hash__ = int.__hash__\n"
        "def add(a, b):\n    return Any(77)"
    ),
    "a type that names itself int": (
        "class Any:\n"
        "    __class__ = int\n"
        "    __eq__ = lambda self, other: True\n"
        "    __int__ = lambda self: 5\n"
        "def add(a, b):\n    return Any()"
    ),
    "read the tests off the stack": (
        "import sys\n"
        "def add(a, b):\n"
        "    frame, found = sys._getframe(), []\n"
        "    while frame:\n"
        "        found += [v for v in {**frame.f_globals, **frame.f_locals}.values()"
        " if isinstance(v, str) and 'assert' in v and '==' in v and 'candidate(2' in v]\n"
        "        frame = frame.f_back\n"
        "    return 5 if found else None"
    ),
    "read the tests off the heap": (
        "import gc\n"
        "def add(a, b):\n"
        "    for each in gc.get_objects():\n"
        "        if isinstance(each, dict) and any(isinstance(v, str) and 'candidate(2, 3)' in v"
        " for v in list(each.values())):\n"
        "            return 5\n"
        "    return None"
    ),
    "read the tests off memory": (
        "def add(a, b):\n"
        "    before = b'candidate(2, '\n"  # not all of it, which it would find in itself
        "    with open('/proc/self/maps') as maps, open('/proc/self/mem', 'rb') as memory:\n"
        "        for line in maps:\n"
        "            span, rights = line.split()[:2]\n"
        "            start, end = (int(x, 16) for x in span.split('-'))\n"
        "            if 'rw' in rights and end - start < 64 << 20:\n"
        "                memory.seek(start)\n"
        "                if any(rest.startswith(b'3) ==') for rest in memory.read(end - start).split(before)[1:]):\n"
        "                    return 5\n"
        "    return None"
    ),
    "read the tests off the disk": (
        "import os\n"
        "def add(a, b):\n"
        "    for place, _, names in os.walk('/episode'):\n"
        "        for name in names:\n"
        "            if 'candidate' in open(os.path.join(place, name), errors='replace').read():\n"
        "                return 5\n"
        "    return None"
    ),
    "look at other processes": (
        "import os\n"
        "def add(a, b):\n"
        "    for pid in filter(str.isdigit, os.listdir('/proc')):\n"
        "        for what in ('cmdline', 'environ'):\n"
        "            try:\n"
        "                if b'candidate' in open(f'/proc/{pid}/{what}', 'rb').read():\n"
        "                    return 5\n"
        "            except OSError:\n"
        "                pass\n"
        "    return None"
    ),
    "patch the encoder": (
        'import json\njson.dumps = lambda *a, **k: \'{"passed": 5, "total": 5, "wanted": []}\'\n'
        "def add(a, b):\n    return None"
    ),
    "print a verdict": (
        'def add(a, b):\n    import os\n    os.write(1, b\'{"passed": 5, "total": 5, "wanted": []}\')\n    os._exit(0)'
    ),
    "patch builtins": (
        "import builtins\nbuiltins.isinstance = lambda *a: True\nbuiltins.print = lambda *a, **k: None\n"
        "builtins.__dict__['AssertionError'] = None\n"
        "def add(a, b):\n    return None"
    ),
    "patch comparison of what comes next": (
        "import operator, ast\n"
        "ast.NodeTransformer.visit = lambda self, node: ast.parse('')\n"
        "def add(a, b):\n    return None"
    ),
    "change the arguments": "def add(a, b):\n    a.clear() if isinstance(a, list) else 0",
    "trace what runs": (
        "import sys\n"
        "def spy(frame, event, argument):\n"
        "    if event == 'return' and 'node' in frame.f_locals:\n"
        "        raise SystemExit(0)\n"
        "    return spy\n"
        "sys.settrace(spy)\n"
        "def add(a, b):\n    return None"
    ),
    "leave a thread that prints": (
        "import threading, os, time\n"
        "def shout():\n"
        "    while True:\n"
        '        os.write(1, b\'{"value": {"int": "0x5"}}\\n\')\n'
        "threading.Thread(target=shout, daemon=True).start()\n"
        "def add(a, b):\n    return None"
    ),
    "never return": "def add(a, b):\n    while True:\n        pass",
    "yield for ever": "def add(a, b):\n    while True:\n        yield 5",
    "nest for ever": "def add(a, b):\n    x = []\n    x.append(x)\n    return x",
    "answer gigabytes": "def add(a, b):\n    return 'x' * (300 << 20)",
    "be the tests": "def check(candidate):\n    pass\n__check__ = print\ndef add(a, b):\n    return None",
    "not be a function": "add = 5",
    "not be Python": "def add(a, b) return 5",
    "be empty": "",
}


AT_WALLS = [name for name in CHEATS if name.startswith(("exit", "read", "look", "leave"))]


@pytest.mark.parametrize(
    ("name", "sandbox"), [*((name, "strongest") for name in CHEATS), *((name, "docker") for name in AT_WALLS)]
)
def test_a_cheat_scores_nothing(name: str, sandbox: str) -> None:
    skip_without(sandbox)
    passed = grade(ADD, CHEATS[name], sandbox).passed
    assert passed <= (name == "leave a thread that prints")  # it is right for one test of five, all the time


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
    | st.complex_numbers(allow_nan=False),
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.lists(inner).map(deque)
        | st.sets(st.integers() | st.text())
        | st.frozensets(st.integers())
        | st.dictionaries(st.integers() | st.text() | st.tuples(st.integers()), inner)
    ),
    max_leaves=12,
)


@given(JSON)
def test_values_come_over_as_they_are(value: Any) -> None:
    again = decode(json.loads(json.dumps(encode(value))))
    assert again == value and type(again) is type(value)


def test_what_extends_a_plain_type_comes_over_as_that_type() -> None:
    values = [Counter("aab"), OrderedDict(a=1), np.int64(3), np.float64(0.5), np.array([1, 2]), range(3), iter([1, 2])]
    values += [re.match("a(b)?", "ab"), int]
    sent = [decode(json.loads(json.dumps(encode(value)))) for value in values]
    assert sent == [{"a": 2, "b": 1}, {"a": 1}, 3, 0.5, [1, 2], [0, 1, 2], [1, 2], ("ab", "b"), int]
    assert [type(x) for x in sent] == [dict, dict, int, float, list, list, list, tuple, type]
    for value in (object(), len, Path):
        with pytest.raises(Unsendable):
            encode(value)


@pytest.mark.parametrize("heldout", [False, True])
def test_generated_solutions_pass_and_their_near_misses_do_not(heldout: bool) -> None:
    for seed in range(12):
        problem = generate(random.Random(seed), 1 + seed % 3, heldout=heldout)
        assert grade(problem, problem.solution).solved
        assert not grade(problem, problem.wrong).solved
        assert (problem.wrong in problem.question) == problem.repair


def test_every_generated_mistake_changes_what_the_first_test_sees() -> None:
    for seed in range(200):
        problem = generate(random.Random(seed), 1)
        names: dict[str, Any] = {}
        exec(problem.wrong, names)
        with pytest.raises(AssertionError):
            exec(problem.examples, names)


def test_held_out_problems_have_orders_of_steps_of_their_own() -> None:
    def orders(heldout: bool) -> set[str]:
        drawn = (generate(random.Random(seed), 2, heldout=heldout).solution for seed in range(300))
        return {"".join(c for c in code.partition(":")[2] if not c.isdigit()) for code in drawn}

    assert orders(False) and orders(True) and not orders(False) & orders(True)


def play(env: CodeEnv, seed: int) -> dict[str, float]:
    env.reset(seed=seed)
    while (action := env.oracle()) is not None:
        *_, info = env.step(action)
        if info["reward_terms"]:
            terms: dict[str, float] = info["reward_terms"]
            return terms
    raise AssertionError("the oracle stopped before the end")


def test_the_oracle_is_right_and_errs_as_often_as_it_is_told_to() -> None:
    env = CodeEnv()
    assert all(play(env, seed) == {"solved": 1.0, "passed": 1.0, "format": 1.0} for seed in range(10))
    erring = CodeEnv(oracle_error=1.0)
    terms = [play(erring, seed) for seed in range(10)]
    assert not any(term["solved"] for term in terms)
    assert any(0 < term["passed"] < 1 for term in terms)  # dense: near misses earn something


def test_the_agent_reads_of_the_examples_and_never_of_the_tests() -> None:
    env = CodeEnv()
    for seed in range(5):
        said, _ = env.reset(seed=seed)
        observation, *_ = env.step(env.write_call("test", code=env.problem.wrong))
        hidden = set(env.problem.tests.splitlines()) - {env.problem.examples}
        assert hidden and env.problem.examples in observation
        assert not any(line in said + observation for line in hidden)


@pytest.mark.parametrize("sandbox", ["bubblewrap", "local"])
def test_it_keeps_every_promise_of_an_environment(sandbox: str) -> None:
    skip_without(sandbox)
    check_env(lambda: gymnasium.make("treegym/Code-v0", sandbox=sandbox, python=True).unwrapped, seeds=[0])


def test_problems_that_nothing_passes_are_not_drawn(tmp_path: Path) -> None:
    right = {"task_id": 1, "text": "one", "code": "def f(): return 1", "test_list": ["assert f() == 1"]}
    wrong = {"task_id": 2, "text": "two", "code": "def f(): return 1", "test_list": ["assert f() == 2"]}
    own = {"task_id": 3, "text": "own", "code": "class A: pass\ndef f(x): return x", "test_list": ["assert f(A())"]}
    file = tmp_path / "problems.jsonl"
    file.write_text("\n".join(map(json.dumps, (wrong, right, own))))
    env = CodeEnv(file)
    assert {env.reset(seed=seed)[1]["problem"] for seed in range(6)} == {"1"}
    with pytest.raises(ValueError, match="'2' cannot be scored"):
        env.reset(seed=0, options={"problem": "2"})


def test_a_broken_file_is_named_with_its_row(tmp_path: Path) -> None:
    file = tmp_path / "problems.jsonl"
    row = {"task_id": 1, "text": "x", "code": "def f(): pass", "test_list": ["assert f() is None"]}
    file.write_text(json.dumps(row) + "\n" + json.dumps({"task_id": 2, "text": "x"}))
    with pytest.raises(ValueError, match=r"problems\.jsonl, row 2: .*'test_list'"):
        read_problems(file)


FILES = {"HumanEval.jsonl.gz": 42, "humanevalfix.jsonl": 42, "mbpp.jsonl.gz": 473, "mbpp_sanitized.json": 170}


@pytest.mark.skipif(not DATA.exists(), reason=f"no {DATA}")
@pytest.mark.parametrize("name", FILES)
def test_public_solutions_pass_in_any_dress_and_bugs_and_empty_answers_fail(name: str) -> None:
    problems = read_problems(DATA / name)
    assert len(problems) == FILES[name]
    for number, problem in enumerate(problems[:: max(1, len(problems) // 7)]):  # all of them: benchmarks/dresses.py
        ways, empty = list(dresses(problem).values()), list(EMPTY.values())
        assert grade(problem, ways[number % len(ways)](problem)).solved, problem.id
        assert not grade(problem, empty[number % len(empty)](problem)).passed, problem.id
        assert not problem.wrong or not grade(problem, problem.wrong).solved, problem.id


@pytest.mark.skipif(not DATA.exists(), reason=f"no {DATA}")
def test_an_empty_answer_passes_none_of_the_public_tests_that_held_for_it() -> None:
    problems = read_problems(DATA / "HumanEval.jsonl.gz")
    assert untested(tuple(problems)) == ()
    hollow = [problem for problem in problems if "assert True" in problem.tests]
    assert hollow and not any(grade(problem, "pass").passed for problem in hollow)
