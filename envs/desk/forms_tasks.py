"""Tasks with forms."""

from __future__ import annotations

from dataclasses import replace

from .forms import FORMS, Entry, Form, Forms
from .model import Records
from .pages import address
from .plan import DeskTask, Draw, Move, Subgoal, go
from .templates import DAYS, NAMES, see, spoken, task, template

COURSE, CLAIM, VISIT = FORMS


def archive(draw: Draw, *entries: Entry, without: str = "") -> Forms:
    """Forms that have been sent: those that are given, and five of other people."""
    taken = {without, *(entry.values[0] for entry in entries)}
    others = draw.some([name for name in NAMES if name not in taken], 5)
    sent = [*entries, *(entry(draw, draw.one(FORMS), name=name) for name in others)]
    numbers = draw.some(range(11, 30), len(sent))
    numbered = (replace(each, number=number) for each, number in zip(sent, numbers, strict=True))
    return Forms(tuple(sorted(numbered, key=lambda entry: entry.number)))


def entry(draw: Draw, form: Form, name: str = "") -> Entry:
    name = name or draw.one(NAMES)
    drawn = {
        "text": name,
        "email": f"{name.lower().replace(' ', '.')}@post.example",
        "day": draw.one(DAYS),
        "phone": f"+{draw.number(30, 99)} {draw.number(1000, 9999)} {draw.number(100, 999)}",
        "number": str(draw.number(1, 9)),
        "amount": f"{draw.number(10, 300)}.{draw.number(10, 99)}",
        "yes": "yes",
    }
    values = (draw.one(asked.options) if asked.options else drawn[asked.check] for asked in form.fields)
    return Entry(0, form, tuple(values))


def pair(draw: Draw, form: Form) -> list[Entry]:
    """Two of a form, of other people."""
    return [entry(draw, form, name) for name in draw.some(NAMES, 2)]


def told(entry: Entry) -> str:
    """What a form is to be filled in with, in words."""
    parts = []
    for asked, value in zip(entry.form.fields, entry.values, strict=True):
        if asked.check != "yes":
            parts.append(f"{asked.name} {spoken(value) if asked.check == 'day' else value}")
    return ", ".join(parts)


def fill(entry: Entry) -> dict[str, str]:
    values = zip(entry.form.fields, entry.values, strict=True)
    return {asked.key: "on" if asked.check == "yes" else value for asked, value in values}


def hand_in(entry: Entry) -> Subgoal:
    page = address("forms", "new", entry.form.key)
    return Subgoal((go("/forms", page), Move(page, "send", fill(entry))), {f"forms/{entry}": 1})


def page_of(entry: Entry) -> str:
    return address("forms", "entry", entry.number)


def changed(old: Entry, new: Entry) -> Records:
    return {f"forms/{old}": None, f"forms/{new}": 1}


def fill_in(draw: Draw, form: Form) -> DeskTask:
    new = entry(draw, form)
    forms = archive(draw, without=new.values[0])
    return task(f"Send the form {form.name}: {told(new)}.", forms, hand_in(new))


@template("forms")
def forms_course(draw: Draw) -> DeskTask:
    return fill_in(draw, COURSE)


@template("forms")
def forms_claim(draw: Draw) -> DeskTask:
    return fill_in(draw, CLAIM)


@template("forms", heldout=True)
def forms_visit(draw: Draw) -> DeskTask:
    return fill_in(draw, VISIT)


@template("forms")
def forms_withdraw(draw: Draw) -> DeskTask:
    forms = archive(draw)
    old = draw.one(forms.entries)
    moves = go("/forms/sent", page_of(old)), Move(page_of(old), "withdraw")
    return task(f"Withdraw the {old.form.name.lower()} {old.number}.", forms, Subgoal(moves, {f"forms/{old}": None}))


@template("forms")
def forms_correct(draw: Draw) -> DeskTask:
    forms = archive(draw, *pair(draw, VISIT))
    old = draw.one([each for each in forms.entries if each.form == VISIT])
    name, phone, day, guests, terms = old.values
    count = draw.one([str(number) for number in range(1, 10) if str(number) != guests])
    new = replace(old, values=(name, phone, day, count, terms))
    form = address("forms", "change", old.number)
    moves = go("/forms/sent", page_of(old)), go(page_of(old), form), Move(form, "send", {"guests": count})
    return task(
        f"Change the number of guests of the visit {old.number} to {count}.", forms, Subgoal(moves, changed(old, new))
    )


@template("forms")
def forms_amount(draw: Draw) -> DeskTask:
    forms = archive(draw, *pair(draw, CLAIM))
    old = draw.one([each for each in forms.entries if each.form == CLAIM])
    look = see(page_of(old), go("/forms/sent", page_of(old)))
    return task(
        f"What amount does the expense claim {old.number} give?", forms, look, kind="money", value=old.values[-1]
    )


@template("forms", heldout=True)
def forms_twice(draw: Draw) -> DeskTask:
    """One has two claims; that of a given day is to be changed."""
    name, amount = draw.one(NAMES), f"{draw.number(301, 400)}.50"
    claims = []
    for day in draw.some(DAYS, 2):
        values = entry(draw, CLAIM, name).values
        claims.append(Entry(0, CLAIM, (*values[:2], day, *values[3:])))
    forms = archive(draw, *claims)
    other, old = (next(each for each in forms.entries if each.values == claim.values) for claim in claims)
    new = replace(old, values=(*old.values[:4], amount))
    form = address("forms", "change", old.number)
    moves = go("/forms/sent", page_of(old)), go(page_of(old), form), Move(form, "send", {"amount": amount})
    look = see(page_of(other), go("/forms/sent", page_of(other)))
    text = f"Change the amount of the expense claim of {name} for {spoken(old.values[2])} to {amount} EUR."
    return task(text, forms, look, Subgoal(moves, changed(old, new)))
