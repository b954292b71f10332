"""Desk: every task can be done, by any way; its grader takes no near miss; pages are values, and read as their HTML."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from treegym.envs import DeskEnv, check_env
from treegym.envs.desk.desk import ACCEPT, LOADING, Desk
from treegym.envs.desk.env import splits
from treegym.envs.desk.html import posted, written
from treegym.envs.desk.model import Goal, Kind, difference, same
from treegym.envs.desk.pages import Item, address, checkbox, choice, field, filled, kept, parsed, radios, values
from treegym.envs.desk.shop import Shop
from treegym.envs.desk.tasks import APPS, TEMPLATES
from treegym.envs.screen import TYPED, Control, Page

NAMES = [*TEMPLATES]
Deed = tuple[str, str, str]  # a tool, the key of the control, and a text or option


def start(
    template: str | None = None, seed: int = 0, *, options: dict[str, Any] | None = None, **settings: Any
) -> DeskEnv:
    env = DeskEnv(**{"max_turns": 1000} | settings)
    env.reset(seed=seed, options={"template": template} | (options or {}))
    return env


def finish(env: DeskEnv, seed: int | None = None, detours: int = 6) -> dict[str, Any]:
    """The last info of the oracle's episode, with random detours where there is a seed for them."""
    dice, info = random.Random(seed), dict[str, Any]()
    while (action := env.oracle()) is not None:
        if seed is not None and detours and dice.random() < 0.4:
            detour(env, dice)
            detours -= 1
        else:
            *_, info = env.step(action)
    return info


def do(env: DeskEnv, tool: str, key: str = "", text: str = "") -> bool:
    """Whether there is a control with this key to do it to; then it is done."""
    keys = [control.key for control in env.current.controls]
    arguments = {"type": {"text": text}, "select": {"option": text}}.get(tool, {})
    if key and key in keys:
        env.step(env.write_call(tool, number=keys.index(key) + 1, **arguments))
    elif not key:
        env.step(env.write_call(tool, **({"seconds": 1} if tool == "wait" else {})))
    return not key or key in keys


def detour(env: DeskEnv, dice: random.Random) -> None:
    """Links, a search, something typed and dropped, a way back: nothing of it changes the state."""
    before = env.difference
    for _ in range(dice.randint(1, 3)):
        fields = [control for control in env.current.controls if control.role in TYPED or control.role == "checkbox"]
        links = [control.key for control in env.current.controls if control.role == "link"]
        if fields and dice.random() < 0.5:
            field = dice.choice(fields)
            do(env, "click" if field.role == "checkbox" else "type", field.key, "lamp")
            if not (field.key == "q" and do(env, "click", "search")):
                do(env, "click", dice.choice(links))
        elif links:
            do(env, "click", dice.choice(links))
        if dice.random() < 0.3:
            do(env, "back")
    assert env.difference == before


def script(env: DeskEnv) -> list[tuple[Deed, bool]]:
    """What the oracle does, and whether it changes what is graded."""
    deeds = []
    while (action := env.oracle()) is not None:
        before, controls = env.difference, env.current.controls
        *_, info = env.step(action)
        for call in info["tool_calls"]:
            given = call["arguments"]
            key = controls[given["number"] - 1].key if "number" in given else ""
            deeds.append(((call["name"], key, given.get("text", given.get("option", ""))), env.difference != before))
    return deeds


def perform(env: DeskEnv, deeds: list[Deed]) -> dict[str, Any]:
    """The last info, where these things are done as far as they can be, and then the right answer is given."""
    for deed in deeds:
        do(env, *deed)
    *_, info = env.step(env.write_answer(env.task.goal.value or "done"))
    assert isinstance(info, dict)
    return info


def exact(info: dict[str, Any]) -> float:
    return float(info["reward_terms"]["exact"])


@pytest.mark.parametrize("name", NAMES)
def test_the_oracle_does_every_task_also_where_much_is_in_its_way(name: str) -> None:
    for seed in range(3):
        for nuisance in (0.0, 0.5, 1.0):
            env = start(name, seed, nuisance=nuisance, max_turns=50)
            info = finish(env)
            assert exact(info) == info["reward_terms"]["goals"] == info["reward_terms"]["format"] == 1.0, env.task.goal
            assert info["reward_terms"]["harm"] == 0.0 and info["difference"].keys() == env.task.goal.wanted.keys()


