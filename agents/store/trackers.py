"""Trackers: where else a run's numbers and sample episodes are shown: TensorBoard, Weights & Biases, trackio."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol

Row = Mapping[str, Any]  # of metrics.jsonl
COLUMNS = ("seed", "return", "turns", "episode")  # of the table of sample episodes


class Board(Protocol):
    """Takes what a run has to show, until it is closed."""

    def add(self, row: Row) -> None:
        """The numbers of a row of metrics.jsonl."""
        ...

    def show(self, stage: str, step: int, episodes: Sequence[Sequence[Any]]) -> None:
        """Sample episodes, with COLUMNS."""
        ...

    def close(self) -> None: ...


class Tracker(Protocol):
    """Opens a board for a run."""

    @property
    def episodes(self) -> int:
        """How many episodes of an evaluation are shown."""
        ...

    def open(self, folder: Path, rows: Iterable[Row]) -> Board:
        """The board of the run in a folder, with the rows so far."""
        ...


def numbers(row: Row) -> Iterator[tuple[str, float]]:
    """The numbers of a row, named stage/metric; those of `seconds` and `cost` one by one."""
    named = {**row}
    for group in ("seconds", "cost"):
        named |= {f"{group}/{name}": value for name, value in row.get(group, {}).items()}
    for name, value in named.items():
        if name not in ("stage", "step") and isinstance(value, int | float):
            yield f"{row['stage']}/{name}".replace(" ", "-"), value


@dataclass(frozen=True, slots=True)
class TensorBoard:
    """Writes tensorboard/ in the run's folder where TensorBoard is installed, and nothing where it is not.

    The folder is first written again from the rows so far, because a resumed run may have forgotten later ones.
    """

    episodes: int = 0

    def open(self, folder: Path, rows: Iterable[Row]) -> Board:
        place = folder / "tensorboard"
        shutil.rmtree(place, ignore_errors=True)
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return _Nowhere()
        board = _TensorBoard(SummaryWriter(str(place)))
        for row in rows:
            board.add(row)
        return board


@dataclass(frozen=True, slots=True)
class _TensorBoard:
    writer: Any

    def add(self, row: Row) -> None:
        for name, value in numbers(row):
            self.writer.add_scalar(name, value, row["step"])

    def show(self, stage: str, step: int, episodes: Sequence[Sequence[Any]]) -> None:
        pass

    def close(self) -> None:
        self.writer.close()


@dataclass(frozen=True, slots=True)
class _Nowhere:
    def add(self, row: Row) -> None:
        pass

    def show(self, stage: str, step: int, episodes: Sequence[Sequence[Any]]) -> None:
        pass

    def close(self) -> None:
        pass


@dataclass(frozen=True, slots=True)
class Wandb:
    """Weights & Biases: numbers by the stage's own steps, and a table of sample episodes for each evaluation.

    A run that is resumed goes on in the same run there; what it had written after its checkpoint stays.
    """

    project: str
    entity: str = ""  # whose project; empty: one's own
    mode: Literal["online", "offline"] = "online"  # offline: kept in the run's folder, for `wandb sync`
    episodes: int = 8

    def __post_init__(self) -> None:
        _needs("wandb")

    def open(self, folder: Path, rows: Iterable[Row]) -> Board:
        import wandb

        run = wandb.init(
            project=self.project, entity=self.entity or None, name=folder.name, id=_id(folder), resume="allow",
            mode=self.mode, dir=str(folder), config=_scenario(folder),
        )  # fmt: skip
        return _Library(run, wandb.Table)


@dataclass(frozen=True, slots=True)
class Trackio:
    """trackio, whose projects are on this machine, or in a Space of the Hugging Face hub; as `Wandb` otherwise."""

    project: str
    space: str = ""  # owner/name of a Space; empty: on this machine
    episodes: int = 8

    def __post_init__(self) -> None:
        _needs("trackio")

    def open(self, folder: Path, rows: Iterable[Row]) -> Board:
        import trackio

        run = trackio.init(
            self.project, name=folder.name, space_id=self.space or None, config=_scenario(folder), resume="allow",
            embed=False,
        )  # fmt: skip
        return _Library(run, trackio.Table)


@dataclass(frozen=True, slots=True)
class _Library:
    """A run of wandb, or of trackio, whose interface is the same."""

    run: Any
    table: Any

    def add(self, row: Row) -> None:
        stage = str(row["stage"]).replace(" ", "-")
        self.run.log({**dict(numbers(row)), f"{stage}/step": row["step"]})

    def show(self, stage: str, step: int, episodes: Sequence[Sequence[Any]]) -> None:
        name = stage.replace(" ", "-")
        table = self.table(columns=list(COLUMNS), data=[list(episode) for episode in episodes])
        self.run.log({f"{name}/episodes": table, f"{name}/step": step})

    def close(self) -> None:
        self.run.finish()


def _needs(library: str) -> None:
    if find_spec(library) is None:
        raise ValueError(f"{library} is not installed: pip install {library}")


def _id(folder: Path) -> str:
    """By which a run that is resumed is known again."""
    return hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]


def _scenario(folder: Path) -> dict[str, Any]:
    """The run's scenario, to be shown with it."""
    import yaml

    file = folder / "scenario.yaml"
    content: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8")) if file.exists() else {}
    return content
