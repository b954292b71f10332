"""Exchange: episodes written to, and read from, the formats of other programs."""

from .formats import EXCHANGES, Exchange, read_episodes
from .grammar import Grammar, grammar_of

__all__ = [
    "EXCHANGES",
    "Exchange",
    "Grammar",
    "grammar_of",
    "read_episodes",
]
