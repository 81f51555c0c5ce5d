"""Steps timed on the wall clock, tokens counted from what the model is given, memory, and the row made of them."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback

from packloop.errors import OutOfMemoryError

# bitsandbytes' paged optimizers leave the state of smaller tensors in plain memory.
SMALLEST_PAGED_ELEMENTS = 100_000
GIB = 2**30


@dataclass(frozen=True)
class Lap:
    """One optimizer step. loss: mean over its label tokens, as its trainer defines it."""

    ms: float
    real_tokens: int
    slot_tokens: int
    label_tokens: int
    loss: float


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class StepMeter(TrainerCallback):
    """Laps of a Hugging Face trainer. Data loading and logging lie outside a lap, as they do for ours."""

    def __init__(self):
        self.laps: list[Lap] = []
        self._micros: list[tuple[Tensor | int, int, Tensor]] = []
        self._losses: list[Tensor] = []
        self._start = 0.0

    def watch(self, trainer: Trainer) -> None:
        """Counts the tokens of every micro-batch that `trainer` takes from here on."""
        take = trainer.training_step

        def counted(model, inputs: dict[str, Tensor], *args, **kwargs) -> Tensor:
            self._micros.append(_count(inputs))
            loss = take(model, inputs, *args, **kwargs)
            self._losses.append(loss.detach())
            return loss

        trainer.training_step = counted
        trainer.add_callback(self)

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self._micros, self._losses = [], []
        synchronize()
        self._start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        synchronize()
        ms = (time.perf_counter() - self._start) * 1e3
        self.laps.append(
            Lap(
                ms=ms,
                real_tokens=sum(int(real) for real, _, _ in self._micros),
                slot_tokens=sum(slots for _, slots, _ in self._micros),
                label_tokens=sum(int(labels) for _, _, labels in self._micros),
                loss=sum(float(loss) for loss in self._losses),
            )
        )


def _count(inputs: dict[str, Tensor]) -> tuple[Tensor | int, int, Tensor]:
    """(tokens that are not padding, slots, targets that count); tensors are read only once the step is over.

    A batch without attention mask is documents end to end, with no padding.
    """
    mask, slots = inputs.get("attention_mask"), inputs["input_ids"].numel()
    if mask is not None and mask.dim() != 2:
        raise ValueError(f"an attention mask [batch, tokens] is needed to count tokens, given {tuple(mask.shape)}")
    labels = (inputs["labels"][:, 1:] != -100).sum()
    return (slots if mask is None else mask.sum()), slots, labels


def laps_row(laps: list[Lap], warmup: int) -> dict[str, Any]:
    """Medians over the laps after `warmup`, and the losses of the first ten steps."""
    timed = laps[warmup:]
    rates = sorted(lap.real_tokens / lap.ms * 1e3 for lap in timed)
    return {
        "real_tokens_per_s": statistics.median(rates),
        "real_tokens_per_s_range": [rates[0], rates[-1]],
        "slot_tokens_per_s": statistics.median(lap.slot_tokens / lap.ms * 1e3 for lap in timed),
        "label_tokens_per_s": statistics.median(lap.label_tokens / lap.ms * 1e3 for lap in timed),
        "step_ms": statistics.median(lap.ms for lap in timed),
        "step_ms_all": [round(lap.ms, 3) for lap in laps],
        "real_tokens_per_step": statistics.mean(lap.real_tokens for lap in timed),
        "timed_steps": len(timed),
        "losses": [round(lap.loss, 4) for lap in laps[:10]],
    }


def paged_bytes(parameters: Iterable[Tensor]) -> int:
    """Managed memory that a paged 32-bit AdamW will take for these parameters: two fp32 moments of each large one."""
    return sum(8 * p.numel() for p in parameters if p.numel() >= SMALLEST_PAGED_ELEMENTS)


def managed_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Managed memory of an optimizer's state, by the mark that bitsandbytes leaves on the tensors."""
    values = (value for state in optimizer.state.values() for value in state.values())
    return sum(v.nbytes for v in values if isinstance(v, Tensor) and getattr(v, "is_paged", False))


def cap_memory(cap_gib: float | None, managed: int) -> None:
    """From here on torch may reserve what the cap leaves beside `managed` bytes, which torch does not count."""
    if cap_gib is None or not torch.cuda.is_available():
        return
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction(min(1.0, (cap_gib * GIB - managed) / total))


def reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def memory_row(managed: int) -> dict[str, float]:
    """Peaks since `reset_peak`; `peak_counted_gib` is what a cap limits."""
    if not torch.cuda.is_available():
        return {}
    reserved = torch.cuda.max_memory_reserved()
    return {
        "peak_allocated_gib": torch.cuda.max_memory_allocated() / GIB,
        "peak_reserved_gib": reserved / GIB,
        "managed_gib": managed / GIB,
        "peak_counted_gib": (reserved + managed) / GIB,
    }


def process_seconds() -> float:
    """Since this process began, imports included."""
    return round(time.time() - psutil.Process().create_time(), 1)


def measure_trainer(trainer: Trainer, arguments: argparse.Namespace) -> dict[str, Any]:
    """Trains and returns the row."""
    predicted = paged_bytes(p for p in trainer.model.parameters() if p.requires_grad)
    cap_memory(arguments.memory_cap_gib, predicted)
    meter = StepMeter()
    meter.watch(trainer)
    reset_peak()
    seconds_to_start = process_seconds()
    trainer.train()
    managed = managed_bytes(trainer.optimizer)
    row = laps_row(meter.laps, arguments.warmup)
    return {**row, **memory_row(managed), "seconds_to_start": seconds_to_start}


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def or_out_of_memory(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The row of `run`, or one that says that the memory did not suffice."""
    try:
        return run()
    except (torch.OutOfMemoryError, OutOfMemoryError) as error:
        return {"out_of_memory": True, "reason": str(error).splitlines()[0][:300]}
