"""Policies learn, adapters alone move under LoRA, and what is saved is what was trained."""

from __future__ import annotations

import asyncio
import math
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedModel

from treegym.agents import ROOT, ChatRenderer, Completion, Context, Node, RolloutTree, Run, Sampling, grow_trees
from treegym.agents.models.lora import add_lora, merged_state
from treegym.agents.models.nano import build_nano
from treegym.agents.models.registry import load
from treegym.agents.policies import ScriptedPolicy
from treegym.agents.policies.sampler import TransformersPolicy
from treegym.agents.rollouts import Chains, EpisodeError, FollowOracle
from treegym.envs import Task, ToolEnv, lookup
from treegym.scenarios.watch import improvement_health
from treegym.trainers import (
    Advantages,
    Algorithm,
    HeldOut,
    Improvement,
    Learner,
    OnFailure,
    Optimization,
    Plan,
    TaskSet,
    Trainer,
    Warmup,
    arpo,
    at2po,
    gigpo,
    grpo,
    tree_grpo,
)
from treegym.trainers.losses import AGGREGATIONS, ClippedLoss, ReinforceLoss
from treegym.trainers.packing import Pack, pack, score
from treegym.trainers.stages.improve import _distance, _mismatch

ONE_HOP = TaskSet("treegym/Lookup-v0", {"hops": [1]})


class BanditEnv(ToolEnv):
    """Two answers, one of them right; the oracle gives either."""

    instructions = "Choose."
    max_turns = 1
    reward_weights: Mapping[str, float] = {"exact": 1.0}

    def begin(self, options: Mapping[str, Any]) -> str:
        self.guess = str(self.np_random.choice(["red", "blue"]))
        return "Red or blue?"

    def score(self, answer: str) -> dict[str, float]:
        return {"exact": float(answer == "blue")}

    def oracle(self) -> str | None:
        return None if self.over else self.write_answer(self.guess)


gymnasium.register("tests/Bandit-v0", BanditEnv)


class Silent:
    """Watches without a word."""

    def begin(self, stage: str, total: int) -> None: ...

    def advance(self, note: str = "") -> None: ...

    def should_stop(self) -> bool:
        return False


def nano(texts: Sequence[str] = (), seed: int = 0) -> tuple[PreTrainedModel, ChatRenderer]:
    model, tokenizer = build_nano(texts or lookup.vocabulary(), seed)
    return model, ChatRenderer(tokenizer)


def trainer(plan: Plan, folder: Path, texts: Sequence[str] = ()) -> Trainer:
    model, renderer = nano(texts, plan.seed)
    return Trainer(plan, model, renderer, Run(folder), Silent(), dtype=torch.float32)


def demonstrations(renderer: ChatRenderer, n: int = 8) -> list[RolloutTree]:
    policy = ScriptedPolicy(renderer, lambda text, seed: "")  # the oracle plays
    tasks = [ONE_HOP.task("train", i) for i in range(n)]
    return asyncio.run(grow_trees(tasks, FollowOracle(), policy, renderer, Sampling()))


def imitated(trees: Sequence[RolloutTree]) -> list[tuple[RolloutTree, Advantages]]:
    return [(tree, [[1.0] * len(path) for path in tree.paths]) for tree in trees]


@pytest.mark.parametrize(
    ("algorithm", "seed"),
    [(grpo(8), 0), (grpo(8), 1), (grpo(8), 2), (gigpo(8), 0), (arpo(4, 8), 0), (tree_grpo(4, 1), 0)],
    ids=str,
)
def test_rewards_teach_what_demonstrations_leave_open(algorithm: Algorithm, seed: int, tmp_path: Path) -> None:
    """The demonstrations are right half of the time; rewards then teach the right half. Measured as it samples."""
    plan = Plan(
        TaskSet("tests/Bandit-v0"),
        algorithm,
        Sampling(max_tokens=8),
        Warmup(96, optimization=Optimization(1e-3, warmup_steps=2)),
        Improvement(16, tasks_per_step=2, optimization=Optimization(3e-4, warmup_steps=2)),
        HeldOut(40, untrained=0),
        seed=seed,
    )
    results = trainer(plan, tmp_path, ["<answer>red blue</answer> Choose. Red or blue?"]).train()
    before, after = (results[stage].success.mean for stage in ("warmed up", "trained"))
    assert before < 0.75 and after > 0.75 and after - before > 0.2


