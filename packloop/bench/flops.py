"""Floating-point operations of a training step on a frozen base: what the mathematics needs, and what is executed.

Needed, a real token: 4 N (forward and input gradient of every linear layer; a frozen weight has no gradient of its
own), the head's 4 N for the rows that have a label, 6 for every adapter parameter (which has one), and causal attention
within each document: 12 x (pairs of query and key) x heads x head size, two products forward and four backward.

Executed: the same for slots, padding included, less the input gradient of the first layer's q, k and v, which nothing
waits for; the forward pass again of the layers that recompute; and attention as the backend does it. A fused kernel
computes the scores a second time in its backward pass (14 instead of 12 a pair), and `document`, whose gradients of
queries and of keys are two kernels, the scores and the probabilities' gradient twice there (18). `eager`, and `sdpa` on
packed documents, do not skip the pairs that their mask hides.

A beginning that documents of a micro-batch share (`Batch.prefix_of`) is needed by each of them, so it counts in each as
if the document were alone, with its targets; executed is the one computation that serves them all. What is executed can
therefore be less than what is needed, and model utilisation above hardware utilisation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from packloop.bench.results import Ceilings, Flops
from packloop.config import LoraConfig, RunConfig
from packloop.data.loader import Batch
from packloop.engine.planner.policy import count_layers
from packloop.engine.planner.shape import heads_of
from packloop.gpus import find_gpu

# Products of attention's backward pass: dP, dQ, dK, dV, and the scores where they were not kept.
_BACKWARD_PRODUCTS = {"eager": 4, "document": 7}


@dataclass(frozen=True)
class Work:
    """What some micro-batches hold, or an average step.

    real_tokens, label_tokens: of all documents, each counted whole. head_rows: rows that the head multiplies; pairs: of
    a query and a key not after it in the same document; visited_pairs: those that the attention multiplies, padding and
    what a mask hides included, pairs within a beginning that documents share once.
    """

    slots: float
    real_tokens: float
    label_tokens: float
    head_rows: float
    pairs: float
    visited_pairs: float

    def over(self, num_steps: int) -> Work:
        """Of an average one of so many steps."""
        return Work(**{name: count / num_steps for name, count in vars(self).items()})


def work_of(micros: Sequence[Batch], attention: str) -> Work:
    """As packloop works: the head multiplies the rows that have a label. attention: a value of kernels.attention."""
    return Work(
        slots=sum(micro.num_slots for micro in micros),
        real_tokens=sum(micro.num_real_tokens for micro in micros),
        label_tokens=sum(micro.num_label_tokens for micro in micros),
        head_rows=sum(micro.label_index.numel() for micro in micros),
        pairs=sum(_pairs_needed(micro) for micro in micros),
        visited_pairs=sum(_pairs_visited(micro, attention) for micro in micros),
    )


def linear_shapes(config: Any) -> dict[str, tuple[int, int]]:
    """(in, out) features of the linear layers of one decoder layer of a LlamaConfig."""
    hidden, intermediate = config.hidden_size, config.intermediate_size
    heads, kv_heads, head_dim = heads_of(config)
    q_size, kv_size = heads * head_dim, kv_heads * head_dim
    return {
        "q_proj": (hidden, q_size),
        "k_proj": (hidden, kv_size),
        "v_proj": (hidden, kv_size),
        "o_proj": (q_size, hidden),
        "gate_proj": (hidden, intermediate),
        "up_proj": (hidden, intermediate),
        "down_proj": (intermediate, hidden),
    }


def layer_parameters(config: Any) -> int:
    """Weights of the linear layers of one decoder layer."""
    return sum(rows * columns for rows, columns in linear_shapes(config).values())


def count_parameters(config: Any) -> int:
    """Of the whole base: linear layers, norms, embedding, and the head where it has weights of its own."""
    hidden, layers = config.hidden_size, config.num_hidden_layers
    tables = 1 if config.tie_word_embeddings else 2
    return layers * (layer_parameters(config) + 2 * hidden) + hidden + tables * config.vocab_size * hidden


def adapter_parameters(config: Any, lora: LoraConfig) -> int:
    """Weights of the adapters of one decoder layer."""
    return sum(lora.r * (rows + columns) for rows, columns in _adapted(config, lora).values())


def needed_flops(config: Any, lora: LoraConfig, work: Work) -> float:
    """What forward and backward of this work need."""
    layers = work.real_tokens * (4 * layer_parameters(config) + 6 * adapter_parameters(config, lora))
    attention = 12 * work.pairs * _attended_features(config)
    return config.num_hidden_layers * (layers + attention) + 4 * work.label_tokens * _head_parameters(config)


def executed_flops(config: Any, run: RunConfig, work: Work) -> float:
    """What forward and backward of this work execute as `run` does them, every `auto` of which is settled."""
    num_layers, slots = config.num_hidden_layers, work.slots
    shapes, adapters = linear_shapes(config), adapter_parameters(config, run.lora)
    layers = slots * (4 * layer_parameters(config) + 6 * adapters)
    forward_attention = 4 * work.visited_pairs * _attended_features(config)
    backward_attention = forward_attention * _BACKWARD_PRODUCTS.get(run.kernels.attention, 5) / 2
    again = slots * 2 * (layer_parameters(config) + adapters)
    if run.kernels.layer == "fused":  # ends before the last product, whose output nothing needs again
        again -= slots * 2 * shapes["down_proj"][0] * shapes["down_proj"][1]
        if "down_proj" in _adapted(config, run.lora):
            again -= slots * 2 * run.lora.r * shapes["down_proj"][1]
    recomputed = count_layers(run.train.gradient_checkpointing, num_layers)
    not_needed = slots * 2 * sum(shapes[name][0] * shapes[name][1] for name in ("q_proj", "k_proj", "v_proj"))
    return (
        num_layers * (layers + forward_attention + backward_attention)
        + recomputed * (again + forward_attention)
        + 4 * work.head_rows * _head_parameters(config)
        - not_needed
    )


def flop_figures(
    *, needed: float, executed: float, step_ms: float, device: str, dtype: str, ceilings: Ceilings | None
) -> Flops | None:
    """Rates and utilisation of a step of `step_ms` that needs and executes so many operations.

    device: the GPU's name. Its peak is the table's for bf16; for a GPU that is not in it, and for float32, the rate of
    matrix products measured here. None where that was not measured either.
    """
    peak = _peak(device, dtype, ceilings)
    if peak is None:
        return None
    peak_tflops, source = peak
    model_tflops, hardware_tflops = needed / step_ms / 1e9, executed / step_ms / 1e9
    return Flops(
        model_tflops=model_tflops,
        hardware_tflops=hardware_tflops,
        peak_tflops=peak_tflops,
        peak_source=source,
        model_utilisation=model_tflops / peak_tflops,
        hardware_utilisation=hardware_tflops / peak_tflops,
    )


def _peak(device: str, dtype: str, ceilings: Ceilings | None) -> tuple[float, str] | None:
    gpu = find_gpu(device)
    if gpu is not None and gpu.bf16_tflops is not None and dtype == "bfloat16":
        return gpu.bf16_tflops, gpu.source
    if ceilings is None:
        return None
    why = f"products in {dtype}" if gpu is not None else f"{device} is not in the table of GPUs"
    return ceilings.gemm_tflops, f"matrix products measured beside the steps, as {why}"


def _adapted(config: Any, lora: LoraConfig) -> dict[str, tuple[int, int]]:
    shapes = linear_shapes(config)
    names = shapes if lora.target_modules == "all-linear" else lora.target_modules
    return {name: shapes[name] for name in names}


def _attended_features(config: Any) -> int:
    return linear_shapes(config)["q_proj"][1]


def _head_parameters(config: Any) -> int:
    return config.hidden_size * config.vocab_size


def _pairs_needed(micro: Batch) -> int:
    """Pairs of a query and a key not after it in the same document, each document whole: no padding."""
    starts, lengths = micro.cu_seqlens[:-1].long(), torch.diff(micro.cu_seqlens.long())
    counts = micro.document_ids.flatten()[starts] >= 0
    if micro.prefix_of is not None:
        prefix = micro.prefix_of.long()
        counts[prefix[prefix >= 0]] = False  # it counts in the documents that begin with it
        lengths = lengths + _prefix_lengths(micro)
    lengths = lengths[counts]
    return int((lengths * (lengths + 1) // 2).sum())


def _pairs_visited(micro: Batch, attention: str) -> int:
    """Pairs that the backend multiplies."""
    is_packed = bool((micro.document_ids > 0).any())
    if attention == "eager" or (attention == "sdpa" and is_packed):
        rows, columns = micro.input_ids.shape
        return rows * columns * columns
    lengths = torch.diff(micro.cu_seqlens.long())
    return int((lengths * (lengths + 1) // 2 + lengths * _prefix_lengths(micro)).sum())


def _prefix_lengths(micro: Batch) -> Tensor:
    """int64 [D]: tokens of the beginning that each document shares and that lies elsewhere."""
    lengths = torch.diff(micro.cu_seqlens.long())
    if micro.prefix_of is None:
        return torch.zeros_like(lengths)
    prefix = micro.prefix_of.long()
    return lengths[prefix.clamp(min=0)].where(prefix >= 0, 0)
