"""What search costs and finds on a corpus of one's own; written to docs/results/search.md and .json.

    pip install 'treegym[search,dense]' bm25s numba
    python benchmarks/search.py FOLDER

FOLDER holds passages in *.jsonl[.gz|.xz] and questions.jsonl[.gz|.xz], in the fields of docs/environments.md. Every
side answers in a process of its own, so that its memory is its own. Five minutes for 215,000 passages on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, median, quantiles
from typing import Any

from treegym.envs.factsearch.questions import Question, read_passages, read_questions
from treegym.tools.search import DenseIndex, Fused, Hit, Passage, RemoteSearch, Retriever, SearchIndex, StaticEncoder
from treegym.tools.search.index import STOP_WORDS, load_passages, save_passages, words

RESULTS = Path(__file__).parent.parent / "docs" / "results"
ASKED = 1600  # questions, spread over all, for recall
TIMED = 400  # of them, for the time in process
SENT = 1600  # to the server, of each number of callers
CUTS = (1, 3, 10)
CALLERS = (1, 8, 64)
LIBRARIES = ("treegym", "tantivy", "bm25s", "numba", "wordllama", "numpy", "starlette", "uvicorn", "httpx2")
Timing = dict[str, float]


class Bm25s:
    """bm25s with our words and stop words and tantivy's k1 and b, compiled by numba."""

    def __init__(self, folder: Path) -> None:
        import bm25s

        self._passages = load_passages(folder)
        self._index = bm25s.BM25.load(folder, show_progress=False)

    def search(self, query: str, k: int) -> list[Hit]:
        asked = words(query)
        asked = [word for word in asked if word not in STOP_WORDS] or asked
        places, scores = self._index.retrieve([asked], k=k, show_progress=False)
        found = zip(places[0], scores[0], strict=True)
        return [Hit(self._passages[place], float(score)) for place, score in found if score > 0]

    def search_many(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        return [self.search(query, k) for query in queries]


def build_bm25s(passages: Sequence[Passage], folder: Path) -> None:
    import bm25s

    folder.mkdir()
    save_passages(passages, folder)
    index = bm25s.BM25(k1=1.2, b=0.75)
    index.index([words(f"{p.title} {p.text}") for p in passages], show_progress=False)
    index.save(folder, show_progress=False)


def open_tantivy(cache: Path) -> Retriever:
    return SearchIndex(*(cache / "search").iterdir())


def open_dense(cache: Path) -> Retriever:
    [path] = (cache / "dense").iterdir()
    return DenseIndex(path, StaticEncoder())


SIDES: dict[str, tuple[Callable[[Path], Retriever], tuple[str, ...]]] = {  # name: how to open it, its folders
    "tantivy": (open_tantivy, ("search",)),
    "bm25s": (lambda cache: Bm25s(cache / "bm25s"), ("bm25s",)),
    "dense": (open_dense, ("dense",)),
    "fused": (lambda cache: Fused((open_tantivy(cache), open_dense(cache))), ("search", "dense")),
}


def build(files: Sequence[Path], cache: Path) -> dict[str, Any]:
    """Builds all that the sides need: seconds and megabytes by folder, and how many passages there are."""
    os.environ["TREEGYM_CACHE"] = str(cache)
    passages = read_passages(*files)
    found: dict[str, Any] = {"passages": len(passages)}
    for folder, make in {
        "search": lambda: SearchIndex.build(passages),
        "bm25s": lambda: build_bm25s(passages, cache / "bm25s"),
        "dense": lambda: DenseIndex.build(passages, StaticEncoder()),
    }.items():
        start = time.perf_counter()
        make()
        took = time.perf_counter() - start
        size = sum(file.stat().st_size for file in (cache / folder).rglob("*") if file.is_file())
        found[folder] = {"seconds": took, "mb": size / 1e6}
    return found


def ask(side: str, cache: Path, questions: Sequence[Question]) -> dict[str, Any]:
    """Time of a search, memory of the process, and the mean recalls of each kind of question."""
    retriever = SIDES[side][0](cache)
    for question in questions[-20:]:
        retriever.search(question.question, 10)
    start = time.perf_counter()
    times = [timed(retriever, question) for question in questions[:TIMED]]
    timing = summary(times, time.perf_counter() - start)
    found = retriever.search_many([question.question for question in questions], 10)
    rows = defaultdict(list)
    for hits, question in zip(found, questions, strict=True):
        for kind in (question.path, "all"):
            rows[kind].append([recall([hit.passage.id for hit in hits[:cut]], question.supporting) for cut in CUTS])
    recalls = {kind: [mean(column) for column in zip(*rows[kind], strict=True)] for kind in rows}
    return {**timing, "resident_mb": resident("self"), "recalls": recalls}


def timed(retriever: Retriever, question: Question) -> float:
    """Milliseconds until its ten hits are there."""
    start = time.perf_counter()
    retriever.search(question.question, 10)
    return (time.perf_counter() - start) * 1e3


def summary(times: Sequence[float], seconds: float) -> Timing:
    return {"per_second": len(times) / seconds, "median_ms": median(times), "p95_ms": quantiles(times, n=20)[-1]}


def recall(found: Sequence[str], wanted: Sequence[str]) -> float:
    return len(set(found) & set(wanted)) / len(set(wanted))


def resident(process: int | str) -> float:
    """Megabytes in memory."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    return int(lines["VmRSS"].split()[0]) * 1024 / 1e6


def over_http(files: Sequence[Path], cache: Path, questions: Sequence[Question]) -> dict[str, Any]:
    """`treegym serve-search`, asked by threads of this process, with requests shared and not."""
    command = [sys.executable, "-m", "treegym", "serve-search", *map(str, files), "--port", "0"]
    env = {**os.environ, "TREEGYM_CACHE": str(cache)}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout
        address = server.stdout.readline().split()[3].rstrip(";")
        rows = {
            f"{callers} caller{'s' * (callers > 1)}, {label}": call(address, callers, shared, questions)
            for callers in CALLERS
            for label, shared in (("one client", True), ("a client each", False))
        }
        memory = resident(server.pid)
        server.terminate()
    return {"rows": rows, "resident_mb": memory}


def call(address: str, callers: int, shared: bool, questions: Sequence[Question]) -> Timing:
    """With one client, whose window is 2 ms, or with one for each caller, which waits for nobody."""
    asked = [questions[i % len(questions)] for i in range(SENT)]
    clients = [RemoteSearch(address)] if shared else [RemoteSearch(address, window=0) for _ in range(callers)]
    with ThreadPoolExecutor(callers) as pool:
        list(pool.map(lambda i: clients[i % len(clients)].search("warm", 10), range(callers)))
        start = time.perf_counter()
        times = list(pool.map(lambda i: timed(clients[i % len(clients)], asked[i]), range(SENT)))
        took = time.perf_counter() - start
    for client in clients:
        client.close()
    return summary(times, took)


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """The function's answer, from a fresh process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def render(results: Mapping[str, Any]) -> str:
    """The page as Markdown."""
    built, sides, served = results["built"], results["sides"], results["served"]
    lines = [
        "# Search",
        "",
        "Made by `python benchmarks/search.py PATH` on " + results["machine"] + ".",
        "",
        f"{built['passages']:,} passages (Debian 12's packages, WordNet 3.0) and {results['kinds']['all']:,} of their",
        "questions of two or three hops; ten hits a search. tantivy is what `SearchIndex` searches by; bm25s has the",
        "same words, stop words, k1 and b, and numba; dense is `DenseIndex` with the static embeddings in wordllama's",
        "wheel; fused is tantivy and dense by reciprocal ranks. Every side opens from disk what was built before.",
        "",
        "## In process, one search after another",
        "",
        "| | build s | disk MB | memory MB | searches/s | median ms | p95 ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for side, row in sides.items():
        seconds, size = (sum(built[folder][key] for folder in SIDES[side][1]) for key in ("seconds", "mb"))
        lines.append(f"| {side} | {seconds:.1f} | {size:,.0f} | {row['resident_mb']:,.0f} | {speeds(row)} |")
    lines += [
        "",
        "## Over HTTP",
        "",
        f"`treegym serve-search` with tantivy, {served['resident_mb']:,.0f} MB of memory; the callers are threads of",
        "another process on the same cores. With one client their searches share requests; with a client each, every",
        "search is a request of its own.",
        "",
        "| | searches/s | median ms | p95 ms |",
        "|---|---|---|---|",
        *(f"| {name} | {speeds(row)} |" for name, row in served["rows"].items()),
        "",
        "## Recall at 1, 3 and 10",
        "",
        "The share of a question's supporting passages among the first hits, when its words are the only search. Most",
        "questions describe their first passage alone, which leads to the others: no single search finds those. They",
        "quote that description word by word, which is the best case of BM25 and not of dense.",
        "",
        "| questions | of them | " + " | ".join(sides) + " |",
        "|---|---|" + "---|" * len(sides),
    ]
    for kind, count in results["kinds"].items():
        cells = (", ".join(f"{share:.1%}" for share in row["recalls"][kind]) for row in sides.values())
        lines.append(f"| {kind} | {count} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def speeds(row: Mapping[str, float]) -> str:
    return f"{row['per_second']:,.0f} | {row['median_ms']:.2f} | {row['p95_ms']:.2f}"


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    processor = next((line.partition(": ")[2] for line in lines if "model name" in line), platform.machine())
    libraries = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    return f"{os.cpu_count()} cores of {processor}, Python {platform.python_version()}, {libraries}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the passages and the questions are")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    files = sorted(file for file in args.folder.glob("*.jsonl*") if not file.name.startswith("questions"))
    [asked] = args.folder.glob("questions.jsonl*")
    every = read_questions(asked)
    chosen = [every[i * len(every) // ASKED] for i in range(min(ASKED, len(every)))]
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder)
        say("building")
        results: dict[str, Any] = {"machine": machine(), "built": apart(build, files, cache)}
        results["kinds"] = {**dict(sorted(Counter(q.path for q in chosen).items())), "all": len(chosen)}
        results["sides"] = {}
        for side in SIDES:
            say(side)
            results["sides"][side] = apart(ask, side, cache, chosen)
        say("over HTTP")
        results["served"] = over_http(files, cache, chosen)
    (args.out / "search.json").write_text(json.dumps(results, indent=1) + "\n")
    (args.out / "search.md").write_text(render(results))
    print(render(results))


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
