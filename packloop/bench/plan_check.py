"""Predictions beside measurements: of recorded runs, and of two real steps on the GPU at hand."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from packloop.bench.cell import load_subject
from packloop.bench.plan import Forecast
from packloop.bench.plan_loads import attended_squares, load_from
from packloop.bench.probe import Probe, probe
from packloop.bench.synthetic import shape_config
from packloop.config import RunConfig
from packloop.engine.budget import is_out_of_memory
from packloop.engine.planner.policy import MemoryPlan, count_layers
from packloop.engine.planner.search import Candidate, Search
from packloop.engine.planner.shape import ModelShape
from packloop.engine.planner.time import Load
from packloop.errors import InputError, OutOfMemoryError
from packloop.gpus import Gpu

# What a prediction may be off by: reserved memory and tokens a second.
MEMORY_BOUND, SPEED_BOUND = 0.05, 0.10


@dataclass(frozen=True)
class Check:
    """One configuration: GiB reserved and real tokens a second, predicted and measured."""

    name: str
    reserved_gib: tuple[float, float]
    tokens_per_s: tuple[float, float]
    step_ms: tuple[float, float]
    allocated_gib: tuple[float, float]

    @property
    def memory_error(self) -> float:
        return self.reserved_gib[0] / self.reserved_gib[1] - 1

    @property
    def speed_error(self) -> float:
        return self.tokens_per_s[0] / self.tokens_per_s[1] - 1

    @property
    def holds(self) -> bool:
        return abs(self.memory_error) <= MEMORY_BOUND and abs(self.speed_error) <= SPEED_BOUND

    def values(self) -> dict[str, Any]:
        """As JSON holds it."""
        pairs = {
            name: {"predicted": round(pair[0], 3), "measured": round(pair[1], 3)}
            for name, pair in vars(self).items()
            if name != "name"
        }
        errors = {"memory_error": round(self.memory_error, 4), "speed_error": round(self.speed_error, 4)}
        return {"name": self.name, **pairs, **errors, "holds": self.holds}


def predict_settings(config: RunConfig, shape: ModelShape, gpu: Gpu, load: Load) -> Candidate:
    """The prediction for a configuration without `auto` and these micro-batches."""
    counts = (config.train.gradient_checkpointing, config.kernels.dequant_cache, config.kernels.keep_inputs)
    plan = MemoryPlan(*(count_layers(value, shape.num_layers) for value in counts))
    is_paged = config.train.optim == "paged_adamw_32bit"
    search = Search(shape, gpu, lambda _: load, attentions=[config.kernels.attention], is_paged=is_paged)
    train = config.train
    return search.predict(train.per_device_train_batch_size, train.gradient_accumulation_steps, plan)


def check_recorded(row: dict[str, Any], config: RunConfig, gpu: Gpu) -> Check:
    """row: of `benchmarks/check_plan.py`, with what was measured; config: its case's, any `auto` still in it."""
    resolved = row["resolved"]
    train = config.train.model_copy(update={"gradient_checkpointing": resolved["recompute"]})
    settled = {key: resolved[key] for key in config.kernels.model_fields_set} | {"gated": resolved.get("gated", "none")}
    kernels = config.kernels.model_copy(update=settled)
    config = config.model_copy(update={"train": train, "kernels": kernels})
    shape = ModelShape.of_run(shape_config(row["case"]["shape"]), config)
    figures, documents = row["figures"], row["documents"]
    slots = [sum(lengths) for lengths in documents]
    prefixes = row.get("prefixes", [None] * len(documents))
    squares = [attended_squares(*micro) for micro in zip(documents, prefixes, strict=True)]
    load = Load(
        slots=statistics.mean(slots),
        real_tokens=figures["real_tokens_per_step"] / train.gradient_accumulation_steps,
        labels=statistics.mean(row["labels"]),
        squared_lengths=statistics.mean(squares),
        most_slots=max(slots),
        attention="",
        prefix_tokens=max((_longest_beginning(*micro) for micro in zip(documents, prefixes, strict=True)), default=0),
    )
    return _check(row["name"], predict_settings(config, shape, gpu, load), figures, row["memory"])


