"""Tasks across two applications: what stands in one is to be done in the other."""

from __future__ import annotations

from dataclasses import replace

from . import calendar_tasks, files_tasks, forms_tasks, mail_tasks, shop_tasks
from .calendar import Event
from .forms import FORMS, Entry
from .pages import address, money
from .plan import DeskTask, Draw, go
from .shop import Line
from .templates import PLACES, see, spoken, task, template

APPOINTMENT = "Phone call"  # no title of the events that calendars have


def appointment(draw: Draw, days: tuple[str, ...]) -> Event:
    return replace(calendar_tasks.event(draw, "", APPOINTMENT, draw.one(days)), place=draw.one(PLACES))


@template("mail", "calendar")
def mail_to_calendar(draw: Draw) -> DeskTask:
    calendar = calendar_tasks.planned(draw)
    new = appointment(draw, calendar.days)
    text = f"Let us talk on {spoken(new.day)} from {new.start} to {new.end} in the {new.place}."
    mail = mail_tasks.mailbox(draw, text)
    letter = mail_tasks.letter(mail, "m1")
    when = f"for the time and in the place that {mail_tasks.called(letter)} gives"
    goal = f'Enter an event "{APPOINTMENT}" in the calendar, {when}.'
    return task(goal, (mail, calendar), mail_tasks.read(letter), calendar_tasks.enter(new))


@template("mail", "shop")
def mail_to_cart(draw: Draw) -> DeskTask:
    shop = shop_tasks.stocked(draw)
    product = draw.one(shop_tasks.to_be_had(shop))
    line = Line(product, draw.one(product.colours), draw.number(2, 6))
    mail = mail_tasks.mailbox(draw, f"Please get {line.quantity} of the {product.name} in {line.colour}.")
    letter = mail_tasks.letter(mail, "m1")
    goal = f"Put what {mail_tasks.called(letter)} asks for into the cart of the shop."
    return task(goal, (mail, shop), mail_tasks.read(letter), shop_tasks.put(line))


@template("mail", "forms")
def mail_to_claim(draw: Draw) -> DeskTask:
    new = forms_tasks.entry(draw, FORMS[1])
    day, kind, amount = new.values[2:]
    mail = mail_tasks.mailbox(draw, f"On {spoken(day)} I paid {amount} EUR ({kind.lower()}).")
    letter = mail_tasks.letter(mail, "m1")
    sender = letter.sender
    new = Entry(0, new.form, (sender.name, sender.email, day, kind, amount))
    forms = forms_tasks.archive(draw, without=sender.name)
    goal = f"Send an expense claim for what {mail_tasks.called(letter)} tells, with name and address of the sender."
    plan = mail_tasks.read(letter), see("/mail/contacts"), forms_tasks.hand_in(new)
    return task(goal, (mail, forms), *plan)


@template("files", "mail")
def file_to_mail(draw: Draw) -> DeskTask:
    text = f"The code of the safe is {draw.number(1000, 9999)}."
    files, mail = files_tasks.stored(draw, text), mail_tasks.mailbox(draw)
    file, to = files.files[0], draw.one(mail.contacts)
    plan = (
        see(files_tasks.page_of(file), *files_tasks.to_file(files, file)),
        see("/mail/contacts"),
        mail_tasks.send(mail, to, file.name, text),
    )
    goal = f"Write to {to.name} what {files_tasks.called(file)} says, word for word, with its name as the subject."
    return task(goal, (files, mail), *plan)


@template("calendar", "mail", heldout=True)
def calendar_to_mail(draw: Draw) -> DeskTask:
    calendar, mail = calendar_tasks.planned(draw), mail_tasks.mailbox(draw)
    event, to = draw.one(calendar.events), draw.one(mail.contacts)
    page = calendar_tasks.day_page(event.day)
    plan = see(page, go("/calendar", page)), see("/mail/contacts"), mail_tasks.send(mail, to, event.title, event.place)
    goal = (
        f"Write to {to.name} in which place {calendar_tasks.called(event)} is: as the text the place alone, as the "
        "subject the title of the event."
    )
    return task(goal, (calendar, mail), *plan)


@template("shop", "mail")
def order_to_mail(draw: Draw) -> DeskTask:
    shop, mail = shop_tasks.with_orders(shop_tasks.stocked(draw), draw, 4), mail_tasks.mailbox(draw)
    order, to = draw.one(shop.orders), draw.one(mail.contacts)
    page, subject = address("shop", "order", order.number), f"Order {order.number}"
    plan = (
        see(page, go("/shop/orders", page)),
        see("/mail/contacts"),
        mail_tasks.send(mail, to, subject, money(order.cents)),
    )
    goal = f'Write to {to.name} the total of order {order.number}: the subject "{subject}", the text as in "12.50 EUR".'
    return task(goal, (shop, mail), *plan)


@template("files", "calendar", heldout=True)
def file_to_calendar(draw: Draw) -> DeskTask:
    calendar = calendar_tasks.planned(draw)
    new = appointment(draw, calendar.days)
    text = f"{spoken(new.day)}, {new.start} to {new.end}, {new.place}"
    files = files_tasks.stored(draw, text)
    file = files.files[0]
    look = see(files_tasks.page_of(file), *files_tasks.to_file(files, file))
    goal = (
        f'Enter an event "{APPOINTMENT}" in the calendar, for the time and in the place in {files_tasks.called(file)}.'
    )
    return task(goal, (files, calendar), look, calendar_tasks.enter(new))


@template("mail", "files")
def mail_to_file(draw: Draw) -> DeskTask:
    files = files_tasks.stored(draw)
    file = draw.one(files.files)
    folder = files_tasks.other_folder(files, file, draw)
    mail = mail_tasks.mailbox(draw, f"Please move {files_tasks.called(file)} to {folder}.")
    letter = mail_tasks.letter(mail, "m1")
    star = f"mail/{letter.id}/starred"
    done = mail_tasks.on(letter, "star", {star: True})
    goal = f"Do what {mail_tasks.called(letter)} asks for, then star the mail."
    return task(goal, (mail, files), mail_tasks.read(letter), files_tasks.move(files, file, folder), done)
