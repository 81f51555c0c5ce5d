"""What this GPU does in a second at each kind of work in a training step, measured one kind at a time.

Each measurement is a dictionary: kind, what it was done on, milliseconds, and the FLOPs and bytes that the work needs
at the least (each operand read once, each result written once).

Shapes: T slots, H features, O outputs, R ranks, V vocabulary.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig

from packloop.bench.floor import groups_of
from packloop.kernels.attention import DocumentLayout, time_backend, usable_backends
from packloop.kernels.dropout import (
    dropout_add_input_gradient_,
    dropout_project,
    dropout_weight_gradient,
    fits_fused_products,
)
from packloop.kernels.linear_cross_entropy import linear_cross_entropy
from packloop.kernels.nf4 import dequantize
from packloop.kernels.rms_norm import add_rms_norm_backward, add_rms_norm_forward
from packloop.kernels.rope import rope_
from packloop.kernels.swiglu import swiglu_backward, swiglu_forward

Measurement = dict[str, Any]
# Milliseconds that one lap lasts, long enough for clocks to settle under its load; the median of the laps counts.
_LAP_MS = 25.0
_LAPS = 3


def measure_kinds(
    config: LlamaConfig, *, slots: tuple[int, ...], ranks: tuple[int, ...], device: torch.device
) -> Iterator[Measurement]:
    """Every kind of work of a model of this shape at these numbers of slots, cheapest to wait for first."""
    largest = max(slots)
    yield from _copies(largest * config.hidden_size, device)
    for num_slots in slots:
        yield from _products(config, num_slots, device)
    for num_slots in (min(slots), largest):
        yield from _passes(config, num_slots, device)
        for num_ranks in ranks:
            yield from _adapter_products(config.hidden_size, num_slots, num_ranks, device)
    yield from _head(config, min(largest, 8192), device)
    yield from _dequantisation(config, device)
    yield from _optimizer(config, device)


def measure_attention(
    heads: tuple[int, int, int], *, num_slots: int, lengths: tuple[int, ...], device: torch.device
) -> Iterator[Measurement]:
    """Forward and backward, RoPE included, of each backend on documents of one length that fill the slots."""
    reasons = usable_backends(is_packed=True, dtype=torch.bfloat16, device=device, head_dim=heads[2])
    names = [name for name in ("document", "flash_attn", "varlen") if reasons[name] is None]
    for name in names:
        for length in (length for length in lengths if length <= num_slots):
            ms = time_backend(name, heads, _layout(num_slots, length, device), torch.bfloat16)
            yield {"kind": "attention", "backend": name, "heads": heads, "slots": num_slots, "length": length, "ms": ms}


def _layout(num_slots: int, length: int, device: torch.device) -> DocumentLayout:
    bounds = torch.arange(0, num_slots + 1, length, dtype=torch.int32)
    if bounds[-1] != num_slots:
        bounds = torch.cat([bounds, torch.tensor([num_slots], dtype=torch.int32)])
    document_ids = (torch.arange(num_slots, dtype=torch.int32) // length)[None]
    return DocumentLayout(document_ids.to(device), bounds.to(device), length, length < num_slots, bounds)


def _copies(num_elements: int, device: torch.device) -> Iterator[Measurement]:
    source, target = _normal((num_elements,), device), torch.empty(num_elements, dtype=torch.bfloat16, device=device)
    yield _measured({"kind": "copy"}, lambda: target.copy_(source), bytes=4 * num_elements)


def _products(config: LlamaConfig, num_slots: int, device: torch.device) -> Iterator[Measurement]:
    """y = x W^T and dx = dy W of each group of linear layers, as the fused layer calls them."""
    for group in groups_of(config):
        num_outputs = sum(group.out_features)
        x, dy = _normal((num_slots, group.in_features), device), _normal((num_slots, num_outputs), device)
        weight = _normal((num_outputs, group.in_features), device)
        y, dx = torch.empty_like(dy), torch.empty_like(x)
        flops = 2 * num_slots * num_outputs * group.in_features
        moved = 2 * (x.numel() + dy.numel() + weight.numel())
        what = {"group": group.name, "slots": num_slots, "in": group.in_features, "out": num_outputs}
        forward, backward = {"kind": "product", **what}, {"kind": "input gradient", **what}
        yield _measured(forward, partial(torch.mm, x, weight.T, out=y), flops=flops, bytes=moved)
        yield _measured(backward, partial(torch.mm, dy, weight, out=dx), flops=flops, bytes=moved)


def _passes(config: LlamaConfig, num_slots: int, device: torch.device) -> Iterator[Measurement]:
    """Norm, SwiGLU and RoPE, in bytes of the tensors they read and write."""
    hidden, intermediate = config.hidden_size, config.intermediate_size
    residual, update, total, normed = (_normal((num_slots, hidden), device) for _ in range(4))
    weight_H = torch.ones(hidden, dtype=torch.bfloat16, device=device)
    rstd_T = torch.ones(num_slots, device=device)
    norm = partial(add_rms_norm_forward, residual, update, weight_H, 1e-5, residual_out=total, normed_out=normed)
    norm_backward = partial(add_rms_norm_backward, normed, update, residual, weight_H, rstd_T, d_residual=total)
    what = {"slots": num_slots, "features": hidden}
    yield _measured({"kind": "norm", **what}, norm, bytes=8 * num_slots * hidden)
    yield _measured({"kind": "norm backward", **what}, norm_backward, bytes=8 * num_slots * hidden)

    gate, up, out, rebuilt = (_normal((num_slots, intermediate), device) for _ in range(4))
    backward = partial(swiglu_backward, out, gate, up, d_gate=gate, d_up=up)
    what, one = {"slots": num_slots, "features": intermediate}, 2 * num_slots * intermediate
    yield _measured({"kind": "swiglu", **what}, partial(swiglu_forward, gate, up, out=out), bytes=3 * one)
    yield _measured({"kind": "swiglu backward", **what}, backward, bytes=5 * one)
    rebuilding = partial(backward, hidden_out=rebuilt)
    yield _measured({"kind": "swiglu backward rebuilding", **what}, rebuilding, bytes=6 * one)

    head_dim = hidden // config.num_attention_heads
    q, k = _normal((num_slots, hidden), device), _normal((num_slots, config.num_key_value_heads * head_dim), device)
    tables = torch.randn(2, num_slots, head_dim // 2, device=device)
    turn = partial(rope_, q, k, *tables, torch.arange(num_slots, device=device))
    yield _measured({"kind": "rope", "slots": num_slots}, turn, bytes=4 * (q.numel() + k.numel()))


def _adapter_products(num_features: int, num_slots: int, num_ranks: int, device: torch.device) -> Iterator[Measurement]:
    """The four thin products of an adapter, and with a dropout mask the three that `dropout.py` does in its place."""
    x, dx = _normal((num_slots, num_features), device), _normal((num_slots, num_features), device)
    a_RH, projected = _normal((num_ranks, num_features), device), _normal((num_slots, num_ranks), device)
    out = torch.empty(num_slots, num_ranks, dtype=torch.bfloat16, device=device)
    what = {"slots": num_slots, "features": num_features, "ranks": num_ranks}
    flops, moved = 2 * num_slots * num_features * num_ranks, 2 * (x.numel() + out.numel())
    thin = {
        "project": (lambda: out.addmm_(x, a_RH.T, beta=0, alpha=0.25), moved),
        "adapter gradient": (lambda: _wide_product(projected.T, x), moved),
        "add product": (lambda: dx.addmm_(projected, a_RH), moved + 2 * x.numel()),
    }
    if fits_fused_products(x, num_ranks):
        thin |= {
            "project dropout": (lambda: dropout_project(x, a_RH, 0.1, 7, scale=0.25, out=out), moved),
            "adapter gradient dropout": (lambda: dropout_weight_gradient(projected, x, 0.1, 7), moved),
            "add product dropout": (
                lambda: dropout_add_input_gradient_(dx, projected, a_RH, 0.1, 7),
                moved + 2 * x.numel(),
            ),
        }
    for kind, (run, num_bytes) in thin.items():
        yield _measured({"kind": kind, **what}, run, flops=flops, bytes=num_bytes)


def _wide_product(left: Tensor, right: Tensor) -> Tensor:
    return torch.mm(left, right, out_dtype=torch.float32) if left.is_cuda else left.float() @ right.float()


def _head(config: LlamaConfig, num_slots: int, device: torch.device) -> Iterator[Measurement]:
    """Head and loss, forward and gradient, of every slot."""
    hidden_TH = _normal((num_slots, config.hidden_size), device).requires_grad_()
    weight_VH = _normal((config.vocab_size, config.hidden_size), device)
    index_N = torch.arange(num_slots, device=device)
    ids_N = torch.randint(config.vocab_size, (num_slots,), device=device)
    what = {"kind": "head", "slots": num_slots, "features": config.hidden_size, "vocabulary": config.vocab_size}
    flops = 4 * num_slots * config.hidden_size * config.vocab_size
    yield _measured(what, lambda: linear_cross_entropy(hidden_TH, weight_VH, index_N, ids_N), flops=flops, bytes=0)


def _dequantisation(config: LlamaConfig, device: torch.device) -> Iterator[Measurement]:
    import bitsandbytes as bnb

    for group in groups_of(config):
        shape = (group.out_features[0], group.in_features)
        weight = bnb.nn.Params4bit(
            _normal(shape, device), requires_grad=False, quant_type="nf4", compress_statistics=True
        )
        weight = weight.to(device)
        out = torch.empty(shape, dtype=torch.bfloat16, device=device)
        size = shape[0] * shape[1]
        what = {"kind": "dequantisation", "out": shape[0], "in": shape[1]}
        yield _measured(what, partial(dequantize, weight, out=out), bytes=int(2.516 * size))


def _optimizer(config: LlamaConfig, device: torch.device) -> Iterator[Measurement]:
    if device.type != "cuda":
        return
    import bitsandbytes as bnb

    weight = torch.nn.Parameter(torch.zeros(1024 * config.hidden_size * 16, device=device))
    weight.grad = torch.randn_like(weight)
    optimizer = bnb.optim.AdamW32bit([weight], lr=1e-4)
    optimizer.step()
    # Reads weight, gradient and moments; writes weight and moments.
    yield _measured({"kind": "optimizer", "elements": weight.numel()}, optimizer.step, bytes=28 * weight.numel())


def _normal(shape: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device=device)


def _measured(what: Measurement, run: Callable[[], Any], *, flops: int = 0, bytes: int) -> Measurement:
    return {**what, "ms": round(_milliseconds(run), 5), "flops": flops, "bytes": bytes}


def _milliseconds(run: Callable[[], Any]) -> float:
    """Of one call when they follow each other without a pause."""
    for _ in range(2):
        run()
    calls = max(1, min(200, int(_LAP_MS / max(_span_ms(run, 1), 1e-3))))
    return statistics.median(_span_ms(run, calls) / calls for _ in range(_LAPS))


def _span_ms(run: Callable[[], Any], calls: int) -> float:
    if not torch.cuda.is_available():
        begun = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - begun) * 1e3
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)
