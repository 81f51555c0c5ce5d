"""What the device at hand can do at most, measured: matrix products of the model's shapes, and copies in its memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from transformers import LlamaConfig

from packloop.bench.floor import groups_of
from packloop.bench.results import Ceilings
from packloop.bench.steps import synchronize

_LAPS = 5
# Of one lap: long enough that neither its start nor a change of clock counts, short enough for a CPU.
_LAP_SECONDS = 0.1
_COPY_BYTES = {"cuda": 2**30, "cpu": 2**27}


def measure_ceilings(config: LlamaConfig, num_slots: int, dtype: torch.dtype, device: torch.device) -> Ceilings:
    """Rates of this moment, in this process.

    Matrix products: forward and input gradient of one decoder layer's linear layers, those of one input joined, for
    `num_slots` rows in `dtype`, weights stored [out, in]. Copy: bytes read and bytes written, both counted.
    """
    return Ceilings(gemm_tflops=_gemm_tflops(config, num_slots, dtype, device), copy_tb_per_s=_copy_tb_per_s(device))


def _gemm_tflops(config: LlamaConfig, num_slots: int, dtype: torch.dtype, device: torch.device) -> float:
    products, flops = [], 0
    for group in groups_of(config):
        rows, columns = sum(group.out_features), group.in_features
        weight = torch.randn(rows, columns, dtype=dtype, device=device)
        x = torch.randn(num_slots, columns, dtype=dtype, device=device)
        y = torch.randn(num_slots, rows, dtype=dtype, device=device)
        products.append((weight, x, torch.empty_like(x), y, torch.empty_like(y)))
        flops += 2 * 2 * num_slots * rows * columns

    def run() -> None:
        for weight, x, dx, y, out in products:
            torch.mm(x, weight.t(), out=out)
            torch.mm(y, weight, out=dx)

    return flops / _seconds(run) / 1e12


def _copy_tb_per_s(device: torch.device) -> float:
    source = torch.ones(_COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / _seconds(lambda: target.copy_(source)) / 1e12


def _seconds(run: Callable[[], object]) -> float:
    """Of one call: the median of some laps, each of as many calls as fill its time, after one to warm up."""
    run()
    # The shortest: one that was held up would make the laps of so few calls that each is mostly its start.
    once = max(min(_lap_seconds(run, 1) for _ in range(_LAPS)), 1e-6)
    repeats = max(1, round(_LAP_SECONDS / once))
    return statistics.median(_lap_seconds(run, repeats) / repeats for _ in range(_LAPS))


def _lap_seconds(run: Callable[[], object], repeats: int) -> float:
    synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    synchronize()
    return time.perf_counter() - start
