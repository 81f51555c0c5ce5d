"""Rotary position embedding of q and k in the projection's own layout: one launch, in place, no transposes.

Shapes: T tokens, Q query heads, K key heads, D features of a head, P positions of the tables. q is [T, Q*D] and k is
[T, K*D]; either may be a column slice of a wider buffer. The pairs are (i, i + D/2), Hugging Face's convention. Tables
are float32 and so is the arithmetic; the result is rounded once. (Hugging Face rounds the tables and both products.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from packloop.kernels import reference
from packloop.kernels.reference import Implementation

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:  # a CPU-only torch comes without Triton; reference.py serves it
    triton = None

# Pairs turned by one program: 8 bf16 elements of either half for each of 4 warps' threads, twice.
_PAIRS_PER_PROGRAM = 2048

if triton is not None:

    @triton.jit
    def _rotate_heads(
        in_ptr,
        out_ptr,
        first_head,
        num_heads,
        cos,
        sin,
        HALF: tl.constexpr,
        BLOCK_HEADS: tl.constexpr,
        BLOCK_D: tl.constexpr,
    ):
        heads = first_head + tl.arange(0, BLOCK_HEADS)
        pairs = tl.arange(0, BLOCK_D)
        inside = (heads < num_heads)[:, None] & (pairs < HALF)[None, :]
        offsets = heads[:, None] * (2 * HALF) + pairs[None, :]
        first = tl.load(in_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(in_ptr + offsets + HALF, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_ptr + offsets, first * cos - second * sin, mask=inside)
        tl.store(out_ptr + offsets + HALF, second * cos + first * sin, mask=inside)

    @triton.jit
    def _rope_kernel(
        q_ptr,
        k_ptr,
        q_out_ptr,
        k_out_ptr,
        cos_ptr,
        sin_ptr,
        position_ids_ptr,
        q_stride,
        k_stride,
        q_out_stride,
        k_out_stride,
        num_q_heads,
        num_k_heads,
        num_q_blocks,
        num_blocks,
        INVERSE: tl.constexpr,
        HALF: tl.constexpr,
        BLOCK_HEADS: tl.constexpr,
        BLOCK_D: tl.constexpr,
    ):
        token = (tl.program_id(0) // num_blocks).to(tl.int64)
        block = tl.program_id(0) % num_blocks
        pairs = tl.arange(0, BLOCK_D)
        position = tl.load(position_ids_ptr + token).to(tl.int64)
        cos = tl.load(cos_ptr + position * HALF + pairs, mask=pairs < HALF, other=0.0)[None, :]
        sin = tl.load(sin_ptr + position * HALF + pairs, mask=pairs < HALF, other=0.0)[None, :]
        if INVERSE:
            sin = -sin
        if block < num_q_blocks:
            _rotate_heads(
                q_ptr + token * q_stride,
                q_out_ptr + token * q_out_stride,
                block * BLOCK_HEADS,
                num_q_heads,
                cos,
                sin,
                HALF,
                BLOCK_HEADS,
                BLOCK_D,
            )
        else:
            _rotate_heads(
                k_ptr + token * k_stride,
                k_out_ptr + token * k_out_stride,
                (block - num_q_blocks) * BLOCK_HEADS,
                num_k_heads,
                cos,
                sin,
                HALF,
                BLOCK_HEADS,
                BLOCK_D,
            )


@dataclass(frozen=True)
class Rotation:
    """RoPE's fp32 tables [P, D/2] and the positions that index them; within a document they count up by one."""

    cos_PD: Tensor
    sin_PD: Tensor
    position_ids_T: Tensor


def _check(q_TQD: Tensor, k_TKD: Tensor, cos_PD: Tensor, sin_PD: Tensor, position_ids_T: Tensor) -> None:
    head_dim = 2 * cos_PD.shape[-1]
    for name, tensor in (("q", q_TQD), ("k", k_TKD)):
        if tensor.dim() != 2 or tensor.stride(1) != 1 or tensor.shape[1] % head_dim:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} and strides {tensor.stride()}; "
                f"[tokens, heads * {head_dim}] with adjacent features is needed"
            )
    if cos_PD.shape != sin_PD.shape or not (cos_PD.is_contiguous() and sin_PD.is_contiguous()):
        raise ValueError(f"cos {tuple(cos_PD.shape)} and sin {tuple(sin_PD.shape)}: contiguous [P, D/2] is needed")
    if cos_PD.dtype not in (torch.float32, torch.float64) or sin_PD.dtype != cos_PD.dtype:
        raise ValueError(f"tables are {cos_PD.dtype} and {sin_PD.dtype}; float32 is needed (bf16 loses the angle)")
    if position_ids_T.shape != q_TQD.shape[:1] or k_TKD.shape[0] != q_TQD.shape[0]:
        raise ValueError(
            f"position_ids {tuple(position_ids_T.shape)}, q {tuple(q_TQD.shape)} and k {tuple(k_TKD.shape)}: "
            "the same number of tokens is needed"
        )


