"""`kernels.padding=drop`: documents end to end, the same losses and gradients from fewer slots."""

from __future__ import annotations

import pytest
import torch
from small_job import read_steps, small_config
from test_data_loader import PACKINGS, PAD, documents_of, epoch_of, loader_of, random_documents, real_tokens
from test_engine_packed import hidden_and_gradient, load_model, make_documents, one_batch

from packloop.bench.plan import attentions
from packloop.config import load_config
from packloop.data import layout as layout_module
from packloop.data import loader
from packloop.data.layout import as_packed, without_padding
from packloop.data.loader import make_batch
from packloop.data.packing import epoch_packs
from packloop.engine import plan
from packloop.engine.batch import Windows
from packloop.engine.loop import train
from packloop.engine.planner import layout as planned_layout
from packloop.errors import ConfigError, InputError
from packloop.gpus import find_gpu
from packloop.kernels import attention as attention_module
from packloop.kernels.attention import FLAT

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _few_slots(monkeypatch):
    monkeypatch.setattr(layout_module, "SLOT_MULTIPLE", 8)


def test_without_padding_the_documents_lie_end_to_end(monkeypatch):
    monkeypatch.setattr(layout_module, "SLOT_MULTIPLE", 4)
    documents = documents_of([10, 11, 12], [20, 21, 22, 23], [30, 31], counts=[[0, 1, 1], [0, 0, 1, 1], [0, 1]])
    packs, order = epoch_packs(documents.lengths, "bfd", 6, seed=0, epoch=0, shuffle=False)
    padded = make_batch(documents, packs, order, packing="bfd", max_length=6, pad_token_id=PAD)
    assert padded.input_ids.tolist() == [[10, 11, 12, PAD, PAD, PAD], [20, 21, 22, 23, 30, 31]]
    batch = without_padding(padded)
    assert batch is padded  # nine tokens take twelve slots either way
    monkeypatch.setattr(layout_module, "SLOT_MULTIPLE", 5)
    batch = without_padding(padded)
    assert batch.input_ids.tolist() == [[10, 11, 12, 20, 21, 22, 23, 30, 31, 10]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 3, 0, 1, 0]]
    assert batch.document_ids.tolist() == [[0, 0, 0, 1, 1, 1, 1, 2, 2, -1]]
    assert batch.cu_seqlens.tolist() == [0, 3, 7, 9, 10]
    assert (batch.max_seqlen, batch.num_slots, batch.num_positions) == (4, 10, 6)
    assert batch.label_ids.tolist() == padded.label_ids.tolist() == [11, 12, 22, 23, 31]
    assert batch.label_index.tolist() == [0, 1, 4, 5, 7]
    dtypes = [(getattr(one, name).dtype) for one in (padded, batch) for name in ("input_ids", "cu_seqlens")]
    assert dtypes == [torch.int64, torch.int32] * 2


