"""DeskEnv: tasks in applications of the desk, read as pages and graded by what has changed."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar
from zlib import crc32

from ..screen import TYPED, Act, Control, Page, ScreenEnv
from ..toolenv import digest
from .model import Value, difference
from .pages import edited, filled, target, turned, values
from .plan import Call, DeskTask, Draw, next_call, pending
from .tasks import APPS, TEMPLATES, Named

MAX_TURNS = 50
SPLITS = ("train", "heldout", "templates", "application")
HELD_OUT_APP = "flight"
CHECKED = frozenset({"checkbox", "radio"})  # roles that a click checks


class DeskEnv(ScreenEnv):
    """A task in one or two applications: something to change, something to find out and answer, or both.

    The answer ends the episode. `exact` is 1.0 if nothing but what was asked for has changed, whatever the way, and the
    answer, where one is asked for, has the right value. `goals` is the share of the changes, and of the answer, that is
    there, `harm` the number of other changes. `info["difference"]` of the last turn has what changed.

    Splits: "train" and "heldout" have the same templates and other tasks; the templates of "templates", and the
    application of "application", are in no other. `nuisance`, 0 to 1 or several to draw from, is how often pop-ups,
    slow pages and refusals come in between. `oracle_error` is the probability that an act of the oracle is random.
    """

    instructions = "Do the task by the numbers on the pages. Then answer done, or what is asked."
    max_turns = MAX_TURNS
    reward_weights: Mapping[str, float] = {"exact": 1.0, "goals": 0.1, "harm": -0.05, "format": 0.0}
    shared: ClassVar[frozenset[str]] = ScreenEnv.shared | {
        *("task", "desk", "first", "apps", "templates", "nuisance", "template")
    }

    def __init__(
        self,
        *,
        apps: str | Sequence[str] | None = None,
        templates: str | Sequence[str] | None = None,
        nuisance: float | Sequence[float] = 0.0,
        oracle_error: float = 0.0,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self.apps, self.nuisance, self.oracle_error = _known(apps), _levels(nuisance), oracle_error
        self.templates = _named(templates)

    def start(self, options: Mapping[str, Any]) -> str:
        split, name = options.get("split"), options.get("template")
        among = chosen(split, _known(options.get("apps", self.apps)), _named(name) or self.templates)
        self.template, self.task = self._draw(among, split or (None if name else "train"))
        level = Draw(self.np_random).one(_levels(options.get("nuisance", self.nuisance)))
        salt = str(self.np_random.integers(2**32))
        self.desk = replace(self.task.desk, nuisance=level, salt=salt)
        self.first = self.desk.records()
        self.history: tuple[str, ...] = (self.desk.start,)
        self.seen = frozenset[str]()  # addresses of pages
        self.drafts: dict[str, str] = {}  # what is typed, chosen or checked, by the key of the field
        self._show(self.desk.start)
        return self.task.goal.text

    def _draw(self, among: Sequence[Named], split: str | None) -> tuple[Named, DeskTask]:
        """A task of the split: of the tasks of seen templates a quarter is held out, by the words of its goal."""
        draw = Draw(self.np_random)
        while True:
            template = draw.one(among)
            task = template.make(draw)
            free = split is None or "train" not in splits(template)
            if free or is_heldout(task) == (split == "heldout"):
                return template, task

    def details(self) -> dict[str, Any]:
        return {"hops": sum(len(subgoal.moves) for subgoal in self.task.plan), "template": self.template.name}

    def page(self) -> Page:
        return filled(self.desk.view(self.address, self.refusal), self.drafts)

    def perform(self, act: Act) -> str:
        control = act.control
        if act.kind == "back" and len(self.history) > 1:
            self.history = self.history[:-1]
            self._show(self.history[-1])
        elif act.kind == "wait":
            self.desk = self.desk.waited(self.address, act.seconds)
            self._look()
        elif act.kind == "press" and act.text == "Enter" and self.focus:
            self._enter()
        elif control and act.kind == "click" and control.role == "link":
            self._visit(target(control))
        elif control and act.kind == "click" and control.role == "button":
            self._send(control.key)
        elif control and act.kind in ("click", "type", "select"):
            self._edit(control, act)
        return ""

    def _edit(self, control: Control, act: Act) -> None:
        """What is typed, chosen or checked is a draft until a button is clicked."""
        self.focus = control.role in TYPED or control.role in CHECKED  # not of a list, in which Enter sends no form
        if act.kind != "click" or control.role in CHECKED:
            self.drafts |= edited(control, act.text)

    def _enter(self) -> None:
        """In a field, Enter sends the form by its first button, if that can be used."""
        first = next((control for control in self.current.controls if control.role == "button"), None)
        if first and "disabled" not in first.states:
            self._send(first.key)

    def _send(self, button: str) -> None:
        self.desk, there, refusal = self.desk.submit(self.address, button, values(self.current))
        if refusal:
            self.refusal, self.focus = refusal, False
        else:
            self._visit(there)

    def _visit(self, address: str) -> None:
        if address != self.address:
            self.history += (address,)
        self._show(address)

    def _show(self, address: str) -> None:
        """Opens a page: what was typed before is gone."""
        self.address, self.refusal, self.focus = address, "", False
        self.drafts = {}
        self._look()

    def _look(self) -> None:
        if not self.desk.covered(self.address):
            self.seen |= {turned(self.address)}

    @property
    def difference(self) -> dict[str, list[Value]]:
        """What has changed since the episode began, as JSON."""
        return difference(self.first, self.desk.records())

    def score(self, answer: str) -> dict[str, float]:
        return self.task.goal.grade(self.difference, answer)

    def score_unanswered(self) -> dict[str, float]:
        return self.task.goal.grade(self.difference, None)

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = super().step(action)
        if self.over:
            info["difference"] = self.difference
        return observation, reward, terminated, truncated, info

    def state_key(self) -> str:
        seen = [self.address, self.current.lines, self.line, self.focus]
        return digest([self.situation(), self.difference, sorted(self.desk.passed), seen, self.answered, self.over])

    def oracle(self) -> str | None:
        if self.over:
            return None
        dice = random.Random(f"{self.seed_key} {self.turn}")
        if dice.random() < self.oracle_error:
            name, arguments = self._any_call(dice)
            return self.write_call(name, **arguments)
        subgoal = pending(self.task.plan, self.desk.records(), self.seen)
        if subgoal is None:
            return self.write_answer(self.task.goal.value or "done")
        name, arguments = next_call(subgoal, self.desk, self.current)
        if "number" in arguments and not self._in_sight(arguments["number"]):
            name, arguments = "scroll", {}
        return self.write_call(name, **arguments)

    def _in_sight(self, number: int) -> bool:
        return any(line.startswith(f"[{number}] ") for line in self.view().splitlines())

    def _any_call(self, dice: random.Random) -> Call:
        """Something that can be done on this page."""
        if not self.current.controls:
            return "wait", {"seconds": 1}
        number, control = dice.choice(list(enumerate(self.current.controls, 1)))
        if control.options:
            return "select", {"number": number, "option": dice.choice(control.options)}
        if control.role in TYPED:
            return "type", {"number": number, "text": dice.choice(("2", "Oslo", "lamp", "2026-05-04"))}
        return ("hover" if "disabled" in control.states else "click"), {"number": number}


def is_heldout(task: DeskTask) -> bool:
    """Whether a task of a seen template belongs to the split "heldout": a quarter of all."""
    return crc32(task.goal.text.encode()) % 4 == 0


def chosen(split: str | None, apps: frozenset[str], names: frozenset[str]) -> list[Named]:
    """The templates of a split that need these applications alone and have one of these names, where there are names.
    Without a split those of "train", or where none of them is there, all. ValueError where there is none."""
    if split is not None and split not in SPLITS:
        raise ValueError(f"split {split!r}: expected one of {', '.join(SPLITS)}")
    among = [each for each in TEMPLATES.values() if each.name in (names or TEMPLATES) and apps.issuperset(each.apps)]
    found = [each for each in among if (split or "train") in splits(each)]
    if not found and (split or not among):
        raise ValueError(
            f"no template for split={split!r}, apps={sorted(apps)}, templates={sorted(names)}: leave one of them out"
        )
    return found or among


def splits(template: Named) -> tuple[str, ...]:
    """Those that have tasks of a template."""
    if HELD_OUT_APP in template.apps:
        return ("application",)
    return ("templates",) if template.heldout else ("train", "heldout")


def _known(apps: str | Sequence[str] | None) -> frozenset[str]:
    names = (apps,) if isinstance(apps, str) else apps or APPS
    if unknown := sorted({*names} - {*APPS}):
        raise ValueError(f"no application {unknown[0]!r}; applications: {', '.join(APPS)}")
    return frozenset(names)


def _named(templates: str | Sequence[str] | None) -> frozenset[str]:
    names = (templates,) if isinstance(templates, str) else templates or ()
    if unknown := sorted({*names} - {*TEMPLATES}):
        raise ValueError(f"no template {unknown[0]!r}; templates: {', '.join(TEMPLATES)}")
    return frozenset(names)


def _levels(nuisance: float | Sequence[float]) -> tuple[float, ...]:
    levels = tuple(nuisance) if isinstance(nuisance, list | tuple) else (nuisance,)
    if not levels or not all(isinstance(level, int | float) and 0 <= level <= 1 for level in levels):
        raise ValueError(f"nuisance: expected a number from 0 to 1, or several, got {nuisance!r}")
    return levels
