"""Flight desk: bookings, requests about them, and written rules, which nothing but the clerk enforces."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .calendar import day_of
from .model import Records
from .pages import Fields, Item, Items, Path, Query, address, button, choice, field, link, listing, whole

FEE = 40  # EUR, for another day with Flex
BAGS = {"Basic": 1, "Flex": 2, "Business": 3}  # the most that a booking has, by its fare
FARE, LATE, MANY = "Not with this fare", "Bought too long ago", "Too many bags"
REASONS = (FARE, LATE, MANY)
RULES = (
    "Today is 2026-05-04.",
    "Cancelling: Flex and Business at any time. Basic on the day of buying and on the next day; later it is declined.",
    f"Another day: not with Basic. Flex pays a fee of {FEE} EUR, Business nothing.",
    "Bags: with those that are booked, Basic has at most 1, Flex 2, Business 3.",
    "What the rules allow is done in the booking; then the request is marked as done. All else is declined with its "
    "reason, and the booking stays as it is.",
)


@dataclass(frozen=True, slots=True)
class Booking:
    code: str
    passenger: str
    route: str
    day: str
    fare: str
    bought: str  # the day
    bags: int
    fees: int = 0  # EUR, that have been taken
    status: str = "booked"


@dataclass(frozen=True, slots=True)
class Request:
    number: int
    code: str  # of the booking
    text: str
    status: str = "open"


@dataclass(frozen=True, slots=True)
class Flight:
    bookings: tuple[Booking, ...]
    requests: tuple[Request, ...]
    name: str = "flight"

    @property
    def menu(self) -> dict[str, str]:
        return {"Flight": "/flight", "Bookings": "/flight/bookings", "Rules": "/flight/rules"}

    def booking(self, code: str) -> Booking | None:
        return next((booking for booking in self.bookings if booking.code == code), None)

    def request(self, number: str) -> Request | None:
        return next((request for request in self.requests if str(request.number) == number), None)

    def records(self) -> Records:
        return {
            **{
                f"{each.code}/{name}": getattr(each, name) for each in self.bookings for name in ("day", "bags", "fees")
            },
            **{f"{booking.code}/status": booking.status for booking in self.bookings},
            **{f"request/{request.number}": request.status for request in self.requests},
        }

    def view(self, path: Path, query: Query, size: int) -> Items | None:
        here = address("flight", *path, **query)
        match path:
            case ():
                requests: list[Items] = [
                    (link(f"Request {each.number}", address("flight", "request", each.number)), each.status)
                    for each in self.requests
                ]
                return "Requests", *listing(requests, here, size)
            case ("rules",):
                return "Rules", *RULES
            case ("bookings",):
                bookings: list[Items] = [(_link(booking), booking.passenger) for booking in self.bookings]
                return "Bookings", *listing(bookings, here, size)
            case ("booking", code):
                booking = self.booking(code)
                return _booking(booking) if booking else None
            case ("request", number):
                request = self.request(number)
                return _request(request) if request else None
        return None

    def submit(self, path: Path, query: Query, button: str, fields: Fields) -> tuple[Flight, str]:
        if path[0] == "request":
            status = "done" if button == "done" else f"declined: {fields['reason']}"
            requests = (replace(r, status=status) if str(r.number) == path[1] else r for r in self.requests)
            return replace(self, requests=tuple(requests)), "/flight"
        booking = self.booking(path[1])
        assert booking is not None
        changed = _changed(booking, button, fields)
        bookings = tuple(changed if each.code == booking.code else each for each in self.bookings)
        return replace(self, bookings=bookings), address("flight", *path)


def _changed(booking: Booking, button: str, fields: Fields) -> Booking:
    if button == "cancel":
        return replace(booking, status="cancelled")
    if button == "bag":
        return replace(booking, bags=booking.bags + 1)
    fees = booking.fees + whole(fields["fee"], "Fee in EUR", 0, 500)
    return replace(booking, day=day_of(fields["day"], "New day"), fees=fees)


def _link(booking: Booking) -> Item:
    return link(f"Booking {booking.code}", address("flight", "booking", booking.code))


def _request(request: Request) -> Items:
    closing = button("done", "Mark as done"), choice("reason", "Reason", REASONS), button("decline", "Decline")
    return (
        f"Request {request.number}, {request.status}",
        request.text,
        link(f"Booking {request.code}", address("flight", "booking", request.code)),
        *closing * (request.status == "open"),
    )


def _booking(booking: Booking) -> Items:
    change = field("day", "New day"), field("fee", "Fee in EUR", 0, "spinbutton"), button("change", "Change day")
    return (
        f"Booking {booking.code}, {booking.status}",
        f"{booking.passenger}, {booking.route}, on {booking.day}",
        f"Fare {booking.fare}, bought on {booking.bought}, bags: {booking.bags}, fees: {booking.fees} EUR",
        *(*change, button("bag", "Add bag"), button("cancel", "Cancel booking")) * (booking.status == "booked"),
    )
