"""Causal attention over packed documents: one signature, several backends.

Shapes: B rows, T slots a row, H query heads, K key/value heads (H a multiple of K), D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


@dataclass(frozen=True)
class DocumentLayout:
    """Which slots of a micro-batch belong to one document. Made once a micro-batch, shared by every layer.

    document_ids_BT: int32, number of the document within its row, -1 for padding.
    cu_seqlens: int32 [documents + 1], their bounds in the flattened B*T slots, on the device.
    max_seqlen: tokens of the longest document, on the host, so that no layer reads it back.
    is_packed: False where every row is one document from its first slot on; plain causal attention is then right, and
        whatever padding sees comes after every real token.
    """

    document_ids_BT: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    is_packed: bool

    @cached_property
    def mask_B1TT(self) -> Tensor:
        """bool [B, 1, T, T], True where a query (row) may see a key (column): same document, not later."""
        ids = self.document_ids_BT
        same = ids[:, None, :, None] == ids[:, None, None, :]
        return same & torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril()


AttentionFunction = Callable[[Tensor, Tensor, Tensor, DocumentLayout, float], Tensor]


def _repeat_heads(x_BKTD: Tensor, num_heads: int) -> Tensor:
    return x_BKTD.repeat_interleave(num_heads // x_BKTD.shape[1], dim=1)


def eager_attention(q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, layout: DocumentLayout, scale: float) -> Tensor:
    """softmax(q k^T * scale + mask) v with the whole score matrix in memory; softmax in fp32 (fp64 for fp64 input).

    Returns [B, H, T, D] in q's dtype. The baseline that the other backends are measured and tested against.
    """
    k_BHTD, v_BHTD = _repeat_heads(k_BKTD, q_BHTD.shape[1]), _repeat_heads(v_BKTD, q_BHTD.shape[1])
    scores = q_BHTD @ k_BHTD.transpose(-1, -2) * scale
    scores = scores.masked_fill(~layout.mask_B1TT, torch.finfo(scores.dtype).min)
    softmax_dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
    return scores.softmax(-1, dtype=softmax_dtype).to(q_BHTD.dtype) @ v_BHTD


def sdpa_attention(q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, layout: DocumentLayout, scale: float) -> Tensor:
    """`scaled_dot_product_attention`: its causal path for one document a row, a boolean mask for packed documents."""
    k_BHTD, v_BHTD = _repeat_heads(k_BKTD, q_BHTD.shape[1]), _repeat_heads(v_BKTD, q_BHTD.shape[1])
    if layout.is_packed:
        return F.scaled_dot_product_attention(q_BHTD, k_BHTD, v_BHTD, attn_mask=layout.mask_B1TT, scale=scale)
    return F.scaled_dot_product_attention(q_BHTD, k_BHTD, v_BHTD, is_causal=True, scale=scale)


def cudnn_attention(q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, layout: DocumentLayout, scale: float) -> Tensor:
    """cuDNN's fused causal attention, pinned. One document a row only: ValueError for packed documents."""
    if layout.is_packed:
        raise ValueError("attention 'cudnn' sees one causal sequence a row; packed documents need auto or sdpa")
    k_BHTD, v_BHTD = _repeat_heads(k_BKTD, q_BHTD.shape[1]), _repeat_heads(v_BKTD, q_BHTD.shape[1])
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(q_BHTD, k_BHTD, v_BHTD, is_causal=True, scale=scale)


BACKENDS: dict[str, AttentionFunction] = {
    "eager": eager_attention,
    "sdpa": sdpa_attention,
    "cudnn": cudnn_attention,
}


def choose_backend(requested: str, device_type: str) -> tuple[str, str]:
    """(backend, why) for a requested name or `auto`. ValueError where the requested one cannot run on the device."""
    if requested == "cudnn" and device_type != "cuda":
        raise ValueError(f"kernels.attention=cudnn runs on CUDA, and the device is {device_type}; use auto")
    if requested != "auto":
        return requested, "asked for"
    return "sdpa", "PyTorch's fused attention, with a document mask where documents are packed"
