"""Dropout where documents share a beginning: the masks of its one copy are all documents', and drawn again alike."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from test_prefix import batch_of, step_of, templated

from packloop.data.layout import share_prefixes
from packloop.kernels import reference
from packloop.kernels.operations import Operations

pytestmark = pytest.mark.usefixtures("short_beginnings")


@pytest.mark.parametrize("lora", ["fused", "torch"])
def test_under_dropout_they_are_those_of_whole_documents_with_the_same_masks(small_base, lora, monkeypatch):
    """Documents share their beginning's masks: given those slot by slot, whole documents have the same gradient."""
    packed = batch_of(templated())
    shared = share_prefixes(packed)
    options = {"attention": "sdpa", "fused": True, "dropout": 0.1, "operations": Operations(lora=lora)}
    loss, gradient = step_of(small_base, shared, **options)
    slots, mask_of = shared_slots(packed, shared), reference.dropout_mask

    def expanded(shape, *arguments, **keywords):
        assert shape[0] == packed.num_slots
        return mask_of((shared.num_slots, *shape[1:]), *arguments, **keywords)[slots]

    other = step_of(small_base, packed, **options)
    assert (other[1] - gradient).norm() > 1e-2 * gradient.norm(), "with masks of their own it would be another"
    monkeypatch.setattr(reference, "dropout_mask", expanded)
    expected = step_of(small_base, packed, **options)
    assert loss == pytest.approx(expected[0], rel=1e-6)
    assert (gradient - expected[1]).norm() < 1e-5 * expected[1].norm()


@pytest.mark.parametrize(
    "options", [{"recompute_layers": 2}, {"recompute_layers": 1, "keep_inputs_layers": 1}], ids=str
)
def test_row15_recomputation_draws_a_shared_beginnings_masks_again(small_base, options):
    batch = share_prefixes(batch_of(templated()))
    plain, other = (
        step_of(small_base, batch, attention="sdpa", fused=True, dropout=0.1, **settings) for settings in ({}, options)
    )
    assert other[0] == plain[0]
    assert torch.equal(other[1], plain[1])


def shared_slots(packed, shared) -> torch.Tensor:
    """For every slot of whole documents the slot of `shared` that computes it; 0 for padding."""
    runs = [range(*span) for span in pairwise(shared.cu_seqlens.tolist())]
    whole = {}
    for run, before in zip(runs, shared.prefix_of.tolist()):
        slots = [*(runs[before] if before >= 0 else []), *run]
        whole[tuple(shared.input_ids[0, slots].tolist())] = slots
    found, tokens = torch.zeros(packed.num_slots, dtype=torch.int64), packed.input_ids.flatten()
    for start, end in pairwise(packed.cu_seqlens.tolist()):
        if int(packed.document_ids.flatten()[start]) >= 0:
            found[start:end] = torch.tensor(whole[tuple(tokens[start:end].tolist())])
    return found
