"""OpenAIPolicy: a model on a server, asked over HTTP in OpenAI's protocol; and ChatPlayer, where it only chats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...envs import Message, TextEnv, ToolEnv
from ...envs.formats.families import shown
from ..chat import ChatRenderer
from ..policy import Completion, Context, CutReply, Sample, Sampling, derive_seed
from ..serving.client import Server, ServerError
from .messages import as_action, chat_rows, read_message, reasoning_name, with_thinking, without_thinking

UNCUT = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}  # whatever the model's folder says


def strange(server: Server, error: Exception) -> ServerError:
    """What is said where an answer lacks what it should have."""
    return ServerError(f"{server.url} answered in another shape: {type(error).__name__}: {error}")


def _stop(sampling: Sampling) -> dict[str, Any]:
    return {"stop": list(sampling.stop)} if sampling.stop else {}


def aborted(reply: Mapping[str, Any]) -> bool:
    """Whether the server gave a request up, as it does where it is paused for new weights: the reply is no turn."""
    choices = reply.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else None
    return isinstance(first, dict) and first.get("finish_reason") == "abort"


class OpenAIPolicy:
    """Samples from /completions with token ids in and out, as vLLM serves them; `renderer` has the model's tokenizer.

    Log-probabilities are the server's, under the model at temperature 1. They are left out at temperatures other than 0
    and 1, where tokens are sampled from another distribution. The server
    draws from its own generator, seeded by rollout and turn.
    """

    def __init__(self, server: Server, model: str, renderer: ChatRenderer) -> None:
        self._server, self._model, self._renderer = server, model, renderer

    async def sample(self, context: Context, seed: int, sampling: Sampling) -> Sample:
        if sampling.entropy:
            raise ValueError(f"{self._server.url} gives no entropies; a policy in this process does")
        body = {
            "model": self._model,
            "prompt": context.tokens(),
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "seed": derive_seed(seed, context.length),
            "logprobs": 0,
            "return_token_ids": True,
            "ignore_eos": True,  # the turn ends with the renderer's tokens alone
            "stop_token_ids": sorted(self._renderer.ends),
            "skip_special_tokens": False,
            **UNCUT,
            **_stop(sampling),
        }
        completion = self._read(await self._server.ask("completions", body, again=aborted), sampling)
        return Sample(completion, Context(completion.token_ids, context))

    def _read(self, reply: Mapping[str, Any], sampling: Sampling) -> Completion:
        try:
            choice = reply["choices"][0]
            token_ids = choice.get("token_ids")
            if token_ids is None:
                raise ServerError(
                    f"{self._server.url} gives no token ids with its completions, so that its tokens would have to be "
                    f"guessed from its text; vLLM does (return_token_ids). Text alone: chat+{self._server.url}"
                )
            tokens = tuple(int(token) for token in token_ids)
            logprobs = tuple(float(p) for p in choice["logprobs"]["token_logprobs"])
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise strange(self._server, error) from None
        if not tokens or len(logprobs) != len(tokens):
            raise ServerError(f"{self._server.url} gave {len(tokens)} tokens and {len(logprobs)} log-probabilities")
        ended = self._renderer.ended(tokens) or self._renderer.stopped(tokens, sampling.stop)
        return Completion(
            text=self._renderer.text(tokens),
            token_ids=tokens,
            logprobs=logprobs if sampling.temperature in (0.0, 1.0) else (),
            stop_reason="stop" if ended else "length",
        )


class ChatPlayer:
    """Asks /chat/completions for text: for servers that take messages only.

    Its tokens are those of this side's tokenizer, it has no log-probabilities, and the server renders the chat its own
    way: success can be measured with it, training cannot start from it. Tool results are sent as the user's messages.

    With `tools`, an environment's tools are sent for the server to render, calls and their results go both ways as
    `tool_calls` and the tool's messages, and a reply without a call is the answer. Calls are read in any case. The
    reasoning that a server tells apart from the reply is part of the action's text; with `reasoning` it is sent back.
    """

    def __init__(
        self, server: Server, model: str, sampling: Sampling, *, tools: bool = False, reasoning: bool = False
    ) -> None:
        self._server, self._model, self._sampling = server, model, sampling
        self._tools, self._reasoning = tools, reasoning
        self._reasoning_name = ""  # the server's field for reasoning; empty until a reply has some

    async def act(self, messages: Sequence[Message], env: TextEnv, seed: int) -> str:
        inner = env.unwrapped
        form = inner.format if isinstance(inner, ToolEnv) else None
        tools = inner.tools if isinstance(inner, ToolEnv) else {}
        native = self._tools and form is not None
        rows = list(chat_rows(messages, form, tools)) if native and form else list(map(self._plain, messages))
        body = {
            "model": self._model,
            "messages": [self._with_reasoning(row) for row in rows],
            "max_tokens": self._sampling.max_tokens,
            "temperature": self._sampling.temperature,
            "seed": derive_seed(seed, len(messages)),
            **_stop(self._sampling),
        }
        if native and tools:
            body["tools"] = [{"type": "function", "function": shown(tool)} for tool in tools.values()]
        reply = await self._server.ask("chat/completions", body, again=aborted)
        try:
            choice = reply["choices"][0]
            message = read_message(choice["message"])
            self._reasoning_name = reasoning_name(choice["message"]) or self._reasoning_name
            cut = choice.get("finish_reason") == "length"
        except (LookupError, TypeError, AttributeError) as error:
            raise strange(self._server, error) from None
        text = message.get("content", "")
        if form and (message.get("tool_calls") or (native and not cut)):
            text = as_action(message, form, tools)
        elif form:
            text = with_thinking(message.get("reasoning_content", ""), text)
        return CutReply(text) if cut else text

    def _plain(self, message: Message) -> dict[str, Any]:
        row = {"role": "user" if message.role == "tool" else message.role, "content": message.text}
        if message.role == "assistant" and self._reasoning_name:
            reasoning, row["content"] = without_thinking(message.text)
            row |= {"reasoning_content": reasoning} if reasoning else {}
        return row

    def _with_reasoning(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row with its reasoning under the server's name for it, if that is sent back; else without."""
        reasoning = row.pop("reasoning_content", None)
        return (
            {**row, self._reasoning_name: reasoning} if reasoning and self._reasoning and self._reasoning_name else row
        )
