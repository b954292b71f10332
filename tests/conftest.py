"""What holds for every test, and the vLLM server that several files of tests ask."""

from __future__ import annotations

import copy
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:  # torch takes seconds to import
    from transformers import PreTrainedModel

    from treegym.agents.serving.launch import VLLMServer

# Where the tests were started with SIGINT ignored, as in the background of a script, their child processes would
# inherit that, and not hear the Ctrl-C that some tests send them.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def served() -> Iterator[VLLMServer]:
    """SmolLM2 in float32, which takes adapters too."""
    from treegym.agents.models.registry import fetch
    from treegym.agents.serving.launch import ServerOptions, launch

    more = ("--max-num-seqs", "16", "--enable-prompt-tokens-details")
    serving = ServerOptions(
        str(fetch("smollm2")), name="smollm2", dtype="float32", max_model_len=1024, lora_rank=8, more=more
    )
    with launch(serving) as server:
        yield server


@pytest.fixture(scope="session")
def smollm2() -> PreTrainedModel:
    from treegym.agents.models.registry import load

    return load("smollm2")[0]


@pytest.fixture
def model(smollm2: PreTrainedModel) -> PreTrainedModel:
    """A copy of SmolLM2 that the test may change."""
    return copy.deepcopy(smollm2)
