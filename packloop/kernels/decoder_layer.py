"""A whole Llama decoder layer as one autograd function, over a frozen base with LoRA adapters.

    x1 = residual + update          n1 = norm(x1)        q, k, v = n1 Wqkv' + LoRA, RoPE in place
    a  = attention(q, k, v)         x2 = x1 + a Wo' + LoRA                  n2 = norm(x2)
    gate, up = n2 Wgu' + LoRA       h  = silu(gate) * up                    returns (x2, h Wd' + LoRA)

The pair (residual, update) travels between layers unsummed, so that every addition is fused into the norm after it.
Kept for backward, a token and layer: x1, q, k, v, a, x2, gate, up; n1, n2 and h are rebuilt in the passes that read
their sources anyway. With `recomputes` only x1 is kept and the forward runs again, and the base's weights,
dequantised once, serve that run and the backward pass.

Shapes: T slots, H hidden features, I intermediate features, O output features of a group. One tensor of gradients
serves residual and update: they enter only as a sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from packloop.kernels.attention import Attention, DocumentLayout
from packloop.kernels.lora_linear import (
    Dropout,
    LoraGroup,
    lora_a_gradient,
    lora_b_gradients,
    lora_group_forward,
    lora_input_gradient,
    lora_project,
)
from packloop.kernels.rms_norm import add_rms_norm_backward, add_rms_norm_forward
from packloop.kernels.rope import rope_
from packloop.kernels.swiglu import swiglu_backward, swiglu_forward

GROUPS = ("qkv", "o", "gate_up", "down")


@dataclass(frozen=True)
class Batch:
    """What every layer of one micro-batch shares. Tables are fp32 [P, D/2]; position_ids_T index them."""

    layout: DocumentLayout
    cos_PD: Tensor
    sin_PD: Tensor
    position_ids_T: Tensor
    dropout: Dropout | None


@dataclass(frozen=True)
class FusedLayer:
    """One layer's frozen parts and adapters, as the function takes them.

    weights: for each group a callable that returns its dense weights, rows one after the other being the group's
    outputs. masters: the adapters' fp32 parameters, for each group and member A then B, in the order gradients are
    returned.
    """

    index: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    eps: float
    norm1_H: Tensor
    norm2_H: Tensor
    weights: dict[str, Callable[[], Sequence[Tensor]]]
    groups: dict[str, LoraGroup]
    masters: tuple[Tensor, ...]
    attention: Attention
    recomputes: bool

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    def dropout(self, batch: Batch, group: str) -> Dropout | None:
        """The group's mask: its own stream under the micro-batch's seed. None where there is nothing to drop."""
        if batch.dropout is None or self.groups[group].a_RH is None:
            return None
        return batch.dropout._replace(stream=self.index * len(GROUPS) + GROUPS.index(group))


@dataclass
class _Activations:
    """What the forward pass leaves for the backward pass."""

    x1: Tensor
    rstd1: Tensor
    qkv: Tensor
    attended: Tensor
    attention_saved: object
    x2: Tensor
    rstd2: Tensor
    gate_up: Tensor
    projected: dict[str, Tensor | None] = field(default_factory=dict)


class _Weights:
    """Dense weights of one layer, made when first asked for and kept until the object goes."""

    def __init__(self, layer: FusedLayer, *, keeps: bool):
        self._layer, self._keeps, self._made = layer, keeps, {}

    def __getitem__(self, group: str) -> Sequence[Tensor]:
        if group in self._made:
            return self._made[group]
        weights = self._layer.weights[group]()
        if self._keeps:
            self._made[group] = weights
        return weights

    def drop(self, group: str) -> None:
        self._made.pop(group, None)


def _split_heads(layer: FusedLayer, qkv_TO: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Views of q [T, heads, D], k and v [T, kv_heads, D] in the joined buffer."""
    q_size, kv_size = layer.num_heads * layer.head_dim, layer.num_kv_heads * layer.head_dim
    parts = qkv_TO.split([q_size, kv_size, kv_size], dim=1)
    return tuple(part.unflatten(1, (-1, layer.head_dim)) for part in parts)


