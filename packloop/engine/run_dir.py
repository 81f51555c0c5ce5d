"""The output directory: what it must be before a run, what stands in it after one."""

from __future__ import annotations

import json
from pathlib import Path

from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from packloop.config import RunConfig, changed_keys, dump_config, load_config, parse_config
from packloop.engine.checkpoint import write_atomically
from packloop.errors import ConfigError, InputError

# Settings that do not touch the numbers of a run, so a resumed run may have others.
_FREE_ON_RESUME = ("train.output_dir", "train.eval_every", "checkpoint.", "log.")


def check_output_dir(path: Path, *, resume: str | None) -> None:
    """InputError where a new run would mix with what is in the directory, naming the choices."""
    if resume is None and path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(
            f"train.output_dir={str(path)!r} is not empty; continue the run in it with --resume latest, "
            "or choose another train.output_dir, or remove it"
        )


def config_for_resume(given: RunConfig, checkpoint_dir: Path) -> RunConfig:
    """The configuration to continue with: as given, with the choices that `auto` made in the checkpoint's run.

    ConfigError names every setting that differs and would change the run's numbers.
    """
    old = load_config(checkpoint_dir / "config.resolved.yaml")
    values = given.model_dump()
    changed = {}
    for key, (before, now) in changed_keys(old, given).items():
        if now == "auto":
            section, name = key.split(".")
            values[section][name] = getattr(getattr(old, section), name)
        elif not key.startswith(_FREE_ON_RESUME):
            changed[key] = f"{key}: {before!r} in the checkpoint, {now!r} given"
    if changed:
        raise ConfigError(
            f"cannot resume under another configuration ({'; '.join(changed.values())}); "
            "give the checkpoint's values, or start a new run in another train.output_dir"
        )
    return parse_config(values)


def write_run_files(run_dir: Path, config: RunConfig, environment: dict, tokenizer: PreTrainedTokenizerBase) -> None:
    """config.resolved.yaml, environment.json and the tokenizer: what generate, merge and a later resume need."""
    run_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(run_dir / "config.resolved.yaml", lambda p: p.write_text(dump_config(config), encoding="utf-8"))
    write_atomically(run_dir / "environment.json", lambda p: p.write_text(json.dumps(environment, indent=2) + "\n"))
    tokenizer.save_pretrained(run_dir)


def write_weights(directory: Path, model: nn.Module) -> None:
    """The trained weights in `directory`, as stock PEFT (or, without LoRA, stock transformers) loads them."""
    if isinstance(model, PeftModel):
        adapter = model.peft_config["default"]
        save_file(trained_tensors(model), directory / "adapter_model.safetensors", metadata={"format": "pt"})
        was_inference, adapter.inference_mode = adapter.inference_mode, True
        adapter.save_pretrained(directory)
        adapter.inference_mode = was_inference
    else:
        save_file(trained_tensors(model), directory / "model.safetensors", metadata={"format": "pt"})
        was_cached, model.config.use_cache = model.config.use_cache, True
        model.config.save_pretrained(directory)
        model.config.use_cache = was_cached


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Trained parameters on the CPU under the names of their file: PEFT's leave out the adapter's own name."""
    return {
        name.replace(".default.", "."): p.detach().to("cpu", copy=True).contiguous()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def load_trained_tensors(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copies saved weights into the model's parameters in place. InputError where names or shapes do not fit."""
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        saved = tensors.get(name.replace(".default.", "."))
        if saved is None or saved.shape != parameter.shape:
            found = "is missing" if saved is None else f"has shape {tuple(saved.shape)}"
            raise InputError(
                f"the checkpoint does not fit the model: {name} {found}, needed {tuple(parameter.shape)}; "
                "resume with the model and the lora settings it was written with"
            )
        parameter.data.copy_(saved)
