"""RoPE whose frequencies go by the longest position: in every layout those of Hugging Face's model, freshly loaded."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_kernels_patch import make_llama, with_adapter
from torch.utils._python_dispatch import TorchDispatchMode

from packloop.data import layout as layout_module
from packloop.data.layout import as_packed, share_prefixes, without_padding
from packloop.data.loader import Batch, make_batch
from packloop.data.packing import pack
from packloop.data.tokenize import Documents
from packloop.engine.batch import to_device
from packloop.kernels.attention import DocumentLayout
from packloop.kernels.forward_check import check_forward
from packloop.kernels.patch import find_llama, packed_loss_sum, patched

CPU = torch.device("cpu")
ORIGINAL = 32  # positions of the model before scaling
LAYOUTS = {"packed": as_packed, "without padding": without_padding, "shared": share_prefixes}
ROPE = {
    "dynamic": {"factor": 2.0},
    "longrope": {
        "factor": 2.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [1.5, 2.0, 3.0, 4.0],
        "original_max_position_embeddings": ORIGINAL,
    },
}


@pytest.fixture(params=["stock", "fused"])
def fused(request) -> bool:
    return request.param == "fused"


@pytest.fixture(params=ROPE)
def rope_type(request) -> str:
    return request.param


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(layout_module, "SLOT_MULTIPLE", 16)


def scaled_llama(rope_type: str):
    rope = {"rope_type": rope_type, "rope_theta": 10000.0, **ROPE[rope_type]}
    return make_llama(max_position_embeddings=ORIGINAL, rope_parameters=rope).eval()


def micro_batch(lengths: list[int], max_length: int) -> Batch:
    """One micro-batch of all the documents, which begin with the same 18 tokens."""
    tokens = np.random.default_rng(1).integers(3, 200, sum(lengths)).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    for begin, length in zip(offsets, lengths):
        tokens[begin : begin + min(18, length)] = np.arange(100, 100 + min(18, length))
    documents = Documents(tokens, np.ones(len(tokens), dtype=bool), offsets, np.arange(len(lengths)))
    packs = pack(documents.lengths, "bfd", max_length, np.arange(len(lengths)))
    chosen = np.arange(packs.num_packs)
    return make_batch(documents, packs, chosen, packing="bfd", max_length=max_length, pad_token_id=0)


def hugging_face_loss(llama, batch: Batch) -> float:
    """The same by stock code throughout, whose mask keeps documents apart; padding is at position 0."""
    is_real = batch.document_ids >= 0
    mask = to_device(batch, CPU)[2].bias_B1LL(torch.float32)
    positions = torch.where(is_real, batch.position_ids, 0)
    with torch.no_grad():
        logits = llama(input_ids=batch.input_ids, attention_mask=mask, position_ids=positions).logits.flatten(0, 1)
    return F.cross_entropy(logits[batch.label_index], batch.label_ids, reduction="sum").item()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("lengths", "max_length"),
    [([20, 24, 21, 30], 100), ([20, 40, 21, 38], 100), ([20, 20], 90)],
    ids=["short documents", "long documents", "more padding than text"],
)
def test_the_longest_document_decides_not_the_row(rope_type, lengths, max_length, layout, fused):
    batch = micro_batch(lengths, max_length)
    expected = hugging_face_loss(scaled_llama(rope_type), batch)
    arranged = LAYOUTS[layout](batch)
    assert (arranged.prefix_of is not None) == (layout == "shared")
    assert arranged.num_slots < batch.num_slots or layout == "packed"
    with patched(scaled_llama(rope_type), attention="sdpa", fused=fused) as llama, torch.no_grad():
        found = packed_loss_sum(llama, *to_device(arranged, CPU)).item()
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_micro_batch_has_the_frequencies_of_a_freshly_loaded_model(rope_type, layout, fused):
    """Whatever came before: Hugging Face's dynamic RoPE keeps those of the longest sequence for a while."""
    with patched(scaled_llama(rope_type), attention="sdpa", fused=fused) as llama, torch.no_grad():
        for longest in (30, 60, 40, 32, 20, 40, 30):
            batch = micro_batch([20, 19, longest, 20], 100)
            expected = hugging_face_loss(scaled_llama(rope_type), batch)
            found = packed_loss_sum(llama, *to_device(LAYOUTS[layout](batch), CPU)).item()
            assert found == pytest.approx(expected, rel=1e-6), longest


