"""Policies: a model in this process, servers, players, scripts."""

from .openai import ChatPlayer, OpenAIPolicy, Server, ServerError
from .players import OraclePlayer, RandomPlayer
from .scripted import ScriptedPolicy

__all__ = [
    "ChatPlayer",
    "OpenAIPolicy",
    "OraclePlayer",
    "RandomPlayer",
    "ScriptedPolicy",
    "Server",
    "ServerError",
]
