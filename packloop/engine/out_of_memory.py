"""What a run says when memory ends: where it went, and which settings take less."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from packloop.config import RunConfig
from packloop.engine.budget import GIB, is_out_of_memory, may_be_raised
from packloop.engine.planner.policy import count_layers
from packloop.engine.run_dir import may_change_on_resume
from packloop.errors import OutOfMemoryError
from packloop.kernels.patch import find_llama


@dataclass
class MemoryAccount:
    """What a run has put into memory, filled in as it comes to be. model: None until it is loaded.

    paged_bytes: optimizer state that the driver may move to the host.
    """

    config: RunConfig
    model: nn.Module | None = None
    paged_bytes: int = 0

    @contextmanager
    def explain_exhaustion(self) -> Iterator[None]:
        """Within, memory that ends is an OutOfMemoryError that says where it went and what to change."""
        try:
            yield
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise OutOfMemoryError(self._describe(first_sentence(error))) from error

    def _describe(self, said: str) -> str:
        if self.model is None:
            return f"out of memory while the model was loaded ({said}); {remedies(self.config, None)}"
        listed = table(self._rows())
        num_layers = find_llama(self.model).config.num_hidden_layers
        return f"out of memory ({said}):\n{listed}\n{remedies(self.config, num_layers)}"

    def _rows(self) -> dict[str, int]:
        rows = held(self.model, self.paged_bytes)
        cached = _num_cached(self.config, find_llama(self.model).config.num_hidden_layers)
        if cached and self.config.kernels.dequant_cache != "auto":
            rows[f"dequantised weights of {cached} layers"] = cached * _layer_bytes(self.model)
        if torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated()
            paged = self.paged_bytes  # not of torch's allocator
            rows["activations, gradients of them, buffers"] = max(0, peak - sum(rows.values()) + paged)
            rows["reserved at the peak"] = torch.cuda.max_memory_reserved()
            rows["of the GPU"] = torch.cuda.mem_get_info()[1]
        return rows


def remedies(config: RunConfig, num_layers: int | None) -> str:
    """What to change so that a run takes less memory, and what of that a resumed run takes too."""
    advised = less_memory(config, num_layers)
    resumed = [text for key, text in advised.items() if may_change_on_resume(key)]
    others = [text for key, text in advised.items() if not may_change_on_resume(key)]
    parts = [f"use {', or '.join(resumed)}, also with --resume"] if resumed else []
    if others:
        parts.append(f"in a new run: {', or '.join(others)}")
    return "; ".join(parts)


def less_memory(config: RunConfig, num_layers: int | None) -> dict[str, str]:
    """Setting -> how it takes less memory than in this configuration; first what changes nothing of what is learnt.

    num_layers: of the model, None until it is loaded. A number of layers that is still `auto` counts as the costliest.
    """
    train, kernels = config.train, config.kernels
    found = {}
    if num_layers:
        recomputed = _count(train.gradient_checkpointing, num_layers, auto=0)
        keeps_inputs = kernels.layer != "stock" and _count(kernels.keep_inputs, num_layers, auto=num_layers) > 0
        if recomputed < num_layers:
            found["train.gradient_checkpointing"] = "train.gradient_checkpointing=all"
        if _num_cached(config, num_layers):
            found["kernels.dequant_cache"] = "kernels.dequant_cache=none"
        if keeps_inputs and recomputed < num_layers:  # a layer that recomputes has none to keep
            found["kernels.keep_inputs"] = "kernels.keep_inputs=none"
    if may_be_raised(train.memory_budget_gib):
        found["train.memory_budget_gib"] = "a higher train.memory_budget_gib"
    if train.optim != "paged_adamw_32bit" and train.memory_budget_gib is None:  # a budget counts paged state as well
        found["train.optim"] = "train.optim=paged_adamw_32bit"
    if num_layers and kernels.attention == "eager":
        found["kernels.attention"] = "kernels.attention=auto"
    if num_layers and train.per_device_train_batch_size > 1:
        less = "a lower train.per_device_train_batch_size with more train.gradient_accumulation_steps"
        found["train.per_device_train_batch_size"] = less
    if config.model.quantization == "none" and config.lora.enabled:
        found["model.quantization"] = "model.quantization=nf4"
    if num_layers:
        found["data.max_length"] = "a lower data.max_length"
    if num_layers and config.lora.enabled:
        found["lora.r"] = "a lower lora.r"
    if not num_layers:
        found["GPU"] = "a GPU with more memory"
    return found


def _num_cached(config: RunConfig, num_layers: int) -> int:
    """Layers whose dequantised weights are kept: none of a stock layer or an unquantised base."""
    if config.kernels.layer == "stock" or config.model.quantization == "none":
        return 0
    return _count(config.kernels.dequant_cache, num_layers, auto=num_layers)


def _count(setting: str | int, num_layers: int, *, auto: int) -> int:
    return auto if setting == "auto" else count_layers(setting, num_layers)


def held(model: nn.Module, paged_bytes: int) -> dict[str, int]:
    """Bytes of what stays in place during a run: weights, trained state."""
    trained = sum(_bytes(p) for p in model.parameters() if p.requires_grad)
    return {
        "frozen weights": sum(_bytes(p) for p in model.parameters() if not p.requires_grad),
        "adapter, its gradient": 2 * trained,
        "optimizer state": paged_bytes or 2 * trained,
    }


def table(rows: dict[str, int]) -> str:
    """A line for each, in GiB."""
    return "\n".join(f"  {name:<44}{size / GIB:>8.2f} GiB" for name, size in rows.items())


def _layer_bytes(model: nn.Module) -> int:
    """Of one layer's linear weights in the compute dtype."""
    llama = find_llama(model)
    named = llama.model.layers[0].named_modules()
    linears = [getattr(module, "base_layer", module) for name, module in named if name.endswith("_proj")]
    return sum(one.in_features * one.out_features for one in linears) * llama.model.norm.weight.element_size()


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def first_sentence(error: RuntimeError) -> str:
    """Of an allocator's message, what was asked for; not the advice after it."""
    text = re.sub(r"^\[enforce fail [^]]*\][^.]*\. ", "", " ".join(str(error).split()))
    return text.split(". ")[0].removesuffix(".")[:200]
