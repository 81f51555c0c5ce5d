"""The micro-batches that predictions are made for: laid out as `train` lays them out, and averaged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, cached_property

import numpy as np
from numpy.typing import ArrayLike

from packloop.config import RunConfig
from packloop.data.layout import as_packed, most_shared_slots, share_prefixes
from packloop.data.loader import Batch, TrainingData, make_batch
from packloop.data.packing import Packs, epoch_packs
from packloop.data.prefix import CommonPrefix
from packloop.engine.planner.layout import LayoutChoice, arrangement, choose_layout, epochs_looked_through
from packloop.engine.planner.search import accumulation_of
from packloop.engine.planner.time import Load

# Packs that averages are taken over; fewer where documents share beginnings, which takes longer to find out.
_MAX_PACKS, _MAX_SHARED_PACKS = 512, 64


class Loads:
    """Micro-batches of a configuration on one GPU, each size of them with the accumulation that keeps its packs a step.

    Averages are of an epoch's first packs.
    """

    def __init__(self, config: RunConfig, data: TrainingData, pad_token_id: int):
        self._config, self._documents, self._pad_token_id = config, data.train, pad_token_id
        self._packs_of, self._average = cache(self._packs_of), cache(self._average)

    def layout(self, batch: int, usable: Sequence[str]) -> LayoutChoice:
        """What micro-batches of that many packs make of padding and beginnings. usable: as of `choose_layout`."""
        return choose_layout(self._config, self._micro(batch, 0), usable, on_gpu=True)

    def of(self, batch: int, attention: str, usable: Sequence[str] | None = None) -> Load:
        """The average micro-batch of that many packs under that attention. usable: None where settings name it."""
        settled = self.layout(batch, usable or [attention]).under(attention)
        arrange = arrangement(self._config.kernels.model_copy(update=settled))
        # Of its longest document or of what its packs share, else a micro-batch is made of packs like any other's.
        if self._config.data.packing == "none" or arrange is share_prefixes:
            return replace(self._average(batch, arrange), attention=attention)
        one = self._average(1, arrange)
        return Load(
            (one.slots if arrange is as_packed else one.real_tokens) * batch,
            one.real_tokens * batch,
            one.labels * batch,
            one.squared_lengths * batch,
            one.most_slots * batch,
            attention,
        )

    def _average(self, batch: int, arrange: Callable[[Batch], Batch]) -> Load:
        most_packs = _MAX_SHARED_PACKS if arrange is share_prefixes else _MAX_PACKS
        packs, _ = self._packs_of(0)
        count = min(max(1, packs.num_packs // batch), -(-most_packs // batch))
        micros = [self._micro(batch, number) for number in range(count)]
        # Memory is planned for as `train` does it: with padding, or for what beginnings leave at most.
        most_slots, prefix_tokens = max(micro.num_slots for micro in micros), 0
        if arrange is share_prefixes:
            most_slots, prefix_tokens = self._most_shared_slots(batch) or most_slots, self._common_prefix.length
        found = load_from([arrange(micro) for micro in micros])
        return replace(found, most_slots=most_slots, prefix_tokens=prefix_tokens)

    def _most_shared_slots(self, batch: int) -> int | None:
        """Of the largest micro-batch that shares beginnings, as `train` looks it up."""
        train, (packs, _) = self._config.train, self._packs_of(0)
        global_batch = train.per_device_train_batch_size * train.gradient_accumulation_steps
        steps_per_epoch = -(-packs.num_packs // (batch * accumulation_of(global_batch, batch)))
        num_epochs = epochs_looked_through(self._config, packs.num_packs, steps_per_epoch)
        if num_epochs is None:
            return None
        epochs = map(self._packs_of, range(num_epochs))
        split = ((made, np.split(order, range(batch, len(order), batch))) for made, order in epochs)
        return most_shared_slots(self._common_prefix, split)

    def _micro(self, batch: int, number: int) -> Batch:
        """A micro-batch of the first epoch, as packed."""
        packs, order = self._packs_of(0)
        return make_batch(
            self._documents,
            packs,
            order[number * batch : (number + 1) * batch],
            packing=self._config.data.packing,
            max_length=self._config.data.max_length,
            pad_token_id=self._pad_token_id,
        )

    def _packs_of(self, epoch: int) -> tuple[Packs, np.ndarray]:
        data, seed = self._config.data, self._config.train.seed
        lengths = self._documents.lengths
        return epoch_packs(lengths, data.packing, data.max_length, seed=seed, epoch=epoch, shuffle=data.shuffle)

    @cached_property
    def _common_prefix(self) -> CommonPrefix:
        return CommonPrefix.of(self._documents)


def load_from(micros: list[Batch]) -> Load:
    """The average of these micro-batches."""
    squares = [attended_squares(micro.cu_seqlens.diff(), micro.prefix_of) for micro in micros]
    return Load(
        slots=float(np.mean([micro.num_slots for micro in micros])),
        real_tokens=float(np.mean([micro.num_real_tokens for micro in micros])),
        labels=float(np.mean([micro.label_index.numel() for micro in micros])),
        squared_lengths=float(np.mean(squares)),
        most_slots=max(micro.num_slots for micro in micros),
        attention="",
    )


def attended_squares(lengths: ArrayLike, prefix_of: ArrayLike | None) -> int:
    """n^2 of every n tokens and 2 n p where p that lie elsewhere come first: twice the pairs that attention multiplies.

    lengths, prefix_of: of each document of a micro-batch, as in `Batch`.
    """
    own = np.asarray(lengths, dtype=np.int64)
    if prefix_of is None:
        return int(np.square(own).sum())
    prefix = np.asarray(prefix_of, dtype=np.int64)
    before = np.where(prefix >= 0, own[np.maximum(prefix, 0)], 0)
    return int((own * (own + 2 * before)).sum())
