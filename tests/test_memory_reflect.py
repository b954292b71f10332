"""Contrast writes down what rollouts of a group did differently, and corrects what turned out to be wrong."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from treegym.agents import Completion, Node, RolloutTree
from treegym.agents.memory import (
    Add,
    Contrast,
    Delete,
    Keep,
    Lesson,
    LessonStore,
    Operation,
    Seen,
    Update,
    curate,
    lessons_of,
    tags_of,
)
from treegym.agents.memory.reflect import HASTY, REPEATED, UNREADABLE, choices, habits, phrase
from treegym.agents.tree import ROOT
from treegym.envs import Message, Task
from treegym.envs.notes import Note, advice, with_notes
from treegym.tools import ToolCall

ENV, TAGS = "tests/Doors-v0", ("site:elm",)
GATE, LAMP = "At the gate: left or right?", "At the lamp: on or off?"


def call(choice: str) -> ToolCall:
    return ToolCall("choose", {"choice": choice})


def node(parent: int, choice: str, said: str, state: str, reward: float | None = None) -> Node:
    calls = (call(choice),) if choice else ()
    info = {} if choice else {"malformed": 1}
    return Node(
        parent, Completion(choice), messages=(Message("tool", said),), reward=reward or 0.0,
        terminated=reward is not None, state_key=state, info=info, calls=calls,
    )  # fmt: skip


def tree(*nodes: Node, notes: Sequence[Note] = (), leaves: Sequence[int] | None = None) -> RolloutTree:
    """Rollouts that begin at the gate. Every terminated node is a leaf, once."""
    ends = [i for i, one in enumerate(nodes) if one.terminated] if leaves is None else leaves
    task = Task(ENV, 0, wrappers=(with_notes(notes),) if notes else ())
    told = Message("user", f"Pass the gate and the lamp. {GATE}")
    return RolloutTree(task, (), (told,), nodes, tuple(ends), state_key="gate", info={"tags": [*TAGS]})


def passed(gate: str, lamp: str, total: float, at: int) -> list[Node]:
    """A rollout of two turns, whose first node is at this place."""
    return [node(ROOT, gate, LAMP, f"{gate}, lamp"), node(at, lamp, "You are through.", "", total)]


def group(*rollouts: tuple[str, str, float], notes: Sequence[Note] = ()) -> RolloutTree:
    nodes: list[Node] = []
    for gate, lamp, total in rollouts:
        nodes += passed(gate, lamp, total, len(nodes))
    return tree(*nodes, notes=notes)


FOUR = group(("left", "on", 1.0), ("left", "off", 0.5), ("right", "on", 0.5), ("right", "off", 0.0))
LEFT, RIGHT = advice([call("left")]), advice([call("right")])


def reflected(trees: Sequence[RolloutTree], known: Sequence[Lesson] = (), **settings: float) -> list[Operation]:
    async def ask(messages: Sequence[Message], seed: int) -> str:
        raise AssertionError("no model is needed")

    batch = [Seen("runs/a", number, each) for number, each in enumerate(trees)]
    reflection = asyncio.run(Contrast(**settings).reflect(batch, known, ask))  # type: ignore[arg-type]
    return [operation for group in reflection.groups for operation in group]


def lessons_at_the_gate(operations: Sequence[Operation]) -> list[Lesson]:
    return [each.lesson for each in operations if isinstance(each, Add) and each.lesson.when == GATE]


def lesson(text: str, when: str = GATE, id: int = 7) -> Lesson:
    return Lesson(text, ENV, when, TAGS, id=id)


def test_a_choice_gains_the_mean_return_of_its_rollouts_over_that_of_the_others() -> None:
    found = choices(Seen("runs/a", 3, FOUR))
    gate = next(done for topic, done in found.items() if topic.when == GATE)
    assert {text: [one.gain for one in compared] for text, compared in gate.items()} == {LEFT: [0.5], RIGHT: [-0.5]}
    # left of the gate the lamp is on once and off once, right of it too: two states that are read alike
    lamp = next(done for topic, done in found.items() if topic.when == LAMP)
    assert [one.gain for one in lamp[advice([call("on")])]] == [pytest.approx(0.5)] * 2
    assert {topic.tags for topic in found} == {TAGS}


def test_nodes_of_one_state_are_compared_wherever_they_are_in_the_tree() -> None:
    """The lamp is reached by left and by right, in one state; without its key only siblings could be compared."""
    nodes = [
        *(node(ROOT, "left", LAMP, "lamp"), node(0, "on", "through", "", 1.0)),
        *(node(ROOT, "right", LAMP, "lamp"), node(2, "off", "through", "", 0.0)),
    ]
    [compared] = choices(Seen("", 0, tree(*nodes)))[next(iter(_topics(tree(*nodes), LAMP)))][advice([call("on")])]
    assert compared.gain == 1.0 and compared.nodes == (1,) and compared.counts == (1, 1)


def _topics(grown: RolloutTree, when: str) -> list[object]:
    return [topic for topic in choices(Seen("", 0, grown)) if topic.when == when]


def test_rollouts_that_share_a_turn_count_once_each() -> None:
    shared = [node(ROOT, "left", LAMP, "lamp"), node(0, "on", "", "", 1.0), node(0, "off", "", "", 0.0)]
    other = [node(ROOT, "right", LAMP, "other"), node(3, "on", "", "", 0.2)]
    found = choices(Seen("", 0, tree(*shared, *other, leaves=[1, 1, 2, 4])))
    [left] = found[next(topic for topic in found if topic.when == GATE)][LEFT]
    assert left.counts == (3, 1) and left.returns == (pytest.approx(2 / 3), pytest.approx(0.2))


def test_the_best_choice_of_a_batch_becomes_a_lesson_with_its_evidence() -> None:
    noted = group(("left", "on", 1.0), ("right", "on", 0.5), notes=[Note("hurry", id="3")])
    operations = reflected([FOUR, noted], threshold=0.9)
    [added] = lessons_at_the_gate(operations)
    assert (added.text, added.tags, added.author) == (LEFT, TAGS, "Contrast")
    assert [piece.tree for piece in added.evidence] == [0, 1]
    assert [piece.in_force for piece in added.evidence] == [(), (3,)]
    assert added.evidence[0].returns == (0.75, 0.25) and added.evidence[0].counts == (2, 2)
    assert not lessons_at_the_gate(reflected([FOUR], threshold=0.9))  # 0.5 alone is too little


def test_a_held_out_task_is_no_evidence_whether_its_environment_says_so_or_not(tmp_path: Path) -> None:
    asked = replace(FOUR, task=replace(FOUR.task, options={"split": "heldout"}))
    told = replace(FOUR, info={**FOUR.info, "split": "heldout"})
    with LessonStore(tmp_path / "lessons.sqlite") as store:
        for tree in (asked, told):
            outcomes = curate(store, reflected([tree], threshold=0.4), "step 1")
            assert outcomes and all("not of the split 'heldout'" in each.refused for each in outcomes)


def test_what_too_few_did_teaches_nothing() -> None:
    once = group(("left", "on", 1.0), ("right", "on", 0.0), ("right", "on", 0.0))
    assert not [each for each in reflected([once], least=2) if isinstance(each, Add)]
    assert [each for each in reflected([once], least=1) if isinstance(each, Add)]


def test_a_lesson_that_was_wrong_is_replaced_by_what_did_better() -> None:
    assert reflected([FOUR], [lesson(RIGHT)], threshold=0.4)[0] == Update(
        7,
        LEFT,
        evidence=reflected([FOUR], threshold=0.4)[0].lesson.evidence,  # type: ignore[union-attr]
    )


def test_of_lessons_that_contradict_each_other_one_stays(tmp_path: Path) -> None:
    with LessonStore(tmp_path / "lessons.sqlite") as store:
        for text in (RIGHT, advice([call("far left")]), LEFT):
            store.add(lesson(text, id=0))
        curate(store, reflected([FOUR], list(store.lessons()), threshold=0.4), "step 1")
        assert [each.text for each in store.lessons() if each.when == GATE] == [LEFT]
        assert [store.get(id).replaced_by for id in (1, 2)] == [3, 3]


def test_a_lesson_in_other_words_than_the_choice_is_known_again() -> None:
    """As one writes it by hand."""
    written = f"{RIGHT.capitalize()}."
    [update] = [each for each in reflected([FOUR], [lesson(written)], threshold=0.4) if isinstance(each, Update)]
    assert update.id == 7
    undecided = reflected([FOUR], [lesson(written)], threshold=0.6)
    assert Keep(7) in undecided


def test_a_lesson_that_was_left_out_is_replaced_though_nobody_did_so() -> None:
    """Two lessons that say to do two things in one state would both be told from then on."""
    other = advice([call("far left")])
    [operation] = [each for each in reflected([FOUR], [lesson(other)], threshold=0.4) if isinstance(each, Update)]
    assert (operation.id, operation.text) == (7, LEFT)


def test_a_lesson_that_does_harm_goes_even_where_nothing_better_is_known() -> None:
    """Three choices: the lesson's is the worst, and none of the others is clearly best."""
    three = group(*[(gate, "on", total) for gate, total in (("a", 0.6), ("b", 0.5), ("c", 0.0))] * 2)
    text = advice([call("c")])
    [operation] = [each for each in reflected([three], [lesson(text)], threshold=0.5) if isinstance(each, Delete)]
    assert operation.id == 7 and "0.55 less" in operation.reason


