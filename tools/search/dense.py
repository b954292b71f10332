"""Search by meaning: passages and queries as vectors, ranked by their inner product."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from ..artefacts import cached_directory, checksums
from ..protocol import encodable
from .index import Hit, Passage, distinct, load_passages, passages_key, progress, save_passages

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FORMAT = "1"  # of the files on disk; part of the key
BATCH = 64  # texts that are encoded together
MAX_QUERY_CHARS = 2000  # a longer query is cut: its time stays bounded


class Encoder(Protocol):
    """Turns texts into vectors, for many threads at once."""

    @property
    def name(self) -> str: ...  # differs where the vectors differ: part of the cache's key

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float32]: ...  # [texts, d]

    def __hash__(self) -> int: ...


@dataclass(frozen=True)
class StaticEncoder:
    """The mean of a text's token embeddings, of unit length; d = 256. They come inside the wheel of wordllama."""

    def __post_init__(self) -> None:
        if importlib.util.find_spec("wordllama") is None:
            raise ImportError("no static embeddings here: pip install 'treegym[dense]'")

    @property
    def name(self) -> str:
        return f"wordllama {importlib.metadata.version('wordllama')}"

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float32]:
        tokenizer, table = _static()
        found = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        sums = np.array([table[one.ids].sum(axis=0) for one in found], dtype=np.float32).reshape(-1, table.shape[1])
        return _unit(sums)


@functools.cache
def _static() -> tuple[Tokenizer, NDArray[np.float32]]:
    """The tokenizer and its embeddings, [tokens, 256], from the package's files: when imported, it writes logs."""
    from safetensors.numpy import load_file
    from tokenizers import Tokenizer

    folder = Path(str(importlib.metadata.distribution("wordllama").locate_file("wordllama")))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizers" / "l2_supercat_tokenizer_config.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    table = load_file(folder / "weights" / "l2_supercat_256.safetensors")["embedding.weight"]
    return tokenizer, table.astype(np.float32)


