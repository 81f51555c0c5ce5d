"""A whole Llama decoder layer as one autograd function, over a frozen base with LoRA adapters.

    x1 = residual + update          n1 = norm(x1)        q, k, v = n1 Wqkv' + LoRA, RoPE in place
    a  = attention(q, k, v)         x2 = x1 + a Wo' + LoRA                  n2 = norm(x2)
    gate, up = n2 Wgu' + LoRA       h  = silu(gate) * up                    returns (x2, h Wd' + LoRA)

The pair (residual, update) travels between layers unsummed, so that every addition is fused into the norm after it.
What is kept for backward, a token and layer, is the layer's `keeps`:
    all       x1, q, k, v, a, x2, gate, up, and n1, n2, h where an adapter's gradient needs them
    products  the same without n1, n2, h, each rebuilt by one pass over what it was made from
    input     x1 alone: the forward runs again, and the base's weights, dequantised once, serve it and backward
Where gate and up are interleaved (`gated`), the products around h make it in their epilogues, and it is never kept.
The first layer's q, k and v are made once for each distinct token where the micro-batch tells which (`token_reuse`).

Shapes: T slots, H hidden features, I intermediate features, O output features of a group. One tensor of gradients
serves residual and update: they enter only as a sum.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from packloop.kernels.attention import Attention, DocumentLayout, rotates
from packloop.kernels.base_weights import GroupWeights
from packloop.kernels.extended_weight import (
    ExtendedWeight,
    extended_group_forward,
    extended_input_gradient,
    gradient_buffer,
    new_rows,
    with_spare_columns,
)
from packloop.kernels.gated import deinterleave, gated_group_forward, gated_group_gradient_
from packloop.kernels.lora_linear import (
    Dropout,
    LoraGroup,
    lora_a_gradient,
    lora_b_gradients,
    lora_group_forward,
    lora_input_gradient,
    lora_project,
)
from packloop.kernels.master_gradients import MasterGradients
from packloop.kernels.matmul import ProductLibrary
from packloop.kernels.operations import AUTO, Operations
from packloop.kernels.rms_norm import add_rms_norm_backward, add_rms_norm_forward
from packloop.kernels.rope import Rotation, rope_
from packloop.kernels.swiglu import swiglu_backward, swiglu_forward
from packloop.kernels.token_reuse import DistinctTokens, spread

GROUPS = ("qkv", "o", "gate_up", "down")


@dataclass(frozen=True)
class Batch:
    """What every layer of one micro-batch shares."""

    layout: DocumentLayout
    rotation: Rotation
    dropout: Dropout | None
    distinct: DistinctTokens | None = None


@dataclass(frozen=True)
class FusedLayer:
    """One layer's frozen parts and adapters, as the function takes them.

    masters: the adapters' fp32 parameters, for each group and member A then B.
    """

    index: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    eps: float
    norm1_H: Tensor
    norm2_H: Tensor
    weights: dict[str, GroupWeights]
    groups: dict[str, LoraGroup]
    masters: tuple[Tensor, ...]
    attention: Attention
    keeps: Literal["all", "products", "input"]
    operations: Operations = AUTO

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    @property
    def attention_rotates(self) -> bool:
        """Whether RoPE is the backend's: where it can do it, and is not asked to leave it to PyTorch."""
        return rotates(self.attention) and self.operations.rope != "torch"

    def dropout(self, batch: Batch, group: str) -> Dropout | None:
        """The group's mask: its own stream under the micro-batch's seed. None where there is nothing to drop."""
        if batch.dropout is None or not self.has_adapter(group):
            return None
        return batch.dropout._replace(stream=self.index * len(GROUPS) + GROUPS.index(group))

    def has_adapter(self, group: str) -> bool:
        return self.groups[group].a_RH is not None

    @property
    def is_gated(self) -> bool:
        """Whether gate and up are interleaved, and SwiGLU belongs to the products around it."""
        return self.groups["gate_up"].interleaved

    def reused_tokens(self, batch: Batch) -> DistinctTokens | None:
        """The tokens whose q, k and v serve all slots, where this layer's input is their embeddings."""
        is_first = self.index == 0 and self.dropout(batch, "qkv") is None
        return batch.distinct if is_first else None

    def gates_backward(self, batch: Batch) -> bool:
        """Whether all of SwiGLU's gradient comes out of one product: a dropped-out adapter's share would not."""
        rides = self.weights["down"].extends and self.dropout(batch, "down") is None
        return self.is_gated and (rides or not self.has_adapter("down"))

    def keeps_input(self, group: str) -> bool:
        """Whether the group's input stays until backward."""
        return self.keeps == "all" and self.has_adapter(group) and not (self.is_gated and group == "down")

    def spare_columns(self, group: str) -> int:
        """Columns beside the group's inputs and output gradients, for the adapters' projections."""
        return self.groups[group].a_RH.shape[0] if self.weights[group].extends else 0


