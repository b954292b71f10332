"""How weights reach a vLLM server: as files, as an adapter under a new name, or over NCCL."""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import shutil
import socket
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..rollouts.failure import FailureCause
from .client import Server, ServerError
from .scratch import scratch
from .sync import Load, told

if TYPE_CHECKING:  # torch takes seconds to import
    import torch
    from transformers import PreTrainedModel

SHARED = Path("/dev/shm")


async def begin(server: Server, seconds: float) -> None:
    """Starts an update. One that was broken off between its phases is ended first."""
    try:
        await told(server, "start_weight_update", seconds)
    except ServerError as error:
        try:
            await told(server, "finish_weight_update", seconds)
        except ServerError:
            raise error from None
        await told(server, "start_weight_update", seconds)


async def finish(server: Server, version: int, seconds: float) -> None:
    await told(server, "finish_weight_update", seconds, {"weight_version": str(version)})


@dataclass(frozen=True, slots=True)
class Files:
    """Safetensors files on the server's machine, in shared memory where there is room. Adapters are merged."""

    folder: Path | None = None  # where they are written for the time of a push; None: shared memory, else temporary

    @property
    def pauses(self) -> bool:
        return True

    @contextmanager
    def packed(self, model: PreTrainedModel, version: int) -> Iterator[Load]:
        from ..models.lora import merged_state

        state = merged_state(model)
        room = self.folder or _room(sum(tensor.nbytes for tensor in state.values()))
        folder = scratch("weights", room)
        try:
            with _without_bars():
                model.save_pretrained(folder, state_dict=state)
            yield Load(folder=folder, names=_names(folder))
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    async def load(self, server: Server, load: Load, model: PreTrainedModel, version: int, seconds: float) -> None:
        await begin(server, seconds)
        await told(server, "update_weights", seconds, {"update_info": {"folder": str(load.folder)}})
        await finish(server, version, seconds)


def _names(folder: Path) -> frozenset[str]:
    """Of the tensors in a folder's safetensors files."""
    from safetensors import safe_open

    names = set[str]()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            names.update(tensors.keys())
    return frozenset(names)


def _room(size: int) -> Path:
    """Shared memory that has room for `size` bytes and a tenth more, or the folder for temporary files."""
    if SHARED.is_dir() and shutil.disk_usage(SHARED).free > 1.1 * size:
        return SHARED
    return Path(tempfile.gettempdir())


