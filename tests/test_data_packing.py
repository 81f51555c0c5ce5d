"""The packers: every token once, packs within their length, best fit, order, speed and fill."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from packloop.data.packing import _CapacitySet, epoch_packs, pack_bfd, pack_none, pack_wrapped


def segments_of(packs):
    """Each pack as a list of (document, start, stop)."""
    triples = list(
        zip(packs.segment_document.tolist(), packs.segment_start.tolist(), packs.segment_stop.tolist(), strict=True)
    )
    borders = packs.pack_offsets.tolist()
    return [triples[begin:end] for begin, end in itertools.pairwise(borders)]


def dolly_like_lengths(count, seed=0):
    """Lengths spread like Dolly's in the reversed prompt: log-normal, mean near 235, median 190, at most 2,000."""
    sigma = np.sqrt(2 * np.log(235 / 190))
    drawn = np.random.default_rng(seed).lognormal(np.log(190), sigma, count)
    return np.clip(drawn, 40, 2000).astype(np.int64)


def assert_every_token_once(packs, lengths):
    assert packs.pack_offsets[0] == 0
    assert packs.pack_offsets[-1] == len(packs.segment_document)
    assert (np.diff(packs.pack_offsets) > 0).all()
    assert (packs.segment_start < packs.segment_stop).all()
    by_place = np.lexsort((packs.segment_start, packs.segment_document))
    document, start, stop = (
        array[by_place] for array in (packs.segment_document, packs.segment_start, packs.segment_stop)
    )
    new = np.append(True, document[1:] != document[:-1])[: len(document)]
    assert np.array_equal(document[new], np.arange(len(lengths)))
    assert not start[new].any()
    assert np.array_equal(start[~new], stop[:-1][~new[1:]])
    assert np.array_equal(stop[np.append(new[1:], True)[: len(new)]], lengths)


def count_packs_of_plain_best_fit_decreasing(lengths, max_length):
    rooms = []
    for length in sorted(lengths, reverse=True):
        fitting = [index for index, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting, key=rooms.__getitem__)] -= length
        else:
            rooms.append(max_length - length)
    return len(rooms), sorted(rooms)


def test_wrapped_literal():
    packs = pack_wrapped(np.array([3, 5, 1]), 4, np.array([2, 0, 1]))
    assert segments_of(packs) == [[(2, 0, 1), (0, 0, 3)], [(1, 0, 4)], [(1, 4, 5)]]
    assert packs.pack_tokens.tolist() == [4, 4, 1]


def test_wrapped_keeps_a_document_of_many_packs():
    packs = pack_wrapped(np.array([10]), 4, np.array([0]))
    assert segments_of(packs) == [[(0, 0, 4)], [(0, 4, 8)], [(0, 8, 10)]]


def test_none_literal():
    packs = pack_none(np.array([3, 5]), np.array([1, 0]))
    assert segments_of(packs) == [[(1, 0, 5)], [(0, 0, 3)]]


def test_bfd_literal():
    # 7 opens a pack, 5 another; 3 fits only beside the 7 exactly; the 2s go to the 5.
    packs = pack_bfd(np.array([2, 5, 7, 3, 2]), 10, np.arange(5))
    assert segments_of(packs) == [[(0, 0, 2), (1, 0, 5), (4, 0, 2)], [(2, 0, 7), (3, 0, 3)]]


def test_bfd_breaks_ties_by_order():
    lengths = np.array([6, 6, 4, 4])
    forward, backward = (segments_of(pack_bfd(lengths, 10, order)) for order in (np.arange(4), np.arange(4)[::-1]))
    assert forward == [[(0, 0, 6), (2, 0, 4)], [(1, 0, 6), (3, 0, 4)]]
    assert backward == [[(3, 0, 4), (1, 0, 6)], [(2, 0, 4), (0, 0, 6)]]


@pytest.mark.parametrize("pack", [lambda *args: pack_none(args[0], args[2]), pack_wrapped, pack_bfd])
def test_no_documents_make_no_packs(pack):
    packs = pack(np.array([], dtype=np.int64), 8, np.array([], dtype=np.int64))
    assert packs.num_packs == 0
    assert packs.pack_offsets.tolist() == [0]


def test_bfd_refuses_a_document_longer_than_a_pack():
    with pytest.raises(ValueError, match="document 1 has 9 tokens and a pack holds max_length=8"):
        pack_bfd(np.array([3, 9]), 8, np.arange(2))


@pytest.mark.parametrize("pack", [pack_wrapped, pack_bfd])
def test_empty_documents_and_bad_orders_are_refused(pack):
    with pytest.raises(ValueError, match="document 1 has 0 tokens"):
        pack(np.array([3, 0]), 8, np.arange(2))
    for order in ([0], [0, 0], [0, 2], [-1, 0], [0, 1, 1]):
        with pytest.raises(ValueError, match="order must name each of the 2 documents once"):
            pack(np.array([3, 4]), 8, np.array(order))


