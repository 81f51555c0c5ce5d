"""packloop and another package on the same job, in turns: ours, theirs, theirs, ours.

python benchmarks/against_peers.py CASE... --work DIR --tokenizer DIR --data FILE --output-dir DIR

Each side is one process that loads its model once; while one trains, the other waits with little more than its weights
on the GPU. A case leaves CASE.json and, for `packloop bench report`, the directory CASE. `--sweep 2,4,8` tries batches
instead of taking turns, to find each side's best. --work holds the checkpoint that the peers load, written once, and
the logs. `--dry-run tiny` goes through the same motions on a CPU with a model of no use, to try the chain where there
is no GPU; what cannot run there becomes a row that says so.
"""

from __future__ import annotations

import argparse
import datetime
import fcntl
import importlib.util
import json
import shlex
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.peers.cases import CASES, OURS, PEERS
from benchmarks.peers.process import AbsentProcess, LiveProcess, environment
from benchmarks.peers.protocol import is_measured, read_row
from benchmarks.peers.summary import describe, judge, table
from benchmarks.peers.sweep import best_batches

# What a dry run changes: later options win over earlier ones.
_DRY_SHARED = "--length 64 --batch 1 --steps 1 --warmup 1"
_DRY_TRL = "--attention sdpa"
# A peer's side in a sweep that does otherwise than its case, and the option by which it does.
_OTHERWISE = {", recomputing": "--checkpointing", ", not recomputing": "--no-checkpointing"}
_REHEARSAL = "rehearsal"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", choices=CASES, nargs="+", metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--work", type=Path, required=True, help="directory for the checkpoint and the logs")
    parser.add_argument("--tokenizer", type=Path, required=True, help="directory")
    parser.add_argument("--data", type=Path, required=True, help="JSON rows with the fields instruction and output")
    parser.add_argument("--output-dir", type=Path, required=True, help="directory for the results")
    parser.add_argument("--shape", default="llama2-7b")
    parser.add_argument("--peer", choices=PEERS, help="another peer of the case than its first")
    parser.add_argument("--steps", type=int, help="timed steps of a turn, default 10, of a batch in a sweep 4")
    parser.add_argument("--warmup", type=int, help="steps before them, default 3, in a sweep 2")
    parser.add_argument("--ours-args", default="", help="options put after the case's own for packloop")
    parser.add_argument("--peer-args", default="", help="options put after the case's own for the peer")
    parser.add_argument("--turns", default="ABBA", help="A is packloop, B the peer")
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="before the peer's first turn at a batch one that does not count, as its kernels may be compiled by size",
    )
    parser.add_argument("--floor", action="store_true", help="packloop's turns A time the floor of each step too")
    parser.add_argument("--no-extras", action="store_true", help="only the turns")
    parser.add_argument(
        "--peer-batch-too",
        type=_batches,
        default=[],
        metavar="B,B,...",
        help="last, shorter turns of the peer at these batches",
    )
    parser.add_argument("--sweep", type=_batches, metavar="B,B,...", help="try these batches instead of taking turns")
    parser.add_argument("--sweep-side", choices=("A", "B"), help="only this side; default both")
    parser.add_argument(
        "--checkpointing-too", action="store_true", help="in a sweep, the peer with and without recomputation"
    )
    parser.add_argument("--timeout-s", type=float, default=240, help="for each side's start and for each turn")
    parser.add_argument("--commit", help="of this source, where git cannot tell")
    parser.add_argument("--dry-run", choices=("tiny",))
    arguments = parser.parse_args(argv)
    if not arguments.turns or set(arguments.turns) - set("AB"):
        parser.error(f"--turns {arguments.turns}: a word of the letters A and B is needed")
    for case in arguments.cases:
        if arguments.peer and arguments.peer not in CASES[case].peers:
            parser.error(f"{case} has no options for {arguments.peer}; it has {', '.join(CASES[case].peers)}")
    return arguments


def _batches(text: str) -> list[int]:
    try:
        batches = [int(word) for word in text.split(",")]
    except ValueError:
        batches = []
    if not batches or min(batches) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: whole numbers of packs are needed, as in 2,4,8")
    return batches


