"""The floor of a training step: its matrix products without recomputation and its attention, each as fast as it goes.

In it, for every micro-batch at its own size: forward and input gradient of the seven linear layers of each decoder
layer and of the head, in the fastest of the layouts tried and there by the fastest algorithm (`kernels.matmul`), on
random-normal inputs of the base's compute dtype; and the fastest attention, forward and backward, on the micro-batch's
own `cu_seqlens`. The head takes the rows that have a label. The first layer's q, k and v need no input gradient, as the
embedding is frozen, and have none here. Not in it: weight gradients (the base is frozen), dequantisation, adapters,
norms, activations, loss and optimizer. Products in float32 run as the process has set them, in TF32 under
`train.tf32`.

The floor is of the slots that are computed: padding that goes through the model is in it, and of a beginning that
documents share (`Batch.prefix_of`) the one computation. So it falls with the step where a way of laying documents out
saves slots, and says how well those slots are computed, not how few they are.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig

from packloop.bench.steps import Lap, synchronize
from packloop.engine.batch import Micro
from packloop.engine.planner.shape import heads_of
from packloop.kernels.attention import SHARING, DocumentLayout, choose_backend, load_backend
from packloop.kernels.matmul import matmul

# Repeats of one product, after two to warm up, when layouts are compared.
REPEATS = 5


@dataclass(frozen=True)
class Group:
    """Linear layers that share an input: features in, features out of each."""

    name: str
    in_features: int
    out_features: tuple[int, ...]


def groups_of(config: LlamaConfig) -> list[Group]:
    """Of one decoder layer."""
    hidden, intermediate = config.hidden_size, config.intermediate_size
    heads, kv_heads, head_dim = heads_of(config)
    q_size, kv_size = heads * head_dim, kv_heads * head_dim
    return [
        Group("qkv", hidden, (q_size, kv_size, kv_size)),
        Group("o", q_size, (hidden,)),
        Group("gate_up", hidden, (intermediate, intermediate)),
        Group("down", intermediate, (hidden,)),
    ]


# A product of so many rows.
Run = Callable[[int], None]


@dataclass(frozen=True)
class Product:
    """The fastest way found for one group's forward or input gradient.

    ms: at the size that it was chosen at; run: takes the number of rows.
    """

    layout: str
    ms: float
    run: Run


class _Rows:
    """Random-normal rows [rows, columns] that grow to as many as are asked for."""

    def __init__(self, columns: int, dtype: torch.dtype, device: torch.device):
        self._values = torch.empty(0, columns, dtype=dtype, device=device)

    def __call__(self, num_rows: int) -> Tensor:
        if len(self._values) < num_rows:
            columns, dtype, device = self._values.shape[1], self._values.dtype, self._values.device
            del self._values  # its memory may serve what takes its place
            self._values = _normal((num_rows, columns), dtype, device)
        return self._values[:num_rows]


class Floor:
    """The products of micro-batches, ready to run, in the layouts that are fastest here for one of the given size.

    num_slots: rows of the decoder's products; num_labels: rows of the head's; dtype: of weights and activations. One
    layer's weights serve all layers: they are larger than any cache. Buffers grow with the largest micro-batch met.
    """

    def __init__(
        self, config: LlamaConfig, *, num_slots: int, num_labels: int, dtype: torch.dtype, device: torch.device
    ):
        self.config, self.dtype, self.device = config, dtype, device
        head = Group("head", config.hidden_size, (config.vocab_size,))
        rows = [(group, num_slots) for group in groups_of(config)] + [(head, num_labels)]
        self.products = {}
        for group, num_rows in rows:
            forwards, gradients = (make(group, dtype, device) for make in (_forwards, _input_gradients))
            self.products[f"{group.name} forward"] = self._fastest(forwards, num_rows)
            self.products[f"{group.name} input gradient"] = self._fastest(gradients, num_rows)
        self.attention: str | None = None
        self.why_attention = ""
        self._attention_inputs: list[Tensor] = []
        if device.type == "cuda":
            torch.cuda.empty_cache()  # of the layouts that lost

    @classmethod
    def of(cls, config: LlamaConfig, micros: list[Micro], dtype: torch.dtype, device: torch.device) -> Floor:
        """For steps like this one, in the layouts that are fastest at the first micro-batch's size."""
        num_slots, num_labels = _sizes(micros[0])
        return cls(config, num_slots=num_slots, num_labels=num_labels, dtype=dtype, device=device)

    def make_room(self, num_slots: int, num_labels: int) -> None:
        """Lets the buffers grow to these sizes now, before it is planned what other memory is spent on."""
        for name, product in self.products.items():
            product.run(num_labels if name.startswith("head") else num_slots)
        self._inputs(num_slots)

    def step_ms(self, micros: list[Micro]) -> float:
        """Wall time of all products and attention of one optimizer step of these micro-batches."""
        num_layers = self.config.num_hidden_layers
        if self.attention is None:
            self.attention, self.why_attention = self._choose_attention([micro.layout for micro in micros])
            self._all_micro_batches(micros, num_layers)
        else:
            # Of new sizes and layouts: buffers grow, products find their algorithms, attention prepares itself.
            self._all_micro_batches(micros, min(2, num_layers))
        synchronize()
        start = time.perf_counter()
        self._all_micro_batches(micros, num_layers)
        synchronize()
        return (time.perf_counter() - start) * 1e3

    def _choose_attention(self, layouts: list[DocumentLayout]) -> tuple[str, str]:
        shares = any(layout.prefix_of is not None for layout in layouts)
        return choose_backend(
            "auto",
            is_packed=any(layout.is_packed for layout in layouts),
            dtype=self.dtype,
            device=self.device,
            heads=heads_of(self.config),
            layout=layouts[0],
            among=SHARING if shares else None,
        )

    def _all_micro_batches(self, micros: list[Micro], num_layers: int) -> None:
        attend = load_backend(self.attention)
        run = {name: product.run for name, product in self.products.items()}
        for micro in micros:
            layout, (num_slots, num_labels) = micro.layout, _sizes(micro)
            q, k, v, d_out, *gradients = self._inputs(num_slots)
            scale = q.shape[-1] ** -0.5
            for index in range(num_layers):
                run["qkv forward"](num_slots)
                _, saved = attend.forward(q, k, v, layout, scale)
                for name in ("o", "gate_up", "down"):
                    run[f"{name} forward"](num_slots)
                for name in ("down", "gate_up", "o"):
                    run[f"{name} input gradient"](num_slots)
                attend.backward(saved, d_out, q, k, v, layout, scale, *gradients)
                if index > 0:
                    run["qkv input gradient"](num_slots)
            run["head forward"](num_labels)
            run["head input gradient"](num_labels)

    def _inputs(self, num_slots: int) -> list[Tensor]:
        """q, k, v, the output's gradient, and places for the gradients of q, k and v."""
        if not self._attention_inputs or len(self._attention_inputs[0]) < num_slots:
            heads, kv_heads, head_dim = heads_of(self.config)
            counts = (heads, kv_heads, kv_heads, heads)
            made = [_normal((num_slots, count, head_dim), self.dtype, self.device) for count in counts]
            self._attention_inputs = made + [torch.empty_like(x) for x in made[:3]]
        return [x[:num_slots] for x in self._attention_inputs]

    def _fastest(self, candidates: dict[str, Run], num_rows: int) -> Product:
        times = {name: _median_ms(run, num_rows) for name, run in candidates.items()}
        best = min(times, key=times.get)
        return Product(best, times[best], candidates[best])

    def report(self) -> dict:
        """What was chosen, and the milliseconds of each part alone."""
        return {
            "layouts": {name: product.layout for name, product in self.products.items()},
            "products_ms": {name: round(product.ms, 4) for name, product in self.products.items()},
            "attention": f"{self.attention}: {self.why_attention}",
        }


