"""Oracles for pages of MiniWoB++, which read what an agent reads and nothing else."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..formats.actions import MAX_CALLS

LINE = re.compile(r'\[(?P<number>\d+)\] (?P<role>\w+)(?: (?P<vague>~?)"(?P<name>(?:\\.|[^"\\])*)")?(?P<rest>.*)')
VALUE = re.compile(r' value="((?:\\.|[^"\\])*)"')
STATE = re.compile(r"\((checked|disabled|expanded|selected)\)")
ORDINAL = re.compile(r"(\d+)(?:st|nd|rd|th)")


@dataclass(frozen=True, slots=True)
class Move:
    """A call of one of the tools of a screen."""

    tool: str
    arguments: Mapping[str, Any]
    times: int = 1  # that the call is made, in one turn


@dataclass(frozen=True, slots=True)
class Shown:
    """A control, as a line of the page tells of it."""

    number: int
    role: str
    name: str
    value: str | None
    options: tuple[str, ...]
    chosen: tuple[str, ...]
    states: frozenset[str]
    place: int  # its line among the lines of the page

    @property
    def click(self) -> Move:
        return Move("click", {"number": self.number})

    def type(self, text: str) -> Move:
        return Move("type", {"number": self.number, "text": text})

    def select(self, option: str) -> Move:
        return Move("select", {"number": self.number, "option": option})


@dataclass(frozen=True)
class Seen:
    """What an agent knows: the goal, the page as text, and its calls so far."""

    goal: str
    text: str
    calls: tuple[tuple[str, Mapping[str, Any]], ...] = ()

    @functools.cached_property
    def lines(self) -> list[str]:
        return self.text.split("\n")

    @functools.cached_property
    def all(self) -> list[Shown]:
        return [shown for place, line in enumerate(self.lines) if (shown := _shown(line, place))]

    @property
    def texts(self) -> list[str]:
        """The lines that are no controls, without the goal where the page repeats it."""
        return [line for line in self.lines if not LINE.match(line) and line != self.goal]

    def named(self, name: str, *roles: str) -> Shown | None:
        """The first control with this name, of one of the roles if there are any."""
        return next((one for one in self.of(*roles) if one.name == name), None)

    def of(self, *roles: str) -> list[Shown]:
        return [one for one in self.all if not roles or one.role in roles]

    def like(self, part: str, *roles: str) -> Shown | None:
        """The first control whose name has this part."""
        return next((one for one in self.of(*roles) if part in one.name), None)

    def quoted(self) -> list[str]:
        """What stands between quotes in the goal."""
        return re.findall(r'"([^"]*)"', self.goal)

    def before(self, shown: Shown) -> str:
        """The last line of text before a control."""
        return next((line for line in reversed(self.lines[: shown.place]) if not LINE.match(line)), "")


def _shown(line: str, place: int) -> Shown | None:
    if not (found := LINE.fullmatch(line)):
        return None
    rest, value = found["rest"], VALUE.match(found["rest"])
    options = rest.split(" options: ")[1].split(" (")[0].split(" | ") if " options: " in rest else []
    return Shown(
        int(found["number"]),
        found["role"],
        _plain(found["name"] or ""),
        _plain(value[1]) if value else None,
        tuple(option.removeprefix("*") for option in options),
        tuple(option[1:] for option in options if option.startswith("*")),
        frozenset(STATE.findall(rest)),
        place,
    )


def _plain(text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text)


Oracle = Callable[[Seen], Move | None]
ORACLES: dict[str, Oracle] = {}


def next_move(page: str, seen: Seen) -> Move | None:
    """What an expert does next; None where no oracle knows the page, or this one sees no way on."""
    oracle = ORACLES.get(page)
    return oracle(seen) if oracle else None


def solves(*pages: str) -> Callable[[Oracle], Oracle]:
    """The decorated function is the oracle of these pages."""

    def enter(oracle: Oracle) -> Oracle:
        ORACLES.update(dict.fromkeys(pages, oracle))
        return oracle

    return enter


# steps that many pages share


def submit(seen: Seen) -> Move | None:
    found = next(
        (one for one in seen.all if one.name.lower() in ("submit", "login", "ok", "search", "order!", "go!", "go")),
        None,
    )
    return found.click if found else None


def filled(seen: Seen, *pairs: tuple[Shown | None, str]) -> Move | None:
    """Writes each text into its field, then submits."""
    for shown, text in pairs:
        if shown is None:
            return None
        if shown.value != text:
            return shown.type(text)
    return submit(seen)


def ticked(seen: Seen, wanted: Sequence[Shown]) -> Move | None:
    """Checks boxes that are not yet, then submits."""
    return next((one.click for one in wanted if "checked" not in one.states), None) or submit(seen)


def clicked(shown: Shown | None) -> Move | None:
    return shown.click if shown else None


def number_in(text: str) -> int:
    found = re.search(r"-?\d+", text)
    return int(found[0]) if found else 0


def nth(seen: Seen, shown: Sequence[Shown]) -> Shown | None:
    """The one of them that the goal's ordinal number names."""
    found = ORDINAL.search(seen.goal)
    place = int(found[1]) - 1 if found else 0
    return shown[place] if place < len(shown) else None


