"""DeskBrowserEnv: the tasks of the desk on pages in Chromium, which a site serves whose state is in Python."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import parse_qsl

from ...tools.browser import Reply, Request
from ..desk.desk import Desk
from ..desk.env import DeskEnv
from ..desk.html import BUTTON, posted, written
from ..desk.pages import Fields, filled
from ..screen import Act, Control, Page
from .chromium import ChromiumEnv

# whether a field or box has the focus, and the key on the desk of every element that has been read
MARKS = """() => [document.activeElement?.tagName === "INPUT", Object.fromEntries(
    [...__treegym.elements].map(([key, element]) => [key, element.deref()?.dataset.key]))]"""
ICON = "/favicon.ico"  # browsers ask for it unbidden


@dataclass
class DeskSite:
    """Serves the pages of a desk and takes their forms. A form is answered with the address that is shown next."""

    desk: Desk
    origin: str = "http://desk.test"
    refused: dict[str, tuple[str, Fields]] = field(default_factory=dict)  # by address: why, and what had been sent

    def answer(self, request: Request) -> Reply:
        if request.path == ICON:
            return Reply(status=404)
        if request.method == "POST":
            return Reply(status=303, headers={"Location": self._sent(request)})
        refusal, fields = self.refused.pop(request.path, ("", {}))
        return Reply(written(filled(self.desk.view(request.path, refusal), fields)).encode())

    def _sent(self, request: Request) -> str:
        """What a form does; the address that is shown next."""
        sent = dict(parse_qsl(request.body.decode(), keep_blank_values=True))
        fields = posted(self.desk.view(request.path), sent)
        self.desk, there, refusal = self.desk.submit(request.path, sent.get(BUTTON, ""), fields)
        if refusal:
            self.refused = {there: (refusal, fields)}
        return there


class DeskBrowserEnv(ChromiumEnv, DeskEnv):
    """The same tasks as DeskEnv's, read, acted on and graded in the same way. What is typed, what has the focus, and
    which pages were opened before are Chromium's to know; the state of the applications is in Python."""

    def start(self, options: Mapping[str, Any]) -> str:
        self._leave()
        goal = super().start(options)
        self.site = DeskSite(self.desk)
        self.open(self.site, self.site.origin + self.address, seed=0)
        return goal

    def page(self) -> Page:
        """As Chromium shows it, with the addresses and keys of the desk."""
        page = super().page()
        self.focus, keys = self._page.evaluate(MARKS)
        self.live_keys = {keys[control.key]: control.key for control in page.controls}
        items = (replace(item, key=keys[item.key]) if isinstance(item, Control) else item for item in page.items)
        self.desk, self.address = self.site.desk, page.address.removeprefix(self.site.origin)
        self._look()
        return Page(self.address, tuple(items))

    def perform(self, act: Act) -> str:
        if act.kind == "press" and act.text != "Enter":
            return ""  # the simulation has no caret and no order of fields
        control = act.control and replace(act.control, key=self.live_keys[act.control.key])
        self.acted(replace(act, control=control))
        if act.kind == "wait":
            self._wait(act.seconds)
        return ""

    def _wait(self, seconds: float) -> None:
        """A page that has loaded meanwhile is shown."""
        self.site.desk = self.desk.waited(self.address, seconds)
        if self.site.desk is not self.desk:
            self._page.evaluate("() => location.reload()")
            self._page.settle()