class Comparison:
    """One case: its two sides, and the rows of their turns."""

    def __init__(self, name: str, arguments: argparse.Namespace):
        self.name, self.arguments, self.case = name, arguments, CASES[name]
        self.peer = arguments.peer or next(iter(self.case.peers))
        self.is_dry = arguments.dry_run is not None
        self.shape = arguments.dry_run or arguments.shape
        self.work = arguments.work.resolve()
        self.checkpoint = self.work / f"checkpoint-{self.shape}"
        self.session = f"{name} {datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M:%S}"
        self.rows: list[dict[str, Any]] = []

    def run(self) -> None:
        """Every turn, in order."""
        turns = self._sweep_turns() if self.arguments.sweep else self._turns()
        with ExitStack() as stack:
            sides: dict[str, LiveProcess | AbsentProcess] = {}
            for name in dict.fromkeys(side for _, side, _ in turns):
                side = sides[name] = self._side(name)
                stack.push(lambda error, *_, side=side: side.close(patience_s=0 if error else 15))
                side.start()
            # Nobody is timed while somebody else still loads.
            for side in sides.values():
                self._say_ready(side)
            for turn, side, options in turns:
                self._take(turn, sides[side], options)
        self._measure_ceilings()

    def result(self) -> dict[str, Any]:
        """What is written as JSON, of the rows that there are."""
        return {
            "case": self.name,
            "shape": self.shape,
            "session": self.session,
            "verdicts": [] if self.arguments.sweep else judge(self.case, self.rows),
            "rows": self.rows,
        }

    def _turns(self) -> list[tuple[str, str, list[str]]]:
        """(turn, side, options put after those that the side began with)."""
        of_a = ["--floor"] * self.arguments.floor
        turns = [(turn, turn, of_a if turn == "A" else []) for turn in self.arguments.turns]
        extras = () if self.arguments.no_extras else self.case.extras
        turns += [(name, "A", shlex.split(options)) for name, options in extras]
        for batch in self.arguments.peer_batch_too:
            turns.append((f"B at batch {batch}", "B", ["--batch", str(batch), "--steps", "4"]))
        return self._rehearsed(turns)

    def _sweep_turns(self) -> list[tuple[str, str, list[str]]]:
        sides = [self.arguments.sweep_side] if self.arguments.sweep_side else ["A", "B"]
        recomputes = "--checkpointing" in shlex.split(self.case.peers[self.peer])
        if "B" in sides and self.arguments.checkpointing_too:
            sides.append("B, not recomputing" if recomputes else "B, recomputing")
        turns = [(side, side, ["--batch", str(batch)]) for side in sides for batch in self.arguments.sweep]
        return self._rehearsed(turns)

    def _rehearsed(self, turns: list[tuple[str, str, list[str]]]) -> list[tuple[str, str, list[str]]]:
        """The turns, before the peer's first at each batch another like it, where that is asked for."""
        made, known = [], set()
        for turn, side, options in turns:
            if self.arguments.rehearse and side != "A" and (side, *options) not in known:
                known.add((side, *options))
                made.append((_REHEARSAL, side, options))
            made.append((turn, side, options))
        return made

    def _take(self, turn: str, side: LiveProcess | AbsentProcess, options: list[str]) -> None:
        row = side.turn(options)
        if turn == _REHEARSAL:
            print(describe({"turn": turn, **row}), flush=True)
            return
        if self.arguments.sweep:
            turn = side.who + turn.removeprefix("A").removeprefix("B")
            row["batch"] = int(options[-1])
        self.rows.append({"turn": turn, **row})
        print(describe(self.rows[-1]), flush=True)

    def _measure_ceilings(self) -> None:
        """Into every row that was measured: what the device can do at its size of micro-batch, now that all is over."""
        rows = [row for row in self.rows if is_measured(row)]
        slots = [row["settings"]["batch"] * row["settings"]["length"] for row in rows]
        if not rows:
            return
        words = ["benchmarks.peers.ceilings", self.shape, *map(str, sorted(set(slots)))]
        try:
            done = subprocess.run(
                [sys.executable, "-m", *words],
                env=environment(),
                text=True,
                capture_output=True,
                check=False,
                timeout=self.arguments.timeout_s,
            )
        except subprocess.TimeoutExpired as error:
            print(f"no ceilings: {error}", flush=True)
            return
        if done.returncode:
            print(f"no ceilings: {(done.stderr.strip().splitlines() or ['it said nothing'])[-1]}", flush=True)
            return
        found = [row for line in done.stdout.splitlines() if (row := read_row(line)) is not None]
        ceilings = {row["slots"]: row["ceilings"] for row in found}
        for row, size in zip(rows, slots, strict=True):
            row["ceilings"] = ceilings[size]

    def _say_ready(self, side: LiveProcess | AbsentProcess) -> None:
        ready = side.wait_ready()
        if is_measured(ready):
            print(f"{side.who} is ready after {ready['start_s']:.0f} s, holds {ready['held_gib']:.1f} GiB", flush=True)

    def _side(self, side: str) -> LiveProcess | AbsentProcess:
        if side == "A":
            words = [OURS, *self._shared(self.case.ours), "--shape", self.shape]
            words += ["--tokenizer", str(self.arguments.tokenizer.resolve())]
            return self._process("packloop", [*words, *shlex.split(self.arguments.ours_args)])
        words = [PEERS[self.peer], *self._shared(self.case.peers[self.peer]), "--model", str(self.checkpoint)]
        if self.is_dry and self.peer == "trl":
            words = [word for word in words if word != "--liger"] + shlex.split(_DRY_TRL)
        words += shlex.split(self.arguments.peer_args)
        who = {"trl": "TRL + Liger" if "--liger" in words else "TRL", "unsloth": "Unsloth"}[self.peer]
        if reason := self._why_not() or self._write_checkpoint():
            return AbsentProcess(who, reason)
        return self._process(who, words, side.removeprefix("B"))

    def _process(self, who: str, words: list[str], otherwise: str = "") -> LiveProcess:
        variables = environment()
        words += [_OTHERWISE[otherwise]] if otherwise else []
        if self.is_dry and words[0] == PEERS["trl"]:  # its head is a Triton kernel, which a CPU can only interpret
            variables["TRITON_INTERPRET"] = "1"
        name = f"{self.name}-{words[0].rpartition('.')[2]}" + otherwise.replace(", ", "-").replace(" ", "-")
        return LiveProcess(who, words, name=name, work=self.work, timeout_s=self.arguments.timeout_s, env=variables)

    def _shared(self, options: str) -> list[str]:
        words = [*shlex.split(options), "--data", str(self.arguments.data.resolve())]
        steps, warmup = (4, 2) if self.arguments.sweep else (10, 3)
        words += ["--steps", str(self.arguments.steps or steps), "--warmup", str(self.arguments.warmup or warmup)]
        words += ["--commit", self.arguments.commit] if self.arguments.commit else []
        return words + (shlex.split(_DRY_SHARED) if self.is_dry else [])

    def _why_not(self) -> str | None:
        if self.peer == "unsloth" and self.is_dry:
            return "Unsloth needs a GPU"
        if importlib.util.find_spec(self.peer) is None:
            return f"{self.peer} is not installed"
        return None

    def _write_checkpoint(self) -> str | None:
        """Unless it is there, or another driver on this machine is writing it; returns the reason if it fails."""
        self.work.mkdir(parents=True, exist_ok=True)
        with open(f"{self.checkpoint}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if self.checkpoint.exists():
                return None
            partial = self.checkpoint.with_name(self.checkpoint.name + ".partial")
            words = ["benchmarks.peers.shapes", self.shape, str(partial)]
            words += ["--tokenizer", str(self.arguments.tokenizer.resolve())]
            done = subprocess.run(
                [sys.executable, "-m", *words], env=environment(), text=True, capture_output=True, check=False
            )
            if done.returncode:
                return f"its checkpoint was not written: {done.stderr.strip().splitlines()[-1:]}"
            partial.rename(self.checkpoint)
        return None


def write(result: dict[str, Any], directory: Path, name: str) -> None:
    """NAME.json with every row, and the directory NAME with a cell a setting."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    from benchmarks.peers.cells import save_cells  # imports torch, for which neither a side nor the rows should wait

    save_cells(directory / name, result["rows"], session=result["session"], shape=result["shape"])


def _stop(*_: object) -> None:
    """As an exception, so that the sides end and the rows so far are kept: also where the signal comes twice."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit("stopped")


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    arguments = parse(argv)
    signal.signal(signal.SIGTERM, _stop)
    results = []
    for name in arguments.cases:
        comparison = Comparison(name, arguments)
        try:
            comparison.run()
        finally:
            result = comparison.result()
            write(result, arguments.output_dir, f"{name}-sweep" if arguments.sweep else name)
            results.append(result)
        if arguments.sweep:
            print(*best_batches(result["rows"]), sep="\n", flush=True)
            continue
        for side in sorted(set(arguments.turns)):
            row = next(row for row in result["rows"] if row["turn"] == side)
            print(side, row["who"], json.dumps({**row.get("settings", {}), **row.get("chosen", {})}), flush=True)
    if not arguments.sweep:
        print(table(results), flush=True)
    return results


if __name__ == "__main__":
    main()
