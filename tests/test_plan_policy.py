"""The choice of layers: against every plan there is, and within what is fixed."""

from __future__ import annotations

import itertools

import pytest

from packloop.engine.planner.policy import LayerCosts, MemoryPlan, Price, choose_plan, fits_bytes, smallest_plan

LAYERS = 6
COSTS = {
    "recomputation dear": LayerCosts(Price(3.0, 40), Price(1.0, 30), Price(0.4, 9)),
    "cache cheap": LayerCosts(Price(3.0, 70), Price(1.0, 10), Price(0.2, 3)),
    "inputs worthless": LayerCosts(Price(1.0, 20), Price(0.7, 11), Price(-0.1, 5)),
    "nothing to cache": LayerCosts(Price(1.0, 20), Price(0.0, 0), Price(0.3, 7)),
}


def every_plan(fixed: dict[str, int]):
    for recomputed, cached in itertools.product(range(LAYERS + 1), repeat=2):
        for inputs in range(LAYERS - recomputed + 1):
            plan = MemoryPlan(recomputed, cached, inputs)
            if all(getattr(plan, name) == value for name, value in fixed.items()):
                yield plan


@pytest.mark.parametrize("costs", COSTS.values(), ids=COSTS)
@pytest.mark.parametrize("fixed", [{}, {"cached_layers": 2}, {"recompute_layers": 3}], ids=str)
@pytest.mark.parametrize("spare_bytes", [100, 137, 203, 300, 10_000])
def test_the_choice_saves_as_much_as_any_plan_that_fits(costs, fixed, spare_bytes):
    fits = fits_bytes(costs, LAYERS, fixed, spare_bytes)
    plan = choose_plan(costs, LAYERS, fixed, fits)
    best = max(costs.saved_ms(other, LAYERS) for other in every_plan(fixed) if fits(other))
    assert fits(plan)
    assert all(getattr(plan, name) == value for name, value in fixed.items())
    assert costs.saved_ms(plan, LAYERS) == pytest.approx(best)


def test_what_saves_nothing_is_not_bought():
    assert choose_plan(COSTS["inputs worthless"], LAYERS, {}, lambda plan: True) == MemoryPlan(0, LAYERS, 0)
    assert choose_plan(COSTS["nothing to cache"], LAYERS, {}, lambda plan: True) == MemoryPlan(0, 0, LAYERS)


def test_no_plan_where_the_smallest_does_not_fit():
    assert choose_plan(COSTS["cache cheap"], LAYERS, {}, lambda plan: False) is None
    assert choose_plan(COSTS["cache cheap"], LAYERS, {}, fits_bytes(COSTS["cache cheap"], LAYERS, {}, -1)) is None


def test_what_is_fixed_is_paid_for_already():
    fixed = {"cached_layers": LAYERS}
    assert smallest_plan(LAYERS, fixed) == MemoryPlan(LAYERS, LAYERS, 0)
    plan = choose_plan(COSTS["cache cheap"], LAYERS, fixed, fits_bytes(COSTS["cache cheap"], LAYERS, fixed, 70))
    assert plan == MemoryPlan(LAYERS - 1, LAYERS, 0)


def test_a_layer_that_recomputes_keeps_no_inputs():
    costs = COSTS["recomputation dear"]
    assert costs.bytes(MemoryPlan(4, 0, 6), LAYERS) == costs.bytes(MemoryPlan(4, 0, 2), LAYERS)
