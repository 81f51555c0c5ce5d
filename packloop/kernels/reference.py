"""Plain PyTorch versions of every kernel: the oracles of the tests and benchmarks, and the path taken without a GPU.

They follow the input's dtype where Hugging Face's Llama does and do their arithmetic in at least float32, so the same
function is a float64 oracle when it is given float64.

Shapes: T tokens (packs flattened), H features, I features of the MLP, O outputs, R rank, D features of a head,
Q query heads, K key/value heads, V vocabulary, N rows that count, P positions of a table.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from itertools import accumulate
from math import prod
from typing import Literal, NamedTuple

import torch
from torch import Tensor

# The 16 values of 4-bit NormalFloat (Dettmers et al., QLoRA, arXiv:2305.14314, appendix E), in float32.
NF4_CODE = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)

# Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011): Philox4x32 passes BigCrush from 7 rounds on.
PHILOX_ROUNDS = 7
# A dropout decision takes 16 random bits, so one Philox call of 4 x 32 bits serves this many neighbours.
DROPOUT_GROUP = 8


# Who does an operation's work: these functions, Triton's kernels, or whichever fits the tensors.
Implementation = Literal["auto", "triton", "torch"]
_HAS_TRITON = importlib.util.find_spec("triton") is not None


def why_not_triton(device: torch.device) -> str | None:
    """None where Triton's kernels run on the device (on a CPU: where Triton interprets them), otherwise why not."""
    if not _HAS_TRITON:
        return "needs Triton, which is not installed: pip install triton"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"needs a CUDA GPU, the device is {device.type}"
    return None


def serves(tensor: Tensor, by: Implementation = "auto") -> bool:
    """Whether these functions do the kernels' work on `tensor`. ValueError where `by` asks for a Triton that cannot."""
    if by == "torch":
        return True
    reason = why_not_triton(tensor.device)
    if by == "triton" and reason:
        raise ValueError(f"a Triton kernel {reason}")
    return reason is not None


def member_slices(sizes: Sequence[int], interleaved: bool) -> list[slice]:
    """Where the rows or columns of each member of a group lie: member after member, or in turns, one of each.

    ValueError where members of several sizes are to take turns.
    """
    if interleaved:
        if len(set(sizes)) > 1:
            raise ValueError(f"members of {tuple(sizes)} rows cannot interleave: one size is needed")
        return [slice(index, sum(sizes), len(sizes)) for index in range(len(sizes))]
    return [slice(end - size, end) for end, size in zip(accumulate(sizes), sizes)]