@pytest.mark.parametrize("name", NAMES)
def test_any_way_there_counts(name: str) -> None:
    for seed in range(4):
        env = start(name, seed, nuisance=[0.0, 0.7])
        assert exact(finish(env, seed)) == 1.0, env.task.goal


@pytest.mark.parametrize("name", NAMES)
def test_no_near_miss_counts(name: str) -> None:
    near(name, 0)
    near(name, 1)


def near(name: str, seed: int) -> None:
    """A step left out, something similar in the place of each thing, a wrong answer, and one thing too many."""
    whole = start(name, seed)
    deeds = script(whole)
    changing = [place for place, (_, changes) in enumerate(deeds) if changes]
    if changing:
        last = changing[-1]
        left_out = perform(start(name, seed), [deed for place, (deed, _) in enumerate(deeds) if place != last])
        assert exact(left_out) == 0.0 and left_out["reward_terms"]["goals"] < 1.0
        assert sum(differs(whole, info) for info in similar(name, seed, [deed for deed, _ in deeds])) > 0
    for answer in wrong(whole.task.goal):
        env = start(name, seed)
        perform_all(env, deeds)
        *_, info = env.step(env.write_answer(answer))
        assert exact(info) == 0.0 and info["reward_terms"]["goals"] < 1.0, answer
    env = start(name, seed)
    perform_all(env, deeds)
    one_more(env, random.Random(seed))
    assert exact(perform(env, [])) == 0.0


def perform_all(env: DeskEnv, deeds: list[tuple[Deed, bool]]) -> None:
    for deed, _ in deeds:
        do(env, *deed)


def differs(whole: DeskEnv, info: dict[str, Any]) -> bool:
    """Whether a similar way led elsewhere than the right one; then it must not count."""
    elsewhere = bool(info["apps"] != whole.desk.apps)
    assert not elsewhere or exact(info) == 0.0, (whole.task.goal, info["difference"])
    return elsewhere


def similar(name: str, seed: int, deeds: list[Deed]) -> Iterator[dict[str, Any]]:
    """The same ways with one thing in the place of another: another row of a list, option, number or word."""
    for place, deed in enumerate(deeds):
        env = start(name, seed)
        for before in deeds[:place]:
            do(env, *before)
        if (other := another(env.current, deed)) is not None:
            yield {**perform(env, [other, *deeds[place + 1 :]]), "apps": env.desk.apps}


def another(page: Page, deed: Deed) -> Deed | None:
    tool, key, text = deed
    control = next((control for control in page.controls if control.key == key), None)
    if control is None or tool == "scroll":
        return None
    if tool == "type":
        return tool, key, str(int(text) + (1 if int(text) < 9 else -1)) if text.isdecimal() else f"{text}x"
    if tool == "select":
        return tool, key, next(option for option in (*control.options[::-1], "") if option != text)
    siblings = [
        c.key for c in page.controls if c.role == control.role and family(c) == family(control) and c.key != key
    ]
    return (tool, siblings[0], "") if siblings else None


def family(control: Control) -> str:
    """What rows of one list have in common."""
    return control.key.rpartition("/" if control.role == "link" else "=" if control.role == "radio" else ":")[0]


def wrong(goal: Goal) -> list[str]:
    return [] if goal.kind is None else ["done", f"{goal.value}1", f"{goal.value} or 2031-01-01 or 7654.32 or purple"]


def one_more(env: DeskEnv, dice: random.Random) -> None:
    """Clicks about, in forms filled in as they come, until something more has changed."""
    done = env.difference
    for _ in range(800):
        if env.difference != done:
            return
        buttons = [c.key for c in env.current.controls if c.role == "button" and "disabled" not in c.states]
        links = [control.key for control in env.current.controls if control.role == "link"]
        do(env, "click", dice.choice(buttons if buttons and dice.random() < 0.5 else links))
    raise AssertionError("nothing can be changed")


