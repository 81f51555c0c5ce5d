"""Linear layers that share an input, each with or without a LoRA adapter, over a frozen base: the steps of both passes.

    projected = scaling / keep * (mask * x) A^T        the group's A stacked: one product
    y_i       = x W_i^T + projected_i B_i^T            summed in the second product's epilogue, no clone
    dB_i      = dy_i^T projected_i                     float32
    d_projected_i = scaling / keep * dy_i B_i
    dA        = d_projected^T (mask * x)               float32
    dx        = dy W + mask * (d_projected A)

One dropout mask serves the group's shared input (PEFT draws one an adapter). It is regenerated from its seed wherever
it is needed, so x and `projected` are all that backward keeps. The steps stand apart, without autograd, because a fused
layer has dy, x and the base's weight at different times. Products with base weights are `matmul.py`'s. Those of the
adapters with x and dy are `adapter_products.py`'s on a GPU, with dropout those with x and dx `dropout.py`'s; the others
are torch's.
Source: Hu et al., LoRA, arXiv:2106.09685.

Shapes: T tokens, H input features, O outputs (those of the group side by side), r rank, R ranks of the group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from packloop.kernels import adapter_products
from packloop.kernels.adapter_products import gradient_product, narrow_product
from packloop.kernels.dropout import (
    dropout_add_input_gradient_,
    dropout_apply,
    dropout_project,
    dropout_weight_gradient,
    fits_fused_products,
)
from packloop.kernels.matmul import ProductLibrary, matmul
from packloop.kernels.reference import Block, Implementation, keep_probability, member_slices


class Lora(NamedTuple):
    """The master weights of one adapter, usually float32."""

    a_rH: Tensor
    b_Or: Tensor
    scaling: float


class Dropout(NamedTuple):
    """Which mask the adapters' input gets: see `dropout.dropout_apply`."""

    p: float
    seed: int | Tensor
    stream: int = 0


@dataclass(frozen=True)
class LoraGroup:
    """A group's adapters in the compute dtype, as `adapters.AdapterCopies` makes them and keeps them up to date.

    `a_RH` stacks the members' A; `b_Or[i]`, a block of the block-diagonal `b_OR`, is None for a member without adapter.
    With no adapter at all a_RH and b_OR are None. interleaved: output j is the member's number j modulo their count,
    members being of one size, instead of all of the first before the second's.
    """

    out_features: tuple[int, ...]
    a_RH: Tensor | None
    b_Or: tuple[Tensor | None, ...]
    scaling: float
    b_OR: Tensor | None = None
    interleaved: bool = False

    def members(self) -> list[tuple[slice, slice, Tensor | None]]:
        """Each member's output columns, rank columns (empty without adapter) and B."""
        found, rank = [], 0
        for columns, b_Or in zip(member_slices(self.out_features, self.interleaved), self.b_Or):
            num_ranks = 0 if b_Or is None else b_Or.shape[1]
            found.append((columns, slice(rank, rank + num_ranks), b_Or))
            rank += num_ranks
        return found

    def blocks(self) -> list[Block]:
        """Those of b_OR that are not zero; one of everything where members take turns."""
        if self.interleaved:
            return [_everything(self.b_OR.T)]
        return [Block(columns, ranks) for columns, ranks, b_Or in self.members() if b_Or is not None]


def _everything(w_RK: Tensor) -> Block:
    return Block(slice(0, w_RK.shape[1]), slice(0, w_RK.shape[0]))


def _scale(group: LoraGroup, dropout: Dropout | None) -> float:
    return group.scaling if dropout is None else group.scaling / keep_probability(dropout.p)


def _is_fused(x_TH: Tensor, group: LoraGroup, dropout: Dropout | None) -> bool:
    return dropout is not None and fits_fused_products(x_TH, group.a_RH.shape[0])


def _row_blocks(weights_OH: Sequence[Tensor]) -> list[tuple[slice, Tensor]]:
    """The outputs that each weight's rows make."""
    found, output = [], 0
    for weight_OH in weights_OH:
        found.append((slice(output, output + weight_OH.shape[0]), weight_OH))
        output += weight_OH.shape[0]
    return found


@torch.no_grad()
def lora_group_forward(
    x_TH: Tensor,
    weights_OH: Sequence[Tensor],
    group: LoraGroup,
    dropout: Dropout | None = None,
    *,
    out: Tensor | None = None,
    by: ProductLibrary = "auto",
    adapters_by: Implementation = "auto",
) -> tuple[Tensor, Tensor | None]:
    """`(y [T, O], projected [T, R])`, without autograd; `projected` is None where the group has no adapter.

    The rows of `weights_OH`, one after the other, are the group's outputs: one joined weight is one product, one a
    member is one product each. `out` may be a column slice of a wider buffer.
    """
    num_tokens, num_outputs = x_TH.shape[0], sum(group.out_features)
    if sum(weight.shape[0] for weight in weights_OH) != num_outputs:
        given = [tuple(weight.shape) for weight in weights_OH]
        raise ValueError(f"weights {given} for outputs {group.out_features}: {num_outputs} rows in all are needed")
    y_TO = torch.empty(num_tokens, num_outputs, dtype=x_TH.dtype, device=x_TH.device) if out is None else out
    for columns, weight_OH in _row_blocks(weights_OH):
        matmul(x_TH, weight_OH.T, out=y_TO[:, columns], by=by)
    if group.a_RH is None:
        return y_TO, None
    projected_TR = lora_project(x_TH, group, dropout, by=adapters_by)
    for columns, ranks, b_Or in group.members():
        if b_Or is not None:
            y_TO[:, columns].addmm_(projected_TR[:, ranks], b_Or.T)
    return y_TO, projected_TR


