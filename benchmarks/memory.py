"""What lessons do in treegym/HouseRules-v0, beside weights and with them; into docs/results/memory.md.

    python benchmarks/memory.py                      # every run that runs/memory does not hold yet: about two hours
    python benchmarks/memory.py --worlds 1 --parts told weights
    python benchmarks/memory.py --report             # the page alone, from the runs that there are

One policy is warmed up in worlds of its own, where nothing but notes tells the rules. Then, world by world: it plays
without notes, with an expert's, and with those that `Contrast` draws from its own rollouts; its weights are trained
without any; the lessons are distilled into them; lessons are poisoned, and sites change their rules.
"""

from __future__ import annotations

import argparse
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from scipy.stats import t as student

from treegym.agents import Run
from treegym.agents.memory import Lesson, LessonStore
from treegym.envs import HouseRulesEnv
from treegym.envs.houserules import CHOICES
from treegym.scenarios import load_scenario, train

ROOT = Path(__file__).parent.parent
RUNS = ROOT / "runs" / "memory"
PAGE = ROOT / "docs" / "results" / "memory.md"
ENV, OF = "treegym/HouseRules-v0", 12  # sites
CALLS = 1_500  # tool calls that lessons are drawn from, at most
RATES = (1e-4, 3e-4, 1e-3)  # learning rates that are tried in world 0
RL = ("memory=null", "improvement.learn=true", "improvement.optimization.max_tokens=4096")
MARK = "<!-- What follows is written by hand. -->\n"
HEAD = """# Lessons

`python benchmarks/memory.py`: `treegym train training-free`, world by world. The policy is nano, warmed up once on
demonstrations in worlds of their own; success is `exact` on held-out tasks at temperature 1, mean and 95% interval over
the worlds (Student's t). Tool calls are those of the improvement, as the cost of its trees counts them.
"""


def finished(name: str, *changes: str, begin: Callable[[Path], None] | None = None) -> Run:
    """The run of that name; it is made if it is missing, and goes on if it was interrupted."""
    folder = RUNS / name
    if not (folder / "summary.json").exists():
        resume = (folder / "scenario.yaml").exists()
        if begin and not resume:
            folder.parent.mkdir(parents=True, exist_ok=True)
            begin(folder.with_suffix(".lessons"))
        train(load_scenario("training-free", ["threads=1", "model.dtype=float32", *changes]), folder, resume=resume)
    return Run(folder)


def warm() -> str:
    """The warmed-up policy's change of a scenario."""
    finished("warm", "warmup.demonstrations=6400", "warmup.optimization.decay_steps=400", "stages=[Warmup]")
    return f"model.name={RUNS / 'warm' / 'model'}"


def played(world: int, name: str, *changes: str, begin: Callable[[Path], None] | None = None) -> Run:
    """A run in a world that goes on from the warmed-up policy."""
    settings = f"environment.settings={{sites: {OF}, world: {world}}}"
    return finished(f"{name}-{world}", warm(), "warmup.demonstrations=0", settings, *changes, begin=begin)


# the parts


def rules(world: int, moved: int = 0) -> dict[tuple[str, str], str]:
    """What an expert would write down: by tag and phrase, the text."""
    env, found = HouseRulesEnv(world=world, sites=OF, moved=moved), {}
    for seed in range(40 * OF):
        _, info = env.reset(seed=seed)
        found |= {(info["tags"][0], note.when): note.text for note in env.notes()}
    return found


def write(path: Path, lessons: Mapping[tuple[str, str], str]) -> None:
    path.unlink(missing_ok=True)
    with LessonStore(path, author="expert") as store:
        for (tag, when), text in lessons.items():
            store.add(Lesson(text, ENV, when, (tag,)))


def told(world: int) -> None:
    """Without notes, with the expert's, and with those of Contrast."""
    evaluate = "stages=[{Evaluate: {name: none, notes: false}}, {Evaluate: {name: expert}}]"
    expert = RUNS / f"expert-{world}.lessons"
    played(world, "expert", f"memory.store={expert}", evaluate, begin=lambda path: write(path, rules(world)))
    played(world, "contrast")


def weights(world: int) -> None:
    """GRPO and GiGPO without notes, with the learning rate that was best in world 0; and memory beside them."""
    for algorithm in ("grpo", "gigpo"):
        for rate in RATES if world == 0 else (best_rate(algorithm),):
            changes = (f"algorithm.name={algorithm}", f"improvement.optimization.learning_rate={rate}")
            played(
                world, f"{algorithm}-{rate:g}", *RL, "improvement.steps=24", "improvement.evaluate_every=8", *changes
            )
    rate = best_rate("grpo")
    both = ("improvement.learn=true", f"improvement.optimization={{learning_rate: {rate}, max_tokens: 4096}}")
    played(world, "both", *both)


def distilled(world: int) -> None:
    """The lessons of Contrast in the weights, by imitation and by reverse KL."""
    run = RUNS / f"contrast-{world}"
    for method in ("imitation", "reverse_kl"):
        size = "tasks: 4000, steps: 500" if method == "imitation" else "rounds: 300"
        stage = (
            f"{{Distillation: {{method: {method}, {size}, batch_size: 16, settings: {{world: null}}, "
            "optimization: {learning_rate: 1.0e-3, warmup_steps: 5, max_tokens: 4096}}}"
        )
        other = "{Evaluate: {name: bare, notes: false}}, {Evaluate: {name: what is left}}"
        played(
            world, f"distilled-{method}", f"memory.store={run}", "memory.reflector=null", f"stages=[{stage}, {other}]"
        )


