"""The sampler's tokens, probabilities and caches are those of the plain model."""

from __future__ import annotations

import asyncio
import math
import shutil
from collections.abc import Sequence

import pytest
import torch
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedModel, PreTrainedTokenizerBase, Qwen2Config

from treegym.agents import ChatRenderer, Completion, Context, Sample, Sampling, derive_seed
from treegym.agents.inference.cpu.native import NativeForward
from treegym.agents.models.nano import build_nano
from treegym.agents.policies.sampler import TransformersPolicy, draw, entropy
from treegym.envs import Message

WORDS = ["red green blue lookup answer start follow link links tool user assistant system"]
PROMPTS = [[Message("user", f"start at {word}, follow 2 links")] for word in ("red", "green", "blue red green")]


def model_of(kind: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    nano, tokenizer = build_nano(WORDS)
    size = {"vocab_size": len(tokenizer), "bos_token_id": None, "eos_token_id": None}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "qwen2":
            small = {"hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
            return AutoModelForCausalLM.from_config(
                Qwen2Config(**size, **small, num_key_value_heads=2)
            ).eval(), tokenizer
        if kind == "gpt2":
            return AutoModelForCausalLM.from_config(
                GPT2Config(**size, n_embd=32, n_layer=2, n_head=4)
            ).eval(), tokenizer
    return nano.eval(), tokenizer


@pytest.fixture(params=["llama native", "llama", "llama tiles", "qwen2 native", "qwen2", "gpt2 tiles"])
def parts(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> tuple[PreTrainedModel, ChatRenderer, TransformersPolicy]:
    """Passes are those of C, or of torch; there decoding attends in the one or the other way, whether this processor
    multiplies tiles or not."""
    kind, *way = request.param.split()
    if way == ["native"] and shutil.which("cc") is None:
        pytest.skip("needs a C compiler, as `cc`")
    if way != ["native"]:
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: way == ["tiles"])
        monkeypatch.setenv("CC", "no-compiler")
    model, tokenizer = model_of(kind)
    renderer = ChatRenderer(tokenizer)
    policy = TransformersPolicy(model, renderer, dtype=torch.float32, max_rows=5)
    assert isinstance(policy._forward, NativeForward) == (way == ["native"])
    return model, renderer, policy


def ask(policy: TransformersPolicy, asked: Sequence[tuple[Context, int]], sampling: Sampling) -> list[Sample]:
    async def all_at_once() -> list[Sample]:
        return await asyncio.gather(*(policy.sample(context, seed, sampling) for context, seed in asked))

    return asyncio.run(all_at_once())


def plain_logprobs(model: PreTrainedModel, tokens: list[int], temperature: float) -> torch.Tensor:
    model.set_attn_implementation("eager")
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([tokens])).logits[0]
    model.set_attn_implementation("treegym")
    return torch.log_softmax(logits / temperature, -1)


def test_probabilities_over_turns_and_forks_are_the_models(parts) -> None:
    model, renderer, policy = parts
    sampling = Sampling(temperature=0.7, max_tokens=6, entropy=True)
    contexts = [Context(renderer.prompt(messages)) for messages in PROMPTS]
    first = ask(policy, [(context, seed) for context in contexts for seed in range(4)], sampling)
    grown = [Context(renderer.observation([Message("tool", "blue")], ended=False), x.context) for x in first]
    second = ask(policy, [(context, seed) for context in grown for seed in (7, 8)], sampling)
    for sample in [*first, *second]:
        tokens, own = sample.context.tokens(), sample.completion
        logprobs = plain_logprobs(model, tokens, 0.7)[-len(own.token_ids) - 1 : -1]
        chosen = logprobs[range(len(own.token_ids)), list(own.token_ids)]
        torch.testing.assert_close(torch.tensor(own.logprobs), chosen, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(
            torch.tensor(own.entropies), -(logprobs.exp() * logprobs).sum(-1), atol=1e-3, rtol=1e-3
        )


def test_greedy_is_transformers_generate(parts) -> None:
    model, renderer, policy = parts
    for messages in PROMPTS:
        context = Context(renderer.prompt(messages))
        ours = ask(policy, [(context, 0)], Sampling(temperature=0, max_tokens=12))[0].completion.token_ids
        model.set_attn_implementation("eager")
        prompt = torch.tensor([context.tokens()])
        end, attention = renderer.end_of_turn, torch.ones_like(prompt)
        theirs = model.generate(
            prompt, attention_mask=attention, max_new_tokens=12, do_sample=False, eos_token_id=end, pad_token_id=end
        )
        model.set_attn_implementation("treegym")
        assert list(ours) == theirs[0, prompt.shape[1] :].tolist()


def test_tokens_do_not_depend_on_the_company(parts) -> None:
    _, renderer, policy = parts
    contexts = [Context(renderer.prompt(messages)) for messages in PROMPTS]
    asked = [(context, derive_seed(i, j)) for i, context in enumerate(contexts) for j in range(5)]
    together = ask(policy, asked, Sampling(max_tokens=8))
    for (context, seed), sample in zip(asked, together, strict=True):
        alone = ask(policy, [(Context(tuple(context.tokens())), seed)], Sampling(max_tokens=8))[0]
        assert alone.completion.token_ids == sample.completion.token_ids


def test_every_context_is_computed_once(parts) -> None:
    _, renderer, policy = parts
    prompt = Context(renderer.prompt(PROMPTS[0]))
    first = ask(policy, [(prompt, seed) for seed in range(8)], Sampling(max_tokens=4))
    assert policy.prefilled_tokens == prompt.length
    observation = renderer.observation([Message("tool", "red")], ended=False)
    grown = [Context(observation, sample.context) for sample in first]
    ask(policy, [(context, seed) for context in grown for seed in range(3)], Sampling(max_tokens=4))
    again = 8 * (1 + len(observation))  # a turn's last token was sampled but not fed
    assert policy.prefilled_tokens == prompt.length + again


def test_what_requests_draw_alike_is_decoded_once(parts) -> None:
    _, renderer, policy = parts
    prompt = Context(renderer.prompt(PROMPTS[0]))
    sampling = Sampling(temperature=0.1, max_tokens=6)
    samples = ask(policy, [(prompt, derive_seed(i // 2)) for i in range(5)], sampling)  # an equal seed draws alike
    said = [sample.completion.token_ids for sample in samples]
    distinct = {tokens[:i] for tokens in said for i in range(1, len(tokens) + 1)}
    assert policy.sampled_tokens == len(distinct) < sum(map(len, said))
    assert len({id(sample.context) for sample in samples}) == len(set(said))
    greedy = ask(policy, [(prompt, seed) for seed in range(5)], Sampling(temperature=0, max_tokens=6))
    assert policy.sampled_tokens == len(distinct) + len(greedy[0].completion.token_ids)


def test_refresh_takes_over_weights_and_forgets_old_keys(parts) -> None:
    model, renderer, policy = parts
    context = Context(renderer.prompt(PROMPTS[0]))
    ask(policy, [(context, 0)], Sampling(max_tokens=4))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.3)
    policy.refresh(1)
    sample = ask(policy, [(context, 0)], Sampling(max_tokens=4))[0]
    logprobs = plain_logprobs(model, sample.context.tokens(), 1.0)[-len(sample.completion.token_ids) - 1 : -1]
    chosen = logprobs[range(len(sample.completion.token_ids)), list(sample.completion.token_ids)]
    torch.testing.assert_close(torch.tensor(sample.completion.logprobs), chosen, atol=1e-4, rtol=1e-4)
    assert sample.completion.weights_version == 1


def test_refresh_forgets_what_was_not_finite(parts) -> None:
    """Keys and values that a context does not see have the weight 0, which makes no 0 of what is not a number."""
    model, renderer, policy = parts
    weight = next(model.parameters())
    before = weight.detach().clone()
    weight.data.fill_(float("nan"))
    policy.refresh(1)
    ask(policy, [(Context(renderer.prompt(PROMPTS[2])), seed) for seed in range(5)], Sampling(max_tokens=4))
    weight.data.copy_(before)
    policy.refresh(2)
    sample = ask(policy, [(Context((1, 2, 3)), 0)], Sampling(max_tokens=4))[0]
    assert all(map(math.isfinite, sample.completion.logprobs))


def test_failures_reach_the_caller(parts) -> None:
    _, _, policy = parts
    with pytest.raises(IndexError):
        ask(policy, [(Context((10**6,)), 0)], Sampling())


def test_draw_follows_the_distribution() -> None:
    probabilities = torch.tensor([0.05, 0.0, 0.4, 0.25, 0.3])
    n = 20_000
    uniforms = (torch.arange(n) + 0.5) / n
    tokens = draw(probabilities.log().expand(4, -1), uniforms.view(4, -1))
    counts = torch.bincount(tokens.flatten(), minlength=5).tolist()
    assert counts[1] == 0
    assert counts == pytest.approx([n * p for p in probabilities.tolist()], abs=2)
    assert draw(probabilities.log()[None], torch.tensor([[1 - 2**-24]])).item() == 4


def test_uniforms_are_uniform_and_their_own() -> None:
    from treegym.agents.policy import uniform

    values = [uniform(derive_seed("a", seed), position) for seed in range(200) for position in range(50)]
    counts = [sum(int(v * 20) == i for v in values) for i in range(20)]
    assert chisquare(counts).pvalue > 1e-3
    assert len(set(values)) == len(values)


def test_entropy_of_a_uniform_distribution() -> None:
    uniform = torch.full((1, 8), -math.log(8))
    assert entropy(uniform).item() == pytest.approx(math.log(8))
    assert entropy(uniform, top=2).item() == pytest.approx(math.log(8) / 4)  # not renormalised
    assert entropy(uniform, top=9).item() == pytest.approx(math.log(8))


def test_weights_are_rounded_each_by_itself() -> None:
    """As the learner rounds them: matrices that are bfloat16 already give the same probabilities to the bit."""
    model, tokenizer = model_of("llama")
    renderer = ChatRenderer(tokenizer)
    asked = [(Context(renderer.prompt(PROMPTS[0])), 1)]
    sampling = Sampling(max_tokens=8, temperature=0.0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(len(name)))
    policy = TransformersPolicy(model, renderer, dtype=torch.bfloat16)
    [before] = ask(policy, asked, sampling)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.copy_(parameter.bfloat16())
    policy.refresh(1)
    [after] = ask(policy, asked, sampling)
    assert after.completion.logprobs == before.completion.logprobs


def test_a_turn_ends_with_any_end_token_or_the_token_that_completes_a_stop_text() -> None:
    """The tokens up to there are those that are drawn without ends; nothing after them is drawn."""
    model, tokenizer = model_of("llama")
    renderer = ChatRenderer(tokenizer)
    prompt = renderer.prompt(PROMPTS[0])
    whole = sampled(model, ChatRenderer(tokenizer), prompt, Sampling(max_tokens=24))
    assert whole.stop_reason == "length"
    assert "assistantKA" in whole.text
    second = whole.token_ids[11]
    at = whole.token_ids.index(second) + 1
    early = sampled(model, ChatRenderer(tokenizer, ends=(second,)), prompt, Sampling(max_tokens=24))
    assert (early.token_ids, early.stop_reason) == (whole.token_ids[:at], "stop")
    assert early.text == renderer.text(whole.token_ids[: at - 1])
    between = "tantK"  # begins within a token; the last one ends it
    stopped = sampled(model, renderer, prompt, Sampling(max_tokens=24, stop=(between, "never said")))
    at = next(i for i in range(25) if between in renderer.text(whole.token_ids[:i]))
    assert (stopped.token_ids, stopped.stop_reason) == (whole.token_ids[:at], "stop")
    assert stopped.logprobs == whole.logprobs[:at] and between in stopped.text
    assert not renderer.ended(stopped.token_ids)  # the observation brings the end of the turn


def sampled(model: PreTrainedModel, renderer: ChatRenderer, prompt: tuple[int, ...], sampling: Sampling) -> Completion:
    policy = TransformersPolicy(model, renderer, dtype=torch.float32)
    return ask(policy, [(Context(prompt), 3)], sampling)[0].completion
