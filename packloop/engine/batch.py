"""Micro-batches on their way to the device, a window ahead of the step that uses them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from packloop.data.layout import SLOT_MULTIPLE, as_packed
from packloop.data.loader import Batch
from packloop.kernels.attention import DocumentLayout
from packloop.kernels.token_reuse import DistinctTokens

# Share of the slots from which on distinct tokens are too many for their reuse to pay.
_MOST_DISTINCT = 0.5


class WindowSource(Protocol):
    """What `Windows` draws from; `data.loader.PackLoader` is one."""

    def next_window(self) -> list[Batch]: ...

    def state(self) -> dict[str, int]: ...


@dataclass(frozen=True)
class Micro:
    """A micro-batch and what `packed_loss_sum` takes of it, on the device."""

    batch: Batch
    inputs: tuple[Tensor, Tensor, DocumentLayout, Tensor, Tensor, Tensor | None]

    @classmethod
    def of(cls, batch: Batch, device: torch.device, *, finds_tokens: bool = True) -> Micro:
        return cls(batch, to_device(batch, device, finds_tokens=finds_tokens))

    @property
    def layout(self) -> DocumentLayout:
        return self.inputs[2]


class Windows:
    """A source's windows on the device, the next one made ready while the device works on the one before.

    arrange: what lays out a micro-batch's documents (`data.layout`). prepare_layout: called with its layout, so that
    what attention needs of it is made ahead too. Both may be set anew, for windows that are not ready yet.
    finds_tokens: whether micro-batches come with their distinct tokens.
    position: the source's after the window that `take` last returned, whatever was made ready since.
    """

    def __init__(
        self,
        source: WindowSource,
        device: torch.device,
        prepare_layout: Callable[[DocumentLayout], None] = lambda layout: None,
        *,
        arrange: Callable[[Batch], Batch] = as_packed,
        finds_tokens: bool = True,
    ):
        self._source, self._device = source, device
        self.arrange, self.prepare_layout = arrange, prepare_layout
        self._finds_tokens = finds_tokens
        self._ready: list[Micro] | None = None
        self.position = source.state()

    def take(self) -> list[Micro]:
        """The micro-batches of the next step."""
        self.prepare()
        window, self._ready = self._ready, None
        self.position = self._source.state()
        return window

    def prepare(self) -> None:
        """Fetches the next window unless it is there already: host work and copies, no wait for the device."""
        if self._ready is None:
            batches = [self.arrange(batch) for batch in self._source.next_window()]
            self._ready = [Micro.of(batch, self._device, finds_tokens=self._finds_tokens) for batch in batches]
            for micro in self._ready:
                self.prepare_layout(micro.layout)


def to_device(
    batch: Batch, device: torch.device, *, finds_tokens: bool = True
) -> tuple[Tensor, Tensor, DocumentLayout, Tensor, Tensor, Tensor | None]:
    """What `packed_loss_sum` takes of a batch, on `device`, copied without waiting.

    (input_ids_BL, position_ids_BL, layout, label_index_N, label_ids_N, label_weights_N or None).
    finds_tokens: the layout has the distinct tokens, for `kernels.token_reuse`, where there are few enough.
    """
    distinct = distinct_tokens(batch.input_ids) if finds_tokens else None
    if distinct is not None:
        distinct = DistinctTokens(_move(distinct.slots_U, device), _move(distinct.row_of_T, device))
    is_real = batch.document_ids >= 0
    layout = DocumentLayout(
        document_ids_BL=_move(batch.document_ids, device),
        cu_seqlens=_move(batch.cu_seqlens, device),
        max_seqlen=batch.max_seqlen,
        cu_seqlens_cpu=batch.cu_seqlens,
        is_packed=bool((batch.document_ids > 0).any()),
        num_positions=batch.num_positions,
        longest_document=int(batch.position_ids[is_real].max()) + 1 if batch.num_real_tokens else None,
        prefix_of=batch.prefix_of,
        distinct=distinct,
    )
    return (
        _move(batch.input_ids, device),
        _move(batch.position_ids, device),
        layout,
        _move(batch.label_index, device),
        _move(batch.label_ids, device),
        None if batch.label_weights is None else _move(batch.label_weights, device),
    )


def _move(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type != "cuda":
        return tensor.to(device)
    # A copy from pageable memory would make the host wait for the device.
    return tensor.pin_memory().to(device, non_blocking=True)


def distinct_tokens(input_ids_BL: Tensor) -> DistinctTokens | None:
    """Of a micro-batch on the CPU; None where too many differ for reuse to pay.

    As many rows as whole tiles of a product have: the last one is repeated.
    """
    _, slots, row_of = np.unique(input_ids_BL.numpy(), return_index=True, return_inverse=True)
    num_rows = -(-len(slots) // SLOT_MULTIPLE) * SLOT_MULTIPLE
    if num_rows > _MOST_DISTINCT * row_of.size:
        return None
    slots = np.pad(slots, (0, num_rows - len(slots)), mode="edge")
    return DistinctTokens(torch.from_numpy(slots), torch.from_numpy(row_of.reshape(-1)))
