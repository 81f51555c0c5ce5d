"""A group's frozen weight and its adapters in one buffer, so that LoRA's sums ride in the base's own products.

Shapes: T tokens, H input features, O output features of the group, R ranks of its adapters.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from packloop.kernels.lora_linear import (
    Dropout,
    LoraGroup,
    add_adapter_input_gradient_,
    lora_a_gradient,
    lora_b_gradients,
    lora_project,
    pair_gradients,
)


@dataclass(frozen=True)
class ExtendedWeight:
    """A group's weight with its adapters beside it in one buffer, so that neither sum takes a pass over memory.

        buffer [O + R, H + R] = | W  B |      y  = [x | projected] [W | B]^T
                                | A  . |      dx = [dy | d_projected] [W ; A]

    B is block diagonal (member by member): y costs R/H more arithmetic but no reading and writing of y; so does dx.
    """

    buffer: Tensor
    out_features: tuple[int, ...]
    num_features: int

    @staticmethod
    def allocate(
        num_features: int, group: LoraGroup, *, dtype: torch.dtype, device: torch.device | str
    ) -> ExtendedWeight:
        """A buffer whose `base` the caller fills; `write_adapters` does the rest."""
        num_outputs, num_ranks = sum(group.out_features), group.a_RH.shape[0]
        buffer = torch.zeros(num_outputs + num_ranks, num_features + num_ranks, dtype=dtype, device=device)
        return ExtendedWeight(buffer, group.out_features, num_features)

    @property
    def base(self) -> Tensor:
        """W [O, H], to be filled by the caller: strided rows."""
        return self.buffer[: sum(self.out_features), : self.num_features]

    def write_adapters(self, group: LoraGroup, *, a: bool = True, b: bool = True) -> None:
        """Copies the group's A, which dx needs, and B, which y needs; again whenever they change."""
        if a:
            self.buffer[sum(self.out_features) :, : self.num_features].copy_(group.a_RH)
        if not b:
            return
        if group.b_OR is not None:
            self.buffer[: sum(self.out_features), self.num_features :].copy_(group.b_OR)
            return
        for columns, ranks, b_Or in group.members():
            if b_Or is not None:
                self.buffer[columns, self.num_features + ranks.start : self.num_features + ranks.stop].copy_(b_Or)


@torch.no_grad()
def extended_group_forward(
    x_extended: Tensor,
    weight: ExtendedWeight,
    group: LoraGroup,
    dropout: Dropout | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """y [T, O] in one product. `x_extended` is [T, H + R]: x, and R columns that receive `projected`."""
    x_TH, projected_TR = x_extended.split([weight.num_features, group.a_RH.shape[0]], dim=1)
    lora_project(x_TH, group, dropout, out=projected_TR)
    rows = weight.buffer[: sum(group.out_features)]
    return torch.mm(x_extended, rows.T) if out is None else torch.mm(x_extended, rows.T, out=out)


@torch.no_grad()
def extended_group_backward(
    dy_extended: Tensor,
    x_extended: Tensor,
    weight: ExtendedWeight,
    group: LoraGroup,
    dropout: Dropout | None = None,
    *,
    needs_dx: bool = True,
    dx: Tensor | None = None,
) -> tuple[Tensor | None, list[tuple[Tensor, Tensor] | None]]:
    """`(dx, [(dA, dB) or None])` as `lora_group_backward`; dx in one product where there is no dropout.

    `dy_extended` is [T, O + R]: dy, and R columns that receive the gradient of `projected`.
    """
    num_outputs = sum(group.out_features)
    x_TH, projected_TR = x_extended.split([weight.num_features, group.a_RH.shape[0]], dim=1)
    dy_TO, d_projected_TR = dy_extended.split([num_outputs, group.a_RH.shape[0]], dim=1)
    _, b_gradients = lora_b_gradients(dy_TO, projected_TR, group, dropout, out=d_projected_TR)
    gradients = pair_gradients(lora_a_gradient(d_projected_TR, x_TH, group, dropout), b_gradients, group)
    if not needs_dx:
        return None, gradients
    if dx is None:
        dx = torch.empty(x_TH.shape, dtype=x_TH.dtype, device=x_TH.device)
    if dropout is None:
        torch.mm(dy_extended, weight.buffer[:, : weight.num_features], out=dx)
    else:
        torch.mm(dy_TO, weight.base, out=dx)
        add_adapter_input_gradient_(dx, d_projected_TR, group, dropout)
    return dx, gradients
