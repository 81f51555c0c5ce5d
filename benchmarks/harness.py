"""What every benchmark of a training step shares: model, packs, steps, timing, and a profile by class of kernel."""

from __future__ import annotations

import gc
import statistics
import time
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from transformers import AutoTokenizer, LlamaForCausalLM

from packloop.config import DataConfig, LoraConfig
from packloop.data.loader import PackLoader, build_data
from packloop.engine.loop import train_step
from packloop.engine.model import attach_adapter
from packloop.engine.optim import AdamW, FlatParameters
from packloop.kernels.patch import patched

# Name fragments of GPU kernels -> class, first match wins.
KERNEL_CLASSES = (
    ("nf4 dequantisation", ("_nf4_dequantize", "kDequantize")),
    ("attention", ("flash", "fmha", "attention", "cudnn_generated", "FlashAttn")),
    ("dropout + lora", ("_project_kernel", "_add_input_gradient", "_weight_gradient_kernel", "_dropout_kernel")),
    ("rope", ("_rope_kernel",)),
    ("norm", ("_rms_norm",)),
    ("activation", ("_swiglu", "silu")),
    ("optimizer", ("Optimizer", "optimizer", "adam")),
    ("gemm", ("gemm", "nvjet", "cutlass", "sm90_xmma", "cublas", "Kernel2", "splitK")),
    ("head + loss", ("logsumexp", "softmax", "scatter", "gather", "index")),
    ("copies", ("Memcpy", "Memset", "copy", "fill", "Fill", "CatArray")),
)


@dataclass(frozen=True)
class Lap:
    """One timed optimizer step."""

    ms: float
    real_tokens: int
    slot_tokens: int


class StepBench:
    """Steps of packloop's own `train_step` on one base model; adapters and settings are a measurement's own.

    base: frozen, in memory, left as it was. source, columns: rows for the packs; tokenizer: its name or directory.
    """

    def __init__(self, base: LlamaForCausalLM, tokenizer: str, source: str, columns: dict[str, str], length: int):
        self.base, self.length = base, length
        self.accelerator = Accelerator(mixed_precision="no")
        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        self.source, self.columns = source, columns
        self._documents = {}

    @contextmanager
    def ready(self, lora: LoraConfig, *, packing: str, batch: int, accumulation: int = 2, **options):
        """Yields a function that takes one step and returns its `Lap`."""
        torch.set_float32_matmul_precision("high")
        torch.manual_seed(0)
        model = attach_adapter(self.base, lora, base_name="synthetic")
        flat = FlatParameters(model)
        optimizer = AdamW(flat, name="paged_adamw_32bit", betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
        loader = PackLoader(
            self._data(packing),
            packing=packing,
            max_length=self.length,
            per_device_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            rank=0,
            world_size=1,
            seed=0,
            shuffle=True,
            pad_token_id=self.tokenizer.eos_token_id,
        )
        model.train()

        def step() -> Lap:
            micros = loader.next_window()
            while len(micros) < accumulation or micros[-1].input_ids.shape[0] < batch:  # only whole windows are timed
                micros = loader.next_window()
            torch.cuda.synchronize()
            start = time.perf_counter()
            report = train_step(
                llama,
                flat,
                optimizer,
                micros,
                accelerator=self.accelerator,
                learning_rate=2e-4,
                max_grad_norm=0.3,
            )
            torch.cuda.synchronize()
            self.last_report = report
            return Lap((time.perf_counter() - start) * 1e3, report.real_tokens, report.slot_tokens)

        try:
            with patched(model, **options) as llama:
                yield step
        finally:
            model.unload()
            gc.collect()
            torch.cuda.empty_cache()

    def measure(self, lora: LoraConfig, *, warmup: int = 3, steps: int = 10, **settings) -> dict:
        """Median real and slot tokens a second, their spread, peak memory, losses; out of memory is a row."""
        torch.cuda.reset_peak_memory_stats()
        try:
            with self.ready(lora, **settings) as step:
                losses = []
                for _ in range(warmup):
                    step()
                    losses.append(self.last_report.loss)
                laps = [step() for _ in range(steps)]
        except torch.OutOfMemoryError:
            return {**settings, "out_of_memory": True}
        rates = sorted(lap.real_tokens / lap.ms * 1e3 for lap in laps)
        return {
            **settings,
            "real_tokens_per_s": statistics.median(rates),
            "real_tokens_per_s_range": [rates[0], rates[-1]],
            "slot_tokens_per_s": statistics.median(lap.slot_tokens / lap.ms * 1e3 for lap in laps),
            "step_ms": statistics.median(lap.ms for lap in laps),
            "steps": steps,
            "peak_allocated_gib": torch.cuda.max_memory_allocated() / 2**30,
            "peak_reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
            "losses": losses,
        }

    def profile(self, lora: LoraConfig, *, warmup: int = 3, top: int = 0, **settings) -> dict:
        """GPU milliseconds of one step by class of kernel, and the share of the step in which no kernel ran."""
        from torch.profiler import ProfilerActivity, profile

        with self.ready(lora, **settings) as step:
            for _ in range(warmup):
                step()
            with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
                lap = step()
        kernels = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        by_class, by_name = defaultdict(float), defaultdict(lambda: [0.0, 0])
        for event in kernels:
            milliseconds = event.time_range.elapsed_us() / 1e3
            by_class[classify(event.name)] += milliseconds
            by_name[event.name][0] += milliseconds
            by_name[event.name][1] += 1
        busy_ms = _union_ms([(event.time_range.start, event.time_range.end) for event in kernels])
        names = sorted(by_name.items(), key=lambda item: -item[1][0])[:top]
        return {
            "step_ms": lap.ms,
            "busy_ms": busy_ms,
            "idle_share": 1 - busy_ms / lap.ms,
            "by_class_ms": dict(sorted(by_class.items(), key=lambda item: -item[1])),
            "kernels": [(name[:90], round(ms, 2), count) for name, (ms, count) in names],
        }

    def _data(self, packing: str):
        if packing not in self._documents:
            config = DataConfig(
                source=self.source, columns=self.columns, max_length=self.length, packing=packing, eval_split=0
            )
            self._documents[packing] = build_data(config, self.tokenizer, seed=0).train
        return self._documents[packing]


def classify(name: str) -> str:
    return next((label for label, parts in KERNEL_CLASSES if any(part in name for part in parts)), "other elementwise")


def _union_ms(spans: list[tuple[float, float]]) -> float:
    """Milliseconds covered by any of the spans, which are in microseconds."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total / 1e3
