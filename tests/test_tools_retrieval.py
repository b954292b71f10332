"""Search over HTTP, by meaning and fused: the same hits whichever way they are asked for, and failures are said."""

import functools
import http.server
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import permutations
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from listening import listening
from numpy.typing import NDArray

from treegym.envs import FactSearchEnv, check_env
from treegym.scenarios.commands.cli import main
from treegym.tools.search import (
    DenseIndex,
    Fused,
    Hit,
    Passage,
    RemoteSearch,
    Retriever,
    SearchError,
    SearchIndex,
    SearchTool,
    StaticEncoder,
    TransformerEncoder,
    dense,
)
from treegym.tools.search import client as remotesearch
from treegym.tools.search.server import MAX_BYTES, MAX_QUERIES, MAX_TOP_K, search_app

PASSAGES = [
    Passage("a", "Cairo", "Cairo is the capital of Egypt."),
    Passage("b", "São Paulo", "São Paulo is a city in Brazil.\nIt is large."),
    Passage("c", 'A "quoted" name', "Oslo is the capital of Norway."),
    Passage("d", "two\nlines", '"In quotes"\nand not.'),
    Passage("e", "", "untitled"),
    Passage("f", 'so he said "yes"', ""),
    Passage("g", "東京", "東京は日本の首都。 🗼"),
    *(Passage(f"twin-{i}", "Twin", "Twins look the same.") for i in range(20)),
]


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TREEGYM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def index(_cache: None) -> SearchIndex:
    return SearchIndex.build(PASSAGES)


@dataclass
class Counting:
    """A retriever that notes the queries of every call."""

    retriever: Retriever
    calls: list[list[str]] = field(default_factory=list)

    def search(self, query: str, k: int) -> list[Hit]:
        raise AssertionError("the server asks for many")

    def search_many(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        self.calls.append(list(queries))
        return self.retriever.search_many(queries, k)


@contextmanager
def serving(retriever: Retriever) -> Iterator[str]:
    """The address of a server in a thread."""
    with listening(search_app(retriever)) as url:
        yield f"{url}/retrieve"


@pytest.fixture(scope="module")
def address(index: SearchIndex) -> Iterator[str]:
    with serving(index) as url:
        yield url


@pytest.fixture(scope="module")
def remote(address: str) -> Iterator[RemoteSearch]:
    with closing(RemoteSearch(address, window=0)) as client:
        yield client


# the server and its client


@pytest.mark.parametrize(
    "query",
    ["capital of Egypt", "sao PAULO", "東京は日本の首都", "quoted yes", "", "  ", "the of in", "\x00\ud800 cairo",
     "egypt " * 100_000, "x" * 10**6, '"}]', "twins"],
)  # fmt: skip
@pytest.mark.parametrize("k", [0, 1, 3, 25])
def test_a_server_gives_what_the_index_gives(index: SearchIndex, remote: RemoteSearch, query: str, k: int) -> None:
    assert remote.search(query, k) == index.search(query, k)
    assert remote.search_many([query, "cairo"], k) == index.search_many([query, "cairo"], k)


@given(st.text() | st.sampled_from(PASSAGES).map(lambda passage: f"{passage.title} {passage.text}"))
@settings(deadline=None)
def test_so_it_does_for_any_query(index: SearchIndex, remote: RemoteSearch, query: str) -> None:
    assert remote.search(query, 3) == index.search(query, 3)


def test_the_reply_has_the_shape_of_search_r1(address: str) -> None:
    document = {"id": "a", "contents": '"Cairo"\nCairo is the capital of Egypt.'}
    request: dict[str, Any] = {"queries": ["cairo", "nothing like it"], "topk": 1}
    assert httpx2.post(address, json=request).json() == {"result": [[document], []]}
    [[hit], []] = httpx2.post(address, json={**request, "return_scores": True}).json()["result"]
    assert hit["document"] == document and hit["score"] > 0
    [twins] = httpx2.post(address, json={"queries": ["twins"], "topk": None}).json()["result"]
    assert len(twins) == 3


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"queries": ["a"] * (MAX_QUERIES + 1)}, f"queries: at most {MAX_QUERIES}, got {MAX_QUERIES + 1}"),
        ({"queries": "cairo"}, 'queries: expected a list of texts, got "cairo"'),
        ({}, "queries: expected a list of texts, got null"),
        ({"queries": ["a", None]}, "queries[1]: expected a text, got null"),
        ({"queries": [], "topk": MAX_TOP_K + 1}, f"topk: expected a number up to {MAX_TOP_K}, got {MAX_TOP_K + 1}"),
        ({"queries": [], "topk": -1}, "topk: "),
        ({"queries": [], "topk": True}, "topk: "),
        ({"queries": [], "topk": "3"}, "topk: "),
        ({"queries": [], "return_scores": 1}, "return_scores: expected true or false, got 1"),
        (["a"], "the body is not a JSON object"),
        (b"{", "the body is not JSON"),
        (b"", "the body is not JSON"),
        (b"\xff\xfe\x00", "the body is not JSON"),
        (b"[" * 100_000, "the body is not JSON"),
    ],
)
def test_a_bad_request_is_refused_by_field(address: str, body: Any, told: str) -> None:
    reply = httpx2.post(address, content=body if isinstance(body, bytes) else json.dumps(body).encode())
    assert reply.status_code == 400 and reply.json()["detail"].startswith(told)