def test_a_lesson_on_which_nothing_is_seen_stays_and_one_that_holds_gets_the_evidence() -> None:
    known = [lesson(LEFT), lesson("Be quick.", id=8), lesson(LEFT, when="somewhere else", id=9)]
    operations = reflected([FOUR], known, threshold=0.4)
    assert not [each for each in operations if isinstance(each, Delete | Update)]
    assert [each.text for each in lessons_at_the_gate(operations)] == [LEFT]
    undecided = reflected([FOUR], [lesson(LEFT)], threshold=0.6)
    assert Keep(7) in undecided and not lessons_at_the_gate(undecided)


def test_lessons_that_are_not_in_force_are_not_decided_on() -> None:
    retired = Lesson(RIGHT, ENV, GATE, TAGS, state="retired", id=7)
    assert not [each for each in reflected([FOUR], [retired], threshold=0.4) if isinstance(each, Update | Delete)]


def test_habits_are_compared_with_rollouts_that_have_them_not() -> None:
    malformed = [node(ROOT, "", GATE, "gate"), node(0, "left", "", "", 0.0)]
    repeats = [node(ROOT, "up", GATE, "gate"), node(2, "up", GATE, "gate"), node(3, "left", "", "", 0.0)]
    good = [node(ROOT, "left", "", "", 1.0)]
    hasty = [Node(ROOT, Completion("It is left."), reward=0.25, terminated=True)]
    [(topic, found)] = habits(Seen("", 0, tree(*malformed, *repeats, *good, *hasty))).items()
    assert (topic.tags, topic.when) == ((), "")
    third = pytest.approx(1.25 / 3)
    assert {text: (one.gain, one.counts) for text, [one] in found.items()} == {
        UNREADABLE: (third, (3, 1)),
        REPEATED: (third, (3, 1)),
        HASTY: (pytest.approx(1 / 3 - 0.25), (3, 1)),
    }


