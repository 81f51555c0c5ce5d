"""README.md of a run or a merged model: what it is, how it is loaded, how it was trained, with what result."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from packloop import __version__
from packloop.config import RunConfig
from packloop.engine.finished_run import FinishedRun, read_metrics

Kind = Literal["adapter", "full", "merged"]

# Settings that say how the model came to be; paths, logging and checkpoint settings do not.
_SHOWN = {
    "model": ("dtype", "quantization", "double_quant"),
    "lora": ("r", "alpha", "dropout", "target_modules"),
    "data": ("split", "eval_split", "template", "max_length", "packing", "loss_on"),
    "train": (
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "learning_rate",
        "lr_scheduler_type",
        "warmup_ratio",
        "weight_decay",
        "max_grad_norm",
        "optim",
        "seed",
    ),
}


def write_adapter_card(run_dir: Path, config: RunConfig) -> None:
    """RUN/README.md, for the adapter or, with lora.enabled=false, for the model; results from RUN/metrics.jsonl."""
    kind = "adapter" if config.lora.enabled else "full"
    _write(run_dir, model_card(config, kind=kind, metrics=read_metrics(run_dir)))


def write_merged_card(directory: Path, run: FinishedRun, *, base: str) -> None:
    """README.md of the run's merged model. base: `original` or `dequantized`, as `merge` took it."""
    _write(directory, model_card(run.config, kind="merged", base=base, metrics=read_metrics(run.root)))


def model_card(
    config: RunConfig, *, kind: Kind, base: str | None = None, metrics: Sequence[dict[str, Any]] = ()
) -> str:
    """The card as Markdown with YAML front matter. Local paths are reduced to their last name."""
    base_name, is_hub_model = public_name(config.model.name_or_path)
    title = {
        "adapter": f"LoRA adapter for {base_name}",
        "full": f"{base_name}, all parameters trained",
        "merged": f"{base_name} with a LoRA adapter merged in",
    }[kind]
    sections = [
        _front_matter(config, kind),
        f"# {title}",
        _about(config, kind, base),
        f"## Loading\n\n```python\n{_snippet(config, kind, is_hub_model)}\n```",
        f"## Prompt\n\n{_prompt(config)}",
        f"## Training\n\n{_table(_settings(config))}",
    ]
    if results := _results(metrics):
        sections.append(f"## Results\n\n{_table(results)}")
    return "\n\n".join(sections) + "\n"


def _write(directory: Path, text: str) -> None:
    (directory / "README.md").write_text(text, encoding="utf-8")


def public_name(source: str) -> tuple[str, bool]:
    """(the name to show, whether it is a Hub name). A path shows its last part: directories may name people."""
    if source == "bundled":
        return "packloop's bundled model", False
    is_hub_name = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source) is not None and not source.startswith(".")
    if is_hub_name and not Path(source).exists():
        return source, True
    return Path(source).name, False


def _front_matter(config: RunConfig, kind: Kind) -> str:
    values: dict[str, Any] = {"library_name": "peft" if kind == "adapter" else "transformers"}
    base_name, is_hub_model = public_name(config.model.name_or_path)
    if is_hub_model:
        values["base_model"] = base_name
    data_name, is_hub_data = public_name(config.data.source)
    if is_hub_data and not data_name.endswith((".json", ".jsonl", ".csv", ".parquet")):
        values["datasets"] = [data_name]
    values["pipeline_tag"] = "text-generation"
    values["tags"] = ["packloop", "llama"] + (["lora"] if kind != "full" else []) + _quantization_tags(config)
    return "---\n" + yaml.safe_dump(values, sort_keys=False, allow_unicode=True) + "---"


def _quantization_tags(config: RunConfig) -> list[str]:
    return ["qlora"] if config.lora.enabled and config.model.quantization == "nf4" else []


