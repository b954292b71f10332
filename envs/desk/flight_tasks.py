"""Tasks of the flight desk: requests that are to be handled by its rules."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from .flight import BAGS, FARE, FEE, LATE, MANY, Booking, Flight, Request
from .model import Records
from .pages import address
from .plan import DeskTask, Draw, Move, Subgoal, go
from .templates import DAYS, NAMES, TODAY, see, spoken, task, template

ROUTES = "Oslo to Rome|Rome to Oslo|Paris to Vienna|Vienna to Paris|Lisbon to Prague|Prague to Lisbon".split("|")


@dataclass(frozen=True, slots=True)
class Wish:
    """What a passenger wants, and what the rules say of it."""

    booking: Booking
    text: str
    refused: str  # the reason; empty where it is allowed
    click: str
    fill: Records
    changes: Records


def booked(draw: Draw) -> list[Booking]:
    """Eight bookings of four passengers, of every fare, bought today or in the days before."""
    names = draw.some(NAMES, 4)
    codes = draw.some([f"{letter}{number}" for letter in "KLMX" for number in range(21, 60)], 8)
    return [
        Booking(
            code,
            draw.one(names),
            draw.one(ROUTES),
            draw.one(DAYS),
            draw.one([*BAGS]),
            str(TODAY - timedelta(draw.number(0, 3))),
            draw.number(0, 1),
        )
        for code in codes
    ]


def cancelling(booking: Booking, draw: Draw) -> Wish:
    late = booking.fare == "Basic" and booking.bought < str(TODAY - timedelta(1))
    text = f"Please cancel my booking {booking.code}."
    return Wish(booking, text, LATE * late, "cancel", {}, {f"flight/{booking.code}/status": "cancelled"})


def changing(booking: Booking, draw: Draw) -> Wish:
    day = draw.one([day for day in DAYS if day != booking.day])
    fee = FEE * (booking.fare == "Flex")
    changes: Records = {f"flight/{booking.code}/day": day, **({f"flight/{booking.code}/fees": fee} if fee else {})}
    text = f"I want to fly on {spoken(day)} instead, with booking {booking.code}."
    fill = {"day": day, "fee": str(fee)}
    return Wish(booking, text, FARE * (booking.fare == "Basic"), "change", fill, changes)


def packing(booking: Booking, draw: Draw) -> Wish:
    many = booking.bags >= BAGS[booking.fare]
    changes: Records = {f"flight/{booking.code}/bags": booking.bags + 1}
    return Wish(booking, f"One more bag for booking {booking.code}, please.", MANY * many, "bag", {}, changes)


WISHES = cancelling, changing, packing


def desk(draw: Draw, *wishes: Wish, bookings: list[Booking]) -> tuple[Flight, list[Request]]:
    """The flight desk with a request for each wish, among others; and these requests."""
    others = [draw.one(WISHES)(booking, draw) for booking in draw.some(bookings, 3)]
    numbers = draw.some(range(1, 40), len(wishes) + len(others))
    requests = [Request(n, wish.booking.code, wish.text) for n, wish in zip(numbers, (*wishes, *others), strict=True)]
    ordered = tuple(sorted(requests, key=lambda request: request.number))
    return Flight(tuple(bookings), ordered), requests[: len(wishes)]


def handle(request: Request, wish: Wish) -> tuple[Subgoal, ...]:
    """Read the request, the booking and the rules; act in the booking, if they allow it; close the request."""
    page, booking = address("flight", "request", request.number), address("flight", "booking", request.code)
    there, status = (go("/flight", page), go(page, booking)), f"flight/request/{request.number}"
    read = see(booking, *there), see("/flight/rules")
    if wish.refused:
        closing = Move(page, "decline", {"reason": wish.refused})
        return *read, Subgoal((go("/flight", page), closing), {status: f"declined: {wish.refused}"})
    act = Subgoal((*there, Move(booking, wish.click, _texts(wish.fill))), wish.changes)
    return *read, act, Subgoal((go("/flight", page), Move(page, "done")), {status: "done"})


def _texts(fill: Records) -> dict[str, str]:
    return {key: str(value) for key, value in fill.items()}


def one_request(draw: Draw, kind: int) -> DeskTask:
    """As often one that the rules allow as one that they do not."""
    allowed = draw.one((True, False))
    while True:
        bookings = booked(draw)
        wishes = [WISHES[kind](booking, draw) for booking in bookings]
        if right := [wish for wish in wishes if allowed != bool(wish.refused)]:
            wish = draw.one(right)
            flight, (request,) = desk(draw, wish, bookings=bookings)
            return task(f"Handle request {request.number} by the rules.", flight, *handle(request, wish))


@template("flight")
def flight_cancel(draw: Draw) -> DeskTask:
    return one_request(draw, 0)


@template("flight")
def flight_change(draw: Draw) -> DeskTask:
    return one_request(draw, 1)


@template("flight")
def flight_bag(draw: Draw) -> DeskTask:
    return one_request(draw, 2)


@template("flight")
def flight_two(draw: Draw) -> DeskTask:
    bookings = booked(draw)
    wishes = [draw.one(WISHES)(booking, draw) for booking in draw.some(bookings, 2)]
    flight, requests = desk(draw, *wishes, bookings=bookings)
    subgoals = [subgoal for request, wish in zip(requests, wishes, strict=True) for subgoal in handle(request, wish)]
    numbers = " and ".join(str(request.number) for request in requests)
    return task(f"Handle the requests {numbers} by the rules.", flight, *subgoals)


@template("flight")
def flight_fee(draw: Draw) -> DeskTask:
    bookings = booked(draw)
    free = [booking for booking in bookings if booking.fare != "Basic"]
    booking = draw.one(free or bookings)
    flight, _ = desk(draw, bookings=bookings)
    page = address("flight", "booking", booking.code)
    text = f"What fee does booking {booking.code} pay for another day?"
    look = see(page, go("/flight/bookings", page)), see("/flight/rules")
    return task(text, flight, *look, kind="money", value=f"{FEE * (booking.fare == 'Flex')}.00 EUR")


@template("flight")
def flight_bags_left(draw: Draw) -> DeskTask:
    bookings = booked(draw)
    booking = draw.one(bookings)
    flight, _ = desk(draw, bookings=bookings)
    page = address("flight", "booking", booking.code)
    text = f"How many bags more may booking {booking.code} have by the rules?"
    look = see(page, go("/flight/bookings", page)), see("/flight/rules")
    return task(text, flight, *look, kind="number", value=BAGS[booking.fare] - booking.bags)
