"""Signals that ask a run to save and stop."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator


class Stop:
    """`signal`: the number of the first signal that asked this process to stop; None where none has."""

    signal: int | None = None

    def voted(self, accelerator: Accelerator) -> bool:
        """Whether any rank was asked to stop; every rank must call it."""
        votes = torch.tensor(int(self.signal is not None), device=accelerator.device)
        return accelerator.reduce(votes, "sum").item() > 0


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """SIGINT and SIGTERM ask the loop to save and stop after the step; SIGINT after either interrupts at once.

    SIGTERM never does: schedulers and torchrun send it more than once, and the checkpoint would be lost.
    """
    stop = Stop()

    def request(number, _frame):
        if stop.signal is None:
            stop.signal = number
        elif number == signal.SIGINT:
            raise KeyboardInterrupt

    previous = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
