"""Side-by-side timings on SmolLM2-135M, as ratios; written to docs/results/benchmarks.md and .json.

On two quiet cores: update 5 minutes, kv 1.5, decode 2.5, grpo_step 6.5, each further peer of grpo_step 2 more, and
once some minutes to install TRL. grpo_step needs 16 GB of memory, the rest 8.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE.parent / "docs" / "results"
TRL = "1.16.0"
PEERS: dict[str, dict[str, Any]] = {  # GRPOConfig; all that is not said is TRL's default
    "fp32": {"bf16": False},
    "bf16": {"bf16": True},  # computes in bfloat16 over float32 weights, as treegym does where that is fast
    "bf16-weights": {"bf16": True, "model_init_kwargs": {"dtype": "bfloat16"}},
    "bf16-no-checkpointing": {"bf16": True, "gradient_checkpointing": False},
}
QUIET = {"TRL_EXPERIMENTAL_SILENCE": "1", "PYTHONWARNINGS": "ignore", "TRANSFORMERS_VERBOSITY": "error"}
Rounds = dict[str, list[dict[str, float]]]  # what each side measured, round by round
Command = list[str]


@dataclass(frozen=True)
class Row:
    """A line of the table: how a measured value of one side compares with another's."""

    name: str
    ratios: tuple[float, ...]  # one a round
    medians: str
    at_most: float | None = None
    at_least: float | None = None

    def __str__(self) -> str:
        ratio, target = median(self.ratios), "| |"
        if self.at_most:
            target = f"at most {self.at_most:.2f} | {'yes' if ratio <= self.at_most else '**no**'} |"
        if self.at_least:
            target = f"at least {self.at_least:.2f} | {'yes' if ratio >= self.at_least else '**no**'} |"
        spread = f"{min(self.ratios):.2f} to {max(self.ratios):.2f}"
        return f"| {self.name} | {ratio:.2f} ({spread}) | {target} {self.medians} |"


def compare(name: str, rounds: Rounds, key: str, unit: str, over: str, under: str, **target: float | None) -> Row:
    ratios = tuple(a[key] / b[key] for a, b in zip(rounds[over], rounds[under], strict=True))
    a, b = (f"{median(result[key] for result in rounds[side]):,.1f}".removesuffix(".0") for side in (over, under))
    return Row(f"{name}: {over} ÷ {under}", ratios, f"{a} and {b} {unit}", **target)


