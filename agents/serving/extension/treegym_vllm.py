"""What a vLLM server needs to be given new weights: a transfer by files, a report of names, checks during a pause.

The server has an environment of its own without treegym, so this file imports torch, safetensors and vLLM only. It was
written against vLLM 0.32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.request import Request

CHECK = "treegym-check"  # requests whose id contains this are answered while the server is paused


@dataclass
class Folder(WeightTransferUpdateInfo):
    """The safetensors files to load: all those in `folder`, which the server reads from its own disk or memory."""

    folder: str


class FileTransfer(WeightTransferEngine[WeightTransferInitInfo, Folder]):
    """Loads weights from safetensors files. `--weight-transfer-config '{"backend": "files"}'` chooses it."""

    init_info_cls = WeightTransferInitInfo
    update_info_cls = Folder

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.sent: list[str] = []
        self.loaded: set[str] = set()

    def init_transfer_engine(self, init_info: WeightTransferInitInfo) -> None:
        """Files need no connection."""

    def start_weight_update(self) -> None:
        self.sent, self.loaded = [], set()
        self._forget()
        initialize_layerwise_reload(self.model)

    def _forget(self) -> None:
        """Puts back what an update that broke off has left: tensors of it would be loaded beside those of the next."""
        for layer in self.model.modules():
            info = get_layerwise_info(layer)
            info.loaded_weights, info.load_numel = [], 0
        finalize_layerwise_reload(self.model, self.model_config)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":  # which the inherited method takes for granted
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: Folder) -> None:
        self.loaded |= self.model.load_weights(self._tensors(Path(update_info.folder)))

    def _tensors(self, folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118
                    self.sent.append(name)
                    yield name, tensors.get_tensor(name)

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        if self.device.type == "cpu":
            pack_output(self.model)

    def shutdown(self) -> None:
        """Nothing is held."""


WeightTransferEngineFactory.register_engine("files", FileTransfer)


def pack_output(model: torch.nn.Module) -> None:
    """Packs the output layer for a CPU again. Where it is tied to the embedding, loading leaves it as it was before."""
    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)


class Reports:
    """Methods that vLLM adds to its worker (`--worker-extension-cls`); `/collective_rpc` calls them by name."""

    def treegym_report(self) -> dict[str, Any]:
        """The names of the last update, as files have them, and what the model has that it did not set."""
        worker: Any = self
        engine = worker.weight_transfer_engine
        parameters = {
            name.replace(".base_layer.", ".") for name, _ in worker.model_runner.get_model().named_parameters()
        }
        sent, loaded = getattr(engine, "sent", None), getattr(engine, "loaded", parameters)
        return {
            "sent": None if sent is None else sorted(sent),  # None: this transfer keeps no list
            "loaded": sorted(loaded),  # in vLLM's names, where layers are fused
            "unloaded": sorted(parameters - loaded),
            "expected": self._expected(),
            "dtype": str(worker.model_config.dtype).removeprefix("torch."),
        }

    def _expected(self) -> list[str]:
        """The names in the files that the server started with, read once. A tied output layer is not expected."""
        worker: Any = self
        if not hasattr(worker, "_treegym_expected"):
            loader = get_model_loader(worker.vllm_config.load_config)
            tensors = loader.get_all_weights(worker.model_config, worker.model_runner.get_model())
            names = {name for name, _ in tensors}
            if worker.model_config.hf_text_config.tie_word_embeddings:
                names.discard("lm_head.weight")
            worker._treegym_expected = sorted(names)
        return list(worker._treegym_expected)


class CheckingScheduler(AsyncScheduler):
    """vLLM's scheduler, except that it also runs requests whose id contains CHECK while it is paused.

    A server that was given new weights can so be asked for some tokens before anybody else is answered: while paused
    with mode "wait", vLLM schedules only requests that hold blocks of the cache, and leaves all others in the queue.
    """

    @staticmethod
    def _holds_kv_blocks(request: Request) -> bool:
        return CHECK in request.request_id or AsyncScheduler._holds_kv_blocks(request)