def test_several_habits_are_lessons_side_by_side() -> None:
    bad = [node(ROOT, "", GATE, "gate"), node(0, "left", "", "", 0.0)]
    hasty = [Node(ROOT, Completion("It is left."), terminated=True)]
    good = [node(ROOT, "left", "", "", 1.0)]
    texts = [each.lesson.text for each in reflected([tree(*bad, *hasty, *good)], least=1) if isinstance(each, Add)]
    assert {UNREADABLE, HASTY} <= set(texts)


def test_of_many_tags_the_first_six_count() -> None:
    """A lesson with them all would be refused, and recall looks at no more."""
    tags = ["night", *(f"t{i}" for i in range(9)), "night"]
    assert tags_of({"tags": tags}) == ("night", "t0", "t1", "t2", "t3", "t4") and tags_of({}) == ()


def test_a_phrase_is_the_last_sentence_of_what_the_environment_said() -> None:
    assert phrase(f"Pass the gate. {GATE}\n") == GATE
    assert phrase("one line") == "one line"
    assert phrase("") == phrase(" \n\n") == phrase("x" * 500) == ""


def test_notes_are_no_part_of_what_was_read() -> None:
    noted = tree(*passed("left", "on", 1.0, 0), *passed("right", "on", 0.0, 2), notes=[Note("hurry", id="3")])
    told = Message("user", f"{noted.messages[0].text}\n\nNotes of earlier attempts; they may be wrong:\n- hurry")
    with_told = RolloutTree(**{**vars(noted), "messages": (told,)})
    assert {topic.when for topic in choices(Seen("", 0, with_told))} == {GATE}
    assert lessons_of(noted.task) == ("3",)


def test_an_advice_is_one_line_or_none() -> None:
    calls = [call("a"), ToolCall("look", {"at": 'the "lamp"', "n": 2}), ToolCall("wait", {})]
    assert advice(calls) == 'choose a, then look(at="the \\"lamp\\"", n=2), then wait'
    assert advice([]) == advice([call("x" * 500)]) == advice([call("a\nb")]) == ""
