"""Causal attention of packed, short documents, RoPE included: one program for each tile of a document and head.

Instruction data are documents of a few hundred tokens, where a layer's attention is bound by what it moves and waits
for, not by its products. So:

- The host lists the tiles of all documents once a micro-batch (`plan_documents`), the longest documents first. Every
  program has work, and the heads of a tile run side by side, so that rows of q, k and v are read whole and the tiles
  of a document find its keys in the L2 cache.
- Forward turns a query tile by RoPE and leaves it turned in place: one program reads it, so there is no race. Key tiles
  are read by all later tiles of the document, and are turned in place beforehand. Backward turns dq and dk back on
  their way out. A tile's own part of the tables would be as much traffic as its keys; but the angle of position b + i
  is the sum of the angles of b and i, so a tile reads row b and rows 0, 1, ..., which the L1 cache holds.
- Backward finds probabilities twice, for dq and for dk and dv, rather than adding dq up across programs: no atomics, so
  results are the same bit for bit each time. The dq part, which runs first, also finds sum(d_out * out).

- Where documents share what they begin with (`DocumentLayout.prefix_of`), a query tile meets the beginning's key tiles
  first, and then its own document's. The beginning's dk and dv are summed over all rows that saw it: parts of them by
  as many programs, in fp32, which one more kernel adds up in their order.

A score's row and key are of one document, so `key <= row` masks all, or the key is of the row's beginning, which all
rows see: rows past a document's end are loaded as zeros and not stored. Softmax is in base 2; what is saved is
log2(sum(exp(scores))). Probabilities and the gradients of scores are rounded to the inputs' dtype for their products;
all else is fp32.

Shapes: T slots, H query heads, K key/value heads (H a multiple of K), D features of a head, P positions of the tables.
Source: Dao, FlashAttention-2, arXiv:2307.08691; Su et al., RoPE, arXiv:2104.09864.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from packloop.kernels import document_kernels as kernels
from packloop.kernels.attention import DocumentLayout
from packloop.kernels.flash_attention import DOCUMENT_HEAD_DIMS, FlashAttention
from packloop.kernels.rope import Rotation

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:  # a CPU-only torch comes without Triton
    triton = None

T = TypeVar("T")


@dataclass(frozen=True)
class Tiles:
    """How one kernel is cut: rows a program owns, rows of the other side it takes at a time, warps, loads in flight.

    max_registers: a thread's, so that more programs fit a multiprocessor; None for as many as the compiler likes.
    """

    owned: int
    streamed: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None

    @property
    def options(self) -> dict[str, int | None]:
        """As a kernel's launch takes them."""
        return {
            "OWNED": self.owned,
            "STREAMED": self.streamed,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "maxnreg": self.max_registers,
        }


@dataclass(frozen=True)
class BackwardTiles:
    """Tiles of the dq part and of the dk, dv part, which are launched one after the other."""

    queries: Tiles
    keys: Tiles


# Rows that a program turns, or whose sum(d_out * out) it finds: memory-bound, so small tiles and many programs.
_POINTWISE = Tiles(owned=32, streamed=32, num_warps=4, num_stages=1)
# Rows of one program for a key tile that the documents of a group share: enough programs, and not many parts to sum.
_ROWS_PER_PART = 512
_MOST_PARTS = 128  # each holds dk and dv of a tile and of all key heads in fp32: 2 MiB of Llama-2-7B
_SUMMED_ROWS = 8


