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

A score's row and key are always of one document, so `key <= row` masks all: rows past a document's end are loaded as
zeros and not stored. Softmax is in base 2; what is saved is log2(sum(exp(scores))). Probabilities and the gradients
of scores are rounded to the inputs' dtype for their products; all else is fp32.

Shapes: T slots, H query heads, K key/value heads (H a multiple of K), D features of a head, P positions of the tables.
Source: Dao, FlashAttention-2, arXiv:2307.08691; Su et al., RoPE, arXiv:2104.09864.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from packloop.kernels.attention import DocumentLayout
from packloop.kernels.flash_attention import _Differentiable
from packloop.kernels.rope import Rotation

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:  # a CPU-only torch comes without Triton
    triton = None


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
    """Tiles of the dq and of the dk, dv part. `joint`: one launch does both with the tiles of `keys`."""

    queries: Tiles
    keys: Tiles
    joint: bool = False


if triton is not None:
    LOG2_E = tl.constexpr(math.log2(math.e))

    # In the kernels a matrix is the pair (pointer, row stride) and a document the triple (first slot, length, position
    # of its first token); rows and keys count from the document's start.

    @triton.jit
    def _pointers(matrix, slot, head, ROWS: tl.constexpr, COLUMNS: tl.constexpr, HEAD_DIM: tl.constexpr):
        """Pointers to the first COLUMNS features of a head in ROWS rows from `slot` on."""
        # Only the tile's first slot needs 64 bits; offsets within a tile do not.
        corner = matrix[0] + slot.to(tl.int64) * matrix[1] + head * HEAD_DIM
        return corner + (tl.arange(0, ROWS)[:, None] * matrix[1] + tl.arange(0, COLUMNS)[None, :])

    @triton.jit
    def _load(matrix, document, first, head, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr):
        """[ROWS, HEAD_DIM] from row `first` of the document on, zeros past its end."""
        inside = first + tl.arange(0, ROWS)[:, None] < document[1]
        return tl.load(_pointers(matrix, document[0] + first, head, ROWS, HEAD_DIM, HEAD_DIM), mask=inside, other=0.0)

    @triton.jit
    def _load_per_row(values, document, first, head, other, ROWS: tl.constexpr):
        """[ROWS] of a [heads, T] matrix of scalars, `other` past the document's end."""
        at = head.to(tl.int64) * values[1] + document[0] + first + tl.arange(0, ROWS)
        return tl.load(values[0] + at, mask=first + tl.arange(0, ROWS) < document[1], other=other)

    @triton.jit
    def _store_per_row(result, values, document, first, head, ROWS: tl.constexpr):
        at = head.to(tl.int64) * values[1] + document[0] + first + tl.arange(0, ROWS)
        tl.store(values[0] + at, result, mask=first + tl.arange(0, ROWS) < document[1])

    @triton.jit
    def _angles(tables, document, first, ROWS: tl.constexpr, HALF: tl.constexpr):
        """(cos, sin) [ROWS, HALF] of the rows from `first` on, with the tables' scaling, which is their cos(0)."""
        pairs = tl.arange(0, HALF)[None, :]
        local = tl.arange(0, ROWS)[:, None]
        inside = first + local < document[1]  # so no row past the tables' end is read
        cos_local = tl.load(tables[0] + local * HALF + pairs, mask=inside, other=0.0, eviction_policy="evict_last")
        sin_local = tl.load(tables[1] + local * HALF + pairs, mask=inside, other=0.0, eviction_policy="evict_last")
        base = (document[2] + first) * HALF + pairs
        unscaled = 1.0 / tl.load(tables[0])
        cos_base = tl.load(tables[0] + base) * unscaled
        sin_base = tl.load(tables[1] + base) * unscaled
        return cos_base * cos_local - sin_base * sin_local, sin_base * cos_local + cos_base * sin_local

    @triton.jit
    def _turn_in_place(matrix, tables, document, first, head, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr):
        HALF: tl.constexpr = HEAD_DIM // 2
        inside = first + tl.arange(0, ROWS)[:, None] < document[1]
        pointers = _pointers(matrix, document[0] + first, head, ROWS, HALF, HEAD_DIM)
        left = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
        right = tl.load(pointers + HALF, mask=inside, other=0.0).to(tl.float32)
        cos, sin = _angles(tables, document, first, ROWS, HALF)
        tl.store(pointers, (left * cos - right * sin).to(matrix[0].dtype.element_ty), mask=inside)
        tl.store(pointers + HALF, (right * cos + left * sin).to(matrix[0].dtype.element_ty), mask=inside)

    @triton.jit
    def _store(
        tile,
        matrix,
        tables,
        document,
        first,
        head,
        TURNS_BACK: tl.constexpr,
        ROWS: tl.constexpr,
        HEAD_DIM: tl.constexpr,
    ):
        """Stores [ROWS, HEAD_DIM] in fp32, rotated by the negative angles if TURNS_BACK; rounds once."""
        inside = first + tl.arange(0, ROWS)[:, None] < document[1]
        if TURNS_BACK:
            HALF: tl.constexpr = HEAD_DIM // 2
            left, right = tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, HALF)), (0, 2, 1)))
            cos, sin = _angles(tables, document, first, ROWS, HALF)
            pointers = _pointers(matrix, document[0] + first, head, ROWS, HALF, HEAD_DIM)
            tl.store(pointers, (left * cos + right * sin).to(matrix[0].dtype.element_ty), mask=inside)
            tl.store(pointers + HALF, (right * cos - left * sin).to(matrix[0].dtype.element_ty), mask=inside)
        else:
            pointers = _pointers(matrix, document[0] + first, head, ROWS, HEAD_DIM, HEAD_DIM)
            tl.store(pointers, tile.to(matrix[0].dtype.element_ty), mask=inside)

    @triton.jit
    def _listed_tile(tiles_ptr, entry, position_ids_ptr, HAS_POSITIONS: tl.constexpr, OWNED: tl.constexpr):
        """(document, first row of the tile within it)."""
        start = tl.load(tiles_ptr + 3 * entry)
        length = tl.load(tiles_ptr + 3 * entry + 1) - start
        first_position = start * 0
        if HAS_POSITIONS:
            first_position = tl.load(position_ids_ptr + start).to(tl.int32)
        return (start, length, first_position), tl.load(tiles_ptr + 3 * entry + 2) * OWNED

    @triton.jit
    def _turn_kernel(x, tables, tiles_ptr, position_ids_ptr, num_heads, HEAD_DIM: tl.constexpr, OWNED: tl.constexpr):
        document, first = _listed_tile(tiles_ptr, tl.program_id(0) // num_heads, position_ids_ptr, True, OWNED)
        _turn_in_place(x, tables, document, first, tl.program_id(0) % num_heads, OWNED, HEAD_DIM)

    @triton.jit
    def _forward_kernel(
        q,
        k,
        v,
        out,
        lse,
        tables,
        tiles_ptr,
        position_ids_ptr,
        num_heads,
        scale,
        TURNS: tl.constexpr,
        GROUP: tl.constexpr,
        HEAD_DIM: tl.constexpr,
        OWNED: tl.constexpr,
        STREAMED: tl.constexpr,
    ):
        document, first_row = _listed_tile(tiles_ptr, tl.program_id(0) // num_heads, position_ids_ptr, TURNS, OWNED)
        head = tl.program_id(0) % num_heads
        rows = first_row + tl.arange(0, OWNED)
        if TURNS:
            # In halves, which need fewer registers; then read back whole, for products want it in shared memory.
            for half in tl.static_range(2):
                _turn_in_place(q, tables, document, first_row + half * (OWNED // 2), head, OWNED // 2, HEAD_DIM)
            tl.debug_barrier()
        q_tile = _load(q, document, first_row, head, OWNED, HEAD_DIM)
        # Key 0 is seen by every row, so the running maximum is finite from the first step on.
        highest = tl.full([OWNED], float("-inf"), tl.float32)
        total = tl.zeros([OWNED], tl.float32)
        mixed = tl.zeros([OWNED, HEAD_DIM], tl.float32)
        for first_key in range(0, tl.minimum(first_row + OWNED, document[1]), STREAMED):
            k_tile = _load(k, document, first_key, head // GROUP, STREAMED, HEAD_DIM)
            v_tile = _load(v, document, first_key, head // GROUP, STREAMED, HEAD_DIM)
            scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
            keys = first_key + tl.arange(0, STREAMED)
            scores = tl.where(keys[None, :] <= rows[:, None], scores, float("-inf"))
            new_highest = tl.maximum(highest, tl.max(scores, 1) * (scale * LOG2_E))
            weights = tl.exp2(scores * (scale * LOG2_E) - new_highest[:, None])
            shrunk = tl.exp2(highest - new_highest)
            total = total * shrunk + tl.sum(weights, 1)
            mixed = tl.dot(weights.to(v_tile.dtype), v_tile, mixed * shrunk[:, None], input_precision="ieee")
            highest = new_highest
        _store_per_row(highest + tl.log2(total), lse, document, first_row, head, OWNED)
        _store(mixed / total[:, None], out, tables, document, first_row, head, False, OWNED, HEAD_DIM)

    @triton.jit
    def _delta_of(out, d_out_tile, document, first_row, head, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr):
        out_tile = _load(out, document, first_row, head, ROWS, HEAD_DIM)
        return tl.sum(out_tile.to(tl.float32) * d_out_tile.to(tl.float32), 1)

    @triton.jit
    def _delta_kernel(out, d_out, delta, tiles_ptr, num_heads, HEAD_DIM: tl.constexpr, OWNED: tl.constexpr):
        document, first_row = _listed_tile(tiles_ptr, tl.program_id(0) // num_heads, tiles_ptr, False, OWNED)
        head = tl.program_id(0) % num_heads
        d_out_tile = _load(d_out, document, first_row, head, OWNED, HEAD_DIM)
        found = _delta_of(out, d_out_tile, document, first_row, head, OWNED, HEAD_DIM)
        _store_per_row(found, delta, document, first_row, head, OWNED)

    # The two parts of backward take: inputs (q, k, v), results (out, d_out, lse, delta), where to store their
    # gradients, RoPE's tables, and their tile as (document, its first row or key, head).

    @triton.jit
    def _query_part(
        inputs,
        results,
        dq,
        tables,
        tile,
        scale,
        FINDS_DELTA: tl.constexpr,
        TURNS_BACK: tl.constexpr,
        GROUP: tl.constexpr,
        HEAD_DIM: tl.constexpr,
        OWNED: tl.constexpr,
        STREAMED: tl.constexpr,
    ):
        """dq of one query tile and head; with FINDS_DELTA it first finds and stores sum(d_out * out) of its rows."""
        q, k, v = inputs
        out, d_out, lse, delta = results
        document, first_row, head = tile
        rows = first_row + tl.arange(0, OWNED)
        q_tile = _load(q, document, first_row, head, OWNED, HEAD_DIM)
        d_out_tile = _load(d_out, document, first_row, head, OWNED, HEAD_DIM)
        # Past the end the probabilities are exp2(0 - inf) = 0.
        lse_row = _load_per_row(lse, document, first_row, head, float("inf"), OWNED)
        if FINDS_DELTA:
            delta_row = _delta_of(out, d_out_tile, document, first_row, head, OWNED, HEAD_DIM)
            _store_per_row(delta_row, delta, document, first_row, head, OWNED)
        else:
            delta_row = _load_per_row(delta, document, first_row, head, 0.0, OWNED)
        gradient = tl.zeros([OWNED, HEAD_DIM], tl.float32)
        for first_key in range(0, tl.minimum(first_row + OWNED, document[1]), STREAMED):
            k_tile = _load(k, document, first_key, head // GROUP, STREAMED, HEAD_DIM)
            v_tile = _load(v, document, first_key, head // GROUP, STREAMED, HEAD_DIM)
            scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
            d_weights = tl.dot(d_out_tile, tl.trans(v_tile), input_precision="ieee")
            keys = first_key + tl.arange(0, STREAMED)
            weights = tl.exp2(scores * (scale * LOG2_E) - lse_row[:, None])
            weights = tl.where(keys[None, :] <= rows[:, None], weights, 0.0)
            d_scores = weights * (d_weights - delta_row[:, None])
            gradient = tl.dot(d_scores.to(k_tile.dtype), k_tile, gradient, input_precision="ieee")
        _store(gradient * scale, dq, tables, document, first_row, head, TURNS_BACK, OWNED, HEAD_DIM)

    @triton.jit
    def _key_part(
        inputs,
        results,
        dk,
        dv,
        tables,
        tile,
        scale,
        TURNS_BACK: tl.constexpr,
        GROUP: tl.constexpr,
        HEAD_DIM: tl.constexpr,
        OWNED: tl.constexpr,
        STREAMED: tl.constexpr,
    ):
        """dk and dv of one key tile, summed over the query heads that share it, in their order."""
        q, k, v = inputs
        _, d_out, lse, delta = results
        document, first_key, kv_head = tile
        keys = first_key + tl.arange(0, OWNED)
        k_tile = _load(k, document, first_key, kv_head, OWNED, HEAD_DIM)
        v_tile = _load(v, document, first_key, kv_head, OWNED, HEAD_DIM)
        k_gradient = tl.zeros([OWNED, HEAD_DIM], tl.float32)
        v_gradient = tl.zeros([OWNED, HEAD_DIM], tl.float32)
        for member in range(GROUP):
            head = kv_head * GROUP + member
            for first_row in range(first_key, document[1], STREAMED):
                q_tile = _load(q, document, first_row, head, STREAMED, HEAD_DIM)
                d_out_tile = _load(d_out, document, first_row, head, STREAMED, HEAD_DIM)
                lse_row = _load_per_row(lse, document, first_row, head, float("inf"), STREAMED)
                delta_row = _load_per_row(delta, document, first_row, head, 0.0, STREAMED)
                # Transposed, so that the products below take probabilities and their gradients from registers.
                rows = first_row + tl.arange(0, STREAMED)
                scores = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee")
                weights = tl.exp2(scores * (scale * LOG2_E) - lse_row[None, :])
                weights = tl.where(keys[:, None] <= rows[None, :], weights, 0.0)
                v_gradient = tl.dot(weights.to(v_tile.dtype), d_out_tile, v_gradient, input_precision="ieee")
                d_weights = tl.dot(v_tile, tl.trans(d_out_tile), input_precision="ieee")
                d_scores = weights * (d_weights - delta_row[None, :])
                k_gradient = tl.dot(d_scores.to(k_tile.dtype), q_tile, k_gradient, input_precision="ieee")
        _store(v_gradient, dv, tables, document, first_key, kv_head, False, OWNED, HEAD_DIM)
        _store(k_gradient * scale, dk, tables, document, first_key, kv_head, TURNS_BACK, OWNED, HEAD_DIM)

    @triton.jit
    def _backward_kernel(
        inputs,
        results,
        gradients,
        tables,
        tiles_ptr,
        position_ids_ptr,
        num_kv_heads,
        scale,
        QUERIES: tl.constexpr,
        KEYS: tl.constexpr,
        TURNS_BACK: tl.constexpr,
        GROUP: tl.constexpr,
        HEAD_DIM: tl.constexpr,
        OWNED: tl.constexpr,
        STREAMED: tl.constexpr,
    ):
        """The dq part of each tile and query head if QUERIES, the dk and dv part of each tile and key head if KEYS."""
        PARTS: tl.constexpr = (GROUP if QUERIES else 0) + (1 if KEYS else 0)
        dq, dk, dv = gradients
        part = tl.program_id(0) % PARTS
        kv_head = tl.program_id(0) // PARTS % num_kv_heads
        entry = tl.program_id(0) // PARTS // num_kv_heads
        document, first = _listed_tile(tiles_ptr, entry, position_ids_ptr, TURNS_BACK, OWNED)
        if QUERIES and (not KEYS or part < GROUP):
            tile = (document, first, kv_head * GROUP + part)
            _query_part(
                inputs, results, dq, tables, tile, scale, not KEYS, TURNS_BACK, GROUP, HEAD_DIM, OWNED, STREAMED
            )
        if KEYS and (not QUERIES or part == GROUP):
            tile = (document, first, kv_head)
            _key_part(inputs, results, dk, dv, tables, tile, scale, TURNS_BACK, GROUP, HEAD_DIM, OWNED, STREAMED)


_HEAD_DIMS = (16, 32, 64, 128)
# Rows that a program turns, or whose sum(d_out * out) it finds: memory-bound, so small tiles and many programs.
_POINTWISE = Tiles(owned=32, streamed=32, num_warps=4, num_stages=1)


def plan_documents(cu_seqlens_cpu: Tensor, block: int) -> Tensor:
    """int32 [tiles, 3] on the CPU: (first slot, end slot, tile number) of every tile of `block` rows of every document.

    cu_seqlens_cpu: integers [documents + 1] on the CPU, non-decreasing. The longest documents come first, and of a
    document its last tile, which has the most keys. A document of length 0 has no tile.
    """
    bounds = cu_seqlens_cpu.to(torch.int64)
    lengths = bounds.diff()
    order = lengths.argsort(descending=True, stable=True)
    tiles_of = (lengths[order] + block - 1) // block
    document = order.repeat_interleave(tiles_of)
    ends = tiles_of.cumsum(0)
    number = ends.repeat_interleave(tiles_of) - 1 - torch.arange(len(document))
    return torch.stack((bounds[document], bounds[document + 1], number), dim=1).to(torch.int32)


def _tiles_of(layout: DocumentLayout, block: int) -> Tensor:
    """The plan on the layout's device, made at first use and kept with the layout, as its mask is."""
    plans = layout.__dict__.setdefault("_document_plans", {})
    if block not in plans:
        cu_seqlens_cpu = getattr(layout, "cu_seqlens_cpu", None)
        plan = plan_documents(layout.cu_seqlens.cpu() if cu_seqlens_cpu is None else cu_seqlens_cpu, block)
        device = layout.cu_seqlens.device
        # A copy from pageable memory would make the host wait for the device.
        plans[block] = plan.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else plan
    return plans[block]


def _check(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.dim() != 3 or tensor.stride(2) != 1 or tensor.stride(1) != tensor.shape[2]:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} and strides {tensor.stride()}; [T, heads, D] with adjacent "
                "features and heads is needed"
            )
        if tensor.shape[2] not in _HEAD_DIMS:
            raise ValueError(f"{name} has heads of {tensor.shape[2]} features; one of {_HEAD_DIMS} is needed")


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
    plan, turn_plan = _tiles_of(layout, tiles.owned), _tiles_of(layout, _POINTWISE.owned)
    if not len(plan):
        return lse_HT
    tables, position_ids_T = _tables(rotation)
    if rotation is not None:
        _turn_kernel[(len(turn_plan) * num_kv_heads,)](
            _matrix(k_TKD),
            tables,
            turn_plan,
            position_ids_T,
            num_kv_heads,
            HEAD_DIM=head_dim,
            OWNED=_POINTWISE.owned,
            num_warps=_POINTWISE.num_warps,
        )
    _forward_kernel[(len(plan) * num_heads,)](
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
        GROUP=num_heads // num_kv_heads,
        HEAD_DIM=head_dim,
        **tiles.options,
    )
    return lse_HT


def _backward(saved, d_out, q, k, v, layout, scale, tiles: BackwardTiles, rotation: Rotation | None, dq, dk, dv):
    """Fills dq, dk and dv; with a rotation q and k are the turned ones and dq and dk the gradients of the others."""
    out_THD, lse_HT = saved
    num_heads, num_kv_heads, head_dim = q.shape[1], k.shape[1], q.shape[2]
    group = num_heads // num_kv_heads
    delta_HT = torch.empty_like(lse_HT)
    tables, position_ids_T = _tables(rotation)

    def launch(part: Tiles, *, queries: bool, keys: bool) -> None:
        plan = _tiles_of(layout, part.owned)
        _backward_kernel[(len(plan) * num_kv_heads * (group * queries + keys),)](
            (_matrix(q), _matrix(k), _matrix(v)),
            (_matrix(out_THD), _matrix(d_out), (lse_HT, lse_HT.stride(0)), (delta_HT, delta_HT.stride(0))),
            (_matrix(dq), _matrix(dk), _matrix(dv)),
            tables,
            plan,
            position_ids_T,
            num_kv_heads,
            scale,
            QUERIES=queries,
            KEYS=keys,
            TURNS_BACK=rotation is not None,
            GROUP=group,
            HEAD_DIM=head_dim,
            **part.options,
        )

    plan = _tiles_of(layout, _POINTWISE.owned)
    if not len(plan):
        return
    if tiles.joint:
        _delta_kernel[(len(plan) * num_heads,)](
            _matrix(out_THD),
            _matrix(d_out),
            (delta_HT, delta_HT.stride(0)),
            plan,
            num_heads,
            HEAD_DIM=head_dim,
            OWNED=_POINTWISE.owned,
            num_warps=_POINTWISE.num_warps,
        )
        launch(tiles.keys, queries=True, keys=True)
    else:
        launch(tiles.queries, queries=True, keys=False)
        launch(tiles.keys, queries=False, keys=True)


def _default_tiles(dtype: torch.dtype, device: torch.device) -> tuple[Tiles, BackwardTiles]:
    if dtype == torch.float32:  # no tensor cores: products of small tiles
        small = Tiles(owned=32, streamed=32, num_warps=4, num_stages=1)
        return small, BackwardTiles(queries=small, keys=small)
    if torch.cuda.get_device_capability(device) < (9, 0):
        tiles = Tiles(owned=64, streamed=32, num_warps=4, num_stages=2)
        keys = Tiles(owned=64, streamed=32, num_warps=8, num_stages=1)
        return tiles, BackwardTiles(queries=tiles, keys=keys)
    return (
        Tiles(owned=64, streamed=32, num_warps=4, num_stages=2, max_registers=128),
        BackwardTiles(
            queries=Tiles(owned=64, streamed=32, num_warps=4, num_stages=2, max_registers=168),
            keys=Tiles(owned=64, streamed=32, num_warps=4, num_stages=2),
        ),
    )


class DocumentAttention:
    """The backend `document`. Tiles are its defaults unless given.

    fp32, bf16 or fp16 on a GPU of compute capability 8.0 or newer, D one of 16, 32, 64 and 128. Deterministic. Takes
    rows of any stride whose heads and features are adjacent. The layout's documents must cover all T slots.
    """

    rotates = True

    def __init__(self, forward: Tiles | None = None, backward: BackwardTiles | None = None):
        self._forward_tiles, self._backward_tiles = forward, backward

    def __call__(self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, layout: DocumentLayout, scale: float) -> Tensor:
        return _Differentiable.apply(q_THD, k_TKD, v_TKD, self, layout, scale)

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
