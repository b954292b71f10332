"""Serving: models on servers, asked over HTTP, started, and given new weights."""

from .client import Server, ServerError

__all__ = ["Server", "ServerError"]
