"""packloop's own training step: python -m benchmarks.peers.ours --tokenizer DIR --data FILE [options]

The base has the checkpoint's shape and random weights, and is made in memory. What is not given is chosen as
`packloop train` chooses it: kernels, attention, and what the memory is spent on. With --floor every timed step is
followed by the floor of that same step (benchmarks/floor.py), in the same process.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from transformers import LlamaForCausalLM

from benchmarks.floor import Floor
from benchmarks.peers import measure, rows, settings
from benchmarks.peers.shapes import SHAPES, shape_config
from benchmarks.synthetic import random_model
from packloop.config import KernelsConfig, LoraConfig, RunConfig, TrainConfig
from packloop.data.loader import Batch
from packloop.engine.batch import to_device
from packloop.engine.loop import train_step
from packloop.engine.model import attach_adapter
from packloop.engine.optim import AdamW, FlatParameters
from packloop.engine.plan import patch_options, resolve_auto
from packloop.kernels.patch import patched


def run_config(arguments: argparse.Namespace) -> RunConfig:
    """The run that the options describe; what they leave out stays `auto`."""
    return RunConfig(
        lora=LoraConfig(
            r=settings.LORA_RANK,
            alpha=settings.LORA_ALPHA,
            dropout=arguments.dropout,
            target_modules=settings.TARGETS[arguments.targets],
        ),
        data=rows.data_config(arguments.data, arguments.packing, arguments.length),
        train=TrainConfig(
            per_device_train_batch_size=arguments.batch,
            gradient_accumulation_steps=arguments.accumulation,
            learning_rate=settings.LEARNING_RATE,
            max_grad_norm=settings.MAX_GRAD_NORM,
            gradient_checkpointing=arguments.recompute_layers,
            memory_budget_gib=arguments.memory_cap_gib,
            seed=arguments.seed,
        ),
        kernels=KernelsConfig(
            attention=arguments.attention,
            layer=arguments.layer,
            dequant_cache=arguments.cached_layers,
            keep_inputs=arguments.keep_inputs_layers,
        ),
    )


class Job:
    """One model, its packs and its optimizer, as `packloop train` puts them together."""

    def __init__(self, config: RunConfig, base: LlamaForCausalLM, windows: rows.Windows):
        self.config, self.windows = config, windows
        self.accelerator = Accelerator(mixed_precision="no", cpu=not torch.cuda.is_available())
        self.model = attach_adapter(base, config.lora, base_name="synthetic")
        self.flat = FlatParameters(self.model)
        self.optimizer = AdamW(
            self.flat,
            name=config.train.optim,
            betas=(config.train.adam_beta1, config.train.adam_beta2),
            eps=config.train.adam_epsilon,
            weight_decay=config.train.weight_decay,
        )

    def resolve(self) -> dict[str, Any]:
        """Settles every `auto` of the configuration; returns the arguments for `patched`."""
        self.config = resolve_auto(
            self.config, self.model, self.windows.loader, self.accelerator, paged_bytes=self.optimizer.paged_bytes
        )
        return patch_options(self.config, self.model)

    @contextmanager
    def stepping(self, options: dict[str, Any]) -> Iterator[Callable[[list[Batch]], measure.Lap]]:
        """Yields a function that trains on one window and returns its lap."""
        self.model.train()
        with patched(self.model, **options) as llama:

            def step(micros: list[Batch]) -> measure.Lap:
                measure.synchronize()
                start = time.perf_counter()
                report = train_step(
                    llama,
                    self.flat,
                    self.optimizer,
                    micros,
                    accelerator=self.accelerator,
                    learning_rate=self.config.train.learning_rate,
                    max_grad_norm=self.config.train.max_grad_norm,
                )
                measure.synchronize()
                return measure.Lap(
                    ms=(time.perf_counter() - start) * 1e3,
                    real_tokens=report.real_tokens,
                    slot_tokens=report.slot_tokens,
                    label_tokens=report.label_tokens,
                    loss=report.loss,
                )

            yield step


def train(arguments: argparse.Namespace) -> dict[str, Any]:
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    measure.cap_memory(arguments.memory_cap_gib, 0)
    shape = shape_config(arguments.shape, arguments.tokenizer)
    base = random_model(shape, quantization="nf4", device=device, seed=arguments.seed)
    windows = rows.Windows(
        arguments.data,
        rows.load_tokenizer(arguments.tokenizer),
        packing=arguments.packing,
        length=arguments.length,
        batch=arguments.batch,
        accumulation=arguments.accumulation,
        seed=arguments.seed,
    )
    first = windows.next()
    # Before the plan, which then counts the floor's buffers as memory that is taken.
    floor = Floor.of(shape, first, device) if arguments.floor else None
    torch.manual_seed(arguments.seed)
    job = Job(run_config(arguments), base, windows)
    options = job.resolve()
    measure.cap_memory(arguments.memory_cap_gib, job.optimizer.paged_bytes)
    laps, floors_ms = [], []
    with job.stepping(options) as step:
        measure.reset_peak()
        seconds_to_start = measure.process_seconds()
        for number in range(arguments.warmup + arguments.steps):
            micros = first if number == 0 else windows.next()
            laps.append(step(micros))
            if floor is not None:
                floors_ms.append(floor.step_ms([to_device(micro, device)[2] for micro in micros]))
    row = measure.laps_row(laps, arguments.warmup)
    memory = measure.memory_row(job.optimizer.paged_bytes)
    fraction = {} if floor is None else floor_row(laps, floors_ms, floor, arguments.warmup)
    return {**row, **memory, **fraction, "chosen": options, "seconds_to_start": seconds_to_start}


def floor_row(laps: list[measure.Lap], floors_ms: list[float], floor: Floor, warmup: int) -> dict[str, Any]:
    """How much of a step is floor, from medians, and what the floor consists of."""
    step_ms = statistics.median(lap.ms for lap in laps[warmup:])
    floor_ms = statistics.median(floors_ms[warmup:])
    tokens = statistics.mean(lap.real_tokens for lap in laps[warmup:])
    return {
        "fraction_of_floor": floor_ms / step_ms,
        "floor_ms": floor_ms,
        "floor_ms_all": [round(ms, 3) for ms in floors_ms],
        "floor_real_tokens_per_s": tokens / floor_ms * 1e3,
        "floor": floor.report(),
    }


def layers(text: str) -> str | int:
    """`auto`, `all`, `none` or a number of layers."""
    return text if text in ("auto", "all", "none") else int(text)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = settings.job_parser(__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="llama2-7b")
    parser.add_argument("--tokenizer", required=True, help="directory")
    parser.add_argument("--attention", default="auto", help="a value of kernels.attention")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--fused", dest="layer", action="store_const", const="fused", default="auto")
    kind.add_argument("--stock", dest="layer", action="store_const", const="stock")
    parser.add_argument("--recompute-layers", type=layers, default="auto")
    parser.add_argument("--cached-layers", type=layers, default="auto")
    parser.add_argument("--keep-inputs-layers", type=layers, default="auto")
    parser.add_argument("--floor", action="store_true", help="after every step, time its floor")
    return parser.parse_args(argv)


def main() -> None:
    arguments = parse()
    row = measure.or_out_of_memory(lambda: train(arguments))
    settings.print_row("packloop", row, arguments, measure.device_name())


if __name__ == "__main__":
    main()
