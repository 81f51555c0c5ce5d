"""The micro-batches that predictions are made for: laid out as `train` lays them out, and averaged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np
from numpy.typing import ArrayLike

from packloop.config import RunConfig
from packloop.data.loader import Batch, PackLoader, TrainingData
from packloop.engine.planner.layout import LayoutChoice, arrangement, choose_layout, largest_micro, typical_micro
from packloop.engine.planner.search import accumulation_of
from packloop.engine.planner.time import Load

# Packs that averages are taken over; fewer where documents share beginnings, which takes longer to find out.
_MAX_PACKS, _MAX_SHARED_PACKS = 512, 64


class Loads:
    """Micro-batches of a configuration on one GPU, each size of them with the accumulation that keeps its packs a step.

    Averages are of an epoch's first packs.
    """

    def __init__(self, config: RunConfig, data: TrainingData, pad_token_id: int):
        self._config, train = config, config.train
        self._global_batch = train.per_device_train_batch_size * train.gradient_accumulation_steps
        self._loader = PackLoader(
            data.train,
            packing=config.data.packing,
            max_length=config.data.max_length,
            per_device_batch_size=1,
            gradient_accumulation_steps=self._global_batch,
            rank=0,
            world_size=1,
            seed=train.seed,
            shuffle=config.data.shuffle,
            pad_token_id=pad_token_id,
        )
        self._average, self._typical = cache(self._average), cache(self._typical)

    def layout(self, batch: int, usable: Sequence[str]) -> LayoutChoice:
        """What micro-batches of that many packs make of padding and beginnings. usable: as of `choose_layout`."""
        return choose_layout(self._config, self._typical(batch), usable, on_gpu=True)

    def of(self, batch: int, attention: str, usable: Sequence[str] | None = None) -> Load:
        """The average micro-batch of that many packs under that attention. usable: None where settings name it."""
        settled = self.layout(batch, usable or [attention]).under(attention)
        # Of its longest document or of what its packs share, else a micro-batch is made of packs like any other's.
        if self._config.data.packing == "none" or settled["prefix_reuse"] == "micro_batch":
            return replace(self._average(batch, **settled), attention=attention)
        one = self._average(1, **settled)
        return Load(
            (one.slots if settled["padding"] == "keep" else one.real_tokens) * batch,
            one.real_tokens * batch,
            one.labels * batch,
            one.squared_lengths * batch,
            one.most_slots * batch,
            attention,
        )

    def _average(self, batch: int, padding: str, prefix_reuse: str) -> Load:
        kernels = self._config.kernels.model_copy(update={"padding": padding, "prefix_reuse": prefix_reuse})
        config = self._config.model_copy(update={"kernels": kernels})
        shares = prefix_reuse == "micro_batch"
        prefix_tokens = self._loader.common_prefix.length if shares else 0
        micros = self._micros(batch, _MAX_SHARED_PACKS if shares else _MAX_PACKS)
        found = load_from(list(map(arrangement(kernels), micros)))
        most_slots = largest_micro(config, self._of_size(batch)).num_slots
        return replace(found, most_slots=most_slots, prefix_tokens=prefix_tokens)

    def _typical(self, batch: int) -> Batch:
        return typical_micro(self._config.data.packing, self._of_size(batch))

    def _micros(self, batch: int, most_packs: int) -> list[Batch]:
        """Of the first epoch, as packed: all but its last, which may be smaller, and no more packs than that, about."""
        loader = self._of_size(batch)
        packs, micro_batches = loader.micro_batches(0)
        count = min(max(1, packs.num_packs // batch), -(-most_packs // batch))
        return [loader.make(packs, numbers) for numbers in micro_batches[:count]]

    def _of_size(self, batch: int) -> PackLoader:
        accumulation = accumulation_of(self._global_batch, batch)
        return self._loader.resized(per_device_batch_size=batch, gradient_accumulation_steps=accumulation)


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
