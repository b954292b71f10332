"""Policies: a model in this process, servers, players, scripts."""

from ..serving import Server, ServerError
from .openai import ChatPlayer, OpenAIPolicy
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
