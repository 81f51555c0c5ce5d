"""How long an optimizer step will take: the sum of its kinds of work, each from its FLOPs, its bytes and a GPU's rate.

What runs when follows `kernels.decoder_layer`. Attention depends on the documents' lengths by the sum of their squares.
The host launches ahead of the device; a step whose launches take longer than its kernels is as long as they are.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cache

from packloop.engine.planner.policy import LayerCosts, MemoryPlan, Price
from packloop.engine.planner.rates import Rates
from packloop.engine.planner.shape import GroupShape, ModelShape

# Kinds of work, as tables name them.
PRODUCTS, ATTENTION, DEQUANTISATION, LORA = "base GEMM", "attention", "NF4 dequantisation", "LoRA"
NORMS, ACTIVATION, COPIES, HEAD, OPTIMIZER, IDLE = "norms", "activation", "copies", "head + loss", "optimizer", "idle"
_FP32 = 4
# Bytes of an NF4 weight with its scales.
_NF4_BYTES = 0.516
# Backends whose q and k are turned by a kernel of their own, and whose gradients are copied to their place.
_COPIED = ("sdpa", "cudnn")


@dataclass(frozen=True)
class Load:
    """A micro-batch, on average.

    real_tokens: of its documents, more than slots where they share what they begin with. labels: rows of the head.
    squared_lengths: twice the pairs that attention multiplies, n^2 of each document. most_slots: of the largest
    micro-batch, which decides on memory. prefix_tokens: of the beginning that documents share, as most of them do.
    """

    slots: float
    real_tokens: float
    labels: float
    squared_lengths: float
    most_slots: int
    attention: str
    prefix_tokens: int = 0


@dataclass(frozen=True)
class StepForecast:
    """parts_ms: GPU time of one optimizer step by kind of work, and `idle`, which is where it waits for the host."""

    parts_ms: dict[str, float]
    real_tokens: float

    @property
    def step_ms(self) -> float:
        return sum(self.parts_ms.values())

    @property
    def tokens_per_s(self) -> float:
        """Real tokens."""
        return self.real_tokens / self.step_ms * 1e3


class _Work(Counter):
    """Milliseconds by kind, and `calls` that the host makes for them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def spend(self, kind: str, ms: float, calls: int = 1) -> None:
        self[kind] += ms
        self.calls += calls

    @property
    def ms(self) -> float:
        return sum(self.values())


