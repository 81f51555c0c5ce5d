"""`packloop bench run`: every cell of a matrix in a process of its own, one after the other, resumable at the next."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import packloop.bench.session as sessions
from packloop.bench.matrix import MatrixCell, read_matrix, select_cells
from packloop.bench.output import require_writable
from packloop.bench.results import Cell, load_cell, save_cell
from packloop.errors import InputError

# Exit codes of packloop.bench.cell, which imports too much to be imported here.
OUT_OF_MEMORY = 3
OTHER_CONDITIONS = 4
CELL_COMMAND = (sys.executable, "-P", "-m", "packloop.bench.cell")
# Attention that runs on a CUDA GPU only.
_GPU_ATTENTION = ("cudnn", "flash_attn", "varlen", "flash_attn_4", "document")
_KEPT_STATUSES = ("measured", "wrong", "out_of_memory")


def run_matrix(
    path: Path,
    output: Path,
    *,
    overrides: Sequence[str] = (),
    synthetic: str | None = None,
    tokenizer: str | None = None,
    steps: int | None = None,
    warmup: int | None = None,
    only: Sequence[str] = (),
    commit: str | None = None,
    command: Sequence[str] = CELL_COMMAND,
) -> bool:
    """Measures what is not measured yet in `output` and prints a line a cell, then a table; False where a cell failed.

    command: what starts a cell's process. InputError and ConfigError, before anything runs, for a matrix that cannot
    be; KeyboardInterrupt, with the cells so far written, when it is stopped.
    """
    require_writable(output)
    matrix = read_matrix(path, overrides, synthetic=synthetic, tokenizer=tokenizer, steps=steps, warmup=warmup)
    cells = select_cells(matrix, only)
    plan = sessions.make_plan(matrix, commit=commit)
    _check_gpu(cells)
    _check_tokenizers(cells, path, "--tokenizer" if tokenizer is not None else f"{path}: tokenizer")
    with sessions.opened(output, plan), _terminated_as_interrupted():
        runner = _Runner(output, plan, command)
        runner.say(
            f"{path.name}: {len(cells)} of {len(matrix.cells)} cells, {plan.warmup} + {plan.steps} steps each, "
            f"results in {output}"
        )
        try:
            runner.take_references([cell.name for cell in cells if not runner.is_done(cell.name)])
            results = [runner.cell(cell.name, f"[{n}/{len(cells)}]") for n, cell in enumerate(cells, start=1)]
        except KeyboardInterrupt:
            runner.say("stopped; the same command goes on at the cell that was being measured")
            raise
    print(table(results), flush=True)
    return all(result.status in ("measured", "out_of_memory") for result in results)


class _Runner:
    """Starts the processes of one session and turns what came of them into lines and results."""

    def __init__(self, directory: Path, plan: sessions.Plan, command: Sequence[str]):
        self._directory, self._plan, self._command = directory, plan, command
        self._failed_references: dict[str, str] = {}
        (directory / "logs").mkdir(exist_ok=True)

    def say(self, text: str) -> None:
        print(text, flush=True)

    def is_done(self, name: str) -> bool:
        """Whether an earlier run measured the cell. One that failed is tried again: its cause may be gone."""
        path = self._path(name)
        return path.exists() and load_cell(path).status in _KEPT_STATUSES

    def take_references(self, names: list[str]) -> None:
        """What the gates of these cells hold them to, where it is not there yet; a process a model."""
        missing: dict[tuple, list[str]] = {}
        for name in names:
            key = self._plan.cell(name).reference
            if key is not None and sessions.load_reference(self._directory, key) is None:
                planned = self._plan.references[key]
                keys = missing.setdefault((str(planned.config["model"]), planned.synthetic, planned.tokenizer), [])
                keys += [key] if key not in keys else []
        for number, keys in enumerate(missing.values(), start=1):
            start = time.monotonic()
            log = self._directory / "logs" / f"references-{number}.log"
            exit_code = self._start(["--references", *keys], log)
            seconds = time.monotonic() - start
            for key in keys:
                if sessions.load_reference(self._directory, key) is None:
                    self._failed_references[key] = _reason(log, exit_code)
            done = sum(key not in self._failed_references for key in keys)
            self.say(f"references of the loss gate: {done} of {len(keys)}, {seconds:.0f} s")

    def cell(self, name: str, place: str) -> Cell:
        """The cell's result, measured now unless it is there; its line is printed."""
        path = self._path(name)
        if self.is_done(name):
            result = load_cell(path)
            self.say(f"{place} {name}: {_line(result)} (from before)")
            return result
        start = time.monotonic()
        log = self._directory / "logs" / f"{name}.log"
        failed_reference = self._failed_references.get(self._plan.cell(name).reference)
        if failed_reference is not None:
            result = self._without_result(name, "failed", f"the loss gate has no reference: {failed_reference}")
        else:
            path.unlink(missing_ok=True)
            exit_code = self._start([name], log)
            if exit_code == 0 and path.exists():
                result = load_cell(path)
            else:
                status = "out_of_memory" if exit_code == OUT_OF_MEMORY else "failed"
                result = self._without_result(name, status, _reason(log, exit_code))
        self.say(f"{place} {name}: {_line(result)}, {time.monotonic() - start:.0f} s")
        return result

    def _path(self, name: str) -> Path:
        return self._directory / "cells" / f"{name}.json"

    def _start(self, arguments: list[str], log: Path) -> int:
        """Runs one process to its end and returns its exit code; it is ended with this one, however this one ends."""
        # The package beside this file, whether or not one is installed.
        root = str(Path(__file__).resolve().parents[2])
        search = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        with log.open("w", encoding="utf-8") as file:
            process = subprocess.Popen(
                [*self._command, str(self._directory), *arguments],
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=os.environ | {"PYTHONPATH": search},
            )
            try:
                exit_code = process.wait()
            finally:
                process.kill()
                process.wait()
                process.stdin.close()
        if exit_code == OTHER_CONDITIONS:
            raise InputError(_reason(log, exit_code))
        return exit_code

    def _without_result(self, name: str, status: str, reason: str) -> Cell:
        """Writes the row of a cell that could not be measured. InputError where not even its process could start."""
        conditions = sessions.load_conditions(self._directory)
        if conditions is None:
            raise InputError(f"the process of cell {name} cannot start: {reason}")
        planned = self._plan.cell(name)
        asked = sessions.described_config(planned.config, self._plan, planned)
        shape = planned.synthetic or planned.config["model"]["name_or_path"]
        result = Cell(
            name=name,
            session=sessions.session_of(self._directory),
            status=status,
            reason=reason,
            shape=Path(shape).name if Path(shape).is_absolute() else shape,
            settings=sessions.public(planned.settings),
            config=asked,
            asked=asked,
            conditions=conditions,
        )
        save_cell(self._directory, result)
        return result