def _sizes(micro: Micro) -> tuple[int, int]:
    """(slots, rows of the head): a target that counts for several documents has one row."""
    return micro.layout.document_ids_BL.numel(), micro.batch.label_index.numel()


def _forwards(group: Group, dtype: torch.dtype, device: torch.device) -> dict[str, Run]:
    """y = x W^T with W stored [out, in] (NT) or [in, out] (NN), members joined to one product or split."""
    x = _Rows(group.in_features, dtype, device)
    candidates = {}
    for name, sizes in _splits(group).items():
        outs = [_Rows(size, dtype, device) for size in sizes]
        nt = [_normal((size, group.in_features), dtype, device).t() for size in sizes]
        nn = [_normal((group.in_features, size), dtype, device) for size in sizes]
        candidates[f"{name} NT"] = _products(x, nt, outs)
        candidates[f"{name} NN"] = _products(x, nn, outs)
    return candidates


def _products(x: _Rows, weights: list[Tensor], outs: list[_Rows]) -> Run:
    def run(num_rows: int) -> None:
        for weight, out in zip(weights, outs, strict=True):
            matmul(x(num_rows), weight, out=out(num_rows))

    return run


def _input_gradients(group: Group, dtype: torch.dtype, device: torch.device) -> dict[str, Run]:
    """dx = dy W with W stored [out, in] (NN) or [in, out] (NT), members joined, or split and summed in place."""
    dx = _Rows(group.in_features, dtype, device)
    candidates = {}
    for name, sizes in _splits(group).items():
        dys = [_Rows(size, dtype, device) for size in sizes]
        nn = [_normal((size, group.in_features), dtype, device) for size in sizes]
        nt = [_normal((group.in_features, size), dtype, device).t() for size in sizes]
        candidates[f"{name} NN"] = _summed_products(dys, nn, dx)
        candidates[f"{name} NT"] = _summed_products(dys, nt, dx)
    return candidates


def _summed_products(dys: list[_Rows], weights: list[Tensor], dx: _Rows) -> Run:
    def run(num_rows: int) -> None:
        out = dx(num_rows)
        matmul(dys[0](num_rows), weights[0], out=out)
        for dy, weight in zip(dys[1:], weights[1:], strict=True):
            torch.addmm(out, dy(num_rows), weight, out=out)

    return run


def _splits(group: Group) -> dict[str, tuple[int, ...]]:
    joined = {"joined": (sum(group.out_features),)}
    return joined | {"split": group.out_features} if len(group.out_features) > 1 else joined


def _normal(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(shape, dtype=dtype, device=device)


def _median_ms(run: Run, num_rows: int) -> float:
    laps = []
    for _ in range(REPEATS + 2):
        synchronize()
        start = time.perf_counter()
        run(num_rows)
        synchronize()
        laps.append((time.perf_counter() - start) * 1e3)
    return statistics.median(laps[2:])


def floor_figures(laps: list[Lap], floors_ms: list[float], floor: Floor, warmup: int) -> dict[str, Any]:
    """How much of a step is floor, from medians after `warmup`, and what the floor consists of."""
    step_ms = statistics.median(lap.ms for lap in laps[warmup:])
    floor_ms = statistics.median(floors_ms[warmup:])
    tokens = statistics.mean(lap.real_tokens for lap in laps[warmup:])
    return {
        "fraction_of_floor": floor_ms / step_ms,
        "floor_ms": floor_ms,
        "floor_ms_all": [round(ms, 3) for ms in floors_ms],
        "floor_real_tokens_per_s": tokens / floor_ms * 1e3,
        "floor": floor.report(),
    }
