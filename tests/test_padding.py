"""`kernels.padding=drop`: documents end to end, the same losses and gradients from fewer slots."""

from __future__ import annotations

import pytest
import torch
from small_job import read_steps, small_config
from test_engine_packed import hidden_and_gradient, load_model, make_documents, one_batch

from packloop.bench.plan import attentions, loads
from packloop.config import load_config
from packloop.data import loader
from packloop.data.loader import build_data, without_padding
from packloop.engine import plan
from packloop.engine.batch import Windows
from packloop.engine.loop import train
from packloop.engine.model import load_tokenizer
from packloop.errors import ConfigError, InputError
from packloop.gpus import find_gpu
from packloop.kernels import attention as attention_module
from packloop.kernels.attention import FLAT

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _few_slots(monkeypatch):
    monkeypatch.setattr(loader, "SLOT_MULTIPLE", 8)


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

    padded, batch = (Windows(Source(), CPU, drops_padding=drops).take()[0] for drops in (False, True))
    assert (padded.batch.num_slots, batch.batch.num_slots) == (80, 64)
    ids, positions, layout, *_ = batch.inputs
    assert ids.shape == positions.shape == (1, 64)
    assert layout.num_positions == 80
    assert padded.layout.num_positions is None


def test_a_run_without_padding_learns_the_same(small_base, small_rows, tmp_path, monkeypatch):
    """With a backend that takes documents by a mask, which a CPU has."""
    monkeypatch.setattr(plan, "FLAT", (*FLAT, "sdpa"))
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
    remedy = r"kernels\.padding=drop: kernels\.attention=sdpa needs packs in rows of their own; use one of document, "
    with pytest.raises(ConfigError, match=remedy):
        train(config)
    gpu = find_gpu("NVIDIA A10G")
    asked = load_config("recipes/llama2-7b-dolly.yaml", ["kernels.padding=drop", "data.packing=wrapped"])
    assert attentions(asked, gpu) == ["document", "varlen"]
    refused = load_config("recipes/llama2-7b-dolly.yaml", ["kernels.padding=drop", "kernels.attention=sdpa"])
    with pytest.raises(InputError, match=remedy):
        attentions(refused, gpu)


@pytest.mark.parametrize("packing", ["bfd", "none"])
def test_predictions_count_no_padding(small_base, small_rows, tmp_path, packing):
    config = small_config(small_base, small_rows, tmp_path / "run", data={"packing": packing})
    tokenizer = load_tokenizer(config.model)
    data = build_data(config.data, tokenizer, seed=0)
    dropping = config.model_copy(update={"kernels": config.kernels.model_copy(update={"padding": "drop"})})
    with_padding, without = (loads(one, data, tokenizer.pad_token_id)(3) for one in (config, dropping))
    assert without.real_tokens == with_padding.real_tokens <= without.slots < with_padding.slots
    assert without.most_slots == with_padding.most_slots


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
    assert plan.window_options(config) == {"drops_padding": False, "finds_tokens": expected}
    assert plan.window_options(load_config("recipes/llama2-7b-dolly.yaml", ["kernels.padding=drop"]))["drops_padding"]
