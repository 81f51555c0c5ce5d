"""packloop's own training step, by turns: python -m benchmarks.peers.ours --tokenizer DIR --data FILE [options]

The base has the checkpoint's shape and random weights, and is made in memory. What is not given is chosen as
`packloop train` chooses it: kernels, attention, and what the memory is spent on. With --floor every timed step is
followed by the floor of that same step (packloop/bench/floor.py), in the same process.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers import live, measure, rows, settings, work
from benchmarks.peers.shapes import SHAPES, shape_config
from packloop.bench import steps
from packloop.bench.floor import Floor, floor_figures
from packloop.bench.flops import work_of
from packloop.bench.synthetic import random_model
from packloop.config import KernelsConfig, RunConfig, TrainConfig
from packloop.data.loader import TrainingData, build_data
from packloop.engine.budget import limit_memory
from packloop.engine.planner.layout import largest_micro

# Targets of a micro-batch that the floor has room for, to those of the first window's.
_SPARE = 1.1


def run_config(arguments: argparse.Namespace) -> RunConfig:
    """The run that the options describe; what they leave out stays `auto`."""
    return RunConfig(
        lora=work.lora_config(arguments),
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
            gated=arguments.gated,
            padding=arguments.padding,
            prefix_reuse=arguments.prefix_reuse,
        ),
    )


class Packloop:
    """A base in memory that gets a fresh adapter a turn. What `auto` chose is kept for turns of the same options."""

    who = "packloop"

    def __init__(self, arguments: argparse.Namespace):
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        limit_memory(arguments.memory_cap_gib)
        self._shape = shape_config(arguments.shape, arguments.tokenizer)
        self._base = random_model(self._shape, quantization="nf4", device=self._device, seed=arguments.seed)
        self._tokenizer = rows.load_tokenizer(arguments.tokenizer)
        self._data: dict[str, TrainingData] = {}
        self._resolved: dict[str, RunConfig] = {}

    def turn(self, arguments: argparse.Namespace) -> dict[str, Any]:
        asked = config = run_config(arguments)
        of_data = config.data.model_dump_json()
        if of_data not in self._data:
            self._data[of_data] = build_data(config.data, self._tokenizer, seed=0)
        config = self._resolved.get(asked.model_dump_json(), config)
        job = steps.Job(config, self._base, self._data[of_data], self._tokenizer.pad_token_id)
        try:
            row = self._run(job, arguments)
            self._resolved[asked.model_dump_json()] = job.config
        finally:
            job.close()
        return {**row, "asked": shown_config(asked)}

    def _run(self, job: steps.Job, arguments: argparse.Namespace) -> dict[str, Any]:
        job.resolve_kernels()  # which decide how micro-batches are laid out, and so what the floor is of
        first = job.next_window()
        # Before the plan, which then counts the floor's buffers as memory that is taken.
        dtype = getattr(torch, job.config.model.dtype)
        floor = Floor.of(self._shape, first, dtype, self._device) if arguments.floor else None
        if floor is not None:
            most_labels = max(micro.batch.label_index.numel() for micro in first)
            floor.make_room(largest_micro(job.config, job.loader).num_slots, round(_SPARE * most_labels))
        options = job.resolve()
        paged_bytes = job.optimizer.paged_bytes
        laps, floors_ms, timed = [], [], []
        with job.stepping(options) as step:
            steps.reset_peak()
            for number in range(arguments.warmup + arguments.steps):
                micros = first if number == 0 else job.next_window()
                laps.append(step(micros))
                if number >= arguments.warmup:
                    timed += [micro.batch for micro in micros]
                if floor is not None:
                    floors_ms.append(floor.step_ms(micros))
        row = {**measure.figures(laps, arguments.warmup), **(steps.memory_figures(paged_bytes) or {})}
        if floor is not None:
            row |= floor_figures(laps, floors_ms, floor, arguments.warmup)
        done = work_of(timed, job.config.kernels.attention)
        row |= work.step_figures(self._shape, job.config, done.over(arguments.steps))
        chosen = {**options, "operations": dataclasses.asdict(options["operations"])}
        return {**row, "chosen": chosen, "config": shown_config(job.config)}


def shown_config(config: RunConfig) -> dict[str, Any]:
    """The whole configuration, without the names of places on this machine."""
    shown = config.model_dump(mode="json")
    shown["data"]["source"] = Path(shown["data"]["source"]).name
    return shown


def layers(text: str) -> str | int:
    """`auto`, `all`, `none` or a number of layers."""
    return text if text in ("auto", "all", "none") else int(text)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = settings.job_parser(__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="llama2-7b")
    parser.add_argument("--tokenizer", required=True, help="directory")
    parser.add_argument("--attention", default="auto", help="a value of kernels.attention")
    parser.add_argument("--gated", choices=("auto", "quack", "none"), default="auto", help="a value of kernels.gated")
    parser.add_argument("--padding", choices=("auto", "drop", "keep"), default="auto", help="of kernels.padding")
    parser.add_argument(
        "--prefix-reuse", choices=("auto", "micro_batch", "none"), default="auto", help="of kernels.prefix_reuse"
    )
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--fused", dest="layer", action="store_const", const="fused", default="auto")
    kind.add_argument("--stock", dest="layer", action="store_const", const="stock")
    parser.add_argument("--recompute-layers", type=layers, default="auto")
    parser.add_argument("--cached-layers", type=layers, default="auto")
    parser.add_argument("--keep-inputs-layers", type=layers, default="auto")
    parser.add_argument("--floor", action="store_true", help="after every step, time its floor")
    return parser.parse_args(argv)


if __name__ == "__main__":
    live.serve(parse, Packloop)
