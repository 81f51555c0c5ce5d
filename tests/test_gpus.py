"""The table of GPUs: names as drivers report and people type them, and the figures that are easy to get wrong."""

from __future__ import annotations

import re

import pytest

from packloop.errors import InputError
from packloop.gpus import GPUS, find_gpu, require_gpu


@pytest.mark.parametrize(
    ("name", "key", "tflops"),
    [
        ("NVIDIA A10G", "a10g", 70),  # not the A10's
        ("NVIDIA A10", "a10", 125),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb", 312),
        ("NVIDIA A100-PCIE-40GB", "a100-40gb", 312),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb", 312),
        ("NVIDIA A100 80GB PCIe", "a100-80gb-pcie", 312),
        ("NVIDIA H100 80GB HBM3", "h100", 989),
        ("NVIDIA H100 PCIe", "h100-pcie", 756),
        ("NVIDIA H200", "h200", 989),
        ("NVIDIA L4", "l4", 121),
        ("NVIDIA L40", "l40", 181),
        ("NVIDIA L40S", "l40s", 362),
        ("NVIDIA GeForce RTX 4090", "rtx-4090", 165.2),
        ("NVIDIA GeForce RTX 3090", "rtx-3090", 71),
        ("Tesla T4", "t4", None),
        ("a10g", "a10g", 70),
        ("A10G", "a10g", 70),
        ("H100", "h100", 989),
        ("a100", "a100-80gb", 312),
        ("RTX 4090", "rtx-4090", 165.2),
    ],
)
def test_names(name, key, tflops):
    gpu = find_gpu(name)
    assert (gpu.key, gpu.bf16_tflops) == (key, tflops)


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA H200 MIG 1g.18gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA H20",
        "cpu",
        "",
    ],
)
def test_what_is_not_the_gpu_itself_is_not_known(name):
    assert find_gpu(name) is None


def test_every_key_finds_its_own_row_and_memory_is_in_gib():
    for gpu in GPUS:
        assert find_gpu(gpu.key) is gpu
        sold_gb = re.search(r"(\d+)GB", gpu.pattern)
        if sold_gb:
            assert gpu.memory_gib < float(sold_gb[1])
        assert gpu.source


def test_a_user_s_unknown_gpu_is_refused_with_the_known_ones():
    with pytest.raises(InputError, match=r"GPU 'b1000' is not known; known: a10g, .*h200"):
        require_gpu("b1000")


def test_the_nearest_name_is_told_where_there_is_one():
    with pytest.raises(InputError, match=r"; the nearest is a100-80gb$"):
        require_gpu("a100-80g")
    with pytest.raises(InputError, match=r"v100$"):
        require_gpu("cpu")
