"""How large micro-batches without padding get: the look-up of it, and the runs that are short enough for it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_data_loader import documents_of, loader_of

from packloop.config import load_config
from packloop.data import layout, prefix
from packloop.data.layout import most_shared_slots
from packloop.data.prefix import CommonPrefix
from packloop.engine.planner import layout as planned_layout
from packloop.engine.planner.layout import arrangement, epochs_looked_through, largest_micro, typical_micro


@pytest.mark.parametrize(
    ("num_packs", "longest"),
    [(1, 769), (1_686, 28), (15_011, 3), (49_936, 1), (49_937, 0)],  # the tutorial's rows by bfd, and one a pack
)
def test_packs_are_looked_through_up_to_a_number_of_them_whatever_the_epochs(num_packs, longest):
    def looked_through(**train) -> int | None:
        config = load_config("recipes/llama2-7b-dolly.yaml", [f"train.{key}={value}" for key, value in train.items()])
        return epochs_looked_through(config, num_packs, steps_per_epoch=-(-num_packs // 12))

    steps_per_epoch = -(-num_packs // 12)
    assert looked_through(num_train_epochs=longest + 1) is None
    assert looked_through(max_steps=steps_per_epoch * longest + 1) is None
    if longest:
        expected = max(longest, -(-1024 // num_packs))  # of few packs more than the run has
        assert looked_through(num_train_epochs=longest) == expected
        assert looked_through(max_steps=steps_per_epoch * longest) == expected


def test_the_most_slots_are_those_of_the_largest_micro_batch(monkeypatch):
    """Counted one micro-batch at a time, of five ranks, of which some have nothing in an epoch's last window."""
    monkeypatch.setattr(layout, "SLOT_MULTIPLE", 8)
    monkeypatch.setattr(prefix, "LEAST_PREFIX", 3)
    templated = [[*range(10, 20), 100 + number, *range(200, 200 + number)] for number in range(12)]
    different = [list(range(100 * number, 100 * number + 3 + number)) for number in range(12)]
    documents = documents_of(*templated, *different)
    loader = loader_of(documents, "bfd", max_length=60, world_size=5, per_device_batch_size=1)
    common, most, is_empty = CommonPrefix.of(documents), 0, []
    for packs, micro_batches in map(loader.micro_batches, range(4)):
        for chosen in micro_batches:
            members = np.concatenate(
                [packs.segment_document[packs.pack_offsets[n] : packs.pack_offsets[n + 1]] for n in chosen]
                or [np.array([], dtype=int)]
            )
            saved = common.length * max(0, common.has_it[members].sum() - 1)
            most = max(most, documents.lengths[members].sum() - saved)
            is_empty.append(not len(members))
    assert any(is_empty)
    assert common.length > 0
    found = most_shared_slots(common, map(loader.micro_batches, range(4)))
    assert found == -(-most // 8) * 8


@pytest.mark.parametrize("is_looked_through", [True, False])
@pytest.mark.parametrize(
    ("padding", "prefix_reuse"), [("keep", "none"), ("drop", "none"), ("drop", "micro_batch")], ids=lambda name: name
)
def test_with_a_document_a_pack_memory_is_planned_for_the_longest(
    padding, prefix_reuse, is_looked_through, monkeypatch
):
    """Whatever the first micro-batch is: rows are as wide as a micro-batch's longest document."""
    monkeypatch.setattr(layout, "SLOT_MULTIPLE", 8)
    monkeypatch.setattr(planned_layout, "_LEAST_PACKS", 1)
    monkeypatch.setattr(planned_layout, "_MOST_PACKS", 10**9 if is_looked_through else 0)
    lengths = [*range(20, 60), 400]
    documents = documents_of(*[[*range(10, 20), *range(30 + 7 * n, 30 + 7 * n + n)] for n in lengths])
    loader = loader_of(documents, "none", max_length=500, per_device_batch_size=4, seed=1)
    kernels = {"padding": padding, "prefix_reuse": prefix_reuse}
    config = load_config(None, ["data.packing=none", *(f"kernels.{name}={value}" for name, value in kernels.items())])
    arrange, sizes, first = arrangement(config.kernels), [], loader.state()
    while loader.state()["epoch"] < config.train.num_train_epochs:
        sizes += [arrange(micro).num_slots for micro in loader.next_window()]
    loader.load_state(first)
    planned = largest_micro(config, loader).num_slots
    assert loader.state() == first
    assert sizes[0] < max(sizes) <= planned
    if not is_looked_through or padding == "keep":
        assert planned == 4 * 410
    elif prefix_reuse == "none":
        assert planned == max(sizes)
    else:  # what a second template would save is not in it
        assert planned <= max(sizes) + 8


def test_with_a_document_a_pack_the_typical_micro_batch_is_of_median_size():
    lengths = [*range(20, 60), 400]
    documents = documents_of(*[range(10, 10 + n) for n in lengths])
    loader = loader_of(documents, "none", max_length=500, per_device_batch_size=4, seed=1)
    packs, micro_batches = loader.micro_batches(0)
    sizes = sorted(int(packs.pack_tokens[numbers].sum()) for numbers in micro_batches)
    assert len(sizes) == 11
    assert sizes[0] < typical_micro("none", loader).num_real_tokens == sizes[5] < sizes[-1]
    loader = loader_of(documents, "bfd", max_length=500, per_device_batch_size=4, seed=1)
    assert torch.equal(typical_micro("bfd", loader).input_ids, loader.next_window()[0].input_ids)
