"""C of ours, compiled for every kind of processor that this one can be."""

from __future__ import annotations

import platform
from ctypes import CDLL
from pathlib import Path

import pytest
import torch

from treegym.agents.compiler import OPTIONS, Sizes, compiled

LEVELS = {"DEFAULT": "x86-64", "AVX2": "x86-64-v3", "AVX512": "x86-64-v4"}  # of processors, by torch's names
able = list(LEVELS).index(torch.backends.cpu.get_cpu_capability()) if platform.machine() == "x86_64" else -1
WAYS = ["native", "native, no tiles", *list(LEVELS.values())[: able + 1]]


def compiled_for(way: str, source: Path, sizes: Sizes, monkeypatch: pytest.MonkeyPatch) -> CDLL:
    """The source as a library, by one of the ways."""
    processor, *without_tiles = way.split(", ")
    if without_tiles:
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    return compiled(source, sizes, [option.replace("native", processor) for option in OPTIONS])
