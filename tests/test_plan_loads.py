"""The micro-batches that predictions are made for: laid out as a run under the same attention lays them out."""

from __future__ import annotations

import pytest
import torch
from small_job import small_config

from packloop.bench import plan as plans
from packloop.bench.flops import work_of
from packloop.bench.plan import attended_squares, attentions, load_from, loads, plan
from packloop.config import load_config
from packloop.data import layout, prefix
from packloop.data.layout import as_packed, share_prefixes, without_padding
from packloop.data.loader import PackLoader, build_data
from packloop.engine.model import load_tokenizer
from packloop.errors import InputError
from packloop.gpus import find_gpu

RECIPE = "recipes/llama2-7b-dolly.yaml"


@pytest.fixture(autouse=True)
def _few_slots(monkeypatch):
    monkeypatch.setattr(layout, "SLOT_MULTIPLE", 8)
    monkeypatch.setattr(prefix, "LEAST_PREFIX", 4)


@pytest.fixture(params=["bfd", "none"])
def job(request, small_base, small_rows, tmp_path):
    """(configuration with these settings of kernels) -> it, its data and the token that pads."""

    def make(**kernels):
        config = small_config(
            small_base, small_rows, tmp_path / "run", data={"packing": request.param}, kernels=kernels
        )
        tokenizer = load_tokenizer(config.model)
        return config, build_data(config.data, tokenizer, seed=0), tokenizer.pad_token_id

    return make


def test_predictions_count_no_padding_and_a_shared_beginning_once(job):
    load_of = loads(*job())
    padded, dropped, shared = (load_of(3, name) for name in ("sdpa", "varlen", "document"))
    assert dropped.real_tokens == padded.real_tokens <= dropped.slots < padded.slots
    assert shared.slots < shared.real_tokens == pytest.approx(dropped.real_tokens, rel=0.2)
    assert shared.labels < dropped.labels, "a target of the beginning is one row of the head"
    assert shared.squared_lengths < dropped.squared_lengths
    assert shared.slots <= shared.most_slots < dropped.most_slots == padded.most_slots
    assert [one.attention for one in (padded, dropped, shared)] == ["sdpa", "varlen", "document"]


def test_settings_decide_on_the_layout(job):
    for kernels, expected in (
        ({}, [as_packed, without_padding, share_prefixes]),
        ({"prefix_reuse": "micro_batch"}, [as_packed, without_padding, share_prefixes]),
        ({"prefix_reuse": "none"}, [as_packed, without_padding, without_padding]),
        ({"padding": "keep"}, [as_packed] * 3),
    ):
        config, *_ = job(**kernels)
        assert [plans._arrangement(config, name) for name in ("sdpa", "varlen", "document")] == expected
    wrapped = load_config(RECIPE, ["data.packing=wrapped"])
    assert plans._arrangement(wrapped, "document") is as_packed
    dropping = load_config(RECIPE, ["data.packing=wrapped", "kernels.padding=drop"])
    assert plans._arrangement(dropping, "document") is without_padding


def test_a_load_with_sharing_is_of_whole_micro_batches(job):
    """Of the first packs of the epoch, three at a time: what is shared between packs of a micro-batch counts."""
    config, data, pad_token_id = job()
    loader = PackLoader(
        data.train, packing=config.data.packing, max_length=config.data.max_length, per_device_batch_size=3,
        gradient_accumulation_steps=1, rank=0, world_size=1, seed=config.train.seed, shuffle=config.data.shuffle,
        pad_token_id=pad_token_id,
    )  # fmt: skip
    micros = [share_prefixes(loader.next_window()[0]) for _ in range(loader.num_packs // 3)]
    expected, found = load_from(micros), loads(config, data, pad_token_id)(3, "document")
    for name in ("slots", "real_tokens", "labels", "squared_lengths"):
        assert getattr(found, name) == getattr(expected, name)
    assert any(micro.prefix_of is not None for micro in micros)


def test_squares_are_of_what_attention_multiplies(job):
    assert attended_squares([3, 4, 2], None) == 9 + 16 + 4
    assert attended_squares(torch.tensor([5, 2, 1, 3]), torch.tensor([-1, 0, 0, -1])) == 25 + 4 + 20 + 1 + 10 + 9
    config, data, pad_token_id = job()
    loader = PackLoader(
        data.train, packing=config.data.packing, max_length=config.data.max_length, per_device_batch_size=4,
        gradient_accumulation_steps=1, rank=0, world_size=1, seed=0, shuffle=True, pad_token_id=pad_token_id,
    )  # fmt: skip
    micro = share_prefixes(loader.next_window()[0])
    pairs = work_of([micro], "document").visited_pairs
    assert attended_squares(micro.cu_seqlens.diff(), micro.prefix_of) == 2 * pairs - micro.num_slots


def test_the_attention_that_can_share_is_planned_for_where_sharing_is_asked_for():
    gpu = find_gpu("NVIDIA A10G")

    def of(*overrides: str) -> list[str]:
        return attentions(load_config(RECIPE, ["kernels.prefix_reuse=micro_batch", *overrides]), gpu, 128)

    assert of("data.packing=bfd") == of("data.packing=bfd", "kernels.padding=drop") == ["document"]
    with pytest.raises(InputError, match=r"prefix_reuse=micro_batch: kernels\.attention=varlen knows no beginnings"):
        of("data.packing=bfd", "kernels.attention=varlen")
    for contradiction in (["data.packing=wrapped"], ["data.packing=bfd", "kernels.padding=keep"]):
        with pytest.raises(InputError, match=r"kernels\.prefix_reuse=micro_batch: "):
            of(*contradiction)


def test_each_attention_is_predicted_on_its_own_layout():
    def best(*overrides: str):
        config = load_config(RECIPE, ["data.packing=bfd", *overrides])
        return plan(config, gpu="h200", budget="20GiB", synthetic="tiny").best[0]

    shared, plain, padded = best(), best("kernels.prefix_reuse=none"), best("kernels.padding=keep")
    assert shared.attention == "document"
    assert shared.time.parts_ms["base GEMM"] < plain.time.parts_ms["base GEMM"] < padded.time.parts_ms["base GEMM"]
    other = best("kernels.attention=varlen")
    assert other.time.parts_ms["base GEMM"] == pytest.approx(plain.time.parts_ms["base GEMM"], rel=1e-6)
