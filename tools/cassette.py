"""Cassette: the answers of outside sources on tape, so that an episode can be played again without them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Self

from .protocol import Conduct, Stateful, Tool, ToolError, ToolResult, TransientError, as_result

Mode = Literal["auto", "record", "play"]


class NotOnTape(LookupError):
    """A question that a cassette in play mode has no answer to."""


class Cassette:
    """A file of questions and answers, one JSON object a line; threads may share it, processes read it only.

    `auto` asks the source what the tape does not hold, and records it; `record` does so with a new tape; `play` asks
    no source. Each question is asked once, also where several threads come with it at a time. Unpickled, a cassette
    that was recording goes on as `auto`.
    """

    def __init__(self, path: Path, mode: Mode = "auto") -> None:
        if mode == "record" and path.exists():
            raise FileExistsError(f"{path} holds a tape already; mode='auto' goes on with it")
        if mode == "play" and not path.exists():
            raise FileNotFoundError(f"there is no tape {path} to play")
        self.path, self.mode = path, mode
        self._lock = threading.Lock()
        self._answers: dict[bytes, Any] | None = None  # read at the first question
        self._asking: dict[bytes, threading.Lock] = {}

    def answer(self, question: Mapping[str, Any], ask: Callable[[], Any]) -> Any:
        """The tape's answer to a question, or the one that `ask` gives, as JSON keeps it. NotOnTape in play mode."""
        text = json.dumps(question, sort_keys=True)
        key = _key(text)
        with self._lock:
            answers = self._read()
            if key in answers:
                return answers[key]
            asking = self._asking.setdefault(key, threading.Lock())
        if self.mode == "play":
            raise NotOnTape(f"{self.path} has no answer to {text}")
        with asking:
            if key in answers:  # while this one waited
                return answers[key]
            answer = json.dumps(ask())
            with self._lock:
                self._append(f'{{"question":{text},"answer":{answer}}}\n')
                answers[key] = json.loads(answer)
                self._asking.pop(key, None)
            return answers[key]

    def _append(self, line: str) -> None:
        """Whole or not at all, lest another line is written behind a torn one."""
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError:
            with contextlib.suppress(OSError):
                os.truncate(self.path, size)
            raise

    def _read(self) -> dict[bytes, Any]:
        if self._answers is None:
            rows = map(json.loads, self._whole_lines())
            self._answers = {_key(json.dumps(row["question"], sort_keys=True)): row["answer"] for row in rows}
        return self._answers

    def _whole_lines(self) -> list[bytes]:
        """Those of the file; what a killed writer left of another is removed."""
        data = self.path.read_bytes() if self.path.exists() else b""
        size = data.rfind(b"\n") + 1
        if size < len(data) and self.mode != "play":
            os.truncate(self.path, size)
        return data[:size].splitlines()

    def __reduce__(self) -> tuple[Any, ...]:
        return Cassette, (self.path, "play" if self.mode == "play" else "auto")

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self


def _key(question: str) -> bytes:
    return hashlib.blake2b(question.encode(), digest_size=16).digest()


class Playhead:
    """Where one branch of an episode stands on a cassette.

    Equal questions are told apart by how often the branch has asked them before, so the branches of a tree may ask in
    any order. Those to a source that keeps a state are told apart by all that the branch has asked of it before; it is
    asked also what the tape holds, but in play mode.
    """

    def __init__(self, cassette: Cassette, episode: str = "") -> None:
        self.cassette = cassette
        self.rewind(episode)

    def rewind(self, episode: str) -> None:
        """To the beginning of an episode; others have answers of their own, even to equal questions."""
        self.episode = episode
        self._asked: dict[str, int] = {}  # how often
        self._history: dict[str, str] = {}  # a digest for each source that keeps a state

    def ask(self, source: str, question: Any, ask: Callable[[], Any], *, stateful: bool = False) -> Any:
        """What the source answers, from the tape if it is there. Question and answer are JSON."""
        text = json.dumps([source, question], sort_keys=True)
        before: int | str = self._history.get(source, "") if stateful else self._asked.get(text, 0)
        full = {"episode": self.episode, "source": source, "question": question, "before": before}
        if stateful and self.cassette.mode != "play":  # it has to hear what it will be asked after
            heard = ask()
            answer = self.cassette.answer(full, lambda: heard)
        else:
            answer = self.cassette.answer(full, ask)
        if stateful:
            self._history[source] = hashlib.blake2b(f"{before}{text}".encode(), digest_size=8).hexdigest()
        else:
            self._asked[text] = int(before) + 1
        return answer

    def fork(self) -> Self:
        twin = type(self)(self.cassette, self.episode)
        twin._asked, twin._history = dict(self._asked), dict(self._history)
        return twin


class Recorded:
    """A tool whose answers go over a cassette; those of a stateful tool depend on all that it was asked before.

    Calls on one playhead run in their order.
    """

    def __init__(self, tool: Tool, playhead: Playhead) -> None:
        self.tool, self.owner = tool, playhead
        self.name, self.description, self.parameters = tool.name, tool.description, tool.parameters
        self.conduct = replace(getattr(tool, "conduct", Conduct()), pure=False)  # the tape keeps the results

    def __call__(self, /, **arguments: Any) -> ToolResult:
        source = getattr(self.tool, "outside", "") or self.name
        question, stateful = {"tool": self.name, "arguments": arguments}, isinstance(self.tool, Stateful)
        answer = self.owner.ask(source, question, lambda: _asked(self.tool, arguments), stateful=stateful)
        if "error" in answer:
            raise (TransientError if answer["transient"] else ToolError)(answer["error"])
        return ToolResult(**answer)

    def fork(self) -> Recorded:
        return Recorded(self.tool.fork(), self.owner.fork())


def _asked(tool: Tool, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What the tool gives, as JSON."""
    try:
        result = as_result(tool(**arguments), tool.name)
    except ToolError as error:
        return {"error": str(error), "transient": isinstance(error, TransientError)}
    return {"text": result.text, "failed": result.failed, "data": result.data, "truncated": result.truncated}
