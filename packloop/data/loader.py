"""Packs to batches. The loader's whole position is (seed, epoch, cursor).

Shape suffixes: B rows of a micro-batch, T slots of a row, N targets, D documents (padding tails included).
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from packloop.config import DataConfig
from packloop.data.packing import Packing, Packs, epoch_packs, pack
from packloop.data.prefix import CommonPrefix
from packloop.data.prompts import Template, get_template, needed_texts
from packloop.data.sources import Rows, load_train_and_eval
from packloop.data.tokenize import Documents, TokenizeReport, tokenize_rows
from packloop.errors import InputError

# An empty batch still goes through the model, so that a rank with no packs left joins the others' collectives.
EMPTY_BATCH_SLOTS = 2
# Epochs whose packs are kept: of few, micro-batches of several sizes are made one after the other.
_KEPT_EPOCHS = 4


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank, on the CPU. Slots are numbered through the flattened [B * T] rows."""

    input_ids: Tensor  # int64 [B, T]
    position_ids: Tensor  # int64 [B, T]
    document_ids: Tensor  # int32 [B, T]: number of the document in its row; 0 throughout for wrapped; -1 is padding
    cu_seqlens: Tensor  # int32 [D + 1]: where each document begins, then B * T; a row's padding is a document too
    max_seqlen: int  # longest of those documents
    label_index: Tensor  # int64 [N]: slot whose next token is a target that counts
    label_ids: Tensor  # int64 [N]: that target
    row_ids: list[int]  # source rows with a token in it, each once
    num_slots: int  # B * T, or 0 for an empty batch
    num_real_tokens: int  # slots that are not padding
    num_label_tokens: int  # targets of all documents: N, or the sum of label_weights
    num_positions: int | None = None  # positions lie below it; None: below T
    # Of each document, the one (its number in cu_seqlens) that holds its first tokens, too; -1: itself. None: all -1.
    prefix_of: Tensor | None = None  # int32 [D]
    label_weights: Tensor | None = None  # float32 [N]: documents for which a target counts; None: 1 each


@dataclass(frozen=True)
class TrainingData:
    """What a run learns from and is measured on; `eval` and `eval_rows` are None where nothing is held out."""

    train: Documents
    eval: Documents | None
    train_rows: Rows
    eval_rows: Rows | None
    template: Template
    report: TokenizeReport  # of train_rows
    eval_report: TokenizeReport | None


def build_data(config: DataConfig, tokenizer: Any, *, seed: int) -> TrainingData:
    """Rows read, split and tokenised as `config` says; `seed` draws the held-out rows.

    Raises `InputError` for what cannot be read, and where no document with a label token is left.
    """
    template = get_template(config.template)
    train_rows, eval_rows = load_train_and_eval(
        config.source,
        split=config.split,
        eval_split=config.eval_split,
        seed=seed,
        revision=config.revision,
        columns=config.columns,
        required=template.fields,
        optional=template.optional_fields,
        texts=needed_texts(template, config.loss_on),
        on_bad_row=config.on_bad_row,
    )
    train, report = _documents(config, train_rows, template, tokenizer, "train on")
    held_out, eval_report = None, None
    if eval_rows is not None:
        held_out, eval_report = _documents(config, eval_rows, template, tokenizer, "evaluate on")
    return TrainingData(train, held_out, train_rows, eval_rows, template, report, eval_report)


def _documents(
    config: DataConfig, rows: Rows, template: Template, tokenizer: Any, purpose: str
) -> tuple[Documents, TokenizeReport]:
    documents, report = tokenize_rows(
        rows,
        template,
        tokenizer,
        loss_on=config.loss_on,
        # Under `wrapped` a document runs on into the next pack.
        max_length=None if config.packing == "wrapped" else config.max_length,
        on_long_row=config.on_long_row,
    )
    if not len(documents):
        reasons = ", ".join(f"{count} {reason}" for reason, count in report.dropped.items())
        raise InputError(
            f"data.source={config.source}: none of {report.num_rows} rows is left to {purpose} ({reasons}); raise "
            f"data.max_length={config.max_length}, or set data.on_long_row=split or data.loss_on=all"
        )
    return documents, report


