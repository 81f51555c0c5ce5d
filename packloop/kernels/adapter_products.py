"""The products of LoRA adapters with a layer's input and output gradient, each one pass over that wide operand.

    narrow_product     out = scale * x w            x [T, K] is streamed, w [K, R] comes from the L2 cache
    gradient_product   total += left^T right        left [T, O] is streamed, total is float32 [O, r] or [r, O]

All ranks of a program's rows fit one tile, so the wide operand is read once; what bounds the time is memory. To fill a
GPU the sum over K, or over tokens, is split among programs, and a second kernel adds the partial sums in their order:
two runs agree bit for bit. The members of a group are one launch. Without Triton `reference.py` serves.

Shapes: T tokens, K features, O outputs, R ranks of a group, r of a member. Operands are 16-bit (float32 in Triton's
interpreter, whose 16-bit products are wrong) and have adjacent columns; rows may be strided.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from packloop.kernels import adapter_kernels as kernels
from packloop.kernels import reference
from packloop.kernels.reference import Block, Implementation

MAX_RANKS, MAX_MEMBERS = 256, 3
# Below this cuBLAS's launches are as good.
MIN_TOKENS = 1024
_FP32 = 4
# Elements: Triton takes multiples of 16 into account, no others.
_ALIGNMENT = 16
# Of a divided sum each part is at least so long for every rank, so that partial sums are an eighth of the wide operand.
_LENGTH_PER_RANK = 16
_SUM_ELEMENTS = 1024


class Tile(NamedTuple):
    """What a program does: `rows` of the result, of the wide operand's other side `step` at a time.

    programs: how many there are to be at most, by which sums are split.
    """

    rows: int
    step: int
    warps: int
    stages: int
    programs: int


# By ranks of a program, at most.
NARROW_TILES = {
    64: Tile(128, 64, warps=4, stages=3, programs=396),
    128: Tile(128, 64, warps=8, stages=3, programs=264),
    256: Tile(128, 64, warps=8, stages=4, programs=132),
}
GRADIENT_TILES = {
    64: Tile(128, 64, warps=4, stages=3, programs=396),
    128: Tile(128, 64, warps=8, stages=3, programs=528),
    256: Tile(128, 64, warps=8, stages=4, programs=132),
}


def _ceil(number: int, divisor: int) -> int:
    return -(-number // divisor)


def _padded(values: Sequence[int]) -> tuple[int, ...]:
    """As the kernels take what differs by member."""
    return (*values, *[values[-1]] * (MAX_MEMBERS - len(values)))


def _tile(table: dict[int, Tile], num_ranks: int) -> Tile:
    return next(tile for most, tile in table.items() if num_ranks <= most)


def _rank_tiles(num_ranks: int) -> dict[str, int]:
    def padded(ranks: int) -> int:
        return max(1 << (ranks - 1).bit_length(), 16)

    if num_ranks <= 128:
        return {"FIRST": padded(num_ranks), "SECOND": 0}
    return {"FIRST": 128, "SECOND": padded(num_ranks - 128)}


def _splits(length: int, num_blocks: int, num_ranks: int, tile: Tile) -> tuple[int, int]:
    """(parts that a sum of `length` is divided into, steps of each)."""
    steps = max(_ceil(length, tile.step), 1)
    most = int(length / (_LENGTH_PER_RANK * num_ranks))
    wanted = max(min(tile.programs // num_blocks, most, steps), 1)
    steps_each = _ceil(steps, wanted)
    return _ceil(steps, steps_each), steps_each


def _stages(tile: Tile, rank_tiles: dict[str, int], wide: Tensor) -> int:
    """As many of the tile's as the device's shared memory has room for."""
    if not wide.is_cuda:
        return tile.stages
    stage = (tile.rows + sum(rank_tiles.values())) * tile.step * wide.element_size()
    return max(min(tile.stages, _shared_memory(wide.device) // stage), 1)


@cache
def _shared_memory(device: torch.device) -> int:
    """Bytes that a program may have."""
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", 64 * 1024)


def _narrow_splits(num_tokens: int, sizes: Sequence[int], num_ranks: int, tile: Tile) -> tuple[int, int]:
    return _splits(max(sizes), max(_ceil(num_tokens, tile.rows), 1) * len(sizes), num_ranks, tile)


def _gradient_splits(num_tokens: int, sizes: Sequence[int], num_ranks: int, tile: Tile) -> tuple[int, int]:
    """num_ranks: those of a target."""
    return _splits(num_tokens, sum(_ceil(size, tile.rows) for size in sizes), num_ranks, tile)


def narrow_partial_bytes(num_tokens: int, sizes: Sequence[int], num_ranks: int) -> int:
    """What `narrow_product` allocates meanwhile, for members of so many features and of `num_ranks` each."""
    splits, _ = _narrow_splits(num_tokens, sizes, num_ranks, _tile(NARROW_TILES, num_ranks))
    return splits * num_tokens * num_ranks * len(sizes) * _FP32 if splits > 1 else 0


def gradient_partial_bytes(num_tokens: int, sizes: Sequence[int], num_ranks: int, *, in_turns: bool = False) -> int:
    """What `gradient_product` allocates meanwhile; with in_turns `sizes` has the one pair, `num_ranks` is of both."""
    columns = num_ranks // 2 if in_turns else num_ranks
    splits, _ = _gradient_splits(num_tokens, sizes, columns, _tile(GRADIENT_TILES, num_ranks))
    return splits * sum(sizes) * columns * _FP32


def fits(*operands: Tensor, blocks: Sequence[Block], by: Implementation = "auto") -> bool:
    """Whether the kernels take these operands [T, ..], and are worth it. ValueError where `triton` cannot run."""
    wide = operands[0]
    ranks = {block.ranks.stop - block.ranks.start for block in blocks}
    if reference.serves(wide, by) or wide.dtype == torch.float64 or len(ranks) != 1 or max(ranks) > MAX_RANKS:
        return False
    if len(blocks) > MAX_MEMBERS or any(operand.stride(1) != 1 for operand in operands):
        return False
    if not wide.is_cuda:
        return True
    # Loads of 16 bytes, without which the kernels are slow.
    starts = [edge for block in blocks for edge in (block.columns.start, block.ranks.start)]
    aligned = all(operand.stride(0) % _ALIGNMENT == 0 and operand.data_ptr() % 16 == 0 for operand in operands)
    is_16_bit = wide.dtype in (torch.bfloat16, torch.float16)
    return is_16_bit and wide.shape[0] >= MIN_TOKENS and aligned and all(start % _ALIGNMENT == 0 for start in starts)


def narrow_product(
    x_TK: Tensor, w_KR: Tensor, blocks: Sequence[Block], *, scale: float, out: Tensor, tile: Tile | None = None
) -> Tensor:
    """`out[:, ranks] = scale * x[:, columns] @ w[columns, ranks]` of each block; summed in float32, rounded once.

    Of w, rows or columns are adjacent. The blocks are of one number of ranks and cover `out`'s columns.
    """
    num_tokens, num_ranks = x_TK.shape[0], blocks[0].ranks.stop - blocks[0].ranks.start
    columns, ranks = ([getattr(block, side).start for block in blocks] for side in ("columns", "ranks"))
    sizes = [block.columns.stop - block.columns.start for block in blocks]
    rank_tiles, tile = _rank_tiles(num_ranks), tile or _tile(NARROW_TILES, num_ranks)
    num_splits, steps = _narrow_splits(num_tokens, sizes, num_ranks, tile)
    if num_tokens == 0:
        return out
    total_ranks = out.shape[1]
    result = out
    if num_splits > 1:
        result = torch.empty(num_splits, num_tokens, total_ranks, dtype=torch.float32, device=x_TK.device)
    kernels.adapter_product_kernel[(_ceil(num_tokens, tile.rows) * num_splits * len(blocks),)](
        x_TK,
        w_KR,
        result,
        scale if num_splits == 1 else 1.0,
        num_tokens,
        num_ranks,
        x_TK.stride(0),
        *w_KR.stride(),
        result.stride(-2),
        num_tokens * total_ranks,
        num_splits,
        steps,
        *_padded(columns),
        *_padded(sizes),
        *_padded(ranks),
        NUM_MEMBERS=len(blocks),
        BLOCK_T=tile.rows,
        BLOCK_K=tile.step,
        **rank_tiles,
        num_warps=tile.warps,
        num_stages=_stages(tile, rank_tiles, x_TK),
    )
    if num_splits > 1:
        width = 1 << (total_ranks - 1).bit_length()
        rows = max(_SUM_ELEMENTS // width, 1)
        strides = out.stride(0), num_tokens * total_ranks
        kernels.adapter_product_sum_kernel[(_ceil(num_tokens, rows),)](
            result, out, scale, num_tokens, total_ranks, *strides, num_splits, BLOCK_T=rows, BLOCK_R=width
        )
    return out


def gradient_product(
    left_TO: Tensor,
    right_TR: Tensor,
    blocks: Sequence[Block],
    targets: Sequence[Tensor],
    *,
    adds: bool,
    transposed: bool = False,
    in_turns: bool = False,
    tile: Tile | None = None,
) -> None:
    """`left[:, columns]^T right[:, ranks]` of each block, added to (else written to) its target, float32 [O_i, r].

    transposed: of one block; the targets are rows of `right^T left`, in order. in_turns: of one block for two targets
    [O / 2, r]: even columns with the first half of the ranks, odd ones with the second. Targets are contiguous.
    """
    num_tokens, num_ranks = left_TO.shape[0], blocks[0].ranks.stop - blocks[0].ranks.start
    columns, ranks = ([getattr(block, side).start for block in blocks] for side in ("columns", "ranks"))
    sizes = [block.columns.stop - block.columns.start for block in blocks]
    rank_tiles, tile = _rank_tiles(num_ranks), tile or _tile(GRADIENT_TILES, num_ranks)
    num_splits, steps = _gradient_splits(num_tokens, sizes, num_ranks // 2 if in_turns else num_ranks, tile)
    ends = [sum(_ceil(size, tile.rows) for size in sizes[: index + 1]) for index in range(len(sizes))]
    elements = [target.numel() for target in targets]
    partial = torch.empty(num_splits, sum(elements), dtype=torch.float32, device=left_TO.device)
    kernels.adapter_gradient_kernel[(num_splits * ends[-1],)](
        left_TO,
        right_TR,
        partial,
        num_tokens,
        num_ranks,
        left_TO.stride(0),
        right_TR.stride(0),
        sizes[0] if transposed else targets[0].shape[1],
        sum(elements),
        ends[-1],
        steps * tile.step,
        *_padded(ends)[:2],
        *_padded(columns),
        *_padded(sizes),
        *_padded(ranks),
        TRANSPOSED=transposed,
        IN_TURNS=in_turns,
        BLOCK_T=tile.step,
        BLOCK_O=tile.rows,
        **rank_tiles,
        num_warps=tile.warps,
        num_stages=_stages(tile, rank_tiles, left_TO),
    )
    kernels.adapter_gradient_sum_kernel[(_ceil(max(elements), _SUM_ELEMENTS), len(targets))](
        partial,
        *_padded(targets),
        *_padded(elements),
        partial.stride(0),
        num_splits,
        ADDS=adds,
        BLOCK=_SUM_ELEMENTS,
    )
