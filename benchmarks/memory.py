"""What lessons do in treegym/HouseRules-v0, beside weights and with them; into docs/results/memory.md.

    python benchmarks/memory.py                      # every run that runs/memory does not hold yet: about two hours
    python benchmarks/memory.py --worlds 1 --parts told weights
    python benchmarks/memory.py --report             # the page alone, from the runs that there are

One policy is warmed up in worlds of its own, where nothing but notes tells the rules. Then, world by world: it plays
without notes, with an expert's, and with those that `Contrast` draws from its own rollouts; its weights are trained
without any; the lessons are distilled into them, once and in rounds; lessons are poisoned, and sites change their
rules; many notes are told of which two apply.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from shown import mean_interval

from treegym.agents import Run
from treegym.agents.evaluation import Budget, evaluate
from treegym.agents.memory import Lesson, LessonStore
from treegym.agents.rollouts import Response
from treegym.envs import HouseRulesEnv, Task, TextEnv
from treegym.envs.houserules import CHOICES, place_of
from treegym.envs.notes import PLACES, Note, Place, with_notes
from treegym.envs.task import Wrappers
from treegym.scenarios import load_scenario, train
from treegym.scenarios.policies import open_policy

ROOT = Path(__file__).parent.parent
RUNS = ROOT / "runs" / "memory"
PAGE = ROOT / "docs" / "results" / "memory.md"
ENV, OF = "treegym/HouseRules-v0", 12  # sites
CALLS = 1_500  # tool calls that lessons are drawn from, at most
RATES = (3e-4, 1e-3, 3e-3)  # learning rates that are tried in world 0
METHODS = ("imitation", "reverse_kl")
TASKS = 100  # held-out ones of SmolLM2
NUMBERS = (2, 4, 8, 16, 32)  # of notes that are told, of which two apply
ROUNDS, FEW = 3, 2  # of collecting and distilling, and the worlds in which they are played
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


def warm() -> Path:
    """The warmed-up policy."""
    return (
        finished("warm", "warmup.demonstrations=6400", "warmup.optimization.decay_steps=400", "stages=[Warmup]").path
        / "model"
    )


def smollm2(place: Place) -> Path:
    """SmolLM2 after 400 demonstrations, with notes that stand behind what they speak of, or in the prompt."""
    learning = "{learning_rate: 1.5e-4, warmup_steps: 4, decay_steps: 46, max_tokens: 768}"
    size = ("warmup.demonstrations=400", "warmup.batch_size=8", f"warmup.optimization={learning}")
    changes = ("model.name=smollm2", "model.dtype=auto", f"warmup.place={place}", "stages=[Warmup]")
    return finished(f"warm-smollm2-{place}", *size, *changes).path / "model"


def played(
    world: int, name: str, *changes: str, model: Path | None = None, begin: Callable[[Path], None] | None = None
) -> Run:
    """A run in a world that goes on from a policy, by default the warmed-up one."""
    settings = f"environment.settings={{sites: {OF}, world: {world}}}"
    begun = (f"model.name={model or warm()}", "warmup.demonstrations=0", settings)
    return finished(f"{name}-{world}", *begun, *changes, begin=begin)


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
    length = ("improvement.steps=48", "improvement.evaluate_every=16")
    for algorithm in ("grpo", "gigpo"):
        for rate in RATES if world == 0 else (best_rate(algorithm),):
            changes = (f"algorithm.name={algorithm}", f"improvement.optimization.learning_rate={rate}")
            played(world, f"{algorithm}-{rate:g}", *RL, *length, *changes)
    optimization = f"improvement.optimization={{learning_rate: {best_rate('grpo')}, max_tokens: 4096}}"
    played(world, "both", "improvement.learn=true", optimization)


def distillation(method: str, size: str) -> str:
    """Stages that distil and measure what the weights hold."""
    return (
        f"{{Distillation: {{method: {method}, {size}, batch_size: 16, settings: {{world: null}}, "
        "optimization: {learning_rate: 1.0e-3, warmup_steps: 5, max_tokens: 4096}}}, "
        "{Evaluate: {name: bare, notes: false}}"
    )


SIZES = {"imitation": "tasks: 4000, steps: 500", "reverse_kl": "rounds: 300"}  # of a distillation


def distilled(world: int) -> None:
    """The lessons of Contrast in the weights, by imitation and by reverse KL; then the written rules of a world that no
    policy knows, followed by each of them and by the policy before."""
    policies = {"before": warm()}
    for method in METHODS:
        stages = f"stages=[{distillation(method, SIZES[method])}, {{Evaluate: {{name: what is left}}}}]"
        lessons = f"memory.store={RUNS / f'contrast-{world}'}"
        run = played(world, f"distilled-{method}", lessons, "memory.reflector=null", stages)
        policies[method] = run.path / "model"
    for name, model in policies.items():
        settings = f"environment.settings={{sites: {OF}, world: {100 + world}}}"
        store, only = f"memory.store={RUNS / f'other-{name}-{world}.lessons'}", "stages=[{Evaluate: {name: expert}}]"
        begin = lambda path: write(path, rules(100 + world))  # noqa: E731
        played(world, f"other-{name}", settings, store, only, model=model, begin=begin)


def rounds(world: int) -> None:
    """Collecting and distilling, several times in a row."""
    for method in METHODS if world < FEW else ():
        model, size = warm(), {"imitation": "tasks: 1600, steps: 200", "reverse_kl": "rounds: 100"}[method]
        for number in range(ROUNDS):
            stages = f"stages=[Improvement, {distillation(method, size)}, {{Evaluate: {{name: what is left}}}}]"
            kept = f"memory.store={RUNS / f'round-{number - 1}-{method}-{world}'}" if number else "memory.store=''"
            run = played(world, f"round-{number}-{method}", kept, stages, f"seed={number}", model=model)
            model = run.path / "model"


def number(world: int) -> None:
    """Ever more notes of which two apply, in the prompt. nano does not follow notes there, SmolLM2 does."""
    settings = f"environment.settings={{sites: {OF}, world: {world}}}"
    scenario = load_scenario("training-free", ["threads=1", settings, "sampling.max_context=2048"])
    tasks = [scenario.environment.task("heldout", i) for i in range(TASKS)]
    known = [Note(text, when) for (_, when), text in sorted(rules(world).items())]
    for count in NUMBERS if world == 0 else ():
        if not (out := RUNS / f"number-{count}-{world}").joinpath("results.json").exists():
            opened = open_policy(str(smollm2("prompt")), scenario)
            evaluate(tasks, opened.policy, opened.renderer, opened.sampling, Budget(), out, recall=among(known, count))


def among(known: Sequence[Note], count: int) -> Callable[[Task, TextEnv, Response], Wrappers]:
    """Tells those notes that apply and others, in any order."""

    def recall(task: Task, env: TextEnv, response: Response) -> Wrappers:
        assert isinstance(env, HouseRulesEnv)
        dice, places = random.Random(f"notes {task.seed}"), [place_of(env.site, s) for s in env.route]
        apply = [note for note in known if note.when in places]
        others = [note for note in known if note not in apply]
        notes = [*apply, *dice.sample(others, count - len(apply))]
        dice.shuffle(notes)
        return (with_notes(notes, "prompt"),)

    return recall


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
    played(world, "poisoned", settings, store, "improvement.steps=200", "improvement.evaluate_every=40", begin=begin)


def real(world: int) -> None:
    """A model that has learned from the web: the written rules of a world, and the whole loop."""
    if world:
        return
    fewer, evaluate = ("model.dtype=auto", f"heldout.tasks={TASKS}"), "{Evaluate: {name: none, notes: false}}"
    for place in PLACES:
        path = RUNS / f"smollm2-{place}-0.lessons"
        told = (f"memory.store={path}", f"memory.place={place}", f"stages=[{evaluate}, {{Evaluate: {{name: expert}}}}]")
        played(0, f"smollm2-{place}", *told, *fewer, model=smollm2(place), begin=lambda path: write(path, rules(0)))
    played(0, "smollm2-contrast", *fewer, model=smollm2("turn"))
    played(0, "smollm2-ask", *fewer, "memory.reflector=AskModel", "improvement.steps=8", model=smollm2("turn"))


def factsearch(world: int) -> None:
    """SmolLM2 in another environment, where it collects lessons and is measured with them and without."""
    folder = RUNS / "factsearch"
    if world == 0 and not (folder / "summary.json").exists():
        stages = "stages=[Warmup, Improvement, {Evaluate: {name: none, notes: false}}, {Evaluate: {name: lessons}}]"
        changes = ["threads=1", "memory={}", "improvement.learn=false", stages]
        train(load_scenario("quickstart", changes), folder, resume=(folder / "scenario.yaml").exists())


PARTS: dict[str, Callable[[int], None]] = {
    "told": told, "weights": weights, "distilled": distilled, "poisoned": poisoned, "number": number, "rounds": rounds,
    "real": real, "factsearch": factsearch,
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


def healed(world: int) -> tuple[int, int, int, int]:
    """Of the poisoned lessons: how many were wrong, how many of them are no longer told, how many were right, and for
    how many of them nothing right is told any more."""
    run, known = there(f"poisoned-{world}"), rules(world, OF // 4)
    with LessonStore.read(RUNS / f"poisoned-{world}.lessons") as store:
        before = {lesson.id: lesson for lesson in store.lessons()}
    with LessonStore.read(run.path / "lessons.sqlite") as store:
        now = {lesson.id: (lesson.tags[0], lesson.when, lesson.text) for lesson in store.lessons() if lesson.tags}
    wrong = [id for id, lesson in before.items() if known[lesson.tags[0], lesson.when] != lesson.text]
    right = [(lesson.tags[0], lesson.when, lesson.text) for id, lesson in before.items() if id not in wrong]
    gone, lost = sum(id not in now for id in wrong), sum(one not in now.values() for one in right)
    return len(wrong), gone, len(right), lost


def few(count: int) -> Callable[[int], float]:
    """Success where so many notes were told, by world."""

    def of(world: int) -> float:
        results = RUNS / f"number-{count}-{world}" / "results.json"
        if not results.exists():
            raise LookupError(results)
        return float(json.loads(results.read_text())["success"]["mean"])

    return of


def row(name: str, of: Callable[[int], Any], worlds: int, shown: Callable[[Any], str] = "{:.1%}".format) -> list[str]:
    """A line of a table, of the worlds whose runs there are."""
    found = []
    for world in range(worlds):
        try:
            found.append(of(world))
        except LookupError:
            continue
    cells = [shown(value) for value in found] + ["-"] * (worlds - len(found))
    mean = mean_interval(found) if found and isinstance(found[0], float) else ""
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
    for method in METHODS:
        lines += row(f"distilled by {method}, no notes", at(f"distilled-{method}", "bare"), worlds)
        lines += row("… with what is left of the notes", at(f"distilled-{method}", "what is left"), worlds)
    for name in ("before", *METHODS):
        title = "the written rules of another world, " + ("before" if name == "before" else f"after {name}")
        lines += row(title, at(f"other-{name}", "expert"), worlds)
    for method in METHODS:
        for i in range(ROUNDS):
            lines += row(f"round {i + 1} by {method}, no notes", at(f"round-{i}-{method}", "bare"), worlds)
    for count in NUMBERS:
        lines += row(f"SmolLM2, {count} notes in the prompt, of which two apply", few(count), worlds)
    for place, where in (("turn", "at the turn"), ("prompt", "in the prompt")):
        lines += row(f"SmolLM2 taught {where}, no notes", at(f"smollm2-{place}", "none"), worlds)
        lines += row("… an expert's notes", at(f"smollm2-{place}", "expert"), worlds)
    lines += row("SmolLM2, `Contrast`", at("smollm2-contrast", "trained"), worlds)
    lines += row("SmolLM2, `AskModel`", at("smollm2-ask", "trained"), worlds)
    for i in range(5):

        def healing(world: int, i: int = i) -> tuple[int, float]:
            return [*midway(there(f"poisoned-{world}"))][i]

        lines += row("poisoned: success at calls", healing, worlds, at_calls)
    lines += row(
        "… wrong lessons, gone of them; right ones, lost of them",
        healed,
        worlds,
        "{0[0]}, {0[1]}; {0[2]}, {0[3]}".format,
    )
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
