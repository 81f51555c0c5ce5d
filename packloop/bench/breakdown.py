"""Where a step's time went: by phase and class of work, each part with its floor.

Phases: forward (head and loss with it, whose gradient is made there), recomputation (a layer's forward pass again, in
backward), backward, and update (gradient norm, optimizer, and what else lies outside of the loss and its gradient).

Floors: a part of matrix products takes at least its FLOPs / the rate measured for such products; a part that moves data
its bytes / the rate measured for a copy; a function that does both the larger of the two. FLOPs are those of the
products that ran, from their shapes in the trace; bytes count each operand once. Data that stays in a cache can beat
that floor.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from packloop.bench import kernel_classes as classes
from packloop.bench.labels import GROUP_PRODUCTS, INPUT_GRADIENT, LAYER, LOSS, NORM_FORWARD, Label
from packloop.bench.results import Ceilings, Record
from packloop.bench.trace import Range, Trace, Work, exclusive_ms

FORWARD, RECOMPUTATION, BACKWARD, UPDATE = "forward", "recomputation", "backward", "update"
PHASES = (FORWARD, RECOMPUTATION, BACKWARD, UPDATE)

# Operators that are one matrix product -> which of their operands it multiplies.
_PRODUCTS = {
    "aten::mm": (0, 1),
    "packloop::mm": (0, 1),
    "packloop::gated_forward": (0, 1),
    "packloop::gated_backward": (0, 1),
    "aten::addmm": (1, 2),
    "aten::addmm_": (1, 2),
    "aten::bmm": (0, 1),
    "aten::baddbmm": (1, 2),
    "aten::baddbmm_": (1, 2),
    "aten::_scaled_mm": (0, 1),
    "bitsandbytes::gemm_4bit": (0, 1),
}
_NF4_OPERATORS = {"bitsandbytes::dequantize_4bit": 0, "bitsandbytes::gemm_4bit": 1}
# Read and written a weight: half a byte and its share of the block scales, and two bytes of bf16.
_NF4_BYTES = 0.5 + 1 / 64 + 2
# For these a floor says nothing: they need not be there at all, or nobody knows what they are.
_WITHOUT_FLOOR = {classes.ATTENTION, classes.COPIES, classes.COLLECTIVES, classes.OTHER}


class Part(Record):
    """One class of work in one phase, an average step's. kernels: how many; floor_ms: None where there is none.

    joined_ms: of it, the share by FLOPs of products that are the base's and the adapters' in one.
    """

    phase: str
    cls: str
    ms: float
    kernels: float
    tflop: float
    floor_ms: float | None
    joined_ms: float


@dataclass
class Sums:
    """What one step spent on one class in one phase. work: (bytes, FLOPs) of each call that says its bytes."""

    ms: float = 0.0
    kernels: float = 0.0
    flops: float = 0.0
    joined_ms: float = 0.0
    moved: dict[int, float] = field(default_factory=dict)
    flops_of: dict[int, float] = field(default_factory=lambda: defaultdict(float))

    def floor_ms(self, ceilings: Ceilings) -> float | None:
        """The least that the ceilings allow; None where neither bytes nor FLOPs are known."""
        if not self.moved and not self.flops:
            return None
        seconds = sum(
            max(moved / (ceilings.copy_tb_per_s * 1e12), self.flops_of.get(call, 0.0) / (ceilings.gemm_tflops * 1e12))
            for call, moved in self.moved.items()
        )
        loose = self.flops - sum(self.flops_of[call] for call in self.moved if call in self.flops_of)
        return (seconds + loose / (ceilings.gemm_tflops * 1e12)) * 1e3


@dataclass
class Tally:
    """Milliseconds of what goes by one name, and how many of them there were."""

    ms: float = 0.0
    _members: set[int] = field(default_factory=set)

    @property
    def count(self) -> int:
        return len(self._members)

    def add(self, ms: float, member: object) -> None:
        """member: what the time belongs to; it counts once, and outlives the tally."""
        self.ms += ms
        self._members.add(id(member))


class StepBreakdown:
    """One profiled step.

    parts: (phase, class) -> sums. rebuilt_ms: of norms made again in backward because they were not kept.
    unattributed_ms: of kernels that could not be led back to the host. kernels: (name, class) -> those kernels; a
    product that is the base's and the adapters' in one is the base's here. products: (operator, shapes of its operands)
    -> those matrix products, however many kernels each took.
    """

    def __init__(self, trace: Trace):
        self._trace = trace
        self._labels = {id(one): label for one in trace.ranges if one.is_label and (label := Label.parse(one.name))}
        self.is_gpu = trace.is_gpu
        self.parts: dict[tuple[str, str], Sums] = defaultdict(Sums)
        self.kernels: dict[tuple[str, str], Tally] = defaultdict(Tally)
        self.products: dict[tuple[str, str], Tally] = defaultdict(Tally)
        self.rebuilt_ms = self.unattributed_ms = 0.0
        # One operator may launch several kernels, and one product be made of others: FLOPs count once.
        self._counted = {
            id(outer)
            for one in trace.ranges
            if one.name in _PRODUCTS and one.parent is not None
            for outer in one.parent.chain()
            if outer.name in _PRODUCTS
        }
        self._last_phase = UPDATE
        pieces = zip(trace.work, exclusive_ms(trace.work), strict=True)
        for piece, ms in sorted(pieces, key=lambda pair: pair[0].start):
            self._add(piece, ms)
        self._add_bytes()

    @property
    def busy_ms(self) -> float:
        return sum(sums.ms for sums in self.parts.values())

    def rescale(self, busy_ms: float) -> None:
        """Makes every time the share of `busy_ms` that it is of the busy time in the trace.

        While a trace is taken the GPU waits for the host, and may run at a higher clock than in a step without one.
        """
        factor = busy_ms / self.busy_ms if self.busy_ms else 1.0
        for sums in self.parts.values():
            sums.ms *= factor
            sums.joined_ms *= factor
        for tally in (*self.kernels.values(), *self.products.values()):
            tally.ms *= factor
        self.rebuilt_ms *= factor
        self.unattributed_ms *= factor

    def by_class_ms(self) -> dict[str, float]:
        totals: Counter[str] = Counter()
        for (_, cls), sums in self.parts.items():
            totals[cls] += sums.ms
        return {cls: totals[cls] for cls in classes.CLASSES if cls in totals}

    def by_phase_ms(self) -> dict[str, float]:
        totals: Counter[str] = Counter()
        for (phase, _), sums in self.parts.items():
            totals[phase] += sums.ms
        return {phase: totals[phase] for phase in PHASES if phase in totals}

    def _add(self, piece: Work, ms: float) -> None:
        # A kernel of which nobody knows the launch runs, as a rule, for what the one before it ran for.
        phase = self._phase(piece.by) if piece.by else self._last_phase
        cls, self._last_phase = self._class(piece), phase
        product = _product(piece.by)
        label = self._label(piece.by)
        flops = 0.0
        self.kernels[piece.name, cls].add(ms, piece)
        if product is not None:
            self.products[product.name, _operand_shapes(product)].add(ms, product)
        if product is not None and cls in (classes.BASE_GEMM, classes.LORA, classes.HEAD):
            flops = 0.0 if id(product) in self._counted else _flops(product)
            self._counted.add(id(product))
        share = label.lora_share if label is not None and product is not None else 0.0
        for part_cls, part in ((cls, 1 - share), (classes.LORA, share)):
            if part == 0.0:
                continue
            sums = self.parts[phase, part_cls]
            sums.ms += ms * part
            sums.kernels += part
            sums.flops += flops * part
            sums.joined_ms += ms * part if share else 0.0
            if owner := self._owner(piece.by, part_cls):
                sums.flops_of[owner] += flops * part
        if phase == BACKWARD and label is not None and label.what == NORM_FORWARD:
            self.rebuilt_ms += ms
        if piece.by is None:
            self.unattributed_ms += ms

    def _phase(self, by: Range | None) -> str:
        in_layer = False
        for one in by.chain() if by else ():
            if one.is_backward_node:
                return RECOMPUTATION if in_layer else BACKWARD
            label = self._labels.get(id(one))
            if label is not None and label.what == LOSS:
                return FORWARD
            in_layer = in_layer or (label is not None and label.what == LAYER)
        return UPDATE

    def _class(self, piece: Work) -> str:
        if (named := classes.named_class(piece.name)) is not None:
            return named
        product = _product(piece.by)
        for one in piece.by.chain() if piece.by else ():
            label = self._labels.get(id(one))
            if one.is_backward_node:
                if one.name.endswith("AccumulateGrad"):
                    return classes.LORA  # nothing else has gradients
                made_by = self._trace.made_by(one)
                label = self._label(made_by)
            elif label is None and one.is_operator and (named := classes.named_class(one.name)) is not None:
                return named
            if label is not None and label.cls is not None:
                return self._class_in(label, product, piece.name)
        likely = classes.likely_class(piece.name)
        if piece.by is not None and self._phase(piece.by) == UPDATE and likely != classes.COPIES:
            return classes.OPTIMIZER
        return likely

    @staticmethod
    def _class_in(label: Label, product: Range | None, name: str) -> str:
        if label.cls != classes.BASE_GEMM:
            return label.cls
        if product is None:
            return classes.likely_class(name)
        is_adapters = label.what == GROUP_PRODUCTS and product.name == "aten::addmm_"
        if label.what == INPUT_GRADIENT and label.ranks:
            is_adapters = _inner_dimension(product) == label.ranks
        return classes.LORA if is_adapters else classes.BASE_GEMM

    def _label(self, by: Range | None) -> Label | None:
        """The innermost label with a class around a range."""
        found = (self._labels.get(id(one)) for one in (by.chain() if by else ()))
        return next((label for label in found if label is not None and label.cls is not None), None)

    def _owner(self, by: Range | None, cls: str) -> int | None:
        """The outermost call around a range that says the bytes of that class."""
        owners = [id(one) for one, moved in self._calls(by) if self._labels[id(one)].cls == cls and moved]
        return owners[-1] if owners else None

    def _calls(self, by: Range | None) -> Iterator[tuple[Range, int]]:
        for one in by.chain() if by else ():
            if one.is_backward_node:
                return
            label = self._labels.get(id(one))
            if label is not None and label.cls is not None:
                yield one, label.moved_bytes

    def _add_bytes(self) -> None:
        for one in self._trace.ranges:
            label = self._labels.get(id(one))
            if label is not None and label.moved_bytes and label.cls and self._owner(one, label.cls) == id(one):
                self._moved(one, label.cls, label.moved_bytes)
            elif one.name in _NF4_OPERATORS and not self._is_counted(one):
                dims = one.args.get("Input Dims") or []
                packed = dims[_NF4_OPERATORS[one.name]] if len(dims) > _NF4_OPERATORS[one.name] else []
                if packed:
                    self._moved(one, classes.DEQUANTISATION, 2 * math.prod(packed) * _NF4_BYTES)
            elif one.is_backward_node and (made_by := self._trace.made_by(one)) is not None:
                self._add_backward_bytes(made_by)

    def _is_counted(self, operator: Range) -> bool:
        """Whether a label, or an operator around this one, stands for the same dequantisation."""
        outer = operator.parent.chain() if operator.parent else ()
        return self._owner(operator, classes.DEQUANTISATION) is not None or any(
            one.name in _NF4_OPERATORS for one in outer
        )

    def _add_backward_bytes(self, made_by: Range) -> None:
        for one, _ in self._calls(made_by):
            label = self._labels[id(one)]
            if label.backward_bytes:
                self.parts[BACKWARD, label.cls].moved[id(one)] = label.backward_bytes
            return

    def _moved(self, one: Range, cls: str, moved: float) -> None:
        self.parts[self._phase(one), cls].moved[id(one)] = moved


def average_parts(
    steps: list[StepBreakdown], ceilings: Ceilings | None, attention_floor_ms: dict[str, float] | None
) -> list[Part]:
    """The mean of profiled steps, phase by phase in the order of classes. attention_floor_ms: by phase."""
    parts = []
    for phase in PHASES:
        for cls in classes.CLASSES:
            found = [step.parts[phase, cls] for step in steps if (phase, cls) in step.parts]
            if not any(sums.ms for sums in found):
                continue
            floor_ms = None
            if cls == classes.ATTENTION and attention_floor_ms is not None:
                floor_ms = attention_floor_ms.get(phase)
            elif ceilings is not None and cls not in _WITHOUT_FLOOR:
                floors = [sums.floor_ms(ceilings) for sums in found]
                floor_ms = None if None in floors else sum(floors) / len(steps)
            parts.append(
                Part(
                    phase=phase,
                    cls=cls,
                    ms=sum(sums.ms for sums in found) / len(steps),
                    kernels=sum(sums.kernels for sums in found) / len(steps),
                    tflop=sum(sums.flops for sums in found) / len(steps) / 1e12,
                    floor_ms=floor_ms,
                    joined_ms=sum(sums.joined_ms for sums in found) / len(steps),
                )
            )
    return parts


def unknown_kernels(steps: list[StepBreakdown]) -> list[tuple[str, float, float]]:
    """(name, ms, count) in an average step of everything that is `other`, the longest first."""
    totals: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for step in steps:
        for (name, cls), tally in step.kernels.items():
            if cls == classes.OTHER:
                totals[name][0] += tally.ms / len(steps)
                totals[name][1] += tally.count / len(steps)
    return sorted(((name, ms, count) for name, (ms, count) in totals.items()), key=lambda item: -item[1])


def _product(by: Range | None) -> Range | None:
    """The matrix product that a range is, or is part of."""
    for one in by.chain() if by else ():
        if one.is_backward_node or one.is_label:
            return None
        if one.name in _PRODUCTS:
            return one
    return None


def _inner_dimension(product: Range) -> int | None:
    dims = product.args.get("Input Dims") or []
    left = _PRODUCTS[product.name][0]
    return dims[left][-1] if len(dims) > left and dims[left] else None


def _operand_shapes(product: Range) -> str:
    dims = product.args.get("Input Dims") or []
    return " x ".join(str(dims[operand]) for operand in _PRODUCTS[product.name] if operand < len(dims))


def _flops(product: Range) -> float:
    """2 m k n of the operands' recorded shapes; 0 where there are none."""
    dims = product.args.get("Input Dims") or []
    left, right = _PRODUCTS[product.name]
    if len(dims) <= right or len(dims[left]) < 2 or len(dims[right]) < 2:
        return 0.0
    if product.name == "bitsandbytes::gemm_4bit":
        return 4.0 * math.prod(dims[left][:-1]) * math.prod(dims[right])  # two weights share a byte
    return 2.0 * math.prod(dims[left]) * dims[right][-1]
