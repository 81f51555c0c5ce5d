"""Head and loss in chunks: the bits of the plain expressions, and the memory that all chunks share."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from packloop.kernels import linear_cross_entropy as head
from packloop.kernels.linear_cross_entropy import cross_entropy_, linear_cross_entropy

SLOTS, FEATURES, VOCABULARY, CHUNK = 150, 32, 300, 64
NUM_LABELS = [0, 1, 64, 131, 150]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(head, "CHUNK_BYTES", 0)  # of which the least is 64 slots
    assert head.rows_per_chunk(VOCABULARY, 4) == CHUNK


def make_case(num_labels: int, dtype: torch.dtype, num_slots: int = SLOTS):
    """Hidden states, the head's weight, distinct slots in no order, their labels."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_slots, FEATURES, generator=generator).to(dtype)
    weight = torch.randn(VOCABULARY, FEATURES, generator=generator).to(dtype)
    index = torch.randperm(num_slots, generator=generator)[:num_labels]
    return hidden, weight, index, torch.randint(0, VOCABULARY, (num_labels,), generator=generator)


def plain(hidden: Tensor, weight: Tensor, index: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, gradient of the hidden states and of the weight, with tensors of their own for every chunk."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    loss, d_hidden, d_weight = torch.zeros((), dtype=wide), torch.zeros_like(hidden), torch.zeros_like(weight).to(wide)
    for index_C, ids_C in zip(index.split(CHUNK), ids.split(CHUNK)):
        logits = hidden[index_C] @ weight.T
        loss += cross_entropy_(logits, ids_C, needs_gradient=True).sum()
        d_hidden[index_C] = logits @ weight
        d_weight += logits.T @ hidden[index_C]
    return loss, d_hidden, d_weight.to(weight.dtype)


@pytest.mark.parametrize("num_labels", NUM_LABELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("trains_hidden", "trains_head"), [(True, False), (True, True), (False, True), (False, False)])
def test_bits_are_those_of_chunks_with_tensors_of_their_own(num_labels, dtype, trains_hidden, trains_head):
    hidden, weight, index, ids = make_case(num_labels, dtype)
    expected_loss, *expected = plain(hidden, weight, index, ids)
    loss = linear_cross_entropy(hidden.requires_grad_(trains_hidden), weight.requires_grad_(trains_head), index, ids)
    assert torch.equal(loss, expected_loss)
    if trains_hidden or trains_head:
        loss.backward()
    for tensor, gradient in zip((hidden, weight), expected):
        assert tensor.grad is None if not tensor.requires_grad else torch.equal(tensor.grad, gradient)


@pytest.mark.parametrize("trains_hidden", [True, False])
@pytest.mark.parametrize("num_slots", [SLOTS, 40, 0])
def test_memory_is_allocated_once_for_all_chunks_and_any_number_of_labels(num_slots, trains_hidden, monkeypatch):
    monkeypatch.setattr(head, "cross_entropy_", lambda logits, *_, **__: logits.new_zeros(logits.shape[0]))
    rows = min(num_slots, CHUNK)
    expected = [rows * FEATURES * 4, rows * VOCABULARY * 4]
    if trains_hidden:
        expected = [num_slots * FEATURES * 4, *expected]
    for num_labels in [labels for labels in NUM_LABELS if labels <= num_slots]:
        hidden, weight, index, ids = make_case(num_labels, torch.float32, num_slots)
        hidden.requires_grad_(trains_hidden)
        with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as made:
            linear_cross_entropy(hidden, weight, index, ids)
        records = [event for event in made.profiler.kineto_results.events() if event.name() == "[memory]"]
        records.sort(key=lambda record: record.start_ns())
        allocated = [record.nbytes() for record in records if record.nbytes() > 1024]
        assert allocated == [size for size in expected if size], num_labels
