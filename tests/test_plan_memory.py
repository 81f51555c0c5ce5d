"""Reserved memory: the allocator's rules one by one, and whole plans against what an H200 reserved."""

from __future__ import annotations

import pytest

from packloop.bench.synthetic import shape_config
from packloop.config import LoraConfig, ModelConfig
from packloop.engine.planner.allocations import MicroBatch, Step
from packloop.engine.planner.allocator import ReservedMemory
from packloop.engine.planner.memory import MemoryModel
from packloop.engine.planner.policy import MemoryPlan
from packloop.engine.planner.shape import ModelShape

MIB = 2**20
QV, ALL = ["q_proj", "v_proj"], "all-linear"


def shape_of(name: str, targets, dropout: float = 0.1, **model) -> ModelShape:
    return ModelShape.of(shape_config(name), ModelConfig(**model), LoraConfig(target_modules=targets, dropout=dropout))


def test_the_allocator_maps_whole_pages_of_a_pool_for_each_size():
    memory = ReservedMemory()
    memory.allocate("small", 1000)
    assert (memory.reserved, memory.allocated) == (2 * MIB, 1024)
    memory.allocate("large", 21 * MIB)
    assert memory.reserved == 42 * MIB


def test_a_freed_block_serves_the_next_of_its_size_and_its_rest_a_smaller_one():
    memory = ReservedMemory()
    for name, size in (("a", 12), ("between", 2), ("b", 4), ("end", 2)):
        memory.allocate(name, size * MIB)
    assert memory.reserved == 20 * MIB
    memory.free("a")
    memory.allocate("c", 8 * MIB)
    memory.allocate("d", 4 * MIB)
    assert memory.reserved == 20 * MIB
    memory.allocate("e", 2 * MIB)  # no room is left but what is mapped anew
    assert memory.reserved == 40 * MIB


@pytest.mark.parametrize(
    ("freed", "wanted", "reserved"),
    [
        pytest.param("acb", 15, 20, id="neighbours that are free become one block"),
        pytest.param("ac", 8, 40, id="a hole too small is fragmentation"),
    ],
)
def test_what_was_freed_serves_as_far_as_it_is_in_one_piece(freed: str, wanted: int, reserved: int):
    memory = ReservedMemory()
    for name in "abcd":
        memory.allocate(name, 5 * MIB)
    for name in freed:
        memory.free(name)
    memory.allocate("wide", wanted * MIB)
    assert memory.reserved == reserved * MIB


@pytest.mark.parametrize("plan", [MemoryPlan(32, 0, 0), MemoryPlan(0, 32, 32), MemoryPlan(7, 12, 9)], ids=str)
@pytest.mark.parametrize(("name", "targets", "dropout"), [("llama2-7b", QV, 0.1), ("llama3-8b", ALL, 0.0)])
def test_the_quick_peak_is_that_of_all_events(plan, name, targets, dropout):
    step = Step(shape_of(name, targets, dropout), MicroBatch(8192, "document"))
    held = peak = 0
    for event in step.events(plan):
        held += event.bytes
        peak = max(peak, held)
    assert step.peak_bytes(plan) == peak
    assert held == 0


# Llama-2-7B, r = 64: targets, dropout, micro-batch, plan, attention, GiB allocated and reserved at the peak.
MEASURED = [
    (QV, 0.1, 8, MemoryPlan(0, 32, 0), "document", 62.82, 62.95),
    (QV, 0.1, 2, MemoryPlan(32, 0, 0), "sdpa", 5.86, 6.00),
    (ALL, 0.1, 1, MemoryPlan(0, 0, 0), "document", 11.33, 11.73),
    (QV, 0.0, 4, MemoryPlan(0, 0, 32), "flash_attn", 29.59, 31.22),
]


@pytest.mark.parametrize(("targets", "dropout", "batch", "plan", "attention", "allocated", "reserved"), MEASURED)
def test_forecast_is_what_an_h200_reserved(targets, dropout, batch, plan, attention, allocated, reserved):
    micro = MicroBatch(batch * 2048, attention)
    forecast = MemoryModel(shape_of("llama2-7b", targets, dropout), micro, is_paged=True).forecast(plan)
    assert forecast.allocated_gib == pytest.approx(allocated, rel=0.02)
    assert forecast.reserved_gib == pytest.approx(reserved, rel=0.05)
    assert sum(forecast.parts_gib.values()) == pytest.approx(forecast.allocated_gib, rel=0.005)


def test_paged_optimizer_state_counts_apart():
    shape, micro, plan = shape_of("llama2-7b", ALL), MicroBatch(2048, "document"), MemoryPlan(32, 0, 0)
    paged, plain = (MemoryModel(shape, micro, is_paged=is_paged).forecast(plan) for is_paged in (True, False))
    assert paged.managed_gib == pytest.approx(159_907_840 * 8 / 2**30)
    assert plain.managed_gib == 0.0
    assert plain.reserved_gib == pytest.approx(paged.counted_gib, abs=0.05)


def test_weights_are_those_of_the_real_model():
    import torch

    from packloop.bench.synthetic import random_model
    from packloop.engine.model import attach_adapter

    config = shape_config("tiny")
    base = random_model(config, quantization="nf4", device=torch.device("cpu"))
    shape = shape_of("tiny", ALL)
    layers = base.model.layers
    held = 0
    for module in layers.modules():
        if hasattr(module.weight if hasattr(module, "weight") else None, "quant_state"):
            state = module.weight.quant_state
            held += module.weight.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes + state.state2.code.nbytes
    assert shape.num_layers * shape.layer_weight_bytes == held
    ends = base.model.embed_tokens.weight.nbytes + base.lm_head.weight.nbytes
    norms = sum(p.nbytes for name, p in base.named_parameters() if "norm" in name)
    assert shape.end_bytes == ends + norms
    model = attach_adapter(base, LoraConfig(target_modules=ALL), base_name="base")
    assert shape.adapter_elements == sum(p.numel() for p in model.parameters() if p.requires_grad)
