"""Files: folders, names, a bin, sharing."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..screen import flat
from .model import Records
from .pages import Fields, Item, Items, Path, Query, Refused, address, button, choice, field, link, listing, needed

BIN = "Bin"


@dataclass(frozen=True, slots=True)
class File:
    id: str
    name: str
    folder: str
    size: int  # kB
    text: str = ""
    shared: frozenset[str] = frozenset()  # with whom, by address


@dataclass(frozen=True, slots=True)
class Files:
    files: tuple[File, ...]
    folders: tuple[str, ...]
    name: str = "files"

    @property
    def menu(self) -> dict[str, str]:
        return {"Files": "/files", BIN: "/files/folder/bin"}

    def records(self) -> Records:
        return {
            **{f"{file.id}/name": file.name for file in self.files},
            **{f"{file.id}/folder": file.folder for file in self.files},
            **{f"{file.id}/shared/{who}": True for file in self.files for who in file.shared},
            **{f"folder/{folder}": True for folder in self.folders},
        }

    def view(self, path: Path, query: Query, size: int) -> Items | None:
        here = address("files", *path, **query)
        match path:
            case ():
                rows: list[Items] = [(link(folder, folder_page(self, folder)),) for folder in self.folders]
                new = field("new", "New folder"), button("create", "Create folder")
                return "Folders", *listing(rows, here, size), *new
            case ("folder", "bin"):
                return BIN, *listing(self._rows(BIN), here, size)
            case ("folder", number) if number in map(str, range(len(self.folders))):
                folder = self.folders[int(number)]
                return folder, *listing(self._rows(folder), here, size)
            case ("file", id):
                file = next((file for file in self.files if file.id == id), None)
                return self._file(file) if file else None
        return None

    def _rows(self, folder: str) -> list[Items]:
        inside = sorted((file for file in self.files if file.folder == folder), key=lambda file: (file.name, file.id))
        return [(link(file.name, address("files", "file", file.id)), f"{file.size} kB") for file in inside]

    def _file(self, file: File) -> Items:
        shared: list[Item] = [button(f"unshare:{who}", f"Stop sharing with {who}") for who in sorted(file.shared)]
        return (
            file.name,
            f"{file.size} kB, in {file.folder}",
            file.text,
            field("name", "Name", file.name),
            button("rename", "Rename"),
            choice("folder", "Folder", (*self.folders, BIN), file.folder),
            button("move", "Move"),
            field("who", "Share with"),
            button("share", "Share"),
            *shared,
            *(button("delete", "Delete"),) * (file.folder != BIN),
        )

    def submit(self, path: Path, query: Query, button: str, fields: Fields) -> tuple[Files, str]:
        if button == "create":
            return self._created(flat(fields["new"])), "/files"
        file = next(file for file in self.files if file.id == path[1])
        kind, _, who = button.partition(":")
        here, folder = address("files", *path), folder_page(self, file.folder)
        if kind == "delete":
            return self._changed(replace(file, folder=BIN)), folder
        if kind == "move":
            return self._changed(replace(file, folder=fields["folder"])), folder
        if kind == "unshare":
            return self._changed(replace(file, shared=file.shared - {who})), here
        if kind == "share":
            who = fields["who"].strip().lower()
            if "@" not in who:
                raise Refused("Share with: write an address with an @.")
            return self._changed(replace(file, shared=file.shared | {who})), here
        needed(fields, name="Name")
        return self._changed(replace(file, name=flat(fields["name"]))), here

    def _created(self, folder: str) -> Files:
        if not folder:
            raise Refused("New folder is missing.")
        if folder in (*self.folders, BIN):
            raise Refused("New folder: there is one with this name.")
        return replace(self, folders=(*self.folders, folder))

    def _changed(self, file: File) -> Files:
        return replace(self, files=tuple(file if each.id == file.id else each for each in self.files))


def folder_page(files: Files, folder: str) -> str:
    return address("files", "folder", "bin" if folder == BIN else files.folders.index(folder))
