"""Triton kernels of `adapter_products`, which says what they compute, and how each is launched.

Ranks are taken FIRST + SECOND (0: none) at once: 192 are 128 + 64, where one tile would have 256. Scalars that end in a
member's number tell where its block begins and how large it is. Rows past the end are masked where they would count.
"""

from __future__ import annotations

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:  # a CPU-only torch comes without Triton
    triton = None

if triton is not None:

    @triton.jit
    def _of_member(member, first, second, third):
        return tl.where(member == 0, first, tl.where(member == 1, second, third))

    @triton.jit(do_not_specialize=["num_tokens", "num_splits", "steps_per_split"])
    def adapter_product_kernel(
        x_ptr,
        w_ptr,
        out_ptr,
        scale,
        num_tokens,
        num_ranks,
        x_stride,
        w_stride,
        w_rank_stride,
        out_stride,
        split_stride,
        num_splits,
        steps_per_split,
        column_0,
        column_1,
        column_2,
        size_0,
        size_1,
        size_2,
        rank_0,
        rank_1,
        rank_2,
        NUM_MEMBERS: tl.constexpr,
        BLOCK_T: tl.constexpr,
        BLOCK_K: tl.constexpr,
        FIRST: tl.constexpr,
        SECOND: tl.constexpr,
    ):
        part = tl.program_id(0) % (num_splits * NUM_MEMBERS)
        member, split = part % NUM_MEMBERS, part // NUM_MEMBERS
        tokens = (tl.program_id(0) // (num_splits * NUM_MEMBERS)) * BLOCK_T + tl.arange(0, BLOCK_T)
        column = _of_member(member, column_0, column_1, column_2)
        size = _of_member(member, size_0, size_1, size_2)
        rank = _of_member(member, rank_0, rank_1, rank_2)
        # Rows past the end are the last one's, and are not stored.
        rows = tl.minimum(tokens, num_tokens - 1).to(tl.int64)
        start = split * steps_per_split * BLOCK_K
        features = start + tl.arange(0, BLOCK_K)
        ranks = tl.arange(0, FIRST)
        more_ranks = FIRST + tl.arange(0, SECOND if SECOND > 0 else 1)
        x_ptrs = x_ptr + rows[:, None] * x_stride + (column + features)[None, :]
        w_rows = w_ptr + (column + features).to(tl.int64)[:, None] * w_stride
        w_ptrs = w_rows + (rank + ranks).to(tl.int64)[None, :] * w_rank_stride
        more_w_ptrs = w_rows + (rank + more_ranks).to(tl.int64)[None, :] * w_rank_stride
        total = tl.zeros([BLOCK_T, FIRST], dtype=tl.float32)
        if SECOND > 0:
            more = tl.zeros([BLOCK_T, SECOND], dtype=tl.float32)
        stop = tl.minimum(start + steps_per_split * BLOCK_K, size)
        for first in range(start, stop, BLOCK_K):
            inside = first + tl.arange(0, BLOCK_K) < size
            x = tl.load(x_ptrs, mask=inside[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=inside[:, None] & (ranks < num_ranks)[None, :], other=0.0)
            total = tl.dot(x, w, total, input_precision="ieee")
            if SECOND > 0:
                more_w = tl.load(more_w_ptrs, mask=inside[:, None] & (more_ranks < num_ranks)[None, :], other=0.0)
                more = tl.dot(x, more_w, more, input_precision="ieee")
                more_w_ptrs += BLOCK_K * w_stride
            x_ptrs += BLOCK_K
            w_ptrs += BLOCK_K * w_stride
        out_rows = out_ptr + split.to(tl.int64) * split_stride + rows[:, None] * out_stride + rank
        inside_rows = (tokens < num_tokens)[:, None]
        tl.store(out_rows + ranks[None, :], total * scale, mask=inside_rows & (ranks < num_ranks)[None, :])
        if SECOND > 0:
            mask = inside_rows & (more_ranks < num_ranks)[None, :]
            tl.store(out_rows + more_ranks[None, :], more * scale, mask=mask)

    @triton.jit(do_not_specialize=["num_tokens", "num_splits"])
    def adapter_product_sum_kernel(
        partial_ptr,
        out_ptr,
        scale,
        num_tokens,
        num_ranks,
        out_stride,
        split_stride,
        num_splits,
        BLOCK_T: tl.constexpr,
        BLOCK_R: tl.constexpr,
    ):
        tokens, ranks = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_R)
        inside = (tokens < num_tokens)[:, None] & (ranks < num_ranks)[None, :]
        rows = tokens.to(tl.int64)[:, None]
        ptrs = partial_ptr + rows * num_ranks + ranks[None, :]
        total = tl.load(ptrs, mask=inside, other=0.0)
        for _ in range(1, num_splits):
            ptrs += split_stride
            total += tl.load(ptrs, mask=inside, other=0.0)
        tl.store(out_ptr + rows * out_stride + ranks[None, :], total * scale, mask=inside)

    @triton.jit
    def _store_gradient(
        ptr,
        gradient,
        outputs,
        ranks,
        size,
        num_ranks,
        row_stride,
        TRANSPOSED: tl.constexpr,
        IN_TURNS: tl.constexpr,
    ):
        mask = (outputs < size)[:, None] & (ranks < num_ranks)[None, :]
        if TRANSPOSED:
            places = ranks.to(tl.int64)[None, :] * row_stride + outputs[:, None]
        elif IN_TURNS:
            # Even outputs are the first member's, of the first half of the ranks, odd ones the second's.
            half = num_ranks // 2
            mask &= (ranks // half)[None, :] == (outputs % 2)[:, None]
            rows = (outputs % 2) * (size // 2) + outputs // 2
            places = rows.to(tl.int64)[:, None] * row_stride + (ranks % half)[None, :]
        else:
            places = outputs.to(tl.int64)[:, None] * row_stride + ranks[None, :]
        tl.store(ptr + places, gradient, mask=mask)

    @triton.jit(do_not_specialize=["num_tokens", "num_blocks", "tokens_per_split", "end_0", "end_1"])
    def adapter_gradient_kernel(
        left_ptr,
        right_ptr,
        partial_ptr,
        num_tokens,
        num_ranks,
        left_stride,
        right_stride,
        row_stride,
        split_stride,
        num_blocks,
        tokens_per_split,
        end_0,
        end_1,
        column_0,
        column_1,
        column_2,
        size_0,
        size_1,
        size_2,
        rank_0,
        rank_1,
        rank_2,
        TRANSPOSED: tl.constexpr,
        IN_TURNS: tl.constexpr,
        BLOCK_T: tl.constexpr,
        BLOCK_O: tl.constexpr,
        FIRST: tl.constexpr,
        SECOND: tl.constexpr,
    ):
        split, block = (tl.program_id(0) // num_blocks).to(tl.int64), tl.program_id(0) % num_blocks
        member = (block >= end_0).to(tl.int32) + (block >= end_1).to(tl.int32)
        column = _of_member(member, column_0, column_1, column_2)
        size = _of_member(member, size_0, size_1, size_2)
        rank = _of_member(member, rank_0, rank_1, rank_2)
        outputs = (block - _of_member(member, 0, end_0, end_1)) * BLOCK_O + tl.arange(0, BLOCK_O)
        ranks = tl.arange(0, FIRST)
        more_ranks = FIRST + tl.arange(0, SECOND if SECOND > 0 else 1)
        start = split * tokens_per_split
        rows = start + tl.arange(0, BLOCK_T)
        left_ptrs = left_ptr + rows[:, None] * left_stride + (column + outputs)[None, :]
        right_rows = right_ptr + rows[:, None] * right_stride + rank
        right_ptrs, more_right_ptrs = right_rows + ranks[None, :], right_rows + more_ranks[None, :]
        total = tl.zeros([BLOCK_O, FIRST], dtype=tl.float32)
        if SECOND > 0:
            more = tl.zeros([BLOCK_O, SECOND], dtype=tl.float32)
        num_rows = tl.minimum(num_tokens - start, tokens_per_split).to(tl.int32)
        for first in range(0, num_rows, BLOCK_T):
            inside = (first + tl.arange(0, BLOCK_T) < num_rows)[:, None]
            left = tl.load(left_ptrs, mask=inside & (outputs < size)[None, :], other=0.0)
            right = tl.load(right_ptrs, mask=inside & (ranks < num_ranks)[None, :], other=0.0)
            total = tl.dot(tl.trans(left), right, total, input_precision="ieee")
            if SECOND > 0:
                more_right = tl.load(more_right_ptrs, mask=inside & (more_ranks < num_ranks)[None, :], other=0.0)
                more = tl.dot(tl.trans(left), more_right, more, input_precision="ieee")
                more_right_ptrs += BLOCK_T * right_stride
            left_ptrs += BLOCK_T * left_stride
            right_ptrs += BLOCK_T * right_stride
        first_row = _of_member(member, 0, size_0, size_0 + size_1)
        rows_ptr = partial_ptr + split * split_stride + first_row.to(tl.int64) * row_stride
        _store_gradient(rows_ptr, total, outputs, ranks, size, num_ranks, row_stride, TRANSPOSED, IN_TURNS)
        if SECOND > 0:
            _store_gradient(rows_ptr, more, outputs, more_ranks, size, num_ranks, row_stride, TRANSPOSED, IN_TURNS)

    @triton.jit
    def _add_partials(partial_ptr, target_ptr, size, split_stride, num_splits, ADDS: tl.constexpr, BLOCK: tl.constexpr):
        elements = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = elements < size
        ptrs = partial_ptr + elements
        total = tl.load(ptrs, mask=inside, other=0.0)
        for _ in range(1, num_splits):
            ptrs += split_stride
            total += tl.load(ptrs, mask=inside, other=0.0)
        if ADDS:
            total += tl.load(target_ptr + elements, mask=inside, other=0.0)
        tl.store(target_ptr + elements, total, mask=inside)

    @triton.jit(do_not_specialize=["num_splits"])
    def adapter_gradient_sum_kernel(
        partial_ptr,
        target_0_ptr,
        target_1_ptr,
        target_2_ptr,
        size_0,
        size_1,
        size_2,
        split_stride,
        num_splits,
        ADDS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        if tl.program_id(1) == 0:
            _add_partials(partial_ptr, target_0_ptr, size_0, split_stride, num_splits, ADDS, BLOCK)
        elif tl.program_id(1) == 1:
            _add_partials(partial_ptr + size_0, target_1_ptr, size_1, split_stride, num_splits, ADDS, BLOCK)
        else:
            _add_partials(partial_ptr + size_0 + size_1, target_2_ptr, size_2, split_stride, num_splits, ADDS, BLOCK)
