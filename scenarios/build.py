"""From a scenario to the objects that train or evaluate."""

from __future__ import annotations

import contextlib
import inspect
import math
import os
import resource
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..agents import ChatRenderer, Evaluation, Run, Served, TokenPolicy, WeightSync
from ..agents.inference.acceptance import bring_attention
from ..agents.inference.cpu.compiler import choose_kernels, library_for
from ..agents.inference.cpu.native import SOURCE
from ..agents.inference.forward import device_named, native_dtype, positions
from ..agents.models.lora import add_lora, has_lora, save_adapter
from ..agents.models.registry import end_tokens, load, load_tokenizer
from ..agents.policies.sampler import TransformersPolicy
from ..agents.rollouts.response import act, episode_errors, open_task
from ..agents.store import Tracker
from ..agents.store.folder import whole, write_text
from ..envs import TextEnv, ToolEnv, action_format, format_of
from ..envs.formats.tagged import DEFAULT
from ..envs.notes import listed, mentioned
from ..tools.named import PartNotFound
from ..trainers import TaskSet, Trainer, Watcher
from ..trainers.learner import Checkpoints
from .changes import changed, kept, record
from .errors import ScenarioError
from .folders import begun
from .memory import load_memory
from .modules import folders_of
from .parts import build_part, made_with
from .schema import Scenario, dump_scenario, environments_of, load_scenario
from .serving import served_policy
from .terminal import say, told
from .watch import ProgressBars, concerns, improvement_health, show_results, summary

IN_A_MODULE = "in a module of its own, named module:id, its runs can be replayed and evaluated"
EPISODES = 8  # in which it is seen which options an environment reads
NOT_REPEATABLE = (
    "repeated, this run may end otherwise: what else is in a batch changes last bits here, and that depends on how "
    "long tools take; model.lockstep=true has every pass wait for all rollouts"
)

SERVED = "repeated, this run may end otherwise: what else a server computes meanwhile changes last bits"


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
    if file.exists():
        recorded = load_scenario(file)
        scenario = kept(recorded, scenario)
    else:  # a run that goes on keeps the format in which it began
        recorded = scenario = in_own_format(scenario, scenario.model.name)
    with begun(folder):
        if scenario.warmup.demonstrations:
            check_warmup(scenario)
        run = Run(folder)
        run.trackers = [build_part(Tracker, part, f"trackers.{i}") for i, part in enumerate(scenario.trackers)]
        run.claim()  # before anything is written
        try:
            differing = changed(run, recorded, scenario)
            with ProgressBars() as bars:
                trainer = build_trainer(scenario, run, bars)
                say(computation(trainer))
                repeatable = bool(getattr(trainer.policy, "repeatable", False))
                if not repeatable:
                    say(SERVED if isinstance(trainer.policy, Served) else NOT_REPEATABLE)
                record(run, recorded, differing)
                write_text(file, dump_scenario(placed(settled(scenario, trainer.dtype))))
                run.save_tokenizer(trainer.renderer.tokenizer)
                results = trainer.train()
            trainer.save_model(folder / "model")
            if has_lora(trainer.model) and trainer.model.name_or_path:  # one made here is no base to come back to
                with whole(folder / "adapter") as part:
                    save_adapter(trainer.model, part, trainer.model.name_or_path)
            seconds, peak = time.monotonic() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            health = improvement_health(run.metrics())
            run.summarize(
                summary(results, seconds=seconds, peak_memory_gib=peak, repeatable=repeatable, improvement=health)
            )
            Checkpoints(run).finish()
        finally:
            run.close()
    for concern in concerns(health):
        say(concern)
    show_results(results, f"{seconds:.0f} s, peak memory {peak:.1f} GiB; saved in {folder}")
    return results


def build_trainer(scenario: Scenario, run: Run, watcher: Watcher) -> Trainer:
    """The scenario's trainer, its model loaded, its computation set to the scenario's threads.

    Raises ScenarioError for environments and models that cannot be had.
    """
    env = try_environment(scenario.environment)
    check_weights(scenario, env)
    if type(env.unwrapped).__module__ == "__main__":
        say(f"{scenario.environment.id} lives in __main__, where commands cannot find it: {IN_A_MODULE}")
    for environment in environments_of(scenario.plan()):
        with contextlib.closing(try_environment(environment)):
            pass
    torch.set_num_threads(scenario.threads or usable_cores())
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    model, renderer = load_model(scenario)
    check_context(scenario, model, renderer, env)
    dtype = computing(scenario, model)
    policy = load_policy(scenario, model, renderer, dtype)
    if not isinstance(policy, WeightSync):
        raise ScenarioError(f"model.policy: {type(policy).__name__} takes no weights (release, push); it can only play")
    with refusing("model.name"):
        return Trainer(
            scenario.plan(),
            model,
            renderer,
            run,
            watcher,
            policy=policy,
            memory=load_memory(scenario, run, renderer),
            dtype=dtype,
            max_rows=scenario.model.max_rows,
        )


