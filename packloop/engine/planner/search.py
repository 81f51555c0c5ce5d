"""The settings that train the most real tokens a second within a memory budget, by prediction alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from packloop.engine.budget import GIB
from packloop.engine.planner.allocations import MicroBatch
from packloop.engine.planner.memory import MemoryForecast, MemoryModel
from packloop.engine.planner.policy import LayerCosts, MemoryPlan, Price, choose_plan, smallest_plan
from packloop.engine.planner.rates import Rates, rates_of
from packloop.engine.planner.shape import ModelShape
from packloop.engine.planner.time import Load, StepForecast, TimeModel
from packloop.gpus import Gpu

# Larger micro-batches than this are not tried: beyond it nothing gets faster.
_MAX_BATCH = 64
# Rounds in which what the allocator reserves beyond what is allocated is learnt for a budget, and each one's least.
_ROUNDS, _ROUND_BYTES = 16, 64 * 2**20


@dataclass(frozen=True)
class Candidate:
    """Settings and what they are predicted to take. global_batch: packs of an optimizer step. is_gated: by quack."""

    batch: int
    accumulation: int
    attention: str
    plan: MemoryPlan
    memory: MemoryForecast
    time: StepForecast
    is_gated: bool = False

    @property
    def global_batch(self) -> int:
        return self.batch * self.accumulation

    @property
    def overrides(self) -> list[str]:
        """As `packloop train CONFIG` takes them."""
        return [
            f"train.per_device_train_batch_size={self.batch}",
            f"train.gradient_accumulation_steps={self.accumulation}",
            f"train.gradient_checkpointing={self.plan.recompute_layers}",
            f"kernels.dequant_cache={self.plan.cached_layers}",
            f"kernels.keep_inputs={self.plan.keep_inputs_layers}",
            f"kernels.attention={self.attention}",
            *(["kernels.gated=quack"] if self.is_gated else []),
        ]


class Search:
    """Predictions for one model shape, data set and GPU.

    load_of: the average micro-batch of that many packs, with any attention. attentions: backends to choose from.
    is_paged: whether the optimizer's state is managed memory, which a budget counts and torch does not.
    """

    def __init__(
        self,
        shape: ModelShape,
        gpu: Gpu,
        load_of: Callable[[int], Load],
        *,
        attentions: Sequence[str],
        is_paged: bool,
    ):
        self.shape, self.gpu = shape, gpu
        self.rates: Rates = rates_of(gpu, shape.itemsize)
        self._load_of, self._attentions, self._is_paged = load_of, attentions, is_paged

    def predict(self, batch: int, accumulation: int, plan: MemoryPlan) -> Candidate:
        """Exactly these settings, whether they fit or not."""
        return self._candidate(batch, accumulation, *self._models(batch), plan)

    def within(
        self, budget_gib: float, batch: int, accumulation: int, fixed: dict[str, int] | None = None
    ) -> Candidate | None:
        """The fastest plan for this micro-batch that fits the budget; None where none does."""
        fixed = fixed or {}
        memory, time = self._models(batch)
        num_layers = self.shape.num_layers
        costs = _priced(time.costs(), memory, num_layers)
        allowed = budget_gib * GIB - memory.managed_bytes
        beyond = 0.0
        for _ in range(_ROUNDS):
            limit = allowed - beyond
            plan = choose_plan(
                costs, num_layers, fixed, lambda plan, limit=limit: memory.allocated_bytes(plan) <= limit
            )
            if plan is None:
                return None
            found = self._candidate(batch, accumulation, memory, time, plan)
            excess = found.memory.counted_gib - budget_gib
            if excess <= 0:
                return found
            beyond += max(excess * GIB, _ROUND_BYTES)
        return None

    def best(self, budget_gib: float, global_batch: int) -> list[Candidate]:
        """The fastest for each size of micro-batch, the fastest of all first; those that keep the global batch come
        before those that cannot. Empty where not even one pack fits.
        """
        found = []
        for batch in range(1, min(global_batch, _MAX_BATCH) + 1):
            candidate = self.within(budget_gib, batch, accumulation_of(global_batch, batch))
            if candidate is None:
                break
            found.append(candidate)
        return sorted(found, key=lambda one: (one.global_batch != global_batch, -one.time.tokens_per_s))

    def smallest(self, batch: int = 1) -> Candidate:
        """What takes the least memory."""
        return self.predict(batch, 1, smallest_plan(self.shape.num_layers, {}))

    def _models(self, batch: int) -> tuple[MemoryModel, TimeModel]:
        """Of the attention that is fastest."""
        load = self._load_of(batch)
        times = [TimeModel(self.shape, replace(load, attention=name), self.rates) for name in self._attentions]
        everything = MemoryPlan(0, self.shape.num_layers, 0)
        time = min(times, key=lambda one: one.step(everything, 1).step_ms)
        micro = MicroBatch(load.most_slots, time.load.attention, load.prefix_tokens)
        memory = MemoryModel(self.shape, micro, is_paged=self._is_paged, capability=self.gpu.capability)
        return memory, time

    def _candidate(
        self, batch: int, accumulation: int, memory: MemoryModel, time: TimeModel, plan: MemoryPlan
    ) -> Candidate:
        return Candidate(
            batch,
            accumulation,
            time.load.attention,
            plan,
            memory.forecast(plan),
            time.step(plan, accumulation),
            is_gated=self.shape.is_gated,
        )


def accumulation_of(global_batch: int, batch: int) -> int:
    """Micro-batches of that many packs in a step of about as many packs as asked for."""
    return max(1, round(global_batch / batch))


def _priced(costs: LayerCosts, memory: MemoryModel, num_layers: int) -> LayerCosts:
    """With the bytes that the first layer of each kind adds to the peak."""
    middle = num_layers // 2
    base = MemoryPlan(middle, 0, 0)

    def price(saved: Price, plan: MemoryPlan) -> Price:
        if not saved.bytes:
            return saved
        return Price(saved.ms, max(1, memory.allocated_bytes(plan) - memory.allocated_bytes(base)))

    return LayerCosts(
        recomputation=price(costs.recomputation, replace(base, recompute_layers=max(0, middle - 1))),
        cache=price(costs.cache, replace(base, cached_layers=1)),
        inputs=price(costs.inputs, replace(base, keep_inputs_layers=1)),
    )