class PackLoader:
    """Windows of micro-batches, epoch after epoch, in an order that follows from (seed, epoch) alone.

    A window is the packs of one optimizer step: `per_device_batch_size * gradient_accumulation_steps * world_size`
    consecutive packs of the epoch's order, fewer in its last window. Rank r gets packs r, r + world_size, ... of it.
    Every pack is in exactly one window of the epoch, on exactly one rank: nothing is repeated to fill a window up.
    """

    def __init__(
        self,
        documents: Documents,
        *,
        packing: Packing,
        max_length: int,
        per_device_batch_size: int,
        gradient_accumulation_steps: int,
        rank: int,
        world_size: int,
        seed: int,
        shuffle: bool,
        pad_token_id: int,
    ) -> None:
        if not len(documents):
            raise ValueError("a loader needs at least one document; none was given")
        self.documents = documents
        self._packing = packing
        self._max_length = max_length
        self._per_device_batch_size = per_device_batch_size
        self._packs_per_window = per_device_batch_size * gradient_accumulation_steps * world_size
        self._rank = rank
        self._world_size = world_size
        self._seed = seed
        self._pad_token_id = pad_token_id

        @lru_cache(maxsize=_KEPT_EPOCHS)
        def packs_of(seed: int, epoch: int) -> tuple[Packs, np.ndarray]:
            return epoch_packs(documents.lengths, packing, max_length, seed=seed, epoch=epoch, shuffle=shuffle)

        self._packs_of = packs_of
        self._start_epoch(0)

    @property
    def num_packs(self) -> int:
        """Packs in an epoch, over all ranks; the same for every epoch."""
        return self._packs.num_packs

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.num_packs // self._packs_per_window)

    def resized(self, *, per_device_batch_size: int, gradient_accumulation_steps: int) -> PackLoader:
        """The same packs in micro-batches and windows of another size, at the same position."""
        other = copy(self)
        other._per_device_batch_size = per_device_batch_size
        other._packs_per_window = per_device_batch_size * gradient_accumulation_steps * self._world_size
        return other

    @cached_property
    def common_prefix(self) -> CommonPrefix:
        """What the documents begin with in common."""
        return CommonPrefix.of(self.documents)

    def micro_batches(self, epoch: int) -> tuple[Packs, list[np.ndarray]]:
        """An epoch's packs, and the numbers of those of every micro-batch, of all ranks."""
        packs, order = self._packs_of(self._seed, epoch)
        chosen = []
        for begin in range(0, len(order), self._packs_per_window):
            window = order[begin : begin + self._packs_per_window]
            for rank in range(self._world_size):
                chosen += _split(window, self._per_device_batch_size, rank, self._world_size)
        return packs, chosen

    def make(self, packs: Packs, numbers: np.ndarray) -> Batch:
        """The micro-batch of these packs; the position is left as it is."""
        return make_batch(
            self.documents,
            packs,
            numbers,
            packing=self._packing,
            max_length=self._max_length,
            pad_token_id=self._pad_token_id,
        )

    def state(self) -> dict[str, int]:
        """The position: `cursor` packs of epoch `epoch` have been handed out."""
        return {"seed": self._seed, "epoch": self._epoch, "cursor": self._cursor}

    def load_state(self, state: dict[str, int]) -> None:
        """Continue from a position that `state` returned. Raises `InputError` for one that these packs do not have."""
        seed, epoch, cursor = state["seed"], state["epoch"], state["cursor"]
        if min(seed, epoch, cursor) < 0 or cursor >= self.num_packs:
            raise InputError(
                f"data position {state} lies outside an epoch of {self.num_packs} packs; "
                "resume with the data and settings that the checkpoint was made with"
            )
        self._seed = seed
        self._start_epoch(epoch)
        self._cursor = cursor

    def next_window(self) -> list[Batch]:
        """This rank's micro-batches of one optimizer step; as many on every rank, the last ones empty if need be."""
        window = self._pack_order[self._cursor : self._cursor + self._packs_per_window]
        batches = _deal(
            self.documents,
            self._packs,
            window,
            packing=self._packing,
            max_length=self._max_length,
            per_device_batch_size=self._per_device_batch_size,
            rank=self._rank,
            world_size=self._world_size,
            pad_token_id=self._pad_token_id,
        )
        self._cursor += len(window)
        if self._cursor == self.num_packs:
            self._start_epoch(self._epoch + 1)
        return batches

    def _start_epoch(self, epoch: int) -> None:
        self._packs, self._pack_order = self._packs_of(self._seed, epoch)
        self._epoch, self._cursor = epoch, 0


def eval_batches(
    documents: Documents,
    *,
    packing: Packing,
    max_length: int,
    per_device_batch_size: int,
    rank: int,
    world_size: int,
    pad_token_id: int,
) -> Iterator[Batch]:
    """This rank's share of the packs of `documents` in source order: each pack once over all ranks.

    Every rank gets the same number of batches, the last ones empty if need be.
    """
    packs = pack(documents.lengths, packing, max_length, np.arange(len(documents.lengths)))
    packs_per_round = per_device_batch_size * world_size
    for begin in range(0, packs.num_packs, packs_per_round):
        yield from _deal(
            documents,
            packs,
            np.arange(begin, min(begin + packs_per_round, packs.num_packs)),
            packing=packing,
            max_length=max_length,
            per_device_batch_size=per_device_batch_size,
            rank=rank,
            world_size=world_size,
            pad_token_id=pad_token_id,
        )


