"""C of ours as a library, compiled for one model's sizes and this processor when first used."""

from __future__ import annotations

import hashlib
import logging
import os
import shlex
import subprocess
from collections.abc import Sequence
from ctypes import CDLL
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..tools.cache import cached_directory
from .forward import head_dim

OPTIONS = ("-O3", "-march=native", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC")
KEYS = 128  # and values of a slab that lie together

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Sizes:
    """What native.h is compiled for."""

    width: int
    hidden: int
    heads: int
    kv_heads: int
    dim: int
    bfloat16: bool

    @classmethod
    def of(cls, config: Any, dtype: torch.dtype) -> Sizes:
        heads = config.num_attention_heads, config.num_key_value_heads, head_dim(config)
        return cls(config.hidden_size, config.intermediate_size, *heads, dtype == torch.bfloat16)

    def are_tiled(self) -> bool:
        """Whether they are multiples of what native.h takes at a time."""
        return not (self.width % 32 or self.hidden % 32 or self.dim % 32)

    @property
    def qkv(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.dim


def compiled(source: Path, sizes: Sizes, options: Sequence[str] = OPTIONS) -> CDLL:
    """The source as a library, from the cache if it was compiled before.

    Raises OSError, SubprocessError or, for a CC that is no command, ValueError.
    """
    amx = torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx()  # which asks the kernel for leave
    values = [f"-D{name.upper()}={int(value)}" for name, value in (asdict(sizes) | {"amx": amx, "keys": KEYS}).items()]
    command = [*shlex.split(os.environ.get("CC") or "cc"), *options, *values]
    place = ["-I", str(Path(__file__).parent), str(source)]
    text = _run([*command, "-E", "-dD", "-P", *place])  # with what compiler and processor define
    key = hashlib.sha256(text + "\0".join(command).encode()).hexdigest()[:32]

    def build(folder: Path) -> None:
        _run([*command, *place, "-o", str(folder / "native.so"), "-lm"])

    return CDLL(str(cached_directory("native", key, build) / "native.so"))


def _run(command: Sequence[str]) -> bytes:
    return subprocess.run(command, check=True, capture_output=True, timeout=120).stdout


def library_for(source: Path, model: PreTrainedModel, dtype: torch.dtype, without: str) -> CDLL | None:
    """None where it cannot be, for the device, the dtype, the sizes or want of a C compiler; then `without` says, in a
    warning, what that costs."""
    sizes = Sizes.of(model.config, dtype)
    if model.device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16) or not sizes.are_tiled():
        return None
    try:
        return compiled(source, sizes)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or str(error).encode()).decode(errors="replace")
        logger.warning("%s, for %s was not compiled: %s", without, source, said[-500:])
        return None