def plan_documents(cu_seqlens_cpu: Tensor, block: int) -> Tensor:
    """int32 [tiles, 3] on the CPU: (first slot, end slot, tile number) of every tile of `block` rows of every document.

    cu_seqlens_cpu: integers [documents + 1] on the CPU, non-decreasing. The longest documents come first, and of a
    document its last tile, which has the most keys. A document of length 0 has no tile.
    """
    # numpy: on a few thousand numbers PyTorch would first wake its threads, which takes milliseconds.
    bounds = cu_seqlens_cpu.numpy().astype(np.int64)
    lengths = np.diff(bounds)
    order = np.argsort(-lengths, kind="stable")
    tiles_of = -(-lengths[order] // block)
    document = np.repeat(order, tiles_of)
    number = np.repeat(np.cumsum(tiles_of), tiles_of) - 1 - np.arange(len(document))
    plan = np.stack((bounds[document], bounds[document + 1], number), axis=1)
    return torch.from_numpy(plan.astype(np.int32))


def plan_queries(cu_seqlens_cpu: Tensor, block: int, prefix_of: Tensor) -> Tensor:
    """int32 [tiles, 5] on the CPU: `plan_documents`, then first slot and length of what the document begins with.

    prefix_of: int32 [documents] on the CPU, as a layout has it; where it is -1 the length is 0.
    """
    plan, bounds = plan_documents(cu_seqlens_cpu, block).numpy(), cu_seqlens_cpu.numpy()
    # Empty documents have no tile, so that a first slot says which document it is: the last that begins there.
    prefix = prefix_of.numpy()[np.searchsorted(bounds, plan[:, 0], side="right") - 1]
    start, length = (np.where(prefix >= 0, values[prefix], 0) for values in (bounds, np.diff(bounds)))
    return torch.from_numpy(np.column_stack((plan, start, length)).astype(np.int32))


def plan_keys(cu_seqlens_cpu: Tensor, block: int, prefix_of: Tensor) -> tuple[Tensor, Tensor]:
    """Key tiles where documents share beginnings, and which parts make up the tiles of beginnings; both on the CPU.

    int32 [tiles, 6]: (first slot, end slot, tile number, first and end of the rows that see it, part or -1). Rows count
    from the first slot. A beginning's tile comes once for every `_ROWS_PER_PART` rows of it and of its documents, which
    follow it in the slots, each time with another part, or for as many more rows as keep the parts to about
    `_MOST_PARTS`. ValueError where the documents do not follow it.
    int32 [tiles of beginnings, 5]: (first slot, end slot, tile number, first part, end of its parts).
    """
    plan, bounds = plan_documents(cu_seqlens_cpu, block), cu_seqlens_cpu.numpy().astype(np.int64)
    shared = prefix_of.numpy()
    lines, sums, part, beginnings = [], [], 0, []
    for prefix in np.unique(shared[shared >= 0]):
        members = np.flatnonzero(shared == prefix)
        if (members != prefix + 1 + np.arange(len(members))).any():
            raise ValueError(f"documents {members.tolist()} begin with document {prefix} and must follow it")
        start, end, num_rows = bounds[prefix], bounds[prefix + 1], bounds[members[-1] + 1] - bounds[prefix]
        beginnings.append((start, end, num_rows, -(-(end - start) // block)))
    met = sum(num_rows * num_tiles for _, _, num_rows, num_tiles in beginnings)
    rows_per_part = max(_ROWS_PER_PART, -(-met // _MOST_PARTS))
    for start, end, num_rows, num_tiles in beginnings:
        for tile in range(num_tiles):
            first_rows = range(tile * block, num_rows, rows_per_part)
            for number, row in enumerate(first_rows):
                lines.append((start, end, tile, row, min(row + rows_per_part, num_rows), part + number))
            sums.append((start, end, tile, part, part + len(first_rows)))
            part += len(first_rows)
    own = plan.numpy()[~np.isin(plan.numpy()[:, 0], bounds[np.unique(shared[shared >= 0])])]
    own = np.column_stack((own, own[:, 2] * block, own[:, 1] - own[:, 0], np.full(len(own), -1)))
    keys = np.concatenate([np.array(lines, dtype=np.int64).reshape(-1, 6), own])
    return torch.from_numpy(keys.astype(np.int32)), torch.tensor(sums, dtype=torch.int32).reshape(-1, 5)


class _KeyPlan(NamedTuple):
    """Tiles of keys, and, of those that several documents have in common, how their gradients' parts are added up."""

    tiles: Tensor
    sums: Tensor
    num_parts: int


def _rows(layout: DocumentLayout, block: int) -> Tensor:
    """Tiles of `block` slots of one document, on the layout's device; made at first use and kept with the layout."""
    return _kept(layout, "rows", block, lambda bounds: _moved(plan_documents(bounds, block), layout))


def _queries(layout: DocumentLayout, block: int) -> Tensor:
    """Likewise, with the keys that lie elsewhere."""
    if layout.prefix_of is None:
        return _rows(layout, block)
    return _kept(layout, "queries", block, lambda bounds: _moved(plan_queries(bounds, block, layout.prefix_of), layout))


def _keys(layout: DocumentLayout, block: int) -> _KeyPlan:
    """Likewise, with the queries that lie elsewhere."""

    def make(bounds: Tensor) -> _KeyPlan:
        tiles, sums = plan_keys(bounds, block, layout.prefix_of)
        return _KeyPlan(_moved(tiles, layout), _moved(sums, layout), int(sums[-1:, 4].sum()))

    if layout.prefix_of is None:
        rows = _rows(layout, block)
        return _KeyPlan(rows, rows[:0], 0)
    return _kept(layout, "keys", block, make)


def _kept(layout: DocumentLayout, kind: str, block: int, make: Callable[[Tensor], T]) -> T:
    key = ("document", kind, block)
    if key not in layout.made:
        layout.made[key] = make(layout.cu_seqlens.cpu() if layout.cu_seqlens_cpu is None else layout.cu_seqlens_cpu)
    return layout.made[key]


def _moved(plan: Tensor, layout: DocumentLayout) -> Tensor:
    device = layout.cu_seqlens.device
    # A copy from pageable memory would make the host wait for the device.
    return plan.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else plan


def _check(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.dim() != 3 or tensor.stride(2) != 1 or tensor.stride(1) != tensor.shape[2]:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} and strides {tensor.stride()}; [T, heads, D] with adjacent "
                "features and heads is needed"
            )
        if tensor.shape[2] not in DOCUMENT_HEAD_DIMS:
            raise ValueError(f"{name} has heads of {tensor.shape[2]} features; one of {DOCUMENT_HEAD_DIMS} is needed")


def _matrix(tensor: Tensor) -> tuple:
    """A model has few row strides, and with a constant one a tile's addresses are one register and offsets."""
    return tensor, tl.constexpr(tensor.stride(0))


def _tables(rotation: Rotation | None) -> tuple[tuple, Tensor | None]:
    return ((None, None), None) if rotation is None else ((rotation.cos_PD, rotation.sin_PD), rotation.position_ids_T)


def _forward(q_THD, k_TKD, v_TKD, layout, scale, tiles: Tiles, rotation: Rotation | None, out_THD: Tensor) -> Tensor:
    """Fills out and returns log2(sum(exp(scores))), fp32 [H, T or more]. A rotation turns q and k in place."""
    num_heads, num_kv_heads, head_dim = q_THD.shape[1], k_TKD.shape[1], q_THD.shape[2]
    # Triton compiles a kernel anew for sizes that are no multiple of 16.
    padded_slots = -(-q_THD.shape[0] // 16) * 16
    lse_HT = torch.empty(num_heads, padded_slots, dtype=torch.float32, device=q_THD.device)
    plan, turn_plan = _queries(layout, tiles.owned), _rows(layout, _POINTWISE.owned)
    if not len(plan):
        return lse_HT
    tables, position_ids_T = _tables(rotation)
    if rotation is not None:
        kernels.document_attention_turn_kernel[(len(turn_plan) * num_kv_heads,)](
            _matrix(k_TKD),
            tables,
            turn_plan,
            position_ids_T,
            num_kv_heads,
            HEAD_DIM=head_dim,
            OWNED=_POINTWISE.owned,
            num_warps=_POINTWISE.num_warps,
        )
    kernels.document_attention_forward_kernel[(len(plan) * num_heads,)](
        _matrix(q_THD),
        _matrix(k_TKD),
        _matrix(v_TKD),
        _matrix(out_THD),
        (lse_HT, lse_HT.stride(0)),
        tables,
        plan,
        position_ids_T,
        num_heads,
        scale,
        TURNS=rotation is not None,
        SHARES=layout.prefix_of is not None,
        GROUP=num_heads // num_kv_heads,
        HEAD_DIM=head_dim,
        **tiles.options,
    )
    return lse_HT


def _backward(saved, d_out, q, k, v, layout, scale, tiles: BackwardTiles, rotation: Rotation | None, dq, dk, dv):
    """Fills dq, dk and dv; with a rotation q and k are the turned ones and dq and dk the gradients of the others."""
    out_THD, lse_HT = saved
    num_heads, num_kv_heads, head_dim = q.shape[1], k.shape[1], q.shape[2]
    delta_HT = torch.empty_like(lse_HT)
    tables, position_ids_T = _tables(rotation)
    queries, keys = _queries(layout, tiles.queries.owned), _keys(layout, tiles.keys.owned)
    if not len(keys.tiles):
        return
    shares, parts = layout.prefix_of is not None, None
    if shares:
        parts = delta_HT.new_empty(keys.num_parts, num_kv_heads, 2, tiles.keys.owned, head_dim)
    sides = ((True, queries, tiles.queries, num_heads), (False, keys.tiles, tiles.keys, num_kv_heads))
    for is_query_side, plan, part, num_programs in sides:
        kernels.document_attention_backward_kernel[(len(plan) * num_programs,)](
            (_matrix(q), _matrix(k), _matrix(v)),
            (_matrix(out_THD), _matrix(d_out), (lse_HT, lse_HT.stride(0)), (delta_HT, delta_HT.stride(0))),
            (_matrix(dq), _matrix(dk), _matrix(dv)),
            parts,
            tables,
            plan,
            position_ids_T,
            num_kv_heads,
            scale,
            QUERIES=is_query_side,
            TURNS_BACK=rotation is not None,
            SHARES=shares,
            GROUP=num_heads // num_kv_heads,
            HEAD_DIM=head_dim,
            **part.options,
        )
    if shares:
        slices = tiles.keys.owned // _SUMMED_ROWS
        kernels.document_attention_sum_kernel[(len(keys.sums) * slices * num_kv_heads,)](
            (_matrix(dk), _matrix(dv)),
            parts,
            tables,
            keys.sums,
            position_ids_T,
            num_kv_heads,
            scale,
            TURNS_BACK=rotation is not None,
            HEAD_DIM=head_dim,
            OWNED=tiles.keys.owned,
            ROWS=_SUMMED_ROWS,
        )


def _default_tiles(dtype: torch.dtype, device: torch.device) -> tuple[Tiles, BackwardTiles]:
    if dtype == torch.float32:  # no tensor cores: products of small tiles
        small = Tiles(owned=32, streamed=32, num_warps=4, num_stages=1)
        return small, BackwardTiles(queries=small, keys=small)
    if torch.cuda.get_device_capability(device) < (9, 0):
        tiles = Tiles(owned=64, streamed=32, num_warps=4, num_stages=2)
        keys = Tiles(owned=64, streamed=32, num_warps=8, num_stages=1)
        return tiles, BackwardTiles(queries=tiles, keys=keys)
    # Timed on Hopper only; a third load needs more shared memory than some newer GPUs have.
    loads = 3 if torch.cuda.get_device_capability(device)[0] == 9 else 2
    return (
        Tiles(owned=64, streamed=32, num_warps=4, num_stages=2, max_registers=128),
        BackwardTiles(
            queries=Tiles(owned=64, streamed=32, num_warps=4, num_stages=2, max_registers=168),
            keys=Tiles(owned=64, streamed=32, num_warps=4, num_stages=loads),
        ),
    )


class DocumentAttention(FlashAttention):
    """The backend `document`. Tiles are its defaults unless given.

    fp32, bf16 or fp16 on a GPU of compute capability 8.0 or newer, D one of 16, 32, 64 and 128. Deterministic. Takes
    rows of any stride whose heads and features are adjacent. The layout's documents must cover all T slots.
    """

    rotates = True
    shares_prefixes = True

    def __init__(self, forward: Tiles | None = None, backward: BackwardTiles | None = None):
        self._forward_tiles, self._backward_tiles = forward, backward

    def prepare(self, layout: DocumentLayout, dtype: torch.dtype) -> None:
        """Lists the layout's tiles and sends them to its device: host work that no layer then waits for."""
        forward, backward = _default_tiles(dtype, layout.cu_seqlens.device)
        forward, backward = self._forward_tiles or forward, self._backward_tiles or backward
        _rows(layout, _POINTWISE.owned)
        _queries(layout, forward.owned)
        _queries(layout, backward.queries.owned)
        _keys(layout, backward.keys.owned)

    def __call__(self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, layout: DocumentLayout, scale: float) -> Tensor:
        # Of one row, a stock layer's q and k lie head by head.
        q_THD, k_TKD, v_TKD = (x.contiguous() for x in (q_THD, k_TKD, v_TKD))
        return super().__call__(q_THD, k_TKD, v_TKD, layout, scale)

    def forward(
        self, q_THD, k_TKD, v_TKD, layout, scale, *, rotation: Rotation | None = None, out: Tensor | None = None
    ):
        """(out [T, H, D], saved). With a rotation, q and k are overwritten by their turned values.

        out: where to write, rows of any stride. Raises ValueError for shapes, strides and a scale that is not positive.
        """
        if out is None:
            out = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
        _check(q=q_THD, k=k_TKD, v=v_TKD, out=out)
        if scale <= 0:
            raise ValueError(f"scale {scale}: a positive one is needed")
        tiles = self._forward_tiles or _default_tiles(q_THD.dtype, q_THD.device)[0]
        return out, (out, _forward(q_THD, k_TKD, v_TKD, layout, scale, tiles, rotation, out))

    def backward(self, saved, d_out, q, k, v, layout, scale, dq, dk, dv, *, rotation: Rotation | None = None) -> None:
        """Fills dq, dk, dv. With the forward's rotation, q and k are as it left them and dq and dk are turned back."""
        _check(d_out=d_out, q=q, k=k, v=v, dq=dq, dk=dk, dv=dv)
        tiles = self._backward_tiles or _default_tiles(q.dtype, q.device)[1]
        _backward(saved, d_out, q, k, v, layout, scale, tiles, rotation, dq, dk, dv)
