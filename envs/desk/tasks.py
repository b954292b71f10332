"""All templates of the desk, by name; the modules that define them are imported here."""

from __future__ import annotations

from . import calendar_tasks, files_tasks, forms_tasks, mail_tasks, shop_tasks
from .templates import TEMPLATES, Named

__all__ = ["APPS", "TEMPLATES", "Named", "calendar_tasks", "files_tasks", "forms_tasks", "mail_tasks", "shop_tasks"]

APPS = ("shop", "mail", "calendar", "files", "forms")
