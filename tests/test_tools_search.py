"""Search: what is found, in which order, and what a damaged or contested cache does."""

import multiprocessing
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treegym.tools import ToolError
from treegym.tools.search import Passage, SearchIndex, SearchTool
from treegym.tools.search import index as search

PASSAGES = [
    Passage("a", "Cairo", "Cairo is the capital of Egypt."),
    Passage("b", "São Paulo", "São Paulo is a city in Brazil."),
    Passage("c", "Oslo", "Oslo is the capital of Norway. It has 700,000 inhabitants."),
    Passage("d", "Empty", ""),
    *(Passage(f"twin-{i}", "Twin", "Twins look the same.") for i in range(50)),
]


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> SearchIndex:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TREEGYM_CACHE", str(tmp_path_factory.mktemp("cache")))
        return SearchIndex.build(PASSAGES)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TREEGYM_CACHE", str(tmp_path))
    return tmp_path


def ids(index: SearchIndex, query: str, k: int = 3) -> list[str]:
    return [hit.passage.id for hit in index.search(query, k)]


@pytest.mark.parametrize(
    ("query", "first"),
    [("capital of Egypt", "a"), ("sao PAULO", "b"), ("São", "b"), ("the capital norway?", "c"), ("empty", "d")],
)
def test_finds_by_words_of_title_and_text_whatever_case_and_accents(index: SearchIndex, query: str, first: str) -> None:
    assert ids(index, query)[0] == first


def test_scores_fall_and_equals_keep_the_order_of_the_passages(index: SearchIndex) -> None:
    assert ids(index, "twins", 60) == [f"twin-{i}" for i in range(50)]
    scores = [hit.score for hit in index.search("capital Egypt twins", 60)]
    assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize("query", ["twins", "the capital", "is look same in"])
def test_the_best_k_begin_the_best_more(index: SearchIndex, query: str) -> None:
    everything = ids(index, query, len(PASSAGES))
    for k in range(len(everything)):
        assert ids(index, query, k) == everything[:k]


@pytest.mark.parametrize(
    "query", ["", "  ", "zzz", "?!", '"', "title:(", "a AND OR NOT b^9~", "\x00\ud800", "x" * 10**6]
)
def test_odd_queries_are_just_words(index: SearchIndex, query: str) -> None:
    assert index.search(query, 3) == []


@given(st.text())
def test_any_query_gives_at_most_k_hits(index: SearchIndex, query: str) -> None:
    assert len(index.search(query, 2)) <= 2


def test_a_long_query_is_served(index: SearchIndex) -> None:
    assert ids(index, "egypt " * 100_000)[0] == "a"


def test_threads_find_the_same(index: SearchIndex) -> None:
    with ThreadPoolExecutor(8) as pool:
        assert len({tuple(found) for found in pool.map(lambda _: ids(index, "capital city", 5), range(200))}) == 1


def test_pickles_as_its_path(index: SearchIndex) -> None:
    assert pickle.loads(pickle.dumps(index)) is index
    assert len(pickle.dumps(index)) < 500


def test_the_second_build_reads_the_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = SearchIndex.build(PASSAGES).path
    monkeypatch.setattr(search, "write_index", lambda *_: pytest.fail("built again"))
    assert SearchIndex.build(PASSAGES).path == path


def test_other_passages_get_another_index(cache: Path) -> None:
    assert SearchIndex.build(PASSAGES).path != SearchIndex.build(PASSAGES[:-1]).path


@pytest.mark.parametrize("victim", ["passages.jsonl", "manifest.json"])
@pytest.mark.parametrize("damage", ["change", "remove"])
def test_a_damaged_cache_is_built_again(cache: Path, victim: str, damage: str) -> None:
    path = SearchIndex.build(PASSAGES).path
    if damage == "change":
        (path / victim).write_text('{"no": "such thing"}')
    else:
        (path / victim).unlink()
    search._open.cache_clear()
    assert ids(SearchIndex.build(PASSAGES), "egypt") == ["a"]
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def _build(_: int) -> list[str]:
    return ids(SearchIndex.build(PASSAGES), "egypt")


def test_processes_may_build_at_once(cache: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert pool.map(_build, range(2), chunksize=1) == [["a"], ["a"]]
    (folder,) = cache.iterdir()
    assert len(list(folder.iterdir())) == 1


def test_the_tool_numbers_cuts_and_names_its_hits(index: SearchIndex) -> None:
    result = SearchTool(index, top_k=2, snippet_chars=12)(query="capital Oslo")
    assert result.text == "[1] Oslo is the …\n[2] Cairo is the…"
    assert result.data == ["c", "a"]
    assert SearchTool(index)(query="zzz").text == "no results"


@pytest.mark.parametrize("arguments", [{}, {"query": ""}, {"query": " \n"}, {"query": 3}, {"query": "a", "k": 1}])
def test_the_tool_refuses_what_is_no_query(index: SearchIndex, arguments: dict[str, object]) -> None:
    with pytest.raises(ToolError, match="query"):
        SearchTool(index)(**arguments)


UNSPACED = [
    Passage("beijing", "北京", "北京是中国的首都。"),
    Passage("tokyo", "東京", "東京都は日本の首都です。"),
    Passage("bangkok", "กรุงเทพ", "กรุงเทพมหานครเป็นเมืองหลวงของประเทศไทย"),
    Passage("fuji", "富士山", "富士山は高い山。"),
    Passage("shop", "Shop", "iPhone手机壳 for Oslo"),
    Passage("seoul", "서울", "서울은 대한민국의 수도이다"),
]


@pytest.mark.parametrize(
    ("query", "best"),
    [
        ("中国的首都是哪里", "beijing"),
        ("日本の首都はどこ", "tokyo"),
        ("เมืองหลวงของไทย", "bangkok"),
        ("山", "fuji"),
        ("手机", "shop"),
        ("서울은", "seoul"),
    ],
)
def test_text_without_blanks_is_found_by_a_part_of_it(query: str, best: str) -> None:
    assert SearchIndex.build(UNSPACED).search(query, 1)[0].passage.id == best


def test_unspaced_passages_leave_the_scores_of_other_words_alone() -> None:
    english = [Passage(str(i), "", text) for i, text in enumerate(["a red moss", "moss on a stone", "stone"])]
    long = Passage("x", "", "東京都は日本の首都です" * 50)
    short = Passage("x", "", "one")  # as many words, by blanks
    scores = [
        [(hit.passage.id, hit.score) for hit in SearchIndex.build([*english, other]).search("red moss stone", 9)]
        for other in (long, short)
    ]
    assert scores[0] == scores[1]


def test_two_passages_of_one_id_are_refused() -> None:
    with pytest.raises(ValueError, match="two passages have the id 'a': 'One' and 'Two'"):
        SearchIndex.build([Passage("a", "One", "1"), Passage("a", "Two", "2")])
