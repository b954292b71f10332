"""What a task is told: the lessons' ids can be read off it, and notes that give its answer away are found."""

from __future__ import annotations

from dataclasses import replace

import pytest

from treegym.agents import Completion, RolloutTree
from treegym.agents.memory import Lesson, answers_told, lessons_of, met, notes_of, told, told_answer, without_lessons
from treegym.agents.tree import Node
from treegym.envs import LookupEnv, Message, Task
from treegym.envs.notes import Note, with_notes

LOOKUP, RULES = Task("treegym/Lookup-v0", 3), Task("treegym/HouseRules-v0", 3)


def answer(task: Task) -> str:
    env = task.make().unwrapped
    assert isinstance(env, LookupEnv)
    env.reset(seed=task.seed)
    return env.ring[env.links]


def noted(task: Task, *texts: str) -> Task:
    """The task, told these texts as lessons 1, 2, …"""
    lessons = [Lesson(text, task.env, id=number) for number, text in enumerate(texts, 1)]
    return replace(task, wrappers=told(lessons, "turn"))


def test_a_task_names_the_lessons_that_it_is_told() -> None:
    task = noted(LOOKUP, "Look first.", "Answer last.")
    assert lessons_of(task) == ("1", "2") and [note.text for note in notes_of(task)] == ["Look first.", "Answer last."]
    assert not lessons_of(LOOKUP) and told([], "turn") == ()


def test_notes_of_another_origin_are_no_lessons() -> None:
    """A scenario may give its environment notes of its own, with ids of its own."""
    own = with_notes([Note("Be brief."), Note("Be kind.", id="kind")])
    task = replace(noted(LOOKUP, "Look first."), wrappers=(own, *noted(LOOKUP, "Look first.").wrappers))
    assert lessons_of(task) == ("1",) and met(RolloutTree(task, (0,), (Message("user", "?"),), (), ())) == {1}
    assert without_lessons(task) == replace(task, wrappers=(own,))


def test_lessons_are_met_where_the_environment_says_their_phrase() -> None:
    """A note that repeats the phrase of another is no place of it."""
    places = {"elm gate": 1, "elm pump": 2, "choose red": 3, "": 4, "elm lamp": 5}
    lessons = [Lesson("choose red", RULES.env, place, id=number) for place, number in places.items()]
    prompt = Message("user", "You are at elm gate.\nNote of an earlier attempt; it may be wrong: choose red")
    node = Node(-1, Completion("", (1,), (-1.0,)), (), messages=(Message("tool", "elm lamp"),))
    tree = RolloutTree(replace(RULES, wrappers=told(lessons, "turn")), (0,), (prompt,), (node,), (0,))
    assert met(tree) == {1, 4, 5}


@pytest.mark.parametrize(
    ("text", "found"),
    [("It is {}.", True), ("{}", True), ("IT IS {UPPER}", True), ("{}s abound", False), ("Look first.", False)],
)
def test_a_note_that_holds_the_oracle_s_answer_is_found(text: str, found: bool) -> None:
    written = text.replace("{}", answer(LOOKUP)).replace("{UPPER}", answer(LOOKUP).upper())
    assert told_answer(noted(LOOKUP, "Look first.", written)) is found


def test_what_the_prompt_says_anyway_gives_nothing_away() -> None:
    """An oracle whose answer is the word that one starts at."""
    for seed in range(50):
        task = Task("treegym/Lookup-v0", seed, settings={"oracle_error": 1.0, "hops": [1]})  # stops where it starts
        env = task.make().unwrapped
        assert isinstance(env, LookupEnv)
        env.reset(seed=seed)
        assert not told_answer(noted(task, f"It is {env.ring[0]}."))


def test_an_oracle_that_ends_with_a_call_has_no_answer() -> None:
    assert not told_answer(noted(RULES, "You are through. choose red, choose green"))


def test_tasks_are_counted_where_any_has_notes() -> None:
    leaking = noted(LOOKUP, f"The end is {answer(LOOKUP)}.")
    assert answers_told([leaking, noted(LOOKUP, "Look first."), LOOKUP]) == {"answers_told": 1}
    assert answers_told([LOOKUP, RULES]) == {}