def test_warm_up_solves_the_tasks_it_was_shown() -> None:
    model, renderer = nano()
    trees = demonstrations(renderer)
    learner = Learner(model, Optimization(3e-3), dtype=torch.float32)
    losses = [learner.update(imitated(trees), ReinforceLoss())["loss"] for _ in range(40)]
    assert losses[0] > 3 and losses[-1] < 0.05
    policy = TransformersPolicy(model, renderer, dtype=torch.float32)
    played = asyncio.run(
        grow_trees([t.task for t in trees], Chains(1), policy, renderer, Sampling(temperature=0, max_tokens=8))
    )
    assert [tree.term("exact") for tree in played] == [(1.0,)] * len(trees)


def test_imitation_of_a_certain_reply_is_its_likelihood() -> None:
    """The loss of a demonstration is the mean negative log-likelihood of the oracle's tokens in the plain model."""
    model, renderer = nano()
    [tree] = demonstrations(renderer, 1)
    loss = Learner(model, Optimization(), dtype=torch.float32).update(imitated([tree]), ReinforceLoss())["loss"]
    fresh, _ = nano()
    tokens = torch.tensor(tree.tokens(tree.paths[0]))
    logprobs = torch.log_softmax(fresh(input_ids=tokens[None]).logits[0], -1)
    at, likelihoods = len(tree.prompt), []
    for node in tree.nodes:
        said = range(at, at + len(node.action.token_ids))
        likelihoods += [logprobs[i - 1, tokens[i]].item() for i in said]
        at = said.stop + len(node.observation)
    assert loss == pytest.approx(-sum(likelihoods) / len(likelihoods), rel=1e-5)


# LoRA and saved models