def _rotate(layer: FusedLayer, batch: Batch, qkv_TO: Tensor, *, inverse: bool) -> None:
    q_size, kv_size = layer.num_heads * layer.head_dim, layer.num_kv_heads * layer.head_dim
    q_TO, k_TO = qkv_TO[:, :q_size], qkv_TO[:, q_size : q_size + kv_size]
    rope_(q_TO, k_TO, batch.cos_PD, batch.sin_PD, batch.position_ids_T, inverse=inverse)


def _forward(
    layer: FusedLayer, batch: Batch, weights: _Weights, residual: Tensor, update: Tensor | None, *, needs_output: bool
) -> tuple[_Activations, Tensor, Tensor | None]:
    projected: dict[str, Tensor | None] = {}

    def linear(group: str, x: Tensor) -> Tensor:
        y, projected[group] = lora_group_forward(x, weights[group], layer.groups[group], layer.dropout(batch, group))
        return y

    x1, n1, rstd1 = add_rms_norm_forward(residual, update, layer.norm1_H, layer.eps)
    qkv = linear("qkv", n1)
    del n1
    _rotate(layer, batch, qkv, inverse=False)
    attended, attention_saved = layer.attention.forward(*_split_heads(layer, qkv), batch.layout, layer.scale)
    attended = attended.flatten(1)
    x2, n2, rstd2 = add_rms_norm_forward(x1, linear("o", attended), layer.norm2_H, layer.eps)
    gate_up = linear("gate_up", n2)
    del n2
    out = None
    # A recomputation stops here unless down_proj's own adapter needs its input's projection.
    if needs_output or layer.groups["down"].a_RH is not None:
        hidden = swiglu_forward(*gate_up.chunk(2, dim=1))
        if needs_output:
            out = linear("down", hidden)
        else:
            projected["down"] = lora_project(hidden, layer.groups["down"], layer.dropout(batch, "down"))
    # The function returns x2 as well: a detached alias keeps its graph node from holding itself alive.
    kept = _Activations(x1.detach(), rstd1, qkv, attended, attention_saved, x2.detach(), rstd2, gate_up, projected)
    return kept, x2, out


