"""What a figure depends on beside its settings: device, clocks, power, versions, commit, date; no host or path."""

from __future__ import annotations

import datetime
import subprocess
from collections.abc import Iterable
from pathlib import Path

import torch

from packloop.bench.results import Conditions, GpuState
from packloop.engine.environment import describe_environment, package_version

_STATE_FIELDS = {
    "sm_clock_mhz": "clocks.sm",
    "memory_clock_mhz": "clocks.mem",
    "power_w": "power.draw",
    "power_limit_w": "power.limit",
    "temperature_c": "temperature.gpu",
}


def gpu_state() -> GpuState | None:
    """Clocks, power and temperature of torch's current GPU now; None without one, or where nvidia-smi cannot tell."""
    if not torch.cuda.is_available():
        return None
    uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
    answer = _output(
        [
            "nvidia-smi",
            f"--id=GPU-{uuid}",
            f"--query-gpu={','.join(_STATE_FIELDS.values())}",
            "--format=csv,noheader,nounits",
        ]
    )
    return None if answer is None else parse_state(answer)


def parse_state(line: str) -> GpuState:
    """One line of nvidia-smi's answer; a field that it does not know ("[N/A]") is None."""
    values = [_number(text) for text in line.split(",")]
    return GpuState(**dict(zip(_STATE_FIELDS, values, strict=True)))


def describe_conditions(
    before: GpuState | None, after: GpuState | None, *, packages: Iterable[str] = (), commit: str | None = None
) -> Conditions:
    """Of this process. before, after: `gpu_state` around what was timed. packages: others whose versions matter.

    commit: named where this is no git checkout; in one, git's own answer is taken.
    """
    environment = describe_environment()
    versions = {"torch": environment["torch"], **environment["packages"]}
    versions |= {name: package_version(name) for name in packages}
    if environment["gpus"]:
        gpu = environment["gpus"][torch.cuda.current_device()]
        device, memory_gib = gpu["name"], gpu["memory_gib"]
    else:
        cpu = environment["cpu"]
        device, memory_gib = f"CPU, {cpu['capability']}, {cpu['threads']} threads", None
    found, changed = source_state()
    return Conditions(
        device=device,
        device_memory_gib=memory_gib,
        driver=environment["driver"],
        cuda=environment["cuda"],
        python=environment["python"],
        before=before,
        after=after,
        versions={name: version for name, version in versions.items() if version is not None},
        commit=found or commit,
        uncommitted_changes=changed,
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
    )


def source_state() -> tuple[str | None, bool | None]:
    """(commit, whether tracked files differ from it) of the checkout that packloop runs from; None outside of one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None, None  # installed: a repository further up is another project's
    commit = _output(["git", "-C", str(root), "rev-parse", "HEAD"])
    changes = _output(["git", "-C", str(root), "status", "--porcelain", "--untracked-files=no"])
    return commit or None, None if changes is None else bool(changes)


def _output(command: list[str]) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
