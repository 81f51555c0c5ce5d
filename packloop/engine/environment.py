"""The machine and the package versions of a run, for environment.json and for `packloop doctor`."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from typing import Any

import torch

from packloop import __version__

PACKAGES = (
    "packloop",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "bitsandbytes",
    "datasets",
    "tokenizers",
    "safetensors",
    "huggingface_hub",
    "flash-attn",
    "quack-kernels",
    "triton",
)


def describe_environment() -> dict[str, Any]:
    """What a run's numbers depend on: Python, torch, CUDA, GPUs, package versions (None where missing).

    Holds no environment variable and no name of a user, host or path. JSON-serialisable.
    """
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": {"threads": torch.get_num_threads(), "capability": torch.backends.cpu.get_cpu_capability()},
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.cuda.is_available() else None,
        "driver": driver_version(),
        "gpus": describe_gpus(),
        "packages": package_versions(),
    }


def package_versions() -> dict[str, str | None]:
    """Installed version of each of `PACKAGES`, from its metadata; nothing is imported for it."""
    return {name: package_version(name) for name in PACKAGES}


def package_version(name: str) -> str | None:
    if name == "packloop":  # run from a source tree it has no metadata
        return __version__
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def describe_gpus() -> list[dict[str, Any]]:
    """Name, compute capability ("9.0") and memory (GiB) of each visible GPU."""
    gpus = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        gpus.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
            }
        )
    return gpus


def driver_version() -> str | None:
    """The NVIDIA driver's version as nvidia-smi tells it; None where there is no driver."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.strip().partition("\n")[0] or None
