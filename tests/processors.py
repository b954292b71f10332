"""C of ours, compiled for every kind of processor that this one can be."""

from __future__ import annotations

import platform

import pytest
import torch

from treegym.agents.inference.cpu.compiler import OPTIONS, Library, Sizes, Source, compiled

LEVELS = {"DEFAULT": "x86-64", "AVX2": "x86-64-v3", "AVX512": "x86-64-v4"}  # of processors, by torch's names
able = list(LEVELS).index(torch.backends.cpu.get_cpu_capability()) if platform.machine() == "x86_64" else -1
WAYS = ["native", "native, no tiles", *list(LEVELS.values())[: able + 1]]
WARNINGS = ("-Wall", "-Wextra", "-Werror")  # here alone: another compiler's new warning is to stop no user's run


def compiled_for(way: str, source: Source, sizes: Sizes, monkeypatch: pytest.MonkeyPatch) -> Library:
    """The source as a library, by one of the ways; a warning is an error."""
    processor, *without_tiles = way.split(", ")
    if without_tiles:
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    return compiled(source, sizes, [*WARNINGS, *(option.replace("native", processor) for option in OPTIONS)])