@pytest.mark.parametrize("app", APPS)
def test_every_application_keeps_the_promises_of_every_environment(app: str) -> None:
    check_env(lambda: DeskEnv(apps=[app], nuisance=0.5, max_turns=30), seeds=[0])


def wandered(seed: int, steps: int = 12) -> Iterator[DeskEnv]:
    """A task of any template, after each of several random acts."""
    env = start(NAMES[seed % len(NAMES)], seed, nuisance=[0.0, 0.6], oracle_error=0.6)
    for _ in range(steps):
        yield env
        action = env.oracle()
        assert action is not None
        if "<answer>" in action:
            return
        env.step(action)


class Reader(HTMLParser):
    """Reads a document of `written` as a browser would: roles and names of controls, the texts of paragraphs."""

    ROLES = {"text": "textbox", "search": "searchbox", "number": "spinbutton"}  # noqa: RUF012

    def __init__(self, document: str) -> None:
        super().__init__()
        self.items: list[Item] = []
        self.labels: dict[str, str] = {}
        self.open: dict[str, str | None] = {}
        self.feed(document)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag in ("p", "label", "a", "button", "option"):
            self.open = {"tag": tag, "text": "", **given}
        key, name = given.get("data-key") or "", self.labels.get(given.get("id") or "", "")
        checked = ("checked",) if "checked" in given else ()
        if tag == "select":
            self.items.append(Control(key, "combobox", name))
        elif tag == "input" and given["type"] in ("checkbox", "radio"):
            self.items.append(Control(key, str(given["type"]), name, states=checked))
        elif tag == "input":
            self.items.append(Control(key, self.ROLES[str(given["type"])], name, value=given["value"]))

    def handle_data(self, data: str) -> None:
        if self.open:
            self.open["text"] = f"{self.open['text']}{data}"

    def handle_endtag(self, tag: str) -> None:
        if tag != self.open.get("tag"):
            return
        given, self.open = self.open, {}
        text, states = given["text"] or "", ("disabled",) if "disabled" in given else ()
        if tag == "label":
            self.labels[given["for"] or ""] = text
        elif tag == "p":
            self.items.append(text)
        elif tag in ("a", "button"):
            role = {"a": "link", "button": "button"}[tag]
            self.items.append(Control(given["data-key"] or "", role, text, states=states))
        elif tag == "option":
            last = self.items[-1]
            assert isinstance(last, Control)
            chosen = (text,) if "selected" in given else last.chosen
            self.items[-1] = replace(last, options=(*last.options, text), chosen=chosen)


def test_a_page_reads_as_its_html_does() -> None:
    for seed in range(2 * len(NAMES)):
        for env in wandered(seed, 6):
            assert Page(env.address, tuple(Reader(written(env.current)).items)).lines == env.current.lines


def test_a_browser_sends_what_the_fields_hold() -> None:
    """A form sends neither the boxes that are not checked nor the buttons that were not clicked."""
    page = Page(
        "/",
        (
            field("t", "T", "old"),
            choice("c", "C", ("x", "y"), "y"),
            checkbox("b", "B", checked=True),
            *radios("r", ("k", "l"), "l"),
        ),
    )
    whole = {"t": "old", "c": "y", "b": "on", "r": "l"}
    assert values(page) == posted(page, whole) == whole
    assert posted(page, {"t": "", "c": "x", "button": "save"}) == {"t": "", "c": "x", "b": "", "r": ""}


def test_html_takes_nothing_of_a_text_for_markup() -> None:
    texts = ["<b>1</b> & \"two\" '3'", "</p><script>alert(1)</script>", "[1] button", "\u202e 漢字 &lt;", "a\nb"]
    for text in texts:
        fields = Control("q", "textbox", text, value=text), Control(f"s={text}", "radio", text, states=("checked",))
        chosen = Control("c", "combobox", "C", options=("x", text), chosen=(text,))
        page = Page(f"/x?q={text}", (text, *fields, chosen, Control(text, "button", text), Control("l", "link", text)))
        assert Page("", tuple(Reader(written(page)).items)).lines == page.lines


