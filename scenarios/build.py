"""From a scenario to the objects that train or evaluate."""

from __future__ import annotations

import contextlib
import os
import resource
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..agents import ChatRenderer, Evaluation, add_lora
from ..agents.models import load
from ..envs import TextEnv
from ..trainers import Environment, Run, Trainer, Watcher
from ..trainers.run import write_text
from .changes import changed, kept, record
from .errors import ScenarioError
from .folders import begun, whole
from .modules import folder_of
from .schema import Scenario, dump_scenario, load_scenario
from .terminal import told
from .watch import ProgressBars, show_results, summary


def train(scenario: Scenario, out: str | Path, *, resume: bool = False) -> dict[str, Evaluation]:
    """Trains in the directory `out` and prints what came of it; the evaluations by stage.

    `resume` goes on with the run there exactly as it would have gone on without the interruption. The scenario may then
    differ from the run's in the fields of `changes.FREE`, which is recorded in changes.jsonl; ScenarioError otherwise.
    FileExistsError where a run is not to be resumed or has nothing left to do; Stopped after Ctrl-C. An error before
    anything was played leaves the directory as it was.
    """
    start, folder = time.monotonic(), Path(out)
    file = folder / "scenario.yaml"
    if file.exists() and not resume:
        raise FileExistsError(f"{folder} holds a run already; resume it, or choose another directory")
    if (folder / "summary.json").exists():
        raise FileExistsError(f"{folder} holds a finished run; choose another directory")
    recorded = load_scenario(file) if file.exists() else scenario
    scenario = kept(recorded, scenario)
    with begun(folder):
        if scenario.warmup.demonstrations:
            check_warmup(scenario)
        run = Run(folder)
        differing = changed(run, recorded, scenario)
        try:
            with ProgressBars() as bars:
                trainer = build_trainer(scenario, run, bars)
                record(run, differing)
                write_text(file, dump_scenario(placed(settled(scenario, trainer.dtype))))
                run.save_tokenizer(trainer.renderer.tokenizer)
                results = trainer.train()
        finally:
            run.close()
    with whole(folder / "model") as part:
        trainer.save_model(part)
    seconds, peak = time.monotonic() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    run.summarize(summary(results, seconds=seconds, peak_memory_gib=peak))
    run.finish()
    show_results(results, f"{seconds:.0f} s, peak memory {peak:.1f} GiB; saved in {folder}")
    return results


def build_trainer(scenario: Scenario, run: Run, watcher: Watcher) -> Trainer:
    """The scenario's trainer, its model loaded, its computation set to the scenario's threads.

    Raises ScenarioError for environments and models that cannot be had.
    """
    check_weights(scenario, try_environment(scenario.environment))
    torch.set_num_threads(scenario.threads or os.cpu_count() or 1)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    model, renderer = load_model(scenario)
    with refusing("model.name"):
        return Trainer(
            scenario.plan(),
            model,
            renderer,
            run,
            watcher,
            dtype=None if scenario.model.dtype == "auto" else getattr(torch, scenario.model.dtype),
            max_rows=scenario.model.max_rows,
        )


def settled(scenario: Scenario, dtype: torch.dtype) -> Scenario:
    """The scenario with the dtype that the run computes in: resumed elsewhere, it still does."""
    name: Any = str(dtype).removeprefix("torch.")
    return replace(scenario, model=replace(scenario.model, dtype=name))


def placed(scenario: Scenario) -> Scenario:
    """The scenario with the folder in which its environment's module was found, for commands that run elsewhere."""
    return replace(scenario, look_in=folder_of(scenario.environment.id) or scenario.look_in)


def try_environment(environment: Environment) -> TextEnv:
    """The environment at the start of a train task.

    Raises ScenarioError where it does not take the settings or options, or has no such success.
    """
    try:
        env = environment.task("train", 0).make()
    except OSError as error:
        raise ScenarioError(f"environment: {told(error)}") from error
    except (TypeError, ValueError) as error:
        raise ScenarioError(f"environment: {error}") from error
    for split, options in (("heldout", environment.heldout), ("train", environment.train)):
        try:
            env.reset(seed=0, options=dict(options))
        except ValueError as error:
            raise ScenarioError(f"environment.{split}: {error}") from error
    terms = {"format", *getattr(env, "reward_weights", {environment.success: 1.0})}
    if environment.success not in terms:
        raise ScenarioError(f"environment.success: no reward term {environment.success!r}; terms: {sorted(terms)}")
    return env


def check_warmup(scenario: Scenario) -> None:
    """ScenarioError where the environment has no oracle to learn from, or does not take the warm-up's settings."""
    environment = scenario.environment
    if try_environment(environment).oracle() is None:
        raise ScenarioError(f"warmup.demonstrations: {environment.id} has no oracle; 0 does without")
    try:
        environment.task("train", 0, **scenario.warmup.settings).make().close()
    except (TypeError, ValueError, OSError) as error:
        raise ScenarioError(f"warmup.settings: {error}") from error


def check_weights(scenario: Scenario, env: TextEnv) -> None:
    """ScenarioError where the reward weights of the improvement are not those of the environment's terms."""
    weights, terms = scenario.improvement.reward_weights, getattr(env, "reward_weights", {}).keys()
    if weights and (wrong := (terms ^ weights.keys()) - {"format"}):
        name = sorted(wrong)[0]
        raise ScenarioError(f"improvement.reward_weights: {name!r} is {'missing' if name in terms else 'no term'}")


def load_model(scenario: Scenario) -> tuple[PreTrainedModel, ChatRenderer]:
    """The scenario's model and what renders its chats. ScenarioError where there is none."""
    texts = vocabulary(scenario) if scenario.model.name == "nano" else ()
    with refusing("model.name"):
        model, tokenizer = load(scenario.model.name, texts=texts, seed=scenario.seed)
        if scenario.model.weights == "lora":
            add_lora(model, scenario.model.lora_rank, scenario.model.lora_alpha, scenario.seed)
        return model, ChatRenderer(tokenizer)


@contextlib.contextmanager
def refusing(place: str) -> Iterator[None]:
    """While a model is read and tried, whatever it is refused for becomes a ScenarioError of one line."""
    try:
        yield
    except ScenarioError:
        raise
    except Exception as error:  # of transformers, tokenizers, safetensors and Jinja: each has kinds of its own
        [reason, *_] = [*filter(None, map(str.strip, str(error).splitlines())), type(error).__name__]
        ours = isinstance(error, ValueError | OSError)
        raise ScenarioError(f"{place}: {reason if ours else f'{type(error).__name__}: {reason}'}") from error


def vocabulary(scenario: Scenario) -> Iterable[str]:
    """What a model made from scratch must be able to read: some of the environment's episodes."""
    environment = scenario.environment
    for number in range(200):
        env = environment.task("train", "vocabulary", number).make()
        _, info = env.reset(seed=number, options=dict(environment.train))
        done = False
        while not done:
            yield from (message.text for message in info["messages"])
            action = env.oracle()
            if action is None:
                break
            yield action
            _, _, terminated, truncated, info = env.step(action)
            done = terminated or truncated
