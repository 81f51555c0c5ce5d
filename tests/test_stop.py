"""Signals: when they save and stop, when they interrupt, and when a run evaluates then. Ranks: test_ranks.py."""

from __future__ import annotations

import os
import signal

import pytest
from small_job import small_config

from packloop.engine.checkpoint import find_checkpoint
from packloop.engine.loop import train

SECTIONS = {
    "data": {"eval_split": 2, "max_length": 96},
    "train": {"max_steps": 6, "eval_every": 3},
    "checkpoint": {"every": 2, "keep": 9},
}


def send(*numbers: signal.Signals, after: int):
    """An `on_step` that sends this process these signals after that step."""

    def on_step(values: dict) -> None:
        if values["step"] == after:
            for number in numbers:
                os.kill(os.getpid(), number)

    return on_step


@pytest.mark.parametrize(
    "numbers",
    [(signal.SIGTERM,) * 3, (signal.SIGINT, signal.SIGTERM)],
    ids=["term-term-term", "int-term"],
)
def test_sigterm_again_still_saves(small_base, small_rows, tmp_path, numbers):
    """Schedulers and torchrun send it more than once."""
    config = small_config(small_base, small_rows, tmp_path / "run", **SECTIONS)
    result = train(config, on_step=send(*numbers, after=4))
    assert (result.stopped_by, result.state.step) == (numbers[0], 5)
    assert find_checkpoint(tmp_path / "run", "latest").state.step == 5


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_sigint_after_a_stop_was_asked_for_interrupts_at_once(small_base, small_rows, tmp_path, first):
    config = small_config(small_base, small_rows, tmp_path / "run", **SECTIONS)
    with pytest.raises(KeyboardInterrupt):
        train(config, on_step=send(first, signal.SIGINT, after=3))
    assert find_checkpoint(tmp_path / "run", "latest").state.step == 2
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
