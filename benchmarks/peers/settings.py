"""What every process of the comparison is told. Imports no torch."""

from __future__ import annotations

import argparse
from typing import Any

TARGETS = {
    "qv": ["q_proj", "v_proj"],
    "all-linear": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
# The template's fields and the columns of the rows that have other names.
COLUMNS = {"response": "output"}
LEARNING_RATE = 2e-4
MAX_GRAD_NORM = 0.3
LORA_RANK, LORA_ALPHA = 64, 16
# Nothing beside the steps: no evaluation, no saving, no reports, no look at every loss.
QUIET_TRAINER = {
    "save_strategy": "no",
    "eval_strategy": "no",
    "logging_strategy": "no",
    "logging_nan_inf_filter": False,
    "report_to": "none",
    "disable_tqdm": True,
    "weight_decay": 0.0,
    "dataloader_num_workers": 0,
    "dataloader_drop_last": True,
}
# Beside those that every benchmark names.
PACKAGES = ("flash-attn-4", "nvidia-cutlass-dsl", "trl", "liger-kernel", "unsloth", "unsloth-zoo", "xformers")
# What a turn may change of a model that is loaded, by those who load one for all their turns.
_OF_A_TURN = ("batch", "accumulation", "warmup", "steps")
_NO_SETTINGS = ("model", "data", "tokenizer", "rows_fd", "commit")


def job_parser(description: str) -> argparse.ArgumentParser:
    """Options that ours and the peers share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", required=True, help="JSON rows with the fields instruction and output")
    parser.add_argument("--targets", choices=TARGETS, default="qv", help="linear layers that get an adapter")
    parser.add_argument("--dropout", type=float, default=0.1, help="on the adapters' input")
    parser.add_argument("--batch", type=int, default=4, help="packs a micro-batch")
    parser.add_argument("--accumulation", type=int, default=2, help="micro-batches an optimizer step")
    parser.add_argument("--length", type=int, default=2048, help="tokens a pack")
    parser.add_argument("--packing", choices=("bfd", "wrapped"), default="bfd")
    parser.add_argument("--warmup", type=int, default=3, help="steps before the timed ones")
    parser.add_argument("--steps", type=int, default=10, help="timed steps")
    parser.add_argument("--memory-cap-gib", type=float, help="reserved memory allowed, managed memory counted in")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows-fd", type=int, default=1, help="file descriptor that rows are written to")
    parser.add_argument("--commit", help="of the source, where git cannot tell")
    return parser


def peer_parser(description: str) -> argparse.ArgumentParser:
    parser = job_parser(description)
    parser.add_argument("--model", required=True, help="directory of the checkpoint")
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=True)
    return parser


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options and what all sides share for the row, without the names of places on this machine."""
    options = {name: value for name, value in vars(arguments).items() if name not in _NO_SETTINGS}
    return {**options, "lora_r": LORA_RANK, "lora_alpha": LORA_ALPHA}


def check_turn(loaded: argparse.Namespace, turn: argparse.Namespace) -> None:
    """ValueError where a turn changes what the model was loaded with."""
    before, now = vars(loaded), vars(turn)
    changed = [name for name in now if now[name] != before[name] and name not in _OF_A_TURN]
    if changed:
        raise ValueError(f"a turn cannot change {', '.join(changed)}; that takes a process of its own")
