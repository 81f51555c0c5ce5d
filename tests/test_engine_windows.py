"""Windows are made ready a step ahead, and the position saved is that of the step taken."""

from __future__ import annotations

import torch

from packloop.engine.batch import Windows

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
