"""Operations on lessons: each is applied or refused with a reason, and no reply of a model raises."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treegym.agents.memory import (
    Add,
    Delete,
    Effect,
    Evidence,
    Keep,
    Lesson,
    LessonStore,
    Merge,
    Operation,
    Update,
    curate,
    merged,
    read_operations,
)

ENV, ELM = "treegym/HouseRules-v0", ("site:elm",)
ONE, TWO = (Evidence("runs/first", tree, (1, 4), (0.9, 0.2), (3, 5)) for tree in (1, 2))


def lesson(text: str, tags: tuple[str, ...] = ELM, **fields: Any) -> Lesson:
    return Lesson(text, ENV, tags=tags, **fields)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LessonStore]:
    """Two lessons in force, and a retired one."""
    with LessonStore(tmp_path / "lessons.sqlite") as opened:
        opened.add(lesson("Choose amber.", evidence=(ONE,), effect=Effect(1, 1, 1, 9), state="active"))
        opened.add(lesson("Choose blue.", evidence=(TWO,)))
        opened.retire(opened.add(lesson("Choose green.")).id, "harmful")
        yield opened


def done(store: LessonStore, *operations: Operation) -> list[tuple[str, int | None]]:
    """What became of the operations: why one was refused, or the id of its lesson."""
    return [(each.refused, each.lesson and each.lesson.id) for each in curate(store, operations, "step 3")]


def in_force(store: LessonStore) -> dict[int, str]:
    return {each.id: each.text for each in store.lessons()}


# what is applied


def test_a_delete_needs_no_text(store: LessonStore) -> None:
    assert done(store, Delete(1, "it misleads"), Delete(2)) == [("", 1), ("", 2)]
    assert in_force(store) == {}
    assert [store.history(id)[-1].reason for id in (1, 2)] == ["it misleads", "step 3"]
    assert store.get(1).text == "Choose amber."  # on record


def test_an_update_replaces_and_keeps_both_sides_on_record(store: LessonStore) -> None:
    assert done(store, Update(1, "Choose red, not amber.", "the gate", (TWO,))) == [("", 4)]
    former, now = store.get(1), store.get(4)
    assert (former.state, former.replaced_by, former.text) == ("replaced", 4, "Choose amber.")
    assert now == replace(lesson("Choose red, not amber.", when="the gate", evidence=(TWO,)), id=4)
    assert [change.reason for change in (*store.history(1)[1:], *store.history(4))] == ["step 3", "step 3"]


def test_an_update_to_what_another_lesson_says_leaves_that_one(store: LessonStore) -> None:
    """Otherwise a contradiction would stay in force for good."""
    assert done(store, Update(1, "choose blue", evidence=(ONE,))) == [("", 2)]
    assert in_force(store) == {2: "Choose blue."} and store.get(2).evidence == (TWO, ONE)
    assert (store.get(1).state, store.get(1).replaced_by) == ("replaced", 2)


def test_an_update_of_what_was_replaced_goes_to_the_successor(store: LessonStore) -> None:
    assert done(store, Update(1, "Choose red."), Update(1, "Choose white.")) == [("", 4), ("", 5)]
    assert [store.get(id).replaced_by for id in (1, 4)] == [4, 5] and in_force(store) == {
        2: "Choose blue.",
        5: "Choose white.",
    }


def test_a_merge_has_the_evidence_of_all(store: LessonStore) -> None:
    assert done(store, Merge((1, 2, 1), "Choose amber or blue.")) == [("", 4)]
    assert store.get(4).evidence == (ONE, TWO) and store.get(4).effect is None
    assert [store.get(id).replaced_by for id in (1, 2)] == [4, 4]


def test_a_merge_into_one_of_its_own_keeps_that_one(store: LessonStore) -> None:
    assert done(store, Merge((1, 2), "choose blue")) == [("", 2)]
    assert store.get(2).evidence == (TWO, ONE) and store.get(1).replaced_by == 2


def test_a_merge_keeps_the_tags_that_all_have(store: LessonStore) -> None:
    store.add(lesson("Choose amber.", ("site:elm", "night")))
    assert done(store, Merge((1, 4), "Choose amber, day and night.")) == [("", 5)]
    assert store.get(5).tags == ELM


def test_an_addition_of_a_near_duplicate_joins(store: LessonStore) -> None:
    assert done(store, Add(lesson("choose amber", evidence=(TWO,)))) == [("", 1)]
    assert store.get(1).evidence == (ONE, TWO)


def test_keep_changes_nothing(store: LessonStore) -> None:
    assert done(store, Keep(1)) == [("", 1)] and store.revision == 4


# what is refused

REFUSED: list[tuple[Any, str]] = [
    (Update(7, "Choose red."), "there is no lesson 7; there are 1 to 3"),
    (Delete(7), "there is no lesson 7"),
    (Keep(0), "there is no lesson 0"),
    (Merge((1, 7), "Choose red."), "there is no lesson 7"),
    (Merge((1, 1), "Choose red."), "two lessons or more, got 1"),
    (Merge((), "Choose red."), "two lessons or more, got 0"),
    (Merge((1, 3), "Choose red."), "lesson 3 is retired"),
    (Update(3, "Choose red."), "lesson 3 is retired"),
    (Delete(3), "lesson 3 is retired already"),
    (Update(1, "choose amber!"), "lesson 1 says so already"),
    (Update(1, ""), "empty"),
    (Update(1, "a" * 401), "401 characters"),
    (Update(1, "a\x1b[2J"), "control character"),
    (Update(1, "a\ud800"), "JSON"),
    (Update(1, "Choose red.", "b\n"), "control character"),
    (Update(1, "Choose red.", None, (replace(ONE, split="heldout"),)), "heldout"),
    (Merge((1, 2), "a" * 100_000), "100000 characters"),
    (Delete(1, "r" * 401), "the reason has 401 characters"),
    (Delete(1, "a\nb"), "the reason has the control character"),
    (Add(lesson("")), "empty"),
    (Update("1", "Choose red."), "an id is a number"),  # type: ignore[arg-type]
    (Update(1, None), "text"),  # type: ignore[arg-type]
    (Merge("12", "Choose red."), "list"),  # type: ignore[arg-type]
    (Merge((1, [2]), "Choose red."), "an id is a number"),  # type: ignore[arg-type]
    (Delete(1, 5), "a reason is a text"),  # type: ignore[arg-type]
    (Delete(10**5000), "an id is a number"),
    (Add("Choose red."), "JSON"),  # type: ignore[arg-type]
    ("DELETE 1", "no operation, but a str"),
    (None, "no operation"),
]


@pytest.mark.parametrize(("operation", "why"), REFUSED, ids=range(len(REFUSED)))
def test_a_bad_operation_is_refused_with_its_reason_and_the_others_go_on(
    store: LessonStore, operation: Any, why: str
) -> None:
    alone, aside = merged([[operation]])
    assert alone == [operation] and aside == []
    refused, kept = curate(store, [*alone, Keep(1)], "step 3")
    assert why in refused.refused and len(refused.refused) < 200 and refused.lesson is None
    assert kept.refused == "" and store.revision == 4


def test_lessons_of_different_places_are_not_merged(store: LessonStore) -> None:
    store.add(lesson("Choose white.", when="the gate"))
    store.add(Lesson("Choose white.", "other/Env-v0"))
    assert done(store, Merge((1, 4), "x"), Merge((1, 5), "x")) == [
        ("lessons [1, 4] do not have the same when", None),
        ("lessons [1, 5] do not have the same env", None),
    ]
    assert done(store, Merge((1, 4), "x", "the gate")) == [("", 6)]


def test_without_any_reason_nothing_is_retired(store: LessonStore) -> None:
    for operation in (Delete(1), Update(1, "Choose red."), Merge((1, 2), "Choose red.")):
        [outcome] = curate(store, [operation], "")
        assert "reason is missing" in outcome.refused
    assert store.revision == 4


# batches


def test_deletes_of_one_lesson_are_one(store: LessonStore) -> None:
    operations, aside = merged([[Delete(1, "it misleads")], [Delete(1), Delete(1, "bad\n")], [Delete(1, "no use")]])
    assert operations == [Delete(1, "it misleads; no use")] and aside == []


def test_a_delete_wins_over_what_others_say_and_says_so() -> None:
    operations, aside = merged(
        [[Update(1, "a"), Merge((1, 2, 3), "b"), Merge((1, 2), "c")], [Keep(1), Keep(2), Delete(1)]]
    )
    assert operations == [Delete(1), Merge((2, 3), "b"), Keep(2)]
    assert {type(each.operation): "deleted in the same batch" in each.refused for each in aside} == {
        Update: True,
        Merge: True,
        Keep: True,
    }


def test_what_one_group_deletes_and_another_adds_is_a_new_lesson(store: LessonStore) -> None:
    operations, _ = merged([[Add(lesson("Choose amber.", evidence=(TWO,)))], [Delete(1, "it misleads")]])
    assert done(store, *operations) == [("", 1), ("", 4)]
    assert store.get(1).state == "retired" and store.get(4).evidence == (TWO,)


def test_additions_of_near_duplicates_join() -> None:
    groups = [[Add(lesson("Choose red.", evidence=(each,)))] for each in (ONE, TWO, ONE)]
    operations, _ = merged([*groups, [Add(lesson("choose the red"))], [Add(lesson("Choose red", ()))]])
    assert operations == [Add(lesson("Choose red.", evidence=(ONE, TWO))), Add(lesson("Choose red", ()))]


def test_of_contradicting_updates_the_one_most_wanted_is_in_force_and_all_are_on_record(store: LessonStore) -> None:
    groups: list[list[Operation]] = [
        [Update(1, "Choose red.", evidence=(ONE,))],
        [Update(1, "Choose white.")],
        [Update(1, "choose red", evidence=(TWO,))],
    ]
    operations, aside = merged(groups)
    assert aside == [] and done(store, *operations) == [("", 4), ("", 5)]
    assert store.get(5).evidence == (ONE, TWO) and in_force(store) == {2: "Choose blue.", 5: "Choose red."}
    assert [store.get(id).text for id in (1, 4)] == ["Choose amber.", "Choose white."]


KINDS = st.one_of(
    st.builds(Add, st.builds(lesson, st.sampled_from(["Choose amber.", "Choose red.", ""]))),
    st.builds(Update, st.integers(0, 4), st.sampled_from(["Choose red.", "Choose white.", ""])),
    st.builds(Merge, st.lists(st.integers(0, 4), max_size=3).map(tuple), st.just("Choose any.")),
    st.builds(Delete, st.integers(0, 4), st.sampled_from(["", "no use"])),
    st.builds(Keep, st.integers(0, 4)),
)


@settings(max_examples=25, deadline=None)
@given(batches=st.lists(st.lists(KINDS, max_size=4), max_size=4))
def test_every_operation_has_an_outcome_and_no_lesson_vanishes(
    batches: list[list[Operation]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    with LessonStore(tmp_path_factory.mktemp("a") / "lessons.sqlite") as store:
        for text in ("Choose amber.", "Choose blue.", "Choose green."):
            store.add(lesson(text))
        operations, aside = merged(batches)
        outcomes = curate(store, operations, "step 3")
        assert all((each.lesson is None) == bool(each.refused) for each in (*outcomes, *aside))
        said = {(type(o), getattr(o, "id", None)) for batch in batches for o in batch}
        assert said == {(type(each.operation), getattr(each.operation, "id", None)) for each in (*outcomes, *aside)}
        for each in store.lessons(states=None):
            assert each.state in ("proposed", "active") or store.history(each.id)[-1].reason


# replies of a model

REPLY = [
    {"op": "ADD", "text": "Choose red.", "when": "the gate"},
    {"op": "update", "id": 1, "text": "Choose white."},
    {"operation": "MERGE", "ids": [1, "2"], "content": "Choose any."},
    {"op": "DELETE", "id": "#2", "reason": "it misleads"},
    {"op": "DELETE", "id": 3, "text": None},
    {"op": "KEEP", "id": "lesson 1"},
]
READ = (
    Add(lesson("Choose red.", when="the gate", author="model", evidence=(ONE,))),
    Update(1, "Choose white.", None, (ONE,)),
    Merge((1, 2), "Choose any."),
    Delete(2, "it misleads"),
    Delete(3),
    Keep(1),
)
WRITTEN = json.dumps(REPLY)


def read(reply: str) -> Any:
    return read_operations(reply, ENV, ELM, "model", (ONE,))


@pytest.mark.parametrize(
    "reply",
    [
        WRITTEN,
        f"```json\n{json.dumps(REPLY, indent=2)}\n```",
        f"Both [1] and {{2}} failed at the gate [see above].\n\n```\n{WRITTEN}\n```\nI hope that helps [2].",
        json.dumps({"operations": REPLY}),
        "\n".join(map(json.dumps, REPLY)),
        WRITTEN[:-1] + ', {"op": "ADD", "text": "Choose',  # cut off
    ],
)
def test_a_structured_reply_is_read_however_it_is_wrapped(reply: str) -> None:
    assert (read(reply).operations, read(reply).problems) == (READ, ())


def test_an_empty_list_is_no_problem() -> None:
    assert read("There is nothing to learn: []").problems == () == read("[]").operations


GARBAGE: list[tuple[str, str]] = [
    ("", "no JSON list"),
    ("I cannot help with that.", "no JSON list"),
    ("[1, 2]", "no JSON list"),
    ("[" * 1_000_000, "no JSON list"),
    ('{"a":' * 200_000, "no JSON list"),
    ("\ud800\0", "no JSON list"),
    ('[{"op": "DESTROY", "id": 1}]', "operation 1: the operation is ADD, UPDATE"),
    ('[{"op": ["ADD"]}]', "operation 1: the operation is"),
    ('[{"id": 1}]', "operation 1: the operation is"),
    ('[{"op": "ADD"}]', "operation 1: the text is missing"),
    ('[{"op": "ADD", "text": 5}]', "operation 1: the text is missing"),
    ('[{"op": "ADD", "text": "a", "when": ["b"]}]', "operation 1: when is a phrase"),
    ('[{"op": "UPDATE", "text": "a"}]', "operation 1: an id is a number"),
    ('[{"op": "UPDATE", "id": true, "text": "a"}]', "operation 1: an id is a number"),
    ('[{"op": "DELETE", "id": 1e999}]', "operation 1: an id is a number"),
    ('[{"op": "DELETE", "id": "all"}]', "operation 1: an id is a number"),
    (f'[{{"op": "DELETE", "id": {"9" * 5000}}}]', "no JSON list|an id"),
    (f'[{{"op": "DELETE", "id": {"9" * 400}}}]', "operation 1: an id is a number"),
    ('[{"op": "MERGE", "ids": "1,2", "text": "a"}]', "operation 1: MERGE takes a list"),
    ('[{"op": "KEEP", "id": 1}, "and so on"]', "operation 2: expected an object"),
]


@pytest.mark.parametrize(("reply", "why"), GARBAGE, ids=range(len(GARBAGE)))
def test_what_cannot_be_read_is_counted(reply: str, why: str) -> None:
    [problem] = read(reply).problems
    assert any(problem.startswith(each) for each in why.split("|")) and len(problem) < 200


def test_a_huge_reply_is_read_in_part() -> None:
    found = read(json.dumps(REPLY * 200))
    assert len(found.operations) == 64 and found.problems == (
        f"{found.problems[0].split()[0]} operations: the first 64 are read",
    )


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.sampled_from(["ADD", "DELETE"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["op", "id", "ids", "text", "when", "reason", "operations"]), inner, max_size=4
        )
    ),
    max_leaves=10,
)


@settings(max_examples=200, deadline=None)
@given(reply=st.text(max_size=40) | JSON.map(json.dumps) | st.lists(JSON.map(json.dumps), max_size=2).map("[ ".join))
def test_no_reply_raises(reply: str) -> None:
    found = read(reply)
    merged([found.operations])
    assert found.problems or found.operations or "[" in reply