@pytest.fixture(scope="module", params=["full", "lora"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, str, Any]:
    """A trainer after some updates, which weights may move, and the weights before."""
    plan = Plan(ONE_HOP, grpo(2), Sampling(max_tokens=6), heldout=HeldOut(0))
    model, renderer = nano()
    if request.param == "lora":
        add_lora(model, rank=4, alpha=8, seed=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    done = Trainer(plan, model, renderer, Run(tmp_path_factory.mktemp("run")), Silent(), dtype=torch.float32)
    learner = Learner(model, Optimization(1e-2), dtype=torch.float32)
    for _ in range(3):
        learner.update(imitated(demonstrations(renderer)), ReinforceLoss())
    done.policy.refresh(1)
    return done, request.param, before


def test_lora_moves_adapters_and_nothing_else(trained: tuple[Trainer, str, Any]) -> None:
    done, weights, before = trained
    after = done.model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    adapters = {name for name in before if ".lora_" in name}
    assert moved == (adapters if weights == "lora" else set(before))
    assert bool(adapters) == (weights == "lora")


def test_the_sampler_is_the_trained_model(trained: tuple[Trainer, str, Any]) -> None:
    done, _, _ = trained
    context = Context(done.renderer.prompt(demonstrations(done.renderer, 1)[0].messages))
    sample = asyncio.run(done.policy.sample(context, 5, Sampling(max_tokens=6)))
    logits = plain_logits(done.model, sample.context.tokens())
    ids = sample.completion.token_ids
    expected = torch.log_softmax(logits, -1)[-len(ids) - 1 : -1][range(len(ids)), list(ids)]
    torch.testing.assert_close(torch.tensor(sample.completion.logprobs), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_saved_model_is_the_trained_model(
    trained: tuple[Trainer, str, Any], dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adapters merged, weights rounded to the computation's dtype, and otherwise the same to the bit."""
    done, _, _ = trained
    monkeypatch.setattr(done, "dtype", dtype)
    done.save_model(tmp_path / "model")
    assert {tensor.dtype for tensor in load_file(tmp_path / "model" / "model.safetensors").values()} == {dtype}
    saved, tokenizer = load(tmp_path / "model")
    assert tokenizer.chat_template == done.renderer.tokenizer.chat_template
    tokens = list(done.renderer.prompt(demonstrations(done.renderer, 1)[0].messages))
    assert tokenizer.decode(tokens) == done.renderer.tokenizer.decode(tokens)
    logits = plain_logits(saved, tokens)
    rounded, _ = nano()
    rounded.load_state_dict({name: x.to(dtype).float() for name, x in merged_state(done.model).items()})
    assert torch.equal(logits, plain_logits(rounded, tokens))
    if dtype == torch.float32:
        torch.testing.assert_close(logits, plain_logits(done.model, tokens), atol=1e-4, rtol=1e-4)


def test_a_failure_while_a_model_is_saved_leaves_the_former_one_whole(
    trained: tuple[Trainer, str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At any time: before the weights, between the weights and the tokenizer, and where the folders change places."""
    done, _, _ = trained
    best = tmp_path / "models" / "best"

    def files() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def interrupt(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    def interrupt_the_second(self: Path, target: Path) -> Path:
        if self.name == "best.part":
            raise KeyboardInterrupt
        return self.rename(target)

    done.save_model(best)
    before = files()
    parameter = next(p for p in done.model.parameters() if p.requires_grad)
    monkeypatch.setattr(parameter, "data", parameter.data + 1)
    for place, name, failure in (
        (done.model, "save_pretrained", interrupt),
        (done.renderer.tokenizer, "save_pretrained", interrupt),
        (Path, "replace", interrupt_the_second),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, failure)
            with pytest.raises(KeyboardInterrupt):
                done.save_model(best)
        assert files() == before
    done.save_model(best)
    after = files()
    assert after.keys() == before.keys() and after != before


def plain_logits(model: PreTrainedModel, tokens: Sequence[int]) -> Tensor:
    """Of transformers' own attention."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        logits: Tensor = model(input_ids=torch.tensor([list(tokens)])).logits[0]
    model.set_attn_implementation(before)
    return logits


# optimisation


def test_the_rate_rises_stays_and_falls() -> None:
    assert [Optimization(1.0, warmup_steps=3).rate(step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    falling = Optimization(1.0, warmup_steps=1, decay_steps=4)
    assert [falling.rate(step) for step in range(7)] == [0.5, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    assert Optimization(0.5).rate(0) == 0.5


def chain(*actions: Sequence[int], old: float = -4.0) -> RolloutTree:
    """Rollouts of one turn, all different, over a vocabulary of 50."""
    nodes = tuple(Node(ROOT, Completion("", tuple(a), (old,) * len(a)), terminated=True) for a in actions)
    return RolloutTree(Task("none", 0), (1, 2, 3), (), nodes, tuple(range(len(nodes))))


def test_many_small_packs_are_one_large_pack() -> None:
    """In float64, and on a model whose norms do not round on the way: the step is the same to 12 digits."""
    batch: list[tuple[RolloutTree, Advantages]] = [
        (chain((5, 6, 7), (8, 9), (10,)), [[1.0], [-0.5], [0.3]]),
        (chain((11, 12, 13, 14), (5,)), [[0.7], [-0.7]]),
        (chain((20, 21), (22,), old=-3.0), [[0.0], [0.4]]),
    ]
    ends = []
    for max_tokens, expected_packs in ((1000, 1), (6, 5)):
        model = gpt2()
        learner = Learner(model, Optimization(1e-3, max_tokens=max_tokens), dtype=torch.float64)
        packs: list[Pack] = []
        metrics = [learner.update(batch, ClippedLoss(), on_pack=packs.append) for _ in range(2)][-1]
        assert len(packs) == 2 * expected_packs
        ends.append((metrics["loss"], metrics["grad_norm"], metrics["loss_terms"], *model.state_dict().values()))
    for one, many in zip(*ends, strict=True):
        torch.testing.assert_close(torch.as_tensor(one), torch.as_tensor(many), atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_the_learner_s_distribution_has_the_sampler_s_temperature(temperature: float) -> None:
    """Loss and gradients are those of log_softmax(logits / temperature), also where rollouts share a prediction."""
    actions, advantages = [(5, 6, 7), (5, 8), (9,)], [1.0, -0.6, 0.3]
    model, plain = gpt2(), gpt2()
    learner = Learner(model, Optimization(), dtype=torch.float64, temperature=temperature)
    scored = score([(chain(*actions), [[a] for a in advantages])], AGGREGATIONS["token-sum"])
    got = learner.accumulate(pack(scored, torch.float64), ReinforceLoss())["loss"]
    expected = torch.zeros((), dtype=torch.float64)
    for action, advantage in zip(actions, advantages, strict=True):
        logits = plain(input_ids=torch.tensor([[1, 2, 3, *action]])).logits[0, 2:-1]
        expected -= advantage * torch.log_softmax(logits / temperature, -1)[range(len(action)), list(action)].sum()
    expected.backward()  # type: ignore[no-untyped-call]
    assert got == pytest.approx(expected.item(), rel=1e-10)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-11, rtol=1e-9)


def gpt2() -> PreTrainedModel:
    sizes = {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = GPT2Config(**sizes, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0, bos_token_id=None, eos_token_id=None)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model.double()


def test_gradients_are_clipped_and_a_silent_batch_moves_nothing() -> None:
    tree = chain((5, 6), (7,))
    model = gpt2()
    learner = Learner(model, Optimization(1e-3, max_grad_norm=1e-3, warmup_steps=1), dtype=torch.float64)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert learner.update([(tree, [[0.0], [0.0]])], ClippedLoss())["grad_norm"] == 0
    assert learner.step == 0 and all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    metrics = learner.update([(tree, [[1.0], [-1.0]])], ClippedLoss())
    assert metrics["grad_norm"] > 1e-3 and metrics["learning_rate"] == 5e-4
    first_moments = [state["exp_avg"] for state in learner.optimizer.state.values()]
    clipped = torch.cat([moment.flatten() for moment in first_moments]).norm().item() / (1 - 0.9)
    assert clipped == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("advantage", [math.nan, math.inf, 1e38])
def test_a_gradient_that_is_not_finite_moves_nothing_and_is_counted(advantage: float) -> None:
    """Weights, optimiser and learning rate are what they were; the next batch trains as if there had been none."""
    good: list[tuple[RolloutTree, Advantages]] = [(chain((5, 6), (7,)), [[1.0], [-1.0]])]
    ends = []
    for first in ([], [(chain((8,), (9,)), [[advantage], [-1.0]])]):
        model = gpt2().float()
        learner = Learner(model, Optimization(1e-3, warmup_steps=2), dtype=torch.float32)
        for bad in first:
            metrics = learner.update([bad], ReinforceLoss("token-sum"))
            assert metrics["skipped_updates"] == 1 and metrics["grad_norm"] == 0
            assert all(math.isfinite(value) for value in metrics.values())
        assert learner.update(good, ClippedLoss())["skipped_updates"] == 0
        ends.append([*model.state_dict().values(), learner.tensors()["learner.step"]])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_clip_fraction_is_the_share_of_terms_that_the_loss_clips() -> None:
    """Old log-probabilities of 0 make every ratio tiny: below the bound, only terms of negative advantage are cut."""
    model = gpt2()
    learner = Learner(model, Optimization(0.0), dtype=torch.float64)
    batch: list[tuple[RolloutTree, Advantages]] = [(chain((5, 6, 7), (8,), (9,), old=0.0), [[-1.0], [1.0], [0.0]])]
    assert learner.update(batch, ClippedLoss())["clip_fraction"] == 3 / 4  # the rollout without advantage has no terms


def test_old_log_probabilities_can_be_the_learner_s() -> None:
    """Those of the plain model, for every rollout and in many packs; then no ratio differs from 1 before an update."""
    actions = [(5, 6, 7), (5, 8), (9,)]
    model = gpt2()
    learner = Learner(model, Optimization(1e-2, max_tokens=6), dtype=torch.float64)
    tree = learner.with_own_logprobs(chain(*actions))
    for node, action in zip(tree.nodes, actions, strict=True):
        logits = plain_logits(model, [1, 2, 3, *action])[2:-1]
        expected = torch.log_softmax(logits, -1)[range(len(action)), list(action)].tolist()
        assert node.action.logprobs == pytest.approx(expected, rel=1e-10)
    batch: list[tuple[RolloutTree, Advantages]] = [(tree, [[1.0], [-1.0], [0.5]])]
    narrow = ClippedLoss(1e-6, 1e-6)
    before, after = (learner.update(batch, narrow) for _ in range(2))
    assert before["clip_fraction"] == 0 and before["ratio_deviation"] < 1e-6
    assert after["clip_fraction"] > 0 and after["ratio_deviation"] > 1e-3


def test_the_mismatch_of_sampler_and_learner_by_hand() -> None:
    """One token of four was recorded 0.2 nats too likely: the learner finds it 0.82 times as likely."""
    model = gpt2()
    plain = Learner(model, Optimization(0.0), dtype=torch.float64)
    exact = plain.with_own_logprobs(chain((5, 6), (7, 8)))
    first, *others = exact.nodes
    shifted = replace(first.action, logprobs=(first.action.logprobs[0], first.action.logprobs[1] + 0.2))
    tree = replace(exact, nodes=(replace(first, action=shifted), *others))
    found = [_distance([tree], [exact])]
    for max_tokens in (1000, 4):  # in one pack and in two
        learner = Learner(model, Optimization(0.0, max_tokens=max_tokens), dtype=torch.float64)
        batch: list[tuple[RolloutTree, Advantages]] = [(tree, [[1.0], [-1.0]])]
        found.append(_mismatch(learner.update(batch, ClippedLoss())))
    for mismatch in found:
        assert mismatch == pytest.approx(
            {"sampler_deviation": 0.05, "sampler_deviation_max": 0.2, "sampler_ratios_off": 0.25}, abs=1e-9
        )


def test_a_step_s_mismatch_is_that_before_its_first_update(tmp_path: Path) -> None:
    """In float32 sampler and learner agree until the first of two large updates; ratios of the second start there."""
    improvement = Improvement(2, tasks_per_step=4, updates_per_step=2, optimization=Optimization(1e-2))
    warmup = Warmup(64, optimization=Optimization(1e-3))
    plan = Plan(TaskSet("tests/Bandit-v0"), grpo(8), Sampling(max_tokens=8), warmup, improvement, HeldOut(0))
    one = trainer(plan, tmp_path, ["<answer>red blue</answer> Choose. Red or blue?"])
    one.train()
    rows = [row for row in one.run.metrics() if row["stage"] == "improvement"]
    assert len(rows) == 2 and rows[0]["ratio_deviation"] > 1e-2
    for row in rows:
        assert row["sampler_deviation"] <= row["sampler_deviation_max"] < 1e-3 and row["sampler_ratios_off"] == 0
    health = improvement_health(one.run.metrics())
    assert health["sampler_deviation_max"] == max(row["sampler_deviation_max"] for row in rows) > 0
    assert health["sampler_ratios_off"] == 0
    assert "sampler_deviation_max" not in improvement_health(
        [{"informative": 1, "trained_tokens": 1}]
    )  # an older run's
    assert not any("max" in name for row in one.run.metrics() if row["stage"] == "warm-up" for name in row)


def test_at2po_trains_on_ratios_that_begin_at_one(tmp_path: Path) -> None:
    """In bfloat16 sampler and learner differ by more than its bounds; none of its loss is clipped for that."""
    texts = ["<answer>red blue</answer> Choose. Red or blue?"]
    improvement = Improvement(1, tasks_per_step=16, optimization=Optimization(1e-4))
    algorithm = replace(at2po(), rollout=Chains(8))
    shares = []
    for old in ("sampler", "learner"):
        chosen = replace(algorithm, loss=replace(algorithm.loss, old=old))
        warmup = Warmup(64, optimization=Optimization(1e-3))
        plan = Plan(TaskSet("tests/Bandit-v0"), chosen, Sampling(max_tokens=8), warmup, improvement, HeldOut(0))
        model, renderer = nano(texts)
        run = Run(tmp_path / old)
        Trainer(plan, model, renderer, run, Silent(), dtype=torch.bfloat16).train()
        row = run.metrics()[-1]
        shares.append(row["clip_fraction"])
        assert 1e-4 < row["sampler_deviation"] < 0.1 and row["sampler_deviation"] < row["sampler_deviation_max"] < 1
    assert shares[0] > 0 and shares[1] == 0
    assert at2po().loss.needs == {"old"}


def test_an_optimiser_s_state_goes_on_where_it_was_saved() -> None:
    batch: list[tuple[RolloutTree, Advantages]] = [(chain((5, 6), (7,)), [[1.0], [-1.0]])]
    whole, parted = gpt2(), gpt2()
    learner = Learner(whole, Optimization(1e-3, warmup_steps=4), dtype=torch.float64)
    for _ in range(4):
        learner.update(batch, ClippedLoss())
    first = Learner(parted, Optimization(1e-3, warmup_steps=4), dtype=torch.float64)
    for _ in range(2):
        first.update(batch, ClippedLoss())
    second = Learner(parted, Optimization(1e-3, warmup_steps=4), dtype=torch.float64)
    second.load({name: tensor.clone() for name, tensor in first.tensors().items()})
    for _ in range(2):
        second.update(batch, ClippedLoss())
    assert second.step == 4
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parted.parameters(), strict=True))


# failures


class MoodyEnv(BanditEnv):
    """Raises in some of its tasks, at the reset or at the answer; its oracle always answers blue."""

    def begin(self, options: Mapping[str, Any]) -> str:
        self.mood = options.get("mood", "fine") if self.np_random.random() < 0.3 else "fine"
        if self.mood == "reset":
            raise LookupError("the table is gone")
        return super().begin(options)

    def score(self, answer: str) -> dict[str, float]:
        return {"exact": 1 / 0 if self.mood == "score" else float(answer == "blue")}

    def score_unanswered(self) -> dict[str, float]:
        return {"exact": math.nan if self.mood == "score" else 0.0}


gymnasium.register("tests/Moody-v0", MoodyEnv)


def moody(mood: str, on_failure: OnFailure) -> Plan:
    return Plan(
        TaskSet("tests/Moody-v0", train={"mood": mood}, heldout={"mood": mood}),
        grpo(4),
        Sampling(max_tokens=8),
        Warmup(16, batch_size=4),
        Improvement(2, tasks_per_step=8),
        HeldOut(12, untrained=0),
        on_failure=on_failure,
        max_failures=1.0,
    )


@pytest.mark.parametrize("mood", ["reset", "score"])
def test_a_failed_episode_stops_a_run_and_names_its_task(mood: str, tmp_path: Path) -> None:
    with pytest.raises(
        EpisodeError, match=r"^tests/Moody-v0, seed \d+, options .*, turn \d: (Lookup|ZeroDiv).* in begin|s"
    ) as e:
        trainer(moody(mood, "stop"), tmp_path, ["<answer>red blue</answer> Choose. Red or blue?"]).train()
    assert e.value.turn == (0 if mood == "reset" else 1) and e.value.__cause__ is not None
    assert e.value.task.make().reset(seed=e.value.task.seed)  # without the option all is well


@pytest.mark.parametrize("mood", ["reset", "score"])
def test_a_run_can_leave_failed_tasks_out(mood: str, tmp_path: Path) -> None:
    """Their siblings are trained and recorded, they are counted and named, and count as no success where measured."""
    run = trainer(moody(mood, "skip"), tmp_path, ["<answer>red blue</answer> Choose. Red or blue?"])
    results = run.train()
    rows = run.run.metrics()
    failed = {
        stage: [row for row in rows if row["stage"] == stage and "failures" in row] for stage in ("warm-up", "trained")
    }
    assert failed["warm-up"] and failed["trained"]
    assert all("tests/Moody-v0, seed" in text for row in rows for text in row.get("failures", ()))
    grown = [labels for labels, _ in run.run.trees if labels["stage"] == "trained"]
    [count] = [row["failed_tasks"] for row in failed["trained"]]
    assert len(grown) + count == len(results["trained"].tasks) == 12
    assert sum(row["stage"] == "improvement" for row in rows) == 2


# TensorBoard


class StubWriter:
    """Stands in for TensorBoard's writer; what was written counts once it is closed."""

    shown: dict[str, list[tuple[str, float, int]]]

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True)
        self.rows: list[tuple[str, float, int]] = []

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.rows.append((tag, value, step))

    def close(self) -> None:
        (self.folder / "events").write_text(repr(self.rows))


def test_metrics_go_to_tensorboard_where_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub = types.ModuleType("torch.utils.tensorboard")
    stub.SummaryWriter = StubWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stub)
    run = Run(tmp_path)
    run.log(stage="warm-up", step=0, loss=2.5, note="text", seconds={"update": 0.1})
    run.log(stage="warmed up", step=1, success=0.5)
    first = [("warm-up/loss", 2.5, 0), ("warm-up/seconds/update", 0.1, 0), ("warmed-up/success", 0.5, 1)]
    run.close()
    assert shown(tmp_path) == first
    run.close()
    resumed = Run(tmp_path)
    resumed.log(stage="improvement", step=0, loss=1)
    resumed.close()
    assert shown(tmp_path) == [*first, ("improvement/loss", 1, 0)]  # nothing twice


def shown(folder: Path) -> Any:
    return eval((folder / "tensorboard" / "events").read_text())


def test_without_tensorboard_there_is_no_folder_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    run = Run(tmp_path)
    run.log(stage="warm-up", step=0, loss=2.5)
    run.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