def _backward(
    layer: FusedLayer, batch: Batch, weights: _Weights, kept: _Activations, d_out: Tensor, *, needs_dx: bool
) -> tuple[Tensor | None, list[Tensor]]:
    """(gradient of x1, gradients of the masters in their order) from the one gradient of (x2 + output)."""
    gradients: dict[str, list] = {}
    d_projected: dict[str, Tensor | None] = {}

    def output_gradient(group: str, dy: Tensor) -> None:
        d_projected[group], gradients[group] = lora_b_gradients(
            dy, kept.projected.get(group), layer.groups[group], layer.dropout(batch, group)
        )

    def input_gradient(group: str, dy: Tensor) -> Tensor:
        dx = lora_input_gradient(
            dy, d_projected[group], weights[group], layer.groups[group], layer.dropout(batch, group)
        )
        weights.drop(group)
        return dx

    def a_gradient(group: str, x: Tensor) -> Tensor:
        return lora_a_gradient(d_projected[group], x, layer.groups[group], layer.dropout(batch, group))

    a_gradients: dict[str, Tensor] = {}
    gate, up = kept.gate_up.chunk(2, dim=1)
    output_gradient("down", d_out)
    d_hidden = input_gradient("down", d_out)
    rebuilds_hidden = d_projected["down"] is not None
    hidden = torch.empty_like(d_hidden) if rebuilds_hidden else None
    swiglu_backward(d_hidden, gate, up, d_gate=gate, d_up=up, hidden_out=hidden)
    if rebuilds_hidden:
        a_gradients["down"] = a_gradient("down", hidden)
    del d_hidden, hidden
    d_gate_up = kept.gate_up  # overwritten in place by the pass above
    output_gradient("gate_up", d_gate_up)
    d_n2 = input_gradient("gate_up", d_gate_up)
    del d_gate_up, gate, up
    kept.gate_up = None
    if d_projected["gate_up"] is not None:
        _, n2, _ = add_rms_norm_forward(kept.x2, None, layer.norm2_H, layer.eps)
        a_gradients["gate_up"] = a_gradient("gate_up", n2)
        del n2
    d_x2, _ = add_rms_norm_backward(d_n2, d_out, kept.x2, layer.norm2_H, kept.rstd2, d_residual=d_n2)

    output_gradient("o", d_x2)
    d_attended = input_gradient("o", d_x2)
    if d_projected["o"] is not None:
        a_gradients["o"] = a_gradient("o", kept.attended)
    d_qkv = torch.empty_like(kept.qkv)
    layer.attention.backward(
        kept.attention_saved,
        d_attended.unflatten(1, (-1, layer.head_dim)),
        *_split_heads(layer, kept.qkv),
        batch.layout,
        layer.scale,
        *_split_heads(layer, d_qkv),
    )
    _rotate(layer, batch, d_qkv, inverse=True)
    output_gradient("qkv", d_qkv)
    if d_projected["qkv"] is not None:
        _, n1, _ = add_rms_norm_forward(kept.x1, None, layer.norm1_H, layer.eps)
        a_gradients["qkv"] = a_gradient("qkv", n1)
        del n1
    d_x1 = None
    if needs_dx:
        d_n1 = input_gradient("qkv", d_qkv)
        d_x1, _ = add_rms_norm_backward(d_n1, d_x2, kept.x1, layer.norm1_H, kept.rstd1, d_residual=d_n1)
    return d_x1, _in_master_order(layer, a_gradients, gradients)


def _in_master_order(layer: FusedLayer, a_gradients: dict[str, Tensor], b_gradients: dict[str, list]) -> list[Tensor]:
    ordered = []
    for group in GROUPS:
        for (_, ranks, b_Or), d_b in zip(layer.groups[group].members(), b_gradients[group], strict=True):
            if b_Or is not None:
                ordered += [a_gradients[group][ranks], d_b]
    return ordered


class _DecoderLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, residual, update, layer: FusedLayer, batch: Batch, *masters):
        weights = _Weights(layer, keeps=False)
        kept, x2, out = _forward(layer, batch, weights, residual, update, needs_output=True)
        ctx.layer, ctx.batch = layer, batch
        ctx.kept = _only_input(kept) if layer.recomputes else kept
        return x2, out

    @staticmethod
    def backward(ctx, d_x2, d_out):
        layer, batch, kept = ctx.layer, ctx.batch, ctx.kept
        ctx.kept = None
        weights = _Weights(layer, keeps=layer.recomputes)
        if layer.recomputes:
            kept, _, _ = _forward(layer, batch, weights, kept.x1, None, needs_output=False)
        d_x1, gradients = _backward(layer, batch, weights, kept, d_out, needs_dx=ctx.needs_input_grad[0])
        return d_x1, d_x1, None, None, *gradients


def _only_input(kept: _Activations) -> _Activations:
    """Only what a recomputation starts from."""
    return replace(
        kept,
        rstd1=None,
        qkv=None,
        attended=None,
        attention_saved=None,
        x2=None,
        rstd2=None,
        gate_up=None,
        projected={},
    )


def decoder_layer(
    residual_TH: Tensor, update_TH: Tensor | None, layer: FusedLayer, batch: Batch
) -> tuple[Tensor, Tensor]:
    """(x2, output) of the layer for the sum residual + update; the layer's result is x2 + output, left unsummed.

    Nothing given is mutated. The two results must enter whatever follows only as their sum (as `add_rms_norm` and the
    next layer do): backward uses the one gradient that both then have. Gradients reach the masters in their dtype.
    """
    return _DecoderLayer.apply(residual_TH, update_TH, layer, batch, *layer.masters)