@dataclass(frozen=True)
class TransformerEncoder:
    """The mean of the last hidden states of a Hugging Face encoder in a local folder, of unit length.

    `prefix` begins every text: "query: " or "passage: " for the E5 models. Float32.
    """

    folder: str
    prefix: str = ""
    max_tokens: int = 256  # of a text, its prefix included; the rest is not read
    device: str = "cpu"

    @property
    def name(self) -> str:
        return f"{_content(self.folder)} {self.prefix} {self.max_tokens}"

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float32]:
        import torch

        tokenizer, model = _transformer(self.folder, self.device)
        with _tokenizing:
            batch = tokenizer(
                [self.prefix + text for text in texts],
                padding=True,
                truncation=True,
                max_length=self.max_tokens,
                return_tensors="pt",
            ).to(self.device)
        with torch.inference_mode():
            states = model(**batch).last_hidden_state  # [texts, tokens, d]
        mask = batch["attention_mask"].unsqueeze(-1)
        means = (states * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
        return _unit(means.cpu().numpy())


_tokenizing = threading.Lock()  # a tokenizer holds the lengths it pads and cuts to: one thread at a time


@functools.cache
def _transformer(folder: str, device: str) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModel, AutoTokenizer

    _content(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    return tokenizer, model.eval().to(device)


@functools.cache
def _content(folder: str) -> str:
    """A digest of the model's files."""
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"{folder} holds no Hugging Face model: it has no config.json")
    return hashlib.sha256(json.dumps(checksums(Path(folder))).encode()).hexdigest()


def _unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """The vectors scaled to length one; zero vectors stay zero."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit: NDArray[np.float32] = vectors / np.maximum(lengths, np.float32(1e-30))
    return unit


class DenseIndex:
    """An immutable index: share it between environments and threads; it pickles as its path and its encoders.

    The search is exhaustive and exact: float32 products choose the candidates, float64 products rank them.
    """

    def __init__(self, path: Path, encoder: Encoder, query_encoder: Encoder | None = None) -> None:
        self.path, self.encoder, self.query_encoder = path, encoder, query_encoder
        self.passages = load_passages(path)
        self.vectors: NDArray[np.float32] = np.load(path / "vectors.npy", mmap_mode="r")  # [passages, d]
        if self.vectors.ndim != 2 or len(self.vectors) != len(self.passages):
            raise ValueError(
                f"{path} is damaged: vectors of shape {self.vectors.shape} for {len(self.passages)} passages; "
                "DenseIndex.build makes it anew"
            )
        self._longest = float(np.sqrt(np.einsum("nd,nd->n", self.vectors, self.vectors).max()))

    @classmethod
    def build(cls, passages: Iterable[Passage], encoder: Encoder, query_encoder: Encoder | None = None) -> DenseIndex:
        """The index of these passages, from the cache when it was built before.

        `query_encoder` encodes the queries, where a model wants them encoded in another way.
        """
        kept = distinct(passages)
        if not kept:
            raise ValueError("a dense index needs at least one passage")
        key = passages_key(kept, f"{FORMAT} {encoder.name}")
        return open_dense(
            cached_directory("dense", key, lambda path: write_vectors(kept, encoder, path)), encoder, query_encoder
        )

    def search(self, query: str, k: int) -> list[Hit]:
        """The best k passages, none for a blank query; equal products in the passages' order."""
        return self.search_many([query], k)[0]

    def search_many(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        batches = (queries[start : start + BATCH] for start in range(0, len(queries), BATCH))
        return [hits for batch in batches for hits in self._search(batch, k)]

    def _search(self, queries: Sequence[str], k: int) -> Iterable[list[Hit]]:
        vectors = _encode(self.query_encoder or self.encoder, [query[:MAX_QUERY_CHARS] for query in queries])
        if vectors.shape[1] != self.vectors.shape[1]:
            raise ValueError(f"queries have {vectors.shape[1]} dimensions, the passages in {self.path} have "
                             f"{self.vectors.shape[1]}: they are of different models")  # fmt: skip
        products = vectors @ self.vectors.T  # [queries, passages], to within rounding
        for query, vector, rough in zip(queries, vectors, products, strict=True):
            yield self._best(vector, rough, min(k, len(rough))) if query.strip() and k > 0 else []

    def _best(self, query: NDArray[np.float32], rough: NDArray[np.float32], k: int) -> list[Hit]:
        kth = np.partition(rough, len(rough) - k)[len(rough) - k]
        # no float32 product is further off than half of this, whatever the order of summation
        error = len(query) * np.finfo(np.float32).eps * float(np.linalg.norm(query)) * self._longest
        places = np.flatnonzero(rough >= kth - 2 * error)
        products = (self.vectors[places].astype(np.float64) * query).sum(axis=1)
        order = np.lexsort((places, -products))[:k]
        return [Hit(self.passages[places[i]], float(products[i])) for i in order]

    def __len__(self) -> int:
        return len(self.passages)

    def __reduce__(self) -> tuple[Any, ...]:
        return open_dense, (self.path, self.encoder, self.query_encoder)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self


def write_vectors(passages: Sequence[Passage], encoder: Encoder, path: Path) -> None:
    """Writes what DenseIndex reads from the directory."""
    save_passages(passages, path)
    batches = []
    for start in progress(range(0, len(passages), BATCH), "Encoding", len(passages) >= 5_000):
        batches.append(_encode(encoder, [f"{p.title} {p.text}" for p in passages[start : start + BATCH]]))
    np.save(path / "vectors.npy", np.concatenate(batches))


def _encode(encoder: Encoder, texts: Sequence[str]) -> NDArray[np.float32]:
    """Vectors of the texts, [texts, d]. ValueError where the encoder gives anything else."""
    vectors = np.ascontiguousarray(encoder([encodable(text) for text in texts]), dtype=np.float32)
    if vectors.ndim != 2 or len(vectors) != len(texts):
        raise ValueError(f"the encoder {encoder.name!r} gave shape {vectors.shape} for {len(texts)} texts")
    if not np.isfinite(vectors).all():
        bad = texts[int(np.isfinite(vectors).all(axis=1).argmin())]
        raise ValueError(f"the encoder {encoder.name!r} gave NaN or infinity for {bad[:80]!r}")
    return vectors


_open_lock = threading.Lock()


def open_dense(path: Path, encoder: Encoder, query_encoder: Encoder | None = None) -> DenseIndex:
    """The index in the directory; one object per process and encoders, however often it is opened."""
    with _open_lock:
        return _open(path, encoder, query_encoder)


_open = functools.cache(DenseIndex)