def test_pages_are_forms_that_a_browser_can_show() -> None:
    """Keys are unique, fields have names, and Enter has a button that can be used wherever there is a text field."""
    for seed in range(2 * len(NAMES)):
        for env in wandered(seed):
            controls = env.current.controls
            assert len({control.key for control in controls}) == len(controls) and all(c.name for c in controls)
            buttons = [control for control in controls if control.role == "button"]
            if any(control.role in TYPED for control in controls):
                assert "disabled" not in buttons[0].states
            assert sum(len(line) for line in env.current.lines) < 1800, env.current.address


def test_no_address_fails() -> None:
    """Whatever stands in the address bar, there is a page."""
    for seed, name in enumerate(NAMES):
        desk = start(name, seed).task.desk
        for app in desk.apps:
            for path in (
                *app.menu.values(),
                "/x",
                f"/{app.name}/x/y/z",
                f"/{app.name}/item/0?q=%ff&page=-1",
                "",
                "/?page=9",
            ):
                for query in ("", "?page=999", "?page=1e9", "?most=abc&sort=x&q=[&day=x&kind=?"):
                    assert desk.view(path + query).lines
                    told = desk.submit(path + query, "order", {"quantity": "x"})
                    assert isinstance(told[0], Desk)


def test_a_form_holds_what_its_page_allows_whatever_is_sent() -> None:
    """A browser's form can be tampered with: what the page does not offer changes nothing."""
    desk = start("shop_put", 0).task.desk
    shop = desk.apps[0]
    assert isinstance(shop, Shop)
    here, gone = (next(p for p in shop.products if p.sold_out is sold_out) for sold_out in (False, True))
    page = address("shop", "item", here.id)
    sent = {"colour": "gold", "quantity": "2", "cents": "1"}
    bought, there, refusal = desk.submit(page, "add", sent)
    assert (there, refusal) == ("/shop/cart", "")
    assert difference(desk.records(), bought.records()) == {f"shop/cart/{here.id}/{here.colours[0]}": [None, 2]}
    for button, at in [("add", address("shop", "item", gone.id)), ("cancel", page), ("add", "/shop"), ("", "/nowhere")]:
        assert desk.submit(at, button, sent) == (desk, at, "This form is out of date.")


def test_the_page_in_the_docs_is_what_an_agent_reads() -> None:
    """Beside the text stands a picture, which docs/screenshots.py makes of the same page."""
    env = start("shop_order", 4)
    for _ in range(4):
        env.step(str(env.oracle()))
    guide = Path(__file__).parent.parent / "docs" / "gui.md"
    assert f"```\n{env.view()}\n```" in guide.read_text(encoding="utf-8")


def test_equal_pages_read_equally_whatever_led_there() -> None:
    env = start("shop_order", 3)
    page, key = env.view(), env.state_key()
    do(env, "type", "q", "large")
    assert env.state_key() != key
    do(env, "click", "search")
    there, found = env.state_key(), env.view()
    do(env, "back")
    assert (env.view(), env.state_key()) == (page, key)  # and what was typed is gone
    for deed in [
        ("click", "link:/shop/cart", ""),
        ("click", "link:/shop", ""),
        ("type", "q", " large "),
        ("press", "", ""),
    ]:
        do(env, *deed) if deed[0] != "press" else env.step(env.write_call("press", key="Enter"))
    assert (env.view(), env.state_key()) == (found, there)


def test_forks_share_the_state_and_go_their_own_ways() -> None:
    for seed, name in enumerate(NAMES[::5]):
        env = start(name, seed, nuisance=0.5)
        actions = []
        while (action := env.oracle()) is not None:
            twin, again = env.fork(), start(name, seed, nuisance=0.5)
            for before in actions:
                again.step(before)
            assert twin.desk is env.desk and twin.task is env.task
            assert twin.step(action) == again.step(action) and twin.state_key() == again.state_key()
            key = env.state_key()
            do(twin, "back") if not twin.over else None
            assert env.state_key() == key
            env.step(action)
            actions.append(action)


