"""A training job small enough to run many times in a test: its rows, its configuration and what it left behind."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from forked import end
from tiny_run import run_config

from packloop.config import RunConfig

REPOSITORY = Path(__file__).resolve().parents[1]

# Wall time and what follows from it; every other field of metrics.jsonl is the same in two equal runs.
TIMING_FIELDS = ("step_ms", "slot_tokens_per_s", "real_tokens_per_s", "label_tokens_per_s", "peak_gib")

_THINGS = ("the tap", "a lamp", "the red bicycle", "my neighbour's cat", "the lift", "our bakery order", "rain")
_ACTS = ("leaks", "is gone since Monday", "needs paint", "was loud again last night and nobody came to look", "works")


def rows(num_rows: int) -> list[dict[str, str]]:
    """Instruction and response texts of quite different lengths, no two the same."""
    made = []
    for n in range(num_rows):
        thing, act = _THINGS[n % 7], _ACTS[(n // 3) % 5]
        body = " ".join(f"{thing} {act}." for _ in range(1 + n * n % 4))
        made.append({"instruction": f"Write note {n} on {thing}.", "response": f"Hello {n}, {body}"})
    return made


def write_rows(path: Path, num_rows: int = 23) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(num_rows)), encoding="utf-8")
    return path


def too_long() -> int:
    """Tokens for which eager attention's scores of the tiny model, 4 heads in fp32, need twice this host's memory."""
    return math.ceil(math.sqrt(2 * psutil.virtual_memory().total / (4 * 4)))


def small_config(base: Path, source: Path, run_dir: Path, **sections: dict) -> RunConfig:
    """An fp32 LoRA run of a few steps a second; `sections` change single settings."""
    values = {
        "model": {"quantization": "none"},
        "data": {
            "source": str(source),
            "template": {"prompt": "{instruction}\n", "response": "{response}"},
            "max_length": 96,
            "packing": "bfd",
        },
        "train": {
            "output_dir": str(run_dir),
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-2,
            "max_grad_norm": 1.0,
        },
        "log": {"every": 1000},
    }
    merged = {name: values.get(name, {}) | sections.get(name, {}) for name in {**values, **sections}}
    return run_config(base, run_dir, **merged)


def read_metrics(run_dir: Path, *, timing: bool = False) -> list[dict]:
    """The objects of metrics.jsonl, without the fields that depend on the clock."""
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    hidden = () if timing else TIMING_FIELDS
    return [{name: value for name, value in json.loads(line).items() if name not in hidden} for line in lines]


def read_steps(run_dir: Path) -> list[dict]:
    return [values for values in read_metrics(run_dir) if "loss" in values]


def tensors_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


def fork(function: Callable[[], object], log: Path) -> int:
    """The id of a process of its own that runs `function` and exits as the interpreter would; its output is in `log`.

    Forked, since importing torch and transformers anew would take most of a test's time.
    """

    def run() -> None:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        function()

    sys.stdout.flush()
    child = os.fork()
    if not child:
        end(run)
    return child


def wait(child: int) -> int:
    """The exit code of a forked process, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def wait_for_step(run_dir: Path, step: int, child: int, timeout: float = 60) -> None:
    """Until metrics.jsonl has that step. AssertionError where the process ends or the time is up before."""
    deadline = time.monotonic() + timeout
    while not (path := run_dir / "metrics.jsonl").exists() or path.read_bytes().count(b'"loss"') < step:
        assert os.waitpid(child, os.WNOHANG) == (0, 0), f"ended before step {step}"
        assert time.monotonic() < deadline, f"no step {step} after {timeout} s"
        time.sleep(0.002)


def run_ranks(script: Path, *arguments: str, num_ranks: int = 2, timeout: float = 240) -> subprocess.CompletedProcess:
    """`script` under torchrun in `num_ranks` processes on the CPU, which talk over gloo."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks), str(script)]
    # The package beside these tests, also where another copy of it is installed.
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
    return subprocess.run(
        [sys.executable, *launcher, *arguments], env=environment, capture_output=True, text=True, timeout=timeout
    )
