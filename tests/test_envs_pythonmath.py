"""PythonMath: generated problems are true to their code, files are read, answers are compared by what they mean."""

from __future__ import annotations

import json
import random
from pathlib import Path

import gymnasium
import pytest

from treegym.envs import PythonMathEnv, check_env
from treegym.envs.math.problems import NAMES, THINGS, generate, read_problems
from treegym.tools.sandbox import SandboxUnavailable, open_sandbox

pytestmark = pytest.mark.filterwarnings("ignore:the sandbox 'local'")
DATA = Path(__file__).parent.parent.parent / "shared" / "data" / "math"


def computed(steps: tuple[str, ...]) -> int:
    names: dict[str, int] = {}
    exec("\n".join(steps), names)
    return names["x"]


@pytest.mark.parametrize("heldout", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_a_generated_answer_is_what_its_steps_compute_and_not_what_the_misread_ones_do(
    steps: int, heldout: bool
) -> None:
    for seed in range(100):
        problem = generate(random.Random(seed), steps, heldout=heldout)
        assert str(computed(problem.steps)) == problem.answer
        assert computed(problem.wrong) != computed(problem.steps)
        assert len(problem.steps) == steps + 1
        assert all(digits in problem.question for digits in problem.steps[0].split()[-1:])


def test_held_out_problems_share_no_name_thing_or_order_with_train() -> None:
    drawn = {
        heldout: [generate(random.Random(seed), 3, heldout=heldout) for seed in range(300)] for heldout in (False, True)
    }
    for words in (NAMES, THINGS):
        seen, held = ({word for p in drawn[h] for word in words if word in p.question.split()} for h in (False, True))
        assert seen and held and not seen & held
    orders = [{tuple(step.translate(DIGITS) for step in p.steps) for p in drawn[h]} for h in (False, True)]
    assert orders[0] and orders[1] and not orders[0] & orders[1]


DIGITS = str.maketrans("", "", "0123456789")


def play(env: PythonMathEnv, seed: int) -> float:
    env.reset(seed=seed)
    while (action := env.oracle()) is not None:
        _, reward, terminated, truncated, _ = env.step(action)
        if terminated or truncated:
            return reward
    raise AssertionError("the oracle stopped before the end")


def test_the_oracle_is_right_and_errs_as_often_as_it_is_told_to() -> None:
    env = PythonMathEnv()
    assert [play(env, seed) for seed in range(20)] == [1.1] * 20
    env.close()
    erring = PythonMathEnv(oracle_error=0.5)
    right = sum(play(erring, seed) > 1 for seed in range(60))
    erring.close()
    assert 18 <= right <= 42  # 5 in 10,000 fall outside


@pytest.mark.parametrize("sandbox", ["bubblewrap", "local"])
def test_it_keeps_every_promise_of_an_environment(sandbox: str) -> None:
    try:
        open_sandbox(sandbox)
    except SandboxUnavailable as error:
        pytest.skip(str(error))
    check_env(lambda: gymnasium.make("treegym/PythonMath-v0", sandbox=sandbox).unwrapped, seeds=[0])


def test_a_broken_file_is_named_with_its_row(tmp_path: Path) -> None:
    file = tmp_path / "problems.jsonl"
    file.write_text(json.dumps({"question": "1 + 1?", "answer": "so #### 2"}) + "\n" + json.dumps({"text": "x"}))
    with pytest.raises(ValueError, match=r"problems\.jsonl, row 2: .*'question'"):
        read_problems(file)
    with pytest.raises(ValueError, match="no split 'test'"):
        PythonMathEnv(split="test").reset(seed=0)


@pytest.mark.skipif(not DATA.exists(), reason=f"no {DATA}")
@pytest.mark.parametrize(
    ("name", "count"),
    [("gsm8k_train.jsonl.gz", 7473), ("svamp.json.gz", 531), ("math500.jsonl", 205), ("aime2024.jsonl", 30)],
)
def test_public_problems_are_read_and_their_own_answers_are_right(name: str, count: int) -> None:
    problems = read_problems(DATA / name)
    assert len(problems) == count
    env = PythonMathEnv(DATA / name)
    assert [play(env, seed) for seed in range(10)] == [1.1] * 10
    env.close()