class Block(NamedTuple):
    """A block of a group's block-diagonal B: one member's columns of the outputs and of the ranks."""

    columns: slice
    ranks: slice


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def rms_norm(x_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """`weight * (x / sqrt(mean(x^2) + eps))`; the quotient is rounded to x's dtype before it meets the weight."""
    x = x_TH.to(_compute_dtype(x_TH.dtype))
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return weight_H * normed.to(x_TH.dtype)


def add_rms_norm(residual_TH: Tensor, update_TH: Tensor, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`(s, rms_norm(s))` of `s = residual + update`, the sum being rounded to the inputs' dtype."""
    residual_out_TH = residual_TH + update_TH
    return residual_out_TH, rms_norm(residual_out_TH, weight_H, eps)


def rms_norm_backward(d_normed_TH: Tensor, x_TH: Tensor, weight_H: Tensor, rstd_T: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `rms_norm` for x, in the compute dtype (not rounded), and for the weight, summed in that dtype."""
    dtype = _compute_dtype(x_TH.dtype)
    xhat = x_TH.to(dtype) * rstd_T.to(dtype)[:, None]
    scaled = d_normed_TH.to(dtype) * weight_H.to(dtype)
    dx = rstd_T.to(dtype)[:, None] * (scaled - xhat * (scaled * xhat).mean(-1, keepdim=True))
    d_weight = (d_normed_TH.to(dtype) * xhat.to(x_TH.dtype).to(dtype)).sum(0)
    return dx, d_weight


def rope_tables(inv_freq: Tensor, num_positions: int, attention_scaling: float = 1.0) -> tuple[Tensor, Tensor]:
    """float32 (cos, sin) [P, D/2] of `position * inv_freq`, the angle taken in float64 so that far positions hold."""
    positions = torch.arange(num_positions, dtype=torch.float64, device=inv_freq.device)
    angles = positions[:, None] * inv_freq.to(torch.float64)[None, :]
    return (angles.cos() * attention_scaling).float(), (angles.sin() * attention_scaling).float()


def rope(x_THD: Tensor, cos_PD: Tensor, sin_PD: Tensor, position_ids_T: Tensor, *, inverse: bool = False) -> Tensor:
    """Rotates the pairs (i, i + D/2) of each head by its position's angle, Hugging Face's convention.

    x is [T, heads, D], the tables [P, D/2]; arithmetic in the compute dtype, rounded once. `inverse` turns back.
    """
    dtype = _compute_dtype(x_THD.dtype)
    positions = position_ids_T.long()
    cos = cos_PD[positions][:, None, :].to(dtype)
    sin = sin_PD[positions][:, None, :].to(dtype)
    if inverse:
        sin = -sin
    first, second = x_THD.to(dtype).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_THD.dtype)


def swiglu(gate_TI: Tensor, up_TI: Tensor) -> Tensor:
    """`silu(gate) * up`, rounded once at the end (Hugging Face rounds silu(gate) to the dtype as well)."""
    dtype = _compute_dtype(gate_TI.dtype)
    gate = gate_TI.to(dtype)
    return (gate * torch.sigmoid(gate) * up_TI.to(dtype)).to(gate_TI.dtype)


def swiglu_backward(d_hidden_TI: Tensor, gate_TI: Tensor, up_TI: Tensor) -> tuple[Tensor, Tensor]:
    """`(d_gate, d_up)` of `swiglu`, rounded once."""
    dtype = _compute_dtype(gate_TI.dtype)
    d_hidden, gate, up = (t.to(dtype) for t in (d_hidden_TI, gate_TI, up_TI))
    sigmoid = torch.sigmoid(gate)
    d_gate = d_hidden * up * sigmoid * (1 + gate * (1 - sigmoid))
    return d_gate.to(gate_TI.dtype), (d_hidden * gate * sigmoid).to(gate_TI.dtype)


def lora_linear(
    x_TH: Tensor,
    weight_OH: Tensor,
    a_RH: Tensor | None = None,
    b_OR: Tensor | None = None,
    scaling: float = 1.0,
    *,
    keep_mask_TH: Tensor | None = None,
    keep_probability: float = 1.0,
) -> Tensor:
    """`x W^T + scaling * (mask * x / keep_probability) A^T B^T`, all in x's dtype."""
    y_TO = x_TH @ weight_OH.to(x_TH.dtype).T
    if a_RH is None or b_OR is None:
        return y_TO
    dropped_TH = x_TH if keep_mask_TH is None else x_TH * keep_mask_TH.to(x_TH.dtype) / keep_probability
    return y_TO + scaling * ((dropped_TH @ a_RH.to(x_TH.dtype).T) @ b_OR.to(x_TH.dtype).T)


def narrow_product(x_TK: Tensor, w_KR: Tensor, blocks: Sequence[Block], scale: float) -> Tensor:
    """`scale * x w` [T, R] of a w that is zero outside its blocks, the ranks of each being columns of the result."""
    x, w = (operand.to(_compute_dtype(operand.dtype)) for operand in (x_TK, w_KR))
    return torch.cat([scale * (x[:, b.columns] @ w[b.columns, b.ranks]) for b in blocks], dim=1).to(x_TK.dtype)


def gradient_product(left_TO: Tensor, right_TR: Tensor, blocks: Sequence[Block]) -> list[Tensor]:
    """`left^T right` [O_i, r] of each block, in at least float32."""
    left, right = (operand.to(_compute_dtype(operand.dtype)) for operand in (left_TO, right_TR))
    return [left[:, block.columns].T @ right[:, block.ranks] for block in blocks]


def nf4_absmax(codes: Tensor, table: Tensor, absmax: Tensor, offset: Tensor, blocksize: int) -> Tensor:
    """Block scales of double quantisation: `table[codes] * absmax[block] + offset`, product and sum rounded apart."""
    scales = absmax.repeat_interleave(blocksize)[: codes.numel()]
    return table[codes.reshape(-1).long()] * scales + offset


def nf4_dequantize(
    packed: Tensor, absmax: Tensor, shape: tuple[int, ...], dtype: torch.dtype, blocksize: int = 64
) -> Tensor:
    """`code[nibble] * absmax[block]`, multiplied in float32, rounded to `dtype`; a byte's high nibble comes first."""
    table = torch.tensor(NF4_CODE, dtype=torch.float32, device=packed.device)
    bytes_ = packed.reshape(-1).view(torch.uint8)
    nibbles = torch.stack((bytes_ >> 4, bytes_ & 15), dim=-1).reshape(-1)[: prod(shape)]
    scales = absmax.float().repeat_interleave(blocksize)[: nibbles.numel()]
    return (table[nibbles.long()] * scales).to(dtype).reshape(shape)


def attention(
    q_TQD: Tensor, k_TKD: Tensor, v_TKD: Tensor, document_ids_T: Tensor, *, scale: float | None = None
) -> Tensor:
    """Causal softmax attention within documents; query head h reads key/value head `h * K // Q`.

    Document -1 is padding: its slots attend among themselves, as those of any other document.
    """
    dtype = _compute_dtype(q_TQD.dtype)
    group = q_TQD.shape[1] // k_TKD.shape[1]
    q = q_TQD.to(dtype).transpose(0, 1)
    k = k_TKD.to(dtype).transpose(0, 1).repeat_interleave(group, dim=0)
    v = v_TKD.to(dtype).transpose(0, 1).repeat_interleave(group, dim=0)
    scores = q @ k.transpose(1, 2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    slots = torch.arange(q.shape[1], device=q.device)
    seen = (document_ids_T[:, None] == document_ids_T[None, :]) & (slots[:, None] >= slots[None, :])
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return (weights @ v).transpose(0, 1).to(q_TQD.dtype)


def linear_cross_entropy(hidden_NH: Tensor, weight_VH: Tensor, label_ids_N: Tensor) -> Tensor:
    """Sum over the N rows of `-log softmax(hidden W^T)[label]`, in the compute dtype; N may be 0."""
    logits = (hidden_NH @ weight_VH.to(hidden_NH.dtype).T).to(_compute_dtype(hidden_NH.dtype))
    return torch.nn.functional.cross_entropy(logits, label_ids_N.long(), reduction="sum")


def dropout_threshold(p: float) -> int:
    """16-bit numbers below this are dropped: p is honoured to 1/65536."""
    if not 0.0 <= p < 1.0:
        raise ValueError(f"dropout probability {p}: at least 0 and below 1 is needed")
    return min(round(p * 65536), 65535)


def keep_probability(p: float) -> float:
    """The probability with which dropout at `p` really keeps an element; kept elements are divided by it."""
    return 1.0 - dropout_threshold(p) / 65536


def _philox(counters: Tensor, seed: Tensor, stream: int) -> list[Tensor]:
    """Philox4x32 of the counter (low, high, stream, 0) under a 64-bit key: four words in int64 tensors."""
    mask = 0xFFFFFFFF

    def multiply(constant: int, word: Tensor) -> tuple[Tensor, Tensor]:
        low_half, high_half = word & 0xFFFF, word >> 16
        middle = constant * high_half + (constant * low_half >> 16)
        return middle >> 16, constant * word & mask  # the product wraps in int64, its low 32 bits are right

    words = [counters & mask, (counters >> 32) & mask, torch.full_like(counters, stream), torch.zeros_like(counters)]
    key_low, key_high = seed & mask, (seed >> 32) & mask
    for _ in range(PHILOX_ROUNDS):
        high_a, low_a = multiply(0xD2511F53, words[0])
        high_b, low_b = multiply(0xCD9E8D57, words[2])
        words = [high_b ^ words[1] ^ key_low, low_b, high_a ^ words[3] ^ key_high, low_a]
        key_low, key_high = (key_low + 0x9E3779B9) & mask, (key_high + 0xBB67AE85) & mask
    return words


def dropout_mask(
    shape: tuple[int, ...], p: float, seed: int | Tensor, *, stream: int = 0, device: torch.device | str = "cpu"
) -> Tensor:
    """Boolean mask, True where dropout keeps: a function of (seed, stream, element index) and nothing else.

    Element i of the flattened tensor takes 16 bits of the Philox call with counter `i // 8`.
    """
    num_elements = prod(shape)
    seed = torch.as_tensor(seed, dtype=torch.int64, device=device).reshape(())
    counters = torch.arange(-(-num_elements // DROPOUT_GROUP), dtype=torch.int64, device=device)
    words = torch.stack(_philox(counters, seed, stream), dim=-1)
    halves = torch.stack((words & 0xFFFF, words >> 16), dim=-1).reshape(-1)[:num_elements]
    return (halves >= dropout_threshold(p)).reshape(shape)
