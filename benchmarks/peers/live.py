"""The process of one side: loads its model once, says that it is ready, and then trains whenever it is its turn.

In: a line of JSON a turn on standard input, {"options": [...]}, put after the options that the process began with.
Out: a line a row on the file descriptor `--rows-fd`. A driver gives a pipe of its own for that, so that nothing that a
library prints can come between.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

from benchmarks.peers import memory, settings
from benchmarks.peers.protocol import write_row
from packloop.bench.conditions import describe_conditions, gpu_state
from packloop.bench.results import GpuState

# What a turn may leave behind in memory beyond what the loaded model took, before the process makes way for another.
LEFTOVER_GIB = 2.0


class Side(Protocol):
    """A loaded model. who: as the report names it."""

    who: str

    def turn(self, arguments: argparse.Namespace) -> dict[str, Any]:
        """Warms up, times its steps and returns the row; holds little more than its weights afterwards."""
        ...


def serve(parse: Callable[[list[str]], argparse.Namespace], load: Callable[[argparse.Namespace], Side]) -> None:
    """Takes turns until standard input ends, or until a turn has left too much in memory."""
    words = sys.argv[1:]
    arguments = parse(words)
    with os.fdopen(arguments.rows_fd, "w", encoding="utf-8", closefd=False) as rows:
        os.set_inheritable(arguments.rows_fd, False)
        side = load(arguments)
        memory.release()
        loaded_gib = memory.reserved_gib()
        write_row(rows, {"who": side.who, "held_gib": loaded_gib})
        for line in sys.stdin:
            row = take_turn(side, parse([*words, *json.loads(line)["options"]]))
            leaves = row["held_gib"] > loaded_gib + LEFTOVER_GIB
            write_row(rows, {**row, "leaves": leaves})
            if leaves:
                break


def take_turn(side: Side, arguments: argparse.Namespace) -> dict[str, Any]:
    """The row of a turn, or one that says that the memory did not suffice; cached memory is given back."""
    start = time.perf_counter()
    before = gpu_state()
    row = memory.or_out_of_memory(lambda: side.turn(arguments))
    # Of right after the last step: by now the clocks may have come down.
    after = GpuState(**row.pop("gpu_after")) if "gpu_after" in row else gpu_state()
    memory.release()
    conditions = describe_conditions(before, after, packages=settings.PACKAGES, commit=arguments.commit)
    return {
        "who": side.who,
        **row,
        "held_gib": memory.reserved_gib(),
        "turn_s": round(time.perf_counter() - start, 1),
        "settings": settings.settings_of(arguments),
        "conditions": conditions.model_dump(mode="json"),
    }
