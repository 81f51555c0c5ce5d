"""The floor of attention: every backend that can run, timed alone on the documents of the profiled steps."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from transformers import LlamaConfig

from packloop.engine.planner.shape import heads_of
from packloop.kernels.attention import SHARING, DocumentLayout, load_backend, rotates, usable_backends
from packloop.kernels.rope import Rotation, rope_

_REPEATS = 5
_WARMUPS = 2


@dataclass(frozen=True)
class AttentionTimes:
    """Milliseconds of one layer, summed over the micro-batches of an average step. rope_ms: of q and k apart.

    rope_ms is 0 for a backend that rotates by itself.
    """

    name: str
    forward_ms: float
    backward_ms: float
    rope_ms: float

    @property
    def total_ms(self) -> float:
        return self.forward_ms + self.backward_ms + self.rope_ms


def measure_attention(
    config: LlamaConfig, layouts: Iterable[DocumentLayout], *, num_steps: int, dtype: torch.dtype, device: torch.device
) -> list[AttentionTimes]:
    """Every usable backend on these layouts, those of `num_steps` steps; the fastest first.

    Not timed: eager; sdpa on packed documents on a GPU where another can run, whose mask is quadratic in memory; and
    where documents share beginnings those that know none.
    """
    layouts = list(layouts)
    is_packed = any(layout.is_packed for layout in layouts)
    reasons = usable_backends(is_packed=is_packed, dtype=dtype, device=device, head_dim=heads_of(config)[2])
    names = [name for name, reason in reasons.items() if reason is None and name != "eager"]
    if is_packed and device.type == "cuda" and len(names) > 1:
        names.remove("sdpa")
    if any(layout.prefix_of is not None for layout in layouts):
        names = [name for name in names if name in SHARING]
    found = []
    for name in names:
        times = [_time_backend(name, config, layout, dtype, device) for layout in layouts]
        found.append(AttentionTimes(name, *(sum(column) / num_steps for column in zip(*times, strict=True))))
    return sorted(found, key=lambda times: times.total_ms)


def _time_backend(
    name: str, config: LlamaConfig, layout: DocumentLayout, dtype: torch.dtype, device: torch.device
) -> tuple[float, float, float]:
    """(forward, backward, RoPE both ways) of one layer on random inputs."""
    heads, kv_heads, head_dim = heads_of(config)
    num_rows, row_slots = layout.document_ids_BL.shape
    scale, backend = head_dim**-0.5, load_backend(name)
    q, k, v, d_out = (
        torch.randn(num_rows * row_slots, count, head_dim, dtype=dtype, device=device)
        for count in (heads, kv_heads, kv_heads, heads)
    )
    gradients = [torch.empty_like(x) for x in (q, k, v)]
    # Turned by no angle, so that values stay what they are however often they are turned in place.
    tables = torch.ones(row_slots, head_dim // 2, device=device), torch.zeros(row_slots, head_dim // 2, device=device)
    positions_T = torch.arange(row_slots, device=device).repeat(num_rows)
    extra = {"rotation": Rotation(*tables, positions_T)} if rotates(backend) else {}

    def forward():
        return backend.forward(q, k, v, layout, scale, **extra)[1]

    forward_ms = _median_ms(forward, device)

    # A backend may free what it saved once it is used, so each backward has a forward of its own, timed with it.
    def both():
        backend.backward(forward(), d_out, q, k, v, layout, scale, *gradients, **extra)

    both_ms = _median_ms(both, device)
    rope_ms = 0.0
    if not extra:
        flat = q.flatten(1), k.flatten(1)
        rope_ms = 2 * _median_ms(lambda: rope_(*flat, *tables, positions_T), device)
    return forward_ms, max(0.0, both_ms - forward_ms), rope_ms


def _median_ms(run: Callable[[], object], device: torch.device) -> float:
    laps = []
    for _ in range(_WARMUPS + _REPEATS):
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            end.synchronize()
            laps.append(start.elapsed_time(end))
        else:
            begun = time.perf_counter()
            run()
            laps.append((time.perf_counter() - begun) * 1e3)
    return statistics.median(laps[_WARMUPS:])
