"""The memory that a run will take on a GPU, part by part, from numbers alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from packloop.engine.budget import GIB
from packloop.engine.planner.allocations import MicroBatch, Step
from packloop.engine.planner.allocator import ReservedMemory
from packloop.engine.planner.policy import MemoryPlan
from packloop.engine.planner.shape import ModelShape

# Workspaces of cuBLAS and of cuBLASLt, as PyTorch asks for them: on Hopper and newer GPUs, and on the others.
_WORKSPACE_HOPPER, _WORKSPACE = 2 * 32 * 2**20, 8 * 2**20 + 2**17 + 2**20
_MOMENTS = 2
_FP32 = 4
# The pass is repeated until what the allocator has mapped no longer grows, at most so often.
_MAX_PASSES = 6


@dataclass(frozen=True)
class MemoryForecast:
    """GiB at the peak of a step. parts_gib: of what is allocated then, by what it is for.

    managed_gib: paged optimizer state, outside of torch's count; counted_gib is what a budget limits.
    """

    parts_gib: dict[str, float]
    allocated_gib: float
    reserved_gib: float
    managed_gib: float

    @property
    def counted_gib(self) -> float:
        return self.reserved_gib + self.managed_gib


class MemoryModel:
    """Memory of one model shape at one size of micro-batch, for any plan."""

    def __init__(self, shape: ModelShape, micro: MicroBatch, *, is_paged: bool, capability: tuple[int, int] = (9, 0)):
        self.shape, self.micro, self._is_paged = shape, micro, is_paged
        self._step = Step(shape, micro)
        self._workspace = _WORKSPACE_HOPPER if capability >= (9, 0) else _WORKSPACE

    @cached_property
    def static_bytes(self) -> dict[str, int]:
        """What stays throughout, by part; without cached weights."""
        shape = self.shape
        trained = shape.adapter_elements * _FP32
        moments = _MOMENTS * trained
        return {
            "base weights": shape.num_layers * shape.layer_weight_bytes,
            "embedding, head and norms": shape.end_bytes,
            "adapter, gradient and copies": 2 * trained + shape.adapter_copy_bytes,
            "optimizer state": 0 if self._is_paged else moments,
            "matrix products' workspace": self._workspace,
        }

    @property
    def managed_bytes(self) -> int:
        return _MOMENTS * self.shape.adapter_elements * _FP32 if self._is_paged else 0

    def allocated_bytes(self, plan: MemoryPlan) -> int:
        """The most that is allocated at once."""
        cached = plan.cached_layers * self.shape.cache_bytes
        return sum(self.static_bytes.values()) + cached + self._step.peak_bytes(plan)

    def forecast(self, plan: MemoryPlan) -> MemoryForecast:
        """Every part at the peak, and what the allocator reserves for it."""
        memory = ReservedMemory()
        shape = self.shape
        for index in range(shape.num_layers):
            for group in shape.groups:
                for member, outputs in enumerate(group.out_features):
                    share = shape.layer_weight_bytes * outputs * group.in_features // shape.layer_weights
                    memory.allocate(("weight", index, group.name, member), share)
        for name in ("embedding, head and norms", "adapter, gradient and copies", "optimizer state"):
            if self.static_bytes[name]:
                memory.allocate(name, self.static_bytes[name])
        memory.allocate("workspace", self._workspace)
        if shape.is_nf4:
            for index in range(plan.cached_layers):
                for group in shape.groups:
                    memory.allocate(("cached", index, group.name), group.buffer_elements * shape.itemsize)
        before = None
        for _ in range(_MAX_PASSES):
            if memory.reserved == before:
                break
            before = memory.reserved
            memory.replay(self._step.events(plan))
        parts = {name: size / GIB for name, size in self.static_bytes.items() if size}
        if cached := plan.cached_layers * shape.cache_bytes:
            parts["cached dequantised weights"] = cached / GIB
        parts |= {name: size / GIB for name, size in self._parts_at_peak(plan).items()}
        return MemoryForecast(parts, memory.peak_allocated / GIB, memory.reserved / GIB, self.managed_bytes / GIB)

    def _parts_at_peak(self, plan: MemoryPlan) -> dict[str, int]:
        held: dict[str, int] = {}
        peak, at_peak, total = 0, {}, 0
        for event in self._step.events(plan):
            held[event.part] = held.get(event.part, 0) + event.bytes
            total += event.bytes
            if total > peak:
                peak, at_peak = total, dict(held)
        return {name: size for name, size in at_peak.items() if size}
