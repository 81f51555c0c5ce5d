"""Linear layers that share an input, each with or without a LoRA adapter, over a frozen base: one autograd function.

    projected = scaling / keep * (mask * x) A^T        the group's A stacked: one product
    y_i       = x W_i^T + projected_i B_i^T            summed in the second product's epilogue, no clone
    dB_i      = dy_i^T projected_i                     float32
    d_projected_i = scaling / keep * dy_i B_i
    dA        = d_projected^T (mask * x)               float32
    dx        = dy W + mask * (d_projected A)

One dropout mask serves the group's shared input (PEFT draws one an adapter). It is regenerated from its seed wherever
it is needed, so x and `projected` are all that backward keeps. Base weights may be dense or quantised: they are asked
for when a product needs them and dropped after it. Products are torch's; with dropout on a GPU, those of the adapters
with x and dx are `dropout.py`'s.

Shapes: T tokens, H input features, O outputs (those of the group side by side), r rank, R ranks of the group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from packloop.kernels.dropout import (
    dropout_add_input_gradient_,
    dropout_apply,
    dropout_project,
    dropout_weight_gradient,
    fits_fused_products,
)
from packloop.kernels.reference import keep_probability

# Off, dropout runs by itself between torch's products, as it does on the CPU. Off is slower; it is here to be compared.
FUSE_DROPOUT = True


class BaseWeight(Protocol):
    """A frozen weight that may have to be made: quantised, cached, or just there."""

    def dense(self) -> Tensor:
        """The weight [O, H] in the compute dtype. Not written to and not kept."""


class DenseWeight(NamedTuple):
    """A weight that is held as it is used."""

    weight_OH: Tensor

    def dense(self) -> Tensor:
        return self.weight_OH


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
    """A group's adapters in the compute dtype, valid until the masters change; make it once an optimizer step.

    `a_RH` stacks the members' A; `b_Or[i]` is None for a member without adapter. With no adapter at all a_RH is None.
    """

    out_features: tuple[int, ...]
    a_RH: Tensor | None
    b_Or: tuple[Tensor | None, ...]
    scaling: float
    b_OR: Tensor | None = None  # the members' B side by side, block diagonal, where they are kept so

    def members(self) -> list[tuple[slice, slice, Tensor | None]]:
        """Each member's output columns, rank columns (empty without adapter) and B."""
        found, output, rank = [], 0, 0
        for num_outputs, b_Or in zip(self.out_features, self.b_Or):
            num_ranks = 0 if b_Or is None else b_Or.shape[1]
            found.append((slice(output, output + num_outputs), slice(rank, rank + num_ranks), b_Or))
            output, rank = output + num_outputs, rank + num_ranks
        return found


def join_loras(out_features: Sequence[int], loras: Sequence[Lora | None], dtype: torch.dtype) -> LoraGroup:
    """Casts a group's adapters to `dtype` and stacks their A. Raises ValueError where they do not fit together."""
    present = [lora for lora in loras if lora is not None]
    if len(loras) != len(out_features):
        raise ValueError(f"{len(loras)} adapters for {len(out_features)} linear layers; one (or None) each is needed")
    for num_outputs, lora in zip(out_features, loras):
        if lora is not None and (lora.b_Or.shape != (num_outputs, lora.a_rH.shape[0])):
            raise ValueError(
                f"adapter A {tuple(lora.a_rH.shape)}, B {tuple(lora.b_Or.shape)} on {num_outputs} outputs: "
                "A [r, H] and B [outputs, r] are needed"
            )
    if len({(lora.scaling, lora.a_rH.shape[1]) for lora in present}) > 1:
        given = ", ".join(f"{lora.scaling} on {lora.a_rH.shape[1]} inputs" for lora in present)
        raise ValueError(f"adapters of one group are scaled by {given}: one scaling and one input are needed")
    return LoraGroup(
        out_features=tuple(out_features),
        a_RH=torch.cat([lora.a_rH.to(dtype) for lora in present]) if present else None,
        b_Or=tuple(None if lora is None else lora.b_Or.to(dtype) for lora in loras),
        scaling=present[0].scaling if present else 1.0,
    )


def _scale(group: LoraGroup, dropout: Dropout | None) -> float:
    return group.scaling if dropout is None else group.scaling / keep_probability(dropout.p)


