"""SwiGLU, `silu(gate) * up`, one pass forward and one backward that can rebuild the product on its way.

Shapes: T tokens, I features of the MLP. gate and up are [T, I] with adjacent features; they may be the halves of one
[T, 2I] buffer, or its even and its odd columns. Arithmetic is float32, rounded once. (Hugging Face also rounds
silu(gate) before the product.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from packloop.kernels import reference
from packloop.kernels.reference import Implementation

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:  # a CPU-only torch comes without Triton; reference.py serves it
    triton = None

# Features a program: one 16-byte bf16 load of each operand for each thread of 4 warps; 11008 wastes 2 % of the lanes.
_BLOCK_I = 1024

if triton is not None:

    @triton.jit
    def _swiglu_forward_kernel(
        gate_ptr,
        up_ptr,
        out_ptr,
        gate_stride,
        up_stride,
        out_stride,
        num_features,
        STEP: tl.constexpr,
        BLOCK_I: tl.constexpr,
    ):
        num_blocks = tl.cdiv(num_features, BLOCK_I)
        row = (tl.program_id(0) // num_blocks).to(tl.int64)
        columns = (tl.program_id(0) % num_blocks) * BLOCK_I + tl.arange(0, BLOCK_I)
        inside = columns < num_features
        gate = tl.load(gate_ptr + row * gate_stride + columns * STEP, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(up_ptr + row * up_stride + columns * STEP, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_ptr + row * out_stride + columns, gate * tl.sigmoid(gate) * up, mask=inside)

    @triton.jit
    def _swiglu_backward_kernel(
        d_hidden_ptr,
        gate_ptr,
        up_ptr,
        d_gate_ptr,
        d_up_ptr,
        hidden_ptr,
        d_hidden_stride,
        gate_stride,
        up_stride,
        d_gate_stride,
        d_up_stride,
        hidden_stride,
        num_features,
        REBUILDS_HIDDEN: tl.constexpr,
        STEP: tl.constexpr,
        GRADIENT_STEP: tl.constexpr,
        BLOCK_I: tl.constexpr,
    ):
        num_blocks = tl.cdiv(num_features, BLOCK_I)
        row = (tl.program_id(0) // num_blocks).to(tl.int64)
        columns = (tl.program_id(0) % num_blocks) * BLOCK_I + tl.arange(0, BLOCK_I)
        inside = columns < num_features
        d_hidden = tl.load(d_hidden_ptr + row * d_hidden_stride + columns, mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(gate_ptr + row * gate_stride + columns * STEP, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(up_ptr + row * up_stride + columns * STEP, mask=inside, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        # Every load of these columns precedes every store, so an output may lie over an input.
        if REBUILDS_HIDDEN:
            tl.store(hidden_ptr + row * hidden_stride + columns, gate * sigmoid * up, mask=inside)
        d_gate = d_hidden * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
        d_columns = columns * GRADIENT_STEP
        tl.store(d_gate_ptr + row * d_gate_stride + d_columns, d_gate, mask=inside)
        tl.store(d_up_ptr + row * d_up_stride + d_columns, d_hidden * gate * sigmoid, mask=inside)


# Those that may lie in every other column, and then both of a pair do.
_PAIRS = {"gate": "up", "up": "gate", "d_gate": "d_up", "d_up": "d_gate"}


def _require_rows(**tensors: Tensor) -> None:
    shapes = {tuple(tensor.shape) for tensor in tensors.values()}
    fits = len(shapes) == 1 and all(tensor.dim() == 2 for tensor in tensors.values())
    for name, tensor in tensors.items():
        steps = {tensor.stride(-1), tensors.get(_PAIRS.get(name), tensor).stride(-1)}
        fits = fits and (steps == {1} or (steps == {2} and name in _PAIRS))
    if not fits:
        given = ", ".join(f"{name} {tuple(t.shape)} strides {t.stride()}" for name, t in tensors.items())
        raise ValueError(f"{given}: equal [tokens, features] with adjacent features are needed")


def swiglu_forward(gate_TI: Tensor, up_TI: Tensor, *, out: Tensor | None = None, by: Implementation = "auto") -> Tensor:
    """`silu(gate) * up` without autograd, into `out` when given (which may be a strided slice, or gate or up)."""
    if out is None:
        out = torch.empty_like(gate_TI, memory_format=torch.contiguous_format)
    _require_rows(gate=gate_TI, up=up_TI, out=out)
    if reference.serves(gate_TI, by):
        return out.copy_(reference.swiglu(gate_TI, up_TI))
    num_rows, num_features = gate_TI.shape
    if num_rows > 0:
        _swiglu_forward_kernel[(num_rows * triton.cdiv(num_features, _BLOCK_I),)](
            gate_TI,
            up_TI,
            out,
            gate_TI.stride(0),
            up_TI.stride(0),
            out.stride(0),
            num_features,
            STEP=gate_TI.stride(1),
            BLOCK_I=_BLOCK_I,
            num_warps=4,
        )
    return out


def swiglu_backward(
    d_hidden_TI: Tensor,
    gate_TI: Tensor,
    up_TI: Tensor,
    *,
    d_gate: Tensor | None = None,
    d_up: Tensor | None = None,
    hidden_out: Tensor | None = None,
    by: Implementation = "auto",
) -> tuple[Tensor, Tensor]:
    """`(d_gate, d_up)` of `swiglu_forward` without autograd, in one pass.

    Without buffers the two are the halves of one new [T, 2I] tensor. A buffer may be any of the inputs, which is then
    overwritten: `d_gate=gate, d_up=up` needs no memory. `hidden_out`, when given, receives the forward's product bit
    for bit (it may be `d_hidden`), for the gradient of the linear layer that follows.
    """
    num_rows, num_features = gate_TI.shape
    if (d_gate is None) != (d_up is None):
        raise ValueError("d_gate and d_up: give both buffers or neither")
    if d_gate is None or d_up is None:
        both = torch.empty(num_rows, 2 * num_features, dtype=gate_TI.dtype, device=gate_TI.device)
        d_gate, d_up = both.chunk(2, dim=1)
    hidden = d_gate if hidden_out is None else hidden_out
    checked = {} if hidden_out is None else {"hidden_out": hidden_out}
    _require_rows(d_hidden=d_hidden_TI, gate=gate_TI, up=up_TI, d_gate=d_gate, d_up=d_up, **checked)
    if reference.serves(gate_TI, by):
        product = None if hidden_out is None else reference.swiglu(gate_TI, up_TI)
        d_gate_value, d_up_value = reference.swiglu_backward(d_hidden_TI, gate_TI, up_TI)
        if hidden_out is not None:
            hidden_out.copy_(product)
        return d_gate.copy_(d_gate_value), d_up.copy_(d_up_value)
    if num_rows > 0:
        _swiglu_backward_kernel[(num_rows * triton.cdiv(num_features, _BLOCK_I),)](
            d_hidden_TI,
            gate_TI,
            up_TI,
            d_gate,
            d_up,
            hidden,
            d_hidden_TI.stride(0),
            gate_TI.stride(0),
            up_TI.stride(0),
            d_gate.stride(0),
            d_up.stride(0),
            hidden.stride(0),
            num_features,
            REBUILDS_HIDDEN=hidden_out is not None,
            STEP=gate_TI.stride(1),
            GRADIENT_STEP=d_gate.stride(1),
            BLOCK_I=_BLOCK_I,
            num_warps=4,
        )
    return d_gate, d_up


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_TI, up_TI):
        ctx.save_for_backward(gate_TI, up_TI)
        return swiglu_forward(gate_TI, up_TI)

    @staticmethod
    def backward(ctx, d_hidden_TI):
        gate_TI, up_TI = ctx.saved_tensors
        return swiglu_backward(d_hidden_TI.contiguous(), gate_TI, up_TI)


def swiglu(gate_TI: Tensor, up_TI: Tensor) -> Tensor:
    """`silu(gate) * up`; keeps only gate and up for backward. Source: Shazeer, arXiv:2002.05202."""
    return _SwiGlu.apply(gate_TI, up_TI)