def make_batch(
    documents: Documents, packs: Packs, chosen: np.ndarray, *, packing: Packing, max_length: int, pad_token_id: int
) -> Batch:
    """The packs numbered `chosen` as the rows of one micro-batch.

    T is `max_length`, or under packing `none` the longest pack's tokens. Under `bfd` and `none` positions restart with
    each document and a document's first token is no target; under `wrapped` a row is one sequence: positions run
    through it, documents attend across their borders, and only the row's first token is no target.
    """
    if not len(chosen):
        return _empty_batch(pad_token_id)
    segments_of_row = packs.pack_offsets[chosen + 1] - packs.pack_offsets[chosen]
    segment = _ranges(packs.pack_offsets[chosen], segments_of_row)
    row_of_segment = np.repeat(np.arange(len(chosen)), segments_of_row)
    document, start = packs.segment_document[segment], packs.segment_start[segment]
    length = packs.segment_stop[segment] - start
    tokens_of_row = np.bincount(row_of_segment, weights=length, minlength=len(chosen)).astype(np.int64)
    num_rows, num_columns = len(chosen), int(tokens_of_row.max()) if packing == "none" else max_length

    # `at` holds, for every real token in row order, its slot; every other array below is in the same order.
    at = _ranges(np.arange(num_rows) * num_columns, tokens_of_row)
    token = _ranges(documents.offsets[document] + start, length)
    row_begins = np.arange(num_rows) * num_columns
    tail_begins = row_begins + tokens_of_row
    if packing == "wrapped":
        run_begins = row_begins
        number_in_row = np.zeros(len(token), dtype=np.int32)
    else:
        run_begins = at[np.cumsum(length) - length]
        first_segment = np.cumsum(segments_of_row) - segments_of_row
        number_in_row = np.repeat(np.arange(len(segment)) - np.repeat(first_segment, segments_of_row), length)
    tail_begins = tail_begins[tokens_of_row < num_columns]
    boundaries = np.union1d(run_begins, tail_begins)
    boundaries = np.append(boundaries, num_rows * num_columns)

    input_ids = np.full(num_rows * num_columns, pad_token_id, dtype=np.int64)
    input_ids[at] = documents.token_ids[token]
    document_ids = np.full(num_rows * num_columns, -1, dtype=np.int32)
    document_ids[at] = number_in_row
    run_lengths = np.diff(boundaries)
    if packing == "wrapped":
        position_ids = np.tile(np.arange(num_columns), num_rows)
    else:
        position_ids = _ranges(np.zeros(len(run_lengths), dtype=np.int64), run_lengths)

    is_target = np.zeros(num_rows * num_columns, dtype=bool)
    is_target[at] = documents.counts[token]
    is_target[run_begins] = False  # what precedes it lies in another document or row, and predicts nothing here
    target_slot = np.flatnonzero(is_target)
    return Batch(
        input_ids=torch.from_numpy(input_ids).view(num_rows, num_columns),
        position_ids=torch.from_numpy(position_ids).view(num_rows, num_columns),
        document_ids=torch.from_numpy(document_ids).view(num_rows, num_columns),
        cu_seqlens=torch.from_numpy(boundaries.astype(np.int32)),
        max_seqlen=int(run_lengths.max()),
        label_index=torch.from_numpy(target_slot - 1),
        label_ids=torch.from_numpy(input_ids[target_slot]),
        row_ids=list(dict.fromkeys(documents.row_ids[document].tolist())),
        num_slots=num_rows * num_columns,
        num_real_tokens=len(token),
        num_label_tokens=len(target_slot),
    )


def _empty_batch(pad_token_id: int) -> Batch:
    slots = EMPTY_BATCH_SLOTS
    return Batch(
        input_ids=torch.full((1, slots), pad_token_id, dtype=torch.int64),
        position_ids=torch.arange(slots).view(1, slots),
        document_ids=torch.full((1, slots), -1, dtype=torch.int32),
        cu_seqlens=torch.tensor([0, slots], dtype=torch.int32),
        max_seqlen=slots,
        label_index=torch.empty(0, dtype=torch.int64),
        label_ids=torch.empty(0, dtype=torch.int64),
        row_ids=[],
        num_slots=0,
        num_real_tokens=0,
        num_label_tokens=0,
    )


def _deal(
    documents: Documents,
    packs: Packs,
    window: np.ndarray,
    *,
    per_device_batch_size: int,
    rank: int,
    world_size: int,
    **layout,
) -> list[Batch]:
    """One rank's micro-batches of the packs in `window`."""
    chosen = _split(window, per_device_batch_size, rank, world_size)
    return [make_batch(documents, packs, numbers, **layout) for numbers in chosen]


def _split(window: np.ndarray, per_device_batch_size: int, rank: int, world_size: int) -> list[np.ndarray]:
    """The packs of each of a rank's micro-batches; their number depends on the window, not on the rank."""
    mine = window[rank::world_size]
    largest_share = -(-len(window) // world_size)
    return [mine[begin : begin + per_device_batch_size] for begin in range(0, largest_share, per_device_batch_size)]


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """int64, the ranges `start, start + 1, ...` of the given lengths, one after the other."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - lengths), lengths)