class TimeModel:
    """Times of one model shape at one size of micro-batch on one GPU, for any plan."""

    def __init__(self, shape: ModelShape, load: Load, rates: Rates):
        self.shape, self.load, self.rates = shape, load, rates
        self._column = load.slots * shape.itemsize  # bytes of one column
        self.layer = cache(self._layer)

    def step(self, plan: MemoryPlan, accumulation: int) -> StepForecast:
        """One optimizer step of `accumulation` micro-batches."""
        total, calls = Counter(), 0
        for work, times in [*self._layers(plan), (self._ends(), 1)]:
            for kind, ms in work.items():
                total[kind] += ms * times
            calls += work.calls * times
        total = Counter({kind: ms * accumulation for kind, ms in total.items()})
        optimizer = self._optimizer()
        calls = calls * accumulation + optimizer.calls
        total.update(optimizer)
        gaps_ms = calls * self.rates.gap_ms + self.rates.step_ms
        waiting_ms = calls * self.rates.call_ms - sum(total.values())
        total[IDLE] = max(gaps_ms, waiting_ms)
        return StepForecast(dict(total), self.load.real_tokens * accumulation)

    def costs(self) -> LayerCosts:
        """What a layer's choices save in a micro-batch; their bytes, counted elsewhere, are 1 here or 0 for none."""
        products = self.layer("products", False).ms
        return LayerCosts(
            recomputation=Price(self.layer("input", False).ms - products, 1),
            cache=Price(products - self.layer("products", True).ms, int(self.shape.is_nf4)),
            inputs=Price(products - self.layer("all", False).ms, 1),
        )

    def _layers(self, plan: MemoryPlan) -> list[tuple[_Work, int]]:
        """(work of a layer, how many are like it)."""
        num_layers = self.shape.num_layers
        alike = Counter(
            (
                "input" if index < plan.recompute_layers else "all" if index >= num_layers - plan.keep_inputs_layers
                else "products",
                index < plan.cached_layers,
            )
            for index in range(num_layers)
        )  # fmt: skip
        return [(self.layer(*layer), count) for layer, count in alike.items()]

    def _layer(self, keeps: str, is_cached: bool) -> _Work:
        work = _Work()
        self._forward(work, keeps, is_cached, is_recomputed=False)
        if keeps == "input":
            self._forward(work, keeps, is_cached, is_recomputed=True)
        self._backward(work, keeps, is_cached)
        return work

    def _forward(self, work: _Work, keeps: str, is_cached: bool, *, is_recomputed: bool) -> None:
        shape = self.shape
        # The first norm adds the residual and its update, but not when it runs again; the second always does.
        self._stream(work, NORMS, shape.hidden * ((2 if is_recomputed else 4) + 4), calls=2)
        for group in shape.groups:
            needs_product = not (is_recomputed and group.name == "down")
            if needs_product:
                self._dequantise(work, group, is_cached)
                self._product(work, group.in_features + group.spare, group.num_outputs)
            if group.num_ranks:
                self._project(work, group)
                if group.extends and keeps != "all":
                    self._stream(work, COPIES, 2 * group.num_ranks)
                if not group.extends and needs_product:
                    self._members(work, group, passes=2)
        self._attend(work, is_backward=False)
        if shape.is_gated:  # what its product writes beside gate and up
            self._stream(work, ACTIVATION, shape.intermediate)
        elif not is_recomputed or shape.group("down").num_ranks:
            self._stream(work, ACTIVATION, 3 * shape.intermediate)

    def _backward(self, work: _Work, keeps: str, is_cached: bool) -> None:
        shape = self.shape
        rebuilds = keeps != "all"
        self._stream(work, NORMS, 2 * 4 * shape.hidden, calls=2)
        rebuilds_product = (rebuilds or shape.is_gated) and shape.group("down").num_ranks > 0
        if shape.gates_backward:  # reads gate and up, writes their gradients and hidden where a product writes d_hidden
            self._stream(work, ACTIVATION, 4 * shape.intermediate)
        else:
            self._stream(work, ACTIVATION, (6 if rebuilds_product else 5) * shape.intermediate)
        for group in shape.groups:
            if keeps != "input" or group.name == "down":  # else dequantised for the forward that ran again
                self._dequantise(work, group, is_cached)
            rides = group.extends and not shape.dropout
            self._product(work, group.num_outputs + (group.num_ranks if rides else 0), group.in_features)
            if not group.num_ranks:
                continue
            self._members(work, group, passes=2)  # the gradients of B, and of the projections
            if not rides:
                self._add_product(work, group)
            self._adapter_gradient(work, group)
            if rebuilds and group.name in ("qkv", "gate_up"):
                self._stream(work, NORMS, 2 * shape.hidden)
        self._attend(work, is_backward=True)

    def _product(self, work: _Work, inputs: int, outputs: int, rows: float | None = None, kind: str = PRODUCTS) -> None:
        rows = self.load.slots if rows is None else rows
        moved = (rows * (inputs + outputs) + inputs * outputs) * self.shape.itemsize
        work.spend(kind, max(2.0 * rows * inputs * outputs / self.rates.product, moved / self.rates.stream))

    def _stream(self, work: _Work, kind: str, columns: float, calls: int = 1) -> None:
        """Passes over so many columns of all slots, read or written."""
        work.spend(kind, self._column * columns / self.rates.stream, calls)

    def _dequantise(self, work: _Work, group: GroupShape, is_cached: bool) -> None:
        if is_cached or not self.shape.is_nf4:
            return
        work.spend(DEQUANTISATION, group.weights * (self.shape.itemsize + _NF4_BYTES) / self.rates.dequantise)
        if group.extends:
            work.spend(COPIES, self.rates.small_ms)

    def _project(self, work: _Work, group: GroupShape) -> None:
        moved = self._column * (group.in_features + group.num_ranks)
        if self.shape.dropout:
            floor_ms = group.in_features * self.rates.mask_ms_per_feature * max(group.num_ranks, 64) / 128
            work.spend(LORA, max(moved / self.rates.dropout_read, floor_ms))
        else:
            work.spend(LORA, self.rates.small_ms + moved / self.rates.thin)

    def _members(self, work: _Work, group: GroupShape, *, passes: int) -> None:
        """Thin products over each member's outputs."""
        for outputs, rank in zip(group.out_features, group.ranks, strict=True):
            if rank:
                once = self._column * (outputs + rank) / self.rates.thin + self.rates.small_ms
                work.spend(LORA, passes * once, passes)

    def _add_product(self, work: _Work, group: GroupShape) -> None:
        moved = self._column * (2 * group.in_features + group.num_ranks)
        if self.shape.dropout:
            work.spend(LORA, moved / self.rates.dropout_update)
        else:
            work.spend(LORA, self.rates.small_ms + moved / self.rates.thin)

    def _adapter_gradient(self, work: _Work, group: GroupShape) -> None:
        moved = self._column * (group.in_features + group.num_ranks)
        if self.shape.dropout:  # the partial sums are added up, and to the gradient
            work.spend(LORA, moved / self.rates.dropout_read + 3 * self.rates.small_ms, calls=3)
        else:
            work.spend(LORA, self.rates.small_ms + moved / self.rates.thin)

    def _attend(self, work: _Work, *, is_backward: bool) -> None:
        shape, load = self.shape, self.load
        rate = self.rates.attention[load.attention]
        width = 2 * (shape.num_heads + shape.num_kv_heads) * shape.head_dim
        wide = min(max((shape.head_dim - 64) / 64, 0.0), 2.0)
        score_ns = rate.ns_per_score * (rate.narrow + (1 - rate.narrow) * wide) * shape.num_heads
        ns = load.slots * width * rate.ns_per_element + load.squared_lengths * score_ns
        share = 1 - rate.forward if is_backward else rate.forward
        work.spend(ATTENTION, ns * 1e-6 * share, calls=3)
        if load.attention in _COPIED:
            copied = 3 * shape.attended if is_backward else shape.attended
            work.spend(COPIES, 2 * self._column * copied / self.rates.copy, calls=4 if is_backward else 1)

    def _ends(self) -> _Work:
        """Embedding, final norm, head and loss, both ways, and the adapters' copies, of one micro-batch."""
        work, shape, load = _Work(), self.shape, self.load
        self._stream(work, NORMS, (2 + 4 + 4) * shape.hidden, calls=3)
        for inputs, outputs in ((shape.hidden, shape.vocabulary), (shape.vocabulary, shape.hidden)):
            self._product(work, inputs, outputs, rows=load.labels, kind=HEAD)
        work.spend(HEAD, 3 * load.labels * shape.vocabulary * shape.itemsize / self.rates.loss)
        self._stream(work, HEAD, 8 * shape.hidden, calls=6)
        work.spend(LORA, shape.adapter_elements * (_FP32 + shape.itemsize) / self.rates.cast)
        return work

    def _optimizer(self) -> _Work:
        work, trained = _Work(), self.shape.adapter_elements
        # Weight, gradient and moments read, weight and moments written; before, the gradient zeroed, read and scaled.
        work.spend(OPTIMIZER, trained * 7 * _FP32 / self.rates.optimizer)
        work.spend(OPTIMIZER, trained * 4 * _FP32 / self.rates.stream, calls=10)
        return work
