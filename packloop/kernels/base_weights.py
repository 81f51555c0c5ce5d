"""The frozen weights of a layer as its products take them: joined by input, dequantised when needed or kept dense.

Shapes: O output features of a member or group, H input features, R ranks of a group's adapters.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from packloop.kernels.extended_weight import ExtendedWeight
from packloop.kernels.lora_linear import LoraGroup
from packloop.kernels.nf4 import Nf4Group
from packloop.kernels.reference import Implementation

# Adapters join the weight's own product where their columns keep its rows aligned to 16 bytes.
_RANK_ALIGNMENT = 8


def can_interleave(members: Sequence[Tensor], num_ranks: int) -> bool:
    """Whether one buffer holds all of the group's product, so that its rows may lie in any order."""
    return all(hasattr(weight, "quant_state") for weight in members) and num_ranks % _RANK_ALIGNMENT == 0


class GroupWeights:
    """The base weights of linear layers that share an input, called for what the group's products take.

    NF4 members are dequantised into the rows of one new buffer, in the order of the group's outputs (`interleaved`), so
    that the group is one product; the adapters lie beside them in it (`extends`, an `ExtendedWeight`). Dense members
    are returned as they are, one product each.
    `keep()` stores the buffer, so that later calls cost nothing: same values, same results. nf4: who dequantises.
    """

    def __init__(
        self, members: Sequence[Tensor], group: LoraGroup, dtype: torch.dtype, *, nf4: Implementation = "auto"
    ):
        is_nf4 = [hasattr(weight, "quant_state") for weight in members]
        if any(is_nf4) != all(is_nf4):
            raise ValueError("a group of linear layers is either all NF4 or all dense; this one is mixed")
        if group.interleaved and not can_interleave(members, sum(0 if b is None else b.shape[1] for b in group.b_Or)):
            raise ValueError("only NF4 weights interleave, with adapters that lie beside them")
        self._members, self._group, self._dtype, self._by = list(members), group, dtype, nf4
        self.is_quantised = is_nf4[0]
        self._nf4 = Nf4Group(members, interleaved=group.interleaved) if self.is_quantised else None
        num_ranks = 0 if group.a_RH is None else group.a_RH.shape[0]
        aligned = num_ranks > 0 and num_ranks % _RANK_ALIGNMENT == 0
        self.extends = self.is_quantised and aligned and group.by != "torch"
        self._num_ranks = num_ranks if self.extends else 0
        self._kept: list[Tensor] | ExtendedWeight | None = None

    @property
    def dense_bytes(self) -> int:
        """Memory that `keep()` takes; 0 for dense members."""
        if not self.is_quantised:
            return 0
        rows, columns = self._buffer_shape()
        return rows * columns * torch.empty((), dtype=self._dtype).element_size()

    def __call__(self, *, for_backward: bool = False) -> list[Tensor] | ExtendedWeight:
        """What the group's products take; an extended weight has only the adapters' half that the direction needs."""
        if self._kept is not None:
            return self._kept
        if not self.is_quantised:
            return self._members
        num_features = self._nf4.shape[1]
        buffer = torch.empty(self._buffer_shape(), dtype=self._dtype, device=self._members[0].device)
        self._nf4.dequantize(buffer[: self._nf4.shape[0], :num_features], by=self._by)
        if not self.extends:
            return [buffer]
        extended = ExtendedWeight(buffer, self._group.out_features, num_features)
        extended.write_adapters(self._group, a=for_backward, b=not for_backward)
        return extended

    def keep(self) -> list[Tensor] | ExtendedWeight:
        """Dequantises once and for all; returns what is kept, whose adapters are the caller's to refresh."""
        self._kept = self()
        if isinstance(self._kept, ExtendedWeight):
            self._kept.write_adapters(self._group)
        return self._kept

    def _buffer_shape(self) -> tuple[int, int]:
        num_rows, num_columns = self._nf4.shape
        return num_rows + self._num_ranks, num_columns + self._num_ranks
