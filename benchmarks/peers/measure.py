"""Steps timed on the wall clock, tokens counted from what the model is given, memory, and the row made of them."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback

from benchmarks.peers import work
from packloop.bench.conditions import gpu_state
from packloop.bench.steps import Lap, LapTimer, lap_figures, memory_figures, reset_peak
from packloop.engine.budget import limit_memory

# bitsandbytes' paged optimizers leave the state of smaller tensors in plain memory.
SMALLEST_PAGED_ELEMENTS = 100_000


class StepMeter(TrainerCallback):
    """Laps of a Hugging Face trainer. Data loading and logging lie outside a lap; ours loads within it, meanwhile."""

    def __init__(self):
        self.laps: list[Lap] = []
        # Queries x keys of each lap's micro-batches.
        self.masked_pairs: list[int] = []
        self._micros: list[tuple[Tensor | int, int, Tensor]] = []
        self._pairs = 0
        self._losses: list[Tensor] = []
        self._timer = LapTimer()

    def watch(self, trainer: Trainer) -> None:
        """Counts the tokens of every micro-batch that `trainer` takes from here on."""
        take = trainer.training_step

        def counted(model, inputs: dict[str, Tensor], *args, **kwargs) -> Tensor:
            self._micros.append(_count(inputs))
            rows, columns = inputs["input_ids"].shape
            self._pairs += rows * columns * columns
            loss = take(model, inputs, *args, **kwargs)
            self._losses.append(loss.detach())
            return loss

        trainer.training_step = counted
        trainer.add_callback(self)

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self._micros, self._losses, self._pairs = [], [], 0
        self._timer.start()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        ms = self._timer.stop()
        self.masked_pairs.append(self._pairs)
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


def paged_bytes(parameters: Iterable[Tensor]) -> int:
    """Managed memory that a paged 32-bit AdamW will take for these parameters: two fp32 moments of each large one."""
    return sum(8 * p.numel() for p in parameters if p.numel() >= SMALLEST_PAGED_ELEMENTS)


def managed_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Managed memory of an optimizer's state, by the mark that bitsandbytes leaves on the tensors."""
    values = (value for state in optimizer.state.values() for value in state.values())
    return sum(v.nbytes for v in values if isinstance(v, Tensor) and getattr(v, "is_paged", False))


def measure_trainer(trainer: Trainer, arguments: argparse.Namespace, *, pairs_per_token: float) -> dict[str, Any]:
    """Trains and returns the row. pairs_per_token: of its packs, as `work.pairs_per_token` counts them."""
    predicted = paged_bytes(p for p in trainer.model.parameters() if p.requires_grad)
    limit_memory(arguments.memory_cap_gib, predicted)
    meter = StepMeter()
    meter.watch(trainer)
    reset_peak()
    trainer.train()
    managed = managed_bytes(trainer.optimizer)
    row = {**figures(meter.laps, arguments.warmup), **(memory_figures(managed) or {})}
    done = work.peers_work(
        arguments,
        real_tokens=row["real_tokens_per_step"],
        slot_tokens=row["slot_tokens_per_step"],
        label_tokens=row["label_tokens_per_step"],
        masked_pairs=statistics.mean(meter.masked_pairs[arguments.warmup :]),
        pairs_per_token=pairs_per_token,
    )
    return {**row, **work.step_figures(trainer.model.config, work.peers_run(arguments), done)}


def figures(laps: list[Lap], warmup: int) -> dict[str, Any]:
    """`lap_figures`, the laps themselves, so that those of several turns can be joined, and the GPU's state now."""
    state = gpu_state()
    after = {} if state is None else {"gpu_after": state.model_dump(mode="json")}
    return {**lap_figures(laps, warmup), "laps": [asdict(lap) for lap in laps], **after}
