"""Text environments: the base class, tool environments, action formats, rewards, and the registered families."""

from .. import REGISTERED
from .base import Message, TextEnv
from .check import check_env
from .code.env import CodeEnv
from .desk.env import DeskEnv
from .factsearch.env import FactSearchEnv
from .formats.actions import Action, ActionFormat, FormatError
from .formats.families import HermesFormat
from .formats.tagged import OpenAIFormat, TaggedFormat, action_format, format_of
from .formats.text import FencedFormat, ReactFormat
from .household import HouseholdEnv
from .houserules import HouseRulesEnv
from .lookup import LookupEnv
from .math.env import PythonMathEnv
from .maze import MazeEnv
from .notes import Note, own_text, with_notes
from .problems import ProblemEnv
from .rewards import exact_match, normalize_answer, token_f1
from .spaces import AnyText
from .task import Task
from .toolenv import Exchange, ToolEnv, forked
from .web.desk import DeskBrowserEnv
from .web.env import BrowserEnv
from .wrappers import Hint, Step, StepPenalty, TextWrapper, TurnLimit, WithNotes

__all__ = [
    "Action",
    "ActionFormat",
    "AnyText",
    "BrowserEnv",
    "CodeEnv",
    "DeskBrowserEnv",
    "DeskEnv",
    "Exchange",
    "FactSearchEnv",
    "FencedFormat",
    "FormatError",
    "HermesFormat",
    "Hint",
    "HouseRulesEnv",
    "HouseholdEnv",
    "LookupEnv",
    "MazeEnv",
    "Message",
    "Note",
    "OpenAIFormat",
    "ProblemEnv",
    "PythonMathEnv",
    "ReactFormat",
    "Step",
    "StepPenalty",
    "TaggedFormat",
    "Task",
    "TextEnv",
    "TextWrapper",
    "ToolEnv",
    "TurnLimit",
    "WithNotes",
    "action_format",
    "check_env",
    "exact_match",
    "forked",
    "format_of",
    "normalize_answer",
    "own_text",
    "registered",
    "token_f1",
    "with_notes",
]


def registered() -> list[str]:
    """The Gymnasium ids of the environments that come with treegym, and with packages that have the entry point
    `treegym.environments`."""
    return list(REGISTERED)
