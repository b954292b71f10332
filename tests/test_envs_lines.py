"""Files of passages, questions and problems: what cannot be read is named with file and line."""

from __future__ import annotations

import gzip
import json
import lzma
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from treegym.envs import FactSearchEnv
from treegym.envs.factsearch.questions import read_passages, read_questions
from treegym.envs.math.problems import read_problems

ROWS = {
    read_passages: {"id": "a", "title": "Café", "text": "It is one."},
    read_questions: {"id": "a", "question": "Café?", "answers": ["yes"], "supporting": []},
    read_problems: {"id": "a", "problem": "Café?", "answer": "1"},
}
Read = Callable[[Path], Sequence[Any]]


def lines(read: Read, count: int) -> bytes:
    rows = [ROWS[read] | {"id": f"{i:03}"} for i in range(count)]  # type: ignore[index]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


@pytest.mark.parametrize("read", ROWS)
def test_a_line_that_is_not_utf8_is_named(read: Read, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(lines(read, 2) + lines(read, 1).decode().encode("latin-1"))
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 3: not UTF-8 \(byte 0xe9 at \d+.*iconv -f latin1"):
        read(file)


@pytest.mark.parametrize("read", ROWS)
@pytest.mark.parametrize(("ending", "compress"), [(".gz", gzip.compress), (".xz", lzma.compress)])
def test_a_cut_file_is_named_with_the_line(
    read: Read, ending: str, compress: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    file = tmp_path / f"rows.jsonl{ending}"
    whole = compress(lines(read, 500))
    file.write_bytes(whole)
    assert len(read(file)) == 500
    file.write_bytes(whole[:-8])
    with pytest.raises(ValueError, match=rf"rows\.jsonl{ending}, line \d+: the file is cut or damaged here"):
        read(file)
    file.write_bytes(b"plain")
    with pytest.raises(ValueError, match=rf"rows\.jsonl{ending}, line 1: the file is cut or damaged here"):
        read(file)


@pytest.mark.parametrize("read", ROWS)
def test_a_byte_order_mark_is_no_part_of_a_row(read: Read, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + lines(read, 2))
    assert [row.id for row in read(file)] == ["000", "001"]


@pytest.mark.parametrize("read", ROWS)
def test_an_id_that_stands_twice_is_named(read: Read, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(lines(read, 2) + lines(read, 1))
    with pytest.raises(ValueError, match=r"rows\.jsonl, (line|row) 3: the id '000' is also that of .*ids must differ"):
        read(file)


def test_an_id_that_stands_in_two_files_is_named(tmp_path: Path) -> None:
    files = [tmp_path / "one.jsonl", tmp_path / "two.jsonl"]
    for file in files:
        file.write_bytes(lines(read_passages, 1))
    with pytest.raises(ValueError, match=r"two\.jsonl, line 1: the id '000' is also that of .*one\.jsonl, line 1"):
        FactSearchEnv(files, tmp_path / "questions.jsonl")


def test_half_a_surrogate_pair_in_a_corpus_is_replaced(tmp_path: Path) -> None:
    corpus, questions = tmp_path / "corpus.jsonl", tmp_path / "questions.jsonl"
    corpus.write_text(json.dumps({"id": "\udc00", "title": "moss", "text": "a \ud83d plant"}))
    row = {"id": "q", "question": "moss \ud83d?", "answers": ["\udfff"], "supporting": ["\udc00"], "split": "train"}
    questions.write_text(json.dumps(row))
    env = FactSearchEnv(corpus, questions)
    observation, _ = env.reset(seed=0)
    found, *_ = env.step(env.write_call("search", query="moss"))
    assert observation.endswith("moss ??")
    assert found == "[1] moss: a ? plant"
    *_, info = env.step(env.write_answer("?"))
    assert info["reward_terms"]["exact"] == info["reward_terms"]["supported"] == 1.0
