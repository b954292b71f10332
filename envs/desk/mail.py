"""Mail: folders, stars, replies, forwards, contacts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from ..screen import flat
from .model import Records
from .pages import Fields, Items, Path, Query, Refused, address, button, choice, field, link, listing, needed

FOLDERS = ("Inbox", "Archive", "Work", "Family", "Spam", "Trash")


@dataclass(frozen=True, slots=True)
class Contact:
    name: str

    @property
    def email(self) -> str:
        return f"{self.name.lower().replace(' ', '.')}@post.example"


@dataclass(frozen=True, slots=True)
class Letter:
    """A mail that has come in."""

    id: str
    sender: Contact
    subject: str
    text: str
    day: str
    folder: str = "Inbox"
    starred: bool = False


@dataclass(frozen=True, slots=True)
class Sent:
    to: str
    subject: str
    text: str

    def __str__(self) -> str:
        return " | ".join(map(flat, (self.to.lower(), self.subject, self.text)))


@dataclass(frozen=True, slots=True)
class Mail:
    letters: tuple[Letter, ...]
    contacts: tuple[Contact, ...]
    sent: tuple[Sent, ...] = ()
    name: str = "mail"

    @property
    def menu(self) -> dict[str, str]:
        return {"Mail": "/mail", "Folders": "/mail/folders", "Write": "/mail/write", "Contacts": "/mail/contacts"}

    def letter(self, id: str) -> Letter | None:
        return next((letter for letter in self.letters if letter.id == id), None)

    def records(self) -> Records:
        return {
            **{f"{letter.id}/folder": letter.folder for letter in self.letters},
            **{f"{letter.id}/starred": letter.starred for letter in self.letters},
            **Counter(f"sent/{sent}" for sent in self.sent),
        }

    def view(self, path: Path, query: Query, size: int) -> Items | None:
        match path:
            case ():
                return "Inbox", *_search(query), *self._rows("Inbox", path, query, size)
            case ("search",):
                return "Results", *_search(query), *self._rows("", path, query, size)
            case ("folders",):
                links = (link(folder, address("mail", "folder", folder)) for folder in FOLDERS)
                return "Folders", *links, link("Sent", "/mail/sent")
            case ("folder", folder) if folder in FOLDERS:
                return folder, *self._rows(folder, path, query, size)
            case ("letter", id):
                letter = self.letter(id)
                return _letter(letter) if letter else None
            case ("write",):
                return self._draft(self.letter(query.get("forward", "")))
            case ("contacts",):
                people = [(f"{contact.name}: {contact.email}",) for contact in self.contacts]
                return "Contacts", *listing(people, address("mail", *path, **query), size)
            case ("sent",):
                sent = [(f"To {one.to}: {one.subject}", one.text) for one in self.sent]
                return "Sent", *listing(sent, address("mail", *path, **query), size)
        return None

    def _rows(self, folder: str, path: Path, query: Query, size: int) -> Items:
        words = query.get("q", "").lower().split()
        rows: list[Items] = [
            (link(f"{letter.sender.name}: {letter.subject}", address("mail", "letter", letter.id)), _about(letter))
            for letter in self.letters
            if folder in ("", letter.folder)
            and all(word in f"{letter.sender.name} {letter.subject}".lower() for word in words)
        ]
        return listing(rows, address("mail", *path, **query), size)

    def _draft(self, letter: Letter | None) -> Items:
        return (
            field("to", "To"),
            field("subject", "Subject", f"Fwd: {letter.subject}" if letter else ""),
            field("text", "Text", letter.text if letter else ""),
            button("send", "Send"),
        )

    def submit(self, path: Path, query: Query, button: str, fields: Fields) -> tuple[Mail, str]:
        if button == "search":
            return self, address("mail", "search", q=fields["q"].strip())
        if button == "send":
            needed(fields, to="To", subject="Subject", text="Text")
            if "@" not in fields["to"]:
                raise Refused("To: write an address, such as the contacts have.")
            return self._sending(Sent(fields["to"].strip(), fields["subject"], fields["text"]))
        letter = self.letter(path[1])
        assert letter is not None
        if button == "reply":
            needed(fields, answer="Reply")
            return self._sending(Sent(letter.sender.email, f"Re: {letter.subject}", fields["answer"]))
        if button == "star":
            return self._changed(replace(letter, starred=not letter.starred)), address("mail", *path)
        folder = {"archive": "Archive", "delete": "Trash"}.get(button, fields["folder"])
        return self._changed(replace(letter, folder=folder)), "/mail"

    def _sending(self, sent: Sent) -> tuple[Mail, str]:
        return replace(self, sent=(*self.sent, sent)), "/mail/sent"

    def _changed(self, letter: Letter) -> Mail:
        return replace(self, letters=tuple(letter if each.id == letter.id else each for each in self.letters))


def _search(query: Query) -> Items:
    return field("q", "Search", query.get("q", ""), "searchbox"), button("search", "Search")


def _about(letter: Letter) -> str:
    return f"{letter.day}, {letter.folder}{', starred' * letter.starred}"


def _letter(letter: Letter) -> Items:
    return (
        f"From: {letter.sender.name}",
        f"Date: {_about(letter)}",
        f"Subject: {letter.subject}",
        letter.text,
        field("answer", "Reply"),
        button("reply", "Send reply"),
        button("star", "Remove star" if letter.starred else "Star"),
        button("archive", "Archive"),
        button("delete", "Delete"),
        choice("folder", "Folder", FOLDERS, letter.folder),
        button("move", "Move"),
        link("Forward", address("mail", "write", forward=letter.id)),
    )
