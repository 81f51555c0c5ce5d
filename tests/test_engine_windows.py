"""Windows are made ready a step ahead, and the position saved is that of the step taken."""

from __future__ import annotations

import pytest
import torch
from small_job import small_config

from packloop.engine import loop, run
from packloop.engine.batch import Windows
from packloop.engine.loop import train

CPU = torch.device("cpu")


class _Source:
    """Windows of no micro-batches, counted."""

    def __init__(self):
        self.drawn = 0

    def next_window(self):
        self.drawn += 1
        return []

    def state(self):
        return {"cursor": self.drawn}


def test_the_position_is_that_of_the_window_taken_not_of_the_one_made_ready():
    source = _Source()
    windows = Windows(source, CPU)
    assert windows.position == {"cursor": 0}
    windows.take()
    windows.prepare()
    windows.prepare()
    assert (windows.position, source.drawn) == ({"cursor": 1}, 2)
    windows.take()
    assert (windows.position, source.drawn) == ({"cursor": 2}, 2)


@pytest.mark.parametrize("layer", ["stock", "fused"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_masks_are_gone_once_their_micro_batch_is_done(small_base, small_rows, tmp_path, monkeypatch, attention, layer):
    """They grow with the square of a row, and memory is planned for one micro-batch's."""
    steps, alive = [], []

    class Watched(Windows):
        def take(self):
            steps.append(super().take())
            return steps[-1]

    packed_loss_sum = loop.packed_loss_sum

    def watched_loss(llama, *inputs):
        loss = packed_loss_sum(llama, *inputs)
        alive.append(sum(("mask",) in micro.layout.made for micro in steps[-1]))
        return loss

    monkeypatch.setattr(run, "Windows", Watched)
    monkeypatch.setattr(loop, "packed_loss_sum", watched_loss)
    kernels = {"attention": attention, "layer": layer}
    settings = {"max_steps": 2, "gradient_accumulation_steps": 4}
    train(small_config(small_base, small_rows, tmp_path / "run", kernels=kernels, train=settings))
    assert len(alive) == 8
    assert max(alive) == 1
    assert [[list(micro.layout.made) for micro in micros] for micros in steps] == [[[]] * 4] * 2
