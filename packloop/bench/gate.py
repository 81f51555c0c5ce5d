"""The loss gate: a cell's steps must be the reference's steps, or its speed says nothing.

Both take the same few optimizer steps on one window, the first of the epoch, from the same adapters; the losses
of all but the first step, and the gradients' norms, depend on what the updates before did. The reference takes the
window pack by pack, in padded rows and every document by itself, which is the same mathematics, so one reference serves
every split of a window into micro-batches and every way of laying documents out.

Dropout is off in these steps: implementations draw different masks, and no comparison could be exact. And the adapters
are random. With B = 0, as a fresh one has it, the first forward pass would not depend on them. PEFT draws A in the
base's dtype, so that in bf16 an implementation that multiplies by a bf16 copy of A sees the first updates rounded to
its grid, all the same way (a tenth more or less of what was learnt); values between the grid's points do not do that.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from packloop.bench.results import LossGate, Record
from packloop.config import RunConfig, parse_config

GATE_STEPS = 3
# Packs of a gate's step, unless one micro-batch has more: a reference with eager attention takes its time.
MOST_PACKS = 8
# Root mean square of an adapter's output for an input of 1.
ADAPTER_OUTPUT = 0.05
# Nats a label; and the relative difference of gradient norms that goes with it.
TOLERANCES = {"bfloat16": (1e-2, 2e-2), "float32": (1e-4, 1e-3)}
# Of `train`, what decides what is learnt; the rest decides how it is computed.
_LEARNING = ("learning_rate", "weight_decay", "max_grad_norm", "adam_beta1", "adam_beta2", "adam_epsilon", "seed")


@dataclass(frozen=True)
class GateRun:
    """What `GATE_STEPS` steps on one window gave. grad_norms: L2, before clipping."""

    losses: list[float]
    grad_norms: list[float]


class Reference(Record):
    """The steps that cells are held to. name: how they were taken."""

    name: str
    losses: list[float]
    grad_norms: list[float]


def gate_config(config: RunConfig) -> RunConfig:
    """A cell's resolved configuration for the steps of its gate."""
    most = max(1, MOST_PACKS // config.train.per_device_train_batch_size)
    accumulation = min(config.train.gradient_accumulation_steps, most)
    train = {"gradient_accumulation_steps": accumulation, "memory_budget_gib": None}
    return config.model_copy(
        update={
            "lora": config.lora.model_copy(update={"dropout": 0.0}),
            "train": config.train.model_copy(update=train),
        }
    )


def reference_config(config: RunConfig, way: RunConfig | None) -> RunConfig:
    """What a cell of `config` is held to: its data and its learning, computed as `way` does, pack by pack.

    Packs are rows with their padding, of which documents share nothing.
    way None: stock decoder layers with eager attention, every one recomputed, and the head and loss in PyTorch.
    """
    gate = gate_config(config)
    learning = {name: getattr(gate.train, name) for name in _LEARNING}
    if way is not None:
        kernels = way.kernels.model_dump(mode="json")
    else:
        kernels = {"attention": "eager", "layer": "stock", "dequant_cache": "none", "keep_inputs": "none"}
        kernels["cross_entropy"] = "torch"
    kernels |= {"padding": "keep", "prefix_reuse": "none"}
    train = {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": gate.train.per_device_train_batch_size * gate.train.gradient_accumulation_steps,
        "gradient_checkpointing": "all" if way is None else way.train.gradient_checkpointing,
        "optim": "adamw_32bit",
        **learning,
    }
    subject = {name: getattr(gate, name).model_dump(mode="json") for name in ("model", "lora", "data")}
    return parse_config({**subject, "train": train, "kernels": kernels})


def reference_key(config: RunConfig, synthetic: str | None, tokenizer: str | None) -> str:
    """A name for the steps of a `reference_config` on these weights and tokens: equal steps have equal names."""
    values = [config.model_dump(mode="json"), synthetic, tokenizer]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def lora_b_std(config: RunConfig) -> float:
    """Standard deviation of B, where A is uniform as PEFT draws it, with variance 1 / (3 x in features)."""
    lora = config.lora
    return ADAPTER_OUTPUT / (lora.alpha / lora.r * (lora.r / 3) ** 0.5)


def judge(run: GateRun, reference: Reference, dtype: str, tolerance: float | None) -> LossGate:
    """Whether the two took the same steps. tolerance: nats a label, default by dtype; the norms' goes with it."""
    allowed, allowed_gradient = TOLERANCES[dtype]
    if tolerance is not None:
        allowed, allowed_gradient = tolerance, allowed_gradient * tolerance / allowed
    difference = max(abs(a - b) for a, b in zip(run.losses, reference.losses, strict=True))
    norms = zip(run.grad_norms, reference.grad_norms, strict=True)
    gradient_difference = max(abs(a - b) / max(a, b, 1e-30) for a, b in norms)
    return LossGate(
        reference=reference.name,
        largest_difference=difference,
        allowed=allowed,
        passed=difference <= allowed and gradient_difference <= allowed_gradient,
        largest_gradient_difference=gradient_difference,
        allowed_gradient=allowed_gradient,
        losses=[round(loss, 6) for loss in run.losses],
        reference_losses=[round(loss, 6) for loss in reference.losses],
    )


def describe_failure(gate: LossGate) -> str:
    """One line for the row of a cell that failed."""
    return (
        f"its steps are not the reference's ({gate.reference}): losses differ by {gate.largest_difference:.2g} of "
        f"{gate.allowed:.2g} nats allowed, gradient norms by {gate.largest_gradient_difference:.2%} of "
        f"{gate.allowed_gradient:.2%}"
    )


def describe_way(config: RunConfig) -> str:
    """How a reference computes: its layer and its attention."""
    kernels: dict[str, Any] = config.kernels.model_dump()
    return f"{kernels['layer']} {kernels['attention']}, pack by pack"
