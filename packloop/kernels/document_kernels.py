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
        inside = first + local < document[1]  # so that no row past the tables' end is read, here and for the base
        cos_local = tl.load(tables[0] + local * HALF + pairs, mask=inside, other=0.0, eviction_policy="evict_last")
        sin_local = tl.load(tables[1] + local * HALF + pairs, mask=inside, other=0.0, eviction_policy="evict_last")
        base = (document[2] + first) * HALF + pairs
        exists = (first < document[1]) & (pairs >= 0)
        unscaled = 1.0 / tl.load(tables[0])
        cos_base = tl.load(tables[0] + base, mask=exists, other=0.0) * unscaled
        sin_base = tl.load(tables[1] + base, mask=exists, other=0.0) * unscaled
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
    def _listed_tile(line, position_ids_ptr, HAS_POSITIONS: tl.constexpr, OWNED: tl.constexpr):
        """(document, first row of the tile within it) of a plan's line."""
        start = tl.load(line)
        length = tl.load(line + 1) - start
        first_position = start * 0
        if HAS_POSITIONS:
            first_position = tl.load(position_ids_ptr + start).to(tl.int32)
        return (start, length, first_position), tl.load(line + 2) * OWNED

    @triton.jit
    def _listed_prefix(line, STREAMED: tl.constexpr, SHARES: tl.constexpr):
        """(first slot, length, tiles) of the beginning that the line's document shares, if SHARES; else of none."""
        start = 0
        length = 0
        if SHARES:
            start = tl.load(line + 3)
            length = tl.load(line + 4)
        return start, length, tl.cdiv(length, STREAMED)

    @triton.jit
    def _keys_of_step(step, prefix, document, rows, STREAMED: tl.constexpr, SHARES: tl.constexpr):
        """What a query tile meets in its step: (document of the keys, first key, the last key that each row sees)."""
        keys_document = (document[0], document[1])
        first_key = step * STREAMED
        last_key = rows
        if SHARES:
            in_prefix = step < prefix[2]
            keys_document = tl.where(in_prefix, prefix[0], document[0]), tl.where(in_prefix, prefix[1], document[1])
            first_key = tl.where(in_prefix, step, step - prefix[2]) * STREAMED
            last_key = tl.where(in_prefix, prefix[1] - 1, rows)
        return keys_document, first_key, last_key

    @triton.jit
    def document_attention_turn_kernel(
        x, tables, tiles_ptr, position_ids_ptr, num_heads, HEAD_DIM: tl.constexpr, OWNED: tl.constexpr
    ):
        line = tiles_ptr + 3 * (tl.program_id(0) // num_heads)
        document, first = _listed_tile(line, position_ids_ptr, True, OWNED)
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
        SHARES: tl.constexpr,
        GROUP: tl.constexpr,
        HEAD_DIM: tl.constexpr,
        OWNED: tl.constexpr,
        STREAMED: tl.constexpr,
    ):
        line = tiles_ptr + (5 if SHARES else 3) * (tl.program_id(0) // num_heads)
        document, first_row = _listed_tile(line, position_ids_ptr, TURNS, OWNED)
        prefix = _listed_prefix(line, STREAMED, SHARES)
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
        for step in range(prefix[2] + tl.cdiv(tl.minimum(first_row + OWNED, document[1]), STREAMED)):
            keys_document, first_key, last_key = _keys_of_step(step, prefix, document, rows, STREAMED, SHARES)
            k_tile = _load(k, keys_document, first_key, head // GROUP, STREAMED, HEAD_DIM)
            v_tile = _load(v, keys_document, first_key, head // GROUP, STREAMED, HEAD_DIM)
            scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
            keys = first_key + tl.arange(0, STREAMED)
            scores = tl.where(keys[None, :] <= last_key[:, None], scores, float("-inf"))
            new_highest = tl.maximum(highest, tl.max(scores, 1) * (scale * LOG2_E))
            weights = tl.exp2(scores * (scale * LOG2_E) - new_highest[:, None])
            shrunk = tl.exp2(highest - new_highest)
            total = total * shrunk + tl.sum(weights, 1)
            mixed = tl.dot(weights.to(v_tile.dtype), v_tile, mixed * shrunk[:, None], input_precision="ieee")
            highest = new_highest
        _store_per_row(highest + tl.log2(total), lse, document, first_row, head, OWNED)
        _store(mixed / total[:, None], out, tables, document, first_row, head, False, OWNED, HEAD_DIM)

    # The two parts of backward take: inputs (q, k, v), results (out, d_out, lse, delta), where to store their
    # gradients, RoPE's tables, and their tile as (document, its first row or key, head). A document whose
    # beginning lies elsewhere, as `prefix`, counts its rows and keys from behind it.

    @triton.jit
    def _query_part(
        inputs,
        results,
        dq,
        tables,
        tile,
        prefix,
        scale,
        TURNS_BACK: tl.constexpr,
        SHARES: tl.constexpr,
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
        for step in range(prefix[2] + tl.cdiv(tl.minimum(first_row + OWNED, document[1]), STREAMED)):
            keys_document, first_key, last_key = _keys_of_step(step, prefix, document, rows, STREAMED, SHARES)
            k_tile = _load(k, keys_document, first_key, head // GROUP, STREAMED, HEAD_DIM)
            v_tile = _load(v, keys_document, first_key, head // GROUP, STREAMED, HEAD_DIM)
            scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
            d_weights = tl.dot(d_out_tile, tl.trans(v_tile), input_precision="ieee")
            keys = first_key + tl.arange(0, STREAMED)
            weights = tl.exp2(scores * (scale * LOG2_E) - lse_row[:, None])
            weights = tl.where(keys[None, :] <= last_key[:, None], weights, 0.0)
            d_scores = weights * (d_weights - delta_row[:, None])
            gradient = tl.dot(d_scores.to(k_tile.dtype), k_tile, gradient, input_precision="ieee")
        _store(gradient * scale, dq, tables, document, first_row, head, TURNS_BACK, OWNED, HEAD_DIM)

    @triton.jit
    def _key_part(
        inputs,
        results,
        tile,
        queries,
        scale,
        GROUP: tl.constexpr,
        HEAD_DIM: tl.constexpr,
        OWNED: tl.constexpr,
        STREAMED: tl.constexpr,
    ):
        """(dk / scale, dv) in fp32 of one key tile, summed over the query heads that share it, in their order.

        queries: (first row, end) of the rows that are taken, counted as the keys are.
        """
        q, k, v = inputs
        _, d_out, lse, delta = results
        document, first_key, kv_head = tile
        query_document = (document[0], queries[1])
        keys = first_key + tl.arange(0, OWNED)
        k_tile = _load(k, document, first_key, kv_head, OWNED, HEAD_DIM)
        v_tile = _load(v, document, first_key, kv_head, OWNED, HEAD_DIM)
        k_gradient = tl.zeros([OWNED, HEAD_DIM], tl.float32)
        v_gradient = tl.zeros([OWNED, HEAD_DIM], tl.float32)
        for member in range(GROUP):
            head = kv_head * GROUP + member
            for first_row in range(queries[0], queries[1], STREAMED):
                q_tile = _load(q, query_document, first_row, head, STREAMED, HEAD_DIM)
                d_out_tile = _load(d_out, query_document, first_row, head, STREAMED, HEAD_DIM)
                lse_row = _load_per_row(lse, query_document, first_row, head, float("inf"), STREAMED)
                delta_row = _load_per_row(delta, query_document, first_row, head, 0.0, STREAMED)
                # Transposed, so that the products below take probabilities and their gradients from registers.
                rows = first_row + tl.arange(0, STREAMED)
                scores = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee")
                weights = tl.exp2(scores * (scale * LOG2_E) - lse_row[None, :])
                weights = tl.where(keys[:, None] <= rows[None, :], weights, 0.0)
                v_gradient = tl.dot(weights.to(v_tile.dtype), d_out_tile, v_gradient, input_precision="ieee")
                d_weights = tl.dot(v_tile, tl.trans(d_out_tile), input_precision="ieee")
                d_scores = weights * (d_weights - delta_row[None, :])
                k_gradient = tl.dot(d_scores.to(k_tile.dtype), q_tile, k_gradient, input_precision="ieee")
        return k_gradient, v_gradient

    @triton.jit
    def _part_pointers(
        parts_ptr, part, num_kv_heads, kv_head, first, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, OWNED: tl.constexpr
    ):
        """Of [parts, key heads, 2, OWNED, HEAD_DIM]: where ROWS rows of dk from `first` on lie in a part."""
        corner = parts_ptr + ((part * num_kv_heads + kv_head.to(tl.int64)) * 2 * OWNED + first) * HEAD_DIM
        return corner + tl.arange(0, ROWS)[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]

    @triton.jit
    def document_attention_backward_kernel(
        inputs,
        results,
        gradients,
        parts_ptr,
        tables,
        tiles_ptr,
        position_ids_ptr,
        num_kv_heads,
        scale,
        QUERIES: tl.constexpr,
        TURNS_BACK: tl.constexpr,
        SHARES: tl.constexpr,
        GROUP: tl.constexpr,
        HEAD_DIM: tl.constexpr,
        OWNED: tl.constexpr,
        STREAMED: tl.constexpr,
    ):
        """The dq part of each tile and query head if QUERIES, else the dk and dv part of each tile and key head."""
        PARTS: tl.constexpr = GROUP if QUERIES else 1
        dq, dk, dv = gradients
        member = tl.program_id(0) % PARTS
        kv_head = tl.program_id(0) // PARTS % num_kv_heads
        entry = tl.program_id(0) // PARTS // num_kv_heads
        if QUERIES:
            line = tiles_ptr + (5 if SHARES else 3) * entry
            document, first = _listed_tile(line, position_ids_ptr, TURNS_BACK, OWNED)
            prefix = _listed_prefix(line, STREAMED, SHARES)
            tile = (document, first, kv_head * GROUP + member)
            _query_part(
                inputs, results, dq, tables, tile, prefix, scale, TURNS_BACK, SHARES, GROUP, HEAD_DIM, OWNED, STREAMED
            )
        else:
            line = tiles_ptr + (6 if SHARES else 3) * entry
            document, first = _listed_tile(line, position_ids_ptr, TURNS_BACK, OWNED)
            queries = (first, document[1])
            if SHARES:
                queries = (tl.load(line + 3), tl.load(line + 4))
            tile = (document, first, kv_head)
            k_gradient, v_gradient = _key_part(inputs, results, tile, queries, scale, GROUP, HEAD_DIM, OWNED, STREAMED)
            is_whole = True
            if SHARES:
                is_whole = tl.load(line + 5) < 0
            if is_whole:
                _store(v_gradient, dv, tables, document, first, kv_head, False, OWNED, HEAD_DIM)
                _store(k_gradient * scale, dk, tables, document, first, kv_head, TURNS_BACK, OWNED, HEAD_DIM)
            if SHARES:
                part = tl.load(line + 5)
                inside = (first + tl.arange(0, OWNED)[:, None] < document[1]) & (part >= 0)
                pointers = _part_pointers(parts_ptr, part, num_kv_heads, kv_head, 0, OWNED, HEAD_DIM, OWNED)
                tl.store(pointers, k_gradient, mask=inside)
                tl.store(pointers + OWNED * HEAD_DIM, v_gradient, mask=inside)

    @triton.jit
    def document_attention_sum_kernel(
        gradients,
        parts_ptr,
        tables,
        tiles_ptr,
        position_ids_ptr,
        num_kv_heads,
        scale,
        TURNS_BACK: tl.constexpr,
        HEAD_DIM: tl.constexpr,
        OWNED: tl.constexpr,
        ROWS: tl.constexpr,
    ):
        """dk and dv of ROWS rows of a beginning's key tile: the sum of its parts, in their order."""
        dk, dv = gradients
        slices: tl.constexpr = OWNED // ROWS
        kv_head = tl.program_id(0) % num_kv_heads
        line = tiles_ptr + 5 * (tl.program_id(0) // num_kv_heads // slices)
        local = tl.program_id(0) // num_kv_heads % slices * ROWS
        document, first = _listed_tile(line, position_ids_ptr, TURNS_BACK, OWNED)
        inside = first + local + tl.arange(0, ROWS)[:, None] < document[1]
        k_gradient = tl.zeros([ROWS, HEAD_DIM], tl.float32)
        v_gradient = tl.zeros([ROWS, HEAD_DIM], tl.float32)
        for part in range(tl.load(line + 3), tl.load(line + 4)):
            pointers = _part_pointers(parts_ptr, part, num_kv_heads, kv_head, local, ROWS, HEAD_DIM, OWNED)
            k_gradient += tl.load(pointers, mask=inside, other=0.0)
            v_gradient += tl.load(pointers + OWNED * HEAD_DIM, mask=inside, other=0.0)
        _store(v_gradient, dv, tables, document, first + local, kv_head, False, ROWS, HEAD_DIM)
        _store(k_gradient * scale, dk, tables, document, first + local, kv_head, TURNS_BACK, ROWS, HEAD_DIM)
