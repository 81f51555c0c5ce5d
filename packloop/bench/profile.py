"""Training steps under torch.profiler: traces of them, read into milliseconds by phase and class of work."""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from packloop.bench.breakdown import StepBreakdown
from packloop.bench.labels import labelled
from packloop.bench.results import Profile
from packloop.bench.steps import Job, Lap, reset_peak, synchronize
from packloop.bench.trace import Trace, exclusive_ms, read_trace
from packloop.engine.batch import Micro
from packloop.engine.budget import GIB, settle_on_gpu
from packloop.engine.plan import operations_of
from packloop.errors import InputError
from packloop.kernels.activation_bytes import activation_bytes
from packloop.kernels.attention import DocumentLayout, load_backend
from packloop.kernels.patch import FusedLayers, find_llama

Step = Callable[[list[Micro]], Lap]

_NO_KERNEL = (
    "torch.profiler recorded no kernel of the GPU; its messages above say why, and no other profiler may be attached "
    "to the process"
)


def trace_step(step: Step, micros: list[Micro], path: Path) -> tuple[Lap, StepBreakdown]:
    """Takes one step of `Job.stepping` under the profiler, with labels; writes its Chrome trace to `path`.

    InputError where there is a GPU and the profiler saw none of its kernels.
    """
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    else:
        # Its notices of each start and stop. Where there is a GPU, its errors are worth more than silence.
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    with labelled(), profile(activities=activities, record_shapes=True) as profiler:
        lap = step(micros)
        synchronize()
    profiler.export_chrome_trace(str(path))
    breakdown = StepBreakdown(read_trace(path))
    if torch.cuda.is_available() and not breakdown.is_gpu:
        raise InputError(_NO_KERNEL)
    return lap, breakdown


def busy_share(step: Step, micros: list[Micro]) -> float:
    """The share of one step of `Job.stepping` in which the GPU is busy, from a trace of its kernels and nothing else.

    Such a trace hardly slows the host, so the GPU waits, and its clock is, as in a step that nobody looks at.
    InputError where the profiler saw no kernel.
    """
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "trace.json"
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            lap = step(micros)
            synchronize()
        profiler.export_chrome_trace(str(path))
        return busy_share_in(read_trace(path), lap.ms)


def busy_share_in(trace: Trace, step_ms: float) -> float:
    """The share of a step of `step_ms` in which a GPU is busy, kernels beside each other counted once; at most 1.

    InputError where the trace holds no work of a GPU.
    """
    if not trace.is_gpu:
        raise InputError(_NO_KERNEL)
    return min(1.0, sum(exclusive_ms(trace.work)) / step_ms)


def profile_step(step: Step, micros: list[Micro], *, step_ms: float | None = None) -> Profile:
    """Takes a step of `Job.stepping` under the profiler with labels, on a GPU once more for its `busy_share`.

    step_ms: what such a step takes without the profiler, which slows the host; without it the labelled step's own time.
    On a GPU `busy_share` of it is busy, and divided as the labelled trace says. On a CPU the classes are those of
    operators, and idle is what they leave.
    """
    with tempfile.TemporaryDirectory() as directory:
        lap, breakdown = trace_step(step, micros, Path(directory) / "trace.json")
    total_ms = step_ms or lap.ms
    if breakdown.is_gpu:
        breakdown.rescale(busy_share(step, micros) * total_ms)
    busy_ms = breakdown.busy_ms
    total_ms = max(total_ms, busy_ms)
    return Profile(
        device="gpu" if breakdown.is_gpu else "cpu",
        step_ms=total_ms,
        busy_ms=busy_ms,
        idle_share=1 - busy_ms / total_ms,
        by_class_ms=breakdown.by_class_ms(),
        by_phase_ms=breakdown.by_phase_ms(),
    )


@dataclass
class ProfiledSteps:
    """The same windows timed alone, then taken under the profiler with labels, and on a GPU once more for `busy_share`.

    laps, traced_laps: of the first two; breakdowns: of the labelled, on a GPU rescaled to the timed steps' busy time;
    layouts: of all their micro-batches, in order. num_slots: of the largest micro-batch.
    """

    laps: list[Lap] = field(default_factory=list)
    traced_laps: list[Lap] = field(default_factory=list)
    breakdowns: list[StepBreakdown] = field(default_factory=list)
    layouts: list[DocumentLayout] = field(default_factory=list)
    num_slots: int = 0

    @property
    def busy_ms(self) -> float:
        return statistics.fmean(breakdown.busy_ms for breakdown in self.breakdowns)

    @property
    def step_ms(self) -> float:
        """Mean of the timed steps on a GPU, to which the labelled are rescaled; on a CPU of the labelled."""
        laps = self.laps if self.breakdowns[0].is_gpu else self.traced_laps
        return max(statistics.fmean(lap.ms for lap in laps), self.busy_ms)


def profile_steps(job: Job, options: dict[str, Any], *, steps: int, warmup: int, trace: Path) -> ProfiledSteps:
    """Warms up, times `steps` windows and profiles them; `trace` receives the last one's Chrome trace.

    On a GPU each window is taken a third time for its `busy_share`: that much of the timed step is what the classes add
    up to.
    options: what `Job.resolve` returned.
    """
    taken = ProfiledSteps()
    with job.stepping(options) as step:
        reset_peak()
        for _ in range(warmup):
            step(job.next_window())
        windows = []
        for _ in range(steps):
            windows.append(job.next_window())
            taken.laps.append(step(windows[-1]))
        for window in windows:
            job.next_window()  # as before every step, so that within it the next is fetched and copied
            lap, breakdown = trace_step(step, window, trace)
            taken.traced_laps.append(lap)
            taken.breakdowns.append(breakdown)
        if taken.breakdowns[0].is_gpu:
            for window, lap, breakdown in zip(windows, taken.laps, taken.breakdowns, strict=True):
                job.next_window()
                breakdown.rescale(busy_share(step, window) * lap.ms)
    taken.layouts = [micro.layout for window in windows for micro in window]
    taken.num_slots = max(micro.batch.num_slots for window in windows for micro in window)
    return taken


@dataclass(frozen=True)
class Room:
    """GPU memory: what is left at the peak under the budget, and what a layer's choices take, in GiB.

    None where there is no GPU, or, of a layer, where the model is not fused.
    """

    free_gib: float | None = None
    recomputed_gib: float | None = None
    cached_gib: float | None = None
    inputs_gib: float | None = None
    paged_gib: float = 0.0


def measure_room(job: Job, num_slots: int) -> Room:
    """Of a job whose steps have been taken, with a resolved configuration."""
    paged_gib = job.optimizer.paged_bytes / GIB
    if not torch.cuda.is_available():
        return Room()
    budget_gib, _ = settle_on_gpu(job.config.train.memory_budget_gib, job.accelerator.device)
    free_gib = budget_gib - torch.cuda.max_memory_reserved() / GIB - paged_gib
    if job.config.kernels.layer != "fused":
        return Room(free_gib=free_gib, paged_gib=paged_gib)
    llama = find_llama(job.model)
    keeps = ["products"] * llama.config.num_hidden_layers
    attention, operations = load_backend(job.config.kernels.attention), operations_of(job.config)
    layer = FusedLayers(llama.model, attention, keeps, 0, operations=operations).layers[0]
    sizes = activation_bytes(layer, num_slots)
    return Room(
        free_gib=free_gib,
        recomputed_gib=sizes["products"] / GIB,
        cached_gib=sum(weights.dense_bytes for weights in layer.weights.values()) / GIB,
        inputs_gib=sizes["inputs"] / GIB,
        paged_gib=paged_gib,
    )
