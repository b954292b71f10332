"""FactSearch: questions with one answer that searches reach, held out by country and by path."""

import json
import lzma
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest

from treegym.envs import FactSearchEnv, check_env, normalize_answer
from treegym.envs.factsearch.questions import Question
from treegym.tools.search import SearchTool

SHARED = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="module")
def env() -> FactSearchEnv:
    return FactSearchEnv()


def play(env: FactSearchEnv, seed: int = 0, **options: Any) -> tuple[float, dict[str, Any]]:
    env.reset(seed=seed, options=options)
    while action := env.oracle():
        _, reward, terminated, _, info = env.step(action)
    assert terminated
    return reward, info["reward_terms"]


def search_tool(env: FactSearchEnv) -> SearchTool:
    (tool,) = env.given_tools
    assert isinstance(tool, SearchTool)
    return tool


def pool(env: FactSearchEnv, split: str, paths: str = "any", *hops: int) -> tuple[Question, ...]:
    return env.questions.pool(split, frozenset(hops), paths)


def country(passage: str) -> str:
    """The country that a passage's id tells, if any."""
    kind, _, rest = passage.partition("-")
    return rest[:2] if kind in ("country", "subdivision") else ""


def test_the_corpus_is_large_and_its_passages_are_short(env: FactSearchEnv) -> None:
    passages = search_tool(env).index.passages
    assert len(passages) >= 50_000
    assert len({passage.id for passage in passages}) == len(passages)
    assert max(len(passage.text.split()) for passage in passages) <= 45


@pytest.mark.parametrize("hops", [1, 2, 3])
def test_there_are_many_questions_of_each_kind(env: FactSearchEnv, hops: int) -> None:
    assert len(pool(env, "train", "any", hops)) >= 3000
    seen, new = pool(env, "heldout", "seen", hops), pool(env, "heldout", "new", hops)
    assert len(seen) == len(new) >= 250
    assert not pool(env, "train", "new", hops)
    assert len({question.path for question in pool(env, "train", "any", hops)}) >= 6


def test_new_paths_combine_relations_that_training_knows(env: FactSearchEnv) -> None:
    trained = {question.path for question in pool(env, "train")}
    relations = {relation for path in trained for relation in path.split("/")}
    for question in pool(env, "heldout"):
        assert (question.path not in trained) == question.new_path
        assert relations.issuperset(question.path.split("/"))


def test_training_visits_no_held_out_country(env: FactSearchEnv) -> None:
    visited = {
        split: {country(id) for question in pool(env, split) for id in question.supporting} - {""}
        for split in ("train", "heldout")
    }
    assert min(map(len, visited.values())) >= 40
    assert visited["train"].isdisjoint(visited["heldout"])
    mentioned = {split: {question.queries[0] for question in pool(env, split)} for split in ("train", "heldout")}
    assert mentioned["train"].isdisjoint(mentioned["heldout"])


def test_a_question_has_one_answer(env: FactSearchEnv) -> None:
    answers = defaultdict(set)
    for question in env.questions:
        answers[question.question].add(question.answers)
        assert normalize_answer(question.answers[0])
        wrong = {normalize_answer(question.wrong_answer), normalize_answer(question.guess)}
        assert wrong.isdisjoint(map(normalize_answer, question.answers))
    assert max(map(len, answers.values())) == 1


def test_every_hop_is_found_and_its_value_read(env: FactSearchEnv) -> None:
    texts = {passage.id: passage.text for passage in search_tool(env).index.passages}
    for question in env.questions[::20]:
        for query, passage in zip(question.queries, question.supporting, strict=True):
            assert passage in search_tool(env)(query=query).data
        assert question.answers[0] in search_tool(env)(query=question.queries[-1]).text
        assert question.answers[0] in texts[question.supporting[-1]][:160]


def test_the_oracle_solves_the_questions(env: FactSearchEnv) -> None:
    for question in env.questions[::20]:
        reward, terms = play(env, question=question.id)
        assert terms == {"exact": 1.0, "f1": 1.0, "supported": 1.0, "format": 1.0}
        assert reward == pytest.approx(1.1)


@pytest.mark.parametrize("rate", [0.3, 1.0])
def test_the_oracle_errs_at_its_rate_and_plausibly(env: FactSearchEnv, rate: float) -> None:
    erring = FactSearchEnv(oracle_error=rate)
    results = [play(erring, seed)[1] for seed in range(300)]
    assert sum(terms["exact"] for terms in results) / 300 == pytest.approx(1 - rate, abs=0.08)
    assert [play(erring, seed)[1] for seed in range(300)] == results
    wrong = [terms for terms in results if not terms["exact"]]
    assert {terms["format"] for terms in wrong} == {1.0}
    assert len({terms["supported"] for terms in wrong}) > 1  # some guess early, some look up another fact


def test_oracle_errors_leave_the_tasks_as_they_are(env: FactSearchEnv) -> None:
    erring = FactSearchEnv(oracle_error=0.5)
    env.reset(seed=7), erring.reset(seed=7)
    for _ in range(20):
        assert env.reset() == erring.reset()