def _rotate(
    q_TQD: Tensor,
    k_TKD: Tensor,
    q_out: Tensor,
    k_out: Tensor,
    cos_PD: Tensor,
    sin_PD: Tensor,
    position_ids_T: Tensor,
    inverse: bool,
    by: Implementation = "auto",
) -> None:
    """Launches the kernel, or its PyTorch counterpart; the outputs may be the inputs."""
    _check(q_TQD, k_TKD, cos_PD, sin_PD, position_ids_T)
    num_tokens, half = q_TQD.shape[0], cos_PD.shape[-1]
    if reference.serves(q_TQD, by):
        for source, target in ((q_TQD, q_out), (k_TKD, k_out)):
            heads_THD = source.unflatten(1, (-1, 2 * half))
            turned_THD = reference.rope(heads_THD, cos_PD, sin_PD, position_ids_T, inverse=inverse)
            target.copy_(turned_THD.flatten(1))
        return
    if num_tokens == 0:
        return
    num_q_heads, num_k_heads = q_TQD.shape[1] // (2 * half), k_TKD.shape[1] // (2 * half)
    block_d = triton.next_power_of_2(half)
    most_heads = triton.next_power_of_2(max(num_q_heads, num_k_heads))
    block_heads = max(min(_PAIRS_PER_PROGRAM // block_d, most_heads), 1)
    num_q_blocks = triton.cdiv(num_q_heads, block_heads)
    num_blocks = num_q_blocks + triton.cdiv(num_k_heads, block_heads)
    _rope_kernel[(num_tokens * num_blocks,)](
        q_TQD,
        k_TKD,
        q_out,
        k_out,
        cos_PD,
        sin_PD,
        position_ids_T.contiguous(),
        q_TQD.stride(0),
        k_TKD.stride(0),
        q_out.stride(0),
        k_out.stride(0),
        num_q_heads,
        num_k_heads,
        num_q_blocks,
        num_blocks,
        INVERSE=inverse,
        HALF=half,
        BLOCK_HEADS=block_heads,
        BLOCK_D=block_d,
        num_warps=4 if block_heads * block_d >= 1024 else 1,
    )


def rope_(
    q_TQD: Tensor,
    k_TKD: Tensor,
    cos_PD: Tensor,
    sin_PD: Tensor,
    position_ids_T: Tensor,
    *,
    inverse: bool = False,
    by: Implementation = "auto",
) -> None:
    """Overwrites q and k with their rotation, without autograd; `inverse=True` on their gradients is the backward.

    q [T, Q*D] and k [T, K*D] may be column slices (adjacent features, any row stride). Tables are float32 [P, D/2];
    position ids are integers [T] in [0, P), which is not checked: it would stop the GPU. Raises ValueError for shapes.
    """
    _rotate(q_TQD, k_TKD, q_TQD, k_TKD, cos_PD, sin_PD, position_ids_T, inverse, by)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_TQD, k_TKD, cos_PD, sin_PD, position_ids_T):
        ctx.save_for_backward(cos_PD, sin_PD, position_ids_T)
        q_out, k_out = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q_TQD, k_TKD))
        _rotate(q_TQD, k_TKD, q_out, k_out, cos_PD, sin_PD, position_ids_T, inverse=False)
        return q_out, k_out

    @staticmethod
    def backward(ctx, dq_TQD, dk_TKD):
        cos_PD, sin_PD, position_ids_T = ctx.saved_tensors
        dq_TQD, dk_TKD = dq_TQD.contiguous(), dk_TKD.contiguous()
        dq_in, dk_in = torch.empty_like(dq_TQD), torch.empty_like(dk_TKD)
        _rotate(dq_TQD, dk_TKD, dq_in, dk_in, cos_PD, sin_PD, position_ids_T, inverse=True)
        return dq_in, dk_in, None, None, None


def rope(q_TQD: Tensor, k_TKD: Tensor, cos_PD: Tensor, sin_PD: Tensor, position_ids_T: Tensor) -> tuple[Tensor, Tensor]:
    """New q and k, rotated by their tokens' positions; arguments as for `rope_`. Keeps no activation for backward.

    Source: Su et al., arXiv:2104.09864.
    """
    return _Rope.apply(q_TQD, k_TKD, cos_PD, sin_PD, position_ids_T)