def test_a_body_is_read_up_to_its_limit(address: str) -> None:
    full = json.dumps({"queries": ["cairo"]}).encode().ljust(MAX_BYTES)
    assert httpx2.post(address, content=full).status_code == 200
    reply = httpx2.post(address, content=full + b" ")
    assert reply.status_code == 413 and str(MAX_BYTES) in reply.json()["detail"]


def test_64_threads_share_one_request_and_each_gets_its_own(index: SearchIndex) -> None:
    counting = Counting(index)
    queries = [f"{word} {i}" for i in range(16) for word in ("cairo", "oslo", "yes", "twins")]
    with serving(counting) as url, closing(RemoteSearch(url, window=60)) as client, ThreadPoolExecutor(64) as pool:
        found = list(pool.map(lambda query: client.search(query, 2), queries))
    assert found == [index.search(query, 2) for query in queries]
    assert [sorted(call) for call in counting.calls] == [sorted(queries)]


def test_many_rounds_of_64_threads_mix_nothing_up(index: SearchIndex) -> None:
    counting = Counting(index)
    queries = [f"{PASSAGES[i % 7].title} {PASSAGES[i % 5].text}" for i in range(1500)]
    ks = [1 + i % 3 for i in range(1500)]
    with serving(counting) as url, closing(RemoteSearch(url)) as client, ThreadPoolExecutor(64) as pool:
        found = list(pool.map(client.search, queries, ks))
    assert found == [index.search(query, k) for query, k in zip(queries, ks, strict=True)]
    assert sum(map(len, counting.calls)) == 1500 > 2 * len(counting.calls)


Reply = tuple[int, bytes]


