"""The main job from a checkpoint on disk to a merged model, every phase through the command line, timed.

    python benchmarks/main_job.py --work DIR --tokenizer DIR --data alpaca_800.json --output RESULT.json

Saves a random-weight checkpoint of a named shape, then trains `recipes/llama2-7b-dolly.yaml` on it for 20 steps with
overrides only, resumes from step 10 in a fresh directory and compares, generates, and merges into the original weights.
The work directory needs twice the size of the checkpoint (28 GB for llama2-7b). Rates are medians over the steps after
the first three.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "recipes" / "llama2-7b-dolly.yaml"
NUM_STEPS = 20
RESUME_STEP = 10
WARMUP_STEPS = 3


class Phases:
    """Runs commands one after the other, in processes of their own, and keeps each one's seconds."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        # The package beside this script, whether or not one is installed.
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        self._environment = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}

    def packloop(self, name: str, *arguments: object) -> str:
        """Standard output of a packloop command; SystemExit where it fails."""
        return self.python(name, "-c", "from packloop.cli import main; main()", *arguments)

    def python(self, name: str, *arguments: object) -> str:
        print(f"== {name}", flush=True)
        start = time.perf_counter()
        result = subprocess.run(
            [sys.executable, *map(str, arguments)], env=self._environment, stdout=subprocess.PIPE, text=True
        )
        self.seconds[name] = time.perf_counter() - start
        print(result.stdout, end="", flush=True)
        if result.returncode != 0:
            sys.exit(f"{name} failed with exit code {result.returncode}")
        return result.stdout


def main() -> None:
    arguments = parse_arguments()
    work: Path = arguments.work
    base, run, resumed, merged = (work / name for name in ("base", "run", "resumed", "merged"))
    phases = Phases()
    phases.python(
        "checkpoint", "-m", "benchmarks.peers.shapes", arguments.shape, base, "--tokenizer", arguments.tokenizer
    )
    overrides = [
        f"model.name_or_path={base}",
        f"data.source={arguments.data}",
        "data.columns={response: output}",
        f"train.max_steps={NUM_STEPS}",
        f"checkpoint.every={RESUME_STEP}",
        *arguments.override,
    ]
    phases.packloop("train", "train", RECIPE, *overrides, f"train.output_dir={run}")
    checkpoint = run / "checkpoints" / f"step-{RESUME_STEP:06d}"
    phases.packloop("resume", "train", RECIPE, *overrides, f"train.output_dir={resumed}", "--resume", checkpoint)
    shown = phases.packloop("generate", "generate", run, "--sample", 2, "--max-new-tokens", 20)
    assert shown.count("] generated\n") == 2, "two rows were asked for"
    phases.packloop("merge", "merge", run, "--output", merged, "--base", "original")

    steps = read_steps(run)
    environment = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    result = {
        "job": "recipes/llama2-7b-dolly.yaml, overrides only, random weights",
        "shape": arguments.shape,
        "dtype": "bfloat16",
        "commit": arguments.commit or git_commit(),
        "environment": environment,
        "overrides": [public(override, work) for override in overrides],
        "kernels": chosen_kernels(run),
        "train": summarise(steps),
        "resume": compare_runs(steps, read_steps(resumed), run, resumed),
        "merge": check_merged(base, run, merged),
        "seconds": {name: round(value, 1) for name, value in phases.seconds.items()},
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print_table(result, arguments.output)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="empty or missing directory for models and runs")
    parser.add_argument("--tokenizer", required=True, help="directory of the Llama 2 tokenizer")
    parser.add_argument("--data", required=True, help="rows with the columns instruction and output")
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the figures")
    parser.add_argument("--shape", default="llama2-7b", help="a shape that packloop/bench/synthetic.py knows")
    parser.add_argument("--override", action="append", default=[], metavar="KEY=VALUE", help="a further setting")
    parser.add_argument("--commit", help="commit to name in the result where this is no git repository")
    arguments = parser.parse_args()
    if arguments.work.exists() and any(arguments.work.iterdir()):
        parser.error(f"--work {arguments.work} is not empty")
    return arguments


def read_steps(run: Path) -> list[dict]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [values for values in map(json.loads, lines) if "loss" in values]


def summarise(steps: list[dict]) -> dict:
    """Median rates and step times with their range, over the steps after the warm-up; peak memory of all steps."""
    timed = steps[WARMUP_STEPS:]
    peaks = [step["peak_gib"] for step in steps if step["peak_gib"] is not None]
    result = {"steps": len(steps), "warmup_steps": WARMUP_STEPS, "losses": [step["loss"] for step in steps]}
    for name in ("real_tokens_per_s", "slot_tokens_per_s", "label_tokens_per_s", "step_ms"):
        values = [step[name] for step in timed]
        result[name] = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    result["tokens_a_step"] = {
        name: statistics.median(step[name] for step in timed) for name in ("real_tokens", "slot_tokens", "label_tokens")
    }
    result["peak_gib"] = max(peaks, default=None)
    return result