def test_enter_sends_what_is_typed_and_does_nothing_elsewhere() -> None:
    env = start("shop_price", 1)
    enter = env.write_call("press", key="Enter")
    env.step(enter)
    assert env.address == "/shop"
    do(env, "type", "q", "x\r\ny\n")
    for key in ("Tab", "Escape", "Backspace", "ArrowDown"):
        env.step(env.write_call("press", key=key))
    assert values(env.current) == {"q": "x y"}
    env.step(enter)
    assert env.address == "/shop/search?q=x+y" and "Nothing here." in env.current.items


def test_a_refusal_is_read_and_the_fields_stay_as_they_were() -> None:
    env = start("shop_put", 0)
    perform_all(env, [(deed, False) for deed, _ in script(start("shop_put", 0))[:2]])
    do(env, "click", next(c.key for c in env.current.controls if c.key.startswith("link:/shop/item/")))
    do(env, "type", "quantity", "99")
    *_, info = env.step(env.write_call("click", number=3))
    assert info["messages"][0].text.startswith("Refused: Quantity: a whole number from 1 to 9.\n")
    assert info["failed_calls"] == 0 and values(env.current)["quantity"] == "99" and not env.difference
    enter = env.write_call("press", key="Enter")
    assert env.step(enter)[0] == env.view()  # the page is a new one, in which no field has the focus
    do(env, "type", "quantity", "many")
    assert values(env.current)["quantity"] == ""  # as in a browser, a field of numbers takes nothing else


def test_what_comes_in_between_can_be_dealt_with_and_a_subscription_is_harm() -> None:
    kinds = set()
    for seed in range(20):
        env = start("shop_cancel", seed, nuisance=1.0)
        assert env.task.desk.view("/shop").items == start("shop_cancel", seed).current.items
        if LOADING in env.current.items:
            env.step(env.write_call("wait", seconds=0.5))
            assert env.current.items == (LOADING,)
            do(env, "wait")
            assert LOADING not in env.current.items
            kinds.add("load")
        if do(env, "click", ACCEPT):
            kinds.add("offer")
            assert env.difference == {"subscribed": [None, True]}
            assert finish(env)["reward_terms"] == {"exact": 0.0, "goals": 1.0, "harm": 1.0, "format": 1.0}
        finish(env) if not env.over else None
        kinds |= {name.split()[0] for name in env.desk.passed}
    assert kinds == {"load", "offer", "ask", "word"}


def test_tasks_of_some_templates_are_split_as_those_of_all() -> None:
    goals: dict[str, set[str]] = {}
    for split in ("train", "heldout"):
        env = DeskEnv(templates=["shop_cancel", "forms_withdraw"])
        for seed in range(30):
            env.reset(seed=seed, options={"split": split})
            assert env.template.name in ("shop_cancel", "forms_withdraw")
            goals.setdefault(split, set()).add(env.task.goal.text)
    assert not goals["train"] & goals["heldout"]
    env.reset(seed=0, options={"template": "shop_put"})  # one by its name may be any
    assert env.template.name == "shop_put"


def test_splits_share_no_task_and_a_quarter_of_the_templates_is_held_out() -> None:
    seen = [template for template in TEMPLATES.values() if splits(template) == ("train", "heldout")]
    held = [template for template in TEMPLATES.values() if splits(template) == ("templates",)]
    assert 0.2 <= len(held) / (len(seen) + len(held)) <= 0.3
    for app in set(APPS) - {"flight"}:
        assert any(app in template.apps for template in held) and any(app in template.apps for template in seen)
    drawn = {split: [start(None, s, options={"split": split}) for s in range(60)] for split in ("train", "heldout")}
    goals = {split: {env.task.goal.text for env in envs} for split, envs in drawn.items()}
    assert not goals["train"] & goals["heldout"] and {env.template.name for env in drawn["heldout"]} <= {
        t.name for t in seen
    }


