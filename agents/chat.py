"""ChatRenderer: chat messages to tokens, as the differences that the chat template puts between turns."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from ..envs import Message, action_format, format_of

_REPLY = "reply"  # stands for any assistant text


class ChatRenderer:
    """Renders a prompt once and every later observation as the tokens that follow the policy's own.

    Raises ValueError when the template changes earlier text as the conversation grows:
    then the policy's tokens would not be the ones the model sees.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.chat_template:
            raise ValueError(f"{tokenizer.name_or_path} has no chat template; treegym needs one to talk in turns")
        self.tokenizer = tokenizer
        specials = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        self._specials = sorted(specials, key=len, reverse=True)
        self._spoken = frozenset(getattr(action_format(format_of(tokenizer.chat_template)), "tokens", ()))
        self._check()

    @cached_property
    def end_of_turn(self) -> int:
        """The token with which the policy ends its turn: the first the template puts after a reply."""
        return self._encode(self._after_reply([], generation=False))[0]

    def prompt(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Tokens of the messages and of the header that asks the policy to speak."""
        return self._encode(self._render(messages, generation=True))

    def observation(self, messages: Sequence[Message], *, ended: bool) -> tuple[int, ...]:
        """Tokens from the policy's last to its next turn; `ended`: it gave the end-of-turn token itself."""
        tokens = self._encode(self._after_reply(messages, generation=True))
        return tokens[1:] if ended else tokens

    def text(self, token_ids: Sequence[int]) -> str:
        """What the policy said, without its end-of-turn token."""
        tokens = list(token_ids)
        if tokens and tokens[-1] == self.end_of_turn:
            tokens.pop()
        return str(self.tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def reply(self, text: str) -> tuple[int, ...]:
        """Tokens of a reply that somebody else wrote, ended."""
        return (*self._encode(self._plain(text, self._spoken)), self.end_of_turn)

    def _after_reply(self, messages: Sequence[Message], *, generation: bool) -> str:
        before = [Message("user", "?"), Message("assistant", _REPLY)]
        whole = self._render([*before, *messages], generation=generation)
        start = self._render(before[:1], generation=True) + _REPLY
        return whole.removeprefix(start)

    def _render(self, messages: Sequence[Message], *, generation: bool) -> str:
        chat = [{"role": message.role, "content": self._plain(message.text)} for message in messages]
        return str(self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=generation))

    def _plain(self, text: str, kept: Collection[str] = ()) -> str:
        """The text with its special tokens broken up, save those that are `kept`: a tool's result must not be able to
        end the turn."""
        for token in self._specials:
            if token in text and token not in kept:
                text = text.replace(token, f"{token[:1]} {token[1:]}")
        return text

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))

    def _check(self) -> None:
        """Growing conversations must extend the earlier text."""
        turns = [Message("system", "s"), Message("user", "u")]
        for role in ("tool", "user"):
            before = self._render(turns, generation=True) + _REPLY
            after = self._render([*turns, Message("assistant", _REPLY), Message(role, "o")], generation=True)
            if not after.startswith(before):
                raise ValueError(
                    f"the chat template of {self.tokenizer.name_or_path} rewrites earlier turns "
                    f"(after a {role} message); treegym needs one that only appends"
                )
