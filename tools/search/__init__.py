"""Search: passages, indices by words and by meaning, fusion, a server and its client."""

from .client import RemoteSearch
from .dense import DenseIndex, Encoder, StaticEncoder, TransformerEncoder
from .fusion import Fused
from .index import Hit, Passage, Retriever, SearchError, SearchIndex, SearchTool

__all__ = [
    "DenseIndex",
    "Encoder",
    "Fused",
    "Hit",
    "Passage",
    "RemoteSearch",
    "Retriever",
    "SearchError",
    "SearchIndex",
    "SearchTool",
    "StaticEncoder",
    "TransformerEncoder",
]