def _longest_beginning(lengths: list[int], prefix_of: list[int] | None) -> int:
    return max((lengths[number] for number in prefix_of or () if number >= 0), default=0)


def check_at_hand(forecast: Forecast, *, synthetic: str | None) -> Check:
    """Two real steps of the forecast's best settings, after two to warm up, on the GPU at hand.

    InputError without a GPU; OutOfMemoryError where the steps do not fit after all.
    """
    if not torch.cuda.is_available():
        raise InputError("no GPU at hand: --probe takes two steps on one")
    best = forecast.best[0]
    config = settle(forecast.config, best, forecast.budget_gib)
    subject = load_subject(config, synthetic, None)
    data = subject.data(config)
    try:
        measured = probe(config, subject.base, data, subject.tokenizer.pad_token_id, timed_steps=2)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:200]
        raise OutOfMemoryError(
            f"the settings do not fit, {best.memory.counted_gib:.2f} GiB were predicted: {reason}"
        ) from error
    return check_probe(measured, forecast.shape, forecast.gpu)


def settle(config: RunConfig, best: Candidate, budget_gib: float) -> RunConfig:
    """The configuration with a candidate's settings and the budget."""
    train = {
        "per_device_train_batch_size": best.batch,
        "gradient_accumulation_steps": best.accumulation,
        "gradient_checkpointing": best.plan.recompute_layers,
        "memory_budget_gib": budget_gib,
    }
    kernels = {
        "attention": best.attention,
        "dequant_cache": best.plan.cached_layers,
        "keep_inputs": best.plan.keep_inputs_layers,
    }
    if best.is_gated:
        kernels["gated"] = "quack"
    return config.model_copy(
        update={
            "train": config.train.model_copy(update=train),
            "kernels": config.kernels.model_copy(update=kernels),
        }
    )


def check_probe(measured: Probe, shape: ModelShape, gpu: Gpu) -> Check:
    """A probe's figures beside the prediction for the very micro-batches that it took."""
    load = replace(load_from(measured.micros), attention=measured.config.kernels.attention)
    predicted = predict_settings(measured.config, shape, gpu, load)
    return _check("two steps on the GPU at hand", predicted, measured.figures, measured.memory)


def table(checks: Sequence[Check], num_out_of_memory: int = 0) -> str:
    """Markdown: predicted, measured and error of each, and how many are within the bounds.

    num_out_of_memory: further configurations, for which there was no room; none of them is within the bounds.
    """
    lines = [
        "| configuration | reserved GiB, predicted | measured | error | real tokens/s, predicted | measured | error |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for one in checks:
        lines.append(
            f"| {one.name} | {one.reserved_gib[0]:.2f} | {one.reserved_gib[1]:.2f} | {one.memory_error:+.1%} | "
            f"{one.tokens_per_s[0]:,.0f} | {one.tokens_per_s[1]:,.0f} | {one.speed_error:+.1%} |"
        )
    held, total = sum(one.holds for one in checks), len(checks) + num_out_of_memory
    without_room = f"; {num_out_of_memory} ran out of memory" if num_out_of_memory else ""
    lines += [
        "",
        f"{held} of {total} within {MEMORY_BOUND:.0%} of memory and {SPEED_BOUND:.0%} of speed{without_room}.",
    ]
    return "\n".join(lines)


def _check(name: str, predicted: Candidate, figures: dict[str, Any], memory: dict[str, float]) -> Check:
    return Check(
        name,
        reserved_gib=(predicted.memory.reserved_gib, memory["peak_reserved_gib"]),
        tokens_per_s=(predicted.time.tokens_per_s, figures["real_tokens_per_s"]["median"]),
        step_ms=(predicted.time.step_ms, figures["step_ms"]["median"]),
        allocated_gib=(predicted.memory.allocated_gib, memory["peak_allocated_gib"]),
    )