def computation(trainer: Trainer) -> str:
    """Where and in what a trainer computes, in words."""
    kernels = getattr(trainer.policy, "kernels", "")  # of a policy in this process
    with_kernels = f", and samples with kernels in {kernels}" if kernels else ""
    return f"the model computes in {str(trainer.dtype).removeprefix('torch.')} on {trainer.model.device}{with_kernels}"


def computing(scenario: Scenario, model: PreTrainedModel) -> torch.dtype:
    """The dtype that the model computes in, with its kernels chosen. ScenarioError where they cannot be had."""
    named = scenario.model.dtype
    dtype = native_dtype(model.device) if named == "auto" else getattr(torch, named)
    with refusing("model.kernels"):
        choose_kernels(model, scenario.model.kernels)
        if scenario.model.kernels == "c":
            library_for(SOURCE, model, dtype, "")
    return dtype


def settled(scenario: Scenario, dtype: torch.dtype) -> Scenario:
    """The scenario with the device and the dtype that the run computes in: resumed elsewhere, it still does."""
    name: Any = str(dtype).removeprefix("torch.")
    device = str(device_named(scenario.model.device))
    return replace(scenario, model=replace(scenario.model, device=device, dtype=name))


def in_own_format(scenario: Scenario, model: str) -> Scenario:
    """The scenario in the action format that the chat template of a model shows."""
    if model == "nano":
        return scenario
    try_environment(scenario.environment).close()  # before a model is fetched for it
    try:
        template = load_tokenizer(model).chat_template
    except Exception:  # of many kinds: whoever loads the model will say why it cannot be had
        return scenario
    return in_format(scenario, format_of(template))


def in_format(scenario: Scenario, name: str) -> Scenario:
    """The scenario with an action format for its environment, unless it names one or the environment takes none."""
    environment = scenario.environment
    if name == DEFAULT or "format" in environment.settings:
        return scenario
    with contextlib.closing(try_environment(environment)) as env:
        inner = env.unwrapped
        takes = inspect.signature(type(inner)).parameters.values()
        if not isinstance(inner, ToolEnv) or inner.format != action_format(DEFAULT):
            return scenario
    if not any(each.name == "format" or each.kind is each.VAR_KEYWORD for each in takes):
        return scenario
    return replace(scenario, environment=replace(environment, settings={**environment.settings, "format": name}))


def placed(scenario: Scenario) -> Scenario:
    """The scenario with the folders in which its modules were found, for commands that run elsewhere."""
    return replace(scenario, look_in=folders_of(asdict(scenario)) or scenario.look_in)


def try_environment(environment: TaskSet) -> TextEnv:
    """The environment at the start of a train task.

    Raises ScenarioError where it does not take the settings or options, or has no such success.
    """
    try:
        env = environment.task("train", 0).make()
    except OSError as error:
        raise ScenarioError(f"environment: {told(error)}") from error
    except (TypeError, ValueError, PartNotFound) as error:
        raise ScenarioError(f"environment: {error}") from error
    for split, options in (("heldout", environment.heldout), ("train", environment.train)):
        try:
            env.reset(seed=0, options=dict(options))
            _check_read(env, options)
        except ValueError as error:
            raise ScenarioError(f"environment.{split}: {error}") from error
    terms = {"format", *env.reward_weights}
    if own_weights(env) and environment.success not in terms:
        raise ScenarioError(f"environment.success: no reward term {environment.success!r}; terms: {sorted(terms)}")
    return env


def _check_read(env: TextEnv, options: Mapping[str, Any]) -> None:
    """ValueError for an option of reset that the environment reads in none of a few episodes."""
    own = env.unwrapped
    if not isinstance(own, ToolEnv):
        return
    known = {"split", *own.options_read}
    for seed in range(1, EPISODES):
        if options.keys() <= known:
            return
        env.reset(seed=seed, options=dict(options))
        known |= own.options_read
    if unread := sorted(options.keys() - known):
        raise ValueError(f"{unread[0]!r} is no option that the environment reads; it reads {', '.join(sorted(known))}")


def check_warmup(scenario: Scenario) -> None:
    """ScenarioError where the environment has no oracle to learn from, no notes of an expert to tell, or does not take
    the warm-up's settings."""
    environment = scenario.environment
    env = try_environment(environment)
    if env.oracle() is None:
        raise ScenarioError(f"warmup.demonstrations: {environment.id} has no oracle; 0 does without")
    if scenario.warmup.told and not env.notes():
        raise ScenarioError(f"warmup.told: {environment.id} has no notes of an expert; 0 does without")
    try:
        environment.task("train", 0, **scenario.warmup.settings).make().close()
    except (TypeError, ValueError, OSError) as error:
        raise ScenarioError(f"warmup.settings: {error}") from error


