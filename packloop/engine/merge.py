"""The adapter added into the base model's weights, written as an ordinary model.

W' = round(W + alpha / r * B A), summed in float32 and rounded once to the run's dtype. Tensors are read, merged and
written one shard at a time, so that memory stays at about one shard (4 GB) whatever the model's size.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import torch
from peft import PeftConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GenerationConfig

from packloop.engine.base_weights import BaseWeights, find_base_weights
from packloop.engine.finished_run import ADAPTER_FILE, FinishedRun, load_run_tokenizer, open_run
from packloop.engine.model_card import write_merged_card
from packloop.errors import ConfigError, InputError

Base = Literal["original", "dequantized"]

# Room for the tokenizer, the model card and file-system blocks beside the weights.
_OTHER_BYTES = 32 * 2**20
# What PEFT can do to a LoRA layer and this package never writes: merging as plain LoRA would give another model.
_PLAIN_LORA = {
    "peft_type": "LORA",
    "bias": "none",
    "use_dora": False,
    "use_rslora": False,
    "fan_in_fan_out": False,
    "lora_bias": False,
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
}


def merge(run_dir: str | Path, output_dir: str | Path, *, base: Base, max_shard_size: str = "4GB") -> Path:
    """Writes the run's model with its adapter merged in to `output_dir`, whole or not at all, and returns that path.

    base: `original` adds the adapter to the checkpoint's own weights; `dequantized` to the NF4 weights that training
    saw, quantised as loading does it (on the GPU where there is one) and expanded again. Raises InputError for a run
    without an adapter, one that was not quantised (`dequantized`), an output directory that is not empty, an adapter
    that does not fit the base, and a disk that is too small.
    """
    run = open_run(run_dir)
    output_dir = Path(os.path.abspath(output_dir))
    shard_bytes = _parse_size(max_shard_size)
    _check_request(run, output_dir, base)
    dtype = getattr(torch, run.config.model.dtype)
    source = find_base_weights(run.config.model)
    shapes = source.shapes()
    pairs = _read_adapter(run, shapes)
    quantized = source.linear_weights() if base == "dequantized" else frozenset()
    shards = _plan_shards(shapes, dtype.itemsize, shard_bytes)
    _check_free_space(output_dir, sum(map(math.prod, shapes.values())) * dtype.itemsize + _OTHER_BYTES)

    with ExitStack() as open_files:
        read = source.reader(open_files)

        def merged(name: str) -> Tensor:
            weight = read(name)
            if tuple(weight.shape) != shapes[name]:
                raise InputError(
                    f"model.name_or_path={source.name!r}: {name} has shape {tuple(weight.shape)}, and its config.json "
                    f"says {shapes[name]}; is the download whole?"
                )
            if name in quantized:
                weight = nf4_round_trip(weight.to(dtype), double_quant=run.config.model.double_quant)
            return merge_weight(weight, pairs.get(name), dtype)

        with _published_directory(output_dir) as directory:
            _write_shards(directory, shards, merged)
            _write_configs(directory, source, dtype)
            load_run_tokenizer(run).save_pretrained(directory)
            write_merged_card(directory, run, base=base)
    return output_dir


@dataclass(frozen=True)
class LoraPair:
    """a: float32 [r, in_features]; b: float32 [out_features, r]; scale: alpha / r."""

    a: Tensor
    b: Tensor
    scale: float


def merge_weight(weight: Tensor, pair: LoraPair | None, dtype: torch.dtype) -> Tensor:
    """round_dtype(float32(weight) + scale * B A) on the CPU; without a pair the weight in `dtype`."""
    if pair is None:
        return weight.to(dtype)
    return torch.addmm(weight.to(torch.float32), pair.b, pair.a, alpha=pair.scale).to(dtype)


def nf4_round_trip(weight: Tensor, *, double_quant: bool) -> Tensor:
    """The weight as an NF4 layer's matrix product sees it: quantised in blocks of 64 and expanded, in its own dtype.

    Takes the device that loading takes, because in rare ties the codes depend on it. Returns a CPU tensor.
    """
    import bitsandbytes.functional as bnb

    device = "cuda" if torch.cuda.is_available() else "cpu"
    packed, state = bnb.quantize_4bit(
        weight.to(device).contiguous(), blocksize=64, compress_statistics=double_quant, quant_type="nf4"
    )
    return bnb.dequantize_4bit(packed, state).to("cpu")


def _check_request(run: FinishedRun, output_dir: Path, base: str) -> None:
    if run.kind == "full":
        raise InputError(
            f"run {str(run.root)!r} trained every parameter (lora.enabled=false): there is no adapter to merge, "
            "and its directory already is a full model"
        )
    if base not in ("original", "dequantized"):
        raise ConfigError(f"base={base!r}: allowed: original, dequantized")
    if base == "dequantized" and run.config.model.quantization == "none":
        raise ConfigError(
            "base=dequantized: the run trained on unquantised weights (model.quantization=none), "
            "so there is nothing to dequantise; use base=original"
        )
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise InputError(f"output {str(output_dir)!r} exists and is not empty; choose another directory or remove it")


def _read_adapter(run: FinishedRun, shapes: dict[str, tuple[int, ...]]) -> dict[str, LoraPair]:
    """Weight name -> its LoRA pair. InputError unless every tensor of the adapter belongs to a weight of the base."""
    where = f"the adapter in {str(run.weights)!r}"
    try:
        config = PeftConfig.from_pretrained(str(run.weights))
        tensors = load_file(run.weights / ADAPTER_FILE)
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise InputError(f"{where} cannot be read: {' '.join(str(error).split())}") from error
    # PEFT marks the settings that make another formula of LoRA.
    variants = {field.name: None for field in fields(config) if field.metadata.get("is_lora_variant")}
    for setting, plain in (variants | _PLAIN_LORA).items():
        value = getattr(config, setting, plain)
        if (value or None) != (plain or None):
            raise InputError(f"{where} has {setting}={value!r}; only plain LoRA ({setting}={plain!r}) can be merged")
    pairs = {}
    for key in [key for key in tensors if key.endswith(".lora_A.weight")]:
        layer = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        a, b = tensors.pop(key), tensors.pop(key.replace(".lora_A.", ".lora_B."), None)
        expected = shapes.get(f"{layer}.weight")
        found = None if b is None else (b.shape[0], a.shape[1])
        if expected is None or found != expected:
            raise InputError(
                f"{where} does not fit the base {run.config.model.name_or_path!r}: {layer} is {found} in the adapter "
                f"and {expected} in the base; merge it into the model it was trained on"
            )
        pairs[f"{layer}.weight"] = LoraPair(a=a.float(), b=b.float(), scale=config.lora_alpha / config.r)
    if tensors or not pairs:
        raise InputError(f"{where} should hold pairs of lora_A and lora_B; it holds {sorted(tensors)[:3]}")
    return pairs


def _plan_shards(shapes: dict[str, tuple[int, ...]], itemsize: int, shard_bytes: int) -> list[list[str]]:
    """Names in order, cut where a shard would grow beyond `shard_bytes`; a larger tensor has a shard of its own."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        num_bytes = math.prod(shape) * itemsize
        if shards[-1] and size + num_bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += num_bytes
    return shards


