"""Head and loss in one: the summed cross-entropy of the slots that count, without a full logits tensor.

Logits exist one chunk at a time, in memory that all chunks share. One kernel turns a chunk's logits into their loss
and, in the same memory, their gradient; the gradient of the hidden states is made at once, so nothing of the chunk is
kept.

Shapes: T slots, N slots whose next token is a target, C slots of one chunk, R of the largest, H hidden size, V
vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from packloop.kernels import reference
from packloop.kernels.reference import Implementation

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:  # a CPU-only torch comes without Triton; PyTorch's operations serve it
    triton = None

# Logits of one chunk, in bytes of their dtype.
CHUNK_BYTES = 256 * 2**20
_BLOCK_V = 8192

if triton is not None:

    @triton.jit
    def _cross_entropy_kernel(
        logits_ptr,
        label_ids_ptr,
        weights_ptr,
        loss_ptr,
        logits_stride,
        vocabulary,
        WEIGHS: tl.constexpr,
        NEEDS_GRADIENT: tl.constexpr,
        BLOCK_V: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        logits_row = logits_ptr + row * logits_stride
        columns = tl.arange(0, BLOCK_V)
        highest = tl.full([BLOCK_V], float("-inf"), dtype=tl.float32)
        total = tl.zeros([BLOCK_V], dtype=tl.float32)
        for first in range(0, vocabulary, BLOCK_V):
            inside = first + columns < vocabulary
            x = tl.load(logits_row + first + columns, mask=inside, other=float("-inf")).to(tl.float32)
            higher = tl.maximum(highest, x)
            # A lane that has seen no column holds -inf twice, whose difference is not a number.
            total = tl.where(higher == float("-inf"), 0.0, total * tl.exp(highest - higher) + tl.exp(x - higher))
            highest = higher
        row_highest = tl.max(highest, axis=0)
        log_z = row_highest + tl.log(tl.sum(total * tl.exp(highest - row_highest), axis=0))
        label = tl.load(label_ids_ptr + row)
        loss = log_z - tl.load(logits_row + label).to(tl.float32)
        if WEIGHS:
            weight = tl.load(weights_ptr + row)
            loss *= weight
        tl.store(loss_ptr + row, loss)
        if NEEDS_GRADIENT:
            # The store below may hit the label's logit: it is read above, in this same program.
            tl.debug_barrier()
            for first in range(0, vocabulary, BLOCK_V):
                inside = first + columns < vocabulary
                x = tl.load(logits_row + first + columns, mask=inside, other=float("-inf")).to(tl.float32)
                gradient = tl.exp(x - log_z) - tl.where(first + columns == label, 1.0, 0.0)
                if WEIGHS:
                    gradient *= weight
                tl.store(logits_row + first + columns, gradient, mask=inside)


def rows_per_chunk(vocabulary: int, itemsize: int) -> int:
    """Slots whose logits fit `CHUNK_BYTES`, a multiple of 64 and at least 64."""
    return max(64, CHUNK_BYTES // (vocabulary * itemsize) // 64 * 64)


def cross_entropy_(
    logits_CV: Tensor,
    label_ids_C: Tensor,
    weights_C: Tensor | None = None,
    *,
    needs_gradient: bool,
    by: Implementation = "auto",
) -> Tensor:
    """Loss of each row times its weight, fp32 [C] (fp64 for fp64).

    With `needs_gradient` the logits become its gradient, (softmax - one-hot) times the weight. weights_C: fp32; None:
    1 each. Mutates logits_CV. Arithmetic is fp32, the gradient is rounded once to the logits' dtype.
    """
    if reference.serves(logits_CV, by):
        wide_CV = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))
        log_z_C1 = wide_CV.logsumexp(-1, keepdim=True)
        loss_C = (log_z_C1 - wide_CV.gather(1, label_ids_C[:, None])).squeeze(1)
        if weights_C is not None:
            loss_C *= weights_C
        if needs_gradient:
            gradient_CV = (wide_CV - log_z_C1).exp_()
            gradient_CV.scatter_add_(1, label_ids_C[:, None], torch.full_like(log_z_C1, -1.0))
            if weights_C is not None:
                gradient_CV *= weights_C[:, None]
            logits_CV.copy_(gradient_CV)
        return loss_C
    loss_C = torch.empty(logits_CV.shape[0], dtype=torch.float32, device=logits_CV.device)
    if logits_CV.shape[0] > 0:
        _cross_entropy_kernel[(logits_CV.shape[0],)](
            logits_CV,
            label_ids_C,
            weights_C,
            loss_C,
            logits_CV.stride(0),
            logits_CV.shape[1],
            WEIGHS=weights_C is not None,
            NEEDS_GRADIENT=needs_gradient,
            BLOCK_V=min(_BLOCK_V, triton.next_power_of_2(logits_CV.shape[1])),
            num_warps=16,
        )
    return loss_C


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden_TH: Tensor, weight_VH: Tensor, label_index_N, label_ids_N, label_weights_N, by, grads
    ) -> Tensor:
        accumulate_dtype = torch.float64 if hidden_TH.dtype == torch.float64 else torch.float32
        loss_sum = torch.zeros((), dtype=accumulate_dtype, device=hidden_TH.device)
        d_hidden_TH = torch.zeros_like(hidden_TH) if grads and hidden_TH.requires_grad else None
        needs_d_weight = grads and weight_VH.requires_grad
        d_weight_VH = torch.zeros_like(weight_VH, dtype=accumulate_dtype) if needs_d_weight else None
        needs_gradient = d_hidden_TH is not None or d_weight_VH is not None
        chunk = rows_per_chunk(weight_VH.shape[0], hidden_TH.element_size())
        # By slots, not by labels: a size that changes with every batch leaves memory in pieces.
        rows = min(chunk, hidden_TH.shape[0])
        hidden_RH = hidden_TH.new_empty(rows, hidden_TH.shape[1])
        logits_RV = hidden_TH.new_empty(rows, weight_VH.shape[0])
        for start in range(0, label_index_N.numel(), chunk):
            index_C, ids_C = label_index_N[start : start + chunk], label_ids_N[start : start + chunk]
            hidden_CH, logits_CV = hidden_RH[: index_C.numel()], logits_RV[: index_C.numel()]
            torch.index_select(hidden_TH, 0, index_C, out=hidden_CH)
            torch.mm(hidden_CH, weight_VH.T, out=logits_CV)
            weights_C = None if label_weights_N is None else label_weights_N[start : start + chunk]
            loss_sum += cross_entropy_(logits_CV, ids_C, weights_C, needs_gradient=needs_gradient, by=by).sum()
            if d_weight_VH is not None:
                d_weight_VH += logits_CV.T @ hidden_CH
            if d_hidden_TH is not None:  # last, as the gradient takes the hidden states' place
                d_hidden_TH.index_copy_(0, index_C, torch.mm(logits_CV, weight_VH, out=hidden_CH))
        ctx.save_for_backward(d_hidden_TH, d_weight_VH)
        ctx.weight_dtype = weight_VH.dtype
        return loss_sum

    @staticmethod
    def backward(ctx, d_loss: Tensor):
        d_hidden_TH, d_weight_VH = ctx.saved_tensors
        if d_hidden_TH is not None:
            d_hidden_TH = d_hidden_TH * d_loss.to(d_hidden_TH.dtype)
        if d_weight_VH is not None:
            d_weight_VH = (d_weight_VH * d_loss).to(ctx.weight_dtype)
        return d_hidden_TH, d_weight_VH, None, None, None, None, None


def linear_cross_entropy(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    label_index_N: Tensor,
    label_ids_N: Tensor,
    label_weights_N: Tensor | None = None,
    *,
    by: Implementation = "auto",
) -> Tensor:
    """sum over n of -log softmax(hidden[label_index[n]] @ weight.T)[label_ids[n]] * label_weights[n].

    hidden_TH: [T, H]; weight_VH: [V, H], same dtype, no gradient computed for it when frozen; label_index_N: int64
    [N], distinct; label_ids_N: int64 [N]; label_weights_N: fp32 [N], None: 1 each. Returns a scalar in fp32 (fp64 for
    fp64 input); 0 for N = 0. Logits are rounded to the input's dtype by the GEMM, everything after is fp32. The
    gradient is computed in forward, so logits live one chunk long and are never kept; extra memory is d_hidden and one
    chunk of logits and hidden states, as large for any N. No host synchronisation.
    """
    # Within the function gradients are always off, so whether they are wanted is told from here.
    grads = torch.is_grad_enabled()
    return _LinearCrossEntropy.apply(hidden_TH, weight_VH, label_index_N, label_ids_N, label_weights_N, by, grads)
