"""Where the documents of a micro-batch lie: in padded rows, or end to end."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from packloop.data.loader import Batch

# Slots, where their number is free, are filled up to a multiple of this: whole tiles of a matrix product.
SLOT_MULTIPLE = 128


def without_padding(batch: Batch) -> Batch:
    """The same documents end to end in one row [1, T], T their tokens filled up to a multiple of `SLOT_MULTIPLE`.

    For attention that goes by `cu_seqlens` alone. The batch itself where that saves nothing.
    """
    before, num_positions = batch.document_ids.numel(), batch.position_ids.shape[1]
    multiple = min(SLOT_MULTIPLE, num_positions)  # so that the tail's positions are some that rows have, too
    is_real = batch.document_ids.flatten() >= 0
    num_real = int(is_real.sum())
    num_slots = -(-num_real // multiple) * multiple
    if num_real == 0 or num_slots >= before:
        return batch
    starts, lengths = batch.cu_seqlens[:-1].long(), batch.cu_seqlens.diff().long()
    lengths = lengths[is_real[starts]]
    tail = num_slots - num_real
    runs = torch.cat([lengths, torch.tensor([tail])]) if tail else lengths
    numbers = torch.arange(len(lengths), dtype=torch.int32).repeat_interleave(lengths)

    def compacted(values: Tensor, filler: Tensor) -> Tensor:
        return torch.cat([values.flatten()[is_real], filler])[None]

    return replace(
        batch,
        # Any token of the model's will do in the tail: nobody sees it and nothing is predicted there.
        input_ids=compacted(batch.input_ids, batch.input_ids.flatten()[~is_real][:tail]),
        position_ids=compacted(batch.position_ids, torch.arange(tail)),
        document_ids=torch.cat([numbers, torch.full((tail,), -1, dtype=torch.int32)])[None],
        cu_seqlens=torch.cat([torch.zeros(1, dtype=torch.int64), runs.cumsum(0)]).int(),
        max_seqlen=int(runs.max()),
        label_index=(is_real.cumsum(0) - 1)[batch.label_index],
        num_slots=num_slots,
        num_positions=num_positions,
    )