def _is_fused(x_TH: Tensor, group: LoraGroup, dropout: Dropout | None) -> bool:
    return dropout is not None and FUSE_DROPOUT and fits_fused_products(x_TH, group.a_RH.shape[0])


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
        torch.mm(x_TH, weight_OH.T, out=y_TO[:, columns])
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
    return out.addmm_(_kept(x_TH, dropout), group.a_RH.T, beta=0, alpha=scale)


def _kept(x: Tensor, dropout: Dropout | None) -> Tensor:
    if dropout is None:
        return x
    return dropout_apply(x.contiguous(), dropout.p, dropout.seed, stream=dropout.stream, rescale=False)


@torch.no_grad()
def lora_group_backward(
    dy_TO: Tensor | Sequence[Tensor],
    x_TH: Tensor,
    projected_TR: Tensor | None,
    weights_OH: Sequence[Tensor],
    group: LoraGroup,
    dropout: Dropout | None = None,
    *,
    needs_dx: bool = True,
    dx: Tensor | None = None,
) -> tuple[Tensor | None, list[tuple[Tensor, Tensor] | None]]:
    """`(dx [T, H], [(dA, dB) or None for each member])`, without autograd; dA and dB are float32 (float64 for float64).

    `dy_TO` is one tensor (columns may be strided slices) or one a member. `dx` is a buffer to fill. `weights_OH` is not
    read unless dx is needed. A fused layer, which has x late, calls the three steps below one by one.
    """
    d_projected_TR, b_gradients = lora_b_gradients(dy_TO, projected_TR, group, dropout)
    gradients: list[tuple[Tensor, Tensor] | None] = [None] * len(b_gradients)
    if d_projected_TR is not None:
        gradients = pair_gradients(lora_a_gradient(d_projected_TR, x_TH, group, dropout), b_gradients, group)
    if not needs_dx:
        return None, gradients
    return lora_input_gradient(dy_TO, d_projected_TR, weights_OH, group, dropout, dx=dx), gradients


def pair_gradients(
    da_RH: Tensor, b_gradients: list[Tensor | None], group: LoraGroup
) -> list[tuple[Tensor, Tensor] | None]:
    return [
        None if db_Or is None else (da_RH[ranks], db_Or) for db_Or, (_, ranks, _) in zip(b_gradients, group.members())
    ]


def _member_gradients(dy_TO: Tensor | Sequence[Tensor], group: LoraGroup) -> list[Tensor]:
    if isinstance(dy_TO, Tensor):
        return [dy_TO[:, columns] for columns, _, _ in group.members()]
    return list(dy_TO)