# one click


@solves("click-button", "click-test", "click-test-2", "click-test-transfer", "unicode-test")
def named_button(seen: Seen) -> Move | None:
    names = seen.quoted() or re.findall(r"button (\w+)\.", seen.goal) or [one.name for one in seen.of("button")]
    return clicked(seen.named(names[0], "button"))


@solves("click-link")
def link(seen: Seen) -> Move | None:
    return clicked(seen.named(seen.quoted()[0]))


@solves("click-dialog", "click-dialog-2")
def dialog(seen: Seen) -> Move | None:
    name = seen.quoted()[0]
    return clicked(seen.named("Close" if name == "x" else name, "button"))


@solves("click-tab")
def tab(seen: Seen) -> Move | None:
    return clicked(seen.named(seen.goal.removeprefix("Click on ").rstrip("."), "tab"))


@solves("click-color")
def colour(seen: Seen) -> Move | None:
    name = seen.goal.removeprefix("Click on the ").removesuffix(" colored box.")
    boxes = [one for one in seen.of("clickable") if not one.name.startswith("query")]
    return clicked(next((one for one in boxes if f" {name} " in f" {one.name} "), None))


@solves("focus-text", "focus-text-2")
def focus(seen: Seen) -> Move | None:
    return clicked(nth(seen, seen.of("textbox")))


@solves("click-widget")
def widget(seen: Seen) -> Move | None:
    kind = seen.quoted()[0]
    fields = [one for one in seen.of("textbox") if one.name == kind]
    return clicked(next(iter(fields or seen.of(kind)), None))


@solves("count-shape")
def count_shape(seen: Seen) -> Move | None:
    count = sum(1 for one in seen.of("clickable") if _fits(one.name, seen.goal))
    return clicked(seen.named(str(count), "button"))


@solves("click-shape")
def shape(seen: Seen) -> Move | None:
    return clicked(next((one for one in seen.of("clickable") if _fits(one.name, seen.goal)), None))


COLOURS = "red green blue aqua cyan black magenta yellow white gray purple".split()
SHAPES = "circle rectangle triangle square".split()


def _fits(name: str, goal: str) -> bool:
    """Whether a figure such as "circle red 20x20" is what a goal such as "a large red circle" speaks of."""
    what, *colour, size = name.split(" ")
    words = [word.removesuffix("s") for word in re.findall(r"[\w]+", goal)]
    big = int(size.split("x")[1]) > (16 if what not in (*SHAPES, "polygon") else 14)
    wanted = [word for word in words if word in COLOURS]
    if wanted and " ".join(colour) != wanted[0].replace("aqua", "cyan"):
        return False
    if ("small" in words and big) or ("large" in words and not big):
        return False
    kind = "digit" if what.isdigit() else "shape" if what in SHAPES else "letter"
    if "rectangle" in words:
        return what in ("rectangle", "square")
    for each in ("circle", "triangle"):
        if each in words:
            return what == each
    for each in ("digit", "letter", "shape"):
        if each in words:
            return kind == each
    named = [word for word in re.findall(r"\b\w(?=e?s?\b)", goal) if word != "a"]
    return what == named[-1] if named else True


