"""A browser: real Chromium, whose pages are read as text and controls and live in virtual time."""

from .chromium import BrowserUnavailable, close_browser, open_page
from .gate import FolderSite, OtherSite, Reply, Request, Site
from .page import BrowserPage

__all__ = [
    "BrowserPage",
    "BrowserUnavailable",
    "FolderSite",
    "OtherSite",
    "Reply",
    "Request",
    "Site",
    "close_browser",
    "open_page",
]
