"""ChatTemplate: a tokenizer's chat template as a function from any chat to text that only grows."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from ..envs import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DATE = datetime(2025, 1, 1)  # the day of every episode: a prompt must not change overnight
_TODAY = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")
_ROLES = (("system", "tool"), ("system",), ("tool",), ())  # besides user and assistant; the first that a template has
_ASK = Message("user", "Ask.")
_THOUGHT, _REPLY = "Thought{}.", "Reply{}."  # stand for what an assistant may write; no template has these words


class ChatTemplate:
    """Renders chats of system, user, assistant and tool messages by the template of a tokenizer.

    Where the template has no tool role, results become user messages; where it has no system role, the system text
    opens the first user message. User messages that then follow each other become one. `roles` are those that the
    template has. Raises ValueError, one line, when a growing chat changes what was rendered before.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: Mapping[str, Any]) -> None:
        self.name = tokenizer.name_or_path or type(tokenizer).__name__
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                f"{self.name} has no chat template, which treegym needs to talk in turns; an instruct model has one: "
                f"name that, or put its chat_template.jinja into the folder of this one"
            )
        self._tokenizer, self._settings = tokenizer, dict(settings)
        self.source, self.dated = _dated(tokenizer.get_chat_template())
        if "strftime_now(" in self.source:
            raise ValueError(f"{self.name}: its chat template writes today's date in a way that cannot be fixed")
        self.roles: tuple[str, ...] = ()
        self.joins = False  # whether adjacent user messages become one
        self.joins = not self._shows([Message("user", "First."), Message("user", "Second.")])
        self._settle()

    def render(self, messages: Sequence[Message], *, generation: bool) -> str:
        """The chat, and with `generation` the header after which the assistant speaks."""
        chat = [{"role": message.role, "content": message.text} for message in self._taken(messages)]
        try:
            text = self._tokenizer.apply_chat_template(
                chat, chat_template=self.source, tokenize=False, add_generation_prompt=generation, **self._settings
            )
        except (TemplateError, TypeError, ValueError, LookupError) as error:  # whatever a template may stumble over
            roles = ", ".join(message["role"] for message in chat)
            fault = " ".join(str(error).split())
            raise ValueError(f"{self.name}: its chat template refuses a chat of {roles}: {fault}") from error
        return str(text)

    def around(self, messages: Sequence[Message], *, generation: bool) -> tuple[str, str]:
        """What comes before and after a reply to a user, when `messages` follow it."""
        reply = _REPLY.format(0)
        text = self.render([_ASK, Message("assistant", reply), *messages], generation=generation)
        before, shown, after = text.partition(reply)
        if not shown:
            raise ValueError(f"{self.name}: its chat template does not show what an assistant says")
        return before, after

    @property
    def drops_thinking(self) -> bool:
        """Whether the template leaves the thinking of earlier turns out; an episode keeps it, as it was said."""
        thought, reply = _THOUGHT.format(0), _REPLY.format(0)
        said = Message("assistant", f"<think>\n{thought}\n</think>\n\n{reply}")
        return thought not in self.render([_ASK, said, _ASK], generation=True)

    def _taken(self, messages: Sequence[Message]) -> list[Message]:
        """The messages in the roles that the template has."""
        taken: list[Message] = []
        for message in messages:
            if message.role not in ("user", "assistant", *self.roles):
                message = Message("user", message.text)
            if self.joins and taken and taken[-1].role == message.role == "user":
                message = Message("user", f"{taken.pop().text}\n\n{message.text}")
            taken.append(message)
        return taken

    def _settle(self) -> None:
        """Finds out which roles the template has: those with which chats only grow."""
        joins = self.joins
        for self.roles in _ROLES:
            self.joins = joins or len(self.roles) < 2
            fault = self._fault()
            if not fault:
                return
        raise ValueError(f"{self.name}: {fault}")

    def _fault(self) -> str:
        """Why the text of a growing chat is not that of its turns, one after the other; empty when it is."""
        tools, results = Message("tool", "Result."), [Message("tool", "One."), Message("tool", "Two.")]
        turns = [[tools], results, [Message("user", "Go on.")], [tools], [Message("user", "Why?")]]
        try:
            for start in ([Message("user", "Ask.")], [Message("system", "Rules."), Message("user", "Ask.")]):
                for last in range(len(turns) + 1):
                    if fault := self._changed(start, turns[:last]):
                        return fault
        except ValueError as error:
            return str(error).removeprefix(f"{self.name}: ")
        return ""

    def _changed(self, start: list[Message], turns: list[list[Message]]) -> str:
        """What is wrong where a text before, between or after replies changes as a chat goes on; empty if none does."""
        chat = [*start]
        parts = [self.render(start, generation=True)]
        for number, turn in enumerate(turns):
            chat += [Message("assistant", _REPLY.format(number)), *turn]
            parts.append(self.around(turn, generation=True)[1])
        whole = self.render(chat, generation=True)
        for number, (part, turn) in enumerate(zip(parts, [start, *turns], strict=True)):
            now, _, whole = whole.partition(_REPLY.format(number)) if number < len(turns) else (whole, "", "")
            if missing := [message.role for message in turn if message.text not in part]:
                return f"its chat template does not show the plain text of a {missing[0]} message"
            if now != part and (number == len(turns) or not _same_but_thinking(now, part)):
                roles = " and ".join(dict.fromkeys(message.role for message in turn))
                return (
                    f"its chat template rewrites earlier turns (around {roles} messages), which treegym cannot follow"
                )
        return ""

    def _shows(self, messages: Sequence[Message]) -> bool:
        try:
            text = self.render(messages, generation=True)
        except ValueError:
            return False
        return all(message.text in text for message in messages)


def _same_but_thinking(past: str, new: str) -> bool:
    """Whether two texts before a reply are equal, except that one goes on: with a thought, opened or empty."""
    past, new = past.rstrip(), new.rstrip()
    return past.startswith(new) or new.startswith(past)


def _dated(source: str) -> tuple[str, bool]:
    """The template with a fixed date where it asks for today's, and whether it does."""
    fixed, count = _TODAY.subn(lambda found: repr(DATE.strftime(found[2])), source)
    return fixed, count > 0