def test_stock_code_and_ours_do_not_change_each_others_frequencies(rope_type, fused):
    """Each goes on as if the other had not been there."""
    theirs, fresh = scaled_llama(rope_type), scaled_llama(rope_type)
    micros = [to_device(micro_batch([20, longest], 100), CPU) for longest in (60, 40, 20)]
    with patched(fresh, attention="sdpa", fused=fused) as llama, torch.no_grad():
        expected = [packed_loss_sum(llama, *inputs) for inputs in micros]
    with patched(scaled_llama(rope_type), attention="sdpa", fused=fused) as llama, torch.no_grad():
        for length in (30, 60, 40, 20, 50):
            ids = torch.arange(3, 3 + length)[None]
            torch.testing.assert_close(llama(input_ids=ids).logits, theirs(input_ids=ids).logits, rtol=0, atol=0)
            assert [packed_loss_sum(llama, *inputs) for inputs in micros] == expected


def test_the_check_before_training_and_passes_for_a_plan_leave_nothing_behind(rope_type, fused):
    model = with_adapter(scaled_llama(rope_type)).train()
    rotary = find_llama(model).model.rotary_emb
    short, long = (to_device(micro_batch([20, longest], 100), CPU) for longest in (30, 60))
    with patched(model, attention="sdpa", fused=fused) as llama:
        expected = [packed_loss_sum(llama, *inputs) for inputs in (short, long)]
    frequencies = rotary.inv_freq, rotary.inv_freq.clone(), rotary.max_seq_len_cached
    for inputs in (long, short):
        with patched(model, attention="sdpa", fused=fused, recompute_layers=1) as llama:
            packed_loss_sum(llama, *inputs).backward()
        with patched(model, attention="sdpa", fused=fused) as llama:
            check_forward(llama, "sdpa")  # of 64 positions
            assert [packed_loss_sum(llama, *inputs) for inputs in (short, long)] == expected
    assert rotary.inv_freq is frequencies[0]
    assert torch.equal(rotary.inv_freq, frequencies[1])
    assert rotary.max_seq_len_cached == frequencies[2] == ORIGINAL


def test_a_layout_without_the_number_goes_by_its_longest_document(rope_type, fused):
    lengths = (20, 30, 25)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    ids = torch.arange(3, 3 + sum(lengths))[None]
    numbers = torch.arange(3, dtype=torch.int32).repeat_interleave(torch.tensor(lengths))[None]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    layout = DocumentLayout(numbers, bounds.to(torch.int32), max(lengths), is_packed=True)
    theirs = scaled_llama(rope_type)
    expected = [theirs.model(input_ids=part).last_hidden_state for part in ids.split(lengths, dim=1)]
    with patched(scaled_llama(rope_type), attention="sdpa", fused=fused) as llama, torch.no_grad():
        found = llama.model(input_ids=ids, position_ids=positions, layout=layout).last_hidden_state
    torch.testing.assert_close(found, torch.cat(expected, dim=1), rtol=1e-4, atol=1e-5)


class NoReads(TorchDispatchMode):
    """Raises where a tensor's value is asked for, which on a GPU waits for all work before it."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default, "a value is read"
        return function(*args, **(kwargs or {}))


def test_no_value_is_read_from_the_device(rope_type, fused):
    micros = [to_device(micro_batch([20, longest], 100), CPU) for longest in (30, 60, 40, 20)]
    with patched(scaled_llama(rope_type), attention="sdpa", fused=fused) as llama, torch.no_grad(), NoReads():
        for inputs in micros:
            packed_loss_sum(llama, *inputs)