@pytest.mark.parametrize(
    ("settings", "options", "told"),
    [
        ({"apps": ["shop", "bank"]}, {}, "no application 'bank'; applications: shop, "),
        ({"nuisance": [0, 2]}, {}, r"nuisance: expected a number from 0 to 1, or several, got \[0, 2\]"),
        ({"nuisance": []}, {}, "nuisance: expected"),
        ({"nuisance": "0.5"}, {}, "nuisance: expected .* got '0.5'"),
        ({}, {"apps": "bank"}, "no application 'bank'"),
        ({}, {"split": "test"}, "split 'test': expected one of train, heldout, templates, application"),
        ({}, {"template": "shop_steal"}, "no template 'shop_steal'; templates: calendar_new, "),
        ({}, {"template": "shop_put", "split": "templates"}, "no template for split='templates', apps="),
        ({"apps": ["flight"]}, {"split": "train"}, r"no template for split='train', apps=\['flight'\], templates=\[\]"),
        ({"templates": ["shop_put", "shop_steal"]}, {}, "no template 'shop_steal'; templates: calendar_new, "),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        DeskEnv(**settings).reset(seed=0, options=options)


SAME: list[tuple[Kind, str, str, bool]] = [
    ("money", "14.00 EUR", "14.00 EUR", True),
    ("money", "It costs €14.", "14.00 EUR", True),
    ("money", "1,014.50", "1014.50 EUR", True),
    ("money", "14.01 EUR", "14.00 EUR", False),
    ("money", "14 or 15 EUR", "14.00 EUR", False),
    ("money", "", "14.00 EUR", False),
    ("number", "There are three.", "3", True),
    ("number", "3.0", "3", True),
    ("number", "-3", "3", False),
    ("number", "none", "3", False),
    ("date", "2026-05-04", "2026-05-04", True),
    ("date", "on May 4th, 2026", "2026-05-04", True),
    ("date", "4 May 2026", "2026-05-04", True),
    ("date", "Monday, 4. Sept 2026", "2026-09-04", True),
    ("date", "2026-04-05", "2026-05-04", False),
    ("date", "2026-05-04 or 2026-05-05", "2026-05-04", False),
    ("date", "2026-02-31", "2026-05-04", False),
    ("text", "the Blue Room.", "Blue Room", True),
    ("text", "Blue Room or Red Room", "Blue Room", False),
]


@pytest.mark.parametrize(("kind", "given", "wanted", "holds"), SAME)
def test_answers_are_compared_by_what_they_mean(kind: Kind, given: str, wanted: str, holds: bool) -> None:
    assert same(kind, given, wanted) is holds


def test_a_grade_counts_what_was_made_and_what_was_not_wanted() -> None:
    goal = Goal("Do.", {"a": 1, "b": None}, "number", "3")
    done = difference({"b": "x", "c": 1}, {"a": 1, "c": 1})
    assert done == {"a": [None, 1], "b": ["x", None]}
    assert goal.grade(done, "3") == {"exact": 1.0, "goals": 1.0, "harm": 0.0}
    assert goal.grade(done, None) == {"exact": 0.0, "goals": 2 / 3, "harm": 0.0}
    assert goal.grade({"a": [None, 2], "c": [1, 2]}, "3") == {"exact": 0.0, "goals": 1 / 3, "harm": 2.0}


def test_a_stored_episode_can_be_graded_again() -> None:
    for seed in range(12):
        env = start(None, seed, oracle_error=0.3, options={"split": "train"}, max_turns=20)
        info = finish(env)
        stored = json.loads(json.dumps(info["difference"]))
        again = env.task.goal.grade(stored, env.answered)
        assert again == {name: info["reward_terms"][name] for name in again}


def test_addresses_and_fields_come_back_as_they_were() -> None:
    for text in ("a b", "x/y?z=1&w=2#f", "ä漢'\"<>+%", "%2F", "."):
        assert parsed(address("shop", "search", q=text, page=2)) == (("shop", "search"), {"q": text, "page": "2"})
    number = Control("n", "spinbutton", "N", value="1")
    texts = ("2", "-.5e3", "1e999", "2 pieces", "+2.", "1.2.3", "２", "٣", "1-2", "one")  # noqa: RUF001
    assert [kept(number, text) for text in texts] == ["2", "-.5e3", "", "", "2", "1.23", "2", "", "", ""]
    page = Page(
        "/", (number, Control("a=x", "radio", "x"), Control("a=y", "radio", "y"), Control("c", "checkbox", "C"))
    )
    for fields in ({"n": "7", "a": "y", "c": "on"}, {"n": "", "a": "", "c": ""}):
        assert values(filled(page, fields)) == fields
