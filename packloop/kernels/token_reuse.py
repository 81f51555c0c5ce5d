"""The first layer's q, k and v once for each distinct token of a micro-batch.

What enters the first layer is an embedding, of which a micro-batch of text has far fewer than slots: RoPE and attention
come after the projections, so slots of one token have one q, k and v. The product runs over one slot of each token, and
its rows are copied to all: of 32,768 slots of English, some 5,000 rows. With dropout every slot has its own mask.

Shapes: B rows, L slots of one row, T = B * L slots, U rows of distinct tokens, O output features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

TokenReuse = Literal["auto", "first_layer", "none"]


@dataclass(frozen=True)
class DistinctTokens:
    """slots_U: int64, a slot of each distinct token, one or more. row_of_T: int64, the place of every slot's in it."""

    slots_U: Tensor
    row_of_T: Tensor


def spread(few_UO: Tensor, distinct: DistinctTokens) -> Tensor:
    """[T, O]: every slot's row of `few_UO`."""
    return few_UO.index_select(0, distinct.row_of_T)