@dataclass
class _Activations:
    """What the forward pass leaves for the backward pass. Inputs of groups carry their spare columns."""

    x1: Tensor
    qkv: Tensor | None = None
    attended: Tensor | None = None
    attention_saved: object = None
    x2: Tensor | None = None
    rstd1: Tensor | None = None
    rstd2: Tensor | None = None
    gate_up: Tensor | None = None
    projected: dict[str, Tensor | None] = field(default_factory=dict)
    inputs: dict[str, Tensor] = field(default_factory=dict)


class _Weights:
    """What the products of one layer take, made when first asked for and, with `keeps`, held until dropped.

    A weight that is held serves a recomputed forward and the backward pass, so it has both halves of the adapters.
    """

    def __init__(self, layer: FusedLayer, *, for_backward: bool = False, keeps: bool = False):
        self._layer, self._for_backward, self._keeps, self._made = layer, for_backward, keeps, {}

    def __getitem__(self, group: str) -> list[Tensor] | ExtendedWeight:
        if group in self._made:
            return self._made[group]
        weights = self._layer.weights[group](for_backward=self._for_backward)
        if self._keeps:
            if isinstance(weights, ExtendedWeight):
                weights.write_adapters(self._layer.groups[group], a=not self._for_backward, b=self._for_backward)
            self._made[group] = weights
        return weights

    def drop(self, group: str) -> None:
        self._made.pop(group, None)


