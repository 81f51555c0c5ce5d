"""Where the fused decoder layer adds up the gradients of its adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from packloop.kernels.lora_linear import LoraGroup


class MasterGradients:
    """Where a layer's adapters' gradients are added up: in the masters' own `.grad`, or where one has none, anew.

    a, b: of each group, float32 like the masters, A's of the members that have adapters and B's of all (or None).
    for_autograd: what the function returns for each master, None for those whose gradient is in place already.
    """

    def __init__(self, groups: Mapping[str, LoraGroup], masters: Sequence[Tensor]):
        self.a: dict[str, list[Tensor]] = {}
        self.b: dict[str, list[Tensor | None]] = {}
        self.for_autograd: list[Tensor | None] = []
        remaining = iter(masters)
        for name, group in groups.items():
            self.a[name], self.b[name] = [], []
            for _, _, b_Or in group.members():
                if b_Or is not None:
                    self.a[name].append(self._place(next(remaining)))
                self.b[name].append(None if b_Or is None else self._place(next(remaining)))

    def _place(self, master: Tensor) -> Tensor:
        wide = torch.promote_types(master.dtype, torch.float32)
        if master.grad is not None and master.grad.dtype == wide:
            self.for_autograd.append(None)
            return master.grad
        self.for_autograd.append(torch.zeros(master.shape, dtype=wide, device=master.device))
        return self.for_autograd[-1]