def poisoned(world: int) -> None:
    """A quarter of the lessons is wrong, and a quarter of the sites has changed its rules."""
    dice, moved = random.Random(world), OF // 4

    def begin(path: Path) -> None:
        known = rules(world)
        wrong = dice.sample(sorted(known), len(known) // 4)
        others = {key: f"choose {dice.choice([c for c in CHOICES if not known[key].endswith(c)])}" for key in wrong}
        write(path, {**known, **others})

    settings = f"environment.settings={{sites: {OF}, world: {world}, moved: {moved}}}"
    store = f"memory.store={RUNS / f'poisoned-{world}.lessons'}"
    played(world, "poisoned", settings, store, "improvement.steps=60", "improvement.evaluate_every=10", begin=begin)


PARTS: dict[str, Callable[[int], None]] = {
    "told": told, "weights": weights, "distilled": distilled, "poisoned": poisoned,
}  # fmt: skip


# the page


def there(name: str) -> Run:
    """The finished run of that name. LookupError where there is none."""
    if not (RUNS / name / "summary.json").exists():
        raise LookupError(name)
    return Run(RUNS / name)


def success(run: Run, stage: str) -> float:
    """Of a stage that is over; of several evaluations midway the last."""
    rows = [row for row in run.metrics() if row["stage"] == stage and "success" in row]
    return float(rows[-1]["success"])


def midway(run: Run) -> Iterator[tuple[int, float]]:
    """Tool calls until an evaluation of the improvement, and its success."""
    calls = 0
    for row in run.metrics():
        if row["stage"] == "improvement":
            calls += row["cost"]["tool_calls"]
        elif row["stage"] in ("midway", "trained"):
            yield calls, row["success"]


def best_rate(algorithm: str) -> float:
    return max(RATES, key=lambda rate: success(there(f"{algorithm}-{rate:g}-0"), "trained"))


def right_and_wrong(run: Run, known: Mapping[tuple[str, str], str]) -> tuple[int, int]:
    """How many lessons in force with a phrase say what the expert would, and how many do not."""
    with LessonStore.read(run.path / "lessons.sqlite") as store:
        lessons = [
            (known.get((each.tags[0], each.when)), each.text) for each in store.lessons() if each.when and each.tags
        ]
    return sum(a == b for a, b in lessons), sum(a != b for a, b in lessons)


def interval(values: Sequence[float]) -> str:
    mean = fmean(values)
    if len(values) < 3:
        return f"{mean:.1%}"
    half = float(student.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5
    return f"{mean:.1%} ({mean - half:.1%} to {mean + half:.1%})"


def row(name: str, of: Callable[[int], Any], worlds: int, shown: Callable[[Any], str] = "{:.1%}".format) -> list[str]:
    """A line of a table, of the worlds whose runs there are."""
    found = []
    for world in range(worlds):
        try:
            found.append(of(world))
        except LookupError:
            continue
    cells = [shown(value) for value in found] + ["-"] * (worlds - len(found))
    mean = interval(found) if found and isinstance(found[0], float) else ""
    return [f"| {name} | {' | '.join(cells)} | {mean} |"] if found else []


def at_calls(pair: tuple[int, float]) -> str:
    return f"{pair[1]:.1%} at {pair[0]}"


def report(worlds: int) -> list[str]:
    def at(name: str, stage: str) -> Callable[[int], float]:
        return lambda world: success(there(f"{name}-{world}"), stage)

    def calls(name: str) -> Callable[[int], int]:
        return lambda world: [*midway(there(f"{name}-{world}"))][-1][0]

    def right(world: int) -> tuple[int, int]:
        return right_and_wrong(there(f"contrast-{world}"), rules(world))

    lines = [f"| | {' | '.join(f'world {i}' for i in range(worlds))} | mean |", "|---" * (worlds + 2) + "|"]
    lines += row("no notes", at("expert", "none"), worlds) + row("an expert's", at("expert", "expert"), worlds)
    lines += row("`Contrast`", at("contrast", "trained"), worlds)
    lines += row("… after so many tool calls", calls("contrast"), worlds, str)
    lines += row(f"… lessons right, wrong of {6 * OF}", right, worlds, lambda pair: f"{pair[0]}, {pair[1]}")
    for algorithm in ("grpo", "gigpo"):
        for rate in RATES:
            name = f"{algorithm}-{rate:g}"
            for i in range(3):

                def curve(world: int, name: str = name, i: int = i) -> tuple[int, float]:
                    return [*midway(there(f"{name}-{world}"))][i]

                shown = row(
                    f"weights, {algorithm}, {rate:g}: success at calls",
                    curve,
                    worlds,
                    lambda p: f"{p[1]:.1%} at {p[0]}",
                )
                lines += shown
    lines += row("memory and weights", at("both", "trained"), worlds)
    for method in ("imitation", "reverse_kl"):
        lines += row(f"distilled by {method}, no notes", at(f"distilled-{method}", "bare"), worlds)
        lines += row("… with what is left of the notes", at(f"distilled-{method}", "what is left"), worlds)
    for i in range(6):

        def healing(world: int, i: int = i) -> tuple[int, float]:
            return [*midway(there(f"poisoned-{world}"))][i]

        lines += row("poisoned: success at calls", healing, worlds, at_calls)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, default=5)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS])
    parser.add_argument("--report", action="store_true", help="no run, the page alone")
    args = parser.parse_args()
    for part in () if args.report else args.parts:
        for world in range(args.worlds):
            PARTS[part](world)
    by_hand = PAGE.read_text().partition(MARK)[2] if PAGE.exists() else ""
    text = "\n".join([HEAD, *report(args.worlds), "", MARK])
    PAGE.write_text(text + by_hand)
    print(text)


if __name__ == "__main__":
    main()
