"""Learning-rate schedules: pure functions of the step, as multipliers of the base rate.

`step` counts optimizer steps taken so far, so the first step uses multiplier(0). The values are those of transformers'
schedules of the same names, whose warm-up starts at 0.
"""

from __future__ import annotations

import math


def num_warmup_steps(warmup_ratio: float, num_steps: int) -> int:
    """Steps of warm-up: the ratio of all optimizer steps, rounded up."""
    return math.ceil(warmup_ratio * num_steps)


def multiplier(name: str, step: int, *, num_steps: int, num_warmup_steps: int) -> float:
    """Share of the base rate at `step`: rises linearly over the warm-up, then constant, linear or cosine to 0."""
    if step < num_warmup_steps:
        return step / num_warmup_steps
    progress = (step - num_warmup_steps) / max(1, num_steps - num_warmup_steps)
    if name == "constant_with_warmup":
        return 1.0
    if name == "linear":
        return max(0.0, 1.0 - progress)
    if name == "cosine":
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
    raise ValueError(f"schedule {name!r}; allowed: constant_with_warmup, linear, cosine")
