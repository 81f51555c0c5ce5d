"""RoPE whose frequencies go by the longest position: packed, without padding and shared, as in Hugging Face's model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_kernels_patch import make_llama
from torch.utils._python_dispatch import TorchDispatchMode

from packloop.data import layout as layout_module
from packloop.data.layout import as_packed, share_prefixes, without_padding
from packloop.data.loader import Batch, make_batch
from packloop.data.packing import pack
from packloop.data.tokenize import Documents
from packloop.engine.batch import to_device
from packloop.kernels.attention import DocumentLayout
from packloop.kernels.patch import packed_loss_sum, patched

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
def test_micro_batches_one_after_another_leave_the_same_frequencies(rope_type, layout, fused):
    """Hugging Face's dynamic RoPE keeps those of the longest so far, until a short micro-batch comes."""
    theirs = scaled_llama(rope_type)
    with patched(scaled_llama(rope_type), attention="sdpa", fused=fused) as llama, torch.no_grad():
        for longest in (30, 60, 40, 32, 20, 40, 30):
            batch = micro_batch([20, 19, longest, 20], 100)
            expected = hugging_face_loss(theirs, batch)
            found = packed_loss_sum(llama, *to_device(LAYOUTS[layout](batch), CPU)).item()
            assert found == pytest.approx(expected, rel=1e-6), longest
        # Stock code inside the context goes on from there.
        for length in (40, 50):
            ids = torch.arange(3, 3 + length)[None]
            torch.testing.assert_close(llama(input_ids=ids).logits, theirs(input_ids=ids).logits)
        batch = micro_batch([20, 45], 100)
        found = packed_loss_sum(llama, *to_device(LAYOUTS[layout](batch), CPU)).item()
        assert found == pytest.approx(hugging_face_loss(theirs, batch), rel=1e-6)


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
