"""packloop's own training step: python -m benchmarks.peers.ours --tokenizer DIR --data FILE [options]

The base has the checkpoint's shape and random weights, and is made in memory. What is not given is chosen as
`packloop train` chooses it: kernels, attention, and what the memory is spent on. With --floor every timed step is
followed by the floor of that same step (packloop/bench/floor.py), in the same process.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from benchmarks.peers import measure, rows, settings
from benchmarks.peers.shapes import SHAPES, shape_config
from packloop.bench import steps
from packloop.bench.floor import Floor, floor_figures
from packloop.bench.synthetic import random_model
from packloop.config import KernelsConfig, LoraConfig, RunConfig, TrainConfig
from packloop.data.loader import build_data
from packloop.engine.loop import set_numerics


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


def train(arguments: argparse.Namespace) -> dict[str, Any]:
    config = run_config(arguments)
    set_numerics(config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    steps.cap_memory(arguments.memory_cap_gib, 0)
    shape = shape_config(arguments.shape, arguments.tokenizer)
    base = random_model(shape, quantization="nf4", device=device, seed=arguments.seed)
    tokenizer = rows.load_tokenizer(arguments.tokenizer)
    job = steps.Job(config, base, build_data(config.data, tokenizer, seed=0), tokenizer.pad_token_id)
    first = job.next_window()
    # Before the plan, which then counts the floor's buffers as memory that is taken.
    floor = Floor.of(shape, first, device) if arguments.floor else None
    options = job.resolve()
    steps.cap_memory(arguments.memory_cap_gib, job.optimizer.paged_bytes)
    laps, floors_ms = [], []
    with job.stepping(options) as step:
        steps.reset_peak()
        seconds_to_start = steps.process_seconds()
        for number in range(arguments.warmup + arguments.steps):
            micros = first if number == 0 else job.next_window()
            laps.append(step(micros))
            if floor is not None:
                floors_ms.append(floor.step_ms([micro.layout for micro in micros]))
    row = steps.lap_figures(laps, arguments.warmup)
    memory = steps.memory_figures(job.optimizer.paged_bytes) or {}
    fraction = {} if floor is None else floor_figures(laps, floors_ms, floor, arguments.warmup)
    return {**row, **memory, **fraction, "chosen": options, "seconds_to_start": seconds_to_start}


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
