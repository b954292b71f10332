"""All templates of the desk, by name: the modules that define them are imported here."""

from __future__ import annotations

from . import calendar_tasks, cross_tasks, files_tasks, flight_tasks, forms_tasks, mail_tasks, shop_tasks
from .templates import TEMPLATES, Named

__all__ = ["APPS", "MODULES", "TEMPLATES", "Named"]

APPS = ("shop", "mail", "calendar", "files", "forms", "flight")
MODULES = (shop_tasks, mail_tasks, calendar_tasks, files_tasks, forms_tasks, flight_tasks, cross_tasks)
