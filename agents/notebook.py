"""Trees and runs in a notebook: what they show of themselves, and their episodes as a table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from .store import Run
    from .tree import RolloutTree

SHOWN = 32  # rollouts of a tree that are shown
CHARS = 4_000  # of a message that are shown
_TEXT = "white-space:pre-wrap;overflow-wrap:anywhere;margin:0 0 .6em 1em"


def tree_html(tree: RolloutTree) -> str:
    """The tree as HTML: the prompt, and each rollout with its return, to be opened."""
    task = tree.task
    title = f"{task.env}, seed {task.seed}: {_count(len(tree.leaves), 'rollout')}, {_count(len(tree.nodes), 'turn')}"
    rollouts = [_rollout(tree, number) for number in range(min(SHOWN, len(tree.leaves)))]
    if more := len(tree.leaves) - SHOWN:
        rollouts += [f"<p>and {more} more</p>"] if more > 0 else []
    prompt = _details("prompt", "".join(_said(message.role, message.text) for message in tree.messages))
    return f"<div><b>{escape(title)}</b>{prompt}{''.join(rollouts)}</div>"


def _rollout(tree: RolloutTree, number: int) -> str:
    path = tree.paths[number]
    end = tree.nodes[path[-1]]
    why = "answered" if end.terminated else str(end.info.get("cause", "not ended"))
    said = []
    for node in (tree.nodes[i] for i in path):
        said += [
            _said("assistant", node.action.text),
            *(_said(message.role, message.text) for message in node.messages),
        ]
    title = f"rollout {number}: return {tree.returns[number]:.2f}, {_count(len(path), 'turn')}, {why}"
    return _details(title, "".join(said))


def conversation(tree: RolloutTree, rollout: int) -> str:
    """A rollout as text, from the prompt on; each message below its role."""
    said = [(message.role, message.text) for message in tree.messages]
    for node in (tree.nodes[i] for i in tree.paths[rollout]):
        said += [("assistant", node.action.text), *((message.role, message.text) for message in node.messages)]
    return "\n".join(f"[{role}]\n{text}" for role, text in said)


def run_html(run: Run) -> str:
    """The run as HTML: success by stage with its interval, and how many trees there are."""
    summary = run.summary()
    stages: Mapping[str, Any] = (summary or {}).get("stages", {})
    rows = [(name, stage["tasks"], *(f"{stage['success'][key]:.1%}" for key in ("mean", "low", "high")))
            for name, stage in stages.items()]  # fmt: skip
    state = "finished" if summary else "not finished"
    table = _table(("", "tasks", "success", "from", "to"), rows) if rows else ""
    return f"<div><b>{escape(str(run.path))}</b>, {state}, {_count(len(run.trees), 'tree')}{table}</div>"


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    cells = [f"<tr>{''.join(f'<td>{escape(str(cell))}</td>' for cell in row)}</tr>" for row in rows]
    return f"<table><tr>{''.join(f'<th>{name}</th>' for name in head)}</tr>{''.join(cells)}</table>"


def _details(title: str, inside: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{inside}</details>"


def _said(role: str, text: str) -> str:
    more = f"\n[{len(text) - CHARS} more characters]" if len(text) > CHARS else ""
    return f'<div><i>{escape(role)}</i><div style="{_TEXT}">{escape(text[:CHARS] + more)}</div></div>'


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def frame(run: Run, kind: Literal["pandas", "polars"] = "pandas") -> Any:
    """The run's rollouts as a table of pandas or polars, a row for each.

    Columns: `tree`, `rollout`, the tree's labels (`stage`, `step`, …), `env`, `seed`, `turns`, `return`,
    `sampled_tokens`, `tool_calls`, `terminated`, `cause` (of a truncation), and a column for each reward term.
    ImportError where the library is not installed.
    """
    rows = [row for number, (labels, tree) in enumerate(run.trees) for row in _rows(number, labels, tree)]
    if kind == "polars":
        import polars

        return polars.DataFrame(rows, infer_schema_length=None)
    import pandas

    return pandas.DataFrame(rows)


def _rows(number: int, labels: Mapping[str, Any], tree: RolloutTree) -> Iterator[dict[str, Any]]:
    names = sorted({name for node in tree.nodes for name in node.reward_terms})
    terms = {name: tree.term(name) for name in names}
    plain = {name: value for name, value in labels.items() if isinstance(value, str | int | float)}
    for rollout, path in enumerate(tree.paths):
        nodes = [tree.nodes[i] for i in path]
        yield {
            "tree": number,
            "rollout": rollout,
            **plain,
            "env": tree.task.env,
            "seed": str(tree.task.seed),  # seeds may have more than 64 bits
            "turns": len(path),
            "return": tree.returns[rollout],
            "sampled_tokens": sum(len(node.action.token_ids) for node in nodes),
            "tool_calls": sum(len(node.calls) for node in nodes),
            "terminated": nodes[-1].terminated,
            "cause": nodes[-1].info.get("cause") if nodes[-1].truncated else None,
            **{name: terms[name][rollout] for name in names},
        }
