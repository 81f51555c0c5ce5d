"""Operations of a step, by the same rules for all sides (packloop/bench/flops.py).

Of a peer they follow from its settings and from what it is given: its documents are ours, its head multiplies every
slot, and its attention skips what a mask hides unless it is `eager`, or `sdpa` on packed documents.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

from benchmarks.peers import settings
from packloop.bench.flops import Work, count_parameters, executed_flops, needed_flops
from packloop.config import KernelsConfig, LoraConfig, RunConfig, TrainConfig


def lora_config(arguments: argparse.Namespace) -> LoraConfig:
    """The adapters that both sides train."""
    return LoraConfig(
        r=settings.LORA_RANK,
        alpha=settings.LORA_ALPHA,
        dropout=arguments.dropout,
        target_modules=settings.TARGETS[arguments.targets],
    )


def step_figures(config: Any, run: RunConfig, work: Work) -> dict[str, Any]:
    """For a row. config: the model's; work: of an average timed step; run: how it was done, every `auto` settled."""
    flops = {"needed": needed_flops(config, run.lora, work), "executed": executed_flops(config, run, work)}
    return {"flops_per_step": flops, "num_parameters": count_parameters(config)}


def peers_run(arguments: argparse.Namespace) -> RunConfig:
    """A peer's options in packloop's terms, as far as they decide what is executed."""
    attention = getattr(arguments, "attention", None)
    return RunConfig(
        lora=lora_config(arguments),
        train=TrainConfig(gradient_checkpointing="all" if arguments.checkpointing else "none"),
        kernels=KernelsConfig(attention=attention if attention in ("eager", "sdpa") else "flash_attn", layer="stock"),
    )


def peers_work(
    arguments: argparse.Namespace,
    *,
    real_tokens: float,
    slot_tokens: float,
    label_tokens: float,
    masked_pairs: float,
    pairs_per_token: float,
) -> Work:
    """Of an average step. masked_pairs: queries x keys of its micro-batches, whatever a mask hides."""
    attention = getattr(arguments, "attention", None)
    hides_by_mask = attention == "eager" or (attention == "sdpa" and arguments.packing == "bfd")
    return Work(
        slots=slot_tokens,
        real_tokens=real_tokens,
        label_tokens=label_tokens,
        head_rows=slot_tokens,
        pairs=pairs_per_token * real_tokens,
        visited_pairs=masked_pairs if hides_by_mask else pairs_per_token * slot_tokens,
    )


def pairs_per_token(packed: Iterable[dict], packing: str) -> float:
    """Mean number of keys that a token's query attends to, of all packs of a peer.

    packed: its rows, `input_ids` and for bfd `seq_lengths`, the documents' lengths within the row. A wrapped row is one
    text to all sides.
    """
    lengths = [n for row in packed for n in (row["seq_lengths"] if packing == "bfd" else [len(row["input_ids"])])]
    return sum(n * (n + 1) / 2 for n in lengths) / sum(lengths)
