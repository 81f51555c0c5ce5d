"""NF4 -> dense weights in one launch, double-quantised block scales included; bit for bit bitsandbytes' result.

Two weights share a byte, the first in its high nibble. A block (64 weights) has one scale, itself stored in 8 bits:
`scale = code2[q] * absmax2[block of 256 scales] + offset`, `weight = code[nibble] * scale`. Each product and sum is
rounded to float32 by itself, as in bitsandbytes, where they are separate kernels: fused multiply-adds are off.
Source of the format: Dettmers et al., QLoRA, arXiv:2305.14314.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from packloop.kernels import reference
from packloop.kernels.reference import Implementation, member_slices

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Params4bit

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:  # a CPU-only torch comes without Triton; bitsandbytes serves it
    triton = None

# Words of 8 weights for one program, and its warps: a thread has 4 words, and each becomes one 16-byte bf16 store.
_BLOCK_WORDS = 512
_NUM_WARPS = 4
_WORD_WEIGHTS = 8
_WORD_BYTES = 4
# Words are numbered in int32 (the divisions are cheaper), elements in int64.
_MAX_WORDS = 2**31 - 1

if triton is not None:

    @triton.jit
    def _nf4_dequantize_kernel(
        table_ptr,
        code_ptr,
        out_ptr,
        words_per_row,
        out_stride,
        row_step,
        WORDS_PER_SCALE: tl.constexpr,
        SCALES_PER_SCALE2: tl.constexpr,
        NESTED: tl.constexpr,
        BLOCK_WORDS: tl.constexpr,
    ):
        """One row of the table a weight: see `Nf4Group`."""
        row = table_ptr + tl.program_id(1) * 7
        num_words = tl.load(row).to(tl.int32)
        first_word = tl.program_id(0) * BLOCK_WORDS
        if first_word < num_words:
            # 16 bytes is what the loads and stores of a thread need; the table is checked for it.
            packed_ptr = tl.multiple_of(tl.load(row + 2).to(tl.pointer_type(tl.int32)), 16)
            words = first_word + tl.arange(0, BLOCK_WORDS)
            inside = words < num_words
            packed = tl.load(packed_ptr + words, mask=inside, other=0)
            block = words // WORDS_PER_SCALE
            if NESTED:
                absmax_ptr = tl.load(row + 3).to(tl.pointer_type(tl.uint8))
                absmax2_ptr = tl.load(row + 4).to(tl.pointer_type(tl.float32))
                absmax_code_ptr = tl.load(row + 5).to(tl.pointer_type(tl.float32))
                offset = tl.load(tl.load(row + 6).to(tl.pointer_type(tl.float32)))
                quantised = tl.load(absmax_ptr + block, mask=inside, other=0).to(tl.int32)
                absmax2 = tl.load(absmax2_ptr + block // SCALES_PER_SCALE2, mask=inside, other=0.0)
                scale = tl.load(absmax_code_ptr + quantised) * absmax2 + offset
            else:
                scale = tl.load(tl.load(row + 3).to(tl.pointer_type(tl.float32)) + block, mask=inside, other=0.0)
            # Little-endian: weight j is nibble j ^ 1 of the word, the high nibble of a byte coming first.
            weights = tl.arange(0, 8)
            nibbles = (packed[:, None] >> ((weights ^ 1) * 4)[None, :]) & 15
            values = tl.load(code_ptr + nibbles)  # a table of 64 bytes, through L1
            rows = tl.load(row + 1) + words // words_per_row * row_step
            starts = rows * out_stride + (words % words_per_row) * 8
            tl.store(out_ptr + starts[:, None] + weights[None, :], values * scale[:, None], mask=inside[:, None])


class Nf4Group:
    """NF4 weights [O_i, I] of one I, one below the other: dequantised together, in one launch on a GPU.

    weights: `Params4bit`, or pairs of packed bytes and their `QuantState`. interleaved: instead, the first row of each
    before the second of any. Raises ValueError for a type other than NF4 or weights that do not fit together.
    """

    def __init__(self, weights: Sequence[Params4bit | tuple[Tensor, QuantState]], *, interleaved: bool = False):
        pairs = [weight if isinstance(weight, tuple) else (weight, weight.quant_state) for weight in weights]
        self._packed = [weight.detach().reshape(-1).view(torch.uint8) for weight, _ in pairs]
        self._states = [state for _, state in pairs]
        for state in self._states:
            if state.quant_type != "nf4":
                raise ValueError(
                    f"weight is quantised as {state.quant_type}; nf4 is needed (bnb_4bit_quant_type='nf4')"
                )
        alike = {(tuple(state.shape)[1:], state.blocksize, self._outer_blocksize(state)) for state in self._states}
        if len(alike) > 1 or any(len(state.shape) != 2 for state in self._states):
            given = [tuple(state.shape) for state in self._states]
            raise ValueError(f"weights {given} are no group: one width and one block size are needed")
        self.shape = (sum(state.shape[0] for state in self._states), self._states[0].shape[1])
        # Where each weight's rows lie in the group's.
        self._rows = member_slices([state.shape[0] for state in self._states], interleaved)
        self._table: Tensor | None = None

    @staticmethod
    def _outer_blocksize(state: QuantState) -> int | None:
        return state.state2.blocksize if state.state2 is not None else None

    def dequantize(self, out: Tensor, *, by: Implementation = "auto") -> Tensor:
        """Fills `out` [sum of O, I], which has adjacent columns and may have strided rows, rounding once to its dtype.

        `by="torch"` is bitsandbytes' own kernel, weight after weight. Raises ValueError for a wrong `out`.
        """
        if tuple(out.shape) != self.shape or out.stride(-1) != 1:
            raise ValueError(
                f"out has shape {tuple(out.shape)} and strides {out.stride()}; {self.shape} with adjacent columns is "
                "needed"
            )
        if reference.serves(out, by) or self.shape[1] % _WORD_WEIGHTS:
            for packed, state, rows in zip(self._packed, self._states, self._rows):
                out[rows].copy_(_dequantize_with_bitsandbytes(packed, state, out.dtype))
            return out
        if self._table is None:
            self._table = self._make_table().to(out.device)
        state = self._states[0]
        largest = max(packed.numel() for packed in self._packed) // _WORD_BYTES
        _nf4_dequantize_kernel[(triton.cdiv(largest, _BLOCK_WORDS), len(self._packed))](
            self._table,
            state.code,
            out,
            self.shape[1] // _WORD_WEIGHTS,
            out.stride(0),
            self._rows[0].step or 1,
            WORDS_PER_SCALE=state.blocksize // _WORD_WEIGHTS,
            SCALES_PER_SCALE2=self._outer_blocksize(state) or 1,
            NESTED=state.state2 is not None,
            BLOCK_WORDS=_BLOCK_WORDS,
            num_warps=_NUM_WARPS,
            enable_fp_fusion=False,
        )
        return out

    def _make_table(self) -> Tensor:
        """int64 [weights, 7]: words, first row; addresses of bytes, scales, the scales' own scales, code, offset."""
        rows = []
        for packed, state, into in zip(self._packed, self._states, self._rows):
            num_words = packed.numel() // _WORD_BYTES
            if num_words > _MAX_WORDS - _BLOCK_WORDS:
                raise ValueError(f"weight has {num_words * _WORD_WEIGHTS} elements; below 2^34 are needed")
            assert packed.data_ptr() % 16 == 0, "an allocator aligns to more than 16 bytes"
            nested = (0, 0, 0)
            if outer := state.state2:
                nested = (outer.absmax.data_ptr(), outer.code.data_ptr(), state.offset.data_ptr())
            rows.append((num_words, into.start, packed.data_ptr(), state.absmax.data_ptr(), *nested))
        return torch.tensor(rows, dtype=torch.int64)


def dequantize(
    weight: Params4bit | Tensor, quant_state: QuantState | None = None, *, out: Tensor | None = None
) -> Tensor:
    """The dense weight [O, I] of a bitsandbytes `Params4bit`, or of its packed bytes and `QuantState`.

    Into `out` as `Nf4Group.dequantize` fills it; without it a tensor of the state's dtype is made.
    """
    group = Nf4Group([weight if quant_state is None else (weight, quant_state)])
    if out is None:
        state = weight.quant_state if quant_state is None else quant_state
        out = torch.empty(group.shape, dtype=state.dtype, device=weight.device)
    return group.dequantize(out)


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
