"""Tasks of the shop."""

from __future__ import annotations

from dataclasses import replace

from .model import Records
from .pages import address, money
from .plan import DeskTask, Draw, Move, Subgoal, go
from .shop import SHIPPING, Line, Order, Product, Shop, ordered
from .templates import NAMES, STREETS, see, task, template

KINDS = "lamp chair kettle backpack notebook mug".split()
LOOKS = "small large light heavy classic modern".split()
COLOURS = "red green blue black white".split()


def stocked(draw: Draw) -> Shop:
    """A shop with four kinds of things in four looks each, three sold out; no two have the same price or rating."""
    names = [(look, kind) for kind in draw.some(KINDS, 4) for look in draw.some(LOOKS, 4)]
    gone = draw.some(names, 3)
    prices, ratings = draw.some(range(5, 95), len(names)), draw.some(range(20, 50), len(names))
    products = []
    for number, (name, price, rating) in enumerate(zip(names, prices, ratings, strict=True), 1):
        colours = tuple(draw.some(COLOURS, 3))
        products.append(Product(f"p{number}", " ".join(name), name[1], price * 100 + 90, rating, colours, name in gone))
    return Shop(tuple(products))


def to_be_had(shop: Shop, kind: str = "") -> list[Product]:
    """The products that are not sold out, of one kind or of all."""
    return [product for product in shop.products if not product.sold_out and kind in ("", product.kind)]


def with_cart(shop: Shop, draw: Draw, count: int) -> Shop:
    """The shop with so many lines in the cart, some of which are of one kind."""
    products = draw.some([product for kind in shop.kinds[:2] for product in to_be_had(shop, kind)], count)
    return replace(shop, cart=tuple(Line(p, draw.one(p.colours), draw.number(2, 8)) for p in products))


def with_orders(shop: Shop, draw: Draw, count: int) -> Shop:
    orders = []
    for number in draw.some(range(102, 120), count):
        line, shipping = Line(draw.one(shop.products), draw.one(COLOURS), draw.number(1, 3)), draw.one([*SHIPPING])
        content = ordered((line,), shipping, draw.one(NAMES), draw.one(STREETS), False)
        orders.append(Order(number, content, line.cents + SHIPPING[shipping]))
    return replace(shop, orders=tuple(sorted(orders, key=lambda order: order.number)))


def to_product(product: Product) -> tuple[Move, ...]:
    results, page = address("shop", "search", q=product.name), address("shop", "item", product.id)
    return Move("/shop", "search", {"q": product.name}), go(results, page)


def to_best(product: Product, sort: str, most: str = "") -> tuple[Move, ...]:
    """By the list of its kind, sorted."""
    kind, page = address("shop", "search", kind=product.kind), address("shop", "item", product.id)
    results = address("shop", "search", kind=product.kind, sort=sort, most=most)
    return go("/shop", kind), Move(kind, "search", {"sort": sort, "most": most}), go(results, page)


def put(line: Line, *moves: Move) -> Subgoal:
    """Put a line into the cart, by the page of its product."""
    fill = {"colour": line.colour, "quantity": str(line.quantity)}
    page = address("shop", "item", line.product.id)
    moves = moves or to_product(line.product)
    return Subgoal((*moves, Move(page, "add", fill)), {f"shop/cart/{line.key}": line.quantity})


def buy(shop: Shop, lines: list[Line], shipping: str, name: str, street: str, gift: bool) -> tuple[Subgoal, Records]:
    """Check out; then the order stands there, and the cart is empty."""
    fill = {"shipping": shipping, "name": name, "street": street, "gift": "on" * gift}
    number = max([100, *(order.number for order in shop.orders)]) + 1
    order = f"shop/order/{number}"
    made = {order: ordered(tuple(lines), shipping, name, street, gift), f"{order}/status": "open"}
    moves = go("/shop/cart", "/shop/checkout"), Move("/shop/checkout", "order", fill)
    return Subgoal(moves, made), made


@template("shop")
def shop_put(draw: Draw) -> DeskTask:
    shop = stocked(draw)
    product = draw.one(to_be_had(shop))
    line = Line(product, draw.one(product.colours), draw.number(2, 6))
    return task(f"Put {line.quantity} of the {product.name} in {line.colour} into the cart.", shop, put(line))


