"""One training step under torch.profiler: the GPU's milliseconds by what they are spent on."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from packloop.bench.kernel_classes import CLASSES, likely_class
from packloop.bench.results import Profile
from packloop.bench.steps import Lap
from packloop.bench.trace import exclusive_ms, read_trace
from packloop.data.loader import Batch


def profile_step(step: Callable[[list[Batch]], Lap], micros: list[Batch], *, step_ms: float | None = None) -> Profile:
    """Takes one step of `Job.stepping` under the profiler and says what its time went into.

    step_ms: what such a step takes without the profiler, which slows the host; idle is what the kernels leave of it.
    Without it the profiled step's own time is taken. On a CPU the classes are those of operators.
    """
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        lap = step(micros)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "trace.json"
        profiler.export_chrome_trace(str(path))
        trace = read_trace(path)
    by_class: dict[str, float] = defaultdict(float)
    for piece, ms in zip(trace.work, exclusive_ms(trace.work), strict=True):
        by_class[likely_class(piece.name)] += ms
    busy_ms = sum(by_class.values())
    total_ms = max(step_ms or lap.ms, busy_ms)
    return Profile(
        device="gpu" if trace.is_gpu else "cpu",
        step_ms=total_ms,
        busy_ms=busy_ms,
        idle_share=1 - busy_ms / total_ms,
        by_class_ms={name: by_class[name] for name in CLASSES if name in by_class},
    )
