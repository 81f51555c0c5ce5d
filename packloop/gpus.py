"""What the makers of GPUs say of them: bf16 rate, memory and its bandwidth. State of November 2026.

Rates are dense (no sparsity) with sums in fp32, at the boost clock of the datasheet: a ceiling, not a promise. A GPU
that is not listed is None; what needs its rate then measures one.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from packloop.errors import ConfigError


@dataclass(frozen=True)
class Gpu:
    """One model of GPU. key: what `--gpu` takes.

    pattern: full match of the name that the driver reports. bf16_tflops: None where the hardware has no bf16.
    memory_gib: total as CUDA reports it, to a tenth below, which is less than the decimal gigabytes it is sold with and
    varies a little with driver and error correction. source: where bf16_tflops and gb_per_s are printed.
    """

    key: str
    pattern: str
    capability: tuple[int, int]
    bf16_tflops: float | None
    memory_gib: float
    gb_per_s: float
    source: str


GPUS = (
    Gpu("a10g", r"A10G", (8, 6), 70.0, 22.0, 600, "NVIDIA A10G datasheet: 70 dense, not the A10's 125"),
    Gpu("a10", r"A10", (8, 6), 125.0, 22.0, 600, "NVIDIA A10 datasheet"),
    Gpu("a30", r"A30", (8, 0), 165.0, 23.5, 933, "NVIDIA A30 datasheet"),
    Gpu("a40", r"A40", (8, 6), 149.7, 44.3, 696, "NVIDIA A40 datasheet"),
    Gpu("a6000", r"RTX A6000", (8, 6), 154.8, 47.4, 768, "NVIDIA GA102 whitepaper"),
    Gpu("a100-40gb", r"A100-(SXM4|PCIE)-40GB", (8, 0), 312.0, 39.3, 1555, "NVIDIA A100 datasheet, 40 GB"),
    Gpu("a100-80gb-pcie", r"A100 80GB PCIe", (8, 0), 312.0, 79.1, 1935, "NVIDIA A100 datasheet, 80 GB PCIe"),
    Gpu("a100-80gb", r"A100-SXM4?-80GB", (8, 0), 312.0, 79.1, 2039, "NVIDIA A100 datasheet, 80 GB SXM"),
    Gpu("h100-pcie", r"H100 PCIe", (9, 0), 756.0, 79.1, 2000, "NVIDIA H100 datasheet, PCIe: half of the sparse 1,513"),
    Gpu("h100-nvl", r"H100 NVL", (9, 0), 835.0, 93.0, 3900, "NVIDIA H100 datasheet, NVL: half of the sparse 1,671"),
    Gpu("h100", r"H100 80GB HBM3", (9, 0), 989.0, 79.1, 3350, "NVIDIA H100 datasheet, SXM: half of the sparse 1,979"),
    Gpu("h200-nvl", r"H200 NVL", (9, 0), 835.0, 139.7, 4800, "NVIDIA H200 datasheet, NVL: half of the sparse 1,671"),
    Gpu("h200", r"H200", (9, 0), 989.0, 139.7, 4800, "NVIDIA H200 datasheet, SXM: half of the sparse 1,979"),
    Gpu("l4", r"L4", (8, 9), 121.0, 22.0, 300, "NVIDIA L4 datasheet: half of the sparse 242"),
    Gpu("l40", r"L40", (8, 9), 181.0, 44.3, 864, "NVIDIA L40 datasheet"),
    Gpu("l40s", r"L40S", (8, 9), 362.0, 44.3, 864, "NVIDIA L40S datasheet"),
    Gpu("rtx-3090", r"(GeForce )?RTX 3090", (8, 6), 71.0, 23.6, 936, "NVIDIA GA102 whitepaper, sums in fp32"),
    Gpu("rtx-4090", r"(GeForce )?RTX 4090", (8, 9), 165.2, 23.6, 1008, "NVIDIA Ada whitepaper, sums in fp32"),
    Gpu("rtx-5090", r"(GeForce )?RTX 5090", (12, 0), 209.5, 31.3, 1792, "NVIDIA Blackwell whitepaper, sums in fp32"),
    Gpu("t4", r"T4", (7, 5), None, 14.5, 320, "NVIDIA T4 datasheet; its tensor cores take fp16, not bf16"),
    Gpu(
        "v100",
        r"V100-SXM2-16GB",
        (7, 0),
        None,
        15.7,
        900,
        "NVIDIA V100 datasheet; its tensor cores take fp16, not bf16",
    ),
)
# What people say for the commonest of a family.
_ALIASES = {"a100": "a100-80gb", "a100-80gb-sxm": "a100-80gb", "h100-sxm": "h100", "h200-sxm": "h200"}


def find_gpu(name: str) -> Gpu | None:
    """The GPU that the driver calls `name`, for example "NVIDIA A10G"; or of that key. None where it is not listed.

    A slice of a GPU ("NVIDIA H200 MIG 1g.18gb"), a laptop's and an export variant are not the GPU itself, and None.
    """
    short = re.sub(r"^(NVIDIA|Tesla)\s+", "", name.strip())
    key = re.sub(r"[\s_]+", "-", short.lower())
    key = _ALIASES.get(key, key)
    return next((gpu for gpu in GPUS if key == gpu.key or re.fullmatch(gpu.pattern, short)), None)


def require_gpu(name: str) -> Gpu:
    """The same for a name that a user gave. ConfigError where it is not listed."""
    gpu = find_gpu(name)
    if gpu is None:
        keys = [gpu.key for gpu in GPUS]
        nearest = difflib.get_close_matches(name.strip().lower(), keys, n=1, cutoff=0.75)
        hint = f"; the nearest is {nearest[0]}" if nearest else ""
        raise ConfigError(f"GPU {name!r} is not known; known: {', '.join(keys)}{hint}")
    return gpu