@contextmanager
def scripted(answer: Callable[[int, dict[str, Any]], Reply]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The address of a server that answers its n-th request as told, and the requests so far."""
    seen: list[dict[str, Any]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            seen.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            status, body = answer(len(seen), seen[-1])
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/retrieve", seen
        server.shutdown()
        thread.join()


def found(request: dict[str, Any]) -> bytes:
    """Each query finds itself."""
    lists = [[{"document": {"id": q, "contents": f"{q}\ntext"}, "score": 1}] for q in request["queries"]]
    return json.dumps({"result": lists}).encode()


@pytest.fixture
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remotesearch, "FIRST_WAIT", 0.001)


@pytest.mark.usefixtures("_at_once")
@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_server_at_fault_is_asked_again(status: int) -> None:
    with scripted(lambda n, request: (status, b"busy") if n < 3 else (200, found(request))) as (url, seen):
        with closing(RemoteSearch(url, attempts=3)) as client:
            assert client.search("moss", 1) == [Hit(Passage("moss", "moss", "text"), 1.0)]
        assert len(seen) == 3
        with closing(RemoteSearch(url, attempts=3)) as client:
            assert client.search("moss", 1)
        assert len(seen) == 4


@pytest.mark.usefixtures("_at_once")
def test_attempts_come_to_an_end() -> None:
    with scripted(lambda n, request: (503, b"busy")) as (url, seen), closing(RemoteSearch(url, attempts=3)) as client:
        with pytest.raises(SearchError, match="answered 503: busy"):
            client.search("moss", 1)
        assert len(seen) == 3


@pytest.mark.parametrize("status", [301, 400, 404, 413, 422])
def test_a_refusal_is_final(status: int) -> None:
    refusal = json.dumps({"detail": "topk: too many"}).encode()
    with scripted(lambda n, request: (status, refusal)) as (url, seen), closing(RemoteSearch(url)) as client:
        with pytest.raises(SearchError, match=f"answered {status}: topk: too many$"):
            client.search("moss", 1)
        assert len(seen) == 1


@pytest.mark.parametrize(
    "reply",
    [b"", b"[]", b"{}", b'{"result": 3}', b'{"result": []}', b'{"result": [[{"score": 1}]]}', b"[" * 100_000,
     b'{"result": [[{"document": {"id": "1", "contents": 3}, "score": 1}]]}',
     b'{"result": [[{"document": {"id": "1", "contents": ""}, "score": "x"}]]}'],
)  # fmt: skip
def test_a_reply_of_another_shape_is_said(reply: bytes) -> None:
    with scripted(lambda n, request: (200, reply)) as (url, seen), closing(RemoteSearch(url)) as client:
        with pytest.raises(SearchError, match="answered in another shape"):
            client.search("moss", 1)
        assert len(seen) == 1


NILE = Passage("7", "Nile", "A river ?.")


@pytest.mark.parametrize(
    ("hit", "id", "score"),
    [
        ({"document": {"id": 7, "contents": '"Nile"\nA river \ud800.'}, "score": 2}, "7", 2.0),
        ({"document": {"contents": '"Nile"\nA river \ud800.'}}, None, 0.5),  # Search-R1's online servers
        ({"document": '"Nile"\nA river \ud800.', "score": -3.5}, None, -3.5),  # its reranker
        ('"Nile"\nA river \ud800.', None, 0.5),
        ({"id": "7", "contents": "Nile\nA river \ud800."}, "7", 0.5),  # without return_scores
        ({"document": {"id": "7", "content": "Nile\nA river \ud800."}, "score": None}, "7", 0.5),
        ({"document": {"title": "Nile", "text": "A river \ud800."}, "score": 1}, None, 1.0),
    ],
)
def test_hits_of_other_servers_are_read(hit: Any, id: str | None, score: float) -> None:
    first = {"document": {"contents": "another"}}
    for reply in ({"result": [[first, hit]]}, [[first, hit]]):
        sent = json.dumps(reply).encode()
        with scripted(lambda n, request, sent=sent: (200, sent)) as (url, _), closing(RemoteSearch(url)) as client:
            (other, found), again = client.search("moss", 2), client.search("moss", 2)[1]
        assert (found.passage.title, found.passage.text, found.score) == (NILE.title, NILE.text, score)
        assert found == again
        assert found.passage.id != other.passage.id
        assert id is None or found.passage.id == id


def test_a_bad_reply_fails_those_who_share_it_and_no_others() -> None:
    def answer(n: int, request: dict[str, Any]) -> Reply:
        return 200, found(request) if request["topk"] == 2 else b"{}"

    def ask(client: RemoteSearch, i: int) -> Any:
        try:
            return client.search(f"q{i}", 1 + i % 2)[0].passage.id
        except SearchError:
            return None

    with scripted(answer) as (url, seen), closing(RemoteSearch(url, window=0.2)) as client:
        with ThreadPoolExecutor(8) as pool:
            asked = list(pool.map(lambda i: ask(client, i), range(8)))
        assert asked == [f"q{i}" if i % 2 else None for i in range(8)]
        assert {request["topk"] for request in seen} == {1, 2}
        assert ask(client, 1) == "q1"


def test_a_refused_giant_query_harms_nobody_else() -> None:
    def answer(n: int, request: dict[str, Any]) -> Reply:
        return (413, b"too long") if any(len(query) > 5000 for query in request["queries"]) else (200, found(request))

    with scripted(answer) as (url, _), closing(RemoteSearch(url, window=0.2)) as client, ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(client.search, "x" * 6000 if i == 3 else f"q{i}", 1) for i in range(8)]
        assert [i for i, future in enumerate(asked) if future.exception()] == [3]


@contextmanager
def silent() -> Iterator[tuple[str, socket.socket]]:
    """The address of a server that takes connections and says nothing, and its socket."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/retrieve", listener


def test_a_silent_server_is_given_up_once() -> None:
    with silent() as (url, listener), closing(RemoteSearch(url, timeout=0.05)) as client:
        with pytest.raises(SearchError, match=r"has not answered within 0\.05 s"):
            client.search("moss", 1)
        listener.accept()[0].close()
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):  # there was no second attempt
            listener.accept()