@torch.no_grad()
def lora_project(
    x_TH: Tensor,
    group: LoraGroup,
    dropout: Dropout | None,
    *,
    out: Tensor | None = None,
    by: Implementation = "auto",
) -> Tensor:
    """`scaling / keep * (mask * x) A^T` [T, R]: what the adapters' B are applied to, and all that their dB needs."""
    scale = _scale(group, dropout)
    if out is None:
        out = torch.empty(x_TH.shape[0], group.a_RH.shape[0], dtype=x_TH.dtype, device=x_TH.device)
    if _is_fused(x_TH, group, dropout):
        return dropout_project(x_TH, group.a_RH, dropout.p, dropout.seed, stream=dropout.stream, scale=scale, out=out)
    kept_TH, blocks = _kept(x_TH, dropout), [_everything(group.a_RH)]
    if adapter_products.fits(kept_TH, group.a_RH, blocks=blocks, by=by):
        return narrow_product(kept_TH, group.a_RH.T, blocks, scale=scale, out=out)
    return out.addmm_(kept_TH, group.a_RH.T, beta=0, alpha=scale)


def _kept(x: Tensor, dropout: Dropout | None) -> Tensor:
    if dropout is None:
        return x
    return dropout_apply(x.contiguous(), dropout.p, dropout.seed, stream=dropout.stream, rescale=False)


@torch.no_grad()
def lora_b_gradients(
    dy_TO: Tensor,
    projected_TR: Tensor | None,
    group: LoraGroup,
    dropout: Dropout | None,
    *,
    out: Tensor | None = None,
    into: Sequence[Tensor | None] | None = None,
    by: Implementation = "auto",
) -> tuple[Tensor | None, list[Tensor | None]]:
    """`(d_projected [T, R], [dB or None for each member])`: what backward can do without the group's input.

    `out`, when given, receives d_projected; dB is added to the tensors `into`, float32 [O_i, r], which are returned.
    """
    b_gradients: list[Tensor | None] = [None] * len(group.out_features) if into is None else list(into)
    if projected_TR is None:
        return None, b_gradients
    d_projected_TR = (
        torch.empty(projected_TR.shape, dtype=projected_TR.dtype, device=projected_TR.device) if out is None else out
    )
    scale, blocks = _scale(group, dropout), group.blocks()
    alike = _are_alike(group, b_gradients)
    if alike and adapter_products.fits(dy_TO, group.b_OR, projected_TR, blocks=blocks, by=by):
        narrow_product(dy_TO, group.b_OR, blocks, scale=scale, out=d_projected_TR)
        places = [index for index, b_Or in enumerate(group.b_Or) if b_Or is not None]
        if into is None:
            for index in places:
                b_gradients[index] = torch.empty(group.b_Or[index].shape, dtype=torch.float32, device=dy_TO.device)
        targets = [b_gradients[index] for index in places]
        options = {"adds": into is not None, "in_turns": group.interleaved}
        gradient_product(dy_TO, projected_TR, blocks, targets, **options)
        return d_projected_TR, b_gradients
    if group.interleaved:
        # cuBLAS takes no columns two apart: all members at once, over the zeros of `b_OR` and to blocks left unused.
        d_projected_TR.addmm_(dy_TO, group.b_OR, beta=0, alpha=scale)
        db_OR = _wide_product(dy_TO.T, projected_TR)
        for index, (columns, ranks, b_Or) in enumerate(group.members()):
            if b_Or is not None:
                block, total = db_OR[columns, ranks], b_gradients[index]
                b_gradients[index] = block if total is None else total.add_(block)
        return d_projected_TR, b_gradients
    for index, (columns, ranks, b_Or) in enumerate(group.members()):
        if b_Or is not None:
            d_projected_TR[:, ranks].addmm_(dy_TO[:, columns], b_Or, beta=0, alpha=scale)
            b_gradients[index] = _wide_product(dy_TO[:, columns].T, projected_TR[:, ranks], b_gradients[index])
    return d_projected_TR, b_gradients


