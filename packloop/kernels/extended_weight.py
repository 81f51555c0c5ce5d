"""A group's frozen weight and its adapters in one buffer, so that LoRA's sums ride in the base's own products.

Shapes: T tokens, H input features, O output features of the group, R ranks of its adapters.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from packloop.kernels.lora_linear import Dropout, LoraGroup, lora_project
from packloop.kernels.matmul import ProductLibrary, matmul


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

    @property
    def base(self) -> Tensor:
        """W [O, H]: strided rows."""
        return self.buffer[: sum(self.out_features), : self.num_features]

    def write_adapters(self, group: LoraGroup, *, a: bool = True, b: bool = True) -> None:
        """Copies the group's A, which dx needs, and B, which y needs; again whenever they change."""
        if a:
            self.buffer[sum(self.out_features) :, : self.num_features].copy_(group.a_RH)
        if b:
            self.buffer[: sum(self.out_features), self.num_features :].copy_(group.b_OR)


@torch.no_grad()
def extended_group_forward(
    x_extended: Tensor,
    weight: ExtendedWeight,
    group: LoraGroup,
    dropout: Dropout | None = None,
    *,
    out: Tensor | None = None,
    by: ProductLibrary = "auto",
) -> Tensor:
    """y [T, O] in one product. `x_extended` is [T, H + R]: x, and R columns that receive `projected`."""
    x_TH, projected_TR = x_extended.split([weight.num_features, group.a_RH.shape[0]], dim=1)
    lora_project(x_TH, group, dropout, out=projected_TR)
    rows = weight.buffer[: sum(group.out_features)]
    return matmul(x_extended, rows.T, out=out, by=by)


def extended_input_gradient(dy_extended: Tensor, weight: ExtendedWeight, *, by: ProductLibrary = "auto") -> Tensor:
    """dx [T, H] of a group without dropout, in one product. `dy_extended` [T, O + R]: dy beside d_projected."""
    return matmul(dy_extended, weight.buffer[:, : weight.num_features], by=by)


def new_rows(like: Tensor, num_columns: int) -> Tensor:
    """An empty tensor with as many rows, of its dtype and on its device."""
    return torch.empty(like.shape[0], num_columns, dtype=like.dtype, device=like.device)


def gradient_buffer(dx: Tensor, num_spare: int) -> tuple[Tensor, Tensor]:
    """(a buffer with spare columns, its part shaped like dx); dx itself where none are needed."""
    if num_spare == 0:
        return dx, dx
    wide = new_rows(dx, dx.shape[1] + num_spare)
    return wide, wide[:, : dx.shape[1]]


def with_spare_columns(gradient: Tensor, num_spare: int) -> Tensor:
    """The buffer that `gradient_buffer` made for this gradient, found again behind autograd; else the gradient."""
    wide = gradient._base
    if num_spare and wide is not None and wide.shape == (gradient.shape[0], gradient.shape[1] + num_spare):
        same_place = wide.data_ptr() == gradient.data_ptr() and wide.stride() == gradient.stride()
        return wide if same_place else gradient
    return gradient
