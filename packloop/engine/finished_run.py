"""What a finished run (or one of its checkpoints) left on disk: its configuration and its weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from packloop.config import RunConfig, load_config
from packloop.errors import ConfigError, InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONFIG_FILE = "config.resolved.yaml"
METRICS_FILE = "metrics.jsonl"
ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG_FILE = "adapter_config.json"
MODEL_FILES = ("model.safetensors", "model.safetensors.index.json")


@dataclass(frozen=True)
class FinishedRun:
    """`weights` is the directory that holds them: the run's own, or that of one of its checkpoints."""

    root: Path
    weights: Path
    config: RunConfig
    kind: Literal["adapter", "full"]


def open_run(path: str | Path) -> FinishedRun:
    """The run at RUN or RUN/checkpoints/step-N.

    ConfigError where there is none, InputError where its training has not finished.
    """
    path = Path(path)
    if not path.is_dir():
        raise ConfigError(f"run {str(path)!r} is not a directory; give the train.output_dir of a finished run")
    parent = path.resolve().parent
    root = parent.parent if parent.name == "checkpoints" and (parent.parent / CONFIG_FILE).is_file() else path
    if not (root / CONFIG_FILE).is_file():
        raise ConfigError(f"run {str(path)!r} has no {CONFIG_FILE}; give the train.output_dir of a finished run")
    config = load_config(root / CONFIG_FILE)
    needed = (ADAPTER_FILE,) if config.lora.enabled else MODEL_FILES
    if not any((path / name).is_file() for name in needed):
        checkpoints = sorted((root / "checkpoints").glob("step-*")) if path == root else []
        remedy = "finish it with `packloop train --resume latest`"
        if checkpoints:
            remedy += f" or give its newest checkpoint, {checkpoints[-1]}"
        elif path == root:
            remedy = "it has no checkpoint either: train it anew"
        raise InputError(f"run {str(path)!r} has no {needed[0]}, so its training has not finished; {remedy}")
    if config.lora.enabled and not (path / ADAPTER_CONFIG_FILE).is_file():
        raise InputError(f"run {str(path)!r} has no {ADAPTER_CONFIG_FILE}, without which PEFT cannot load the adapter")
    return FinishedRun(root=root, weights=path, config=config, kind="adapter" if config.lora.enabled else "full")


def read_metrics(root: Path) -> list[dict]:
    """The objects of metrics.jsonl in order; [] where there is none. A last line cut short by a crash is left out."""
    try:
        lines = (root / METRICS_FILE).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    records = []
    for line in lines:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def lacks_evaluation(root: Path, step: int) -> bool:
    """Whether metrics.jsonl has this step, but no evaluation after it."""
    records = [record for record in read_metrics(root) if record.get("step") == step]
    return bool(records) and not any("eval_loss" in record for record in records)


def load_run_tokenizer(run: FinishedRun) -> PreTrainedTokenizerBase:
    """The tokenizer that was saved with the run; for a checkpoint of an unfinished run, the base model's."""
    from packloop.engine.model import load_tokenizer

    model = run.config.model
    if (run.root / "tokenizer_config.json").is_file():
        model = model.model_copy(update={"name_or_path": str(run.root), "revision": None, "trust_remote_code": False})
    return load_tokenizer(model)
