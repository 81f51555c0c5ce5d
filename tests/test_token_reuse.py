"""The first layer's q, k and v once for each distinct token: the same loss and gradients, from fewer rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_fused_layer import make_model, micro_batch

from packloop.data.loader import Batch
from packloop.engine import batch as engine_batch
from packloop.engine.batch import distinct_tokens, to_device
from packloop.kernels import decoder_layer
from packloop.kernels.operations import Operations
from packloop.kernels.patch import packed_loss_sum, patched
from packloop.kernels.token_reuse import DistinctTokens, spread


def test_a_slot_of_every_token_serves_all_its_slots(monkeypatch):
    monkeypatch.setattr(engine_batch, "SLOT_MULTIPLE", 8)
    ids = torch.tensor([[7, 3, 7, 7, 3, 9, 7, 3], [9, 9, 3, 7, 3, 3, 9, 9], [7, 3, 7, 7, 3, 9, 7, 7]])
    distinct = distinct_tokens(ids)
    assert len(distinct.slots_U) == 8
    flat = ids.flatten()
    assert torch.equal(flat[distinct.slots_U][distinct.row_of_T], flat)
    rows = torch.randn(8, 5)
    for slot, token in enumerate(flat):
        assert torch.equal(spread(rows, distinct)[slot], rows[sorted({3, 7, 9}).index(token)])
    assert distinct_tokens(ids[:1]) is None  # a whole tile of rows would be half the slots and more
    monkeypatch.setattr(engine_batch, "SLOT_MULTIPLE", 1)
    assert distinct_tokens(torch.arange(64)) is None


def batch_of_few_tokens() -> tuple:
    input_ids, positions, layout, label_index, label_ids = micro_batch(vocabulary=9)
    _, slots, rows = np.unique(input_ids.numpy(), return_index=True, return_inverse=True)
    slots, rows = torch.from_numpy(slots), torch.from_numpy(rows.reshape(-1))
    return input_ids, positions, replace(layout, distinct=DistinctTokens(slots, rows)), label_index, label_ids


def loss_and_gradient(model, flat, batch, operations: Operations, **options):
    torch.manual_seed(7)
    flat.zero_gradient()
    with patched(model, attention="sdpa", fused=True, operations=operations, **options) as llama:
        loss = packed_loss_sum(llama, *batch)
        loss.backward()
    return loss.item(), flat.gradient.clone()


@pytest.mark.parametrize(
    "options", [{}, {"recompute_layers": 2}, {"keep_inputs_layers": 2, "cached_layers": 2}], ids=str
)
@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize(
    ("targets", "r"), [("all-linear", 8), ("all-linear", 3), (["q_proj", "v_proj"], 8), (["o_proj"], 8)]
)
def test_the_same_loss_and_gradients_from_fewer_rows(small_base, quantization, targets, r, options, monkeypatch):
    model, flat = make_model(small_base, quantization=quantization, targets=targets, r=r)
    batch, rows = batch_of_few_tokens(), []
    num_distinct, num_slots = len(batch[2].distinct.slots_U), batch[0].numel()
    for name in ("extended_group_forward", "lora_group_forward"):
        original = getattr(decoder_layer, name)

        def counted(x, *args, original=original, **kwargs):
            rows.append(x.shape[0])
            return original(x, *args, **kwargs)

        monkeypatch.setattr(decoder_layer, name, counted)
    expected_loss, expected = loss_and_gradient(model, flat, batch, Operations(token_reuse="none"), **options)
    assert set(rows) == {num_slots}
    rows.clear()
    loss, gradient = loss_and_gradient(model, flat, batch, Operations(), **options)
    # The first layer's q, k and v alone, whose forward a recomputation repeats.
    assert rows.count(num_distinct) == (2 if options.get("recompute_layers") else 1)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert (gradient - expected).norm() <= 2e-6 * expected.norm()


def test_slots_that_drop_out_different_features_are_all_made(small_base):
    model, flat = make_model(small_base, quantization="nf4", targets="all-linear", dropout=0.1)
    batch = batch_of_few_tokens()
    found = [loss_and_gradient(model, flat, batch, Operations(token_reuse=asked)) for asked in ("none", "first_layer")]
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])


def test_a_micro_batch_brings_its_distinct_tokens(monkeypatch):
    monkeypatch.setattr(engine_batch, "SLOT_MULTIPLE", 4)
    ids = torch.tensor([[5, 6, 5, 6, 5, 6, 5, 6, 5, 6]])
    whole = torch.tensor([0, 10], dtype=torch.int32)
    batch = Batch(
        input_ids=ids,
        position_ids=torch.arange(10)[None],
        document_ids=torch.zeros(1, 10, dtype=torch.int32),
        cu_seqlens=whole,
        max_seqlen=10,
        label_index=torch.arange(9),
        label_ids=ids[0, 1:],
        row_ids=[0],
        num_slots=10,
        num_real_tokens=10,
        num_label_tokens=9,
    )
    distinct = to_device(batch, torch.device("cpu"))[2].distinct
    assert distinct.slots_U.tolist() == [0, 1, 1, 1]
    assert distinct.row_of_T.tolist() == [0, 1] * 5
