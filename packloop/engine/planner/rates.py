"""What share of a GPU's ceilings each kind of work reaches, and what that makes of a GPU in the table.

Most shares come from an H200 (`benchmarks/check_plan.py --calibrate`), in whole steps of Llama-2-7B, where its power
limit holds matrix products to about 690 TFLOP/s. For another GPU they are assumed to be the same: a projection. Only
attention is told apart: before Hopper the same kernels reach a larger share of a lower peak (FlashAttention-2 189 of an
A100's 312 TFLOP/s, Dao, arXiv:2307.08691, against about 250 of an H200's 989), and there PyTorch's attention is a copy
of FlashAttention-2, not cuDNN's. Chosen rather than calibrated: that factor, the rates of `flash_attn_4` and of `cudnn`
on long rows (from their kernels timed alone), and dequantisation in one launch (from a profile of one step).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from packloop.errors import InputError
from packloop.gpus import Gpu

_REFERENCE_TFLOPS, _REFERENCE_GB_PER_S = 989.0, 4800.0
_HOPPER = (9, 0)
# Share of their time for scores that attention's kernels need before Hopper, beside what a lower peak costs.
_BEFORE_HOPPER = 0.45


@dataclass(frozen=True)
class AttentionRate:
    """Forward and backward of one layer, RoPE included, on the H200.

    ns_per_element: for each slot and each feature of q, k, v and output; ns_per_score: for each pair of slots of a
    document and each head of 128 features. narrow: share of that for heads of 64. forward: share of both.
    """

    ns_per_element: float
    ns_per_score: float
    narrow: float
    forward: float


ATTENTION_RATES = {
    "document": AttentionRate(3.35e-3, 2.66e-3, narrow=0.85, forward=0.30),
    "flash_attn": AttentionRate(5.6e-3, 2.67e-3, narrow=0.575, forward=0.27),
    "varlen": AttentionRate(6.0e-3, 2.85e-3, narrow=0.60, forward=0.27),
    "flash_attn_4": AttentionRate(4.4e-3, 1.27e-3, narrow=0.6, forward=0.30),
    "sdpa": AttentionRate(4.5e-3, 1.75e-3, narrow=0.6, forward=0.25),
    "cudnn": AttentionRate(4.5e-3, 1.75e-3, narrow=0.6, forward=0.25),
}


@dataclass(frozen=True)
class Rates:
    """Of one GPU: FLOPs a millisecond and bytes a millisecond by kind of work, and times that no ceiling bounds.

    product: matrix products; stream: norms, activation, RoPE; thin: an adapter's products, one pass over a wide matrix;
    dropout: the same with a mask; dequantise; loss; optimizer; cast: adapters' copies; copy: strided ones.
    mask_ms_per_feature: of a masked projection's programs, each of which goes through all features.
    """

    product: float
    stream: float
    thin: float
    dropout_read: float
    dropout_update: float
    dequantise: float
    loss: float
    optimizer: float
    cast: float
    copy: float
    attention: dict[str, AttentionRate]
    mask_ms_per_feature: float = 1.85e-5
    # From the end of a kernel to the start of the next, and host time for each call; the host's is an x86 server's.
    gap_ms: float = 0.0025
    small_ms: float = 0.005
    call_ms: float = 0.072
    step_ms: float = 3.0


def rates_of(gpu: Gpu, itemsize: int = 2) -> Rates:
    """InputError for a GPU without a bf16 rate. itemsize 4: fp32 weights, whose products run in TF32 at half of it."""
    if gpu.bf16_tflops is None:
        raise InputError(f"GPU {gpu.key!r} has no bfloat16 ({gpu.source}); a GPU of compute capability 8.0 is needed")
    flops = gpu.bf16_tflops * 1e9 * (1.0 if itemsize == 2 else 0.5)
    moved = gpu.gb_per_s * 1e6
    return Rates(
        product=0.70 * flops,
        stream=0.88 * moved,
        thin=0.70 * moved,
        dropout_read=0.25 * moved,
        dropout_update=0.33 * moved,
        dequantise=0.63 * moved,
        loss=0.60 * moved,
        optimizer=0.50 * moved,
        cast=0.30 * moved,
        copy=0.48 * moved,
        attention=_attention_rates(gpu, flops, moved),
    )


def _attention_rates(gpu: Gpu, flops: float, moved: float) -> dict[str, AttentionRate]:
    rates = dict(ATTENTION_RATES)
    per_score = _REFERENCE_TFLOPS * 1e9 / flops
    if gpu.capability < _HOPPER:
        rates["sdpa"] = rates["flash_attn"]
        per_score *= _BEFORE_HOPPER
    per_element = _REFERENCE_GB_PER_S * 1e6 / moved
    return {
        name: replace(
            rate, ns_per_element=rate.ns_per_element * per_element, ns_per_score=rate.ns_per_score * per_score
        )
        for name, rate in rates.items()
    }
