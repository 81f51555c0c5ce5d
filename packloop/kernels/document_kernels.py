"""The Triton kernels of `document_attention`: what a program does with one listed tile of a document and one head.

A matrix is the pair (pointer, row stride) and a document the triple (first slot, length, position of its first token);
rows and keys count from the document's start. Scores are in base 2.
"""

from __future__ import annotations

import math

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:  # a CPU-only torch comes without Triton
    triton = None

if triton is not None:
    LOG2_E = tl.constexpr(math.log2(math.e))

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
    def document_attention_turn_kernel(
        x, tables, tiles_ptr, position_ids_ptr, num_heads, HEAD_DIM: tl.constexpr, OWNED: tl.constexpr
    ):
        document, first = _listed_tile(tiles_ptr, tl.program_id(0) // num_heads, position_ids_ptr, True, OWNED)
        _turn_in_place(x, tables, document, first, tl.program_id(0) % num_heads, OWNED, HEAD_DIM)

    @triton.jit
    def document_attention_forward_kernel(
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
        TURNS_BACK: tl.constexpr,
        GROUP: tl.constexpr,
        HEAD_DIM: tl.constexpr,
        OWNED: tl.constexpr,
        STREAMED: tl.constexpr,
    ):
        """dq of one query tile and head; it first finds and stores sum(d_out * out) of its rows, for the other part."""
        q, k, v = inputs
        out, d_out, lse, delta = results
        document, first_row, head = tile
        rows = first_row + tl.arange(0, OWNED)
        q_tile = _load(q, document, first_row, head, OWNED, HEAD_DIM)
        d_out_tile = _load(d_out, document, first_row, head, OWNED, HEAD_DIM)
        # Past the end the probabilities are exp2(0 - inf) = 0.
        lse_row = _load_per_row(lse, document, first_row, head, float("inf"), OWNED)
        out_tile = _load(out, document, first_row, head, OWNED, HEAD_DIM)
        delta_row = tl.sum(out_tile.to(tl.float32) * d_out_tile.to(tl.float32), 1)
        _store_per_row(delta_row, delta, document, first_row, head, OWNED)
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
    def document_attention_backward_kernel(
        inputs,
        results,
        gradients,
        tables,
        tiles_ptr,
        position_ids_ptr,
        num_kv_heads,
        scale,
        QUERIES: tl.constexpr,
        TURNS_BACK: tl.constexpr,
        GROUP: tl.constexpr,
        HEAD_DIM: tl.constexpr,
        OWNED: tl.constexpr,
        STREAMED: tl.constexpr,
    ):
        """The dq part of each tile and query head if QUERIES, else the dk and dv part of each tile and key head."""
        PARTS: tl.constexpr = GROUP if QUERIES else 1
        dq, dk, dv = gradients
        part = tl.program_id(0) % PARTS
        kv_head = tl.program_id(0) // PARTS % num_kv_heads
        entry = tl.program_id(0) // PARTS // num_kv_heads
        document, first = _listed_tile(tiles_ptr, entry, position_ids_ptr, TURNS_BACK, OWNED)
        if QUERIES:
            tile = (document, first, kv_head * GROUP + part)
            _query_part(inputs, results, dq, tables, tile, scale, TURNS_BACK, GROUP, HEAD_DIM, OWNED, STREAMED)
        else:
            tile = (document, first, kv_head)
            _key_part(inputs, results, dk, dv, tables, tile, scale, TURNS_BACK, GROUP, HEAD_DIM, OWNED, STREAMED)