@solves("identify-shape")
def identify(seen: Seen) -> Move | None:
    drawn = next(iter(seen.texts[1:] or seen.texts), "")
    figure = re.search(r"circle|triangle|rectangle|square", drawn)
    kinds = {"circle": "Circle", "triangle": "Triangle", "rectangle": "Rectangle", "square": "Rectangle"}
    name = kinds[figure[0]] if figure else "Number" if re.fullmatch(r"\d", drawn) else "Letter"
    return clicked(seen.named(name, "button"))


@solves("grid-coordinate")
def grid(seen: Seen) -> Move | None:
    x, y = re.findall(r"-?\d+", seen.goal)
    return clicked(seen.like(f" {x} {y} plot point"))


@solves("find-greatest")
def greatest(seen: Seen) -> Move | None:
    cards = [one for one in seen.of("clickable") if re.fullmatch(r"-?\d+", one.name)]
    best = max(cards, key=lambda one: int(one.name), default=None)
    return submit(seen) if seen.calls else clicked(best)


# several clicks


@solves("click-button-sequence")
def sequence(seen: Seen) -> Move | None:
    return clicked(seen.named("TWO" if seen.calls else "ONE", "button"))


@solves("button-delay")
def delayed(seen: Seen) -> Move | None:
    seconds = float(number_in(seen.goal))
    moves = [clicked(seen.named("ONE")), Move("wait", {"seconds": seconds - 0.3}), clicked(seen.named("TWO"))]
    return moves[min(len(seen.calls), 2)]


@solves("ascending-numbers")
def ascending(seen: Seen) -> Move | None:
    return clicked(seen.like("square") if seen.calls else seen.like("1 "))


@solves("click-collapsible", "click-collapsible-nodelay")
def collapsible(seen: Seen) -> Move | None:
    return submit(seen) if seen.calls else clicked(next(iter(seen.of("tab")), None))


@solves(
    "click-collapsible-2", "click-collapsible-2-nodelay", "click-tab-2", "click-tab-2-easy", "click-tab-2-medium",
    "click-tab-2-hard",
)  # fmt: skip
def behind_tabs(seen: Seen) -> Move | None:
    if found := seen.named(seen.quoted()[0], "clickable", "link"):
        return found.click
    tabs, tried = seen.of("tab"), len(seen.calls)
    shut = [one for one in tabs if "expanded" not in one.states]
    return clicked(tabs[tried % len(tabs)]) if shut else None


@solves("click-option")
def option(seen: Seen) -> Move | None:
    name = seen.goal.removeprefix("Select ").removesuffix(" and click Submit.")
    found = seen.named(name, "radio")
    return ticked(seen, [found]) if found else None


@solves("click-checkboxes", "click-checkboxes-large", "click-checkboxes-transfer")
def checkboxes(seen: Seen) -> Move | None:
    names = seen.goal.removeprefix("Select ").removesuffix(" and click Submit.").split(", ")
    return ticked(seen, [one for one in seen.of("checkbox") if one.name in names])


@solves("choose-list")
def choose(seen: Seen) -> Move | None:
    name = seen.goal.removeprefix("Select ").removesuffix(" from the list and click Submit.")
    box = next(iter(seen.of("combobox")), None)
    return None if box is None else submit(seen) if name in box.chosen else box.select(name)


@solves("click-scroll-list")
def scroll_list(seen: Seen) -> Move | None:
    names = seen.goal.removeprefix("Select ").removesuffix(" from the scroll list and click Submit.").split(", ")
    box = next(iter(seen.of("listbox")), None)
    missing = [name for name in names if box and name not in box.chosen]
    return box.select(missing[0]) if box and missing else submit(seen)


@solves("click-shades")
def shades(seen: Seen) -> Move | None:
    wanted = re.search(r"shades of (\w+)", seen.goal)
    boxes = [one for one in seen.of("clickable") if wanted and wanted[1] in one.name.split(" ")]
    return clicked(boxes[len(seen.calls)]) if len(seen.calls) < len(boxes) else submit(seen)


