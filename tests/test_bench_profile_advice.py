"""The sentence of a profile names what limits a run and the setting that helps most, by how much, and never invents."""

from __future__ import annotations

import pytest

from packloop.bench.breakdown import Part
from packloop.bench.profile_advice import Situation, advise
from packloop.config import parse_config

STEP_MS = 1000.0


def part(phase: str, cls: str, ms: float, floor_ms: float | None = None) -> Part:
    return Part(phase=phase, cls=cls, ms=ms, kernels=1, tflop=0.0, floor_ms=floor_ms, joined_ms=0.0)


def situation(*parts: Part, settings: dict | None = None, **values) -> Situation:
    """A step of 1000 ms, the rest of which is the base's products at 95 % of their rate."""
    merged = {
        "train": {"gradient_checkpointing": 0, "per_device_train_batch_size": 6, "gradient_accumulation_steps": 2},
        "kernels": {"layer": "fused", "attention": "document", "dequant_cache": 0, "keep_inputs": 0},
    }
    for section, changes in (settings or {}).items():
        merged[section] = merged.get(section, {}) | changes
    idle_ms = values.pop("idle_ms", 5.0)
    rest_ms = STEP_MS - idle_ms - sum(one.ms for one in parts)
    given = {
        "num_layers": 32,
        "slot_tokens": 24576,
        "real_tokens": 24576,
        "gemm_tflops": 742.0,
        "fastest_attention": "document",
        "attention_ms": 10.0,
    }
    return Situation(
        config=parse_config(merged),
        parts=[*parts, part("forward", "base GEMM", rest_ms, 0.95 * rest_ms)],
        step_ms=STEP_MS,
        idle_ms=idle_ms,
        **(given | values),
    )


RECOMPUTED = (part("recomputation", "base GEMM", 290.0), part("recomputation", "NF4 dequantisation", 20.0))
ALL = {"train": {"gradient_checkpointing": 32}}
ROOM = {"recomputed_gib": 0.5, "cached_gib": 0.4, "inputs_gib": 0.2}


def test_recomputation_is_named_less_the_dequantisation_that_stays():
    advice = advise(situation(*RECOMPUTED, settings=ALL))
    assert "recomputation, 31% of the step" in advice.sentence
    assert "train.gradient_checkpointing=none" in advice.sentence
    assert "at most 29% of the step" in advice.sentence
    assert "1.41 times the rate" in advice.sentence
    assert "310.0 ms less 20.0 ms of dequantisation" in advice.sentence
    best = advice.candidates[0]
    assert (best.saves_ms, best.saves_share) == (pytest.approx(290.0), pytest.approx(0.29))


def test_a_stock_layer_dequantises_twice_so_all_of_recomputation_is_saved():
    stock = {**ALL, "kernels": {"layer": "stock"}}
    advice = advise(situation(*RECOMPUTED, settings=stock, why_not_fused="it has a bias"))
    assert "at most 31% of the step" in advice.sentence


def test_memory_decides_how_much_need_not_be_recomputed():
    fits = advise(situation(*RECOMPUTED, settings=ALL, free_gib=20.0, **ROOM))
    assert "train.gradient_checkpointing=none" in fits.sentence
    assert "it needs 16.0 GiB and 20.0 GiB are left" in fits.sentence
    smaller = advise(situation(*RECOMPUTED, settings=ALL, free_gib=9.0, **ROOM))
    assert "train.per_device_train_batch_size=3 train.gradient_accumulation_steps=4" in smaller.sentence
    assert "8.0 GiB with the smaller micro-batch and 9.0 are left" in smaller.sentence
    one_pack = {"train": {"gradient_checkpointing": 32, "per_device_train_batch_size": 1}}
    some = advise(situation(*RECOMPUTED, settings=one_pack, free_gib=4.0, **ROOM))
    assert "set train.gradient_checkpointing=24, which saves at most 7%" in some.sentence
    none = advise(situation(*RECOMPUTED, settings=one_pack, free_gib=0.3, **ROOM))
    assert "gradient_checkpointing" not in none.sentence
    assert not any("gradient_checkpointing" in one.setting for one in none.candidates)


def test_dequantisation_is_named_with_the_layers_that_fit():
    twice = (part("forward", "NF4 dequantisation", 30.0), part("backward", "NF4 dequantisation", 30.0))
    whole = advise(situation(*twice))
    assert "NF4 dequantisation, 6% of the step: set kernels.dequant_cache=all, which saves at most 6%" in whole.sentence
    half = advise(situation(*twice, free_gib=6.5, **ROOM))
    assert "kernels.dequant_cache=16" in half.sentence
    assert "at most 3%" in half.sentence
    cached = advise(situation(*twice, settings={"kernels": {"dequant_cache": 32}}))
    assert not any("dequant_cache" in one.setting for one in cached.candidates)


