"""Signals: when they save and stop, when they interrupt, and when a run evaluates then. Ranks: test_ranks.py."""

from __future__ import annotations

import os
import signal

import pytest
from small_job import read_metrics, small_config

from packloop.engine import loop
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


def evaluated(run_dir) -> list[int]:
    return [values["step"] for values in read_metrics(run_dir) if "eval_loss" in values]


def test_an_evaluation_that_dies_loses_no_step(small_base, small_rows, tmp_path, monkeypatch):
    """The checkpoint is there before it, and a run that goes on makes up for it, once."""
    config = small_config(small_base, small_rows, tmp_path / "run", **SECTIONS | {"checkpoint": {"every": 3}})
    with monkeypatch.context() as broken:

        def die(*_):
            raise RuntimeError("evaluation died")

        broken.setattr(loop, "evaluate", die)
        with pytest.raises(RuntimeError, match="evaluation died"):
            train(config)
    assert find_checkpoint(tmp_path / "run", "latest").state.step == 3
    assert evaluated(tmp_path / "run") == []
    for _ in range(2):
        train(config, resume="latest")
        assert evaluated(tmp_path / "run") == [3, 6]
    train(small_config(small_base, small_rows, tmp_path / "whole", **SECTIONS))
    assert read_metrics(tmp_path / "run") == read_metrics(tmp_path / "whole")


@pytest.mark.parametrize(
    ("step", "stopped_by"),
    [(3, signal.SIGTERM), (6, None)],  # no checkpoint is due at step 3; step 6 is the last: the run is done
)
def test_a_stop_during_an_evaluation_comes_right_after_it(
    small_base, small_rows, tmp_path, monkeypatch, step, stopped_by
):
    evaluate, steps = loop.evaluate, []

    def asked_to_stop(*arguments):
        if steps[-1] == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*arguments)

    monkeypatch.setattr(loop, "evaluate", asked_to_stop)
    config = small_config(small_base, small_rows, tmp_path / "run", **SECTIONS)
    result = train(config, on_step=lambda values: steps.append(values["step"]))
    assert (result.stopped_by, steps[-1], result.state.step) == (stopped_by, step, step)
    assert evaluated(tmp_path / "run") == list(range(3, step + 1, 3))
    assert find_checkpoint(tmp_path / "run", "latest").state.step == step


def test_a_run_told_to_stop_does_not_evaluate_first(small_base, small_rows, tmp_path):
    config = small_config(small_base, small_rows, tmp_path / "run", **SECTIONS)
    result = train(config, on_step=send(signal.SIGTERM, after=5))
    assert (result.stopped_by, result.state.step) == (signal.SIGTERM, 6)
    assert evaluated(tmp_path / "run") == [3]
    assert train(config, resume="latest").stopped_by is None
    assert evaluated(tmp_path / "run") == [3, 6]