@solves("click-menu")
def menu(seen: Seen) -> Move | None:
    path = seen.goal.removeprefix("Select ").split(">")
    shown = [found for name in path if (found := seen.named(name, "menuitem"))]
    if not shown:
        return None
    return shown[-1].click if len(shown) == len(path) else Move("hover", {"number": shown[-1].number})


@solves("click-menu-2")
def menu_button(seen: Seen) -> Move | None:
    items = seen.of("menuitem")
    if not items:
        return clicked(seen.named("Menu"))
    if not seen.quoted()[1:]:
        return None  # an icon, which is a picture
    if found := seen.named(seen.quoted()[-1], "menuitem"):
        return found.click
    return Move("hover", {"number": items[(len(seen.calls) - 1) % len(items)].number})


@solves("click-pie", "click-pie-nodelay")
def pie(seen: Seen) -> Move | None:
    item = next((one for one in seen.all if one.name.split(" ")[0] == seen.quoted()[0]), None)
    moves = [clicked(seen.like("+ ")), Move("wait", {"seconds": 1.0}), clicked(item)]
    return moves[min(len(seen.calls), 2)]


@solves("odd-or-even")
def odd_or_even(seen: Seen) -> Move | None:
    odd, even = ([one for one in seen.of("button") if one.name == name] for name in ("Odd", "Even"))
    numbers = [int(line) for line in seen.texts if re.fullmatch(r"-?\d+", line)]
    done = len(seen.calls)
    return clicked((odd if numbers[done] % 2 else even)[done]) if done < len(numbers) else submit(seen)


@solves("generate-number")
def generate(seen: Seen) -> Move | None:
    number = next((line for line in seen.texts if re.fullmatch(r"-|\d+", line)), "-")
    rule = re.search(r"(odd|even|greater than|less than) ?(\d+)?", seen.goal)
    if number == "-" or rule is None:
        return clicked(seen.named("Generate"))
    value, bound = int(number), int(rule[2] or 0)
    fits = {"odd": value % 2 == 1, "even": value % 2 == 0, "greater than": value > bound, "less than": value < bound}
    return submit(seen) if fits[rule[1]] else clicked(seen.named("Generate"))


@solves("navigate-tree")
def tree(seen: Seen) -> Move | None:
    if found := seen.named(seen.quoted()[0]):
        return found.click
    return clicked(next((one for one in seen.of("clickable") if "expandable" in one.name), None))


@solves("buy-ticket")
def ticket(seen: Seen) -> Move | None:
    books = [one for one in seen.of("button") if "$" in one.name]
    if re.search("duration|shortest|longest", seen.goal):

        def cost(one: Shown) -> int:
            hours, minutes = map(int, re.findall(r"\d+", seen.before(one))[:2])
            return 60 * hours + minutes

    else:

        def cost(one: Shown) -> int:
            return number_in(one.name.replace("$", ""))

    longest = re.search(r"longest|most expensive", seen.goal)
    return clicked((max if longest else min)(books, key=cost)) if books else None


@solves("book-flight", "book-flight-nodelay")
def flight(seen: Seen) -> Move | None:
    found = re.search(r"from: (.+) to: (.+) on", seen.goal)
    fields = [seen.named("From:"), seen.named("To:")]
    for field, place in zip(fields, found.groups() if found else (), strict=False):
        if field is None:
            return ticket(seen)  # among the flights that were found
        if place not in (field.value or ""):
            return field.type(place)
        airport = rf"{re.escape(place)} \(.*|.*\({re.escape(place)}\)"
        if offered := next((one for one in seen.of("clickable") if re.fullmatch(airport, one.name)), None):
            return offered.click
    return date(seen)


@solves("phone-book")
def phone_book(seen: Seen) -> Move | None:
    wanted = re.search(r"Find (\w+) in the contact book and click on their (\w+)", seen.goal)
    if wanted and wanted[1] in seen.lines:
        kind = {"phone number": "Phone:", "phone": "Phone:", "email": "Email:", "address": "Address:"}[wanted[2]]
        return clicked(next((one for one in seen.of("link") if seen.before(one) == kind), None))
    return clicked(seen.named(">"))


