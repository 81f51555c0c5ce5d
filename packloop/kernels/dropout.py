"""Dropout whose mask is a function of (seed, stream, element index): regenerated wherever it is needed, never stored.

Philox4x32 (7 rounds) is keyed by the seed; its counter is (element index / 8, stream). One call's 128 bits decide 8
neighbours, 16 bits each, so p is honoured to 1/65536 and kept elements are divided by exactly the probability used.
The mask does not depend on tiling, launch or device: `reference.dropout_mask` is the same one in plain PyTorch.

Besides dropout itself the file holds the three products that a LoRA layer takes of a dropped-out input, each one pass
over that input. Shapes: T tokens, H features, R ranks (those of a group's adapters side by side).
"""

from __future__ import annotations

import torch
from torch import Tensor

from packloop.kernels import reference
from packloop.kernels.reference import DROPOUT_GROUP, Implementation, dropout_threshold, keep_probability

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:  # a CPU-only torch comes without Triton; reference.py serves it
    triton = None

_BLOCK_ELEMENTS = 4096
# The products hold all ranks of a group in one block.
MAX_RANKS = 256
# Blocks of features for which one program of the input gradient keeps its tokens' d_projected.
_INPUT_GRADIENT_STEPS = 8
# Programs that the weight gradient's tokens are split for: two for each multiprocessor of an H100.
_WEIGHT_GRADIENT_PROGRAMS = 256

