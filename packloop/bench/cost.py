"""Time and dollars for a data set on an instance: measured on its GPU, or projected from another by a stated rule.

The rule. A step is split into a part bound by arithmetic, a part bound by memory traffic, and idle time. The first is
scaled by the ratio of the two GPUs' bf16 rates, the second by that of their bandwidths, the third stays as it is. Both
ratios come from what was measured on the two GPUs where the results hold that, else from the makers' figures for both.

The split comes from the cell's profile: base GEMM and attention are arithmetic (attention that writes its scores out,
`eager`, is traffic), idle is idle, the rest is traffic. Without a profile the arithmetic is the step's executed FLOPs
at the GEMM rate measured in the cell's process, and the rest is traffic.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from packloop.bench.groups import attention_of
from packloop.bench.kernel_classes import ATTENTION, BASE_GEMM
from packloop.bench.plots import rate_of
from packloop.bench.prices import Instance
from packloop.bench.results import Ceilings, Cell
from packloop.engine.budget import CONTEXT_GIB
from packloop.gpus import Gpu, find_gpu
from packloop.kernels.flash_attention import NEEDED_CAPABILITY

MEASURED, PROJECTED = "measured on this GPU", "projected"


@dataclass(frozen=True)
class DataSet:
    """tokens_per_row: real tokens, the prompt's included."""

    rows: int
    epochs: float
    tokens_per_row: float

    @property
    def tokens(self) -> float:
        return self.rows * self.epochs * self.tokens_per_row


# databricks-dolly-15k, three times, as in the tutorial, which does not say how many tokens that is: an estimate.
TUTORIAL_DATA = DataSet(rows=15_011, epochs=3, tokens_per_row=151)
# Where the estimate is from: a sample's mean, 151.4, and its standard error, 10.4, which a test recounts.
TUTORIAL_TOKENS_PER_ROW = (
    "the mean of a sample of 100 rows of databricks-dolly-15k in the tutorial's prompt, by Llama 2's tokenizer with "
    "BOS and EOS; its standard error is 10"
)


@dataclass(frozen=True)
class Split:
    """A step's milliseconds by what bounds them. source: profile or FLOPs."""

    compute_ms: float
    memory_ms: float
    idle_ms: float
    source: str


@dataclass(frozen=True)
class Scale:
    """How many times longer one GPU takes than another: for arithmetic and for memory traffic. source: of the rates."""

    compute: float
    memory: float
    source: str


@dataclass(frozen=True)
class Estimate:
    """seconds and dollars for a data set; None with the reason where there are none. basis: measured or projected."""

    basis: str
    seconds: float | None = None
    dollars: float | None = None
    reason: str | None = None


def estimate(cell: Cell, instance: Instance, data: DataSet, measured: dict[str, Ceilings]) -> Estimate:
    """Of a cell with a rate. measured: what `measured_ceilings` says of the results as a whole."""
    own, target = find_gpu(cell.conditions.device), instance.model
    if own is not None and own.key == target.key:
        return _priced(MEASURED, data.tokens / rate_of(cell), instance)
    reason = _why_not(cell, own, target)
    splits = splits_of(cell)
    if reason is None and not splits:
        reason = "no profile, no FLOPs"
    if reason is not None:
        return Estimate(PROJECTED, reason=reason)
    seconds = data.tokens / rate_of(cell) * slowdown(splits[0], scale_between(own, target, measured))
    return _priced(PROJECTED, seconds, instance)


def _priced(basis: str, seconds: float, instance: Instance) -> Estimate:
    return Estimate(basis, seconds, seconds / 3600 * instance.dollars_per_gpu_hour)


def _why_not(cell: Cell, own: Gpu | None, target: Gpu) -> str | None:
    if own is None or own.bf16_tflops is None:
        return f"{cell.conditions.device} is not in the GPU table"
    if target.bf16_tflops is None:
        return "no bf16"
    needed = NEEDED_CAPABILITY.get(attention_of(cell) or "", (0, 0))
    if target.capability < needed:
        return f"no {attention_of(cell)} there"
    if cell.memory is not None and cell.memory.peak_counted_gib + CONTEXT_GIB > target.memory_gib:
        return f"out of memory: {cell.memory.peak_counted_gib + CONTEXT_GIB:.1f} of {target.memory_gib:.1f} GiB"
    return None


def splits_of(cell: Cell) -> list[Split]:
    """Those that the cell has what it takes for: by the profile, which counts, and by FLOPs."""
    found = []
    if cell.profile is not None and cell.profile.device == "gpu":
        by_class = cell.profile.by_class_ms
        compute_ms = by_class.get(BASE_GEMM, 0.0)
        if attention_of(cell) != "eager":
            compute_ms += by_class.get(ATTENTION, 0.0)
        idle_ms = max(0.0, cell.profile.step_ms - cell.profile.busy_ms)
        found.append(Split(compute_ms, sum(by_class.values()) - compute_ms, idle_ms, "profile"))
    if cell.flops is not None and cell.ceilings is not None:
        step_ms = cell.figures.step_ms.median
        compute_ms = step_ms * min(1.0, cell.flops.hardware_tflops / cell.ceilings.gemm_tflops)
        found.append(Split(compute_ms, step_ms - compute_ms, 0.0, "FLOPs"))
    return found


def slowdown(split: Split, scale: Scale) -> float:
    """The rule itself: how many times longer the step takes."""
    scaled_ms = split.compute_ms * scale.compute + split.memory_ms * scale.memory + split.idle_ms
    return scaled_ms / (split.compute_ms + split.memory_ms + split.idle_ms)


def scale_between(own: Gpu, target: Gpu, measured: dict[str, Ceilings]) -> Scale:
    """Measured rates and the makers' are never mixed: a maker's is a peak that no GPU reaches."""
    if own.key in measured and target.key in measured:
        here, there = measured[own.key], measured[target.key]
        return Scale(here.gemm_tflops / there.gemm_tflops, here.copy_tb_per_s / there.copy_tb_per_s, "measured")
    return Scale(own.bf16_tflops / target.bf16_tflops, own.gb_per_s / target.gb_per_s, "datasheets")


def measured_ceilings(cells: Iterable[Cell]) -> dict[str, Ceilings]:
    """Key of a known GPU -> medians of what the cells' processes measured on it."""
    found: dict[str, list[Ceilings]] = {}
    for cell in cells:
        gpu = find_gpu(cell.conditions.device)
        if gpu is not None and cell.ceilings is not None:
            found.setdefault(gpu.key, []).append(cell.ceilings)
    return {
        key: Ceilings(
            gemm_tflops=statistics.median(one.gemm_tflops for one in members),
            copy_tb_per_s=statistics.median(one.copy_tb_per_s for one in members),
        )
        for key, members in found.items()
    }