@solves("search-engine")
def search_engine(seen: Seen) -> Move | None:
    box = seen.like("search text")
    if box and box.value != seen.quoted()[0]:
        return box.type(seen.quoted()[0])
    results = [one for one in seen.of("link", "clickable") if not re.fullmatch(r"[\d<>]+", one.name)]
    if not results:
        return clicked(seen.named("Search"))
    wanted = ORDINAL.search(seen.goal)
    place = int(wanted[1]) - 1 if wanted else 0
    turned = sum(1 for call, _ in seen.calls if call == "click") - 1
    if turned < place // 3:
        return clicked(seen.named(">"))
    return clicked(results[place % 3])


@solves("stock-market")
def stock(seen: Seen) -> Move | None:
    bound = re.search(r"less than \$([\d.]+?)\.?$", seen.goal)
    price = re.search(r"Stock price: \$([\d.]+)", seen.text)
    if bound and price and float(price[1]) < float(bound[1]):
        return clicked(seen.named("Buy"))
    return Move("wait", {"seconds": 0.5})


@solves("order-food")
def order_food(seen: Seen) -> Move | None:
    wanted = re.search(r"Order (\d+) items? that \w+ (?:any |no )?([\w-]+)", seen.goal)
    plus = [one for one in seen.of("clickable") if one.name == "+"]
    about = [seen.lines[(0 if i == 0 else plus[i - 1].place + 1) : one.place] for i, one in enumerate(plus)]
    if wanted:
        fitting = [one for one, lines in zip(plus, about, strict=True) if f"(image {wanted[2]})" in " ".join(lines)]
        fitting = fitting[: int(wanted[1])]
    else:
        names = seen.goal.partition(": ")[2].split(", ")
        fitting = [one for one, lines in zip(plus, about, strict=True) if set(lines) & set(names)]
    return clicked(fitting[len(seen.calls)]) if len(seen.calls) < len(fitting) else submit(seen)


@solves("tic-tac-toe")
def tic_tac_toe(seen: Seen) -> Move | None:
    cells = [one for one in seen.all if "ttt" in one.name]
    marks = "".join("x" if "mark x" in one.name else "o" if "mark o" in one.name else "." for one in cells)
    return clicked(cells[best_cell(marks)]) if "." in marks and len(cells) == 9 else None


ROWS = ((0, 1, 2), (3, 4, 5), (6, 7, 8), (0, 3, 6), (1, 4, 7), (2, 5, 8), (0, 4, 8), (2, 4, 6))


def best_cell(marks: str) -> int:
    """Wins where it can, hinders where it must, and otherwise takes the cell of the most open rows."""

    def worth(cell: int) -> tuple[int, int, int]:
        rows = ["".join(marks[i] for i in row if i != cell) for row in ROWS if cell in row]
        return rows.count("xx"), rows.count("oo"), sum("o" not in row for row in rows) + sum("x" in row for row in rows)

    return max((i for i, mark in enumerate(marks) if mark == "."), key=worth)


# texts


@solves("enter-text", "enter-text-dynamic")
def enter_text(seen: Seen) -> Move | None:
    return filled(seen, (seen.like("tt"), seen.quoted()[0]))


@solves("enter-text-2")
def enter_case(seen: Seen) -> Move | None:
    text = seen.quoted()[0]
    return filled(seen, (seen.like("tt"), text.upper() if "upper case" in seen.goal else text.lower()))


@solves("enter-password")
def password(seen: Seen) -> Move | None:
    return written(seen, seen.of("textbox"), seen.quoted() * 2)


@solves("login-user")
def login(seen: Seen) -> Move | None:
    return written(seen, seen.of("textbox"), seen.quoted())


@solves("login-user-popup")
def login_popup(seen: Seen) -> Move | None:
    if shut := next((one for one in seen.all if one.name in ("Cancel", "Close", "No")), None):
        return shut.click
    return written(seen, [one for one in seen.of("textbox") if one.name in ("username", "password")], seen.quoted())


def written(seen: Seen, fields: Sequence[Shown], texts: Sequence[str]) -> Move | None:
    """Writes texts into fields, passwords among them, whose values are as many dots; then submits."""
    for shown, text in zip(fields, texts, strict=False):
        if shown.value not in (text, "•" * len(text)):
            return shown.type(text)
    return submit(seen)


