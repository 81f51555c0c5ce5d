"""The planner's predictions beside what this GPU does, for configurations that it was not calibrated on.

    python benchmarks/check_plan.py --output check.json [--data FILE --tokenizer DIR]
    python benchmarks/check_plan.py --calibrate --output calibration.json [--data FILE --tokenizer DIR]
    python benchmarks/check_plan.py --compare check.json [--output benchmarks/results/plan-h200]

Models have random weights and are made in memory, once a shape; each configuration takes two steps to warm up and
three that count. --calibrate measures what the predictions rest on: each kind of work by itself, and a few whole steps
with their GPU time by class, as `packloop profile` tells classes apart, and by kernel. --compare needs no GPU: it
predicts what a file of measurements holds and fails where a prediction is off by more than 5 % of reserved memory or
10 % of tokens a second, or a configuration ran out of memory; what calibrated it is no test of it. Every result is
printed and written as soon as it is there. `--shape tiny` goes through the same motions on a CPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks import plan_cases
from benchmarks.plan_cases import Case
from packloop.bench import calibration, plan_check
from packloop.bench.conditions import source_state
from packloop.bench.plan_check import check_recorded
from packloop.bench.probe import Probe, probe
from packloop.bench.profile import trace_step
from packloop.bench.steps import synchronize
from packloop.bench.synthetic import random_model, shape_config
from packloop.config import DataConfig, ModelConfig, RunConfig
from packloop.data.loader import TrainingData, build_data
from packloop.engine.budget import is_out_of_memory
from packloop.engine.environment import describe_environment
from packloop.engine.model import load_tokenizer
from packloop.engine.run import set_numerics
from packloop.errors import InputError, OutOfMemoryError
from packloop.gpus import require_gpu

# Kernels and products of a profiled step that are listed, the longest first.
_LISTED = 80
# How a recorded failure begins that is for want of memory.
_OUT_OF_MEMORY = "OutOfMemoryError"


class Bench:
    """Bases and data made once, results written as they come."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments = arguments
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.is_dry = arguments.shape is not None
        tokenizer = load_tokenizer(ModelConfig(name_or_path=arguments.tokenizer))
        self._tokenizer, self.pad_token_id = tokenizer, tokenizer.pad_token_id
        self._base: tuple[str, Any] | None = None
        self._data: dict[tuple, TrainingData] = {}
        commit = source_state()[0] or arguments.commit
        self.result: dict[str, Any] = {
            "environment": describe_environment(),
            "commit": commit,
            "kinds": [],
            "cases": [],
        }
        self._begun = time.perf_counter()

    def say(self, text: str) -> None:
        print(f"[{time.perf_counter() - self._begun:6.1f} s] {text}", flush=True)

    def save(self) -> None:
        output: Path = self.arguments.output
        output.parent.mkdir(parents=True, exist_ok=True)
        partial = output.with_suffix(".partial")
        partial.write_text(json.dumps(self.result) + "\n", encoding="utf-8")
        partial.replace(output)

    def base(self, shape: str):
        """The one model that is held at a time."""
        if self._base is None or self._base[0] != shape:
            self._base = None
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self._base = shape, random_model(shape_config(shape), quantization="nf4", device=self.device)
        return self._base[1]

    def config(self, case: Case) -> RunConfig:
        source = self.arguments.data or "bundled"
        return case.config({"source": source, "columns": {"response": "output"} if self.arguments.data else {}})

    def data(self, config: DataConfig) -> TrainingData:
        # A step of 16 packs, of a few, needs more packs than a small sample makes: its rows come several times.
        key = (config.packing == "wrapped", config.max_length)
        if key not in self._data:
            self._data[key] = build_data(config, self._tokenizer, seed=0)
        return self._data[key]

    def measure(self, case: Case, after: Callable | None = None) -> Probe:
        config = self.config(case)
        return probe(config, self.base(case.shape), self.data(config.data), self.pad_token_id, after=after)