def compare_runs(steps: list[dict], resumed_steps: list[dict], run: Path, resumed: Path) -> dict:
    """Largest differences of losses and of final adapter weights between the runs; AssertionError for other steps."""
    from safetensors.numpy import load_file

    expected = steps[RESUME_STEP:]
    assert [step["step"] for step in resumed_steps] == [step["step"] for step in expected]
    same_work = all(
        a[name] == b[name]
        for a, b in zip(expected, resumed_steps)
        for name in ("learning_rate", "real_tokens", "slot_tokens", "label_tokens")
    )
    assert same_work, "the resumed run took other tokens or other learning rates"
    adapter, resumed_adapter = (load_file(path / "adapter_model.safetensors") for path in (run, resumed))
    assert adapter.keys() == resumed_adapter.keys()
    return {
        "from_step": RESUME_STEP,
        "max_loss_difference": max(abs(a["loss"] - b["loss"]) for a, b in zip(expected, resumed_steps)),
        "max_adapter_difference": max(float(abs(adapter[name] - resumed_adapter[name]).max()) for name in adapter),
        "max_adapter_weight": max(float(abs(weight).max()) for weight in adapter.values()),
    }


def check_merged(base: Path, run: Path, merged: Path) -> dict:
    """Every weight of the base is in the merged index in its shape; layer 0 is recomputed. AssertionError otherwise."""
    import torch
    from safetensors import safe_open

    config = json.loads((merged / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "llama"
    assert config["dtype"] == "bfloat16"  # as the recipe's model.dtype
    shapes = {}
    for directory in (base, merged):
        found = shapes[directory] = {}
        for file in weight_files(directory):
            with safe_open(file, framework="pt") as handle:
                names = handle.keys()
                found.update({name: tuple(handle.get_slice(name).get_shape()) for name in names})
    assert shapes[base] == shapes[merged]

    adapter_config = json.loads((run / "adapter_config.json").read_text(encoding="utf-8"))
    scale = adapter_config["lora_alpha"] / adapter_config["r"]
    attention = "model.layers.0.self_attn"
    with safe_open(run / "adapter_model.safetensors", framework="pt") as handle:
        a, b = (handle.get_tensor(f"base_model.model.{attention}.q_proj.lora_{ab}.weight") for ab in "AB")
    before, after = (read_weight(directory, f"{attention}.q_proj.weight") for directory in (base, merged))
    # One rounding to bf16, of at most half a unit in the last of its 8 bits.
    torch.testing.assert_close(after.float(), before.float() + scale * (b @ a), rtol=2**-8, atol=1e-6)
    assert not torch.equal(after, before)
    untouched = f"{attention}.k_proj.weight"
    assert torch.equal(read_weight(base, untouched), read_weight(merged, untouched))
    return {
        "weights": len(shapes[merged]),
        "parameters": sum(math.prod(shape) for shape in shapes[merged].values()),
        "shards": len(weight_files(merged)),
        "gib": sum(file.stat().st_size for file in weight_files(merged)) / 2**30,
    }


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files that the directory's index names, or its only one."""
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        return [directory / "model.safetensors"]
    return [directory / file for file in sorted(set(json.loads(index.read_text())["weight_map"].values()))]


def read_weight(directory: Path, name: str):
    from safetensors import safe_open

    for file in weight_files(directory):
        with safe_open(file, framework="pt") as handle:
            if name in set(handle.keys()):
                return handle.get_tensor(name)
    raise KeyError(name)


def chosen_kernels(run: Path) -> dict:
    import yaml

    config = yaml.safe_load((run / "config.resolved.yaml").read_text(encoding="utf-8"))
    return config["kernels"] | {"gradient_checkpointing": config["train"]["gradient_checkpointing"]}


def public(override: str, work: Path) -> str:
    """The override with directories reduced to their last name: a result says nothing about a machine's folders."""
    key, _, value = override.partition("=")
    return f"{key}={Path(value).name}" if os.sep in value else override


def git_commit() -> str | None:
    try:
        answer = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()


def print_table(result: dict, output: Path) -> None:
    train, resume, environment = result["train"], result["resume"], result["environment"]
    gpus = ", ".join(gpu["name"] for gpu in environment["gpus"]) or "no GPU"
    rows = [
        ("shape, device", f"{result['shape']}, {gpus}, torch {environment['torch']}"),
        *(
            (f"{name} tokens/s", f"{train[f'{name}_tokens_per_s']['median']:,.0f}")
            for name in ("real", "slot", "label")
        ),
        ("step ms", f"{train['step_ms']['median']:,.0f}"),
        ("peak GiB", "not measured" if train["peak_gib"] is None else f"{train['peak_gib']:.1f}"),
        ("loss, first and last step", f"{train['losses'][0]:.4f}, {train['losses'][-1]:.4f}"),
        ("resumed: largest loss difference", f"{resume['max_loss_difference']:.2e}"),
        ("resumed: largest adapter difference", f"{resume['max_adapter_difference']:.2e}"),
        ("merged", f"{result['merge']['weights']} weights, {result['merge']['gib']:.2f} GiB"),
        ("seconds", ", ".join(f"{name} {value:.0f}" for name, value in result["seconds"].items())),
    ]
    print()
    for name, value in rows:
        print(f"{name:38}{value}")
    print(f"written to {output}")


if __name__ == "__main__":
    main()