def test_epochs_differ_and_repeat_exactly():
    lengths = dolly_like_lengths(300)
    for packing in ("wrapped", "bfd", "none"):
        first, second, again = (
            epoch_packs(lengths, packing, 2048, seed=5, epoch=epoch, shuffle=True) for epoch in (0, 1, 0)
        )
        assert segments_of(first[0]) == segments_of(again[0])
        assert first[1].tolist() == again[1].tolist()
        assert segments_of(first[0]) != segments_of(second[0])
        assert first[0].num_packs == second[0].num_packs
        other_seed = epoch_packs(lengths, packing, 2048, seed=6, epoch=0, shuffle=True)
        assert segments_of(first[0]) != segments_of(other_seed[0])


def test_without_shuffle_documents_come_in_source_order():
    lengths = dolly_like_lengths(300)
    for packing in ("wrapped", "bfd", "none"):
        packs, order = epoch_packs(lengths, packing, 2048, seed=5, epoch=3, shuffle=False)
        assert order.tolist() == list(range(packs.num_packs))
        documents = [[document for document, _, _ in pack] for pack in segments_of(packs)]
        assert all(pack == sorted(pack) for pack in documents)
        assert [pack[0] for pack in documents] == sorted(pack[0] for pack in documents)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=40), st.integers(0, 1000), st.randoms(use_true_random=False))
def test_packers_hold_their_promises(lengths, extra_room, random):
    lengths = np.array(lengths)
    max_length = int(lengths.max()) + extra_room % 30
    order = np.array(random.sample(range(len(lengths)), len(lengths)))
    check_packers(lengths, max_length, order)


def check_packers(lengths, max_length, order):
    bfd = pack_bfd(lengths, max_length, order)
    assert_every_token_once(bfd, lengths)
    assert bfd.pack_tokens.max() <= max_length
    assert not bfd.segment_start.any()
    num_packs, rooms = count_packs_of_plain_best_fit_decreasing(lengths.tolist(), max_length)
    assert bfd.num_packs == num_packs
    assert sorted((max_length - bfd.pack_tokens).tolist()) == rooms

    wrapped = pack_wrapped(lengths, max_length, order)
    assert_every_token_once(wrapped, lengths)
    assert (wrapped.pack_tokens[:-1] == max_length).all()
    assert wrapped.pack_tokens[-1] == (lengths.sum() - 1) % max_length + 1
    whole = np.flatnonzero(wrapped.segment_start == 0)
    assert wrapped.segment_document[whole].tolist() == order.tolist()

    none = pack_none(lengths, order)
    assert_every_token_once(none, lengths)
    assert none.segment_document.tolist() == order.tolist()


@pytest.mark.parametrize("seed", range(20))
def test_ten_thousand_random_cases(seed):
    """500 cases a seed: few and many documents, short and long packs, many and few documents of one length."""
    rng = np.random.default_rng([2024, seed])
    for _ in range(500):
        max_length = int(rng.integers(1, 200))
        longest = int(rng.integers(1, max_length + 1))
        lengths = rng.integers(1, longest + 1, size=rng.integers(1, 25))
        check_packers(lengths, max_length, rng.permutation(len(lengths)))


@pytest.mark.parametrize("capacity", [1, 63, 1023, 1024, 1025, 5000])
def test_capacity_set_against_a_plain_one(capacity):
    rng = np.random.default_rng(capacity)
    capacities, plain = _CapacitySet(capacity), set()
    for value in rng.integers(0, capacity + 1, 600).tolist():
        if value in plain:
            capacities.discard(value)
            plain.discard(value)
        else:
            capacities.add(value)
            plain.add(value)
        bound = int(rng.integers(0, capacity + 1))
        assert capacities.smallest_at_least(bound) == min((kept for kept in plain if kept >= bound), default=-1)


def test_bfd_is_fast_and_full_on_lengths_like_dollys():
    lengths = dolly_like_lengths(100_000)
    assert abs(lengths.mean() - 235) < 5
    assert abs(np.median(lengths) - 190) < 5
    order = np.random.default_rng(0).permutation(len(lengths))
    seconds = []
    for _ in range(3):
        begin = time.process_time()
        packs = pack_bfd(lengths, 2048, order)
        seconds.append(time.process_time() - begin)
    assert lengths.sum() / (packs.num_packs * 2048) >= 0.995
    assert packs.num_packs <= -(-lengths.sum() // 2048) * 1.005
    assert min(seconds) < 0.3


@pytest.mark.parametrize("max_length", [2048, 131_072])
def test_bfd_is_fast_on_even_spread_lengths(max_length):
    """The hardest case for grouping by length: hardly two documents or rooms alike."""
    lengths = np.random.default_rng(1).integers(1, max_length + 1, 100_000)
    begin = time.process_time()
    packs = pack_bfd(lengths, max_length, np.arange(len(lengths)))
    assert time.process_time() - begin < 1.5
    assert lengths.sum() / (packs.num_packs * max_length) > 0.99


def test_wrapped_is_fast():
    lengths = dolly_like_lengths(100_000)
    begin = time.process_time()
    pack_wrapped(lengths, 2048, np.random.default_rng(0).permutation(len(lengths)))
    assert time.process_time() - begin < 0.3