def _about(config: RunConfig, kind: Kind, base: str | None) -> str:
    base_name, _ = public_name(config.model.name_or_path)
    revision = f" (revision `{config.model.revision}`)" if config.model.revision else ""
    data_name = (
        "packloop's bundled data" if config.data.source == "bundled" else f"`{public_name(config.data.source)[0]}`"
    )
    how = {"nf4": "on its weights in 4 bits (NF4)", "none": f"on its weights in {config.model.dtype}"}
    of = f"`{base_name}`{revision}"
    lines = {
        "adapter": f"A LoRA adapter for {of}, trained {how[config.model.quantization]} with {data_name}.",
        "full": f"{of} with every parameter trained further, on {data_name}.",
        "merged": f"{of} with the LoRA adapter merged in that was trained on {data_name}.",
    }
    about = lines[kind] + f" Made by packloop {__version__}."
    merged_into = {
        "original": "The adapter was added to the original checkpoint's weights",
        "dequantized": "The adapter was added to the NF4 weights that it was trained on, expanded",
    }
    if kind == "merged" and base in merged_into:
        about += f" {merged_into[base]}; sums in float32, rounded once to {config.model.dtype}."
    return about


def _snippet(config: RunConfig, kind: Kind, is_hub_model: bool) -> str:
    dtype = f"torch.{config.model.dtype}"
    here = 'here = "."  # this directory, or the name of this repository'
    load_tokenizer = "tokenizer = AutoTokenizer.from_pretrained(here)"
    if kind != "adapter":
        lines = ["import torch", "from transformers import AutoModelForCausalLM, AutoTokenizer", "", here]
        lines += [f"model = AutoModelForCausalLM.from_pretrained(here, dtype={dtype})", load_tokenizer]
        return "\n".join(lines)
    source, revision, quantized = config.model.name_or_path, "", config.model.quantization == "nf4"
    imports = "AutoModelForCausalLM, AutoTokenizer" + (", BitsAndBytesConfig" if quantized else "")
    lines = ["import torch", "from peft import PeftModel", f"from transformers import {imports}"]
    if source == "bundled":
        lines += ["from packloop.engine.model import resolve_name", "", 'base = resolve_name("bundled")']
    elif is_hub_model:
        lines += ["", f'base = "{source}"']
        revision = f', revision="{config.model.revision}"' if config.model.revision else ""
    else:
        lines += ["", f'base = "{public_name(source)[0]}"  # the directory of the base model']
    if quantized:
        lines += [
            "nf4 = BitsAndBytesConfig(",
            '    load_in_4bit=True, bnb_4bit_quant_type="nf4",',
            f"    bnb_4bit_use_double_quant={config.model.double_quant}, bnb_4bit_compute_dtype={dtype},",
            ")",
        ]
    quantization = ", quantization_config=nf4" if quantized else ""
    lines += [
        here,
        f"model = AutoModelForCausalLM.from_pretrained(base{revision}, dtype={dtype}{quantization})",
        "model = PeftModel.from_pretrained(model, here)",
        load_tokenizer,
    ]
    return "\n".join(lines)


def _prompt(config: RunConfig) -> str:
    template = config.data.template
    if isinstance(template, str):
        return f"packloop's template `{template}`; `packloop generate` applies it."
    return f"```text\n{template.prompt}\n```"


def _settings(config: RunConfig) -> list[tuple[str, str]]:
    values = config.model_dump(mode="json")
    rows = []
    for section, keys in _SHOWN.items():
        if section == "lora" and not config.lora.enabled:
            continue
        for key in keys:
            value = values[section][key]
            if isinstance(value, dict):
                value = "custom"
            rows.append((f"`{section}.{key}`", ", ".join(value) if isinstance(value, list) else str(value)))
    return rows


def _results(metrics: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """Steps, final losses and tokens, each where the log has it."""
    steps = [record for record in metrics if "loss" in record]
    evaluations = [record["eval_loss"] for record in metrics if "eval_loss" in record]
    if not steps:
        return []
    rows = [("optimizer steps", str(steps[-1]["step"])), ("loss of the last step", f"{steps[-1]['loss']:.4f}")]
    if evaluations:
        rows.append(("loss on held-out rows", f"{evaluations[-1]:.4f}"))
    for name in ("real_tokens", "label_tokens"):
        if all(name in record for record in steps):
            label = {"real_tokens": "tokens seen", "label_tokens": "tokens in the loss"}[name]
            rows.append((label, f"{sum(record[name] for record in steps):,}"))
    return rows


def _table(rows: Sequence[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)])