if triton is not None:
    _ROUNDS = tl.constexpr(reference.PHILOX_ROUNDS)

    @triton.jit
    def _load_seed(seed, SEED_ON_DEVICE: tl.constexpr):
        return tl.load(seed) if SEED_ON_DEVICE else seed

    @triton.jit
    def _kept(groups, seed, stream, threshold, SHAPE: tl.constexpr):
        """True where elements are kept, [.., 8 * n] in SHAPE for int64 `groups` [.., n] (element index / 8)."""
        low = groups.to(tl.uint32)
        zero = low * 0
        word0, word1, word2, word3 = tl.philox(
            seed, low, (groups >> 32).to(tl.uint32), zero + stream.to(tl.uint32), zero, _ROUNDS
        )
        # A join adds a last dimension of two; this order flattens to word 0 low, word 0 high, word 1 low, ...
        words = tl.join(tl.join(word0, word2), tl.join(word1, word3))
        halves = tl.reshape(tl.join(words & 0xFFFF, words >> 16), SHAPE)
        return halves.to(tl.int32) >= threshold

    @triton.jit(do_not_specialize=["seed", "stream", "threshold"])
    def _dropout_kernel(
        x_ptr,
        out_ptr,
        seed,
        stream,
        threshold,
        scale,
        num_elements,
        SEED_ON_DEVICE: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        first_group = tl.program_id(0).to(tl.int64) * (BLOCK // 8)
        groups = first_group + tl.arange(0, BLOCK // 8)
        kept = _kept(groups, _load_seed(seed, SEED_ON_DEVICE), stream, threshold, [BLOCK])
        elements = first_group * 8 + tl.arange(0, BLOCK)
        inside = elements < num_elements
        x = tl.load(x_ptr + elements, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_ptr + elements, tl.where(kept, x * scale, 0.0), mask=inside)

    @triton.jit(do_not_specialize=["seed", "stream", "threshold"])
    def _project_kernel(
        x_ptr,
        a_ptr,
        out_ptr,
        seed,
        stream,
        threshold,
        scale,
        num_tokens,
        num_features,
        num_ranks,
        x_stride,
        a_stride,
        out_stride,
        SEED_ON_DEVICE: tl.constexpr,
        BLOCK_T: tl.constexpr,
        BLOCK_H: tl.constexpr,
        BLOCK_R: tl.constexpr,
    ):
        tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
        ranks = tl.arange(0, BLOCK_R)
        seed = _load_seed(seed, SEED_ON_DEVICE)
        rows = tokens.to(tl.int64)
        x_rows = x_ptr + rows[:, None] * x_stride
        a_rows = a_ptr + ranks[None, :].to(tl.int64) * a_stride
        groups = rows[:, None] * (num_features // 8) + tl.arange(0, BLOCK_H // 8)[None, :]
        projected = tl.zeros([BLOCK_T, BLOCK_R], dtype=tl.float32)
        for first in range(0, num_features, BLOCK_H):
            features = first + tl.arange(0, BLOCK_H)
            inside = features < num_features
            x = tl.load(x_rows + features[None, :], mask=(tokens < num_tokens)[:, None] & inside[None, :], other=0.0)
            a = tl.load(a_rows + features[:, None], mask=inside[:, None] & (ranks < num_ranks)[None, :], other=0.0)
            kept = _kept(groups + first // 8, seed, stream, threshold, [BLOCK_T, BLOCK_H])
            projected = tl.dot(tl.where(kept, x, 0.0), a, projected, input_precision="ieee")
        tl.store(
            out_ptr + rows[:, None] * out_stride + ranks[None, :],
            projected * scale,
            mask=(tokens < num_tokens)[:, None] & (ranks < num_ranks)[None, :],
        )

    @triton.jit(do_not_specialize=["seed", "stream", "threshold"])
    def _add_input_gradient_kernel(
        d_projected_ptr,
        a_ptr,
        dx_ptr,
        seed,
        stream,
        threshold,
        num_tokens,
        num_features,
        num_ranks,
        d_projected_stride,
        a_stride,
        dx_stride,
        features_per_program,
        STAGES: tl.constexpr,
        SEED_ON_DEVICE: tl.constexpr,
        BLOCK_T: tl.constexpr,
        BLOCK_H: tl.constexpr,
        BLOCK_R: tl.constexpr,
    ):
        num_parts = tl.cdiv(num_features, features_per_program)
        tokens = (tl.program_id(0) // num_parts) * BLOCK_T + tl.arange(0, BLOCK_T)
        start = (tl.program_id(0) % num_parts) * features_per_program
        ranks = tl.arange(0, BLOCK_R)
        rows = tokens.to(tl.int64)
        seed = _load_seed(seed, SEED_ON_DEVICE)
        row_groups = rows[:, None] * (num_features // 8) + tl.arange(0, BLOCK_H // 8)[None, :]
        d_projected = tl.load(
            d_projected_ptr + rows[:, None] * d_projected_stride + ranks[None, :],
            mask=(tokens < num_tokens)[:, None] & (ranks < num_ranks)[None, :],
            other=0.0,
        )
        stop = tl.minimum(start + features_per_program, num_features)
        # Stages named on the loop make dx's loads run ahead too, not only those of the product's operands.
        for first in tl.range(start, stop, BLOCK_H, num_stages=STAGES):
            features = first + tl.arange(0, BLOCK_H)
            inside = (tokens < num_tokens)[:, None] & (features < num_features)[None, :]
            dx_ptrs = dx_ptr + rows[:, None] * dx_stride + features[None, :]
            dx = tl.load(dx_ptrs, mask=inside, other=0.0)
            a = tl.load(
                a_ptr + ranks[:, None].to(tl.int64) * a_stride + features[None, :],
                mask=(ranks < num_ranks)[:, None] & (features < num_features)[None, :],
                other=0.0,
            )
            product = tl.dot(d_projected, a, input_precision="ieee")
            kept = _kept(row_groups + first // 8, seed, stream, threshold, [BLOCK_T, BLOCK_H])
            tl.store(dx_ptrs, dx.to(tl.float32) + tl.where(kept, product, 0.0), mask=inside)

    @triton.jit(do_not_specialize=["seed", "stream", "threshold"])
    def _weight_gradient_kernel(
        d_projected_ptr,
        x_ptr,
        partial_ptr,
        seed,
        stream,
        threshold,
        num_tokens,
        num_features,
        num_ranks,
        d_projected_stride,
        x_stride,
        tokens_per_split,
        SEED_ON_DEVICE: tl.constexpr,
        BLOCK_T: tl.constexpr,
        BLOCK_H: tl.constexpr,
        BLOCK_R: tl.constexpr,
    ):
        num_blocks = tl.cdiv(num_features, BLOCK_H)
        split = (tl.program_id(0) // num_blocks).to(tl.int64)
        first = (tl.program_id(0) % num_blocks) * BLOCK_H
        features = first + tl.arange(0, BLOCK_H)
        ranks = tl.arange(0, BLOCK_R)
        seed = _load_seed(seed, SEED_ON_DEVICE)
        first_group = (first // 8 + tl.arange(0, BLOCK_H // 8))[None, :]
        gradient = tl.zeros([BLOCK_R, BLOCK_H], dtype=tl.float32)
        start = split * tokens_per_split
        for step in range(0, tokens_per_split, BLOCK_T):
            rows = start + step + tl.arange(0, BLOCK_T)
            x = tl.load(
                x_ptr + rows[:, None] * x_stride + features[None, :],
                mask=(rows < num_tokens)[:, None] & (features < num_features)[None, :],
                other=0.0,
            )
            d_projected = tl.load(
                d_projected_ptr + rows[:, None] * d_projected_stride + ranks[None, :],
                mask=(rows < num_tokens)[:, None] & (ranks < num_ranks)[None, :],
                other=0.0,
            )
            groups = rows[:, None] * (num_features // 8) + first_group
            kept = _kept(groups, seed, stream, threshold, [BLOCK_T, BLOCK_H])
            gradient = tl.dot(tl.trans(d_projected), tl.where(kept, x, 0.0), gradient, input_precision="ieee")
        tl.store(
            partial_ptr + (split * num_ranks + ranks[:, None]) * num_features + features[None, :],
            gradient,
            mask=(ranks < num_ranks)[:, None] & (features < num_features)[None, :],
        )


def _mask_arguments(
    p: float, seed: int | Tensor, stream: int, like: Tensor
) -> tuple[tuple[int | Tensor, int, int], dict[str, bool]]:
    """((seed, stream, threshold), whether the seed lies on the device) as every kernel takes them, after checks."""
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != like.device:
            raise ValueError(
                f"seed is {seed.dtype} {tuple(seed.shape)} on {seed.device}; one int64 on {like.device} is needed"
            )
    elif not 0 <= seed < 2**63:
        raise ValueError(f"seed {seed}: at least 0 and below 2^63 is needed")
    if not 0 <= stream < 2**31:
        raise ValueError(f"stream {stream}: at least 0 and below 2^31 is needed")
    return (seed, stream, dropout_threshold(p)), {"SEED_ON_DEVICE": isinstance(seed, Tensor)}


def dropout_apply(
    x: Tensor,
    p: float,
    seed: int | Tensor,
    *,
    stream: int = 0,
    rescale: bool = True,
    out: Tensor | None = None,
    by: Implementation = "auto",
) -> Tensor:
    """`mask * x / keep_probability(p)` (without the division when `rescale` is false), rounded once; no autograd.

    `seed` is an int below 2^63 or one int64 on x's device; `stream` sets apart masks under one seed (a layer and linear
    group, for example). `out` may be x. x is contiguous.
    """
    mask, options = _mask_arguments(p, seed, stream, x)
    scale = 1.0 / keep_probability(p) if rescale else 1.0
    if reference.serves(x, by):
        kept = reference.dropout_mask(tuple(x.shape), p, seed, stream=stream, device=x.device)
        value = torch.where(kept, x * scale, torch.zeros((), dtype=x.dtype, device=x.device))
        return value if out is None else out.copy_(value)
    out = torch.empty_like(x) if out is None else out
    if not (x.is_contiguous() and out.is_contiguous()):
        raise ValueError(f"x has strides {x.stride()} and out {out.stride()}: contiguous tensors are needed")
    if x.numel() > 0:
        _dropout_kernel[(triton.cdiv(x.numel(), _BLOCK_ELEMENTS),)](
            x, out, *mask, scale, x.numel(), **options, BLOCK=_BLOCK_ELEMENTS, num_warps=8
        )
    return out


def fits_fused_products(x_TH: Tensor, num_ranks: int) -> bool:
    """Whether the three products below take this input: whole mask groups a row, few enough ranks, Triton to run."""
    return (
        not reference.serves(x_TH)
        and x_TH.dtype != torch.float64
        and x_TH.stride(1) == 1
        and x_TH.shape[1] % DROPOUT_GROUP == 0
        and num_ranks <= MAX_RANKS
    )


def _tile(x: Tensor, num_ranks: int, usual: tuple[int, int, int]) -> dict[str, int]:
    """Tokens, features, ranks and warps of a program, as the three products' kernels take them.

    usual: tokens, features and warps for 16-bit inputs and up to 128 ranks. For the rest fewer: what a program holds
    must fit 99 KiB of shared memory.
    """
    block_ranks = max(triton.next_power_of_2(num_ranks), 16)
    tokens, features, num_warps = usual if block_ranks <= 128 else (64, 64, 8)
    if x.element_size() > 2:
        tokens, features, num_warps = 32, 32, 4
    return {"BLOCK_T": tokens, "BLOCK_H": features, "BLOCK_R": block_ranks, "num_warps": num_warps}


def _row_strides(*matrices: Tensor) -> tuple[int, ...]:
    return tuple(matrix.stride(0) for matrix in matrices)


def dropout_project(
    x_TH: Tensor,
    a_RH: Tensor,
    p: float,
    seed: int | Tensor,
    *,
    stream: int = 0,
    scale: float = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """`scale * (mask * x) A^T` [T, R] in x's dtype, in one pass over x; accumulated in float32, rounded once.

    `out` may have strided rows.
    """
    mask, options = _mask_arguments(p, seed, stream, x_TH)
    sizes = (*x_TH.shape, a_RH.shape[0])
    num_tokens, _, num_ranks = sizes
    out_TR = torch.empty(num_tokens, num_ranks, dtype=x_TH.dtype, device=x_TH.device) if out is None else out
    matrices = (x_TH, a_RH, out_TR)
    tile = _tile(x_TH, num_ranks, (128, 64, 8) if num_tokens >= 16384 else (64, 64, 4))
    _project_kernel[(triton.cdiv(num_tokens, tile["BLOCK_T"]),)](
        *matrices, *mask, scale, *sizes, *_row_strides(*matrices), **options, **tile, num_stages=3
    )
    return out_TR


def dropout_add_input_gradient_(
    dx_TH: Tensor,
    d_projected_TR: Tensor,
    a_RH: Tensor,
    p: float,
    seed: int | Tensor,
    *,
    stream: int = 0,
) -> Tensor:
    """`dx += mask * (d_projected A)` in place, in one pass over dx; added in float32, rounded once."""
    mask, options = _mask_arguments(p, seed, stream, dx_TH)
    sizes = (*dx_TH.shape, a_RH.shape[0])
    num_tokens, num_features, num_ranks = sizes
    matrices = (d_projected_TR, a_RH, dx_TH)
    tile = _tile(dx_TH, num_ranks, (64, 64, 8))
    features_per_program = _INPUT_GRADIENT_STEPS * tile["BLOCK_H"]
    num_programs = triton.cdiv(num_tokens, tile["BLOCK_T"]) * triton.cdiv(num_features, features_per_program)
    _add_input_gradient_kernel[(num_programs,)](
        *matrices,
        *mask,
        *sizes,
        *_row_strides(*matrices),
        features_per_program,
        STAGES=3 if tile["BLOCK_R"] <= 128 else 2,
        **options,
        **tile,
    )
    return dx_TH


def dropout_weight_gradient(
    d_projected_TR: Tensor, x_TH: Tensor, p: float, seed: int | Tensor, *, stream: int = 0
) -> Tensor:
    """`d_projected^T (mask * x)` [R, H] in float32, in one pass over x.

    Tokens are split among programs and the partial sums added in a fixed order: two runs agree bit for bit.
    """
    mask, options = _mask_arguments(p, seed, stream, x_TH)
    sizes = (*x_TH.shape, d_projected_TR.shape[1])
    num_tokens, num_features, num_ranks = sizes
    tile = _tile(x_TH, num_ranks, (64, 128, 8))
    block_tokens, num_blocks = tile["BLOCK_T"], triton.cdiv(num_features, tile["BLOCK_H"])
    # Enough programs to fill a GPU, few enough that the partial sums stay small beside x, each with 8 steps or more.
    num_splits = max(min(triton.cdiv(_WEIGHT_GRADIENT_PROGRAMS, num_blocks), num_tokens // (8 * block_tokens)), 1)
    tokens_per_split = triton.cdiv(triton.cdiv(num_tokens, num_splits), block_tokens) * block_tokens
    num_splits = triton.cdiv(num_tokens, tokens_per_split) if num_tokens > 0 else 1
    partial = torch.empty(num_splits, num_ranks, num_features, dtype=torch.float32, device=x_TH.device)
    matrices = (d_projected_TR, x_TH)
    _weight_gradient_kernel[(num_splits * num_blocks,)](
        *matrices,
        partial,
        *mask,
        *sizes,
        *_row_strides(*matrices),
        tokens_per_split,
        **options,
        **tile,
        num_stages=3,
    )
    return partial[0] if num_splits == 1 else partial.sum(0)
