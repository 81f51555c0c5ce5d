"""Memory of a side's process: what a turn lacks becomes its row, and what it leaves behind is given back."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch

from packloop.engine.budget import GIB
from packloop.errors import OutOfMemoryError


def or_out_of_memory(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The row of `run`, or one that says that the memory did not suffice."""
    try:
        return run()
    except (torch.OutOfMemoryError, OutOfMemoryError) as error:
        return {"out_of_memory": True, "reason": str(error).splitlines()[0][:300]}


def release() -> None:
    """Gives back what nothing refers to, cached blocks included, so that another process can have it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def reserved_gib() -> float:
    """What torch holds on the GPU now; 0 without one."""
    return torch.cuda.memory_reserved() / GIB if torch.cuda.is_available() else 0.0