@template("shop")
def shop_cheapest(draw: Draw) -> DeskTask:
    shop = stocked(draw)
    kind = draw.one([kind for kind in shop.kinds if to_be_had(shop, kind)])
    product = min(to_be_had(shop, kind), key=lambda product: product.cents)
    line = Line(product, draw.one(product.colours), 1)
    text = f"Put the cheapest {kind} that is not sold out into the cart, one of it, in {line.colour}."
    return task(text, shop, put(line, *to_best(product, "Price")))


@template("shop")
def shop_price(draw: Draw) -> DeskTask:
    shop = stocked(draw)
    product = draw.one(shop.products)
    look = see(address("shop", "item", product.id), *to_product(product))
    return task(f"What does the {product.name} cost?", shop, look, kind="money", value=money(product.cents))


@template("shop")
def shop_remove(draw: Draw) -> DeskTask:
    shop = with_cart(stocked(draw), draw, 3)
    line = draw.one(shop.cart)
    remove = Subgoal((Move("/shop/cart", f"remove:{line.key}"),), {f"shop/cart/{line.key}": None})
    return task(f"Take the {line.product.name} out of the cart.", shop, remove)


@template("shop")
def shop_quantity(draw: Draw) -> DeskTask:
    shop = with_cart(stocked(draw), draw, 3)
    line = draw.one(shop.cart)
    count = draw.one([n for n in range(1, 10) if n != line.quantity])
    update = Move("/shop/cart", "update", {f"quantity:{line.key}": str(count)})
    text = f"Change the quantity of the {line.product.name} in the cart to {count}."
    return task(text, shop, Subgoal((update,), {f"shop/cart/{line.key}": count}))


@template("shop", heldout=True)
def shop_wish(draw: Draw) -> DeskTask:
    shop = stocked(draw)
    kind = draw.one(shop.kinds)
    prices = sorted(product.cents for product in shop.products if product.kind == kind)
    most = prices[2] // 100 + 1
    among = [product for product in shop.products if product.kind == kind and product.cents <= most * 100]
    product = max(among, key=lambda p: p.rating)
    moves = *to_best(product, "Rating", str(most)), Move(address("shop", "item", product.id), "wish")
    text = f"Put the {kind} with the best rating that costs at most {most} EUR on the wish list."
    return task(text, shop, Subgoal(moves, {f"shop/wish/{product.id}": True}))


@template("shop")
def shop_order(draw: Draw) -> DeskTask:
    shop = stocked(draw)
    product = draw.one(to_be_had(shop))
    line = Line(product, draw.one(product.colours), draw.number(1, 4))
    shipping, name, street = draw.one([*SHIPPING]), draw.one(NAMES), draw.one(STREETS)
    last, made = buy(shop, [line], shipping, name, street, False)
    text = (
        f"Order {line.quantity} of the {product.name} in {line.colour} with {shipping.lower()} shipping to {name}, "
        f"{street}."
    )
    return task(text, shop, put(line), last, wanted=made)


@template("shop")
def shop_cancel(draw: Draw) -> DeskTask:
    shop = with_orders(stocked(draw), draw, 4)
    number = draw.one(shop.orders).number
    page = address("shop", "order", number)
    cancel = Subgoal((go("/shop/orders", page), Move(page, "cancel")), {f"shop/order/{number}/status": "cancelled"})
    return task(f"Cancel order {number}.", shop, cancel)


@template("shop", heldout=True)
def shop_gifts(draw: Draw) -> DeskTask:
    shop = with_orders(stocked(draw), draw, 2)
    lines = [Line(product, draw.one(product.colours), draw.number(1, 3)) for product in draw.some(to_be_had(shop), 2)]
    shipping, name, street = draw.one([*SHIPPING]), draw.one(NAMES), draw.one(STREETS)
    last, made = buy(shop, lines, shipping, name, street, True)
    things = " and ".join(f"{line.quantity} of the {line.product.name} in {line.colour}" for line in lines)
    text = f"Order {things} together, as a gift, with {shipping.lower()} shipping to {name}, {street}."
    return task(text, shop, *map(put, lines), last, wanted=made)