def unreachable() -> str:
    """The address of a port where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"http://127.0.0.1:{listener.getsockname()[1]}/retrieve"


@pytest.mark.usefixtures("_at_once")
def test_a_dead_server_is_an_observation() -> None:
    with closing(RemoteSearch(unreachable())) as client:
        result = SearchTool(client)(query="moss")
    assert result.failed and result.text.startswith("search is unavailable: http://127.0.0.1:")


def test_close_ends_who_gathers_and_who_waits_for_another_attempt() -> None:
    asked = threading.Event()

    def answer(n: int, request: dict[str, Any]) -> Reply:
        asked.set()
        return 503, b""

    with scripted(answer) as (url, _), ThreadPoolExecutor(2) as pool:
        gathering, waiting = RemoteSearch(url, window=600), RemoteSearch(url, attempts=10**6)
        futures = [pool.submit(client.search, "moss", 1) for client in (gathering, waiting)]
        assert asked.wait(60)
        for client in (gathering, waiting):
            client.close()
        assert all(isinstance(future.exception(60), SearchError) for future in futures)
        for client in (gathering, waiting):
            client.close()
            with pytest.raises(SearchError, match="closed"):
                client.search("moss", 1)


@pytest.mark.parametrize("url", ["", "localhost:8000/retrieve", "ftp://x/retrieve", "http:///retrieve", "http://x:y/z"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="no address of a search server"):
        RemoteSearch(url)


# FactSearch on a server

ASK = {"id": "q", "question": "Which city is Egypt's capital?", "answers": ["Cairo"], "split": "test"}


def questions(folder: Path, **fields: Any) -> Path:
    path = folder / "questions.jsonl"
    path.write_text(json.dumps({**ASK, **fields}) + "\n")
    return path


@pytest.mark.parametrize(
    "fields",
    [{"supporting": [{"pid": "a", "title": "Cairo"}]}, {"supporting": ["a"], "queries": ["egypt"]},
     {"supporting": ["a"]}],
)  # fmt: skip
def test_factsearch_plays_on_a_server(address: str, tmp_path: Path, fields: dict[str, Any]) -> None:
    file = questions(tmp_path, **fields)
    check_env(lambda: FactSearchEnv(questions=file, server=address, split="heldout"))
    env = FactSearchEnv(questions=file, server=address, split="heldout")
    env.reset(seed=0)
    reward = 0.0
    while action := env.oracle():
        _, reward, _, _, info = env.step(action)
    assert reward == 1.1 and info["reward_terms"]["supported"] == 1.0
    assert pickle.loads(pickle.dumps(env)).given_tools[0].index is env.given_tools[0].index  # type: ignore[attr-defined]


@pytest.mark.usefixtures("_at_once")
def test_an_episode_goes_on_and_counts_when_its_server_is_gone(tmp_path: Path) -> None:
    env = FactSearchEnv(questions=questions(tmp_path, supporting=["a"]), server=unreachable(), split="heldout")
    env.reset(seed=0)
    said, _, terminated, truncated, info = env.step("<search>egypt</search>")
    assert said.startswith("search is unavailable: ") and not (terminated or truncated)
    assert info["failed_calls"] == 1
    assert env.step("<answer>Cairo</answer>")[1] == 1.0


def test_a_server_needs_questions_and_no_corpus(tmp_path: Path) -> None:
    file = questions(tmp_path, supporting=["a"])
    for corpus, asked in ((None, None), (file, file)):
        with pytest.raises(ValueError, match="takes the place of a corpus, and needs a file of questions"):
            FactSearchEnv(corpus, asked, server="http://127.0.0.1:1/retrieve")
    with pytest.raises(ValueError, match="'supporting': 7"):
        FactSearchEnv(questions=questions(tmp_path, supporting=[7]), server="http://127.0.0.1:1/retrieve")


# by meaning


@dataclass(frozen=True)
class Hashed:
    """Texts as random vectors: small whole numbers, so that many products are equal, or numbers of any kind."""

    whole: bool = True
    width: int = 24

    @property
    def name(self) -> str:
        return f"hashed {self.whole} {self.width}"

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return np.array([self._vector(text) for text in texts], dtype=np.float32).reshape(-1, self.width)

    @functools.cache  # noqa: B019
    def _vector(self, text: str) -> NDArray[np.float32]:
        random = np.random.default_rng(list(text.encode()))
        if self.whole:
            return random.integers(-1, 2, self.width).astype(np.float32)
        return (random.standard_normal(self.width) * 10 ** random.uniform(-3, 3)).astype(np.float32)


MANY = [Passage(f"p{i}", "", f"text {i % 300}") for i in range(400)]  # the last hundred say what the first say


def by_hand(encoder: Hashed, query: str, k: int) -> list[Hit]:
    asked = encoder([query])[0].astype(np.float64)
    vectors = encoder([f" {p.text}" for p in MANY]).astype(np.float64)
    scores = [float((vector * asked).sum()) for vector in vectors]
    places = sorted(range(len(MANY)), key=lambda place: (-scores[place], place))[:k]
    return [Hit(MANY[place], scores[place]) for place in places]


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("k", [1, 7, 400, 1000])
def test_the_best_by_hand_are_the_best(whole: bool, k: int) -> None:
    encoder = Hashed(whole)
    built = DenseIndex.build(MANY, encoder)
    queries = [f"query {i}" for i in range(70)]  # more than are encoded together
    expected = [by_hand(encoder, query, k) for query in queries]
    assert built.search_many(queries, k) == expected
    assert [built.search(query, k) for query in queries] == expected
    reopened = DenseIndex(built.path, encoder)
    assert reopened.search_many(queries, k) == expected


def test_blank_queries_and_no_hits_find_nothing() -> None:
    built = DenseIndex.build(MANY, Hashed())
    assert built.search_many(["", " \n", "text"], 0) == [[], [], []]
    assert [len(hits) for hits in built.search_many(["", " \n", "\ud800", "x" * 10**6], 2)] == [0, 0, 2, 2]
    assert built.search_many([], 3) == []
    with pytest.raises(ValueError, match="at least one passage"):
        DenseIndex.build([], Hashed())


def test_the_second_build_reads_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    path = DenseIndex.build(MANY, Hashed()).path
    monkeypatch.setattr(dense, "write_vectors", lambda *_: pytest.fail("built again"))
    again = DenseIndex.build(MANY, Hashed())
    assert again.path == path and pickle.loads(pickle.dumps(again)) is again
    monkeypatch.undo()
    others = [DenseIndex.build(MANY[:-1], Hashed()), DenseIndex.build(MANY, Hashed(width=8))]
    assert len({path, *(other.path for other in others)}) == 3


@pytest.mark.parametrize("victim", ["vectors.npy", "passages.jsonl", "manifest.json"])
@pytest.mark.parametrize("damage", ["change", "remove"])
def test_a_damaged_cache_is_built_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, victim: str, damage: str
) -> None:
    monkeypatch.setenv("TREEGYM_CACHE", str(tmp_path))
    expected = by_hand(Hashed(), "query", 3)
    file = DenseIndex.build(MANY, Hashed()).path / victim
    if damage == "change":
        file.write_bytes(bytes(byte ^ 1 for byte in file.read_bytes()))
    else:
        file.unlink()
    dense._open.cache_clear()
    assert DenseIndex.build(MANY, Hashed()).search("query", 3) == expected


def test_an_opened_index_of_the_wrong_shape_is_refused(tmp_path: Path) -> None:
    dense.write_vectors(MANY, Hashed(), tmp_path)
    np.save(tmp_path / "vectors.npy", np.zeros((3, 24), dtype=np.float32))
    with pytest.raises(ValueError, match=r"is damaged: vectors of shape \(3, 24\) for 400 passages"):
        DenseIndex(tmp_path, Hashed())
    with pytest.raises(ValueError, match=r"8 dimensions, the passages in .* have 24"):
        DenseIndex.build(MANY, Hashed(), Hashed(width=8)).search("query", 1)


@dataclass(frozen=True)
class Broken:
    """Gives one fixed answer."""

    answer: float
    rows: int
    name: str = "broken"

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return np.full((self.rows, 4), self.answer, dtype=np.float32)


@pytest.mark.parametrize(
    ("encoder", "told"),
    [
        (Broken(np.nan, 1), "'broken' gave NaN or infinity for ' text 0'"),
        (Broken(1.0, 2), r"shape \(2, 4\) for 1 texts"),
    ],
)
def test_a_broken_encoder_is_named(encoder: Broken, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        DenseIndex.build(MANY[:1], encoder)


def test_static_embeddings_find_by_meaning() -> None:
    texts = ["A puppy plays in the garden.", "The invoice was paid late.", "Rain is expected tomorrow.", ""]
    built = DenseIndex.build([Passage(text, "", text) for text in texts], StaticEncoder())
    for query, place in (("young dog", 0), ("bill for accounting", 1), ("weather forecast", 2)):
        assert built.search(query, 1)[0].passage.text == texts[place]
    encoder = StaticEncoder()
    assert (encoder(texts) == np.concatenate([encoder([text]) for text in texts])).all()
    assert np.linalg.norm(encoder(texts), axis=1) == pytest.approx([1, 1, 1, 0], abs=1e-6)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny encoder of random weights."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("bert")
    vocabulary = {
        word: i for i, word in enumerate(["[PAD]", "[UNK]", "query:", "moss", "is", "green", "snow", "white"])
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=32,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return folder


def test_a_transformer_s_states_are_averaged_over_the_tokens_alone(bert: Path) -> None:
    import torch
    from transformers import AutoModel

    model = AutoModel.from_pretrained(bert).eval()
    with torch.inference_mode():
        states = model(torch.tensor([[2, 3, 4, 5]])).last_hidden_state[0]  # query: moss is green
    mean = states.mean(dim=0)
    texts = ["moss is green", "snow", "snow is white snow is white snow"]
    vectors = TransformerEncoder(str(bert), prefix="query: ")(texts)
    assert vectors[0] == pytest.approx((mean / mean.norm()).numpy(), abs=1e-6)
    cut = TransformerEncoder(str(bert), max_tokens=3)(["moss is green", "moss is green snow white"])
    assert cut[0] == pytest.approx(cut[1], abs=1e-6)


def test_a_transformer_is_known_by_its_files_and_settings(bert: Path, tmp_path: Path) -> None:
    encoders = [
        TransformerEncoder(str(bert)),
        TransformerEncoder(str(bert), "query: "),
        TransformerEncoder(str(bert), "", 9),
    ]
    assert len({encoder.name for encoder in encoders}) == 3
    with pytest.raises(ValueError, match="holds no Hugging Face model"):
        TransformerEncoder(str(tmp_path))(["moss"])
    index = DenseIndex.build(MANY[:40], encoders[0], encoders[1])
    with ThreadPoolExecutor(8) as pool:
        threads = list(pool.map(lambda i: index.search(f"moss {i % 2}", 3), range(40)))
    assert all(hits == threads[i % 2] for i, hits in enumerate(threads))


# fused


@dataclass(frozen=True)
class Ranked:
    """Finds the same for every query."""

    ids: str

    def search(self, query: str, k: int) -> list[Hit]:
        return [Hit(Passage(id, "", ""), -float(rank)) for rank, id in enumerate(self.ids[:k])]

    def search_many(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        return [self.search(query, k) for query in queries]


def order(fused: Retriever, k: int = 100) -> str:
    return "".join(hit.passage.id for hit in fused.search("", k))


def test_reciprocal_ranks_add_up_as_by_hand() -> None:
    hits = Fused([Ranked("abc"), Ranked("cad")]).search("", 9)
    assert [hit.passage.id for hit in hits] == list("acbd")
    assert [hit.score for hit in hits] == pytest.approx([1 / 61 + 1 / 62, 1 / 63 + 1 / 61, 1 / 62, 1 / 63])
    assert order(Fused([Ranked("abc"), Ranked("cad")]), 2) == "ac"
    assert order(Fused([Ranked("abc"), Ranked("dc")], k=0)) == "adcb"  # 1, 1, 1/2 + 1/3, 1/2
    assert order(Fused([Ranked("abcdef")], depth=2), 4) == "abcd"
    assert Fused([Ranked("a")]).search_many(["", ""], 0) == [[], []]


RANKINGS = st.lists(st.permutations("abcdef").map(lambda ids: "".join(ids[:4])), min_size=1, max_size=4)


@given(RANKINGS)
def test_the_order_of_the_retrievers_does_not_matter(rankings: list[str]) -> None:
    results = [Fused([Ranked(ids) for ids in way]).search("", 9) for way in permutations(rankings)]
    assert all(result == results[0] for result in results)
    scores = [hit.score for hit in results[0]]
    assert scores == sorted(scores, reverse=True) and {h.passage.id for h in results[0]} == set("".join(rankings))


@given(st.permutations("abcdef"), st.integers(1, 3))
def test_retrievers_that_agree_are_followed(ids: list[str], count: int) -> None:
    assert order(Fused([Ranked("".join(ids))] * count)) == "".join(ids)


# the command


def test_the_command_serves_until_interrupted(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text(
        "".join(json.dumps({"id": p.id, "title": p.title, "text": p.text or "-"}) + "\n" for p in PASSAGES)
    )
    arguments = [sys.executable, "-m", "treegym", "serve-search", str(corpus), "--port", "0", "--hybrid"]
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "COLUMNS": "20"}
    ) as server:
        assert server.stdout
        said = server.stdout.readline()
        assert said.startswith(f"{len(PASSAGES)} passages at http://127.0.0.1:")
        with closing(RemoteSearch(said.split()[3].rstrip(";"))) as client:
            assert client.search("capital of Egypt", 2)[0].passage == PASSAGES[0]
            server.send_signal(signal.SIGINT)
            assert server.communicate(timeout=60) == ("stopped\n", "") and server.returncode == 0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nix.jsonl", "--port", "0"], "No such file"),
        (["bad.jsonl", "--port", "0"], "bad.jsonl, line 1: field 'id'"),
        (["bad.jsonl", "--port", "70000"], "--port"),
        (["bad.jsonl", "--port", "TAKEN"], "cannot listen on 127.0.0.1, port"),
        (["bad.jsonl", "--dense", "--hybrid"], "not both"),
        (["bad.jsonl", "--encoder", "nix"], "--encoder goes with"),
        (["good.jsonl", "--port", "0", "--dense", "--encoder", "."], "holds no Hugging Face model"),
    ],
)
def test_the_command_refuses_in_one_line(
    arguments: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jsonl").write_text('{"title": "no id"}\n')
    (tmp_path / "good.jsonl").write_text('{"id": "1", "title": "", "text": "moss"}\n')
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        monkeypatch.setattr(sys, "argv", ["treegym", "serve-search", *(port if a == "TAKEN" else a for a in arguments)])
        with pytest.raises(SystemExit, match="2"):
            main()
    said = capsys.readouterr().err
    assert told in said and said.count("\n") == 1
