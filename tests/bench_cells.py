"""Cells with plainly made-up figures, for tests of what reads them."""

from __future__ import annotations

from typing import Any

from packloop.bench.results import Cell, Conditions, Figures, GpuState, Memory
from packloop.bench.steps import Lap, lap_figures

GPU_STATE = GpuState(sm_clock_mhz=1980, memory_clock_mhz=3201, power_w=400, power_limit_w=700, temperature_c=50)


def conditions(**changes: Any) -> Conditions:
    values = {
        "device": "NVIDIA H200",
        "device_memory_gib": 139.8,
        "driver": "580.1",
        "cuda": "13.0",
        "python": "3.12.3",
        "before": GPU_STATE,
        "after": GPU_STATE.model_copy(update={"power_w": 650.0, "sm_clock_mhz": 1500.0}),
        "versions": {"torch": "2.11.0", "packloop": "0.1.0"},
        "commit": "abcdef0123456789",
        "uncommitted_changes": False,
        "date": "2026-01-02",
    }
    return Conditions(**(values | changes))


def figures(rate: float, *, noise: float = 0.01, steps: int = 10, tokens: int = 16000, warmup: int = 2) -> Figures:
    """Of steps whose rates lie evenly within `noise` of `rate`, in a shuffled order that is always the same."""
    places = [(7 * n) % steps for n in range(steps)]
    rates = [rate * 0.5] * warmup + [rate * (1 + noise * (2 * place / max(1, steps - 1) - 1)) for place in places]
    laps = [Lap(tokens / r * 1e3, tokens, tokens + 384, tokens - 100, 11.0 - n / 100) for n, r in enumerate(rates)]
    return Figures(**lap_figures(laps, warmup))


def cell(name: str, rate: float | None = 10000, *, peak_gib: float = 20.0, batch: int = 4, **changes: Any) -> Cell:
    """rate None: a cell without figures, for which a status and a reason are to be given."""
    settings = {"train.per_device_train_batch_size": batch, **changes.pop("settings", {})}
    config: dict[str, Any] = {"data": {"max_length": 2048}, "train": {"gradient_accumulation_steps": 2}}
    for key, value in settings.items():
        section, _, field = key.partition(".")
        config.setdefault(section, {})[field] = value
    values = {
        "name": name,
        "session": "one",
        "status": "measured",
        "shape": "llama2-7b",
        "settings": settings,
        "config": config,
        "conditions": conditions(),
    }
    if rate is not None:
        values["figures"] = figures(rate)
        values["memory"] = Memory(
            peak_allocated_gib=peak_gib - 1, peak_reserved_gib=peak_gib, managed_gib=0, peak_counted_gib=peak_gib
        )
    return Cell(**(values | changes))
