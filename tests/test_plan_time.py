"""Predicted steps: against an H200, and what must hold whatever the rates."""

from __future__ import annotations

from dataclasses import replace

import pytest

from packloop.bench.synthetic import shape_config
from packloop.config import LoraConfig, ModelConfig
from packloop.engine.planner.policy import MemoryPlan
from packloop.engine.planner.rates import ATTENTION_RATES, rates_of
from packloop.engine.planner.search import Search
from packloop.engine.planner.shape import ModelShape
from packloop.engine.planner.time import IDLE, Load, TimeModel
from packloop.errors import InputError
from packloop.gpus import require_gpu

QV = ["q_proj", "v_proj"]


def shape_of(targets=QV, dropout: float = 0.1, name: str = "llama2-7b") -> ModelShape:
    return ModelShape.of(shape_config(name), ModelConfig(), LoraConfig(target_modules=targets, dropout=dropout))


def load(packs: int, *, length: int = 330, attention: str = "document") -> Load:
    slots = packs * 2048
    return Load(slots, slots * 0.995, slots * 0.99, slots * length, slots, attention)


def model(packs: int = 4, gpu: str = "h200", shape: ModelShape | None = None, **kwargs) -> TimeModel:
    return TimeModel(shape or shape_of(), load(packs, **kwargs), rates_of(require_gpu(gpu)))


# Steps of two micro-batches of Llama-2-7B on an H200, ms. The rates were chosen with these in view: this holds what was
# calibrated in place and is no test of accuracy. Left out is all-linear with dropout at one pack, which waits for the
# host: 310 ms were measured and 13 % less is predicted.
@pytest.mark.parametrize(
    ("targets", "dropout", "packs", "plan", "length", "attention", "measured_ms"),
    [
        (QV, 0.1, 8, MemoryPlan(0, 32, 0), 330, "document", 1481),
        (QV, 0.1, 2, MemoryPlan(0, 0, 0), 330, "document", 397),
        ("all-linear", 0.0, 4, MemoryPlan(0, 0, 0), 330, "document", 806),
        (QV, 0.1, 2, MemoryPlan(32, 0, 0), 2048, "sdpa", 561),
        (QV, 0.0, 4, MemoryPlan(0, 0, 32), 330, "flash_attn", 764),
    ],
)
def test_steps_last_as_long_as_on_an_h200(targets, dropout, packs, plan, length, attention, measured_ms):
    predicted = model(packs, shape=shape_of(targets, dropout), length=length, attention=attention).step(plan, 2)
    assert predicted.step_ms == pytest.approx(measured_ms, rel=0.1)


def test_each_purchase_saves_time_and_costs_are_its_share():
    time = model()
    costs = time.costs()
    smallest = MemoryPlan(32, 0, 0)
    for better, price in (
        (MemoryPlan(22, 0, 0), costs.recomputation),
        (MemoryPlan(32, 10, 0), None),
        (MemoryPlan(0, 0, 10), None),
    ):
        worse = replace(better, keep_inputs_layers=0) if better.keep_inputs_layers else smallest
        saved = sum(time.step(worse, 1).parts_ms.values()) - sum(time.step(better, 1).parts_ms.values())
        assert saved > 0
        if price is not None:
            assert saved == pytest.approx(10 * price.ms, rel=0.05)


def test_the_base_product_counts_four_times_the_weights_and_six_when_recomputed():
    shape = shape_of()
    time = model()
    rate = rates_of(require_gpu("h200")).product
    weights = 32 * shape.layer_weights
    kept, recomputed = (time.step(MemoryPlan(layers, 0, 0), 1).parts_ms["base GEMM"] for layers in (0, 32))
    assert kept == pytest.approx(4 * weights * 4 * 2048 / rate, rel=0.02)
    down = 32 * shape.group("down").weights  # which recomputation leaves out
    assert recomputed - kept == pytest.approx(2 * (weights - down) * 4 * 2048 / rate, rel=0.02)


def test_long_documents_take_longer_and_a_slower_gpu_does():
    plan = MemoryPlan(0, 0, 0)
    assert model(length=2048).step(plan, 1).step_ms > 1.02 * model(length=256).step(plan, 1).step_ms
    assert model(gpu="a10g").step(plan, 1).step_ms > 8 * model(gpu="h200").step(plan, 1).step_ms


def test_a_small_model_waits_for_the_host():
    tiny = model(1, shape=shape_of(name="tiny")).step(MemoryPlan(0, 2, 2), 2)
    assert tiny.parts_ms[IDLE] > 0.8 * tiny.step_ms
    assert model(8).step(MemoryPlan(0, 32, 0), 2).parts_ms[IDLE] < 0.02 * model(8).step(MemoryPlan(0, 32, 0), 2).step_ms


@pytest.mark.parametrize("attention", ATTENTION_RATES)
def test_every_backend_has_a_time(attention):
    assert model(attention=attention).step(MemoryPlan(0, 0, 0), 1).parts_ms["attention"] > 1


def test_a_gpu_without_bfloat16_is_refused():
    with pytest.raises(InputError, match="no bfloat16"):
        rates_of(require_gpu("t4"))


def test_the_search_stays_within_the_budget_and_keeps_the_global_batch_first():
    search = Search(shape_of(), require_gpu("a10g"), lambda packs: load(packs), attentions=["document"], is_paged=True)
    found = search.best(20.0, 12)
    assert [one.global_batch for one in found[:6]] == [12] * 6
    assert all(one.memory.counted_gib <= 20.0 for one in found)
    rates = [one.time.tokens_per_s for one in found[:6]]
    assert rates == sorted(rates, reverse=True)
    # More memory never makes it slower, and less than the weights holds nothing.
    richer = search.best(21.5, 12)
    assert richer[0].time.tokens_per_s >= found[0].time.tokens_per_s
    assert search.best(3.0, 12) == []


def test_what_is_fixed_stays():
    search = Search(shape_of(), require_gpu("a10g"), lambda packs: load(packs), attentions=["document"], is_paged=True)
    found = search.within(20.0, 2, 6, {"recompute_layers": 20})
    assert found.plan.recompute_layers == 20
    assert found.plan.cached_layers > 0
