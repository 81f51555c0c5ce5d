"""Which layers recompute, cache weights or keep their products' inputs: what that costs, and the best choice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class MemoryPlan:
    """Numbers of layers: recomputed (the first), cached (the first), with their products' inputs kept (the last)."""

    recompute_layers: int
    cached_layers: int
    keep_inputs_layers: int

    def kept_inputs(self, num_layers: int) -> int:
        """Layers that do keep inputs: one that recomputes has none to keep."""
        return min(self.keep_inputs_layers, num_layers - self.recompute_layers)

    def __str__(self) -> str:
        return (
            f"{self.recompute_layers} layers recomputed, {self.cached_layers} with dequantised weights cached, "
            f"{self.keep_inputs_layers} with inputs kept"
        )


def count_layers(setting: str | int, num_layers: int) -> int:
    """`all`, `none` or a number as a number of layers, at most all of them."""
    return min({"all": num_layers, "none": 0}.get(setting, setting), num_layers)


@dataclass(frozen=True)
class Price:
    """What one layer saves in a micro-batch, and the memory that it takes for it."""

    ms: float
    bytes: int


@dataclass(frozen=True)
class LayerCosts:
    """Prices of not recomputing a layer, of caching its weights, and of keeping its products' inputs.

    The dearest plan in time, and the smallest in memory, recomputes every layer, caches none and keeps no inputs; each
    layer that is bought adds its bytes and takes its milliseconds away.
    """

    recomputation: Price
    cache: Price
    inputs: Price

    def saved_ms(self, plan: MemoryPlan, num_layers: int) -> float:
        """A micro-batch's milliseconds below those of the smallest plan."""
        return (
            (num_layers - plan.recompute_layers) * self.recomputation.ms
            + plan.cached_layers * self.cache.ms
            + plan.kept_inputs(num_layers) * self.inputs.ms
        )

    def bytes(self, plan: MemoryPlan, num_layers: int) -> int:
        """Bytes above the smallest plan's."""
        return (
            (num_layers - plan.recompute_layers) * self.recomputation.bytes
            + plan.cached_layers * self.cache.bytes
            + plan.kept_inputs(num_layers) * self.inputs.bytes
        )

    def __str__(self) -> str:
        named = (("recomputation", self.recomputation), ("cache", self.cache), ("inputs", self.inputs))
        return ", ".join(f"{name} {price.ms:.2f} ms for {price.bytes / 2**30:.2f} GiB" for name, price in named)


def smallest_plan(num_layers: int, fixed: dict[str, int]) -> MemoryPlan:
    """The plan that takes the least memory, but for the fields that are not free."""
    return MemoryPlan(**{"recompute_layers": num_layers, "cached_layers": 0, "keep_inputs_layers": 0, **fixed})


def choose_plan(
    costs: LayerCosts, num_layers: int, fixed: dict[str, int], fits: Callable[[MemoryPlan], bool]
) -> MemoryPlan | None:
    """The plan that saves the most milliseconds of those that fit, of equals the one with the least memory; or None.

    fixed: fields that are not free. fits: false for a plan implies false for every plan that buys more of anything.
    For each number of recomputed and cached layers the most inputs that fit are found by bisection, so that layers are
    bought by their milliseconds a byte without what rounding to whole layers would leave over.
    """
    combinations = sorted(
        _combinations(costs, num_layers, fixed),
        key=lambda plan: (-costs.saved_ms(plan, num_layers), costs.bytes(plan, num_layers)),
    )
    best: tuple[tuple[float, int], MemoryPlan] | None = None
    for most in combinations:
        if best is not None and costs.saved_ms(most, num_layers) < best[0][0]:
            break  # nor does any of the rest save more
        plan = _with_most_inputs(most, fixed, fits)
        if plan is not None:
            rank = (costs.saved_ms(plan, num_layers), -costs.bytes(plan, num_layers))
            best = max(best, (rank, plan), key=lambda found: found[0]) if best else (rank, plan)
    return None if best is None else best[1]


def fits_bytes(
    costs: LayerCosts, num_layers: int, fixed: dict[str, int], spare_bytes: float
) -> Callable[[MemoryPlan], bool]:
    """For `choose_plan`: whether a plan's bytes above those of the smallest, as far as it is free, are to spare."""
    allowed = costs.bytes(smallest_plan(num_layers, fixed), num_layers) + spare_bytes
    return lambda plan: costs.bytes(plan, num_layers) <= allowed


def _combinations(costs: LayerCosts, num_layers: int, fixed: dict[str, int]) -> Iterator[MemoryPlan]:
    """Each number of recomputed and cached layers with the most inputs, without what takes memory and saves nothing."""

    def free(field: str, price: Price, values: range, without: int) -> list[int]:
        if field in fixed:
            return [fixed[field]]
        return list(values) if price.ms > 0 and price.bytes > 0 else [without]

    for recomputed in free("recompute_layers", costs.recomputation, range(num_layers + 1), num_layers):
        for cached in free("cached_layers", costs.cache, range(num_layers + 1), 0):
            (*_, most) = free("keep_inputs_layers", costs.inputs, range(num_layers - recomputed + 1), 0)
            yield MemoryPlan(recomputed, cached, most)


def _with_most_inputs(most: MemoryPlan, fixed: dict[str, int], fits: Callable[[MemoryPlan], bool]) -> MemoryPlan | None:
    high = most.keep_inputs_layers
    low = high if "keep_inputs_layers" in fixed else 0
    if not fits(replace(most, keep_inputs_layers=low)):
        return None
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(replace(most, keep_inputs_layers=middle)) else (low, middle - 1)
    return replace(most, keep_inputs_layers=low)
