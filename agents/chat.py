"""ChatRenderer: chat messages to tokens, as the differences that the chat template puts between turns."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..envs import Message
from .template import DATE, ChatTemplate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ASK = Message("user", "Ask.")
_TAG = re.compile(r"<[^<>\s]+>")
_OPEN = re.compile(r"<\w+>\s*\Z")


class ChatRenderer:
    """Renders a prompt once and every later observation as the tokens that follow the policy's own.

    `ends` are further tokens that end a turn, as a model's generation config lists them. `settings` go to the chat
    template: {"enable_thinking": False}, {"date_string": "26 Jul 2024"}. Raises ValueError, one line, for templates
    that would show the model other tokens than the policy sampled.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        ends: Iterable[int] = (),
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self._template = ChatTemplate(tokenizer, settings or {})
        added = tokenizer.added_tokens_decoder
        special = {token.content for token in added.values() if token.special}
        self._specials = sorted({*special, *tokenizer.all_special_tokens}, key=len, reverse=True)
        self._any_special = re.compile("|".join(map(re.escape, self._specials)))
        self._opened, self._opening = self._beginning()
        end, self._closing = self._ending()
        self.end_of_turn: int = self._encode(end)[0]  # the token that the template ends a turn with
        self.ends = frozenset((self.end_of_turn, *ends))  # any of these ends one
        turns = {*self._within(self._header()), *tokenizer.convert_ids_to_tokens(sorted(self.ends))}
        # a reply may contain special tokens that the template writes calls with, not those that it writes turns with
        self._foreign = [token for token in self._specials if token in turns or token not in self._template.source]

    @property
    def reading(self) -> tuple[str, ...]:
        """Where chats are not what the template would make of them: a phrase for people for each departure."""
        template = self._template
        phrases = {
            "tool results as user messages": "tool" not in template.roles,
            "system text in the first user message": "system" not in template.roles,
            f"its date is always {DATE:%Y-%m-%d}": template.dated,
            "thinking of earlier turns stays": template.drops_thinking,
            f"replies go on from {self._opened.strip()}": bool(self._opened),
            f"demonstrations begin with {self._opening!r}": bool(self._opening),
        }
        return tuple(phrase for phrase, holds in phrases.items() if holds)

    def prompt(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Tokens of the messages and of the header that asks the policy to speak."""
        return self._encode(self._template.render(self._plain(messages), generation=True))

    def observation(self, messages: Sequence[Message], *, ended: bool) -> tuple[int, ...]:
        """Tokens between the policy's last turn and its next; `ended`: the policy itself sampled an end of turn."""
        text = self._template.around(self._plain(messages), generation=True)[1]
        if ended:
            text = text.partition(self._within(text)[0])[2]
        return self._encode_after(text) if ended else self._encode(text)

    def ended(self, token_ids: Sequence[int]) -> bool:
        """Whether the policy ended its turn itself, rather than being cut or stopped."""
        return bool(token_ids) and token_ids[-1] in self.ends

    def stopped(self, token_ids: Sequence[int], stop: Sequence[str]) -> bool:
        """Whether the last token completes one of the stop texts."""
        if not stop or not token_ids:
            return False
        longest = 1 + max(len(text.encode()) for text in stop)  # in tokens: each holds a byte or more
        tail = list(token_ids[-longest:])
        return any(text in self._decode(tail) and text not in self._decode(tail[:-1]) for text in stop)

    def text(self, token_ids: Sequence[int]) -> str:
        """What the policy said, without the token that ended its turn, but with the tag that its header opened."""
        said = token_ids[:-1] if self.ended(token_ids) else token_ids
        return self._opened + self._decode(said)

    def reply(self, text: str) -> tuple[int, ...]:
        """Tokens of a reply that the policy did not sample, with its end of turn.

        The reply begins as the template begins one without thoughts.
        """
        tag, begun = self._opened.strip(), _TAG.match(self._opening)
        if tag and text.startswith(tag):
            text = text.removeprefix(tag).removeprefix("\n")
        elif not (begun and text.startswith(begun.group())):
            text = self._opening + text
        return (*self._encode_after(_broken(text, self._foreign) + self._closing), self.end_of_turn)

    def _plain(self, messages: Sequence[Message]) -> list[Message]:
        """The messages with their special tokens broken up: a tool's result must not be able to end the turn."""
        return [Message(message.role, _broken(message.text, self._specials)) for message in messages]

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))

    def _decode(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _encode_after(self, text: str) -> tuple[int, ...]:
        """Tokens of a text that follows a special token; some tokenizers put a space before a text on its own."""
        end = str(self.tokenizer.convert_ids_to_tokens(self.end_of_turn))
        return self._encode(end + text)[1:]

    def _within(self, text: str) -> list[str]:
        """The special tokens in a text, in their order."""
        return self._any_special.findall(text)

    def _header(self) -> str:
        """What the template puts between a user's text and the reply."""
        return self._template.render([_ASK], generation=True).rpartition(_ASK.text)[2]

    def _beginning(self) -> tuple[str, str]:
        """The tag that the header opens, and what the template puts between it and a reply without thoughts."""
        header = self._template.render([_ASK], generation=True)
        begun = self._template.around([], generation=False)[0]
        tag = _OPEN.search(header)
        opened = tag.group() if tag else ""
        if begun.startswith(header):
            return opened, begun.removeprefix(header)
        if opened and begun.startswith(header.rstrip()):  # the template closes the tag at once
            return opened, begun.removeprefix(header.rstrip())
        if header.startswith(begun):  # past replies stand without the rest of the header
            return opened, f"\n</{opened.strip()[1:]}\n\n" if opened else ""
        raise self._refusal("begins replies otherwise than it asks for them")

    def _ending(self) -> tuple[str, str]:
        """The token that the template ends a reply with, and the text before it."""
        after = self._template.around([], generation=False)[1]
        end = next(iter(self._within(after)), None)
        if end is None:
            raise self._refusal("puts no special token after a reply, so that nothing ends a turn")
        past = self._within(self._template.around([_ASK], generation=True)[1].partition(_ASK.text)[0])
        # gpt-oss ends the last reply with another token than earlier ones, which end as a user's message does
        if past[:1] != [end] and (len(past) < 2 or past[:1] != self._within(self._header())[:1]):
            raise self._refusal(f"ends the last reply with {end} and does not end earlier ones")
        return end, after.partition(end)[0]

    def _refusal(self, fault: str) -> ValueError:
        return ValueError(f"{self._template.name}: its chat template {fault}")


def _broken(text: str, tokens: Iterable[str]) -> str:
    """The text with these special tokens broken up."""
    for token in tokens:
        if token in text:
            text = text.replace(token, f"{token[:1]} {token[1:]}")
    return text
