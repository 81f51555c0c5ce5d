"""`packloop doctor`: what this machine has, what a run would use on it and why, and what would make it better."""

from __future__ import annotations

from importlib import metadata

import torch
from packaging.requirements import Requirement
from rich.console import Group
from rich.table import Table
from rich.text import Text

from packloop.engine.environment import PACKAGES, describe_environment
from packloop.kernels.attention import choose_backend, usable_backends
from packloop.kernels.gated import why_not_quack

# Llama-2-7B's query heads, key/value heads and head dim: what `auto` is asked about.
_HEADS = (32, 32, 128)
_OPTIONAL = {
    "flash-attn": "optional: a faster attention on Ampere GPUs and newer",
    "quack-kernels": "optional: SwiGLU inside the products around it, on Hopper GPUs",
    "triton": "needed by the fused layers on a GPU",
}
_BFLOAT16_CAPABILITY = (8, 0)


def doctor_report() -> Group:
    """The report as something that rich prints, on a terminal or as plain text. Changes and downloads nothing."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    environment = describe_environment()
    advice = _advice(environment, device)
    return Group(
        _table("machine", _machine(environment)),
        _table("packages", _packages(environment["packages"])),
        _table("attention", _attention(device)),
        _table("training", _training(device)),
        Text("for better", style="bold"),
        Text("\n".join(f"- {line}" for line in advice) if advice else "nothing: this machine has all that helps"),
    )


def _machine(environment: dict) -> list[tuple[str, str]]:
    rows = [
        ("Python", environment["python"]),
        ("platform", f"{environment['platform']}, {environment['cpu']['threads']} threads"),
        ("torch", environment["torch"]),
        ("CUDA", environment["cuda"] or "this build of torch has none"),
        ("driver", environment["driver"] or "no NVIDIA driver found"),
    ]
    for number, gpu in enumerate(environment["gpus"]):
        rows.append(
            (f"GPU {number}", f"{gpu['name']}, compute capability {gpu['capability']}, {gpu['memory_gib']} GiB")
        )
    return rows if environment["gpus"] else [*rows, ("GPU", "none that torch can use")]


def _packages(versions: dict[str, str | None]) -> list[tuple[str, str]]:
    needed = {requirement.name.lower(): requirement for requirement in _requirements()}
    rows = []
    for name in PACKAGES:
        version, requirement = versions[name], needed.get(name.lower())
        text = version or f"missing ({_OPTIONAL.get(name, 'needed')})"
        if version and requirement and not requirement.specifier.contains(version, prereleases=True):
            text += f" (packloop is tested with {requirement.specifier})"
        rows.append((name, text))
    return rows


def _requirements() -> list[Requirement]:
    """What packloop asks for; [] where it runs from a source tree that is not installed."""
    try:
        lines = metadata.requires("packloop") or []
    except metadata.PackageNotFoundError:
        return []
    return [requirement for requirement in map(Requirement, lines) if requirement.marker is None]


def _attention(device: torch.device) -> list[tuple[str, str]]:
    rows = []
    for packing, is_packed in (("wrapped", False), ("bfd or none", True)):
        chosen, why = choose_backend("auto", is_packed=is_packed, dtype=torch.bfloat16, device=device, heads=_HEADS)
        if device.type == "cuda":
            why = "or what is faster on the run's own shape: auto times them before the first step"
        rows.append((f"data.packing={packing}", f"{chosen}: {why}"))
    for name, reason in usable_backends(
        is_packed=True, dtype=torch.bfloat16, device=device, head_dim=_HEADS[2]
    ).items():
        rows.append((name, "can be used" if reason is None else f"no, with packed documents: {reason}"))
    return rows


def _training(device: torch.device) -> list[tuple[str, str]]:
    if device.type == "cuda":
        optimizer = "paged_adamw_32bit of bitsandbytes: its state moves to host memory when the GPU's is short"
    else:
        optimizer = "AdamW of PyTorch, 32 bit: paging needs a GPU, and bitsandbytes' CPU path is not exact on resume"
    fault, no_gated = _nf4_fault(device), why_not_quack(device)
    return [
        ("optimizer", optimizer),
        ("NF4 weights", f"work on {device.type}" if fault is None else f"do not work on {device.type}: {fault}"),
        ("gated products", "can be used: kernels.gated=quack" if no_gated is None else f"no: quack {no_gated}"),
    ]


def _nf4_fault(device: torch.device) -> str | None:
    """None where a small matrix survives quantisation on the device, otherwise what bitsandbytes says."""
    try:
        import bitsandbytes.functional as bnb

        packed, state = bnb.quantize_4bit(torch.ones(64, 64, device=device), quant_type="nf4")
        expanded = bnb.dequantize_4bit(packed, state)
    except (ImportError, OSError, RuntimeError, NotImplementedError) as error:
        return " ".join(str(error).split())[:200]
    return None if torch.equal(expanded, torch.ones_like(expanded)) else "a matrix of ones comes back as another"


def _advice(environment: dict, device: torch.device) -> list[str]:
    advice = [
        f"install {name}: pip install {name}"
        for name, version in environment["packages"].items()
        if version is None and name not in _OPTIONAL
    ]
    if device.type != "cuda":
        if environment["driver"]:
            advice.append(
                f"there is an NVIDIA driver ({environment['driver']}) that torch {environment['torch']} cannot use: "
                "install a CUDA build of torch (https://pytorch.org/get-started/locally)"
            )
        else:
            advice.append("a GPU: a 7B model needs one; the bundled model and `make demo` do not")
        return advice
    if torch.cuda.get_device_capability(device) < _BFLOAT16_CAPABILITY:
        advice.append("this GPU has no bfloat16 units: set model.dtype=float32, or use compute capability 8.0 or newer")
    reasons = usable_backends(is_packed=True, dtype=torch.bfloat16, device=device, head_dim=_HEADS[2])
    advice += [f"{name}: {reason}" for name, reason in reasons.items() if reason and "install" in reason]
    if (reason := why_not_quack(device)) and "install" in reason:
        advice.append(f"kernels.gated: {reason}")
    if environment["packages"]["triton"] is None:
        advice.append("install triton, which the fused layers need: pip install triton")
    return advice


def _table(title: str, rows: list[tuple[str, str]]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(Text(name), Text(value))
    return table
