"""What the model sees: documents laid into packs of at most `max_length` tokens.

Three packers, all functions of the documents' lengths and the epoch's order alone:

`pack_wrapped`  joins the documents end to end and cuts every `max_length` tokens; only the last pack is not full.
`pack_bfd`      keeps documents whole: best fit decreasing, each into the fullest pack that still has room.
`pack_none`     one document a pack.

Every token of every document lands in exactly one pack, exactly once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

Packing = Literal["wrapped", "bfd", "none"]


@dataclass(frozen=True)
class Packs:
    """Packs as runs of segments; a segment is a range of one document's tokens.

    Pack p is segments `pack_offsets[p]:pack_offsets[p + 1]`. Shapes: S segments, P packs.
    """

    segment_document: np.ndarray  # int64 [S], index into the lengths that were packed
    segment_start: np.ndarray  # int64 [S], first token, counted inside the document
    segment_stop: np.ndarray  # int64 [S], one past the last token
    pack_offsets: np.ndarray  # int64 [P + 1]

    @property
    def num_packs(self) -> int:
        return len(self.pack_offsets) - 1

    @property
    def pack_tokens(self) -> np.ndarray:
        """int64 [P], tokens in each pack."""
        ends = np.concatenate([[0], np.cumsum(self.segment_stop - self.segment_start)])
        return ends[self.pack_offsets[1:]] - ends[self.pack_offsets[:-1]]


def epoch_packs(
    lengths: np.ndarray, packing: Packing, max_length: int, *, seed: int, epoch: int, shuffle: bool
) -> tuple[Packs, np.ndarray]:
    """The packs of one epoch and the order (int64 [P]) in which they are trained on; both follow from (seed, epoch).

    Without `shuffle` documents and packs come in the source's order, in every epoch.
    """
    if not shuffle:
        packs = pack(lengths, packing, max_length, np.arange(len(lengths)))
        return packs, np.arange(packs.num_packs)
    rng = np.random.default_rng([seed, epoch])
    packs = pack(lengths, packing, max_length, rng.permutation(len(lengths)))
    return packs, rng.permutation(packs.num_packs)


def pack(lengths: np.ndarray, packing: Packing, max_length: int, order: np.ndarray) -> Packs:
    """The documents in `order`, packed by the packer that `packing` names."""
    if packing == "none":
        return pack_none(lengths, order)
    return {"wrapped": pack_wrapped, "bfd": pack_bfd}[packing](lengths, max_length, order)


def pack_wrapped(lengths: np.ndarray, max_length: int, order: np.ndarray) -> Packs:
    """The documents in `order`, joined and cut into packs of `max_length` tokens; the last may be shorter.

    Raises `ValueError` for a length below 1, or an order that does not name each document once.
    """
    lengths, order = _checked(lengths, order)
    stops = np.cumsum(lengths[order])
    starts = stops - lengths[order]
    num_tokens = int(stops[-1]) if len(stops) else 0
    cuts = np.arange(0, num_tokens, max_length, dtype=np.int64)
    # A segment begins wherever a document or a pack begins, and ends where the next one begins.
    segment_begin = np.union1d(starts, cuts)
    segment_end = np.append(segment_begin[1:], num_tokens)[: len(segment_begin)]
    place = np.searchsorted(starts, segment_begin, side="right") - 1
    return Packs(
        segment_document=order[place],
        segment_start=segment_begin - starts[place],
        segment_stop=segment_end - starts[place],
        pack_offsets=np.append(np.searchsorted(segment_begin, cuts), len(segment_begin)).astype(np.int64),
    )


def pack_none(lengths: np.ndarray, order: np.ndarray) -> Packs:
    """One document a pack, in `order`. Raises `ValueError` as `pack_wrapped` does."""
    lengths, order = _checked(lengths, order)
    return Packs(
        segment_document=order,
        segment_start=np.zeros(len(order), dtype=np.int64),
        segment_stop=lengths[order],
        pack_offsets=np.arange(len(order) + 1, dtype=np.int64),
    )


def pack_bfd(lengths: np.ndarray, max_length: int, order: np.ndarray) -> Packs:
    """Whole documents by best fit decreasing: the longest first, each into the open pack with the least room for it.

    O(n log n) for n documents, with one small set operation a step (`_CapacitySet`). Which pack takes a document
    depends on the lengths alone, so the number of packs is the same for every order; `order` decides which of several
    documents of one length goes where, the order inside a pack, and that packs come by their earliest document.

    Raises `ValueError` for a document longer than `max_length`, and as `pack_wrapped` does.
    """
    lengths, order = _checked(lengths, order)
    if len(lengths) and lengths.max() > max_length:
        longest = int(np.argmax(lengths))
        raise ValueError(
            f"document {longest} has {lengths[longest]} tokens and a pack holds max_length={max_length}; "
            "truncate, split or drop long documents before packing"
        )
    ranked_lengths = lengths[order]
    by_length = np.argsort(-ranked_lengths, kind="stable")  # ranks (positions in order), longest document first
    pack_of_rank = np.empty(len(order), dtype=np.int64)
    pack_of_rank[by_length] = _best_fit(ranked_lengths[by_length], max_length)

    first_rank = np.full(pack_of_rank.max(initial=-1) + 1, len(order), dtype=np.int64)
    np.minimum.at(first_rank, pack_of_rank, np.arange(len(order)))
    number = np.empty_like(first_rank)
    number[np.argsort(first_rank)] = np.arange(len(first_rank))
    ranks = np.argsort(number[pack_of_rank], kind="stable")
    counts = np.bincount(number[pack_of_rank], minlength=len(first_rank))
    return Packs(
        segment_document=order[ranks],
        segment_start=np.zeros(len(order), dtype=np.int64),
        segment_stop=ranked_lengths[ranks],
        pack_offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
    )


def _best_fit(descending: np.ndarray, max_length: int) -> list[int]:
    """Pack of each document, for lengths in descending order.

    Documents of one length are placed together. Best fit puts them into one pack until no more of them fit (the pack
    just filled has the least room), so `room // length` of them go to each of the packs with the same room at once.
    """
    sizes, counts = np.unique(descending, return_counts=True)
    open_packs: list[list[int]] = [[] for _ in range(max_length + 1)]  # packs by the room left in them
    rooms = _CapacitySet(max_length)
    pack_of: list[int] = []
    num_packs = 0
    for length, count in zip(sizes[::-1].tolist(), counts[::-1].tolist()):
        while count:
            room = rooms.smallest_at_least(length)
            if room < 0:
                each = max_length // length
                needed = -(-count // each)
                taken = list(range(num_packs, num_packs + needed))
                num_packs += needed
                room = max_length
            else:
                each = room // length
                packs = open_packs[room]
                needed = min(len(packs), -(-count // each))
                taken = packs[-needed:]
                del packs[-needed:]
                if not packs:
                    rooms.discard(room)
            placed = min(count, each * needed)
            count -= placed
            pack_of.extend(taken if each == 1 else [pack for pack in taken for _ in range(each)][:placed])
            full, rest = divmod(placed, each)
            for left, group in ((room - each * length, taken[:full]), (room - rest * length, taken[full:])):
                if left and group:
                    if not open_packs[left]:
                        rooms.add(left)
                    open_packs[left].extend(group)
    return pack_of


class _CapacitySet:
    """A set of ints 0..capacity that finds its least member at or above a bound.

    A bitmask in words of 1024 bits below a bitmask of the words in use, so that each operation touches two words
    whatever the pack length (to 10^6 tokens), not the whole set.
    """

    def __init__(self, capacity: int) -> None:
        self._words = [0] * ((capacity >> 10) + 1)
        self._in_use = 0

    def add(self, value: int) -> None:
        self._words[value >> 10] |= 1 << (value & 1023)
        self._in_use |= 1 << (value >> 10)

    def discard(self, value: int) -> None:
        word = self._words[value >> 10] & ~(1 << (value & 1023))
        self._words[value >> 10] = word
        if not word:
            self._in_use &= ~(1 << (value >> 10))

    def smallest_at_least(self, bound: int) -> int:
        """The least member >= bound, or -1."""
        index = bound >> 10
        above = self._words[index] >> (bound & 1023)
        if above:
            return bound + (above & -above).bit_length() - 1
        later = self._in_use >> (index + 1)
        if not later:
            return -1
        index += (later & -later).bit_length()
        word = self._words[index]
        return (index << 10) + (word & -word).bit_length() - 1


def _checked(lengths: np.ndarray, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    lengths, order = np.asarray(lengths, dtype=np.int64), np.asarray(order, dtype=np.int64)
    if len(lengths) and lengths.min() < 1:
        raise ValueError(f"document {int(np.argmin(lengths))} has {lengths.min()} tokens; at least 1 is needed")
    if len(order) != len(lengths) or not np.array_equal(np.sort(order), np.arange(len(lengths))):
        raise ValueError(f"order must name each of the {len(lengths)} documents once; it has {len(order)} entries")
    return lengths, order
