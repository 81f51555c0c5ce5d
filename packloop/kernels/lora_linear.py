"""Linear layers that share an input, each with or without a LoRA adapter, over a frozen base: the steps of both passes.

    projected = scaling / keep * (mask * x) A^T        the group's A stacked: one product
    y_i       = x W_i^T + projected_i B_i^T            summed in the second product's epilogue, no clone
    dB_i      = dy_i^T projected_i                     float32
    d_projected_i = scaling / keep * dy_i B_i
    dA        = d_projected^T (mask * x)               float32
    dx        = dy W + mask * (d_projected A)

One dropout mask serves the group's shared input (PEFT draws one an adapter). It is regenerated from its seed wherever
it is needed, so x and `projected` are all that backward keeps. The steps stand apart, without autograd, because a fused
layer has dy, x and the base's weight at different times. Products with base weights are `matmul.py`'s, the others
torch's; with dropout on a GPU, those of the adapters with x and dx are `dropout.py`'s. A group by `torch` has a product
of torch's for each adapter and masks x by itself.
Source: Hu et al., LoRA, arXiv:2106.09685.

Shapes: T tokens, H input features, O outputs (those of the group side by side), r rank, R ranks of the group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from packloop.kernels.dropout import (
    dropout_add_input_gradient_,
    dropout_apply,
    dropout_project,
    dropout_weight_gradient,
    fits_fused_products,
)
from packloop.kernels.matmul import ProductLibrary, matmul
from packloop.kernels.reference import keep_probability, member_slices

# Gradients of A of one input with more ranks than these, stacked, fill too few tiles of a GPU: 192 x 4,096 over 12,288
# slots take 59 us on an H200 as one product and 48 as a batch of three, which reads the input from the L2 cache.
_MOST_STACKED_RANKS = 128


# `fused` or `torch`: whether a group's adapters share products, with the base's weights and with the masking too.
LoraProducts = Literal["auto", "fused", "torch"]


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
    members being of one size, instead of all of the first before the second's. by: who makes the adapters' products.
    """

    out_features: tuple[int, ...]
    a_RH: Tensor | None
    b_Or: tuple[Tensor | None, ...]
    scaling: float
    b_OR: Tensor | None = None
    interleaved: bool = False
    by: LoraProducts = "auto"

    def members(self) -> list[tuple[slice, slice, Tensor | None]]:
        """Each member's output columns, rank columns (empty without adapter) and B."""
        found, rank = [], 0
        for columns, b_Or in zip(member_slices(self.out_features, self.interleaved), self.b_Or):
            num_ranks = 0 if b_Or is None else b_Or.shape[1]
            found.append((columns, slice(rank, rank + num_ranks), b_Or))
            rank += num_ranks
        return found


def _scale(group: LoraGroup, dropout: Dropout | None) -> float:
    return group.scaling if dropout is None else group.scaling / keep_probability(dropout.p)


def _is_fused(x_TH: Tensor, group: LoraGroup, dropout: Dropout | None) -> bool:
    return group.by != "torch" and dropout is not None and fits_fused_products(x_TH, group.a_RH.shape[0])


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
    projected_TR = lora_project(x_TH, group, dropout)
    for columns, ranks, b_Or in group.members():
        if b_Or is not None:
            y_TO[:, columns].addmm_(projected_TR[:, ranks], b_Or.T)
    return y_TO, projected_TR


@torch.no_grad()
def lora_project(x_TH: Tensor, group: LoraGroup, dropout: Dropout | None, *, out: Tensor | None = None) -> Tensor:
    """`scaling / keep * (mask * x) A^T` [T, R]: what the adapters' B are applied to, and all that their dB needs."""
    scale = _scale(group, dropout)
    if out is None:
        out = torch.empty(x_TH.shape[0], group.a_RH.shape[0], dtype=x_TH.dtype, device=x_TH.device)
    if _is_fused(x_TH, group, dropout):
        return dropout_project(x_TH, group.a_RH, dropout.p, dropout.seed, stream=dropout.stream, scale=scale, out=out)
    kept_TH = _kept(x_TH, group, dropout)
    if group.by != "torch":
        return out.addmm_(kept_TH, group.a_RH.T, beta=0, alpha=scale)
    for _, ranks, b_Or in group.members():
        if b_Or is not None:
            out[:, ranks].addmm_(kept_TH, group.a_RH[ranks].T, beta=0, alpha=scale)
    return out


def _kept(x: Tensor, group: LoraGroup, dropout: Dropout | None) -> Tensor:
    if dropout is None:
        return x
    by = "torch" if group.by == "torch" else "auto"
    return dropout_apply(x.contiguous(), dropout.p, dropout.seed, stream=dropout.stream, rescale=False, by=by)