@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("packing", PACKINGS)
def test_no_token_position_or_target_is_lost_with_the_padding(packing, multiple, monkeypatch):
    monkeypatch.setattr(layout_module, "SLOT_MULTIPLE", multiple)
    for padded in [batch for window in epoch_of(loader_of(random_documents(30), packing)) for batch in window]:
        batch = without_padding(padded)
        num_real = padded.num_real_tokens
        assert batch.num_slots == batch.input_ids.numel() <= padded.num_slots
        assert batch.num_slots in (padded.num_slots, -(-num_real // multiple) * multiple)
        assert real_tokens(batch) == real_tokens(padded)
        real, was_real = batch.document_ids >= 0, padded.document_ids >= 0
        assert torch.equal(batch.position_ids[real], padded.position_ids[was_real])
        assert torch.equal(batch.input_ids.flatten()[batch.label_index], padded.input_ids.flatten()[padded.label_index])
        assert torch.equal(batch.label_ids, padded.label_ids)
        assert int(batch.cu_seqlens[-1]) == batch.num_slots
        assert batch.max_seqlen == int(batch.cu_seqlens.diff().max())
        # A document is one run of slots, whose tokens follow one another.
        for begin, end in zip(batch.cu_seqlens.tolist(), batch.cu_seqlens[1:].tolist()):
            assert len(set(batch.document_ids.flatten()[begin:end].tolist())) == 1
        assert (batch.row_ids, batch.num_real_tokens, batch.num_label_tokens) == (
            padded.row_ids,
            num_real,
            padded.num_label_tokens,
        )


def test_a_batch_without_documents_has_no_padding_to_lose():
    empty = loader._empty_batch(PAD)
    assert without_padding(empty) is empty


def test_the_tail_has_no_position_that_rows_have_not(monkeypatch):
    monkeypatch.setattr(layout_module, "SLOT_MULTIPLE", 16)
    documents = documents_of([10, 11, 12, 13], *[[token] for token in range(20, 27)])
    packs, order = epoch_packs(documents.lengths, "none", 4, seed=0, epoch=0, shuffle=False)
    batch = without_padding(make_batch(documents, packs, order, packing="none", max_length=4, pad_token_id=PAD))
    assert (batch.num_slots, batch.num_real_tokens, batch.num_positions) == (16, 11, 4)
    assert batch.position_ids[0, 11:].tolist() == [0, 1, 2, 3, 0]
    assert batch.cu_seqlens.tolist()[-3:] == [11, 15, 16]
    assert batch.document_ids[0, 11:].tolist() == [-1] * 5


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("packing", ["bfd", "none"])
def test_hidden_states_and_gradients_are_those_with_padding(small_base, packing, fused, attention):
    padded = one_batch(make_documents(), packing)
    batch = without_padding(padded)
    assert batch.num_slots < padded.num_slots
    every = torch.ones_like(batch.label_index, dtype=torch.bool)
    found, expected = (
        hidden_and_gradient(load_model(small_base), one, every, attention=attention, fused=fused)
        for one in (batch, padded)
    )
    real, was_real = (one.document_ids.flatten() >= 0 for one in (batch, padded))
    torch.testing.assert_close(found[0][real], expected[0][was_real], rtol=1e-5, atol=1e-5)
    assert (found[1] - expected[1]).norm() < 1e-5 * expected[1].norm()


def test_windows_drop_padding_where_they_are_told_to():
    class Source:
        def next_window(self):
            return [one_batch(make_documents(), "bfd")]

        def state(self):
            return {}

    padded, batch = (Windows(Source(), CPU, arrange=arrange).take()[0] for arrange in (as_packed, without_padding))
    assert (padded.batch.num_slots, batch.batch.num_slots) == (80, 64)
    ids, positions, layout, *_ = batch.inputs
    assert ids.shape == positions.shape == (1, 64)
    assert layout.num_positions == 80
    assert padded.layout.num_positions is None


def test_a_run_without_padding_learns_the_same(small_base, small_rows, tmp_path, monkeypatch):
    """With a backend that takes documents by a mask, which a CPU has."""
    monkeypatch.setattr(planned_layout, "FLAT", (*FLAT, "sdpa"))
    found, slots = {}, {}
    for padding in ("keep", "drop"):
        run_dir = tmp_path / padding
        train(small_config(small_base, small_rows, run_dir, train={"max_steps": 4}, kernels={"padding": padding}))
        assert load_config(run_dir / "config.resolved.yaml").kernels.padding == padding
        found[padding] = read_steps(run_dir)
        slots[padding] = [line["slot_tokens"] for line in found[padding]]
    assert len(found["keep"]) == len(found["drop"]) == 4
    assert sum(slots["drop"]) < sum(slots["keep"])
    for padded, line in zip(found["keep"], found["drop"]):
        assert line["loss"] == pytest.approx(padded["loss"], rel=1e-5)
        assert line["grad_norm"] == pytest.approx(padded["grad_norm"], rel=1e-4)


def test_attention_that_needs_rows_refuses(small_base, small_rows, tmp_path):
    config = small_config(small_base, small_rows, tmp_path / "run", kernels={"padding": "drop"})
    fault = r"kernels\.padding=drop: kernels\.attention=sdpa needs packs in rows of their own"
    reason = r", and no other can run here \(document, .*: needs a CUDA GPU.*\); use kernels.padding=keep"
    with pytest.raises(ConfigError, match=fault + reason):
        train(config)
    gpu = find_gpu("NVIDIA A10G")
    asked = load_config("recipes/llama2-7b-dolly.yaml", ["kernels.padding=drop", "data.packing=wrapped"])
    assert attentions(asked, gpu, 128) == ["document", "varlen"]
    refused = load_config("recipes/llama2-7b-dolly.yaml", ["kernels.padding=drop", "kernels.attention=sdpa"])
    with pytest.raises(InputError, match=fault + "; use one of document, flash_attn, varlen, flash_attn_4, or kernels"):
        attentions(refused, gpu, 128)


def test_every_backend_but_those_on_rows_is_flat():
    known = attention_module.usable_backends(is_packed=True, dtype=torch.bfloat16, device=CPU, head_dim=64)
    assert set(FLAT) == set(known) - set(attention_module._DIFFERENTIATED)


def test_auto_takes_attention_that_needs_no_rows(monkeypatch):
    """However fast the others: on a GPU, which is stood in for."""
    monkeypatch.setattr(
        attention_module, "usable_backends", lambda **_: dict.fromkeys((*FLAT, "cudnn", "sdpa", "eager"))
    )
    times = {"cudnn": 1.0, "sdpa": 1.1, "document": 2.0, "varlen": 3.0, "flash_attn": 1.5, "flash_attn_4": 4.0}
    monkeypatch.setattr(attention_module, "time_backend", lambda name, *_: times[name])

    def chosen(is_packed: bool, among):
        cuda = torch.device("cuda")
        options = {"dtype": torch.bfloat16, "device": cuda, "heads": (1, 1, 64), "layout": object(), "among": among}
        return attention_module.choose_backend("auto", is_packed=is_packed, **options)[0]

    assert chosen(False, None) == "cudnn"
    assert chosen(False, FLAT) == chosen(True, FLAT) == "flash_attn"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], False),  # dropout on q and v
        (["lora.dropout=0"], True),
        (["lora.target_modules=[o_proj,down_proj]"], True),
        (["lora.target_modules=all-linear"], False),
        (["lora.dropout=0", "kernels.token_reuse=none"], False),
        (["lora.dropout=0", "kernels.layer=stock"], False),
    ],
)
def test_distinct_tokens_are_looked_for_where_they_serve(overrides, expected):
    config = load_config("recipes/llama2-7b-dolly.yaml", overrides)
    assert plan.finds_tokens(config) == expected
