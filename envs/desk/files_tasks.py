"""Tasks of the files."""

from __future__ import annotations

from dataclasses import replace

from .files import BIN, File, Files, folder_page
from .model import Records
from .pages import address
from .plan import DeskTask, Draw, Move, Subgoal, go
from .templates import NAMES, see, task, template

FOLDERS = "Documents Photos Music Taxes Recipes Letters".split()
STEMS = "report budget garden letter contract invoice plan summary".split()
YEARS = ("2023", "2024", "2025", "2026")


def stored(draw: Draw, *first: str) -> Files:
    """Four folders with twelve files, some of whose names are similar; texts that are given come first."""
    folders = sorted(draw.some(FOLDERS, 4))
    names = draw.some([f"{stem}-{year}.txt" for stem in draw.some(STEMS, 4) for year in YEARS], 12)
    sizes = draw.some(range(1, 900), 12)
    texts = [*first, *(f"About {name.partition('-')[0]}." for name in names[len(first) :])]
    return Files(
        tuple(
            File(f"f{number}", name, draw.one(folders), size, text)
            for number, (name, size, text) in enumerate(zip(names, sizes, texts, strict=True), 1)
        ),
        tuple(folders),
    )


def page_of(file: File) -> str:
    return address("files", "file", file.id)


def to_file(files: Files, file: File) -> tuple[Move, ...]:
    here = folder_page(files, file.folder)
    return go("/files", here), go(here, page_of(file))


def on(files: Files, file: File, click: str, changes: Records, **fill: str) -> Subgoal:
    return Subgoal((*to_file(files, file), Move(page_of(file), click, fill)), changes)


def move(files: Files, file: File, folder: str) -> Subgoal:
    return on(files, file, "move", {f"files/{file.id}/folder": folder}, folder=folder)


def called(file: File) -> str:
    return f"the file {file.name} in {file.folder}"


def other_folder(files: Files, file: File, draw: Draw) -> str:
    return draw.one([folder for folder in files.folders if folder != file.folder])


def email(draw: Draw) -> str:
    return f"{draw.one(NAMES).lower().replace(' ', '.')}@post.example"


@template("files")
def files_rename(draw: Draw) -> DeskTask:
    files = stored(draw)
    file = draw.one(files.files)
    name = f"{draw.one(STEMS)}-{draw.number(2010, 2020)}.txt"
    return task(
        f"Rename {called(file)} to {name}.",
        files,
        on(files, file, "rename", {f"files/{file.id}/name": name}, name=name),
    )


@template("files")
def files_move(draw: Draw) -> DeskTask:
    files = stored(draw)
    file = draw.one(files.files)
    folder = other_folder(files, file, draw)
    return task(f"Move {called(file)} to {folder}.", files, move(files, file, folder))


@template("files")
def files_largest(draw: Draw) -> DeskTask:
    files = stored(draw)
    folder = draw.one(files.files).folder
    file = max((each for each in files.files if each.folder == folder), key=lambda each: each.size)
    delete = on(files, file, "delete", {f"files/{file.id}/folder": BIN})
    return task(f"Delete the largest file in {folder}.", files, delete)


@template("files")
def files_share(draw: Draw) -> DeskTask:
    files, who = stored(draw), email(draw)
    file = draw.one(files.files)
    share = on(files, file, "share", {f"files/{file.id}/shared/{who}": True}, who=who)
    return task(f"Share {called(file)} with {who}.", files, share)


@template("files", heldout=True)
def files_unshare(draw: Draw) -> DeskTask:
    files = stored(draw)
    friends = sorted({email(draw) for _ in range(5)})
    files = replace(files, files=tuple(replace(file, shared=frozenset(draw.some(friends, 2))) for file in files.files))
    file = draw.one(files.files)
    who = draw.one(sorted(file.shared))
    unshare = on(files, file, f"unshare:{who}", {f"files/{file.id}/shared/{who}": None})
    return task(f"Stop sharing {called(file)} with {who}.", files, unshare)


@template("files", heldout=True)
def files_folder(draw: Draw) -> DeskTask:
    files = stored(draw)
    folder = draw.one([name for name in FOLDERS if name not in files.folders])
    pair = draw.some(files.files, 2)
    create = Subgoal((Move("/files", "create", {"new": folder}),), {f"files/folder/{folder}": True})
    moves = (move(files, file, folder) for file in pair)
    text = f"Create a folder {folder} and move {called(pair[0])} and {called(pair[1])} there."
    return task(text, files, create, *moves)


@template("files")
def files_restore(draw: Draw) -> DeskTask:
    files = stored(draw)
    gone = draw.some(files.files, 4)
    files = replace(files, files=tuple(replace(file, folder=BIN) if file in gone else file for file in files.files))
    file = replace(gone[0], folder=BIN)
    folder, here = draw.one(files.folders), folder_page(files, BIN)
    moves = go(here, page_of(file)), Move(page_of(file), "move", {"folder": folder})
    return task(
        f"Move the file {file.name} from the bin to {folder}.",
        files,
        Subgoal(moves, {f"files/{file.id}/folder": folder}),
    )


@template("files")
def files_size(draw: Draw) -> DeskTask:
    files = stored(draw)
    file = draw.one(files.files)
    look = see(page_of(file), *to_file(files, file))
    return task(f"How many kB does {called(file)} have?", files, look, kind="number", value=file.size)