@torch.no_grad()
def lora_b_gradients(
    dy_TO: Tensor | Sequence[Tensor],
    projected_TR: Tensor | None,
    group: LoraGroup,
    dropout: Dropout | None,
    *,
    out: Tensor | None = None,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """`(d_projected [T, R], [dB or None for each member])`: what backward can do without the group's input.

    `out`, when given, receives d_projected.
    """
    b_gradients: list[Tensor | None] = [None] * len(group.out_features)
    if projected_TR is None:
        return None, b_gradients
    d_projected_TR = (
        torch.empty(projected_TR.shape, dtype=projected_TR.dtype, device=projected_TR.device) if out is None else out
    )
    scale = _scale(group, dropout)
    for index, ((_, ranks, b_Or), dy) in enumerate(zip(group.members(), _member_gradients(dy_TO, group))):
        if b_Or is not None:
            d_projected_TR[:, ranks].addmm_(dy, b_Or, beta=0, alpha=scale)
            b_gradients[index] = _wide_product(dy.T, projected_TR[:, ranks])
    return d_projected_TR, b_gradients


@torch.no_grad()
def lora_a_gradient(d_projected_TR: Tensor, x_TH: Tensor, group: LoraGroup, dropout: Dropout | None) -> Tensor:
    """`d_projected^T (mask * x)` [R, H] in float32: the gradients of the group's A, stacked."""
    if _is_fused(x_TH, group, dropout):
        return dropout_weight_gradient(d_projected_TR, x_TH, dropout.p, dropout.seed, stream=dropout.stream)
    return _wide_product(d_projected_TR.T, _kept(x_TH, dropout))


@torch.no_grad()
def lora_input_gradient(
    dy_TO: Tensor | Sequence[Tensor],
    d_projected_TR: Tensor | None,
    weights_OH: Sequence[Tensor],
    group: LoraGroup,
    dropout: Dropout | None,
    *,
    dx: Tensor | None = None,
) -> Tensor:
    """`dy W + mask * (d_projected A)` [T, H], into `dx` when given."""
    dys = dy_TO if isinstance(dy_TO, Tensor) else list(dy_TO)
    if dx is None:
        like = dys if isinstance(dys, Tensor) else dys[0]
        dx = torch.empty(like.shape[0], weights_OH[0].shape[1], dtype=like.dtype, device=like.device)
    _base_input_gradient(dys, weights_OH, dx)
    if d_projected_TR is not None:
        add_adapter_input_gradient_(dx, d_projected_TR, group, dropout)
    return dx


def _base_input_gradient(dy_TO: Tensor | Sequence[Tensor], weights_OH: Sequence[Tensor], dx_TH: Tensor) -> None:
    """dx = dy W: one product for each stretch of outputs that both dy and the weights have in one piece."""
    if isinstance(dy_TO, Tensor):
        pieces = [(dy_TO[:, columns], weight_OH) for columns, weight_OH in _row_blocks(weights_OH)]
    elif len(weights_OH) == 1:
        rows = weights_OH[0].split([dy.shape[1] for dy in dy_TO])
        pieces = list(zip(dy_TO, rows))
    else:
        pieces = list(zip(dy_TO, weights_OH, strict=True))
    for index, (dy, weight_OH) in enumerate(pieces):
        dx_TH.addmm_(dy, weight_OH, beta=0 if index == 0 else 1)


def add_adapter_input_gradient_(
    dx_TH: Tensor, d_projected_TR: Tensor, group: LoraGroup, dropout: Dropout | None
) -> None:
    if dropout is None:
        dx_TH.addmm_(d_projected_TR, group.a_RH)
    elif _is_fused(dx_TH, group, dropout):
        dropout_add_input_gradient_(dx_TH, d_projected_TR, group.a_RH, dropout.p, dropout.seed, stream=dropout.stream)
    else:
        dx_TH.add_(_kept(d_projected_TR @ group.a_RH, dropout))


def _wide_product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, summed and returned in at least float32."""
    if left.is_cuda and left.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(left, right, out_dtype=torch.float32)
    dtype = torch.promote_types(left.dtype, torch.float32)
    return left.to(dtype) @ right.to(dtype)


class _LoraLinearGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TH, weights, group, dropout, *masters):
        y_TO, projected_TR = lora_group_forward(x_TH, [weight.dense() for weight in weights], group, dropout)
        ctx.save_for_backward(x_TH, projected_TR, *masters)
        ctx.weights, ctx.group, ctx.dropout = weights, group, dropout
        return y_TO

    @staticmethod
    def backward(ctx, dy_TO):
        x_TH, projected_TR, *masters = ctx.saved_tensors
        needs_dx = ctx.needs_input_grad[0]
        dx_TH, gradients = lora_group_backward(
            dy_TO.contiguous(),
            x_TH,
            projected_TR,
            [weight.dense() for weight in ctx.weights] if needs_dx else [],
            ctx.group,
            ctx.dropout,
            needs_dx=needs_dx,
        )
        flat = [gradient for pair in gradients if pair is not None for gradient in pair]
        return dx_TH, None, None, None, *(g.to(master.dtype) for g, master in zip(flat, masters, strict=True))


def lora_linear_group(
    x: Tensor,
    weights: Sequence[BaseWeight],
    out_features: Sequence[int],
    loras: Sequence[Lora | None],
    *,
    dropout: Dropout | None = None,
    group: LoraGroup | None = None,
) -> Tensor:
    """`x W_i^T + scaling * dropout(x) A_i^T B_i^T` of every member i, side by side: [..., sum of out_features].

    x is [..., H]; the rows of `weights`, one after the other, are the members' outputs (a joined weight is one
    product). `loras` holds each member's master weights or None; their gradients come back in the masters' dtype,
    summed in float32. `group` is `join_loras(...)` in x's dtype, made anew here unless given. Dropout at p = 0 is none.
    The base gets no gradient. Source: Hu et al., arXiv:2106.09685.
    """
    if group is None:
        with torch.no_grad():
            group = join_loras(out_features, loras, x.dtype)
    if dropout is not None and (dropout.p == 0.0 or group.a_RH is None):
        dropout = None
    masters = [master for lora in loras if lora is not None for master in (lora.a_rH, lora.b_Or)]
    y_TO = _LoraLinearGroup.apply(x.reshape(-1, x.shape[-1]), tuple(weights), group, dropout, *masters)
    return y_TO.reshape(*x.shape[:-1], y_TO.shape[-1])