def main() -> None:
    arguments = parse_arguments()
    if arguments.compare is not None:
        sys.exit(compare(arguments.compare, arguments.output))
    set_numerics(RunConfig())
    bench = Bench(arguments)
    chosen = plan_cases.CALIBRATION if arguments.calibrate else plan_cases.HELD_OUT
    cases = [case.dry() if bench.is_dry else case for case in chosen]
    cases = [case for case in cases if not arguments.only or any(part in case.name for part in arguments.only)]
    if arguments.calibrate:
        measure_kinds(bench)
    for case in cases:
        bench.result["cases"].append(row_of(bench, case))
        bench.save()
    bench.say(f"written: {arguments.output}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file to write; with --compare, without its suffix")
    parser.add_argument("--compare", type=Path, help="predict what this file's configurations were measured at")
    parser.add_argument("--calibrate", action="store_true", help="measure what predictions rest on")
    parser.add_argument("--data", help="JSON rows with the fields instruction and output; default: the bundled sample")
    parser.add_argument("--tokenizer", default="bundled", help="directory; default: the bundled model's")
    parser.add_argument("--shape", choices=("tiny",), help="dry run on a CPU")
    parser.add_argument("--only", action="append", default=[], help="cases whose name has this in it; may be repeated")
    parser.add_argument("--commit", help="of the source, where git cannot tell")
    arguments = parser.parse_args()
    if arguments.output is None and arguments.compare is None:
        parser.error("--output is needed, but for --compare")
    return arguments


def compare(measured: Path, output: Path | None) -> int:
    """Prints predicted and measured figures of a recorded file.

    1 where one is out of bounds, a configuration ran out of memory, or there is none.
    """
    try:
        result = json.loads(measured.read_text(encoding="utf-8"))
        name = result["environment"]["gpus"][0]["name"]
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        sys.exit(
            f"{measured} is no file of measurements on a GPU ({type(error).__name__}: {error}); "
            "write one there: python benchmarks/check_plan.py --output FILE"
        )
    gpu = require_gpu(name)
    rows = [row for row in result["cases"] if "figures" in row and row["case"]["layer"] == "fused"]
    checks = [check_recorded(row, Case(**row["case"]).config({"source": "bundled"}), gpu) for row in rows]
    failed = {row["name"]: row["failed"] for row in result["cases"] if "failed" in row}
    out_of_memory = [name for name, reason in failed.items() if reason.startswith(_OUT_OF_MEMORY)]
    listed = [f"- {name}: {reason}" for name, reason in failed.items()]
    text = "\n".join([plan_check.table(checks, len(out_of_memory)), *listed])
    print(text)
    if output is not None:
        written = {
            "gpu": name,
            "environment": result["environment"],
            "commit": result.get("commit"),
            "checks": [one.values() for one in checks],
            "failed": failed,
        }
        output.with_suffix(".json").write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
        output.with_suffix(".md").write_text(f"# Predicted and measured, {name}\n\n{text}\n", encoding="utf-8")
    return int(not checks or bool(out_of_memory) or not all(one.holds for one in checks))


def row_of(bench: Bench, case: Case) -> dict[str, Any]:
    """Measured figures of one case, or the reason why there are none."""
    row: dict[str, Any] = {"name": case.name, "case": vars(case)}
    details: dict[str, Any] = {}
    begun = time.perf_counter()
    after = (lambda step, window: details.update(profile(step, window))) if bench.arguments.calibrate else None
    try:
        measured = bench.measure(case, after)
    except (InputError, RuntimeError) as error:
        of_gpu = isinstance(error, RuntimeError) and is_out_of_memory(error)
        if isinstance(error, RuntimeError) and not of_gpu:
            raise
        is_memory = of_gpu or isinstance(error, OutOfMemoryError)
        kind = _OUT_OF_MEMORY if is_memory else type(error).__name__
        row["failed"] = f"{kind}: {' '.join(str(error).split())[:300]}"
        bench.say(f"{case.name}: {row['failed']}")
        return row
    config = measured.config
    row |= {
        "resolved": {**config.kernels.model_dump(), "recompute": config.train.gradient_checkpointing},
        "figures": measured.figures,
        "memory": measured.memory,
        "allocated_before_gib": measured.allocated_before_gib,
        "documents": [batch.cu_seqlens.diff().tolist() for batch in measured.micros],
        "prefixes": [None if batch.prefix_of is None else batch.prefix_of.tolist() for batch in measured.micros],
        "labels": [batch.label_index.numel() for batch in measured.micros],
        "seconds": round(time.perf_counter() - begun, 1),
        **details,
    }
    memory = measured.memory or {}
    bench.say(
        f"{case.name}: {measured.step_ms:.0f} ms, {measured.real_tokens_per_s:,.0f} tokens/s, allocated "
        f"{memory.get('peak_allocated_gib', 0):.2f}, reserved {memory.get('peak_reserved_gib', 0):.2f} GiB, "
        f"{row['resolved']['recompute']}/{config.kernels.dequant_cache}/{config.kernels.keep_inputs} "
        f"{config.kernels.attention} ({row['seconds']} s)"
    )
    return row