def test_options_choose_and_settings_are_their_defaults(env: FactSearchEnv) -> None:
    chosen = FactSearchEnv(split="heldout", hops=[3], paths="new")
    for seed in range(20):
        _, info = chosen.reset(seed=seed)
        assert (info["split"], info["hops"], info["new_path"]) == ("heldout", 3, True)
        _, info = chosen.reset(seed=seed, options={"split": "train", "hops": [1, 2], "paths": "seen"})
        assert info["split"] == "train"
        assert info["hops"] in (1, 2)
        assert env.reset(options={"question": info["question"]})[1]["question"] == info["question"]


@pytest.mark.parametrize(
    ("options", "told"),
    [({"split": "tset"}, "tset"), ({"hops": [9]}, "9"), ({"question": "none"}, "'none'"), ({"hop": 1}, "'hop'")],
)
def test_impossible_options_are_refused(env: FactSearchEnv, options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        env.reset(seed=0, options=options)


def test_seeds_spread_over_the_questions(env: FactSearchEnv) -> None:
    drawn = Counter(env.reset(seed=seed, options={"hops": [2]})[1]["question"] for seed in range(500))
    assert len(drawn) > 450


def test_turns_suffice_for_the_hops_and_end(env: FactSearchEnv) -> None:
    for hops in (1, 2, 3):
        env.reset(seed=0, options={"hops": [hops]})
        assert env.max_turns == hops + 3
        *_, truncated, info = [env.step("<search>currency</search>") for _ in range(env.max_turns)][-1]
        assert truncated
        assert info["reward_terms"]["exact"] == 0.0


def test_equal_searches_for_one_question_are_one_situation(env: FactSearchEnv) -> None:
    id = pool(env, "train", "any", 3)[0].id
    env.reset(seed=1, options={"question": id})
    env.step("<search>currency of Japan</search>")
    twin = FactSearchEnv()
    twin.reset(seed=2, options={"question": id})
    assert twin.state_key() != env.state_key()
    twin.step("I wonder.\n<search>currency of Japan</search>")
    assert twin.state_key() == env.state_key()


ROWS = [{"id": "1", "title": "Moss", "text": "Moss is green."}, {"id": "2", "title": "Snow", "text": "Snow is white."}]
ASK = {"id": "q", "question": "Is snow white?", "answers": ["yes"], "supporting": ["2"], "split": "test"}


def write(path: Path, rows: list[Any]) -> Path:
    text = "".join(f"{json.dumps(row)}\n" for row in rows)
    path.write_bytes(lzma.compress(text.encode()) if path.suffix == ".xz" else text.encode())
    return path


@pytest.mark.parametrize("supporting", [["2"], [{"title": "Snow", "pid": "2"}]])
def test_a_corpus_of_ones_own_runs_through_the_same_class(tmp_path: Path, supporting: list[Any]) -> None:
    corpus = [write(tmp_path / "a.jsonl.xz", ROWS[:1]), write(tmp_path / "b.jsonl", ROWS[1:])]
    questions = write(tmp_path / "q.jsonl", [{**ASK, "supporting": supporting}])
    check_env(lambda: FactSearchEnv(corpus, questions, split="heldout"))
    reward, terms = play(FactSearchEnv(corpus, questions), question="q")
    assert (reward, terms["exact"], terms["supported"]) == (1.1, 1.0, 1.0)
    assert play(FactSearchEnv(corpus, questions, oracle_error=1.0), question="q")[1]["exact"] == 0.0
    with pytest.raises(ValueError, match="no questions for"):
        FactSearchEnv(corpus, questions, split="train").reset(seed=0)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({**ASK, "answers": []}, "'answers'"),
        ({**ASK, "answers": "yes"}, "'answers'"),
        ({**ASK, "supporting": ["3"]}, "'supporting': '3'"),
        ({**ASK, "question": 3}, "'question'"),
        ({**ASK, "hops": "two"}, "'hops'"),
        ({**ASK, "queries": ["snow", "white"]}, "'queries'"),
        ({"id": "q"}, "'supporting'"),
        ([1], "not a JSON object"),
    ],
)
def test_a_bad_row_is_named_by_file_line_and_field(tmp_path: Path, row: Any, told: str) -> None:
    corpus, questions = write(tmp_path / "c.jsonl", ROWS), write(tmp_path / "q.jsonl", [ASK, row])
    with pytest.raises(ValueError, match=rf"q\.jsonl, line 2: .*{told}"):
        FactSearchEnv(corpus, questions)


def test_rows_without_a_known_split_are_split_by_their_id(tmp_path: Path) -> None:
    rows = [{**ASK, "id": f"q{i}", "split": "people"} for i in range(200)]
    questions = FactSearchEnv(write(tmp_path / "c.jsonl", ROWS), write(tmp_path / "q.jsonl", rows)).questions
    assert 0.1 < len(questions.pool("heldout", frozenset(), "any")) / 200 < 0.3


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared multi-hop data beside the repository")
def test_published_multi_hop_questions_run(tmp_path: Path) -> None:
    env = FactSearchEnv(SHARED / "multihop/corpus.jsonl.gz", SHARED / "multihop/questions.jsonl.gz", snippet_chars=400)
    supported = []
    for question in env.questions:
        _, terms = play(env, question=question.id)
        assert terms["exact"] == 1.0
        supported.append(terms["supported"])
    assert sum(supported) / len(supported) > 0.9
