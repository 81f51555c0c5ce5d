"""One micro-batch on its way to the device."""

from __future__ import annotations

import torch
from torch import Tensor

from packloop.data.loader import Batch
from packloop.kernels.attention import DocumentLayout


def to_device(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor, DocumentLayout, Tensor, Tensor]:
    """(input_ids_BL, position_ids_BL, layout, label_index_N, label_ids_N) on `device`, copied without waiting."""
    layout = DocumentLayout(
        document_ids_BL=_move(batch.document_ids, device),
        cu_seqlens=_move(batch.cu_seqlens, device),
        max_seqlen=batch.max_seqlen,
        cu_seqlens_cpu=batch.cu_seqlens,
        is_packed=bool((batch.document_ids > 0).any()),
    )
    return (
        _move(batch.input_ids, device),
        _move(batch.position_ids, device),
        layout,
        _move(batch.label_index, device),
        _move(batch.label_ids, device),
    )


def _move(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type != "cuda":
        return tensor.to(device)
    # A copy from pageable memory would make the host wait for the device.
    return tensor.pin_memory().to(device, non_blocking=True)
