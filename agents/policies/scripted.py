"""ScriptedPolicy: replies that a function writes; stands in for a model in tests and baselines."""

from __future__ import annotations

from collections.abc import Callable

from ..chat import ChatRenderer
from ..policy import Completion, Context, Sample, Sampling


class ScriptedPolicy:
    """Says what `script(text so far, seed)` returns."""

    def __init__(self, renderer: ChatRenderer, script: Callable[[str, int], str]) -> None:
        self._renderer = renderer
        self._script = script

    async def sample(self, context: Context, seed: int, sampling: Sampling) -> Sample:
        text = self._script(str(self._renderer.tokenizer.decode(context.tokens())), seed)
        tokens = self._renderer.reply(text)
        return Sample(Completion(text, tokens, (0.0,) * len(tokens)), Context(tokens, context))
