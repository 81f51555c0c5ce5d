"""What documents begin with in common: of a whole data set, and in groups of some documents."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from packloop.data.tokenize import Documents

# A beginning of fewer tokens is not worth the work of its own that its keys make for attention's backward pass.
LEAST_PREFIX = 16
# Share of the tokens that must be saved at least.
LEAST_SAVED = 0.01
# Groups within groups that are looked for, so that documents each a token longer than the last have an end.
_MOST_NESTED = 200


@dataclass(frozen=True)
class CommonPrefix:
    """What most documents of a data set begin with.

    length: tokens that `layout.share_prefixes` saves for each further document; 0 where no two begin alike. has_it:
    bool [documents], those that begin so.
    """

    length: int
    has_it: np.ndarray

    @classmethod
    def of(cls, documents: Documents) -> CommonPrefix:
        """Found among the documents that begin with the `LEAST_PREFIX` tokens that most of them begin with."""
        begins, lengths = documents.offsets[:-1], documents.lengths
        firsts = np.full((len(documents), LEAST_PREFIX + 1), -1)
        for column in range(firsts.shape[1]):
            firsts[lengths > column, column] = documents.token_ids[begins[lengths > column] + column]
        firsts[lengths < firsts.shape[1]] = -1
        kinds, kind_of, counts = np.unique(firsts, axis=0, return_inverse=True, return_counts=True)
        counts[kinds[:, 0] < 0] = 0
        has_it = kind_of.reshape(-1) == np.argmax(counts)
        if counts.max(initial=0) < 2:
            return cls(0, np.zeros(len(documents), dtype=bool))
        members = np.flatnonzero(has_it)
        length, shortest = firsts.shape[1], lengths[members].min()
        while length < shortest:
            column = documents.token_ids[begins[members] + length]
            if (column != column[0]).any():
                break
            length += 1
        return cls(length - 1, has_it)


def group_by_prefix(documents: list[np.ndarray]) -> list[tuple[int, np.ndarray]]:
    """(length of the beginning, the numbers of two documents or more that share it), no document in two of them."""
    # Sorted, documents lie beside those with which they have the most in common.
    order = sorted(range(len(documents)), key=lambda number: documents[number].tobytes())
    shared = [_num_common(documents[a], documents[b]) - 1 for a, b in pairwise(order)]
    groups, _ = _grouped(np.array(shared, dtype=np.int64), 0)
    return [(length, np.sort(np.array(order)[members])) for length, members in groups]


def _grouped(shared: np.ndarray, first: int, depth: int = 0) -> tuple[list[tuple[int, list[int]]], list[int]]:
    """(groups as (length, documents), documents in none) of consecutive documents numbered from `first` on.

    shared: what each has in common with the next. Where the least is shared, the documents between are grouped first;
    those that are left over, and of the groups those that save more so, then form a group of that length.
    """
    num_documents = len(shared) + 1
    if not len(shared) or shared.max() < LEAST_PREFIX:
        return [], list(range(first, first + num_documents))
    least = int(shared.min())
    if depth == _MOST_NESTED:  # each level shares more than the one around it, so that this is enough for a group
        return [(least, list(range(first, first + num_documents)))], []
    cuts = np.flatnonzero(shared == least)
    groups, alone = [], []
    for begin, end in zip([0, *(cuts + 1)], [*cuts, len(shared)], strict=True):
        of_part, left_over = _grouped(shared[begin:end], first + begin, depth + 1)
        groups += of_part
        alone += left_over
    if least < LEAST_PREFIX:
        return groups, alone
    kept, joined = [], list(alone)
    for length, members in groups:
        if least * len(members) > length * (len(members) - 1):
            joined += members
        else:
            kept.append((length, members))
    candidates = [(groups, alone), (kept, joined)]
    candidates = [(made, left) if len(left) < 2 else ([*made, (least, left)], []) for made, left in candidates]
    return max(candidates, key=lambda found: sum(length * (len(members) - 1) for length, members in found[0]))


def _num_common(one: np.ndarray, other: np.ndarray) -> int:
    """Tokens that both begin with."""
    most = min(len(one), len(other))
    differs = np.flatnonzero(one[:most] != other[:most])
    return int(differs[0]) if len(differs) else most
