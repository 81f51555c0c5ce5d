"""A few real steps of one configuration on a base that is given: their times, rates and peak memory."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import LlamaForCausalLM

from packloop.bench.steps import Job, Lap, lap_figures, memory_figures, reset_peak, synchronize
from packloop.config import RunConfig
from packloop.data.loader import Batch, TrainingData
from packloop.engine.batch import Micro
from packloop.engine.budget import GIB, lift_limit, limit_memory


@dataclass(frozen=True)
class Probe:
    """What was measured. config: with every `auto` settled; micros: the micro-batches of the timed steps.

    memory: GiB, None without a GPU. managed_bytes: paged optimizer state, outside torch's allocator.
    """

    config: RunConfig
    figures: dict[str, Any]
    memory: dict[str, float] | None
    allocated_before_gib: float | None
    micros: list[Batch] = field(repr=False)

    @property
    def real_tokens_per_s(self) -> float:
        return self.figures["real_tokens_per_s"]["median"]

    @property
    def step_ms(self) -> float:
        return self.figures["step_ms"]["median"]


def probe(
    config: RunConfig,
    base: LlamaForCausalLM,
    data: TrainingData,
    pad_token_id: int,
    *,
    warmup_steps: int = 2,
    timed_steps: int = 3,
    after: Callable[[Callable[[list[Micro]], Lap], list[Micro]], None] | None = None,
) -> Probe:
    """Takes the steps and gives back what they took; `base` is left as it was, without adapter.

    after: called with (step function, next window) once the timed steps are done, inside the patched model. Raises
    torch.OutOfMemoryError and packloop's OutOfMemoryError where the configuration does not fit.
    """
    limit_memory(config.train.memory_budget_gib)
    job = Job(config, base, data, pad_token_id)
    try:
        options = job.resolve()
        laps: list[Lap] = []
        micros: list[Batch] = []
        with job.stepping(options) as step:
            gc.collect()
            reset_peak()
            before_gib = torch.cuda.memory_allocated() / GIB if torch.cuda.is_available() else None
            for number in range(warmup_steps + timed_steps):
                window = job.next_window()
                laps.append(step(window))
                if number >= warmup_steps:
                    micros += [micro.batch for micro in window]
            memory = memory_figures(job.optimizer.paged_bytes)
            if after is not None:
                after(step, job.next_window())
        return Probe(job.config, lap_figures(laps, warmup_steps), memory, before_gib, micros)
    finally:
        job.close()
        synchronize()
        lift_limit()