@solves("enter-date")
def enter_date(seen: Seen) -> Move | None:
    found = re.search(r"(\d+)/(\d+)/(\d+)", seen.goal)
    return filled(seen, (seen.like("tt"), f"{found[3]}-{found[1]}-{found[2]}")) if found else None


@solves("enter-time")
def enter_time(seen: Seen) -> Move | None:
    found = re.search(r"(\d+):(\d+) (AM|PM)", seen.goal)
    if not found:
        return None
    hour = int(found[1]) % 12 + 12 * (found[3] == "PM")
    return filled(seen, (seen.like("tt"), f"{hour:02}:{found[2]}"))


@solves("text-transform")
def transform(seen: Seen) -> Move | None:
    return filled(seen, (seen.like("tt"), seen.texts[0].replace(" ", "")))


@solves("find-word")
def find_word(seen: Seen) -> Move | None:
    found = ORDINAL.search(seen.goal)
    words = seen.texts[0].split()
    return filled(seen, (seen.like("answer"), words[int(found[1]) - 1].strip(".,"))) if found else None


@solves("scroll-text")
def last_word(seen: Seen) -> Move | None:
    area = seen.like("text area")
    return filled(seen, (seen.like("answer"), (area.value or "").split()[-1].strip(".,"))) if area else None


@solves("scroll-text-2")
def scroll_text(seen: Seen) -> Move | None:
    if (area := seen.like("text area")) is None or len(seen.calls) >= MAX_CALLS:
        return submit(seen)
    if "bottom" in seen.goal:
        return Move("scroll", {"number": area.number}, MAX_CALLS)
    return Move("press", {"key": "PageUp"}, MAX_CALLS) if seen.calls else area.click


@solves("sign-agreement")
def agreement(seen: Seen) -> Move | None:
    area, field = seen.of("textbox")
    if not seen.quoted():
        return clicked(seen.named("Cancel"))
    name, button = seen.quoted()
    if "disabled" in field.states:
        return Move("scroll", {"number": area.number}, MAX_CALLS)
    return field.type(name) if field.value != name else clicked(seen.named(button))


@solves("use-colorwheel")
def colour_wheel(seen: Seen) -> Move | None:
    name = seen.goal.removeprefix("Select ").split(" with")[0]
    return filled(seen, (next(iter(seen.of("textbox")), None), CSS[name]))


CSS = dict(
    black="000000", white="FFFFFF", aqua="00FFFF", blue="0000FF", gray="808080", green="008000", lime="00FF00",
    maroon="800000", navy="000080", olive="808000", purple="800080", red="FF0000", silver="C0C0C0", teal="008080",
    yellow="FFFF00", pink="FFC0CB", magenta="FF00FF", gold="FFD700", orange="FFA500",
)  # fmt: skip


@solves("copy-paste")
def copy(seen: Seen) -> Move | None:
    source = seen.like("copy")
    return filled(seen, (seen.like("answer"), source.value or "")) if source else None


@solves("copy-paste-2")
def copy_nth(seen: Seen) -> Move | None:
    source = nth(seen, [one for one in seen.of("textbox") if one.name.startswith("text")])
    return filled(seen, (seen.like("answer"), source.value or "")) if source else None


