"""Shop: search, filters, options, a cart, a wish list, orders."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .model import Records
from .pages import (
    CHOSEN,
    Fields,
    Item,
    Items,
    Path,
    Query,
    Refused,
    address,
    button,
    checkbox,
    choice,
    field,
    link,
    listing,
    money,
    needed,
    radios,
    whole,
)

MOST = 9  # of one thing in a cart
SHIPPING = {"Standard": 500, "Express": 1200}  # cents
SORTS = ("Name", "Price", "Rating")


@dataclass(frozen=True, slots=True)
class Product:
    id: str
    name: str
    kind: str
    cents: int
    rating: int  # tenths of a star, of 50
    colours: tuple[str, ...]
    sold_out: bool = False


@dataclass(frozen=True, slots=True)
class Line:
    """So many of a product in a colour."""

    product: Product
    colour: str
    quantity: int

    @property
    def key(self) -> str:
        return f"{self.product.id}/{self.colour}"

    @property
    def thing(self) -> str:
        return f"{self.product.name}, {self.colour}"

    @property
    def cents(self) -> int:
        return self.quantity * self.product.cents


@dataclass(frozen=True, slots=True)
class Order:
    number: int
    content: str
    cents: int
    status: str = "open"


@dataclass(frozen=True, slots=True)
class Shop:
    products: tuple[Product, ...]
    cart: tuple[Line, ...] = ()
    wishes: frozenset[str] = frozenset()
    orders: tuple[Order, ...] = ()
    name: str = "shop"

    @property
    def menu(self) -> dict[str, str]:
        return {"Shop": "/shop", "Cart": "/shop/cart", "Wish list": "/shop/wishes", "Orders": "/shop/orders"}

    @property
    def kinds(self) -> list[str]:
        return sorted({product.kind for product in self.products})

    def product(self, id: str) -> Product | None:
        return next((product for product in self.products if product.id == id), None)

    def records(self) -> Records:
        return {
            **{f"cart/{line.key}": line.quantity for line in self.cart},
            **{f"wish/{id}": True for id in self.wishes},
            **{f"order/{order.number}": order.content for order in self.orders},
            **{f"order/{order.number}/status": order.status for order in self.orders},
        }

    def view(self, path: Path, query: Query, size: int) -> Items | None:
        match path:
            case ():
                search = field("q", "Search", role="searchbox"), button("search", "Search")
                return "Shop", *search, *(link(kind, address("shop", "search", kind=kind)) for kind in self.kinds)
            case ("search",):
                return self._results(query, size)
            case ("item", id):
                product = self.product(id)
                return self._item(product) if product else None
            case ("wishes",):
                wished = [(_link(product),) for product in self.products if product.id in self.wishes]
                return "Wish list", *listing(wished, address("shop", "wishes", **query), size)
            case ("cart",):
                return self._cart()
            case ("checkout",) if self.cart:
                return self._checkout()
            case ("orders",):
                rows = [
                    (link(f"Order {order.number}", address("shop", "order", order.number)),) for order in self.orders
                ]
                return "Orders", *listing(rows, address("shop", "orders", **query), size)
            case ("order", number):
                return next((_order(order) for order in self.orders if str(order.number) == number), None)
        return None

    def _results(self, query: Query, size: int) -> Items:
        rows: list[Items] = [
            (_link(product), f"{money(product.cents)}, {stars(product)}{', sold out' * product.sold_out}")
            for product in self.found(query)
        ]
        return (
            "Results",
            field("q", "Search", query.get("q", ""), "searchbox"),
            choice("sort", "Sort by", SORTS, query.get("sort", "")),
            field("most", "Highest price", query.get("most", ""), "spinbutton"),
            button("search", "Search"),
            *listing(rows, address("shop", "search", **query), size),
        )

    def found(self, query: Query) -> list[Product]:
        """The products that a search gives, in its order."""
        words = query.get("q", "").lower().split()
        most = float(query.get("most") or "inf")
        found = [
            product
            for product in self.products
            if all(word in f"{product.name} {product.kind}" for word in words)
            and product.kind == query.get("kind", product.kind)
            and product.cents <= most * 100
        ]
        sort = query.get("sort")
        return sorted(
            found, key=lambda p: (p.cents if sort == "Price" else -p.rating if sort == "Rating" else 0, p.name)
        )

    def _item(self, product: Product) -> Items:
        wished = product.id in self.wishes
        return (
            product.name,
            f"{money(product.cents)}, {stars(product)}",
            choice("colour", "Colour", product.colours),
            *(("Sold out",) if product.sold_out else (field("quantity", "Quantity", 1, "spinbutton"),)),
            button("add", "Add to cart", enabled=not product.sold_out),
            button("wish", "Remove from wish list" if wished else "Add to wish list"),
        )

    def _cart(self) -> Items:
        if not self.cart:
            return "Your cart is empty.", *(link("Search", "/shop/search"),)
        lines: list[Item] = ["Cart", button("update", "Update cart")]
        for line in self.cart:
            lines += [
                f"{line.quantity} x {line.thing}: {money(line.cents)}",
                field(f"quantity:{line.key}", f"Quantity of {line.thing}", line.quantity, "spinbutton"),
                button(f"remove:{line.key}", f"Remove {line.thing}"),
            ]
        return *lines, f"Total: {money(total(self.cart))}", link("Check out", "/shop/checkout")

    def _checkout(self) -> Items:
        prices = (f"{name}: {money(cents)}" for name, cents in SHIPPING.items())
        return (
            f"Total: {money(total(self.cart))}",
            f"Shipping: {', '.join(prices)}",
            *radios("shipping", SHIPPING),
            field("name", "Name"),
            field("street", "Street"),
            checkbox("gift", "Gift wrap"),
            button("order", "Place order"),
        )

    def submit(self, path: Path, query: Query, button: str, fields: Fields) -> tuple[Shop, str]:
        match path, button.partition(":"):
            case _, ("search", _, _):
                asked = {name: fields.get(name, "").strip() for name in ("q", "sort", "most")}
                kind = {"kind": query["kind"]} if "kind" in query else {}
                asked["sort"] = asked["sort"] if asked["sort"] != SORTS[0] else ""
                return self, address("shop", "search", **kind, **asked)
            case ("item", id), ("add", _, _):
                return self._added(id, fields), "/shop/cart"
            case ("item", id), _:
                return replace(self, wishes=self.wishes ^ {id}), address("shop", *path)
            case _, ("update", _, _):
                counts = [whole(fields[f"quantity:{line.key}"], "Quantity", 0, MOST) for line in self.cart]
                lines = (replace(line, quantity=count) for line, count in zip(self.cart, counts, strict=True))
                return replace(self, cart=tuple(line for line in lines if line.quantity)), "/shop/cart"
            case _, ("remove", _, key):
                return replace(self, cart=tuple(line for line in self.cart if line.key != key)), "/shop/cart"
            case ("order", number), _:
                cancelled = tuple(replace(o, status="cancelled") if str(o.number) == number else o for o in self.orders)
                return replace(self, orders=cancelled), address("shop", *path)
        return self._ordered(fields)

    def _added(self, id: str, fields: Fields) -> Shop:
        product = self.product(id)
        assert product is not None
        new = Line(product, fields["colour"], whole(fields["quantity"], "Quantity", 1, MOST))
        there = next((line.quantity for line in self.cart if line.key == new.key), 0)
        if there + new.quantity > MOST:
            raise Refused(f"At most {MOST} of a thing; {there} are in the cart.")
        rest = tuple(line for line in self.cart if line.key != new.key)
        return replace(self, cart=(*rest, replace(new, quantity=there + new.quantity)))

    def _ordered(self, fields: Fields) -> tuple[Shop, str]:
        if not fields["shipping"]:
            raise Refused("Choose a shipping.")
        needed(fields, name="Name", street="Street")
        number = max((order.number for order in self.orders), default=100) + 1
        gift = fields["gift"] == CHOSEN
        content = ordered(self.cart, fields["shipping"], fields["name"], fields["street"], gift)
        order = Order(number, content, total(self.cart) + SHIPPING[fields["shipping"]])
        return replace(self, cart=(), orders=(*self.orders, order)), address("shop", "order", number)


def ordered(cart: tuple[Line, ...], shipping: str, name: str, street: str, gift: bool) -> str:
    """What an order says: the same whatever the things came into the cart in."""
    lines = sorted(f"{line.quantity} x {line.thing}" for line in cart)
    where = f"{shipping} to {' '.join(name.split())}, {' '.join(street.split())}"
    return "; ".join([*lines, where, *["gift wrap"] * gift])


def total(lines: tuple[Line, ...]) -> int:
    return sum(line.cents for line in lines)


def stars(product: Product) -> str:
    return f"{product.rating / 10} stars"


def _link(product: Product) -> Item:
    return link(product.name, address("shop", "item", product.id))


def _order(order: Order) -> Items:
    cancel = (button("cancel", "Cancel order"),) if order.status == "open" else ()
    return f"Order {order.number}", order.content, f"Total: {money(order.cents)}", f"Status: {order.status}", *cancel
