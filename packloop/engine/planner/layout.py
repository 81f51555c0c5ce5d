"""How a run's documents lie: whether padding is dropped and beginnings are shared. The rules of `train` and `plan`."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from packloop.config import KernelsConfig, RunConfig
from packloop.data.layout import as_packed, most_shared_slots, share_prefixes, without_padding
from packloop.data.loader import Batch, PackLoader
from packloop.data.packing import Packing, Packs
from packloop.kernels.attention import FLAT, SHARING

# Of a longer run not all packs are looked through, which would take about a second: memory is planned for with padding.
_MOST_PACKS = 50_000
# What an epoch takes beside its packs, as a number of them.
_EPOCH_PACKS = 64
# Of few packs more epochs are looked through than a run has: benchmarks go on for as many steps as they are told.
_LEAST_PACKS = 1024
# Share of the slots for whose sake `auto` takes an attention that is not the fastest.
_WORTH_ANOTHER = 0.05


@dataclass(frozen=True)
class LayoutChoice:
    """What becomes of padding and beginnings under an attention that allows it.

    among: the attentions that `auto` may take, the fastest of them; None: any.
    """

    drops_padding: bool
    shares_beginnings: bool
    among: tuple[str, ...] | None

    def under(self, attention: str) -> dict[str, str]:
        """kernels.padding and kernels.prefix_reuse, settled for the attention that is taken."""
        drops = self.drops_padding and attention in FLAT
        shares = drops and self.shares_beginnings and attention in SHARING
        return {"padding": "drop" if drops else "keep", "prefix_reuse": "micro_batch" if shares else "none"}


def choose_layout(config: RunConfig, micro: Batch, usable: Collection[str], *, on_gpu: bool) -> LayoutChoice:
    """Documents lie end to end, behind what they begin with in common, where that is asked for or worth it.

    micro: the run's `typical_micro`. usable: attentions that can run, one alone where it is named.
    """
    kernels, packing = config.kernels, config.data.packing
    rows = LayoutChoice(drops_padding=False, shares_beginnings=False, among=None)
    is_asked = kernels.prefix_reuse == "micro_batch" or kernels.padding == "drop"
    if not is_asked and (kernels.padding == "keep" or not on_gpu or packing == "wrapped"):
        return rows
    can_share = packing != "wrapped" and any(name in SHARING for name in usable)
    shares = can_share and kernels.prefix_reuse != "none"
    dropped = without_padding(micro)
    shared = share_prefixes(micro) if shares else dropped
    if not is_asked:
        # Where little is left out of rows of one document each, they may suit a faster attention.
        leaves_out = packing == "bfd" or _saves(shared, micro)
        if not leaves_out or not any(name in FLAT for name in usable):
            return rows
    # Attention is the smaller part of a step: who leaves out slots need not be the fastest.
    prefers_sharing = shares and (kernels.prefix_reuse == "micro_batch" or _saves(shared, dropped))
    return LayoutChoice(drops_padding=True, shares_beginnings=shares, among=SHARING if prefers_sharing else FLAT)


def _saves(arranged: Batch, batch: Batch) -> bool:
    """Whether an arrangement of the same documents leaves out slots worth another attention."""
    return arranged.num_slots <= (1 - _WORTH_ANOTHER) * batch.num_slots


def why_not_as_asked(kernels: KernelsConfig, attention: str, reasons: dict[str, str | None]) -> str | None:
    """Why documents cannot lie as settings ask under this attention, and what to change; None where they can.

    reasons: attention -> None where it can run, otherwise why not.
    """
    if kernels.prefix_reuse == "micro_batch" and attention not in SHARING:
        fault = f"kernels.attention={attention} knows no beginnings that documents share"
        return _needs_another(f"kernels.prefix_reuse=micro_batch: {fault}", SHARING, reasons, "prefix_reuse=none")
    if kernels.padding == "drop" and attention not in FLAT:
        fault = f"kernels.attention={attention} needs packs in rows of their own"
        return _needs_another(f"kernels.padding=drop: {fault}", FLAT, reasons, "padding=keep")
    return None


def _needs_another(fault: str, names: tuple[str, ...], reasons: dict[str, str | None], otherwise: str) -> str:
    """The fault, and which of the named backends to use or, where none of them can run, why."""
    if able := [name for name in names if reasons.get(name) is None]:
        return f"{fault}; use {'one of ' if len(able) > 1 else ''}{', '.join(able)}, or kernels.{otherwise}"
    listed: dict[str, list[str]] = {}
    for name in names:
        listed.setdefault(reasons[name], []).append(name)
    why = "; ".join(f"{', '.join(alike)}: {reason}" for reason, alike in listed.items())
    return f"{fault}, and no other can run here ({why}); use kernels.{otherwise}"


def arrangement(kernels: KernelsConfig) -> Callable[[Batch], Batch]:
    """How settings lay out the documents of a micro-batch; what is still `auto` changes nothing."""
    if kernels.prefix_reuse == "micro_batch":
        return share_prefixes
    return without_padding if kernels.padding == "drop" else as_packed


def typical_micro(packing: Packing, loader: PackLoader) -> Batch:
    """A micro-batch to judge by, as packed: the first, or, where a pack is a document, one of median size."""
    packs, micro_batches = loader.micro_batches(0)
    if packing == "none":
        tokens = packs.pack_tokens
        micro_batches = sorted(filter(len, micro_batches), key=lambda numbers: tokens[numbers].sum())
        return loader.make(packs, micro_batches[len(micro_batches) // 2])
    return loader.make(packs, micro_batches[0])


def largest_micro(config: RunConfig, loader: PackLoader) -> Batch:
    """A micro-batch that has as many slots as any of the run may have, laid out as a settled configuration has it.

    Packs of `bfd` are planned for with the little padding that they have, and so is a run too long to look through.
    """
    packing, shares = config.data.packing, config.kernels.prefix_reuse == "micro_batch"
    packs, micro_batches = loader.micro_batches(0)
    numbers = micro_batches[0]
    if packing == "none":  # a pack is a document, and a row as wide as the longest of its micro-batch
        numbers = np.argsort(packs.pack_tokens)[-len(numbers) :]
    if not shares and (packing != "none" or config.kernels.padding == "keep"):
        return loader.make(packs, numbers)
    num_epochs = epochs_looked_through(config, loader.num_packs, loader.steps_per_epoch)
    if num_epochs is None:
        return loader.make(packs, numbers)
    epochs = [loader.micro_batches(epoch) for epoch in range(num_epochs)]
    if packing == "none":
        packs, numbers = _of_most_tokens(epochs)
    micro = loader.make(packs, numbers)
    if not shares:
        return without_padding(micro)
    return share_prefixes(micro, least_slots=most_shared_slots(loader.common_prefix, epochs))


def _of_most_tokens(epochs: Iterable[tuple[Packs, list[np.ndarray]]]) -> tuple[Packs, np.ndarray]:
    """(an epoch's packs, the numbers of those of a micro-batch) of the micro-batch with the most tokens."""

    def sized() -> Iterator[tuple[int, Packs, np.ndarray]]:
        for packs, micro_batches in epochs:
            tokens = packs.pack_tokens
            for numbers in micro_batches:
                yield int(tokens[numbers].sum()), packs, numbers

    _, packs, numbers = max(sized(), key=lambda one: one[0])
    return packs, numbers


def epochs_looked_through(config: RunConfig, num_packs: int, steps_per_epoch: int) -> int | None:
    """Epochs whose micro-batches say how large one without padding gets; None where they take too long."""
    steps = config.train.max_steps
    num_epochs = math.ceil(steps / steps_per_epoch if steps else config.train.num_train_epochs)
    if num_epochs * (num_packs + _EPOCH_PACKS) > _MOST_PACKS:
        return None
    return max(num_epochs, math.ceil(_LEAST_PACKS / num_packs))
