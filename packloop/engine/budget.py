"""How much of a GPU's memory a run may take, and the limit that torch's allocator is held to."""

from __future__ import annotations

import math
import os

import torch

from packloop.errors import ConfigError

GIB = 2**30
# Left to the driver, the CUDA context and what other libraries allocate, where no budget is given.
MARGIN_GIB = 2.0
# Of these, what CUDA's context with its loaded kernels takes beside torch's memory, about, whatever the settings.
CONTEXT_GIB = 0.5
_ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
_SEGMENTS_THAT_GROW = "expandable_segments:True"


def settle_budget(
    budget_gib: float | None, total_gib: float, *, setting: str, gpu: str = "this GPU"
) -> tuple[float, str | None]:
    """(GiB that torch may reserve and page on a GPU of total_gib, a warning where that is less than was asked for).

    Without a budget it is all but MARGIN_GIB; a budget never reaches into CONTEXT_GIB. setting: where the budget comes
    from, and gpu: whose memory it is, as messages say it. ConfigError for more than the GPU has.
    """
    if budget_gib is None:
        return total_gib - MARGIN_GIB, None
    most_gib = total_gib - CONTEXT_GIB
    if budget_gib > total_gib:
        raise ConfigError(
            f"{setting}: {gpu} has {total_gib:.1f} GiB; give at most {_down(most_gib)}, or leave it out for all "
            f"but {MARGIN_GIB:g} GiB"
        )
    if budget_gib > most_gib:
        return most_gib, (
            f"{setting}: of the {total_gib:.1f} GiB of {gpu} CUDA's own context takes about {CONTEXT_GIB:g}, so "
            f"{_down(most_gib)} GiB are the budget"
        )
    return budget_gib, None


def _down(gib: float) -> str:
    """With one decimal, never above the value itself."""
    return f"{math.floor(gib * 10 + 1e-6) / 10:.1f}"


def settle_on_gpu(budget_gib: float | None, device: torch.device | int | None = None) -> tuple[float, str | None]:
    """The same for `train.memory_budget_gib` and a GPU at hand, by default the current one."""
    total_gib = torch.cuda.get_device_properties(device).total_memory / GIB
    return settle_budget(budget_gib, total_gib, setting=f"train.memory_budget_gib={budget_gib or 0:g}")


def check_budget(budget_gib: float | None, device: torch.device) -> str | None:
    """The warning of `settle_on_gpu`, if any: before anything is loaded, its error too. None without a GPU."""
    return None if device.type != "cuda" else settle_on_gpu(budget_gib, device)[1]


def may_be_raised(budget_gib: float | None) -> bool:
    """Whether a budget is what limits memory on the current GPU, which has more."""
    if budget_gib is None or not torch.cuda.is_available():
        return False
    total_gib = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / GIB
    return budget_gib < float(_down(total_gib - CONTEXT_GIB))


def limit_memory(budget_gib: float | None, paged_bytes: int = 0, device: torch.device | None = None) -> int | None:
    """From here on torch may reserve what the budget leaves beside paged optimizer state, which it does not count.

    device: default the current GPU. Returns the bytes that torch may reserve, None where nothing is limited: without
    a budget or without a GPU. ConfigError for a budget larger than the GPU.
    """
    if budget_gib is None or not torch.cuda.is_available() or (device is not None and device.type != "cuda"):
        return None
    # By number: a device without one is refused by the allocator, though by nothing else.
    index = torch.cuda.current_device() if device is None or device.index is None else device.index
    allowed_bytes = max(0, round(settle_on_gpu(budget_gib, index)[0] * GIB) - paged_bytes)
    total_bytes = torch.cuda.get_device_properties(index).total_memory
    torch.cuda.set_per_process_memory_fraction(allowed_bytes / total_bytes, index)
    return allowed_bytes


def is_out_of_memory(error: RuntimeError) -> bool:
    """Of the GPU's memory, also where cuBLAS or a kernel's launch wanted it, or of the host's."""
    signs = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "DefaultCPUAllocator: ")
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in signs)


def grow_segments() -> None:
    """Has CUDA's allocator reserve memory in segments that grow, which keeps it close to what is in use.

    Does nothing where the environment already says how to allocate. Said to the allocator itself, too: it reads the
    environment as torch is imported, which has happened. The environment is for processes that this one starts.
    """
    if any(name in os.environ for name in _ALLOCATOR_VARIABLES):
        return
    os.environ[_ALLOCATOR_VARIABLES[0]] = _SEGMENTS_THAT_GROW
    if torch.cuda.is_available():
        torch._C._accelerator_setAllocatorSettings(_SEGMENTS_THAT_GROW)


def lift_limit() -> None:
    """From here on torch may reserve what the current GPU has."""
    if torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(1.0)
