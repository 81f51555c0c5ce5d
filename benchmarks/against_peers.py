"""packloop and another package on the same job, in turns: ours, theirs, theirs, ours.

python benchmarks/against_peers.py CASE --work DIR --tokenizer DIR --data FILE --output JSON

Each turn is a process of its own that loads its model, warms up and times its steps; --work holds the checkpoint that
the peers load, written once, and the logs. `--dry-run tiny` goes through the same motions on a CPU with a model of no
use, to try the chain where there is no GPU; what cannot run there becomes a row that says so.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
OURS = "benchmarks.peers.ours"
PEERS = {"trl": "benchmarks.peers.trl_sft", "unsloth": "benchmarks.peers.unsloth_sft"}
_QV = "--targets qv --dropout 0.1"
_ALL = "--targets all-linear --dropout 0"
_LIGER = "--liger --attention flash_attention_2"


@dataclass(frozen=True)
class Case:
    """One comparison. peers: name -> options, the default first; extras: further runs of ours, each once."""

    ours: str
    peers: dict[str, str]
    bound: float
    extras: dict[str, str] = field(default_factory=dict)


CASES = {
    "tutorial-eager": Case(
        ours=f"{_QV} --batch 8",
        peers={"trl": f"{_QV} --batch 4 --packing wrapped --attention eager --checkpointing"},
        bound=3.7,
        extras={
            "at the peer's batch": f"{_QV} --batch 4",
            "eager": f"{_QV} --batch 4 --packing wrapped --attention eager --stock --recompute-layers all",
        },
    ),
    "qv-liger": Case(
        ours=f"{_QV} --batch 8",
        peers={
            "trl": f"{_QV} --batch 4 {_LIGER} --no-checkpointing",
            "unsloth": f"{_QV} --batch 4 --no-checkpointing",
        },
        bound=1.2,
    ),
    "all-linear-unsloth": Case(
        ours=f"{_ALL} --batch 8",
        peers={
            "unsloth": f"{_ALL} --batch 4 --no-checkpointing",
            "trl": f"{_ALL} --batch 4 {_LIGER} --no-checkpointing",
        },
        bound=1.2,
    ),
    "cap22-qv": Case(
        ours=f"{_QV} --batch 2 --memory-cap-gib 22",
        peers={
            "trl": f"{_QV} --batch 2 {_LIGER} --no-checkpointing --memory-cap-gib 22",
            "unsloth": f"{_QV} --batch 2 --no-checkpointing --memory-cap-gib 22",
        },
        bound=1.15,
    ),
    "cap22-all-linear": Case(
        ours=f"{_ALL} --batch 2 --memory-cap-gib 22",
        peers={
            "unsloth": f"{_ALL} --batch 2 --no-checkpointing --memory-cap-gib 22",
            "trl": f"{_ALL} --batch 6 {_LIGER} --checkpointing --memory-cap-gib 22",
        },
        bound=1.15,
    ),
}
# What a dry run changes: later options win over earlier ones.
_DRY_SHARED = "--length 64 --batch 1 --steps 1 --warmup 1"
_DRY_TRL = "--attention sdpa"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--work", type=Path, required=True, help="directory for the checkpoint and the logs")
    parser.add_argument("--tokenizer", type=Path, required=True, help="directory")
    parser.add_argument("--data", type=Path, required=True, help="JSON rows with the fields instruction and output")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--shape", default="llama2-7b")
    parser.add_argument("--peer", choices=PEERS, help="the case's other peer than its first")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each process, after 3 to warm up")
    parser.add_argument("--ours-args", default="", help="options put after the case's own for packloop")
    parser.add_argument("--peer-args", default="", help="options put after the case's own for the peer")
    parser.add_argument("--turns", default="ABBA", help="A is packloop, B the peer")
    parser.add_argument("--floor", action="store_true", help="packloop's runs time the floor of each step too")
    parser.add_argument("--no-extras", action="store_true", help="only the turns")
    parser.add_argument("--timeout-s", type=float, default=240, help="for each process")
    parser.add_argument("--dry-run", choices=("tiny",))
    arguments = parser.parse_args(argv)
    peers = CASES[arguments.case].peers
    if set(arguments.turns) - set("AB"):
        parser.error(f"--turns {arguments.turns}: a word of the letters A and B is needed")
    if arguments.peer and arguments.peer not in peers:
        parser.error(f"{arguments.case} has no options for {arguments.peer}; it has {', '.join(peers)}")
    return arguments


class Comparison:
    def __init__(self, arguments: argparse.Namespace):
        self.arguments, self.case = arguments, CASES[arguments.case]
        self.peer = arguments.peer or next(iter(self.case.peers))
        self.is_dry = arguments.dry_run is not None
        self.shape = arguments.dry_run or arguments.shape
        self.checkpoint = arguments.work.resolve() / f"checkpoint-{self.shape}"
        self.rows: list[dict[str, Any]] = []

    def run(self) -> dict[str, Any]:
        """Every turn, in order; returns what is written as JSON."""
        (self.arguments.work / "logs").mkdir(parents=True, exist_ok=True)
        for turn in self.arguments.turns:
            self._turn(turn, self._ours(self.case.ours) if turn == "A" else self._theirs())
        for name, options in {} if self.arguments.no_extras else self.case.extras.items():
            self._turn(f"ours, {name}", self._ours(options))
        return {
            "case": self.arguments.case,
            "shape": self.shape,
            "bound": self.case.bound,
            **ratios(self.rows),
            "rows": self.rows,
        }

    def _ours(self, options: str) -> list[str]:
        command = [OURS, *self._shared(options), "--shape", self.shape]
        command += ["--tokenizer", str(self.arguments.tokenizer.resolve())]
        return [*command, *["--floor"] * self.arguments.floor, *shlex.split(self.arguments.ours_args)]

    def _theirs(self) -> list[str]:
        command = [PEERS[self.peer], *self._shared(self.case.peers[self.peer]), "--model", str(self.checkpoint)]
        if self.is_dry and self.peer == "trl":
            command = [word for word in command if word != "--liger"] + shlex.split(_DRY_TRL)
        return [*command, *shlex.split(self.arguments.peer_args)]

    def _shared(self, options: str) -> list[str]:
        words = [*shlex.split(options), "--data", str(self.arguments.data.resolve())]
        return words + (shlex.split(_DRY_SHARED) if self.is_dry else ["--steps", str(self.arguments.steps)])

    def _turn(self, turn: str, command: list[str]) -> None:
        reason = self._why_not(command[0])
        if reason is None and command[0] != OURS and not self.checkpoint.exists():
            self._write_checkpoint()
        row = {"skipped": reason} if reason else self._process(turn, command)
        self.rows.append({"turn": turn, "who": self._name(command[0]), **row})
        print(describe(self.rows[-1]), flush=True)

    def _why_not(self, module: str) -> str | None:
        package = next((name for name, known in PEERS.items() if known == module), None)
        if package == "unsloth" and self.is_dry:
            return "Unsloth needs a GPU"
        if package and importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
        return None

    def _name(self, module: str) -> str:
        return "packloop" if module == OURS else self.peer

    def _write_checkpoint(self) -> None:
        partial = self.checkpoint.with_name(self.checkpoint.name + ".partial")
        command = ["benchmarks.peers.shapes", self.shape, str(partial)]
        self._python(
            [*command, "--tokenizer", str(self.arguments.tokenizer.resolve())], "checkpoint"
        ).check_returncode()
        partial.rename(self.checkpoint)

    def _process(self, turn: str, command: list[str]) -> dict[str, Any]:
        start = time.perf_counter()
        try:
            done = self._python(command, f"{len(self.rows)}-{turn}-{self._name(command[0])}")
        except subprocess.TimeoutExpired:
            return {"failed": f"no row within {self.arguments.timeout_s:.0f} s"}
        row = find_row(done.stdout)
        if row is None:
            return {"failed": "\n".join(done.stdout.splitlines()[-15:])}
        return {**row, "wall_s": round(time.perf_counter() - start, 1)}

    def _python(self, command: list[str], log: str) -> subprocess.CompletedProcess:
        """Runs a module with this Python, in the work directory, where Unsloth leaves what it compiles."""
        paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        if self.is_dry:  # TRL's head is a Triton kernel, which a CPU can only interpret
            environment |= {"TRITON_INTERPRET": "1"} if command[0] == PEERS["trl"] else {}
        done = subprocess.run(
            [sys.executable, "-m", *command],
            cwd=self.arguments.work,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=self.arguments.timeout_s,
        )
        name = "".join(letter if letter.isalnum() or letter == "-" else "_" for letter in log)
        (self.arguments.work / "logs" / f"{name}.log").write_text(done.stdout, encoding="utf-8")
        return done


def find_row(output: str) -> dict[str, Any] | None:
    """The last row in a process's output, or None where it printed none."""
    lines = [line for line in output.splitlines() if line.startswith('{"who"')]
    return json.loads(lines[-1]) if lines else None


