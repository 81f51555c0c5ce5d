"""Where the documents of a micro-batch lie: in padded rows, end to end, or end to end behind what they begin with.

Documents made from one template begin with the same tokens. Under causal attention what a model computes for those
does not depend on what follows, so that one copy serves all of them; its targets count once for each document. The sum
of losses and every gradient are the same but for rounding; under dropout the documents share the copy's masks.

Shape suffixes: T slots, D documents (beginnings and a tail of filling included), N targets.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import torch

from packloop.data.loader import Batch
from packloop.data.packing import Packs
from packloop.data.prefix import LEAST_SAVED, CommonPrefix, group_by_prefix

# Slots, where their number is free, are filled up to a multiple of this: whole tiles of a matrix product.
SLOT_MULTIPLE = 128


def as_packed(batch: Batch) -> Batch:
    """The batch itself: a pack a row, padding included."""
    return batch


def without_padding(batch: Batch) -> Batch:
    """The same documents end to end in one row [1, T], T their tokens filled up to a multiple of `SLOT_MULTIPLE`.

    For attention that goes by `cu_seqlens` alone. The batch itself where that saves nothing.
    """
    starts, lengths = _documents(batch)
    if not len(starts) or _whole_tiles(lengths.sum()) >= batch.num_slots:
        return batch
    return _laid_out(batch, starts, lengths)


def share_prefixes(batch: Batch, *, least_slots: int = 0) -> Batch:
    """`without_padding`, and what documents begin with in common lies before them, once, as a document of its own.

    For attention that goes by `prefix_of`, and documents that begin at position 0, as under packing `bfd` and `none`.
    Those that begin alike are grouped so that many tokens are saved; a document has one beginning at most. The last
    token that a group has in common stays with each of its documents, so that all targets of a beginning are the same
    for all of them. `without_padding(batch)` where that saves nothing to speak of. least_slots: filled up to so many at
    least.
    """
    starts, lengths = _documents(batch)
    tokens = batch.input_ids.flatten().numpy()
    groups = group_by_prefix([tokens[start : start + length] for start, length in zip(starts, lengths, strict=True)])
    saved = sum(length * (len(members) - 1) for length, members in groups)
    num_tokens = batch.num_real_tokens
    if saved < LEAST_SAVED * max(1, num_tokens) or _whole_tiles(num_tokens - saved) >= batch.num_slots:
        # Filled up even so: memory is planned for micro-batches of a run whose first shares nothing.
        return _laid_out(batch, starts, lengths, least_slots=least_slots) if least_slots else without_padding(batch)
    run_starts, run_lengths, prefix_of = [], [], []
    for length, members in groups:
        prefix_of += [-1] + [len(prefix_of)] * len(members)
        run_starts += [starts[members[0]], *(starts[members] + length)]
        run_lengths += [length, *(lengths[members] - length)]
    alone = np.setdiff1d(np.arange(len(starts)), np.concatenate([members for _, members in groups]))
    prefix_of += [-1] * len(alone)
    run_starts, run_lengths = np.array([*run_starts, *starts[alone]]), np.array([*run_lengths, *lengths[alone]])
    prefixes = [(length, starts[members]) for length, members in groups]
    return _laid_out(batch, run_starts, run_lengths, prefix_of, prefixes, least_slots=least_slots)


def most_shared_slots(common: CommonPrefix, epochs: Iterable[tuple[Packs, list[np.ndarray]]]) -> int:
    """No micro-batch of these has more slots than this after `share_prefixes`.

    common: of the documents. epochs: an epoch's packs, and the numbers of the packs of each of its micro-batches.
    """
    most = 0
    for packs, micro_batches in epochs:
        saves = common.has_it[packs.segment_document] & (packs.segment_start == 0)
        sums = np.concatenate([[0], np.cumsum(saves)])
        tokens, num_saving = packs.pack_tokens, sums[packs.pack_offsets[1:]] - sums[packs.pack_offsets[:-1]]
        sizes, chosen = [len(numbers) for numbers in micro_batches], np.concatenate(micro_batches)
        num_tokens, num_saving = (_sums(values[chosen], sizes) for values in (tokens, num_saving))
        saved = common.length * np.maximum(0, num_saving - 1)
        slots = np.where(saved >= LEAST_SAVED * num_tokens, num_tokens - saved, num_tokens)
        most = max(most, int(slots.max()))
    return _whole_tiles(most)


def _documents(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """First slot and length of every document, padding left out."""
    bounds = batch.cu_seqlens.numpy().astype(np.int64)
    starts, lengths = bounds[:-1], np.diff(bounds)
    is_real = (batch.document_ids.flatten().numpy()[starts] >= 0) & (batch.num_real_tokens > 0)
    return starts[is_real], lengths[is_real]


def _sums(values: np.ndarray, sizes: list[int]) -> np.ndarray:
    """Of runs of so many values, one after the other; 0 of an empty one."""
    ends = np.cumsum(sizes)
    sums = np.concatenate([[0], np.cumsum(values)])
    return sums[ends] - sums[ends - sizes]


def _whole_tiles(num_tokens: int) -> int:
    return -(-int(num_tokens) // SLOT_MULTIPLE) * SLOT_MULTIPLE


def _laid_out(
    batch: Batch,
    starts: np.ndarray,
    lengths: np.ndarray,
    prefix_of: list[int] | None = None,
    prefixes: list[tuple[int, np.ndarray]] = (),
    *,
    least_slots: int = 0,
) -> Batch:
    """One row of the runs of tokens at `starts`, filled up with a tail.

    prefixes: length of each beginning and where its documents start; their runs come in this order, the first at 0.
    """
    ends = np.cumsum(lengths)
    num_tokens, num_slots = int(ends[-1]), _whole_tiles(max(ends[-1], least_slots))
    tail, row = num_slots - num_tokens, batch.position_ids.shape[1]
    tail_ends = [*range(num_tokens + row, num_slots, row), num_slots] if tail else []
    source = np.arange(num_tokens) + np.repeat(starts - (ends - lengths), lengths)
    is_target = np.zeros(batch.input_ids.numel(), dtype=np.float32)
    is_target[batch.label_index.numpy()] = 1.0
    weights = is_target[source]
    if prefixes:
        begins = (ends - lengths)[np.unique([number for number in prefix_of if number >= 0])]
        for begin, (length, documents) in zip(begins, prefixes, strict=True):
            weights[begin : begin + length] = is_target[documents[:, None] + np.arange(length)].sum(0)
    label_index = np.flatnonzero(weights)
    bounds = np.concatenate([[0], ends, tail_ends]).astype(np.int32)
    taken, tokens = torch.from_numpy(source), batch.input_ids.flatten()
    numbers = torch.from_numpy(np.repeat(np.arange(len(lengths), dtype=np.int32), lengths))
    return replace(
        batch,
        # Any token of the model's will do in the tail: nobody sees it and nothing is predicted there.
        input_ids=torch.cat([tokens[taken], tokens[:1].expand(tail)])[None],
        position_ids=torch.cat([batch.position_ids.flatten()[taken], torch.arange(tail) % row])[None],
        document_ids=torch.cat([numbers, torch.full((tail,), -1, dtype=torch.int32)])[None],
        cu_seqlens=torch.from_numpy(bounds),
        max_seqlen=int(np.diff(bounds).max()),
        label_index=torch.from_numpy(label_index),
        label_ids=tokens[taken[label_index] + 1],  # a target is its document's next token
        num_slots=num_slots,
        num_positions=row,
        prefix_of=torch.tensor([*prefix_of, *[-1] * len(tail_ends)], dtype=torch.int32) if prefixes else None,
        label_weights=torch.from_numpy(weights[label_index]) if prefixes else None,
    )
