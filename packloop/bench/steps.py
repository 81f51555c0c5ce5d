"""Training steps as `packloop train` takes them, on a base that is given, and what a lap of them is worth."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from transformers import LlamaForCausalLM

from packloop.config import RunConfig
from packloop.data.loader import Batch, PackLoader, TrainingData
from packloop.engine.batch import Micro, Windows
from packloop.engine.budget import GIB
from packloop.engine.loop import train_step
from packloop.engine.model import attach_adapter
from packloop.engine.optim import FlatParameters
from packloop.engine.plan import finds_tokens, layout_preparation, patch_options, resolve_auto, resolve_kernels
from packloop.engine.planner.layout import arrangement
from packloop.engine.run import make_loader, make_optimizer, set_numerics
from packloop.errors import InputError
from packloop.kernels.patch import patched


@dataclass(frozen=True)
class Lap:
    """One optimizer step. ms: on the device's clock, from an idle device to an idle device; loss: nats a label.

    grad_norm: L2, before clipping; None where the trainer does not tell.
    """

    ms: float
    real_tokens: int
    slot_tokens: int
    label_tokens: int
    loss: float
    grad_norm: float | None = None


class LapTimer:
    """Milliseconds between `start` and `stop`: by CUDA events where there is a GPU, else by the wall clock.

    Both wait for the device, so that a lap holds neither work of before nor leaves some for after.
    """

    def start(self) -> None:
        synchronize()
        self._begun = time.perf_counter()
        if torch.cuda.is_available():
            self._events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._events[0].record()

    def stop(self) -> float:
        if torch.cuda.is_available():
            self._events[1].record()
            synchronize()
            return self._events[0].elapsed_time(self._events[1])
        return (time.perf_counter() - self._begun) * 1e3


class _WholeWindows:
    """A loader's windows without those at an epoch's end that are short: all steps are of as many packs."""

    def __init__(self, loader: PackLoader, batch: int, accumulation: int):
        self._loader, self._batch, self._accumulation = loader, batch, accumulation

    def next_window(self) -> list[Batch]:
        while True:
            micros = self._loader.next_window()
            if len(micros) == self._accumulation and micros[-1].input_ids.shape[0] == self._batch:
                return micros

    def state(self) -> dict[str, int]:
        return self._loader.state()


class Job:
    """A frozen base with a fresh adapter, its packs and its optimizer, as `train` puts them together.

    base: left as it was by `close`. data: of `config.data` and the tokenizer that pad_token_id belongs to.
    """

    def __init__(self, config: RunConfig, base: LlamaForCausalLM, data: TrainingData, pad_token_id: int):
        set_numerics(config)
        torch.manual_seed(config.train.seed)
        self.config = config
        self.accelerator = Accelerator(mixed_precision="no", cpu=not torch.cuda.is_available())
        self.loader = make_loader(config, data, pad_token_id, self.accelerator)
        train = config.train
        if self.loader.num_packs < train.per_device_train_batch_size * train.gradient_accumulation_steps:
            raise InputError(
                f"{self.loader.num_packs} packs make no step of {train.per_device_train_batch_size} x "
                f"{train.gradient_accumulation_steps}; give more rows or a smaller batch"
            )
        source = _WholeWindows(self.loader, train.per_device_train_batch_size, train.gradient_accumulation_steps)
        device = self.accelerator.device
        self._windows = Windows(source, device, arrange=arrangement(config.kernels), finds_tokens=finds_tokens(config))
        self.model = attach_adapter(base, config.lora, base_name="base")
        self.flat = FlatParameters(self.model)
        self.optimizer = make_optimizer(config, self.flat)

    def next_window(self) -> list[Micro]:
        """The micro-batches of the next step, all steps being of as many packs."""
        return self._windows.take()

    def resolve_kernels(self) -> None:
        """Settles what of `config` does not depend on memory, so that the next windows come as its steps take them."""
        self.config = resolve_kernels(self.config, self.model, self.loader, self.accelerator)
        self._windows.arrange = arrangement(self.config.kernels)

    def resolve(self) -> dict[str, Any]:
        """Settles every `auto` of `config`, which is replaced; returns the arguments for `patched`."""
        self.config = resolve_auto(
            self.config, self.model, self.loader, self.accelerator, paged_bytes=self.optimizer.paged_bytes
        )
        self._windows.arrange = arrangement(self.config.kernels)
        return patch_options(self.config, self.model)

    @contextmanager
    def stepping(self, options: dict[str, Any] | None = None) -> Iterator[Callable[[list[Micro]], Lap]]:
        """Yields a function that trains on one window and returns its lap. options: what `resolve` returned."""
        self.model.train()
        timer = LapTimer()
        options = self.resolve() if options is None else options
        self._windows.prepare_layout = layout_preparation(self.config)
        with patched(self.model, **options) as llama:

            def step(micros: list[Micro]) -> Lap:
                timer.start()
                report = train_step(
                    llama,
                    self.flat,
                    self.optimizer,
                    micros,
                    accelerator=self.accelerator,
                    learning_rate=self.config.train.learning_rate,
                    max_grad_norm=self.config.train.max_grad_norm,
                    meanwhile=self._windows.prepare,
                )
                ms = timer.stop()
                return Lap(
                    ms,
                    real_tokens=report.real_tokens,
                    slot_tokens=report.slot_tokens,
                    label_tokens=report.label_tokens,
                    loss=report.loss,
                    grad_norm=report.grad_norm,
                )

            yield step

    def close(self) -> None:
        """Takes the adapter off the base and gives its memory back."""
        self.model.unload()
        del self.model, self.flat, self.optimizer
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def spread(values: list[float]) -> dict[str, float]:
    """Median, quartiles and range."""
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": median, "q1": q1, "q3": q3, "min": min(values), "max": max(values)}


def lap_figures(laps: list[Lap], warmup: int) -> dict[str, Any]:
    """Rates and milliseconds of the laps after the first `warmup`, and the losses of all."""
    timed = laps[warmup:]
    return {
        "warmup_steps": warmup,
        "timed_steps": len(timed),
        "step_ms": spread([lap.ms for lap in timed]),
        "real_tokens_per_s": spread([lap.real_tokens / lap.ms * 1e3 for lap in timed]),
        "slot_tokens_per_s": spread([lap.slot_tokens / lap.ms * 1e3 for lap in timed]),
        "label_tokens_per_s": spread([lap.label_tokens / lap.ms * 1e3 for lap in timed]),
        "real_tokens_per_step": statistics.mean(lap.real_tokens for lap in timed),
        "slot_tokens_per_step": statistics.mean(lap.slot_tokens for lap in timed),
        "label_tokens_per_step": statistics.mean(lap.label_tokens for lap in timed),
        "step_ms_all": [round(lap.ms, 3) for lap in laps],
        "losses": [round(lap.loss, 5) for lap in laps],
    }


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def memory_figures(managed_bytes: int) -> dict[str, float] | None:
    """Peaks since `reset_peak`, in GiB; `peak_counted_gib`, reserved and managed, is what a cap limits."""
    if not torch.cuda.is_available():
        return None
    reserved_bytes = torch.cuda.max_memory_reserved()
    return {
        "peak_allocated_gib": torch.cuda.max_memory_allocated() / GIB,
        "peak_reserved_gib": reserved_bytes / GIB,
        "managed_gib": managed_bytes / GIB,
        "peak_counted_gib": (reserved_bytes + managed_bytes) / GIB,
    }