def test_idle_time_asks_for_larger_micro_batches():
    advice = advise(situation(idle_ms=120.0))
    assert "the host, for which the GPU waits 12% of the step" in advice.sentence
    assert "train.per_device_train_batch_size=12 train.gradient_accumulation_steps=1" in advice.sentence
    assert "at most 6%" in advice.sentence
    odd = advise(situation(idle_ms=120.0, settings={"train": {"gradient_accumulation_steps": 1}}))
    assert "makes a step twice as large" in odd.sentence


def test_a_faster_attention_is_named():
    slow = (part("forward", "attention", 120.0), part("backward", "attention", 180.0), part("forward", "RoPE", 20.0))
    settings = {"kernels": {"attention": "sdpa"}}
    advice = advise(situation(*slow, settings=settings, fastest_attention="flash_attn_4", attention_ms=110.0))
    assert "attention, 32% of the step: set kernels.attention=flash_attn_4, which saves at most 21%" in advice.sentence
    same = advise(situation(*slow, settings=settings, fastest_attention="sdpa", attention_ms=110.0))
    assert not any("attention" in one.setting for one in same.candidates)


def test_padding_asks_for_packing():
    advice = advise(situation(settings={"data": {"packing": "none"}}, real_tokens=2457.6))
    assert "padding, 90% of all slots: set data.packing=bfd, which saves at most 90%" in advice.sentence
    packed = advise(situation(settings={"data": {"packing": "bfd"}}, real_tokens=2457.6))
    assert not any("packing" in one.setting for one in packed.candidates)
    shared = advise(situation(settings={"data": {"packing": "none"}}, real_tokens=27000))
    assert not any("packing" in one.setting for one in shared.candidates), "fewer slots than tokens are no padding"


def test_stock_layers_lose_what_lies_above_the_floors():
    between = (
        part("forward", "LoRA", 200.0, 40.0),
        part("forward", "norms", 60.0, 20.0),
        part("forward", "copies", 30),
    )
    advice = advise(situation(*between, settings={"kernels": {"layer": "stock"}}))
    assert "between the matrix products, 29% of the step: set kernels.layer=fused" in advice.sentence
    assert "at most 23%" in advice.sentence
    barred = advise(situation(*between, settings={"kernels": {"layer": "stock"}}, why_not_fused="it has a bias"))
    assert not any("fused" in one.setting for one in barred.candidates)


def test_paging_is_what_an_optimizer_takes_above_its_floor():
    paged = {"train": {"optim": "paged_adamw_32bit"}}
    update = part("update", "optimizer", 90.0, 10.0)
    advice = advise(situation(update, settings=paged, paged_gib=1.3))
    assert "the optimizer, 9% of the step: set train.optim=adamw_32bit, which saves at most 8%" in advice.sentence
    assert (
        "optim" not in advise(situation(update, settings=paged, paged_gib=1.3, free_gib=1.0)).sentence.split("set")[-1]
    )
    assert not any("optim" in one.setting for one in advise(situation(update, settings=paged)).candidates)


def test_inputs_that_are_rebuilt_can_be_kept():
    advice = advise(situation(part("backward", "norms", 80.0), rebuilt_ms=40.0))
    assert "set kernels.keep_inputs=all, which saves at most 4%" in advice.sentence


def test_collectives_come_once_a_step():
    advice = advise(situation(part("update", "collectives", 100.0)))
    assert "train.gradient_accumulation_steps=4, which saves at most 5%" in advice.sentence


def test_a_run_bound_by_products_is_told_so_with_its_share_of_the_ceiling():
    advice = advise(situation(part("forward", "attention", 60.0), idle_ms=10.0))
    assert advice.sentence == (
        "This run is bound by the base's matrix products, 93% of the step at 95% of the rate measured for them alone "
        "(742 TFLOP/s), and no setting is worth changing for speed: the best, "
        "train.per_device_train_batch_size=12 train.gradient_accumulation_steps=1, saves at most 0.5%."
    )


def test_a_run_bound_by_something_else_is_told_what_when_no_setting_helps():
    advice = advise(situation(part("forward", "head + loss", 700.0), idle_ms=0.0))
    assert advice.sentence.startswith("What limits this run is head + loss, 70% of the step, and no setting is worth")


def test_candidates_come_best_first_and_no_figure_exceeds_the_step():
    mixed = (*RECOMPUTED, part("backward", "NF4 dequantisation", 25.0), part("update", "optimizer", 30.0, 5.0))
    found = advise(situation(*mixed, settings=ALL, idle_ms=60.0, paged_gib=1.0)).candidates
    assert len(found) == 4
    assert [one.saves_ms for one in found] == sorted((one.saves_ms for one in found), reverse=True)
    assert all(0 < one.saves_share < 1 for one in found)
