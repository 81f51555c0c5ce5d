"""GPU kernels by what they are for, told from their names; and how much of a time span any of them covers."""

from __future__ import annotations

# Name fragments of GPU kernels -> class, first match wins.
KERNEL_CLASSES = (
    ("nf4 dequantisation", ("_nf4_dequantize", "kDequantize")),
    ("attention", ("flash", "fmha", "attention", "cudnn_generated", "FlashAttn")),
    ("dropout + lora", ("_project_kernel", "_add_input_gradient", "_weight_gradient_kernel", "_dropout_kernel")),
    ("rope", ("_rope_kernel",)),
    ("norm", ("_rms_norm",)),
    ("activation", ("_swiglu", "silu")),
    ("optimizer", ("Optimizer", "optimizer", "adam")),
    ("gemm", ("gemm", "nvjet", "cutlass", "sm90_xmma", "cublas", "Kernel2", "splitK")),
    ("head + loss", ("logsumexp", "softmax", "scatter", "gather", "index")),
    ("copies", ("Memcpy", "Memset", "copy", "fill", "Fill", "CatArray")),
)


def classify(name: str) -> str:
    return next((label for label, parts in KERNEL_CLASSES if any(part in name for part in parts)), "other elementwise")


def union_ms(spans: list[tuple[float, float]]) -> float:
    """Milliseconds covered by any of the spans, which are in microseconds."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total / 1e3
