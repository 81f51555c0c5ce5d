"""Adapters' fp32 masters as the compute dtype's stacked copies, refreshed in one launch a micro-batch.

Shapes: r rank, R ranks of a group, H input features, O output features of a member.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from packloop.kernels.lora_linear import Lora, LoraGroup


class AdapterCopies:
    """Buffers for the groups' A (stacked) and B in the compute dtype, and the masters they follow.

    A group made here stays valid: `refresh` writes the masters' current values into its buffers.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self._dtype, self._device = dtype, device
        self._copies: list[Tensor] = []
        self._masters: list[Tensor] = []

    def group(self, out_features: Sequence[int], loras: Sequence[Lora | None]) -> LoraGroup:
        """A group over these adapters (None: a member without). ValueError where their scalings or inputs differ."""
        present = [lora for lora in loras if lora is not None]
        if not present:
            return LoraGroup(tuple(out_features), None, (None,) * len(out_features), 1.0)
        if len({(lora.scaling, lora.a_rH.shape[1]) for lora in present}) > 1:
            raise ValueError("adapters on layers that share an input need one scaling (lora.alpha / lora.r) for all")
        a_RH = torch.cat([lora.a_rH.detach().to(self._dtype) for lora in present])
        copies = a_RH.split([lora.a_rH.shape[0] for lora in present])
        b_Or = [None if lora is None else lora.b_Or.detach().to(self._dtype, copy=True) for lora in loras]
        self._copies += [*copies, *(b for b in b_Or if b is not None)]
        self._masters += [*(lora.a_rH for lora in present), *(lora.b_Or for lora in present)]
        return LoraGroup(tuple(out_features), a_RH, tuple(b_Or), present[0].scaling)

    @torch.no_grad()
    def refresh(self) -> None:
        """Copies every master into its buffer, rounding to the compute dtype."""
        if self._copies:
            torch._foreach_copy_(self._copies, [master.detach() for master in self._masters])