@solves("simple-arithmetic")
def arithmetic(seen: Seen) -> Move | None:
    found = re.search(r"(-?\d+) ([-+x/]) (-?\d+)", "\n".join(seen.texts))
    if not found:
        return None
    left, sign, right = int(found[1]), found[2], int(found[3])
    value = {"+": left + right, "-": left - right, "/": left // (right or 1)}.get(sign, left * right)
    return filled(seen, (seen.like("answer"), str(value)))


@solves("simple-algebra")
def algebra(seen: Seen) -> Move | None:
    found = re.search(r"^(\w+) ([-+]) (\w+) = (-?\d+)$", "\n".join(seen.texts), re.MULTILINE)
    if not found:
        return None
    left, sign, right, total = found[1], found[2], found[3], int(found[4])
    if left == "x":
        value = total - int(right) if sign == "+" else total + int(right)
    else:
        value = total - int(left) if sign == "+" else int(left) - total
    return filled(seen, (seen.like("answer"), str(value)))


@solves("read-table")
def table(seen: Seen) -> Move | None:
    label = seen.goal.removeprefix("Enter the value of ").removesuffix(" into the text field and press Submit.")
    return filled(seen, (seen.like("tt"), _cell(seen, label)))


@solves("read-table-2")
def table_form(seen: Seen) -> Move | None:
    return filled(seen, *((one, _cell(seen, seen.before(one).rstrip(":"))) for one in seen.of("textbox")))


def _cell(seen: Seen, label: str) -> str:
    return next((line.split(" | ")[1] for line in seen.lines if line.startswith(f"{label} | ")), "")


@solves("multi-layouts", "multi-orderings")
def movie(seen: Seen) -> Move | None:
    found = re.search(r"Search for (.+) movies directed by (.+) from year (\d+)\.", seen.goal)
    if not found:
        return None
    about = {"genre": found[1], "type": found[1], "direct": found[2], "year": found[3], "date": found[3]}
    fields = seen.of("textbox")
    first = seen.before(fields[0]).lower() if fields else ""
    below = first == seen.goal.lower() or not any(word in first for word in about)  # names stand below their fields
    texts = [seen.lines[one.place + 1] if below else seen.before(one) for one in fields]
    wanted = [next((about[word] for word in about if word in text.lower()), "") for text in texts]
    return filled(seen, *zip(fields, wanted, strict=True))


@solves("use-autocomplete", "use-autocomplete-nodelay")
def autocomplete(seen: Seen) -> Move | None:
    start, *end = seen.quoted()
    box = seen.like("Tags")

    def fits(text: str) -> bool:
        return text.startswith(start) and (not end or text.endswith(end[0])) and text != start

    if box is None or fits(box.value or ""):
        return submit(seen)
    offered = [one for one in seen.of("clickable", "option", "menuitem") if fits(one.name)]
    return offered[0].click if offered else box.type(start)


@solves("use-spinner")
def spinner(seen: Seen) -> Move | None:
    box, up, down = next(iter(seen.of("spinbutton")), None), seen.like(" up "), seen.like(" down ")
    if box is None or up is None or down is None:
        return None
    apart = number_in(seen.goal) - number_in(box.value or "0")
    return (
        Move("click", {"number": (up if apart > 0 else down).number}, min(abs(apart), MAX_CALLS))
        if apart
        else submit(seen)
    )


@solves("use-slider", "use-slider-2", "form-sequence")
def sliders(seen: Seen) -> Move | None:
    handles = [one for one in seen.of("clickable") if "slider" in one.name]
    wanted = [int(number) for number in re.findall(r"-?\d+", seen.goal)][: len(handles)]
    for handle, value in zip(handles, wanted, strict=True):
        apart = value - number_in(seen.lines[handle.place + 1])
        if apart and "focus" not in handle.name:
            return handle.click
        if apart:
            return Move("press", {"key": "ArrowRight" if apart > 0 else "ArrowLeft"}, min(abs(apart), MAX_CALLS))
    boxes = seen.of("checkbox")
    chosen = nth(seen, boxes) if boxes else None
    return ticked(seen, [chosen] if chosen else [])


@solves("form-sequence-3")
def form_three(seen: Seen) -> Move | None:
    height, box = seen.goal.removeprefix("Choose ").split(" from the dropdown")[0], seen.like("▾")
    if box and box.name.startswith(height):
        return clicked(seen.named(seen.quoted()[0], "button"))
    return clicked(seen.named(height, "clickable") or box)


@solves("form-sequence-2")
def form_two(seen: Seen) -> Move | None:
    first, second = (int(number) - 1 for number in ORDINAL.findall(seen.goal))
    radio, box, text = seen.of("radio")[first], seen.of("textbox")[second], seen.quoted()[0]
    if box.value != text:
        return box.type(text)
    return ticked(seen, [radio])


@solves("guess-number")
def guess(seen: Seen) -> Move | None:
    box = next(iter(seen.of("spinbutton", "textbox")), None)
    hint = re.search(r"(higher|lower) than (-?\d+)", seen.text)
    typed, submitted = (sum(1 for call, _ in seen.calls if call == name) for name in ("type", "click"))
    if box is None or typed > submitted:
        return submit(seen)
    return box.type(str(int(hint[2]) + (1 if hint[1] == "higher" else -1)) if hint else "5")


@solves("choose-date", "choose-date-easy", "choose-date-medium", "choose-date-nodelay")
def date(seen: Seen) -> Move | None:
    found = re.search(r"(\d+)/(\d+)/(\d+)", seen.goal)
    box = seen.like("datepicker")
    if not found or box is None:
        return None
    if box.value == found[0]:
        return submit(seen)
    return picked(seen, box, int(found[1]), int(found[2]), int(found[3]))


MONTHS = "January February March April May June July August September October November December".split()


def picked(seen: Seen, box: Shown, month: int, day: int, year: int) -> Move | None:
    """Picks a day in jQuery UI's calendar, which opens with a click on its box."""
    title = re.search(rf"({'|'.join(MONTHS)}) ?\|? ?(\d{{4}})", seen.text)
    if not title:
        return box.click
    apart = (int(title[2]) - year) * 12 + MONTHS.index(title[1]) + 1 - month
    if apart:
        return clicked(seen.named("Prev" if apart > 0 else "Next"))
    return clicked(seen.named(str(day), "link", "clickable"))


# mail and posts


@solves(
    "email-inbox", "email-inbox-delete", "email-inbox-forward", "email-inbox-forward-nl", "email-inbox-important",
    "email-inbox-forward-nl-turk", "email-inbox-nl-turk", "email-inbox-noscroll", "email-inbox-reply",
    "email-inbox-star-reply",
)  # fmt: skip
def email(seen: Seen) -> Move | None:
    if field := seen.like("reply text"):  # a reply is being written
        text = seen.quoted()[0] if seen.quoted() else ""
        return field.type(text) if field.value != text else clicked(seen.like("send"))
    if field := seen.like("forward sender"):
        name = recipient(seen.goal)
        return field.type(name) if field.value != name else clicked(seen.like("send"))
    if button := seen.named("Reply" if seen.quoted() else "Forward"):
        return button.click
    names = set(re.findall(r"\b[A-Z]\w+", re.sub(r'"[^"]*"', "", seen.goal))) - {recipient(seen.goal)}
    sender = next((one for one in seen.of("clickable") if one.name.split(" ")[0] in names), None)
    if sender is None:
        return None
    icon = re.search(r"(delete|trash|rid of)|(star|important)", seen.goal)
    if icon is None:
        return sender.click
    after = [one for one in seen.all if one.number > sender.number]
    return clicked(next((one for one in after if one.name.startswith("trash" if icon[1] else "star")), None))


def recipient(goal: str) -> str:
    """To whom a goal wants a mail to be forwarded; empty where it does not say so."""
    found = re.search(r"(?i:forward|send|give|pass).*?\bto ([A-Z]\w+)", goal)
    found = found or re.search(r"(?i:give|send|forward) ([A-Z]\w+) (?:the|that)", goal)
    return found[1] if found else ""


@solves("social-media")
def social(seen: Seen) -> Move | None:
    user, wanted = re.search(r"@(\w+)", seen.goal), seen.quoted()[0]
    posts = [one for one in seen.all if user and f"@{user[1]} " in _post(seen, one)]
    found = next((one for one in posts if one.name in (wanted, wanted.lower(), f"{wanted} @{user and user[1]}")), None)
    return clicked(found or next((one for one in posts if one.name == "more"), None))


def _post(seen: Seen, shown: Shown) -> str:
    """The line with the author of the post in which a control is."""
    return next((f"{line} " for line in reversed(seen.lines[: shown.place]) if re.search(r" @\w+", line)), "")


@solves("social-media-all", "social-media-some")
def social_many(seen: Seen) -> Move | None:
    user, wanted = re.search(r"@(\w+)", seen.goal), seen.quoted()[0].lower()
    posts = [one for one in seen.all if user and f"@{user[1]} " in _post(seen, one) and one.name.startswith(wanted)]
    some = re.search(r"on (\d+) posts?", seen.goal)
    posts = posts[: int(some[1])] if some else posts
    return clicked(next((one for one in posts if "active" not in one.name), None)) or submit(seen)