def _write_shards(directory: Path, shards: list[list[str]], merged: Callable[[str], Tensor]) -> None:
    weight_map, total_bytes = {}, 0
    for number, names in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: merged(name) for name in names}
        save_file(tensors, directory / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(names, file))
        total_bytes += sum(tensor.nbytes for tensor in tensors.values())
        del tensors  # or two shards would be in memory while the next is made
    if len(shards) > 1:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_configs(directory: Path, source: BaseWeights, dtype: torch.dtype) -> None:
    """config.json and generation_config.json for use: KV cache on, no tensor-parallel slices, the merged dtype."""
    config = source.config
    config.use_cache = True
    config.pretraining_tp = 1
    config.dtype = dtype
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(directory)
    generation = source.generation_config or GenerationConfig.from_model_config(config)
    generation.use_cache = True
    if not generation.do_sample:
        # Llama 2's file names a temperature without sampling: it has no effect, and saving it is refused.
        generation.temperature = generation.top_p = generation.top_k = None
    generation.save_pretrained(directory)


def _parse_size(text: str) -> int:
    """'4GB' -> 4,000,000,000 bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B", text.strip(), flags=re.IGNORECASE)
    num_bytes = int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " ")) if match else 0
    if num_bytes < 1:
        raise InputError(f"max_shard_size={text!r}: a size such as 500MB or 4GB is needed")
    return num_bytes


def _check_free_space(output_dir: Path, needed: int) -> None:
    existing = next(parent for parent in output_dir.parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise InputError(
            f"output {str(output_dir)!r}: {needed / 2**30:.2f} GiB are needed and {free / 2**30:.2f} GiB are free in "
            f"{str(existing)!r}; free some space or choose another directory"
        )


@contextmanager
def _published_directory(final: Path) -> Iterator[Path]:
    """A new directory beside `final`, flushed and renamed to it on success, removed on failure."""
    temporary = final.with_name(f".{final.name}.partial")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        mode = (temporary / "config.json").stat().st_mode
        for path in temporary.iterdir():
            path.chmod(mode)  # safetensors' own are readable by their owner alone
            _flush(path)
        _flush(temporary)
        os.replace(temporary, final)  # replaces an empty directory; fails where it was filled meanwhile
        _flush(final.parent)
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        remedy = "free some space or choose another directory" if full else "check the path and its permissions"
        raise InputError(
            f"output {str(final)!r} cannot be written ({error}); nothing is left there; {remedy}"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