@torch.no_grad()
def lora_b_gradients(
    dy_TO: Tensor,
    projected_TR: Tensor | None,
    group: LoraGroup,
    dropout: Dropout | None,
    *,
    out: Tensor | None = None,
    into: Sequence[Tensor | None] | None = None,
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
    scale = _scale(group, dropout)
    if group.interleaved:
        # cuBLAS takes no columns two apart: all members at once, over the zeros of `b_OR` and to blocks left unused.
        d_projected_TR.addmm_(dy_TO, group.b_OR, beta=0, alpha=scale)
        db_OR = _wide_product(dy_TO.T, projected_TR)
        for index, (columns, ranks, b_Or) in enumerate(group.members()):
            if b_Or is not None:
                block, total = db_OR[columns, ranks], b_gradients[index]
                b_gradients[index] = block if total is None else total.add_(block)
        return d_projected_TR, b_gradients
    for run in _runs(group):
        numbers, columns, ranks, blocks = zip(*run)
        totals = [b_gradients[number] for number in numbers]
        b_nOr = _stacked(blocks)
        total_nOr = None if any(total is None for total in totals) else _stacked(totals)
        if len(run) == 1 or b_nOr is None or (into is not None and total_nOr is None):
            for number, of_y, of_ranks, b_Or in run:
                d_projected_TR[:, of_ranks].addmm_(dy_TO[:, of_y], b_Or, beta=0, alpha=scale)
                b_gradients[number] = _wide_product(dy_TO[:, of_y].T, projected_TR[:, of_ranks], b_gradients[number])
            continue
        dy_nTO = _stacked([dy_TO[:, part] for part in columns])
        projected_nTr, d_projected_nTr = (
            _stacked([x[:, part] for part in ranks]) for x in (projected_TR, d_projected_TR)
        )
        d_projected_nTr.baddbmm_(dy_nTO, b_nOr, beta=0, alpha=scale)
        gradients_nOr = _wide_product(dy_nTO.mT, projected_nTr, total_nOr)
        for number, gradient in zip(numbers, gradients_nOr if into is None else totals):
            b_gradients[number] = gradient
    return d_projected_TR, b_gradients


def _runs(group: LoraGroup) -> list[list[tuple[int, slice, slice, Tensor]]]:
    """The members with adapters, each as (number, output columns, rank columns, B), in lists of those that one batched
    product can serve: neighbours whose B have one shape, at equal distances.
    """
    runs: list[list[tuple[int, slice, slice, Tensor]]] = []
    for number, (columns, ranks, b_Or) in enumerate(group.members()):
        if b_Or is None:
            continue
        starts = [member[1].start for member in runs[-1][-2:]] + [columns.start] if runs else []
        is_alike = bool(runs) and runs[-1][-1][3].shape == b_Or.shape and group.by != "torch"
        if is_alike and (len(starts) < 3 or starts[2] - starts[1] == starts[1] - starts[0]):
            runs[-1].append((number, columns, ranks, b_Or))
        else:
            runs.append([(number, columns, ranks, b_Or)])
    return runs


@torch.no_grad()
def lora_a_gradient(
    d_projected_TR: Tensor,
    x_TH: Tensor,
    group: LoraGroup,
    dropout: Dropout | None,
    *,
    into: Sequence[Tensor] | None = None,
) -> Tensor | None:
    """`d_projected^T (mask * x)` [R, H] in float32: the gradients of the group's A, stacked.

    They are added to the tensors `into`, float32 [r, H] for each adapter, and not returned, where those are given.
    """
    fused = _is_fused(x_TH, group, dropout)
    if into is None:
        if fused:
            return dropout_weight_gradient(d_projected_TR, x_TH, dropout.p, dropout.seed, stream=dropout.stream)
        return _wide_product(d_projected_TR.T, _kept(x_TH, group, dropout))
    if fused:
        da_RH = dropout_weight_gradient(d_projected_TR, x_TH, dropout.p, dropout.seed, stream=dropout.stream)
        for target, gradient in zip(into, da_RH.split([target.shape[0] for target in into])):
            target.add_(gradient)
        return None
    kept_TH, stacked_nrH = _kept(x_TH, group, dropout), None if group.by == "torch" else _stacked(into)
    if stacked_nrH is None:
        for target, columns in zip(into, d_projected_TR.split([target.shape[0] for target in into], dim=1)):
            _wide_product(columns.T, kept_TH, target)
    elif stacked_nrH.is_contiguous() and (len(into) == 1 or d_projected_TR.shape[1] <= _MOST_STACKED_RANKS):
        _wide_product(d_projected_TR.T, kept_TH, stacked_nrH.flatten(0, 1))
    else:
        d_projected_nTr = d_projected_TR.unflatten(1, stacked_nrH.shape[:2]).movedim(1, 0)
        _wide_product(d_projected_nTr.mT, kept_TH.expand(len(into), *kept_TH.shape), stacked_nrH)
    return None


def _stacked(parts: Sequence[Tensor]) -> Tensor | None:
    """One view [n, ...] of tensors of one shape that lie at equal distances in memory; None where they do not."""
    first = parts[0]
    distance = parts[1].data_ptr() - first.data_ptr() if len(parts) > 1 else first.nbytes
    for number, part in enumerate(parts):
        alike = part.shape == first.shape and part.stride() == first.stride() and part.dtype == first.dtype
        if not alike or part.data_ptr() != first.data_ptr() + number * distance:
            return None
    # Neighbours of different allocations are none: a view reaches no further than its storage.
    is_one = all(part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr() for part in parts)
    if not is_one or distance < 0 or distance % first.element_size():
        return None
    return first.as_strided((len(parts), *first.shape), (distance // first.element_size(), *first.stride()))


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
    return dx_TH.add_(_kept(d_projected_TR @ group.a_RH, group, dropout))


def _wide_product(left: Tensor, right: Tensor, total: Tensor | None = None) -> Tensor:
    """left @ right, of matrices or of batches of them, in at least float32; added to `total` in place if given."""
    if left.is_cuda and left.dtype in (torch.bfloat16, torch.float16):
        if total is None:
            return (torch.bmm if left.dim() == 3 else torch.mm)(left, right, out_dtype=torch.float32)
        add = torch.baddbmm if left.dim() == 3 else torch.addmm
        return add(total, left, right, out_dtype=torch.float32, out=total)
    dtype = torch.promote_types(left.dtype, torch.float32)
    product = left.to(dtype) @ right.to(dtype)
    return product if total is None else total.add_(product)
