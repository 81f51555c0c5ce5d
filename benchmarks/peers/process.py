"""The driver's end of a side: starts its process, asks it for turns, and turns whatever goes wrong into a row."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.peers.protocol import is_measured, read_row

REPOSITORY = Path(__file__).resolve().parents[2]
_LOG_LINES = 15


def environment() -> dict[str, str]:
    """Of a child that runs this repository's modules."""
    paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}


class LiveProcess:
    """One side. who: as rows name it until it has said so itself; words: its module and options.

    work: where it runs, and where Unsloth leaves what it compiles; its output goes to logs/ in there.
    """

    def __init__(self, who: str, words: list[str], *, name: str, work: Path, timeout_s: float, env: dict[str, str]):
        self.who = who
        self._words, self._name, self._work, self._timeout_s, self._env = words, name, work, timeout_s, env
        self._process: subprocess.Popen | None = None
        self._starts = 0
        self._is_ready = False
        self._failure: dict[str, Any] | None = None
        self._failed_turns = 0

    def start(self) -> None:
        """Lets it begin to load, without waiting for it."""
        self._starts += 1
        self._started = time.perf_counter()
        self._log = self._work / "logs" / f"{self._name}-{self._starts}.log"
        self._log.parent.mkdir(parents=True, exist_ok=True)
        self._lines: queue.Queue[str] = queue.Queue()
        self._is_ready = False
        ours, theirs = os.pipe()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", *self._words, "--rows-fd", str(theirs)],
                cwd=self._work,
                env=self._env,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=(theirs,),
                start_new_session=True,
            )
        os.close(theirs)
        threading.Thread(target=_forward, args=(ours, self._lines), daemon=True).start()

    def wait_ready(self) -> dict[str, Any]:
        """What it says once it is loaded, or a row with the reason why it never will be."""
        if self._process is None:
            self.start()
        if not self._is_ready:
            row = self._next_row("start")
            if not is_measured(row):
                self._failure = row  # once more would end the same
                return row
            self.who, self._is_ready = row["who"], True
            return {**row, "start_s": round(time.perf_counter() - self._started, 1)}
        return {}

    def turn(self, options: list[str]) -> dict[str, Any]:
        """The row of one turn; a side that has died since the last one is started again, but not after two failures."""
        start = time.perf_counter()
        row = self._failure
        if row is None and self._process is not None and self._process.poll() is not None:
            self.close()
        if row is None:
            ready = self.wait_ready()
            row = self._ask(options) if is_measured(ready) else ready
            self._failed_turns = self._failed_turns + 1 if "failed" in row else 0
            if self._failed_turns == 2:
                self._failure = row
        return {"who": self.who, **row, "wall_s": round(time.perf_counter() - start, 1)}

    def _ask(self, options: list[str]) -> dict[str, Any]:
        try:
            self._process.stdin.write(json.dumps({"options": options}).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return self._why("it ended before its turn")
        row = self._next_row("turn")
        if row.get("leaves"):
            self.close()
        return row

    def _next_row(self, what: str) -> dict[str, Any]:
        deadline = time.monotonic() + self._timeout_s
        while time.monotonic() < deadline:
            # Asked before the queue: a row written just before the end is still taken.
            has_ended = self._process.poll() is not None
            try:
                row = read_row(self._lines.get(timeout=1.0))
            except queue.Empty:
                if has_ended:
                    return self._why(f"exit code {self._process.returncode}")
                continue
            if row is not None:
                return row
        self.close(patience_s=0)
        return {"failed": f"no row within {self._timeout_s:.0f} s of its {what}"}

    def _why(self, fallback: str) -> dict[str, Any]:
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_LINES:]
        memory = next((line for line in reversed(lines) if "out of memory" in line.lower()), None)
        if memory is not None:
            return {"out_of_memory": True, "reason": memory.strip()[:300]}
        return {"failed": "\n".join(lines) or fallback}

    def close(self, patience_s: float = 15) -> None:
        """Ends the process, by closing its input or, if that is not enough, by killing it and its children."""
        if self._process is None:
            return
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(patience_s)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._process, self._is_ready = None, False


class AbsentProcess:
    """A side that cannot run here: every turn of it is a row that says why."""

    def __init__(self, who: str, reason: str):
        self.who, self._reason = who, reason

    def start(self) -> None: ...

    def wait_ready(self) -> dict[str, Any]:
        return {"skipped": self._reason}

    def turn(self, options: list[str]) -> dict[str, Any]:
        return {"who": self.who, "skipped": self._reason}

    def close(self, patience_s: float = 0) -> None: ...


def _forward(descriptor: int, lines: queue.Queue[str]) -> None:
    with os.fdopen(descriptor, encoding="utf-8", errors="replace") as source:
        for line in source:
            lines.put(line)