def own_weights(env: TextEnv) -> Mapping[str, float]:
    """The reward weights of the environment within its wrappers."""
    return env.unwrapped.reward_weights if isinstance(env.unwrapped, TextEnv) else {}


def check_weights(scenario: Scenario, env: TextEnv) -> None:
    """ScenarioError where the reward weights of the improvement are not those of the environment's terms."""
    weights, terms = scenario.improvement.reward_weights, own_weights(env).keys()
    if weights and (wrong := (terms ^ weights.keys()) - {"format"}):
        name = sorted(wrong)[0]
        raise ScenarioError(f"improvement.reward_weights: {name!r} is {'missing' if name in terms else 'no term'}")


def check_context(scenario: Scenario, model: PreTrainedModel, renderer: ChatRenderer, env: TextEnv) -> None:
    """ScenarioError where episodes may outgrow the model's positions, or a train task's prompt leaves no room."""
    sampling, most = scenario.sampling, positions(model)
    if most is not None and sampling.max_context > most:
        raise ScenarioError(
            f"sampling.max_context: {sampling.max_context} tokens, but {scenario.model.name} has positions for {most}; "
            f"--set sampling.max_context={most} ends episodes there"
        )
    task = scenario.environment.task("train", 0)
    _, info = env.reset(seed=task.seed, options=dict(task.options))
    prompt = len(renderer.prompt(info["messages"]))
    if prompt + sampling.max_tokens > sampling.max_context:
        raise ScenarioError(
            f"sampling.max_context: {sampling.max_context} tokens have no room for the prompt of a train task "
            f"({prompt}) and a reply (sampling.max_tokens {sampling.max_tokens})"
        )


def usable_cores(system: Path = Path("/")) -> int:
    """Cores that this process may use: by its affinity, and by the CPU quotas of its control groups under `system`."""
    return max(1, min(len(os.sched_getaffinity(0)), *(math.ceil(quota) for quota in _quotas(system)), 1 << 16))


def _quotas(system: Path) -> Iterator[float]:
    """Cores that each control group of this process allows, of version 2 and 1."""
    try:
        lines = (system / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = system / "sys/fs/cgroup" / controllers
        group = mount / path.lstrip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(mount):
                break
            with contextlib.suppress(OSError, ValueError):
                if controllers:
                    quota, period = (float((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
                else:
                    quota, period = map(float, (folder / "cpu.max").read_text().split())  # "max": no number, no quota
                if quota > 0:
                    yield quota / period


def load_model(scenario: Scenario) -> tuple[PreTrainedModel, ChatRenderer]:
    """The scenario's model and what renders its chats. ScenarioError where there is none."""
    texts = [*vocabulary(scenario)] if scenario.model.name == "nano" else []
    lora = scenario.model.weights == "lora"
    with refusing("model.device"):
        device: Any = device_named(scenario.model.device)
    with refusing("model.name"):
        model, tokenizer = load(scenario.model.name, texts=texts, seed=scenario.seed, merge=not lora)
        model.to(device)
        bring_attention(model, scenario.sampling.max_context)
        renderer = ChatRenderer(tokenizer, ends=end_tokens(model), settings=scenario.model.template)
        if lora and not has_lora(model):
            add_lora(model, scenario.model.lora_rank, scenario.model.lora_alpha, scenario.seed)
        return model, renderer


def load_policy(scenario: Scenario, model: PreTrainedModel, renderer: ChatRenderer, dtype: torch.dtype) -> TokenPolicy:
    """What samples from the scenario's model. ScenarioError."""
    settings = scenario.model
    if scenario.serving.engine == "vllm":
        return served_policy(scenario, model, renderer, dtype)
    if settings.policy is None:
        with refusing("model.name"):
            return TransformersPolicy(
                model, renderer, dtype=dtype, max_rows=settings.max_rows, lockstep=settings.lockstep
            )
    given = {"model": lambda: model, "renderer": lambda: renderer, "dtype": lambda: dtype}
    policy = made_with(settings.policy, "model.policy", **given)
    if not isinstance(policy, TokenPolicy):
        raise ScenarioError(f"model.policy: {type(policy).__name__} has no sample(context, seed, sampling)")
    return policy


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


def vocabulary(scenario: Scenario) -> Iterator[str]:
    """What a model made from scratch must be able to read: some of the environment's episodes, and what an expert would
    write down of them. EpisodeError."""
    for number in range(200):
        task = replace(scenario.environment.task("train", "vocabulary", number), seed=number)
        turn = 0
        with episode_errors(task, turn):
            env, response = open_task(task)
        with contextlib.closing(env):
            yield listed(env.notes()) + mentioned(env.notes())
            while True:
                yield from (message.text for message in response.messages)
                turn += 1
                with episode_errors(task, turn):
                    action = None if response.over else env.oracle()
                    if action is None:
                        break
                    response = act(env, action)
                yield action
