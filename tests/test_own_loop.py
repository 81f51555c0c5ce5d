"""examples/own_loop.py gives the losses of `train`, to the last bit."""

from __future__ import annotations

import importlib.util
import runpy
import sys
from pathlib import Path

import pytest
from small_job import read_steps, small_config

from packloop.engine.loop import train

EXAMPLE = Path(__file__).resolve().parents[1] / "examples/own_loop.py"


@pytest.fixture(scope="module")
def own_loop():
    spec = importlib.util.spec_from_file_location("own_loop", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.own_loop


@pytest.mark.parametrize(
    "sections",
    [
        {"lora": {"dropout": 0.1}, "model": {"quantization": "nf4"}},
        {"data": {"packing": "wrapped"}, "train": {"lr_scheduler_type": "cosine", "max_grad_norm": 0.1}},
        {"lora": {"enabled": False}, "train": {"learning_rate": 1e-3, "weight_decay": 0.1}},
    ],
    ids=["nf4-dropout", "wrapped-cosine", "whole-model"],
)
def test_own_loop_gives_the_losses_of_train(own_loop, small_base, small_rows, tmp_path, sections):
    sections = sections | {"train": {"max_steps": 12} | sections.get("train", {})}
    config = small_config(small_base, small_rows, tmp_path / "run", **sections)
    train(config)
    losses = list(own_loop(config))
    assert losses == [step["loss"] for step in read_steps(tmp_path / "run")]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "usage: python examples/own_loop.py CONFIG"),
        (["none.yaml"], "error: configuration 'none.yaml' does not exist"),
        (
            ["recipes/demo.yaml", "train.max_step=3"],
            "error: train.max_step=3: no such setting; nearest: train.max_steps",
        ),
    ],
)
def test_a_wrong_command_is_one_line(monkeypatch, arguments, line):
    monkeypatch.chdir(EXAMPLE.parents[1])
    monkeypatch.setattr(sys, "argv", ["own_loop.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert str(ended.value).startswith(line)
    assert "\n" not in str(ended.value)
