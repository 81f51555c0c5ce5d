"""How much of a GPU's memory a run may take, and the limit that torch's allocator is held to."""

from __future__ import annotations

import torch

from packloop.errors import ConfigError

GIB = 2**30
# Left to the driver, the CUDA context and what other libraries allocate, where no budget is given.
MARGIN_GIB = 2.0


def limit_memory(budget_gib: float | None, paged_bytes: int = 0, device: torch.device | None = None) -> int | None:
    """From here on torch may reserve what the budget leaves beside paged optimizer state, which it does not count.

    device: default the current GPU. Returns the bytes that torch may reserve, None where nothing is limited: without
    a budget or without a GPU. ConfigError for a budget larger than the GPU.
    """
    if budget_gib is None or not torch.cuda.is_available() or (device is not None and device.type != "cuda"):
        return None
    # By number: a device without one is refused by the allocator, though by nothing else.
    index = torch.cuda.current_device() if device is None or device.index is None else device.index
    total_bytes = torch.cuda.get_device_properties(index).total_memory
    if budget_gib * GIB > total_bytes:
        raise ConfigError(
            f"train.memory_budget_gib={budget_gib:g}: this GPU has {total_bytes / GIB:.1f} GiB; "
            f"give less, or null for all but {MARGIN_GIB:g} GiB"
        )
    allowed_bytes = max(0, round(budget_gib * GIB) - paged_bytes)
    torch.cuda.set_per_process_memory_fraction(allowed_bytes / total_bytes, index)
    return allowed_bytes


def lift_limit() -> None:
    """From here on torch may reserve what the current GPU has."""
    if torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(1.0)