class Worker:
    """A side of a comparison in a process of its own, so that its peak memory is its own; measures when told to.

    This process imports nothing large, for a child's peak begins at its parent's.
    """

    def __init__(self, command: Command, threads: int) -> None:
        env = {**os.environ, **QUIET, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        self._command = command
        self._process = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._read()  # it is ready

    def measure(self, request: Mapping[str, Any]) -> dict[str, float]:
        assert self._process.stdin
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        self._process.communicate()  # ends with its input

    def _read(self) -> dict[str, float]:
        assert self._process.stdout
        if not (line := self._process.stdout.readline()):
            raise SystemExit(f"{' '.join(self._command)} ended with {self._process.wait()}; see above")
        result: dict[str, float] = json.loads(line)
        return result


@dataclass
class Bench:
    """What the parts share, and all that was measured."""

    model: str  # folder
    dtype: str  # that treegym computes in on this processor
    threads: int
    repeats: int | None
    peers: list[str]
    trl_python: str
    measured: dict[str, Rounds] = field(default_factory=dict)

    def side(self, script: str, python: str = sys.executable, **settings: Any) -> Command:
        return [python, str(HERE / script), json.dumps({"model": self.model, **settings})]

    def run(
        self, name: str, sides: Mapping[str, Command], *, repeats: int = 3, requests: tuple[dict[str, Any], ...] = ({},)
    ) -> list[Rounds]:
        """The rounds of each request; in a round the sides take turns."""
        found: list[Rounds] = []
        with ExitStack() as stack:
            workers = {side: Worker(command, self.threads) for side, command in sides.items()}
            for worker in workers.values():
                stack.callback(worker.close)
            for request in requests:
                label = " ".join([name, *(f"{key}={value}" for key, value in request.items())])
                found.append(self.measured.setdefault(label, {side: [] for side in sides}))
                for i in range(self.repeats or repeats):
                    for side, worker in workers.items():
                        found[-1][side].append(worker.measure(request))
                        print(f"{label}, round {i + 1}, {side}: {found[-1][side][-1]}", file=sys.stderr, flush=True)
        return found


def update(bench: Bench) -> list[Row]:
    """An optimiser step on eight rollouts, packed as a tree or written out one by one, in one pass through the same
    Learner. Chains share their prompt; the binary tree forks before its first, second and third turn. The target is
    1.10 times the ratio of the tokens. Work is what must be multiplied: logits and attention are shared less than
    tokens, for more of a tree's tokens are sampled ones, and they lie deeper. What is timed follows the same,
    untimed."""
    rows = []
    layouts = ("unpacked", "chains", "tree")
    for dtype in dict.fromkeys((bench.dtype, "float32")):
        sides = {layout: bench.side("update.py", dtype=dtype, layout=layout) for layout in layouts}
        rounds = bench.run(f"update {dtype}", sides)[0]
        for layout in layouts[1:]:
            tokens = compare(f"{dtype} tokens", rounds, "tokens", "tokens", layout, "unpacked")
            bound = 1.10 * tokens.ratios[0]
            rows += [tokens, compare(f"{dtype} work", rounds, "work", "10¹²", layout, "unpacked")]
            rows.append(compare(f"{dtype} time", rounds, "seconds", "s", layout, "unpacked", at_most=bound))
            rows.append(compare(f"{dtype} peak memory", rounds, "peak", "GB", layout, "unpacked"))
    return rows


def kv(bench: Bench) -> list[Row]:
    """A rollout of 2 prompts, 4 rollouts each, with keys and values kept across turns and shared by the group, or with
    every turn's tokens given to the same sampler anew."""
    keep = {"kept": True, "again": False}
    rounds = bench.run("kv", {side: bench.side("grpo_step.py", update=False, keep=keep[side]) for side in keep})[0]
    time = compare("rollout time", rounds, "rollout", "s", "kept", "again")
    return [time, compare("prefilled tokens", rounds, "prefilled", "tokens", "kept", "again")]


def decode(bench: Bench) -> list[Row]:
    """Sampled tokens per second after prompts of 271 tokens, the prompts' own time left out: TransformersPolicy and
    transformers' generate (sdpa, the whole distribution, no early stop), both with weights of the same dtype."""
    sides = {engine: bench.side("decode.py", engine=engine) for engine in ("treegym", "generate")}
    found = bench.run("decode", sides, requests=tuple({"rows": rows} for rows in (1, 8, 32)))
    return [
        compare(f"batch of {rows}", rounds, "speed", "tokens/s", "treegym", "generate", at_least=target)
        for (rows, target), rounds in zip(((1, None), (8, 3.0), (32, None)), found, strict=True)
    ]


def grpo_step(bench: Bench) -> list[Row]:
    """A whole step (rollout, update, weights back to the sampler) of treegym and of TRL's GRPOTrainer with
    environment_factory: 2 prompts, 4 rollouts each, 4 turns of 32 sampled tokens, 3 tool results, 3,864 tokens in all
    (3,840 in TRL, which leaves the end of a forced turn out). treegym computes in bfloat16 over float32 weights, as TRL
    bf16 does, or in float32 where the processor does not multiply bfloat16. Forced on both sides: every turn has 32
    tokens and counts as a tool call; template, texts and a reward that differs between rollouts are the same. All else
    in TRL is its default, gradient checkpointing included."""
    sides = {f"TRL {peer}": bench.side("trl_step.py", bench.trl_python, **PEERS[peer]) for peer in bench.peers}
    rounds = bench.run("grpo_step", {"treegym": bench.side("grpo_step.py"), **sides}, repeats=2)[0]
    rows = []
    for peer in sides:
        target = {"TRL fp32": 5.0, "TRL bf16": 4.0}.get(peer)
        rows.append(compare("whole step", rounds, "seconds", "s", peer, "treegym", at_least=target))
        for key, unit in (("rollout", "s"), ("update", "s"), ("prefilled", "tokens")):
            rows.append(compare(key, rounds, key, unit, peer, "treegym"))
        rows.append(compare("peak memory", rounds, "peak", "GB", "treegym", peer, at_most=0.45 if target else None))
    return rows


PARTS: dict[str, Callable[[Bench], list[Row]]] = {"update": update, "kv": kv, "decode": decode, "grpo_step": grpo_step}


def install_trl(folder: Path) -> str:
    """The interpreter of a virtual environment with TRL and with the torch and transformers that are here."""
    python, done = folder / "bin" / "python", folder / f".trl-{TRL}"
    if not done.exists():
        torch, transformers = (f"{name}=={version(name).partition('+')[0]}" for name in ("torch", "transformers"))
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        for names in ([torch], [f"trl=={TRL}", transformers]):
            subprocess.run([python, "-m", "pip", "install", "--quiet", *names], check=True)
        done.touch()
    return str(python)


def machine(threads: int, dtype: str) -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    processor = next((line.partition(": ")[2] for line in lines if "model name" in line), platform.machine())
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    return f"{dtype} on {threads} threads of {processor}, Python {platform.python_version()}, {libraries}, TRL {TRL}"


def render(results: Mapping[str, Any]) -> str:
    """The table as Markdown."""
    lines = [
        "# Benchmarks",
        "",
        "Made by `python benchmarks/run.py` on SmolLM2-135M. The sides of a comparison took turns in one run; a ratio",
        "is the median of its rounds, with the lowest and the highest. Peak memory is that of a whole process.",
    ]
    for part in (part for part in PARTS if part in results):
        lines += ["", f"## {part}", "", inspect.getdoc(PARTS[part]) or "", "", f"{results[part]['machine']}.", ""]
        lines += ["| | ratio | target | met | medians |", "|---|---|---|---|---|"]
        lines += [str(Row(**row)) for row in results[part]["rows"]]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"some of {', '.join(PARTS)}; default: all")
    parser.add_argument("--quick", action="store_true", help="two layers, one round, results in a temporary folder")
    parser.add_argument("--repeats", type=int, help="rounds of every comparison (default: 3, of grpo_step 2)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: one a core")
    parser.add_argument("--peers", nargs="+", choices=PEERS, help="settings of TRL (default: fp32, and bf16 if native)")
    parser.add_argument("--trl-venv", type=Path, default=HERE.parent / ".venv-trl", help="made where there is none")
    args = parser.parse_args()
    if unknown := set(args.parts) - PARTS.keys():
        parser.error(f"no part {', '.join(unknown)}; parts: {', '.join(PARTS)}")
    parts = args.parts or list(PARTS)
    out = Path(tempfile.mkdtemp(prefix="treegym-benchmarks-")) if args.quick else RESULTS
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(HERE / "model.py"), *([str(out / "model")] if args.quick else [])]
    side = json.loads(subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout)
    peers = args.peers or ["fp32", "bf16"][: 1 + (side["dtype"] == "bfloat16")]
    trl_python = install_trl(args.trl_venv) if "grpo_step" in parts else ""
    found = out / "benchmarks.json"
    results: dict[str, Any] = json.loads(found.read_text()) if found.exists() else {}  # parts not run now stay
    for part in parts:
        bench = Bench(
            **side, threads=args.threads, repeats=args.repeats or args.quick or None, peers=peers, trl_python=trl_python
        )
        rows = [asdict(row) for row in PARTS[part](bench)]
        results[part] = {"machine": machine(args.threads, side["dtype"]), "rows": rows, "measured": bench.measured}
        found.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
        (out / "benchmarks.md").write_text(render(results))
    print(render(results), f"in {out}", sep="\n")


if __name__ == "__main__":
    main()