@contextmanager
def _without_bars() -> Iterator[None]:
    """Without the progress bars of transformers: writing takes a second."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@dataclass(eq=False)
class Lora:
    """An adapter under a new name for each version, so that no older prefix can be hit and nobody has to wait.

    The name holds the version and a digest of the adapter's weights and their folder. The last `kept` versions stay.
    """

    kept: int = 2  # at least `max_lag` + 2, and no more than the server's --max-loras
    folder: Path | None = None  # in which they are written; None: the one for temporary files
    _room: Path = field(init=False, repr=False)
    _loaded: dict[str, list[str]] = field(default_factory=dict, repr=False)  # by the server's URL, oldest first

    def __post_init__(self) -> None:
        self._room = scratch("adapters", self.folder)
        weakref.finalize(self, shutil.rmtree, self._room, ignore_errors=True)  # at the latest when the process ends

    @property
    def pauses(self) -> bool:
        return False

    @contextmanager
    def packed(self, model: PreTrainedModel, version: int) -> Iterator[Load]:
        from ..models.lora import has_lora, save_adapter

        if not has_lora(model):
            raise ValueError("sync: lora pushes an adapter, and the model has none; sync: files pushes whole weights")
        draft = Path(tempfile.mkdtemp(dir=self._room))
        save_adapter(model, draft, str(model.name_or_path))
        digest = hashlib.sha256((draft / "adapter_model.safetensors").read_bytes())
        digest.update(str(self._room).encode())  # an adapter of a process that has ended may have lost its files
        folder = draft.with_name(f"v{version}-{digest.hexdigest()[:8]}")
        if folder.exists():
            shutil.rmtree(draft)
        else:
            draft.rename(folder)
        yield Load(model=folder.name, folder=folder)  # which stays: the server may have to read it again

    async def load(self, server: Server, load: Load, model: PreTrainedModel, version: int, seconds: float) -> None:
        loaded = self._loaded.setdefault(server.url, [])
        if load.model in loaded:  # an attempt failed, perhaps after the server had loaded it
            await self._unload(server, load.model, seconds)
        loaded.append(load.model)
        body = {"lora_name": load.model, "lora_path": str(load.folder)}
        await server.tell("v1/load_lora_adapter", body, timeout=seconds, patience=0)
        for name in loaded[: -self.kept]:
            await self._unload(server, name, seconds)
            if not any(name in names for names in self._loaded.values()):
                shutil.rmtree(self._room / name, ignore_errors=True)

    async def _unload(self, server: Server, name: str, seconds: float) -> None:
        try:
            await server.tell("v1/unload_lora_adapter", {"lora_name": name}, timeout=seconds, patience=0)
        except ServerError as error:
            if error.cause != FailureCause.REFUSED:  # a server that was started anew does not know it
                raise
        self._loaded[server.url].remove(name)


@dataclass(slots=True)
class Nccl:
    """vLLM's own transfer between GPUs. Never run: written against the source of vLLM 0.32, on machines without a GPU.

    This process needs CUDA, vLLM in its environment, and a GPU that is not the server's; the server needs
    `--weight-transfer-config '{"backend": "nccl"}'`.
    """

    address: str = "127.0.0.1"  # of this machine, as the server's machine reaches it
    _engines: dict[str, Any] = field(default_factory=dict, repr=False)  # by the server's URL: one that is connected

    def __post_init__(self) -> None:
        import torch

        if not torch.cuda.is_available():
            raise ValueError(
                "sync: nccl sends weights from GPU to GPU, and there is no CUDA here; sync: files needs none"
            )
        if importlib.util.find_spec("vllm") is None:
            raise ValueError(
                "sync: nccl needs vLLM in this environment as well: pip install vllm; sync: files does not"
            )

    @property
    def pauses(self) -> bool:
        return True

    @contextmanager
    def packed(self, model: PreTrainedModel, version: int) -> Iterator[Load]:
        yield Load(names=frozenset(name for name, _ in _tensors(model)))

    async def load(self, server: Server, load: Load, model: PreTrainedModel, version: int, seconds: float) -> None:
        control = _Control(server, asyncio.get_running_loop(), version, seconds)
        world = (await server.ask("get_world_size", timeout=seconds))["world_size"] + 1
        try:
            await asyncio.wait_for(asyncio.to_thread(self._send, control, model, world), seconds)
        except BaseException as error:
            self._engines.pop(server.url, None)  # a group of processes that failed cannot be used again
            if not isinstance(error, RuntimeError | TimeoutError):
                raise
            raise ServerError(f"{server.url}: weights over NCCL: {error!r}", FailureCause.TIMEOUT) from error

    def _send(self, control: _Control, model: PreTrainedModel, world: int) -> None:
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        url = control.server.url
        source: Any = _Source(model)
        if url not in self._engines:
            with socket.socket() as probe:
                probe.bind(("", 0))
                port = probe.getsockname()[1]
            joined = NCCLTrainerInitInfo(rank=0, master_address=self.address, master_port=port, world_size=world)
            self._engines[url] = WeightTransferTrainerFactory.trainer_init(joined, client=control, source=source)
        engine = self._engines[url]
        engine.client, engine.source = control, source
        engine.send_weights()


def _tensors(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and weights as the model's files have them; a tied output layer is in none."""
    from ..models.lora import merged_state

    for name, tensor in merged_state(model).items():
        if not (name == "lm_head.weight" and model.config.get_text_config().tie_word_embeddings):
            yield name, tensor


@dataclass(frozen=True, slots=True)
class _Meta:
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Source:
    """The model's weights as vLLM's trainer engines read them."""

    model: PreTrainedModel

    def metadata(self) -> list[_Meta]:
        return [_Meta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return _tensors(self.model)


@dataclass(frozen=True, slots=True)
class _Control:
    """The phases of an update, as vLLM's trainer engines ask for them, from a thread of theirs."""

    server: Server
    loop: asyncio.AbstractEventLoop
    version: int
    seconds: float

    def _post(self, path: str, body: Mapping[str, Any]) -> None:
        asyncio.run_coroutine_threadsafe(told(self.server, path, self.seconds, body), self.loop).result()

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._post("init_weight_transfer_engine", {"init_info": init_info})

    def start_weight_update(self) -> None:
        asyncio.run_coroutine_threadsafe(begin(self.server, self.seconds), self.loop).result()

    def update_weights(self, update_info: Any) -> None:
        self._post("update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        asyncio.run_coroutine_threadsafe(finish(self.server, self.version, self.seconds), self.loop).result()
