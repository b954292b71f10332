"""Tasks of the mail."""

from __future__ import annotations

from dataclasses import replace

from .mail import FOLDERS, Contact, Letter, Mail, Sent
from .model import Records
from .pages import address
from .plan import DeskTask, Draw, Move, Subgoal, go
from .templates import DAYS, PLACES, see, spoken, task, template

PAIRS = (  # people who are easily taken for one another
    ("Ada Berg", "Ada Borg"),
    ("Ben Costa", "Ben Coster"),
    ("Cleo Dahl", "Clea Dahl"),
    ("Dan Evans", "Dan Ewing"),
    ("Eva Frank", "Eve Frank"),
)
SUBJECTS = "Lunch|Invoice|Holiday plans|Project report|Parking|Concert|Team trip|Keys".split("|")
REPLIES = "Yes, gladly.|Sorry, I cannot.|Thank you very much.|I will call you tomorrow.|Please ask Hugo.".split("|")
NOTES = "The key is in the drawer.|We meet at the station.|The train is late.|Bring the blue folder.".split("|")


def mailbox(draw: Draw, *first: str) -> Mail:
    """Ten mails of four people, two of whom are easily taken for the other two; texts that are given come first."""
    contacts = [Contact(name) for pair in draw.some(PAIRS, 2) for name in pair]
    about = [(contact, subject) for contact in contacts for subject in draw.some(SUBJECTS, 4)]
    texts = [*first, *(_text(draw) for _ in range(10 - len(first)))]
    letters = [
        Letter(f"m{number}", contact, subject, text, draw.one(DAYS))
        for number, ((contact, subject), text) in enumerate(zip(draw.some(about, 10), texts, strict=True), 1)
    ]
    return Mail(tuple(draw.some(letters, 10)), tuple(contacts))


def _text(draw: Draw) -> str:
    day, place = draw.one(DAYS), draw.one(PLACES)
    return draw.one(
        (
            f"The door code is {draw.number(1000, 9999)}.",
            f"Let us meet on {spoken(day)} in the {place}.",
            f"The bill comes to {draw.number(10, 99)}.50 EUR.",
            *NOTES,
        )
    )


def letter(mail: Mail, id: str) -> Letter:
    return next(letter for letter in mail.letters if letter.id == id)


def called(letter: Letter) -> str:
    return f'the mail "{letter.subject}" from {letter.sender.name}'


def page_of(letter: Letter) -> str:
    return address("mail", "letter", letter.id)


def on(letter: Letter, click: str, changes: Records, **fill: str) -> Subgoal:
    """Open a mail of the inbox and do something with it."""
    return Subgoal((go("/mail", page_of(letter)), Move(page_of(letter), click, fill)), changes)


def send(mail: Mail, to: Contact, subject: str, text: str) -> Subgoal:
    fill = {"to": to.email, "subject": subject, "text": text}
    return Subgoal((Move("/mail/write", "send", fill),), {f"mail/sent/{Sent(**fill)}": 1})


def read(letter: Letter) -> Subgoal:
    return see(page_of(letter), go("/mail", page_of(letter)))


@template("mail")
def mail_star(draw: Draw) -> DeskTask:
    mail = mailbox(draw)
    one = draw.one(mail.letters)
    return task(f"Star {called(one)}.", mail, on(one, "star", {f"mail/{one.id}/starred": True}))


@template("mail")
def mail_delete(draw: Draw) -> DeskTask:
    mail = mailbox(draw)
    one = draw.one(mail.letters)
    return task(f"Delete {called(one)}.", mail, on(one, "delete", {f"mail/{one.id}/folder": "Trash"}))


@template("mail")
def mail_move(draw: Draw) -> DeskTask:
    mail, folder = mailbox(draw), draw.one(("Work", "Family", "Spam"))
    one = draw.one(mail.letters)
    subgoal = on(one, "move", {f"mail/{one.id}/folder": folder}, folder=folder)
    return task(f"Move {called(one)} to the folder {folder}.", mail, subgoal)


@template("mail", heldout=True)
def mail_restore(draw: Draw) -> DeskTask:
    mail, folder = mailbox(draw), draw.one(("Work", "Family", "Archive"))
    put_away = draw.some(mail.letters, 5)
    mail = replace(mail, letters=tuple(replace(m, folder=folder) if m in put_away else m for m in mail.letters))
    one = put_away[0]
    here = address("mail", "folder", folder)
    moves = go("/mail/folders", here), go(here, page_of(one)), Move(page_of(one), "move", {"folder": FOLDERS[0]})
    subgoal = Subgoal(moves, {f"mail/{one.id}/folder": FOLDERS[0]})
    return task(f"Move {called(one)} from the folder {folder} back to the inbox.", mail, subgoal)


@template("mail")
def mail_archive_all(draw: Draw) -> DeskTask:
    mail = mailbox(draw)
    sender = draw.one([contact for contact in mail.contacts if len(_from(mail, contact)) > 1] or mail.contacts)
    subgoals = [on(one, "archive", {f"mail/{one.id}/folder": "Archive"}) for one in _from(mail, sender)]
    return task(f"Archive all mails from {sender.name}.", mail, *subgoals)


def _from(mail: Mail, sender: Contact) -> list[Letter]:
    return [letter for letter in mail.letters if letter.sender == sender]


@template("mail")
def mail_reply(draw: Draw) -> DeskTask:
    mail, text = mailbox(draw), draw.one(REPLIES)
    one = draw.one(mail.letters)
    sent = Sent(one.sender.email, f"Re: {one.subject}", text)
    return task(f'Reply to {called(one)}: "{text}"', mail, on(one, "reply", {f"mail/sent/{sent}": 1}, answer=text))


@template("mail", heldout=True)
def mail_forward(draw: Draw) -> DeskTask:
    mail = mailbox(draw)
    one = draw.one(mail.letters)
    to = draw.one([contact for contact in mail.contacts if contact != one.sender])
    form = address("mail", "write", forward=one.id)
    sent = Sent(to.email, f"Fwd: {one.subject}", one.text)
    moves = go("/mail", page_of(one)), go(page_of(one), form), Move(form, "send", {"to": to.email})
    subgoal = Subgoal(moves, {f"mail/sent/{sent}": 1})
    return task(f"Forward {called(one)} to {to.name}.", mail, see("/mail/contacts"), subgoal)


@template("mail")
def mail_write(draw: Draw) -> DeskTask:
    mail, subject, text = mailbox(draw), draw.one(SUBJECTS), draw.one(NOTES)
    to = draw.one(mail.contacts)
    subgoals = see("/mail/contacts"), send(mail, to, subject, text)
    return task(f'Write to {to.name} with the subject "{subject}": "{text}"', mail, *subgoals)


@template("mail")
def mail_code(draw: Draw) -> DeskTask:
    code = draw.number(1000, 9999)
    mail = mailbox(draw, f"The door code is {code}.")
    one = letter(mail, "m1")
    return task(f"Which door code does {called(one)} give?", mail, read(one), kind="number", value=code)


@template("mail")
def mail_day(draw: Draw) -> DeskTask:
    day = draw.one(DAYS)
    mail = mailbox(draw, f"Let us meet on {spoken(day)} in the {draw.one(PLACES)}.")
    one = letter(mail, "m1")
    return task(f"On which day does {called(one)} want to meet?", mail, read(one), kind="date", value=day)