def ratios(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Ours over theirs in real tokens a second: of the turns' means, and the range over single turns.

    Further runs of ours are set against the peer's mean. Nothing where either side has no rate.
    """

    def rates(turn: str) -> list[float]:
        return [
            row["real_tokens_per_s"]["median"] for row in rows if row["turn"] == turn and "real_tokens_per_s" in row
        ]

    ours, theirs = rates("A"), rates("B")
    if not ours or not theirs:
        return {"ratio": None}
    mean = sum(theirs) / len(theirs)
    extras = {
        row["turn"]: row["real_tokens_per_s"]["median"] / mean for row in rows if row["turn"].startswith("ours, ")
    }
    return {
        "ratio": sum(ours) / len(ours) / mean,
        "ratio_range": [min(ours) / max(theirs), max(ours) / min(theirs)],
        "extra_ratios": extras,
    }


def describe(row: dict[str, Any]) -> str:
    """One line of the table."""
    head = f"{row['turn']:<26}{row['who']:<14}"
    for why in ("skipped", "failed"):
        if why in row:
            return f"{head}{why}: {row[why]}"
    if row.get("out_of_memory"):
        return f"{head}out of memory: {row['reason']}"
    rate = row["real_tokens_per_s"]
    settings = row["settings"]
    shown = f"{rate['median']:>9,.0f} real tokens/s ({rate['min']:,.0f} to {rate['max']:,.0f})"
    shown += f", {row['step_ms']['median']:,.0f} ms"
    shown += f", batch {settings['batch']}, {settings['packing']}"
    if "peak_counted_gib" in row:
        shown += f", {row['peak_counted_gib']:.1f} GiB"
    if "fraction_of_floor" in row:
        shown += f", {row['fraction_of_floor']:.3f} of the floor"
    return head + shown + f", start {row['seconds_to_start']:.0f} s"


def main(argv: list[str] | None = None) -> dict[str, Any]:
    arguments = parse(argv)
    result = Comparison(arguments).run()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if result["ratio"] is None:
        print("no ratio: one side has no figure")
    else:
        low, high = result["ratio_range"]
        print(f"ratio {result['ratio']:.3f} ({low:.3f} to {high:.3f}); bound {result['bound']}")
        for turn, ratio in result["extra_ratios"].items():
            print(f"{turn}: {ratio:.3f}")
    for side in sorted(set(arguments.turns)):
        row = next(row for row in result["rows"] if row["turn"] == side)
        print(side, row["who"], json.dumps({**row.get("settings", {}), **row.get("chosen", {})}))
    return result


if __name__ == "__main__":
    main()
