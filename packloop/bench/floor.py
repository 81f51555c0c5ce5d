"""The floor of a training step: its matrix products without recomputation and its attention, each as fast as it goes.

In it, for every micro-batch: forward and input gradient of the seven linear layers of each decoder layer and of the
head, in the fastest of the layouts tried and there by the fastest algorithm (`kernels.matmul`), on random-normal
inputs of the base's compute dtype; and the fastest attention, forward and backward, on the micro-batch's own
`cu_seqlens`. The head takes the rows that have a label. The first layer's q, k and v need no input gradient, as the
embedding is frozen, and have none here. Not in it: weight gradients (the base is frozen), dequantisation, adapters,
norms, activations, loss and optimizer. Products in float32 run as the process has set them, in TF32 under
`train.tf32`.
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
from packloop.kernels.attention import DocumentLayout, choose_backend, load_backend
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
    head_dim = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    q_size, kv_size = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    return [
        Group("qkv", hidden, (q_size, kv_size, kv_size)),
        Group("o", q_size, (hidden,)),
        Group("gate_up", hidden, (intermediate, intermediate)),
        Group("down", intermediate, (hidden,)),
    ]


@dataclass(frozen=True)
class Product:
    """The fastest way found for one group's forward or input gradient."""

    layout: str
    ms: float
    run: Callable[[], None]


class Floor:
    """The products of one micro-batch size, ready to run, in the layouts that were fastest here.

    num_slots: rows of the decoder's products; num_labels: rows of the head's; dtype: of weights and activations. One
    layer's weights serve all layers: they are larger than any cache.
    """

    def __init__(
        self, config: LlamaConfig, *, num_slots: int, num_labels: int, dtype: torch.dtype, device: torch.device
    ):
        self.config, self.dtype, self.device = config, dtype, device
        head = Group("head", config.hidden_size, (config.vocab_size,))
        rows = [(group, num_slots) for group in groups_of(config)] + [(head, num_labels)]
        self.products = {}
        for group, num_rows in rows:
            forwards, gradients = (make(group, num_rows, dtype, device) for make in (_forwards, _input_gradients))
            self.products[f"{group.name} forward"] = self._fastest(forwards)
            self.products[f"{group.name} input gradient"] = self._fastest(gradients)
        self.attention: str | None = None
        self.why_attention = ""
        self._attention_inputs: list[Tensor] = []
        if device.type == "cuda":
            torch.cuda.empty_cache()  # of the layouts that lost

    @classmethod
    def of(cls, config: LlamaConfig, micros: list[Micro], dtype: torch.dtype, device: torch.device) -> Floor:
        """For steps like this one, with products of the first micro-batch's size."""
        first = micros[0].batch
        return cls(config, num_slots=first.num_slots, num_labels=first.num_label_tokens, dtype=dtype, device=device)

    def step_ms(self, layouts: list[DocumentLayout]) -> float:
        """Wall time of all products and attention of one optimizer step, whose micro-batches have these layouts."""
        if self.attention is None:
            self.attention, self.why_attention = self._choose_attention(layouts)
            self._all_micro_batches(layouts)
        self._inputs(max(layout.document_ids_BL.numel() for layout in layouts))
        synchronize()
        start = time.perf_counter()
        self._all_micro_batches(layouts)
        synchronize()
        return (time.perf_counter() - start) * 1e3

    def _choose_attention(self, layouts: list[DocumentLayout]) -> tuple[str, str]:
        return choose_backend(
            "auto",
            is_packed=any(layout.is_packed for layout in layouts),
            dtype=self.dtype,
            device=self.device,
            heads=self._heads,
            layout=layouts[0],
        )

    def _all_micro_batches(self, layouts: list[DocumentLayout]) -> None:
        attend = load_backend(self.attention)
        run = {name: product.run for name, product in self.products.items()}
        for layout in layouts:
            q, k, v, d_out, *gradients = self._inputs(layout.document_ids_BL.numel())
            scale = q.shape[-1] ** -0.5
            for index in range(self.config.num_hidden_layers):
                run["qkv forward"]()
                _, saved = attend.forward(q, k, v, layout, scale)
                for name in ("o", "gate_up", "down"):
                    run[f"{name} forward"]()
                for name in ("down", "gate_up", "o"):
                    run[f"{name} input gradient"]()
                attend.backward(saved, d_out, q, k, v, layout, scale, *gradients)
                if index > 0:
                    run["qkv input gradient"]()
            run["head forward"]()
            run["head input gradient"]()

    @property
    def _heads(self) -> tuple[int, int, int]:
        config = self.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return config.num_attention_heads, config.num_key_value_heads, head_dim

    def _inputs(self, num_slots: int) -> list[Tensor]:
        """q, k, v, the output's gradient, and places for the gradients of q, k and v."""
        if not self._attention_inputs or len(self._attention_inputs[0]) < num_slots:
            heads, kv_heads, head_dim = self._heads
            counts = (heads, kv_heads, kv_heads, heads)
            made = [_normal((num_slots, count, head_dim), self.dtype, self.device) for count in counts]
            self._attention_inputs = made + [torch.empty_like(x) for x in made[:3]]
        return [x[:num_slots] for x in self._attention_inputs]

    def _fastest(self, candidates: dict[str, Callable[[], None]]) -> Product:
        times = {name: _median_ms(run, self.device) for name, run in candidates.items()}
        best = min(times, key=times.get)
        return Product(best, times[best], candidates[best])

    def report(self) -> dict:
        """What was chosen, and the milliseconds of each part alone."""
        return {
            "layouts": {name: product.layout for name, product in self.products.items()},
            "products_ms": {name: round(product.ms, 4) for name, product in self.products.items()},
            "attention": f"{self.attention}: {self.why_attention}",
        }


