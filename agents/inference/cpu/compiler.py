"""C of ours as a library, compiled for one model's sizes and this processor when first used, behind a door that checks.

Every call into C is a `Library.call`. It refuses a tensor that is not what C takes it for, and holds the tensors until
C is done with them.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from ctypes import CDLL, c_float, c_int, c_int64, c_void_p
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ....tools.artefacts import cached_directory
from ..forward import head_dim, is_plain_llama

OPTIONS = ("-O3", "-march=native", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC")
KEYS = 128  # so many keys, or values, of a slab lie together

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes of a model, which native.h is compiled for."""

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
        """Whether the widths are multiples of what native.h takes at a time."""
        return not (self.width % 32 or self.hidden % 32 or self.dim % 32)

    @property
    def qkv(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.dim

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of what C calls real: weights, keys and values."""
        return torch.bfloat16 if self.bfloat16 else torch.float32

    def named(self) -> dict[str, int]:
        """The sizes that the shape of an Array can name."""
        seen = self.heads * self.dim
        wider, widest = max(self.width, seen), max(self.qkv, self.hidden)
        derived = {"qkv": self.qkv, "seen": seen, "inner": 2 * self.hidden, "pairs": self.dim // 2}
        return asdict(self) | derived | {"wider": wider, "widest": widest}


@dataclass(frozen=True, slots=True)
class Array:
    """What C takes as a pointer: numbers of one dtype on a CPU, rows one after the other."""

    dtype: torch.dtype | None  # None: what C calls real
    shape: tuple[int | str, ...]  # a name is a size of the model, or the same size everywhere in a call
    apart: str = ""  # the name of the distance between rows, where these need not touch
    pointers: bool = False  # whether the numbers are addresses of Pointers


def floats(*shape: int | str) -> Array:
    return Array(torch.float32, shape)


def reals(*shape: int | str) -> Array:
    return Array(None, shape)


def pointers(*shape: int | str) -> Array:
    return Array(torch.int64, shape, pointers=True)


class Pointers:
    """Tensors whose addresses C reads from a table, null for None; they live as long as the table."""

    def __init__(self, rows: Sequence[Sequence[Tensor | None]]) -> None:
        self.tensors = rows
        self.addresses = torch.tensor([[0 if x is None else x.data_ptr() for x in row] for row in rows])


# The parameters after the number of threads, in C's order. A number that a shape names is read from the tensors, so
# that C is told no size that they do not have.
Parameters = Mapping[str, Array | type[c_int | c_int64 | c_float]]


@dataclass(frozen=True, slots=True)
class Source:
    """A C file and the functions that it defines."""

    file: Path
    functions: Mapping[str, Parameters]


class Library:
    """A source, compiled for one model's sizes: the only way to its functions."""

    def __init__(self, source: Source, sizes: Sizes, loaded: CDLL) -> None:
        self.sizes, self._named, self._file, self._loaded = sizes, sizes.named(), source.file.name, loaded
        self._functions = {name: taken for name, taken in source.functions.items() if hasattr(loaded, name)}
        self._passed = {name: _passed(parameters) for name, parameters in self._functions.items()}
        for name, parameters in self._functions.items():
            function = getattr(loaded, name)  # the library keeps it; `loaded[name]` would be a new object each time
            function.argtypes = [c_int, *(c_void_p if isinstance(x, Array) else x for x in parameters.values())]
            function.restype = None

    def has(self, function: str) -> bool:
        """Whether the function was compiled: one that this processor has no instructions for is left out."""
        return function in self._functions

    def constant(self, name: str) -> int:
        return c_int.in_dll(self._loaded, name).value

    def call(self, function: str, *arguments: Tensor | Pointers | float) -> None:
        """Calls C with tensors and with the numbers that no shape names, in C's order. It holds the tensors meanwhile.

        ValueError for a tensor of another dtype, shape, layout or device than C would read.
        """
        parameters, threads = self._functions[function], torch.get_num_threads()
        sizes, values = self._named | {"threads": threads}, dict[str, float]()
        for name, value in zip(self._passed[function], arguments, strict=True):
            kind, place = parameters[name], f"{function}: {name}"
            if not isinstance(kind, Array) and isinstance(value, int | float):
                values[name] = value
            elif isinstance(kind, Array) and isinstance(value, Pointers if kind.pointers else Tensor):
                tensor = value.addresses if isinstance(value, Pointers) else value
                values[name] = self.address(place, tensor, kind, sizes)
            else:
                raise TypeError(f"{self._file}: {place} is a {type(value).__name__}")
        getattr(self._loaded, function)(
            threads, *(values[name] if name in values else sizes[name] for name in parameters)
        )

    def address(self, place: str, tensor: Tensor, kind: Array, sizes: dict[str, int]) -> int:
        """The tensor's address. ValueError, with the place, if it is not of the kind; sizes that its shape names for
        the first time are added to `sizes`."""
        dtype, shape = kind.dtype or self.sizes.dtype, kind.shape
        fits = tensor.dim() == len(shape) and all(
            have == (sizes.setdefault(want, have) if isinstance(want, str) else want)
            for want, have in zip(shape, tensor.shape, strict=True)
        )
        if kind.apart and fits:
            sizes[kind.apart], rows_whole = tensor.stride(0), tensor.stride(1) == 1
        else:
            rows_whole = tensor.is_contiguous()
        if fits and rows_whole and tensor.dtype == dtype and tensor.device.type == "cpu":
            return tensor.data_ptr()
        wanted = ", ".join(f"{want} = {sizes[want]}" if want in sizes else str(want) for want in map(str, shape))
        parts = "" if tensor.is_contiguous() else ", not contiguous"
        raise ValueError(
            f"{self._file}: {place} is {_name(tensor.dtype)} {list(tensor.shape)}{parts}, on {tensor.device}; "
            f"C takes {_name(dtype)} [{wanted}], contiguous, on cpu"
        )

    def table(self, place: str, rows: Sequence[Sequence[Tensor | None]], kinds: Sequence[Array]) -> Pointers:
        """A table of rows of tensors of these kinds. ValueError, with the place, for others."""
        for row in rows:
            for column, (tensor, kind) in enumerate(zip(row, kinds, strict=True)):
                if tensor is not None:
                    self.address(f"{place}: weight {column}", tensor, kind, {**self._named})
        return Pointers(rows)


def _passed(parameters: Parameters) -> list[str]:
    """The names of the parameters that a caller passes: all but the numbers that shapes name."""
    arrays = [kind for kind in parameters.values() if isinstance(kind, Array)]
    measured = {name for kind in arrays for name in (*kind.shape, kind.apart)}
    return [name for name, kind in parameters.items() if isinstance(kind, Array) or name not in measured]


def compiled(source: Source, sizes: Sizes, options: Sequence[str] = OPTIONS) -> Library:
    """The source as a library, from the cache if it was compiled before.

    Raises OSError, SubprocessError or, for a CC that is no command, ValueError.
    """
    amx = torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx()  # which asks the kernel for permission
    values = [f"-D{name.upper()}={int(value)}" for name, value in (asdict(sizes) | {"amx": amx, "keys": KEYS}).items()]
    command = [*shlex.split(os.environ.get("CC") or "cc"), *options, *values]
    place = ["-I", str(Path(__file__).parent), str(source.file)]
    text = _run([*command, "-E", "-dD", "-P", *place])  # with the macros that compiler and processor define
    key = hashlib.sha256(text + "\0".join(command).encode()).hexdigest()[:32]

    def build(folder: Path) -> None:
        _run([*command, *place, "-o", str(folder / "native.so"), "-lm"])

    return Library(source, sizes, CDLL(str(cached_directory("native", key, build) / "native.so")))


def _run(command: Sequence[str]) -> bytes:
    return subprocess.run(command, check=True, capture_output=True, timeout=120).stdout


KernelChoice = Literal["auto", "torch", "c"]
_choices: WeakKeyDictionary[PreTrainedModel, KernelChoice] = WeakKeyDictionary()


def choose_kernels(model: PreTrainedModel, choice: KernelChoice) -> None:
    """Chooses what the model's forwards and learners compute with, those that are made from now on.

    With `torch` nothing is compiled. With `c` they raise ValueError where C of ours cannot compute the model. With
    `auto`, the default, they compute in C where it can, with torch elsewhere.
    """
    _choices[model] = choice


def library_for(source: Source, model: PreTrainedModel, dtype: torch.dtype, without: str) -> Library | None:
    """The source compiled for this model, or None where torch computes, by choice or because C cannot.

    Where compiling fails, a warning says what that costs: `without`. ValueError where `c` was chosen and cannot be.
    """
    choice = _choices.get(model, "auto")
    reason = "torch was chosen" if choice == "torch" else _unfit(model, dtype)
    if reason is None:
        try:
            return compiled(source, Sizes.of(model.config, dtype))
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            said = (getattr(error, "stderr", None) or str(error).encode()).decode(errors="replace")
            reason = f"{source.file} was not compiled: {said[-500:]}"
            if choice == "auto":
                logger.warning("%s, for %s", without, reason)
            reason += "; install a C compiler with OpenMP, such as gcc, or name one by CC"
    if choice == "c":
        raise ValueError(f"no kernels in C: {reason}; `auto` or `torch` do without")
    return None


def _unfit(model: PreTrainedModel, dtype: torch.dtype) -> str | None:
    """Why C of ours cannot compute this model; None if it can."""
    if model.device.type != "cpu":
        return f"they are for a CPU, and the model is on {model.device}"
    if not is_plain_llama(model):
        return f"they are for Llama, Mistral and Qwen2, and the model is of type {model.config.model_type}"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"they compute in float32 or bfloat16, not {_name(dtype)}"
    if not Sizes.of(model.config, dtype).are_tiled():
        return "the model's widths are no multiples of 32"
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
