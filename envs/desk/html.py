"""A page as plain HTML: one form, a label for every field, a paragraph for every line of text, no script."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from ..screen import TYPED, Control, Page, flat
from .pages import CHOSEN, Item, target, values

TYPES = {"textbox": "text", "searchbox": "search", "spinbutton": "number"}
STYLE = """
body { max-width: 40rem; margin: 2rem auto; padding: 0 1rem; font: 16px/1.5 sans-serif; color: #222; }
p, div { margin: 0.35rem 0; }
a { color: #1a56c4; }
label { display: inline-block; min-width: 8rem; }
input:not([type=checkbox], [type=radio]), select { width: 16rem; box-sizing: border-box; }
input, select, button { padding: 0.2rem 0.5rem; border: 1px solid #aaa; border-radius: 4px; font: inherit; }
button { background: #eef2fb; }
button:disabled { color: #999; background: #f4f4f4; }
"""
BUTTON = "button"  # the name under which the key of the button that sends the form is sent


def written(page: Page) -> str:
    """The HTML document that reads as the page does. The form is posted to the page's own address; with the values of
    the fields goes the key of the button, under the name `button`."""
    body = "\n".join(_element(item, number) for number, item in enumerate(page.items))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(page.address)}</title>\n'
        f"<style>{STYLE}</style></head>\n"
        f'<body><form method="post" action="{escape(page.address)}" autocomplete="off" novalidate>\n'
        f"{body}\n</form></body></html>\n"
    )


def posted(page: Page, sent: Mapping[str, str]) -> dict[str, str]:
    """The values of all fields of a page where its form sent these: what is not checked is not sent."""
    typed = {control.key for control in page.controls if control.role in TYPED or control.role == "combobox"}
    return {key: sent.get(key, value if key in typed else "") for key, value in values(page).items()}


def _element(item: Item, number: int) -> str:
    if isinstance(item, str):
        return f"<p>{escape(flat(item))}</p>"
    key, name = escape(item.key), escape(flat(item.name))
    off = " disabled" * ("disabled" in item.states)
    if item.role == "link":
        return f'<div><a href="{escape(target(item))}" data-key="{key}">{name}</a></div>'
    if item.role == "button":
        return f'<div><button name="{BUTTON}" value="{key}" data-key="{key}"{off}>{name}</button></div>'
    label = f'<label for="f{number}">{name}</label>'
    return f"<div>{label} {_field(item, f'f{number}')}</div>"


def _field(control: Control, id: str) -> str:
    given = f'id="{id}" data-key="{escape(control.key)}"'
    name = escape(control.key)
    checked = " checked" * ("checked" in control.states)
    if control.role == "combobox":
        chosen = control.chosen[:1]
        options = (f"<option{' selected' * (option in chosen)}>{escape(option)}</option>" for option in control.options)
        return f'<select name="{name}" {given}>{"".join(options)}</select>'
    if control.role == "checkbox":
        return f'<input type="checkbox" name="{name}" value="{CHOSEN}" {given}{checked}>'
    if control.role == "radio":
        group, _, value = control.key.partition("=")
        return f'<input type="radio" name="{escape(group)}" value="{escape(value)}" {given}{checked}>'
    step = ' step="any"' * (control.role == "spinbutton")
    value = escape(control.value or "")
    return f'<input type="{TYPES[control.role]}" name="{name}" value="{value}" {given}{step}>'
