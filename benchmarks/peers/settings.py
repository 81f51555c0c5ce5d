"""What every process of the comparison is told, and the row that it prints. Imports no torch."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
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
_PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "bitsandbytes",
    "triton",
    "flash-attn",
    "flash-attn-4",
    "trl",
    "liger-kernel",
    "unsloth",
    "unsloth-zoo",
    "xformers",
)


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
    return parser


def peer_parser(description: str) -> argparse.ArgumentParser:
    parser = job_parser(description)
    parser.add_argument("--model", required=True, help="directory of the checkpoint")
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=True)
    return parser


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options for the row, without the names of places on this machine."""
    return {name: value for name, value in vars(arguments).items() if name not in ("model", "data", "tokenizer")}


def versions() -> dict[str, str]:
    """Package -> version of what is installed, and the commit of this repository where git knows it."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if git := shutil.which("git"):
        done = subprocess.run([git, "rev-parse", "--short", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True)
        if done.returncode == 0:
            found["commit"] = done.stdout.strip()
    return found


def print_row(who: str, row: dict[str, Any], arguments: argparse.Namespace, device: str) -> None:
    """The process's row, as its last line of output; `who` comes first, which is how a reader knows the line."""
    rest = {"settings": settings_of(arguments), "device": device, "versions": versions()}
    print(json.dumps({"who": who, **row, **rest}), flush=True)
