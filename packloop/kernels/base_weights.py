"""The frozen weights of a layer as its products take them: joined by input, dequantised when needed or kept dense.

Shapes: O output features of a member, H input features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from packloop.kernels.nf4 import dequantize


class GroupWeights:
    """The base weights of linear layers that share an input, called for their dense rows in order.

    NF4 members are dequantised into the rows of one new buffer, so that the group is one product; dense members are
    returned as they are. `keep()` stores the dequantised buffer, so that later calls cost nothing: same values, same
    results.
    """

    def __init__(self, members: Sequence[Tensor], dtype: torch.dtype):
        self._members, self._dtype, self._kept = list(members), dtype, None
        self._is_nf4 = [hasattr(weight, "quant_state") for weight in members]
        if any(self._is_nf4) != all(self._is_nf4):
            raise ValueError("a group of linear layers is either all NF4 or all dense; this one is mixed")

    @property
    def is_quantised(self) -> bool:
        return self._is_nf4[0]

    @property
    def dense_bytes(self) -> int:
        """Memory that `keep()` takes; 0 for dense members."""
        itemsize = torch.empty((), dtype=self._dtype).element_size()
        return sum(rows * columns for rows, columns in self._shapes()) * itemsize if self.is_quantised else 0

    def __call__(self) -> list[Tensor]:
        if self._kept is not None:
            return self._kept
        if not self.is_quantised:
            return self._members
        shapes = self._shapes()
        joined = torch.empty(
            sum(rows for rows, _ in shapes), shapes[0][1], dtype=self._dtype, device=self._members[0].device
        )
        row = 0
        for weight, (num_rows, _) in zip(self._members, shapes, strict=True):
            dequantize(weight, out=joined[row : row + num_rows])
            row += num_rows
        return [joined]

    def keep(self) -> None:
        """Dequantises once and for all."""
        self._kept = self()

    def _shapes(self) -> list[tuple[int, int]]:
        return [tuple(weight.quant_state.shape if self.is_quantised else weight.shape) for weight in self._members]
