"""Head and loss in one: the summed cross-entropy of the slots that count, without a full logits tensor.

Shapes: T slots, N slots whose next token is a target, C slots of one chunk, H hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Logits of one chunk, in bytes of the accumulation dtype. Three such tensors live at once at the peak.
CHUNK_BYTES = 128 * 2**20


def rows_per_chunk(vocabulary: int, itemsize: int = 4) -> int:
    """Slots whose logits fit `CHUNK_BYTES`, a multiple of 64 and at least 64."""
    return max(64, CHUNK_BYTES // (vocabulary * itemsize) // 64 * 64)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TH: Tensor, weight_VH: Tensor, label_index_N: Tensor, label_ids_N: Tensor) -> Tensor:
        accumulate_dtype = torch.float64 if hidden_TH.dtype == torch.float64 else torch.float32
        loss_sum = torch.zeros((), dtype=accumulate_dtype, device=hidden_TH.device)
        d_hidden_TH = torch.zeros_like(hidden_TH) if hidden_TH.requires_grad else None
        d_weight_VH = torch.zeros_like(weight_VH, dtype=accumulate_dtype) if weight_VH.requires_grad else None
        chunk = rows_per_chunk(weight_VH.shape[0], accumulate_dtype.itemsize)
        for start in range(0, label_index_N.numel(), chunk):
            index_C, ids_C1 = label_index_N[start : start + chunk], label_ids_N[start : start + chunk, None]
            hidden_CH = hidden_TH.index_select(0, index_C)
            logits_CV = (hidden_CH @ weight_VH.T).to(accumulate_dtype)
            log_z_C1 = logits_CV.logsumexp(-1, keepdim=True)
            loss_sum += (log_z_C1 - logits_CV.gather(1, ids_C1)).sum()
            if d_hidden_TH is None and d_weight_VH is None:
                continue
            # d loss / d logits = softmax - one-hot, in the logits' own memory
            d_logits_CV = logits_CV.sub_(log_z_C1).exp_()
            d_logits_CV.scatter_add_(1, ids_C1, torch.full_like(log_z_C1, -1.0))
            d_logits_CV = d_logits_CV.to(hidden_TH.dtype)
            if d_hidden_TH is not None:
                d_hidden_TH.index_copy_(0, index_C, d_logits_CV @ weight_VH)
            if d_weight_VH is not None:
                d_weight_VH += d_logits_CV.T @ hidden_CH
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
        return d_hidden_TH, d_weight_VH, None, None


def linear_cross_entropy(hidden_TH: Tensor, weight_VH: Tensor, label_index_N: Tensor, label_ids_N: Tensor) -> Tensor:
    """sum over n of -log softmax(hidden[label_index[n]] @ weight.T)[label_ids[n]].

    hidden_TH: [T, H]; weight_VH: [V, H], same dtype, no gradient computed for it when frozen; label_index_N: int64
    [N], distinct; label_ids_N: int64 [N]. Returns a scalar in fp32 (fp64 for fp64 input); 0 for N = 0. Logits are
    rounded to the input's dtype by the GEMM, everything after is fp32. The gradient is computed in forward, so logits
    live one chunk long and are never kept; peak extra memory is d_hidden plus three chunks. No host synchronisation.
    """
    return _LinearCrossEntropy.apply(hidden_TH, weight_VH, label_index_N, label_ids_N)
