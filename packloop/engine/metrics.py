"""Counters in, metrics.jsonl, the console and trackers out."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from packloop.engine.checkpoint import disk_errors


class MetricsFile:
    """RUN/metrics.jsonl: one JSON object a line, written a line at a time; only the main process writes.

    InputError where the disk refuses.
    """

    def __init__(self, path: Path, *, enabled: bool, resume_step: int = 0):
        self._path, self._file = path, None
        if not enabled:
            return
        with disk_errors(path):
            if path.exists():
                _keep_until(path, resume_step)
            self._file = path.open("ab", buffering=0)  # nothing is left to be written when it is closed

    def write(self, values: dict) -> None:
        if not self._file:
            return
        line = json.dumps(values).encode("utf-8") + b"\n"
        with disk_errors(self._path, needed=len(line)):
            while line:
                line = line[self._file.write(line) :]

    def close(self) -> None:
        if self._file:
            self._file.close()


def _keep_until(path: Path, step: int) -> None:
    """Drops what was logged after `step`: the steps that a resumed run takes again."""
    lines = path.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if _step_of(line) <= step]
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    temporary.replace(path)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):  # a line cut short by a crash
        return float("inf")


class StepClock:
    """Wall time between optimizer steps. Needs no synchronisation of its own: a step ends in a host read."""

    def __init__(self):
        self._last = time.perf_counter()

    def restart(self) -> None:
        self._last = time.perf_counter()

    def lap_ms(self) -> float:
        now = time.perf_counter()
        elapsed, self._last = now - self._last, now
        return elapsed * 1e3


def reset_peak(device: torch.device) -> None:
    """Begins `peak_gib` anew: what was allocated before, to plan for memory, say, is none of the steps'."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_gib(device: torch.device) -> float | None:
    """Peak memory that torch has allocated on the CUDA device since `reset_peak`, in GiB; None elsewhere.

    Neither what torch reserves beyond that nor paged optimizer state is part of it.
    """
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None


class StepConsole:
    """A progress bar on a terminal, a plain line every `every` steps otherwise."""

    def __init__(self, *, num_steps: int, first_step: int, every: int, enabled: bool):
        self.console = Console(quiet=not enabled)
        self.every, self.num_steps = every, num_steps
        self._started, self._first_step = time.perf_counter(), first_step
        self._progress = None
        if enabled and sys.stdout.isatty():
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._task = self._progress.add_task("training", total=num_steps, completed=first_step)
            self._progress.start()

    def step(self, values: dict, *, due: bool) -> None:
        if self._progress:
            self._progress.update(self._task, completed=values["step"], description=_describe(values))
        elif due:
            done = values["step"] - self._first_step
            remaining = (time.perf_counter() - self._started) / done * (self.num_steps - values["step"])
            self.say(f"step {values['step']}/{self.num_steps}  {_describe(values)}  {_duration(remaining)} left")

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)

    def close(self) -> None:
        if self._progress:
            self._progress.stop()


def _describe(values: dict) -> str:
    memory = f"  {values['peak_gib']:.1f} GiB" if values["peak_gib"] is not None else ""
    return (
        f"loss {values['loss']:.4f}  lr {values['learning_rate']:.2e}  grad {values['grad_norm']:.2f}  "
        f"{values['real_tokens_per_s']:,.0f} tokens/s{memory}"
    )


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
