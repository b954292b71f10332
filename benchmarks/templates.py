"""How treegym reads chat templates: a table of the *.jinja files in a folder, such as trl's chat_templates.

    python benchmarks/templates.py FOLDER TOKENIZER

TOKENIZER is any tokenizer's directory; the special tokens that a template writes are added to it.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from treegym.agents import ChatRenderer

SPECIAL = re.compile(
    r"<[|\uff5c][^<>|\uff5c\s]+[|\uff5c]>|<\|?(?:turn|channel|tool_\w+)\|?>|</?(?:start|end)_of_\w+>|\[/?[A-Z_]{3,}\]|<sop>"
)


def tokenizer_for(template: str, folder: str) -> PreTrainedTokenizerBase:
    """The tokenizer of the folder with the template and its special tokens."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    known = sorted({*SPECIAL.findall(template), "<bos>", "<eos>"})
    tokenizer.add_special_tokens({"bos_token": "<bos>", "eos_token": "<eos>", "additional_special_tokens": known})
    tokenizer.chat_template = template
    return tokenizer


def row(name: str, template: str, folder: str) -> str:
    try:
        renderer = ChatRenderer(tokenizer_for(template, folder))
    except ValueError as error:
        return f"| {name} | refused | {str(error).partition(': ')[2]} |"
    end = renderer.tokenizer.convert_ids_to_tokens(renderer.end_of_turn)
    return f"| {name} | read | ends with `{end}`; {'; '.join(renderer.reading) or 'as it is'} |"


def main(folder: str, tokenizer: str) -> None:
    print("| template | | how |\n|---|---|---|")
    for file in sorted(Path(folder).glob("*.jinja")):
        print(row(file.stem, file.read_text(encoding="utf-8"), tokenizer))


if __name__ == "__main__":
    main(*sys.argv[1:])