def _split_heads(layer: FusedLayer, qkv_TO: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Views of q [T, heads, D], k and v [T, kv_heads, D] in the joined buffer, its spare columns left out."""
    q_size, kv_size = layer.num_heads * layer.head_dim, layer.num_kv_heads * layer.head_dim
    parts = qkv_TO[:, : q_size + 2 * kv_size].split([q_size, kv_size, kv_size], dim=1)
    return tuple(part.unflatten(1, (-1, layer.head_dim)) for part in parts)


def _rotate(layer: FusedLayer, batch: Batch, qkv_TO: Tensor, *, inverse: bool) -> None:
    q_size, kv_size = layer.num_heads * layer.head_dim, layer.num_kv_heads * layer.head_dim
    q_TO, k_TO = qkv_TO[:, :q_size], qkv_TO[:, q_size : q_size + kv_size]
    tables = batch.rotation.cos_PD, batch.rotation.sin_PD, batch.rotation.position_ids_T
    rope_(q_TO, k_TO, *tables, inverse=inverse, by=layer.operations.rope)


def _attend(layer: FusedLayer, batch: Batch, qkv_TO: Tensor) -> tuple[Tensor, object]:
    """(output [T, H * D], with spare columns where the backend can write beside them; what backward needs)."""
    if layer.attention_rotates:
        num_features = layer.num_heads * layer.head_dim
        wide = new_rows(qkv_TO, num_features + layer.spare_columns("o"))
        out_THD = wide[:, :num_features].unflatten(1, (-1, layer.head_dim))
        _, saved = layer.attention.forward(
            *_split_heads(layer, qkv_TO), batch.layout, layer.scale, rotation=batch.rotation, out=out_THD
        )
        return wide, saved
    _rotate(layer, batch, qkv_TO, inverse=False)
    attended, saved = layer.attention.forward(*_split_heads(layer, qkv_TO), batch.layout, layer.scale)
    return attended.flatten(1), saved


def _attend_backward(layer: FusedLayer, batch: Batch, kept: _Activations, d_attended: Tensor) -> Tensor:
    """Gradient of the projection's output [T, O], with spare columns."""
    d_qkv = new_rows(kept.qkv, kept.qkv.shape[1] + layer.spare_columns("qkv"))
    does_rope = layer.attention_rotates
    layer.attention.backward(
        kept.attention_saved,
        d_attended.unflatten(1, (-1, layer.head_dim)),
        *_split_heads(layer, kept.qkv),
        batch.layout,
        layer.scale,
        *_split_heads(layer, d_qkv),
        **({"rotation": batch.rotation} if does_rope else {}),
    )
    if not does_rope:
        _rotate(layer, batch, d_qkv, inverse=True)
    return d_qkv


def _normed(layer: FusedLayer, group: str, residual: Tensor, update: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(residual + update, its norm as the group's input with spare columns, 1 / rms)."""
    num_features = residual.shape[1]
    wide = new_rows(residual, num_features + layer.spare_columns(group))
    weight_H = layer.norm1_H if group == "qkv" else layer.norm2_H
    by, normed = layer.operations.rms_norm, wide[:, :num_features]
    total, _, rstd_T = add_rms_norm_forward(residual, update, weight_H, layer.eps, normed_out=normed, by=by)
    return total, wide, rstd_T


def _gate_and_up(layer: FusedLayer, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    both = gate_up[:, : sum(layer.groups["gate_up"].out_features)]
    return deinterleave(both) if layer.is_gated else both.chunk(2, dim=1)


def _forward(
    layer: FusedLayer, batch: Batch, weights: _Weights, residual: Tensor, update: Tensor | None, *, needs_output: bool
) -> tuple[_Activations, Tensor, Tensor | None]:
    """(what backward needs, x2, output). A recomputation needs no output and ends before the last product."""
    kept = _Activations(x1=residual)

    def keep_input(group: str, x_wide: Tensor, projected: Tensor | None) -> None:
        """The input where backward is to have it, and the projections; None for those in its spare columns."""
        if not layer.has_adapter(group):
            return
        is_kept = layer.keeps_input(group)
        if projected is None:
            projected = x_wide[:, x_wide.shape[1] - layer.groups[group].a_RH.shape[0] :]
            projected = projected if is_kept else projected.clone()
        kept.projected[group] = projected
        if is_kept:
            kept.inputs[group] = x_wide

    def product(group: str, x_wide: Tensor, out: Tensor, by: ProductLibrary) -> Tensor | None:
        """Fills `out` with the group's outputs; returns the projections where they are not in spare columns."""
        weight, adapters, dropout = weights[group], layer.groups[group], layer.dropout(batch, group)
        if isinstance(weight, ExtendedWeight) and x_wide.shape[1] > weight.num_features:
            extended_group_forward(x_wide, weight, adapters, dropout, out=out, by=by)
            return None
        dense = [weight.base] if isinstance(weight, ExtendedWeight) else weight
        return lora_group_forward(x_wide, dense, adapters, dropout, out=out, by=by)[1]

    def linear(group: str, x_wide: Tensor, spare_columns: int = 0) -> Tensor:
        """The group's outputs, with `spare_columns` beside them."""
        num_outputs = sum(layer.groups[group].out_features)
        y_wide = new_rows(x_wide, num_outputs + spare_columns)
        projected = product(group, x_wide, y_wide[:, :num_outputs], layer.operations.matmul)
        keep_input(group, x_wide, projected)
        return y_wide

    def linear_of_distinct(group: str, x_wide: Tensor, distinct: DistinctTokens) -> Tensor:
        """The same, of slots that have the same inputs by their tokens. Sizes differ each time: torch's products."""
        few_wide = x_wide.index_select(0, distinct.slots_U)
        few = new_rows(few_wide, sum(layer.groups[group].out_features))
        projected = product(group, few_wide, few, "torch")
        if projected is not None:
            projected = spread(projected, distinct)
        elif num_spare := layer.spare_columns(group):
            x_wide[:, -num_spare:] = spread(few_wide[:, -num_spare:], distinct)
        keep_input(group, x_wide, projected)
        return spread(few, distinct)

    x1, n1, rstd1 = _normed(layer, "qkv", residual, update)
    distinct = layer.reused_tokens(batch)
    qkv = linear("qkv", n1) if distinct is None else linear_of_distinct("qkv", n1, distinct)
    del n1
    attended, attention_saved = _attend(layer, batch, qkv)
    x2, n2, rstd2 = _normed(layer, "gate_up", x1, linear("o", attended))
    num_spare = layer.spare_columns("down") if needs_output else 0
    if layer.is_gated:
        adapters, dropout = layer.groups["gate_up"], layer.dropout(batch, "gate_up")
        beside, by = (layer.spare_columns("gate_up"), num_spare), layer.operations.gated
        gate_up, hidden = gated_group_forward(n2, weights["gate_up"], adapters, dropout, beside, by=by)
        keep_input("gate_up", n2, None)
    else:
        gate_up, hidden = linear("gate_up", n2, layer.spare_columns("gate_up")), None
    del n2
    out = None
    gate, up = _gate_and_up(layer, gate_up)
    num_features = gate.shape[1]
    if hidden is None and (needs_output or layer.has_adapter("down")):
        hidden = new_rows(gate, num_features + num_spare)
        swiglu_forward(gate, up, out=hidden[:, :num_features], by=layer.operations.swiglu)
    if needs_output:
        out = linear("down", hidden)
    elif layer.has_adapter("down"):
        kept.projected["down"] = lora_project(hidden, layer.groups["down"], layer.dropout(batch, "down"))
    # The function returns x2 as well: a detached alias keeps its graph node from holding itself alive.
    kept.x1, kept.x2 = x1.detach(), x2.detach()
    kept.qkv, kept.attended, kept.attention_saved = qkv, attended, attention_saved
    kept.gate_up, kept.rstd1, kept.rstd2 = gate_up, rstd1, rstd2
    return kept, x2, out


def _backward(
    layer: FusedLayer, batch: Batch, weights: _Weights, kept: _Activations, d_out: Tensor, *, needs_dx: bool
) -> tuple[Tensor | None, list[Tensor | None]]:
    """(gradient of x1, gradients of the masters that autograd is to add up) from the one gradient of (x2 + output)."""
    gradients = MasterGradients(layer.groups, layer.masters)
    d_projected: dict[str, Tensor | None] = {}

    def output_gradient(group: str, dy_wide: Tensor) -> None:
        """B's gradients, and the gradient of the projections, written into the spare columns where there are some."""
        num_outputs = sum(layer.groups[group].out_features)
        d_projected[group], _ = lora_b_gradients(
            dy_wide[:, :num_outputs],
            kept.projected.get(group),
            layer.groups[group],
            layer.dropout(batch, group),
            out=dy_wide[:, num_outputs:] if dy_wide.shape[1] > num_outputs else None,
            into=gradients.b[group],
        )

    def input_gradient(group: str, dy_wide: Tensor) -> Tensor:
        weight, adapters, dropout = weights[group], layer.groups[group], layer.dropout(batch, group)
        num_outputs, by = sum(adapters.out_features), layer.operations.matmul
        weights.drop(group)
        if isinstance(weight, ExtendedWeight):
            if dropout is None and dy_wide.shape[1] > num_outputs:
                return extended_input_gradient(dy_wide, weight, by=by)
            weight = [weight.base]
        return lora_input_gradient(dy_wide[:, :num_outputs], d_projected[group], weight, adapters, dropout, by=by)

    def a_gradient(group: str, x: Tensor) -> None:
        adapters, dropout = layer.groups[group], layer.dropout(batch, group)
        lora_a_gradient(d_projected[group], x, adapters, dropout, into=gradients.a[group])

    def normed(group: str, x: Tensor) -> Tensor:
        """The group's input, as kept or built again."""
        wide = kept.inputs.pop(group) if group in kept.inputs else _normed(layer, group, x, None)[1]
        return wide[:, : x.shape[1]]

    def gate_and_up_gradient(dy_wide: Tensor) -> Tensor | None:
        """Gradient of gate and up, written over them; returns hidden where it was kept or made again."""
        gate, up = _gate_and_up(layer, kept.gate_up)
        num_features = gate.shape[1]
        if layer.gates_backward(batch):
            weight = weights["down"]
            weights.drop("down")
            both = kept.gate_up[:, : 2 * num_features]
            return gated_group_gradient_(dy_wide, weight, both, by=layer.operations.gated)
        d_hidden = input_gradient("down", dy_wide)
        hidden = kept.inputs.pop("down", None)
        rebuilt = new_rows(gate, num_features) if hidden is None and layer.has_adapter("down") else None
        swiglu_backward(d_hidden, gate, up, d_gate=gate, d_up=up, hidden_out=rebuilt, by=layer.operations.swiglu)
        return rebuilt if hidden is None else hidden[:, :num_features]

    num_spare = layer.spare_columns("down")
    d_out_wide = with_spare_columns(d_out, num_spare)
    if d_out_wide is d_out and num_spare and layer.gates_backward(batch):
        d_out_wide, part = gradient_buffer(d_out, num_spare)
        part.copy_(d_out)
    output_gradient("down", d_out_wide)
    hidden = gate_and_up_gradient(d_out_wide)
    if layer.has_adapter("down"):
        a_gradient("down", hidden)
    del d_out_wide, hidden
    d_gate_up, kept.gate_up = kept.gate_up, None  # the pass above has overwritten the one with the other
    output_gradient("gate_up", d_gate_up)
    d_n2 = input_gradient("gate_up", d_gate_up)
    del d_gate_up
    if layer.has_adapter("gate_up"):
        a_gradient("gate_up", normed("gate_up", kept.x2))
    d_projected.pop("gate_up")  # it lies in the widest buffer of the layer and would keep it
    d_x2_wide, d_x2 = gradient_buffer(d_n2, layer.spare_columns("o"))
    by = layer.operations.rms_norm
    add_rms_norm_backward(d_n2, d_out, kept.x2, layer.norm2_H, kept.rstd2, d_residual=d_x2, by=by)

    output_gradient("o", d_x2_wide)
    d_attended = input_gradient("o", d_x2_wide)
    if layer.has_adapter("o"):
        a_gradient("o", kept.attended[:, : layer.num_heads * layer.head_dim])
    d_qkv = _attend_backward(layer, batch, kept, d_attended)
    output_gradient("qkv", d_qkv)
    if layer.has_adapter("qkv"):
        a_gradient("qkv", normed("qkv", kept.x1))
    d_x1 = None
    if needs_dx:
        d_n1 = input_gradient("qkv", d_qkv)
        # The layer before has this gradient as its output's, whose product takes spare columns too.
        _, d_x1 = gradient_buffer(d_n1, layer.spare_columns("down"))
        add_rms_norm_backward(d_n1, d_x2, kept.x1, layer.norm1_H, kept.rstd1, d_residual=d_x1, by=by)
    return d_x1, gradients.for_autograd


class _DecoderLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, residual, update, layer: FusedLayer, batch: Batch, *masters):
        kept, x2, out = _forward(layer, batch, _Weights(layer), residual, update, needs_output=True)
        ctx.layer, ctx.batch = layer, batch
        ctx.kept = _Activations(x1=kept.x1) if layer.keeps == "input" else kept
        return x2, out

    @staticmethod
    def backward(ctx, d_x2, d_out):
        layer, batch, kept = ctx.layer, ctx.batch, ctx.kept
        ctx.kept = None
        recomputes = layer.keeps == "input"
        weights = _Weights(layer, for_backward=True, keeps=recomputes)
        if recomputes:
            kept, _, _ = _forward(layer, batch, weights, kept.x1, None, needs_output=False)
        d_x1, gradients = _backward(layer, batch, weights, kept, d_out, needs_dx=any(ctx.needs_input_grad[:2]))
        # The first layer has no update.
        return d_x1, d_x1 if ctx.needs_input_grad[1] else None, None, None, *gradients


def decoder_layer(
    residual_TH: Tensor, update_TH: Tensor | None, layer: FusedLayer, batch: Batch
) -> tuple[Tensor, Tensor]:
    """(x2, output) of the layer for the sum residual + update; the layer's result is x2 + output, left unsummed.

    Nothing given is mutated; backward adds to `.grad` of the masters that have one, without autograd's hooks, and to
    the others as autograd does. The two results must enter whatever follows only as their sum (as `add_rms_norm` and
    the next layer do): backward uses the one gradient that both then have.
    """
    return _DecoderLayer.apply(residual_TH, update_TH, layer, batch, *layer.masters)
