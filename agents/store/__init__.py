"""The store: trees on disk, a run's folder, listings, salvage."""

from .folder import Run
from .frames import DamagedStore, StoreError
from .index import TreeSummary
from .records import Record
from .salvage import migrate, salvage
from .store import EpisodeStore, Loss, StoreLocked, append_line, read_lines
from .trackers import TensorBoard, Tracker, Trackio, Wandb
from .where import Range, Where

__all__ = [
    "DamagedStore",
    "EpisodeStore",
    "Loss",
    "Range",
    "Record",
    "Run",
    "StoreError",
    "StoreLocked",
    "TensorBoard",
    "Tracker",
    "Trackio",
    "TreeSummary",
    "Wandb",
    "Where",
    "append_line",
    "migrate",
    "read_lines",
    "salvage",
]
