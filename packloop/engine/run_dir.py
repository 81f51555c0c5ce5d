"""The output directory: what it must be before a run, what stands in it after one."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from pathlib import Path

from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from packloop.config import RunConfig, changed_keys, dump_config, load_config, parse_config
from packloop.engine.checkpoint import disk_errors, flush, write_atomically
from packloop.errors import ConfigError, InputError

logger = logging.getLogger(__name__)

# What ran before there was a choice, in runs whose resolved configuration does not name it.
_UNNAMED = {
    "kernels.matmul": "torch",
    "kernels.gated": "none",
    "kernels.token_reuse": "none",
    "kernels.lora": "fused",
    "kernels.padding": "keep",
    "kernels.prefix_reuse": "none",
}
# What a resumed run may have instead, since not every machine has what its checkpoint names.
_INSTEAD_ON_RESUME = {"kernels.gated": "none"}
# Settings that do not touch the numbers of a run, so a resumed run may have others.
_FREE_ON_RESUME = ("train.output_dir", "train.eval_every", "checkpoint.", "log.")
# Where a run keeps what it computes with: a run that memory ended goes on with others, and says which.
_MEMORY_ON_RESUME = (
    "train.gradient_checkpointing",
    "train.memory_budget_gib",
    "train.optim",
    "kernels.dequant_cache",
    "kernels.keep_inputs",
)
# What is lowered after a run has diverged: its steps from there on are others, and a line says which.
_STEP_SIZE_ON_RESUME = ("train.learning_rate", "train.max_grad_norm")


def may_change_on_resume(key: str) -> bool:
    """Whether a resumed run may have another value of this setting, given as section.key, than its checkpoint."""
    return key.startswith(_FREE_ON_RESUME) or key in (*_MEMORY_ON_RESUME, *_STEP_SIZE_ON_RESUME)


def config_for_resume(given: RunConfig, checkpoint_dir: Path) -> RunConfig:
    """The configuration to continue with: as given, with the choices that `auto` made in the checkpoint's run.

    Another use of memory or size of steps is logged. ConfigError names every other setting that differs and would
    change the run's numbers.
    """
    old = _resolved_config(checkpoint_dir / "config.resolved.yaml")
    values = given.model_dump()
    changed, of_memory = {}, []
    for key, (before, now) in changed_keys(old, given).items():
        if now == "auto":
            section, name = key.split(".")
            values[section][name] = getattr(getattr(old, section), name)
        elif _INSTEAD_ON_RESUME.get(key) == now:
            logger.warning("%s=%s in the checkpoint, %s from here on: equal to rounding only", key, before, now)
        elif key in _MEMORY_ON_RESUME:
            of_memory.append(f"{key} {_shown(before)} -> {_shown(now)}")
        elif key in _STEP_SIZE_ON_RESUME:
            logger.warning("%s: %s in the checkpoint, %s from here on", key, before, now)
        elif not may_change_on_resume(key):
            changed[key] = f"{key}: {before!r} in the checkpoint, {now!r} given"
    if changed:
        raise ConfigError(
            f"cannot resume under another configuration ({'; '.join(changed.values())}); "
            "give the checkpoint's values, or start a new run in another train.output_dir"
        )
    if of_memory:
        logger.info(
            "resumed with another use of memory, which changes no result beyond rounding: %s", ", ".join(of_memory)
        )
    return parse_config(values)


def _shown(value: object) -> str:
    return "null" if value is None else str(value)


def _resolved_config(path: Path) -> RunConfig:
    """A run's configuration, where nothing that `auto` chooses is `auto` any more."""
    values = load_config(path).model_dump()
    for key, ran in _UNNAMED.items():
        section, name = key.split(".")
        if values[section][name] == "auto":
            values[section][name] = ran
    return parse_config(values)


def write_run_files(run_dir: Path, config: RunConfig, environment: dict, tokenizer: PreTrainedTokenizerBase) -> None:
    """config.resolved.yaml, environment.json and the tokenizer: what generate, merge and a later resume need.

    InputError where the disk refuses.
    """
    # The tokenizers library says a full disk with a bare Exception, so room for its file is looked for beforehand.
    needed = 2 * len(tokenizer.backend_tokenizer.to_str().encode("utf-8"))
    with disk_errors(run_dir, needed=needed):
        run_dir.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(run_dir).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_atomically(
            run_dir / "config.resolved.yaml", lambda p: p.write_text(dump_config(config), encoding="utf-8")
        )
        write_atomically(run_dir / "environment.json", lambda p: p.write_text(json.dumps(environment, indent=2) + "\n"))
        tokenizer.save_pretrained(run_dir)


def write_final_weights(run_dir: Path, model: nn.Module) -> None:
    """`write_weights`, with each file in place only once all of them are whole. InputError where the disk refuses."""
    temporary = run_dir / ".weights.tmp"
    try:
        with disk_errors(run_dir, needed=sum(p.numel() * 4 for p in model.parameters() if p.requires_grad)):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            write_weights(temporary, model)
            for file in sorted(temporary.iterdir()):
                flush(file)
                os.replace(file, run_dir / file.name)
            flush(run_dir)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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
