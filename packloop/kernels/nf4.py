"""NF4 -> dense weights in one launch, double-quantised block scales included; bit for bit bitsandbytes' result.

Two weights share a byte, the first in its high nibble. A block (64 weights) has one scale, itself stored in 8 bits:
`scale = code2[q] * absmax2[block of 256 scales] + offset`, `weight = code[nibble] * scale`. Each product and sum is
rounded to float32 by itself, as in bitsandbytes, where they are separate kernels: fused multiply-adds are off.
Source of the format: Dettmers et al., QLoRA, arXiv:2305.14314.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from packloop.kernels import reference

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Params4bit

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:  # a CPU-only torch comes without Triton; bitsandbytes serves it
    triton = None

# Words of 8 weights for one program, and its warps: a thread has 8 words, and each becomes one 16-byte bf16 store.
_BLOCK_WORDS = 1024
_NUM_WARPS = 4
_WORD_WEIGHTS = 8
# Words are numbered in int32 (the divisions are cheaper), elements in int64.
_MAX_WORDS = 2**31 - 1

if triton is not None:

    @triton.jit
    def _nf4_dequantize_kernel(
        packed_ptr,
        absmax_ptr,
        absmax_code_ptr,
        absmax2_ptr,
        offset_ptr,
        code_ptr,
        out_ptr,
        num_words,
        words_per_row,
        out_stride,
        WORDS_PER_SCALE: tl.constexpr,
        SCALES_PER_SCALE2: tl.constexpr,
        NESTED: tl.constexpr,
        STRIDED: tl.constexpr,
        BLOCK_WORDS: tl.constexpr,
    ):
        words = tl.program_id(0) * BLOCK_WORDS + tl.arange(0, BLOCK_WORDS)
        inside = words < num_words
        packed = tl.load(packed_ptr + words, mask=inside, other=0)
        block = words // WORDS_PER_SCALE
        if NESTED:
            quantised = tl.load(absmax_ptr + block, mask=inside, other=0).to(tl.int32)
            absmax2 = tl.load(absmax2_ptr + block // SCALES_PER_SCALE2, mask=inside, other=0.0)
            scale = tl.load(absmax_code_ptr + quantised) * absmax2 + tl.load(offset_ptr)
        else:
            scale = tl.load(absmax_ptr + block, mask=inside, other=0.0)
        # Little-endian: weight j is nibble j ^ 1 of the word, the high nibble of a byte coming first.
        weights = tl.arange(0, 8)
        nibbles = (packed[:, None] >> ((weights ^ 1) * 4)[None, :]) & 15
        values = tl.load(code_ptr + nibbles)  # a table of 64 bytes, through L1
        if STRIDED:
            starts = (words // words_per_row).to(tl.int64) * out_stride + (words % words_per_row) * 8
        else:
            starts = words.to(tl.int64) * 8
        tl.store(out_ptr + starts[:, None] + weights[None, :], values * scale[:, None], mask=inside[:, None])


def dequantize(
    weight: Params4bit | Tensor, quant_state: QuantState | None = None, *, out: Tensor | None = None
) -> Tensor:
    """The dense weight [O, I] of a bitsandbytes `Params4bit`, or of its packed bytes and `QuantState`.

    `out` [O, I] has adjacent columns and may have strided rows (rows of a joined buffer); without it a tensor of the
    state's dtype is made. Rounds once, to `out`'s dtype. Raises ValueError for a type other than NF4 or a wrong `out`.
    """
    state = weight.quant_state if quant_state is None else quant_state
    shape = tuple(state.shape)
    if state.quant_type != "nf4":
        raise ValueError(f"weight is quantised as {state.quant_type}; nf4 is needed (bnb_4bit_quant_type='nf4')")
    if out is None:
        out = torch.empty(shape, dtype=state.dtype, device=weight.device)
    if tuple(out.shape) != shape or out.stride(-1) != 1:
        raise ValueError(
            f"out has shape {tuple(out.shape)} and strides {out.stride()}; {shape} with adjacent columns is needed"
        )
    packed = weight.detach().reshape(-1).view(torch.uint8)
    row_weights = shape[-1]
    if reference.serves(packed) or row_weights % _WORD_WEIGHTS or len(shape) != 2:
        return out.copy_(_dequantize_with_bitsandbytes(packed, state, out.dtype))
    packed = packed.view(torch.int32)
    num_words = packed.numel()
    if num_words > _MAX_WORDS - _BLOCK_WORDS:
        raise ValueError(f"weight has {num_words * _WORD_WEIGHTS} elements; below 2^34 are needed")
    nested = state.state2 is not None
    _nf4_dequantize_kernel[(triton.cdiv(num_words, _BLOCK_WORDS),)](
        packed,
        state.absmax,
        state.state2.code if nested else state.absmax,
        state.state2.absmax if nested else state.absmax,
        state.offset if nested else state.absmax,
        state.code,
        out,
        num_words,
        row_weights // _WORD_WEIGHTS,
        out.stride(0),
        WORDS_PER_SCALE=state.blocksize // _WORD_WEIGHTS,
        SCALES_PER_SCALE2=state.state2.blocksize if nested else 1,
        NESTED=nested,
        STRIDED=out.stride(0) != row_weights,
        BLOCK_WORDS=_BLOCK_WORDS,
        num_warps=_NUM_WARPS,
        enable_fp_fusion=False,
    )
    return out


def _dequantize_with_bitsandbytes(packed: Tensor, state: QuantState, dtype: torch.dtype) -> Tensor:
    import bitsandbytes.functional

    state = bitsandbytes.functional.QuantState(
        absmax=state.absmax,
        shape=state.shape,
        code=state.code,
        blocksize=state.blocksize,
        quant_type=state.quant_type,
        dtype=dtype,
        offset=state.offset,
        state2=state.state2,
    )
    return bitsandbytes.functional.dequantize_4bit(packed[:, None], state)
