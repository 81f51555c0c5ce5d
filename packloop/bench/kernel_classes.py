"""GPU kernels, and a CPU's operators, by what they are for, as far as their names tell; and the classes there are."""

from __future__ import annotations

ATTENTION = "attention"
DEQUANTISATION = "NF4 dequantisation"
BASE_GEMM = "base GEMM"
LORA = "LoRA"
NORMS = "norms"
ROPE = "RoPE"
ACTIVATION = "activation"
HEAD = "head + loss"
OPTIMIZER = "optimizer"
COPIES = "copies"
COLLECTIVES = "collectives"
OTHER = "other"
# In the order of tables and plots.
CLASSES = (
    BASE_GEMM,
    ATTENTION,
    DEQUANTISATION,
    LORA,
    NORMS,
    ROPE,
    ACTIVATION,
    HEAD,
    OPTIMIZER,
    COPIES,
    COLLECTIVES,
    OTHER,
)

# Name fragments that say for sure what a kernel is for, whoever launched it.
_NAMED = (
    (DEQUANTISATION, ("_nf4_dequantize", "kDequantize", "bitsandbytes::dequantize")),
    (COLLECTIVES, ("nccl", "c10d::")),
    (
        ATTENTION,
        ("document_attention", "flash", "fmha", "cudnn_generated", "cudnn::fusion", "FlashAttn", "scaled_dot_product"),
    ),
    (LORA, ("_project_kernel", "_add_input_gradient", "_weight_gradient_kernel", "_dropout_kernel", "_cast_many")),
    (ROPE, ("_rope_kernel",)),
    (NORMS, ("_rms_norm",)),
    (ACTIVATION, ("_swiglu",)),
    (HEAD, ("_cross_entropy_kernel",)),
    (OPTIMIZER, ("kOptimizer", "FusedAdam")),
)
# Fragments that say what a kernel does, which is what it is for where nothing tells more.
_GEMMS = (
    "gemm",
    "nvjet",
    "cutlass",
    "sm80_xmma",
    "sm90_xmma",
    "cublas",
    "splitK",
    "aten::mm",
    "packloop::mm",
    "packloop::gated",
    "aten::addmm",
    "aten::bmm",
    "aten::baddbmm",
    "aten::matmul",
    "aten::linear",
    "mkldnn",
)
_LIKELY = (
    (BASE_GEMM, _GEMMS),
    (ATTENTION, ("attention",)),
    (ACTIVATION, ("silu", "sigmoid")),
    (OPTIMIZER, ("multi_tensor_apply",)),
    (HEAD, ("logsumexp", "oftmax", "aten::scatter", "aten::gather", "scatter_gather", "index_select", "indexSelect")),
    (
        COPIES,
        ("Memcpy", "Memset", "copy", "aten::to", "fill", "Fill", "CatArray", "aten::cat", "aten::clone", "aten::zero"),
    ),
)


def _first_match(name: str, table: tuple[tuple[str, tuple[str, ...]], ...]) -> str | None:
    return next((label for label, parts in table if any(part in name for part in parts)), None)


def named_class(name: str) -> str | None:
    """The class of a kernel that is written for one purpose; None for one that serves several, such as a GEMM."""
    return _first_match(name, _NAMED)


def is_gemm(name: str) -> bool:
    """Whether the kernel or operator is a matrix product (attention's own kernels are not counted)."""
    return named_class(name) is None and any(part in name for part in _GEMMS)


def likely_class(name: str) -> str:
    """The class of a kernel by its name alone; every GEMM is taken for one with base weights, the unknown is other."""
    return named_class(name) or _first_match(name, _LIKELY) or OTHER