def _forwards(group: Group, num_rows: int, dtype: torch.dtype, device: torch.device) -> dict[str, Callable[[], None]]:
    """y = x W^T with W stored [out, in] (NT) or [in, out] (NN), members joined to one product or split."""
    x = _normal((num_rows, group.in_features), dtype, device)
    candidates = {}
    for name, sizes in _splits(group).items():
        outs = [torch.empty(num_rows, size, dtype=dtype, device=device) for size in sizes]
        nt = [_normal((size, group.in_features), dtype, device).t() for size in sizes]
        nn = [_normal((group.in_features, size), dtype, device) for size in sizes]
        candidates[f"{name} NT"] = _products(x, nt, outs)
        candidates[f"{name} NN"] = _products(x, nn, outs)
    return candidates


def _products(x: Tensor, weights: list[Tensor], outs: list[Tensor]) -> Callable[[], None]:
    def run() -> None:
        for weight, out in zip(weights, outs, strict=True):
            matmul(x, weight, out=out)

    return run


def _input_gradients(
    group: Group, num_rows: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Callable[[], None]]:
    """dx = dy W with W stored [out, in] (NN) or [in, out] (NT), members joined, or split and summed in place."""
    dx = torch.empty(num_rows, group.in_features, dtype=dtype, device=device)
    candidates = {}
    for name, sizes in _splits(group).items():
        dys = [_normal((num_rows, size), dtype, device) for size in sizes]
        nn = [_normal((size, group.in_features), dtype, device) for size in sizes]
        nt = [_normal((group.in_features, size), dtype, device).t() for size in sizes]
        candidates[f"{name} NN"] = _summed_products(dys, nn, dx)
        candidates[f"{name} NT"] = _summed_products(dys, nt, dx)
    return candidates


def _summed_products(dys: list[Tensor], weights: list[Tensor], dx: Tensor) -> Callable[[], None]:
    def run() -> None:
        matmul(dys[0], weights[0], out=dx)
        for dy, weight in zip(dys[1:], weights[1:], strict=True):
            torch.addmm(dx, dy, weight, out=dx)

    return run


def _splits(group: Group) -> dict[str, tuple[int, ...]]:
    joined = {"joined": (sum(group.out_features),)}
    return joined | {"split": group.out_features} if len(group.out_features) > 1 else joined


def _normal(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(shape, dtype=dtype, device=device)


def _median_ms(run: Callable[[], None], device: torch.device) -> float:
    laps = []
    for _ in range(REPEATS + 2):
        synchronize()
        start = time.perf_counter()
        run()
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