def measure_kinds(bench: Bench) -> None:
    """Each kind of work by itself: of the 7B shape throughout, of the others what differs most."""
    big, small = (shape_config("tiny" if bench.is_dry else name) for name in ("llama2-7b", "tinyllama-1.1b"))
    unit = 32 if bench.is_dry else 2048
    add(
        bench,
        calibration.measure_kinds(
            big, slots=(unit // 2, unit, 2 * unit, 4 * unit, 8 * unit), ranks=(64, 128), device=bench.device
        ),
    )
    add(bench, calibration.measure_kinds(small, slots=(unit // 2, 4 * unit), ranks=(64,), device=bench.device))
    if torch.cuda.is_available():
        for heads, lengths in (((32, 32, 128), (128, 256, 512, 1024, 2048, 4096)), ((32, 4, 64), (256, 2048))):
            measured = calibration.measure_attention(heads, num_slots=4 * unit, lengths=lengths, device=bench.device)
            add(bench, measured)
        torch.cuda.empty_cache()


def add(bench: Bench, measurements: Iterable[calibration.Measurement]) -> None:
    for measurement in measurements:
        bench.result["kinds"].append(measurement)
        done = f", {measurement['flops'] / measurement['ms'] / 1e9:.0f} TFLOP/s" if measurement.get("flops") else ""
        done += f", {measurement['bytes'] / measurement['ms'] / 1e6:.0f} GB/s" if measurement.get("bytes") else ""
        what = ", ".join(f"{k} {v}" for k, v in measurement.items() if k not in ("kind", "ms", "flops", "bytes"))
        bench.say(f"{measurement['kind']} {what}: {measurement['ms']:.4f} ms{done}")
    bench.save()


def profile(step: Callable, window: list) -> dict[str, Any]:
    """Time of one step by class and by kernel, of its products by shape, and the GPU's allocations in another."""
    with tempfile.TemporaryDirectory() as directory:
        lap, breakdown = trace_step(step, window, Path(directory) / "trace.json")
    kernels, products = (
        sorted(tallies.items(), key=lambda item: -item[1].ms)[:_LISTED]
        for tallies in (breakdown.kernels, breakdown.products)
    )
    return {
        "profiled_step_ms": lap.ms,
        "class_ms": {name: round(ms, 3) for name, ms in breakdown.by_class_ms().items()},
        "phase_ms": {name: round(ms, 3) for name, ms in breakdown.by_phase_ms().items()},
        "kernels": [[name[:120], cls, tally.count, round(tally.ms, 4)] for (name, cls), tally in kernels],
        "products": [[name, shapes, tally.count, round(tally.ms, 4)] for (name, shapes), tally in products],
        "allocations": allocations(step, window) if torch.cuda.is_available() else [],
    }


def allocations(step: Callable, window: list) -> list[list]:
    """(action, address, bytes) of each event of the allocator in one step, of a megabyte or more."""
    torch.cuda.memory._record_memory_history(max_entries=200_000, context=None)
    try:
        step(window)
        synchronize()
        (trace,) = torch.cuda.memory._snapshot()["device_traces"][:1]
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
    kept = ("alloc", "free_completed", "segment_map", "segment_unmap", "segment_alloc", "segment_free")
    return [
        [event["action"], event["addr"], event["size"]]
        for event in trace
        if event["action"] in kept and event["size"] >= 2**20
    ]


if __name__ == "__main__":
    main()
