"""What a micro-batch allocates and frees, in the order in which the fused layers' code does.

`micro_batch` lists the events of one forward and backward pass, layer by layer, for a plan. It follows
`kernels.decoder_layer`, `kernels.patch.FusedLayers` and `kernels.linear_cross_entropy` line by line: whoever changes
what those keep changes it here, and a test holds the two together. Tensors of a few kilobytes are left out.

Shapes: T slots, H hidden, I intermediate, A attended features, O outputs and R ranks of a group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple

from packloop.engine.planner.policy import MemoryPlan
from packloop.engine.planner.shape import GroupShape, ModelShape
from packloop.kernels.linear_cross_entropy import rows_per_chunk

Keeps = Literal["all", "products", "input"]
_FP32 = 4
# As `kernels.dropout`: programs that the adapters' gradient is split for, features and slots of one.
_GRADIENT_PROGRAMS, _GRADIENT_FEATURES, _GRADIENT_SLOTS = 256, 128, 64
_MAX_DROPOUT_RANKS = 256
# Backends that hold an fp32 sum of dq beside what they were given.
_SUMS_DQ = ("flash_attn", "varlen", "flash_attn_4", "sdpa", "cudnn")
_DIFFERENTIATED = ("sdpa", "cudnn", "eager")
# As `kernels.document_attention` in half precision: keys of a tile, rows and number of a shared beginning's parts.
_KEY_TILE, _ROWS_PER_PART, _MOST_PARTS = 64, 512, 128


class Event(NamedTuple):
    """An allocation (bytes > 0) or, of the same name, its end (bytes < 0). part: what the memory is for."""

    name: tuple
    bytes: int
    part: str


class Span(NamedTuple):
    """Bytes that a run of events leaves allocated, and the most that it had at once."""

    net: int
    peak: int


@dataclass(frozen=True)
class MicroBatch:
    """What of a micro-batch decides its memory. Not the labels: the head's buffers are as large for any number.

    prefix_tokens: of the beginning that its documents share, 0 where each has its own.
    """

    slots: int
    attention: str
    prefix_tokens: int = 0


class _Events:
    """Events of one piece, each tensor by a name; `layer` marks the names."""

    def __init__(self, layer: int = -1):
        self.layer, self.found, self._sizes = layer, [], {}

    def allocate(self, name: str, num_bytes: int, part: str = "working set", layer: int | None = None) -> None:
        key = (self.layer if layer is None else layer, name)
        size = -(-num_bytes // 512) * 512
        if size:
            self._sizes[key] = size, part
            self.found.append(Event(key, size, part))

    def free(self, *names: str) -> None:
        for name in names:
            if held := self._sizes.pop((self.layer, name), None):
                self.found.append(Event((self.layer, name), -held[0], held[1]))

    def release(self, name: str, num_bytes: int, part: str, layer: int) -> None:
        """Frees what another piece has allocated."""
        self.found.append(Event((layer, name), -(-(-num_bytes // 512) * 512), part))

    def holds(self, name: str) -> bool:
        return (self.layer, name) in self._sizes


class Step:
    """The pieces of a micro-batch's forward and backward pass for one shape."""

    def __init__(self, shape: ModelShape, micro: MicroBatch):
        self.shape, self.micro = shape, micro
        self._row = micro.slots * shape.itemsize  # bytes of one column
        self.layer_events = cache(self._layer_events)
        self.span = cache(self._span)

    def events(self, plan: MemoryPlan) -> Iterator[Event]:
        """All of them, in order."""
        for piece in self._pieces(plan):
            yield from self.layer_events(*piece)

    def peak_bytes(self, plan: MemoryPlan) -> int:
        """The most that the pass has allocated at once, beside what was there before."""
        held = peak = 0
        for kind, _, *rest in self._pieces(plan):
            # Layers of one policy differ in their names alone, but for the first and the last.
            span = self.span(kind, *rest)
            peak, held = max(peak, held + span.peak), held + span.net
        return peak

    def _pieces(self, plan: MemoryPlan) -> list[tuple]:
        """(direction, layer, keeps, keeps of the layer before, cached, first, last)."""
        last = self.shape.num_layers - 1
        keeps: list[Keeps] = [
            "input"
            if index < plan.recompute_layers
            else "all"
            if index > last - plan.keep_inputs_layers
            else "products"
            for index in range(last + 1)
        ]
        layers = [
            (index, keeps[index], keeps[index - 1] if index else None, index < plan.cached_layers, index == last)
            for index in range(last + 1)
        ]
        forward = [("forward", *layer) for layer in layers]
        backward = [("backward", *layer) for layer in reversed(layers)]
        return [*forward, ("head", last, keeps[last], None, False, True), *backward]

    def _span(self, kind: str, keeps: Keeps, before: Keeps | None, is_cached: bool, is_last: bool) -> Span:
        layer = 0 if before is None and kind != "head" else 1
        held = peak = 0
        for event in self.layer_events(kind, layer, keeps, before, is_cached, is_last):
            held += event.bytes
            peak = max(peak, held)
        return Span(held, peak)

    def _layer_events(
        self, kind: str, layer: int, keeps: Keeps, before: Keeps | None, is_cached: bool, is_last: bool
    ) -> list[Event]:
        events = _Events(layer)
        if kind == "head":
            self._head(events, keeps)
        elif kind == "forward":
            self._forward(events, keeps, before, is_cached)
        else:
            if keeps == "input":
                self._run_forward(events, keeps, is_cached, is_recomputed=True)
            else:
                self._adopt(events, keeps)
            self._backward(events, keeps, is_cached, is_first=before is None, is_last=is_last)
        return events.found

    def _weight(self, events: _Events, group: GroupShape, is_cached: bool) -> None:
        if self.shape.is_nf4 and not is_cached and not events.holds(f"weight {group.name}"):
            size = group.buffer_elements * self.shape.itemsize
            events.allocate(f"weight {group.name}", size, "dequantised weights")

    def _forward(self, events: _Events, keeps: Keeps, before: Keeps | None, is_cached: bool) -> None:
        if before is None:
            events.allocate("x1", self._row * self.shape.hidden, "activations")  # the embedding's output
        self._run_forward(events, keeps, is_cached, makes_x1=before is not None)
        if before is not None:  # what the loop over the layers held until now
            events.release("out", self._row * self.shape.hidden, "activations", events.layer - 1)
            if before == "input":
                events.release("x2", self._row * self.shape.hidden, "activations", events.layer - 1)

    def _run_forward(
        self, events: _Events, keeps: Keeps, is_cached: bool, *, makes_x1: bool = False, is_recomputed: bool = False
    ) -> None:
        shape, row = self.shape, self._row
        qkv, o, gate_up, down = shape.groups
        part = "working set" if keeps == "input" else "activations"
        keeps_inputs = keeps == "all"

        def linear(group: GroupShape, *, name: str, beside: int = 0, out_part: str = part, extended: bool) -> None:
            self._weight(events, group, is_cached)
            events.allocate(name, row * (group.num_outputs + beside), out_part)
            stays = keeps_inputs and not (shape.is_gated and group is down)
            if group.num_ranks and not (extended and group.extends and stays):
                events.allocate(f"projected {group.name}", row * group.num_ranks, part)
            if not is_recomputed:
                events.free(f"weight {group.name}")

        inputs_part = "inputs" if keeps_inputs else "working set"
        events.allocate("n1", row * (shape.hidden + qkv.spare), inputs_part)
        if makes_x1:
            events.allocate("x1", row * shape.hidden, "activations")
        events.allocate("rstd1", self.micro.slots * _FP32, part)
        linear(qkv, name="qkv", extended=True)
        if not (keeps_inputs and qkv.num_ranks):
            events.free("n1")
        self._attend(events, part)
        linear(o, name="o", out_part="working set", extended=self.micro.attention == "document")
        events.allocate("n2", row * (shape.hidden + gate_up.spare), inputs_part)
        events.allocate("x2", row * shape.hidden, "activations")
        events.allocate("rstd2", self.micro.slots * _FP32, part)
        events.free("o")
        width = shape.intermediate + (0 if is_recomputed else down.spare)
        if shape.is_gated:  # one product makes both
            self._weight(events, gate_up, is_cached)
            events.allocate("gate_up", row * (gate_up.num_outputs + gate_up.spare), part)
            events.allocate("hidden", row * width)
            if gate_up.num_ranks and not keeps_inputs:
                events.allocate("projected gate_up", row * gate_up.num_ranks, part)
            if not is_recomputed:
                events.free("weight gate_up")
        else:
            linear(gate_up, name="gate_up", beside=gate_up.spare, extended=True)
        if not (keeps_inputs and gate_up.num_ranks):
            events.free("n2")
        if not shape.is_gated and (down.num_ranks or not is_recomputed):
            events.allocate("hidden", row * width, "working set" if is_recomputed else inputs_part)
        if is_recomputed:
            if down.num_ranks:
                events.allocate("projected down", row * down.num_ranks)
            events.free("hidden")
            return
        linear(down, name="out", out_part="activations", extended=True)
        if shape.is_gated or not (keeps_inputs and down.num_ranks):
            events.free("hidden")
        if keeps == "input":
            events.free("rstd1", "qkv", "attended", "lse", "sdpa keys", "rstd2", "gate_up")
            events.free(*(f"projected {group.name}" for group in shape.groups))

    def _attend(self, events: _Events, part: str) -> None:
        shape, slots = self.shape, self.micro.slots
        spare = shape.group("o").spare if self.micro.attention == "document" else 0
        if self.micro.attention in _DIFFERENTIATED and shape.num_heads > shape.num_kv_heads:
            events.allocate("sdpa keys", 2 * self._row * shape.attended, part)
        events.allocate("attended", self._row * (shape.attended + spare), part)
        events.allocate("lse", slots * shape.num_heads * _FP32, part)

    def _adopt(self, events: _Events, keeps: Keeps) -> None:
        """What the layer's forward pass has left, to be freed by the names it has there."""
        self._run_forward(events, keeps, is_cached=True)
        events.free("out")
        events.found.clear()

    def _backward(self, events: _Events, keeps: Keeps, is_cached: bool, *, is_first: bool, is_last: bool) -> None:
        shape, row = self.shape, self._row
        qkv, o, gate_up, down = shape.groups

        def output_gradient(group: GroupShape, *, has_room: bool) -> None:
            if group.num_ranks and not has_room:
                events.allocate(f"d_projected {group.name}", row * group.num_ranks)

        def input_gradient(group: GroupShape, name: str) -> None:
            self._weight(events, group, is_cached)
            events.allocate(name, row * group.in_features)
            events.free(f"weight {group.name}")

        def a_gradient(group: GroupShape) -> None:
            if group.num_ranks and shape.dropout:
                events.allocate("partial", self._partial_bytes(group))
                events.free("partial")

        if shape.gates_backward:
            if is_last and down.spare:
                events.allocate("d_out", row * (shape.hidden + down.spare))
            self._weight(events, down, is_cached)
            events.allocate("hidden", row * shape.intermediate)
            events.free("weight down")
        else:
            output_gradient(down, has_room=down.extends and not is_last)
            input_gradient(down, "d_hidden")
            if down.num_ranks and not events.holds("hidden"):
                events.allocate("hidden", row * shape.intermediate)
        a_gradient(down)
        events.free("d_hidden", "hidden")
        output_gradient(gate_up, has_room=gate_up.extends)
        if shape.is_gated and gate_up.num_ranks:
            events.allocate("dB", gate_up.num_outputs * gate_up.num_ranks * _FP32)
            events.free("dB")
        input_gradient(gate_up, "d_n2")
        if not gate_up.extends:
            events.free("gate_up")  # else the projections' gradients lie in its spare columns
        self._input_of(events, gate_up, "n2")
        a_gradient(gate_up)
        events.free("gate_up", "d_projected gate_up")
        events.free("n2", "rebuilt rstd")
        if o.spare:
            events.allocate("d_x2", row * (shape.hidden + o.spare))
        output_gradient(o, has_room=o.extends)
        input_gradient(o, "d_attended")
        a_gradient(o)
        events.allocate("d_qkv", row * (qkv.num_outputs + qkv.spare))
        self._attend_backward(events)
        output_gradient(qkv, has_room=qkv.extends)
        self._input_of(events, qkv, "n1")
        a_gradient(qkv)
        events.free("n1", "rebuilt rstd")
        if not is_first:
            input_gradient(qkv, "d_n1")
        if not is_first and down.spare:  # the layer before receives its gradient with spare columns
            events.allocate("gradient", row * self._gradient_width, layer=events.layer - 1)
        events.free(*(f"weight {group.name}" for group in shape.groups))
        events.free("x2", "rstd1", "rstd2", "qkv", "attended", "lse", "sdpa keys", "d_x2", "d_attended", "d_qkv")
        events.free(*(f"{what} {group.name}" for what in ("projected", "d_projected") for group in shape.groups))
        events.free("d_n2", "d_out")
        events.free("d_n1")
        if not is_first and not down.spare:  # d_n1 under its new owner's name
            events.allocate("gradient", row * self._gradient_width, layer=events.layer - 1)
        width = shape.hidden if is_last else self._gradient_width
        events.release("gradient", row * width, "working set", events.layer)
        events.release("x1", row * shape.hidden, "activations", events.layer)

    @property
    def _gradient_width(self) -> int:
        """Columns of the buffer in which a layer leaves its input's gradient."""
        return self.shape.hidden + self.shape.group("down").spare

    def _input_of(self, events: _Events, group: GroupShape, name: str) -> None:
        if group.num_ranks and not events.holds(name):
            events.allocate(name, self._row * (self.shape.hidden + group.spare))
            events.allocate("rebuilt rstd", self.micro.slots * _FP32)

    def _attend_backward(self, events: _Events) -> None:
        shape, slots, attention = self.shape, self.micro.slots, self.micro.attention
        events.allocate("delta", slots * shape.num_heads * _FP32)
        if attention in _SUMS_DQ:
            events.allocate("dq sum", slots * shape.attended * _FP32)
        # Gradients that the backend makes anew: of all three, or of keys and values for every query head.
        made_anew = 3 if attention in ("varlen", *_DIFFERENTIATED) else 0
        if attention == "flash_attn" and shape.num_heads > shape.num_kv_heads:
            made_anew = 2
        events.allocate("dq, dk, dv", made_anew * self._row * shape.attended)
        events.allocate("parts of beginnings", self._parts_bytes())
        events.free("delta", "dq sum", "dq, dk, dv", "parts of beginnings")

    def _parts_bytes(self) -> int:
        """Gradients of a shared beginning's keys and values, a tile for each part of the rows that see them."""
        tiles = -(-self.micro.prefix_tokens // _KEY_TILE)
        rows = max(_ROWS_PER_PART, -(-tiles * self.micro.slots // _MOST_PARTS))
        parts = tiles * -(-self.micro.slots // rows)
        return parts * self.shape.num_kv_heads * 2 * _KEY_TILE * self.shape.head_dim * _FP32

    def _partial_bytes(self, group: GroupShape) -> int:
        """Partial sums of the gradient of A under dropout, and their total."""
        if group.num_ranks > _MAX_DROPOUT_RANKS:
            return self._row * group.in_features
        blocks = -(-group.in_features // _GRADIENT_FEATURES)
        splits = max(min(-(-_GRADIENT_PROGRAMS // blocks), self.micro.slots // (8 * _GRADIENT_SLOTS)), 1)
        return (splits + (splits > 1)) * group.num_ranks * group.in_features * _FP32

    def _head(self, events: _Events, keeps: Keeps) -> None:
        """Final norm, head and loss forward and backward, up to the last layer's gradient."""
        shape, row = self.shape, self._row
        hidden = row * shape.hidden
        for name in ("normed", "total"):
            events.allocate(name, hidden, "head")
        events.allocate("rstd", self.micro.slots * _FP32, "head")
        events.release("out", hidden, "activations", events.layer)
        if keeps == "input":
            events.release("x2", hidden, "activations", events.layer)
        events.allocate("d_hidden", hidden, "head")
        rows = min(rows_per_chunk(shape.vocabulary, shape.itemsize), self.micro.slots)
        events.allocate("chunk", rows * shape.hidden * shape.itemsize, "head")
        events.allocate("logits", rows * shape.vocabulary * shape.itemsize, "head")
        events.free("chunk", "logits", "normed")
        events.allocate("scaled", hidden, "head")
        events.free("d_hidden")
        events.allocate("gradient", hidden)
        events.free("scaled", "total", "rstd")