def table(results: Sequence[Cell]) -> str:
    """One line a cell: rates, step, memory, utilisation, gate; no rate for steps that were wrong."""
    header = ("cell", "real tok/s", "slot", "label", "step ms", "spread", "GiB", "model", "hardware", "gate", "")
    rows = [header, *(_row(result) for result in results)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(row[1:-1], widths[1:-1]))]
        lines.append("  ".join([*cells, row[-1]]).rstrip())
    return "\n".join(["", *lines])


def _row(result: Cell) -> tuple[str, ...]:
    gate = result.loss_gate
    judged = "none" if gate is None else f"{gate.largest_difference:.0e}"
    if result.status != "measured":
        words = result.status.replace("_", " ")
        return (result.name, *("-" * 8), judged if gate else "-", f"{words}: {result.reason}")
    figures, memory, flops = result.figures, result.memory, result.flops
    spread = (figures.step_ms.q3 - figures.step_ms.q1) / figures.step_ms.median
    return (
        result.name,
        f"{figures.real_tokens_per_s.median:,.0f}",
        f"{figures.slot_tokens_per_s.median:,.0f}",
        f"{figures.label_tokens_per_s.median:,.0f}",
        f"{figures.step_ms.median:,.0f}",
        f"{spread:.1%}",
        f"{memory.peak_reserved_gib:.1f}" if memory else "-",
        f"{flops.model_utilisation:.1%}" if flops else "-",
        f"{flops.hardware_utilisation:.1%}" if flops else "-",
        judged,
        "",
    )


def _line(result: Cell) -> str:
    if result.status != "measured":
        return f"{result.status.replace('_', ' ')}: {result.reason}"
    rates, memory, gate = result.figures.real_tokens_per_s, result.memory, result.loss_gate
    parts = [f"{rates.median:,.0f} real tokens/s ({rates.q1:,.0f} to {rates.q3:,.0f})"]
    if memory:
        parts.append(f"{memory.peak_reserved_gib:.1f} GiB")
    parts.append("no gate" if gate is None else f"loss within {gate.largest_difference:.1g} of {gate.reference}")
    return ", ".join(parts)


def _reason(log: Path, exit_code: int) -> str:
    """Why a process failed, from its last words, in one line without paths."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    said = errors[-1] if errors else (lines[-1] if lines else "it said nothing")
    said = sessions.without_paths(said)
    if exit_code < 0:
        return f"ended by signal {-exit_code} ({signal.Signals(-exit_code).name}); last words: {said}"
    return said if errors else f"exit code {exit_code}; last words: {said}"


def _check_gpu(cells: Sequence[MatrixCell]) -> None:
    """InputError, before anything runs, where cells ask for what only a GPU has and there is none."""
    needy = [cell for cell in cells if cell.config.kernels.attention in _GPU_ATTENTION]
    if not needy:
        return
    import torch

    if not torch.cuda.is_available():
        names = ", ".join(cell.name for cell in needy)
        raise InputError(
            f"no CUDA GPU here, and kernels.attention={needy[0].config.kernels.attention} needs one (cells {names}); "
            "run where there is one, or name other cells with --only"
        )


def _check_tokenizers(cells: Sequence[MatrixCell], path: Path, of_all: str) -> None:
    """InputError, before anything runs, for one that a cell names and that cannot be loaded. of_all: who names it."""
    named = {}
    for cell in cells:
        if cell.tokenizer not in (None, "bundled"):
            its_own = "tokenizer" in cell.settings
            named.setdefault(cell.tokenizer, f"{path}: cell {cell.name}: tokenizer" if its_own else of_all)
    if not named:
        return
    from packloop.config import ModelConfig
    from packloop.engine.model import load_tokenizer

    for source, where in named.items():
        load_tokenizer(ModelConfig(name_or_path=source), named=where)


class _terminated_as_interrupted:
    """SIGTERM becomes KeyboardInterrupt, so that a stopped run ends its cell's process as Ctrl-C does."""

    def __enter__(self) -> None:
        def interrupt(_number, _frame):
            raise KeyboardInterrupt

        self._previous = signal.signal(signal.SIGTERM, interrupt)

    def __exit__(self, *_exception) -> None:
        signal.signal(signal.SIGTERM, self._previous)