def _are_alike(group: LoraGroup, targets: Sequence[Tensor | None]) -> bool:
    """Whether one launch can serve the group's members: adapters of one rank, in turns both, and plain targets."""
    present = [b_Or for b_Or in group.b_Or if b_Or is not None]
    one_rank = len({b_Or.shape[1] for b_Or in present}) == 1 and group.b_OR is not None
    in_turns = not group.interleaved or len(present) == len(group.b_Or) == 2
    return one_rank and in_turns and _are_plain(targets)


def _are_plain(targets: Sequence[Tensor | None]) -> bool:
    return all(target is None or (target.is_contiguous() and target.dtype == torch.float32) for target in targets)


@torch.no_grad()
def lora_a_gradient(
    d_projected_TR: Tensor,
    x_TH: Tensor,
    group: LoraGroup,
    dropout: Dropout | None,
    *,
    into: Sequence[Tensor] | None = None,
    by: Implementation = "auto",
) -> Tensor | None:
    """`d_projected^T (mask * x)` [R, H] in float32: the gradients of the group's A, stacked.

    They are added to the tensors `into`, float32 [r, H] for each adapter, and not returned, where those are given.
    """
    fused = _is_fused(x_TH, group, dropout)
    if into is None:
        if fused:
            return dropout_weight_gradient(d_projected_TR, x_TH, dropout.p, dropout.seed, stream=dropout.stream)
        kept_TH = _kept(x_TH, dropout)
        if not adapter_products.fits(kept_TH, d_projected_TR, blocks=[_everything(group.a_RH)], by=by):
            return _wide_product(d_projected_TR.T, kept_TH)
        da_RH = torch.empty(group.a_RH.shape, dtype=torch.float32, device=x_TH.device)
        gradient_product(kept_TH, d_projected_TR, [_everything(group.a_RH)], [da_RH], adds=False, transposed=True)
        return da_RH
    ranks = [adapter.shape[0] for adapter in into]
    # What lies in one piece is one product.
    stacked = _stacked_rows(into)
    targets, widths = (into, ranks) if stacked is None else ([stacked], [sum(ranks)])
    if fused:
        da_RH = dropout_weight_gradient(d_projected_TR, x_TH, dropout.p, dropout.seed, stream=dropout.stream)
        for target, gradient in zip(targets, da_RH.split(widths)):
            target.add_(gradient)
        return None
    kept_TH, blocks = _kept(x_TH, dropout), [_everything(group.a_RH)]
    if _are_plain(targets) and adapter_products.fits(kept_TH, d_projected_TR, blocks=blocks, by=by):
        gradient_product(kept_TH, d_projected_TR, blocks, targets, adds=True, transposed=True)
        return None
    for target, columns in zip(targets, d_projected_TR.split(widths, dim=1)):
        _wide_product(columns.T, kept_TH, target)
    return None


def _stacked_rows(parts: Sequence[Tensor]) -> Tensor | None:
    """One view of matrices whose rows follow one another in memory; None where they do not."""
    first, follows = parts[0], parts[0].data_ptr()
    for part in parts:
        alike = part.is_contiguous() and part.shape[1] == first.shape[1] and part.dtype == first.dtype
        if not alike or part.data_ptr() != follows:
            return None
        follows += part.nbytes
    # Neighbours of different allocations are none: a view reaches no further than its storage.
    if any(part.untyped_storage().data_ptr() != first.untyped_storage().data_ptr() for part in parts):
        return None
    return first.as_strided((sum(part.shape[0] for part in parts), first.shape[1]), first.stride())


@torch.no_grad()
def lora_input_gradient(
    dy_TO: Tensor,
    d_projected_TR: Tensor | None,
    weights_OH: Sequence[Tensor],
    group: LoraGroup,
    dropout: Dropout | None,
    *,
    by: ProductLibrary = "auto",
) -> Tensor:
    """`dy W + mask * (d_projected A)` [T, H]; `weights_OH` as in `lora_group_forward`."""
    (first, first_OH), *others = _row_blocks(weights_OH)
    dx_TH = matmul(dy_TO[:, first], first_OH, by=by)
    for columns, weight_OH in others:
        dx_TH.addmm_(dy_TO[:, columns], weight_OH)
    if d_projected_TR is None:
        return dx_TH
    if dropout is None:
        return dx_TH.addmm_(d_projected_TR, group.a_RH)
    if _is_fused(dx_TH, group, dropout):
        return dropout_add_input_gradient_(
            dx_TH, d_projected_TR, group.a_RH, dropout.p, dropout.seed, stream=dropout.stream
        )
    return dx_TH.add_(_kept(d_projected_TR @ group.a_RH, dropout))


def _wide_product(left: Tensor, right: Tensor, total: Tensor | None = None) -> Tensor:
    """left @ right in at least float32, added to `total` in place where one is given."""
    if left.is_cuda and left.dtype in (torch.bfloat16, torch.float16):
        if total is None:
            return torch.mm(left, right, out_dtype=torch.float32)
        return torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    dtype = torch.promote_types(left.dtype, torch.float32)
    product = left.to(dtype) @ right.to(dtype)
    return product if total is None else total.add_(product)
