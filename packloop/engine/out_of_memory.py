"""What a run says when memory ends: where it went, and which settings take less."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from packloop.config import RunConfig
from packloop.engine.budget import GIB, is_out_of_memory
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
            return f"out of memory while the model was loaded ({said}); {self._remedies()}"
        listed = table(self._rows())
        return f"out of memory ({said}):\n{listed}\n{self._remedies()}"

    def _rows(self) -> dict[str, int]:
        rows = held(self.model, self.paged_bytes)
        cached = self.config.kernels.dequant_cache
        if isinstance(cached, int) and cached:
            rows[f"dequantised weights of {cached} layers"] = cached * _layer_bytes(self.model)
        if torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated()
            paged = self.paged_bytes  # not of torch's allocator
            rows["activations, gradients of them, buffers"] = max(0, peak - sum(rows.values()) + paged)
            rows["reserved at the peak"] = torch.cuda.max_memory_reserved()
            rows["of the GPU"] = torch.cuda.mem_get_info()[1]
        return rows

    def _remedies(self) -> str:
        """The settings that take less, those that change nothing of what is learnt first."""
        train, kernels, model = self.config.train, self.config.kernels, self.config.model
        found = []
        num_layers = None if self.model is None else find_llama(self.model).config.num_hidden_layers
        if num_layers and train.gradient_checkpointing not in ("all", num_layers):
            found.append("train.gradient_checkpointing=all")
        if num_layers and kernels.dequant_cache not in ("none", 0):
            found.append("kernels.dequant_cache=none")
        if num_layers and kernels.keep_inputs not in ("none", 0):
            found.append("kernels.keep_inputs=none")
        if num_layers and kernels.attention == "eager":
            found.append("kernels.attention=auto")
        if num_layers and train.per_device_train_batch_size > 1:
            found.append("a lower train.per_device_train_batch_size with more train.gradient_accumulation_steps")
        if train.optim != "paged_adamw_32bit":
            found.append("train.optim=paged_adamw_32bit")
        if model.quantization == "none" and self.config.lora.enabled:
            found.append("model.quantization=nf4")
        found += ["a lower data.max_length", "a lower lora.r"] if num_layers else ["a GPU with more memory"]
        return f"use {', or '.join(found)}"


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
