"""Predictions beside measurements, recorded ones and those of a probe."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from packloop.bench.plan import plan
from packloop.bench.plan_check import Check, check_probe, check_recorded, settle
from packloop.bench.plan_loads import load_from
from packloop.bench.probe import probe
from packloop.bench.synthetic import random_model, shape_config
from packloop.config import ModelConfig, load_config
from packloop.data.loader import build_data
from packloop.engine.model import load_tokenizer
from packloop.errors import InputError, OutOfMemoryError
from packloop.gpus import require_gpu

REPOSITORY = Path(__file__).resolve().parents[1]
CASE = {
    "shape": "llama2-7b", "targets": "qv", "dropout": 0.1, "batch": 8, "recompute": "none", "cache": "all",
    "keep_inputs": "none", "length": 2048, "packing": "bfd", "attention": "document", "accumulation": 2,
    "layer": "fused", "budget_gib": None,
}  # fmt: skip


def recorded(
    tmp_path: Path, *, reserved_gib: float, tokens_per_s: float, failed: str = "InputError: not installed"
) -> Path:
    """A file as `check_plan.py` writes it: a configuration that an H200 took 62.95 GiB and 1,484 ms for, and one that
    failed.
    """
    row = {
        "name": "one",
        "case": CASE,
        "resolved": {
            "attention": "document", "layer": "fused", "dequant_cache": "all", "keep_inputs": "none",
            "recompute": "none",
        },
        "figures": {
            "real_tokens_per_step": 32633, "step_ms": {"median": 1484},
            "real_tokens_per_s": {"median": tokens_per_s},
        },
        "memory": {"peak_allocated_gib": 62.82, "peak_reserved_gib": reserved_gib, "managed_gib": 0.25},
        "documents": [[330] * 49 + [214]] * 2,
        "labels": [16250, 16300],
    }  # fmt: skip
    path = tmp_path / "check.json"
    other = {"name": "two", "case": CASE, "failed": failed}
    gpu = {"gpus": [{"name": "NVIDIA H200"}]}
    path.write_text(json.dumps({"environment": gpu, "kinds": [], "cases": [row, other]}))
    return path


@pytest.fixture
def check_plan(monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY)
    from benchmarks import check_plan

    return check_plan


@pytest.fixture
def compare(check_plan, monkeypatch, capsys):
    """compare(path, *arguments) -> the exit code and both outputs, in this process: importing torch takes seconds."""

    def run(path: Path, *arguments: str) -> SimpleNamespace:
        monkeypatch.setattr("sys.argv", ["check_plan.py", "--compare", str(path), *arguments])
        with pytest.raises(SystemExit) as left:
            check_plan.main()
        printed, said = capsys.readouterr()
        code = left.value.code
        if isinstance(code, str):  # as Python ends: the text on standard error, and 1
            return SimpleNamespace(returncode=1, stdout=printed, stderr=f"{said}{code}\n")
        return SimpleNamespace(returncode=code or 0, stdout=printed, stderr=said)

    return run


def test_the_script_runs_by_itself(tmp_path):
    """Exits with what `compare` returns, also where no other test has put the repository on the path."""
    path = recorded(tmp_path, reserved_gib=68.0, tokens_per_s=22_000)
    command = [sys.executable, "-P", str(REPOSITORY / "benchmarks" / "check_plan.py"), "--compare", str(path)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "0 of 1 within" in done.stdout
    assert "Traceback" not in done.stderr


def test_recorded_measurements_within_the_bounds_pass_and_are_written(compare, tmp_path):
    done = compare(recorded(tmp_path, reserved_gib=62.95, tokens_per_s=22_000), "--output", str(tmp_path / "plan"))
    assert done.returncode == 0, done.stderr
    assert "1 of 1 within 5% of memory and 10% of speed" in done.stdout
    assert "two: InputError: not installed" in done.stdout
    (check,) = json.loads((tmp_path / "plan.json").read_text())["checks"]
    assert check["reserved_gib"]["measured"] == 62.95
    assert check["holds"]
    assert "62.95" in (tmp_path / "plan.md").read_text()


def test_recorded_beginnings_that_documents_share_count_in_attention(tmp_path):
    """Rows of before have none; documents that start with one attend to more than their own tokens."""
    path = recorded(tmp_path, reserved_gib=62.95, tokens_per_s=22_000)
    result = json.loads(path.read_text())
    (row,) = (row for row in result["cases"] if "figures" in row)
    config = load_config("recipes/llama2-7b-dolly.yaml", [
        "data.packing=bfd", "kernels.attention=document", "kernels.dequant_cache=all", "kernels.keep_inputs=none",
        "train.per_device_train_batch_size=8", "train.gradient_accumulation_steps=2",
    ])  # fmt: skip
    alone = check_recorded(row, config, require_gpu("h200"))
    shared = check_recorded(row | {"prefixes": [[-1] + [0] * 49, None]}, config, require_gpu("h200"))
    assert shared.step_ms[0] > alone.step_ms[0]
    assert shared.reserved_gib == alone.reserved_gib


@pytest.mark.parametrize(("reserved_gib", "tokens_per_s"), [(68.0, 22_000), (62.95, 26_000)])
def test_a_prediction_out_of_bounds_fails(compare, tmp_path, reserved_gib, tokens_per_s):
    done = compare(recorded(tmp_path, reserved_gib=reserved_gib, tokens_per_s=tokens_per_s))
    assert done.returncode == 1
    assert "0 of 1 within" in done.stdout


def test_a_configuration_that_ran_out_of_memory_fails_beside_others_that_hold(compare, tmp_path):
    failed = "OutOfMemoryError: CUDA out of memory"
    path = recorded(tmp_path, reserved_gib=62.95, tokens_per_s=22_000, failed=failed)
    done = compare(path, "--output", str(tmp_path / "plan"))
    assert done.returncode == 1, done.stderr
    assert "1 of 2 within 5% of memory and 10% of speed; 1 ran out of memory." in done.stdout
    assert f"- two: {failed}" in done.stdout
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["failed"] == {"two": failed}
    assert len(written["checks"]) == 1


@pytest.mark.parametrize(
    ("error", "recorded_as"),
    [
        (OutOfMemoryError("does not hold\nthe model"), "OutOfMemoryError: does not hold the model"),
        (torch.OutOfMemoryError("CUDA out of memory"), "OutOfMemoryError: CUDA out of memory"),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"), "OutOfMemoryError: CUBLAS_STATUS_ALLOC_FAILED"),
        (InputError("no packs"), "InputError: no packs"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)  # fmt: skip
def test_a_failed_measurement_is_recorded_by_what_it_failed_for(check_plan, error, recorded_as):
    bench, case = raising_bench(error), check_plan.Case(**CASE)
    assert check_plan.row_of(bench, case)["failed"] == recorded_as


def test_a_fault_of_the_program_is_no_row(check_plan):
    bench = raising_bench(RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes"):
        check_plan.row_of(bench, check_plan.Case(**CASE))


def raising_bench(error: Exception) -> SimpleNamespace:
    """A bench whose measurements end in `error`."""

    def measure(case, after=None):
        raise error

    return SimpleNamespace(arguments=SimpleNamespace(calibrate=False), measure=measure, say=lambda text: None)


def test_a_file_in_which_nothing_was_measured_fails(compare, tmp_path):
    path = recorded(tmp_path, reserved_gib=62.95, tokens_per_s=22_000)
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"cases": values["cases"][1:]}))
    done = compare(path)
    assert done.returncode == 1, done.stderr
    assert "0 of 0 within" in done.stdout


def test_a_file_that_holds_no_measurements_gets_one_line(compare, tmp_path):
    (tmp_path / "cpu.json").write_text(json.dumps({"environment": {"gpus": []}, "cases": []}))
    for name in ("missing.json", "cpu.json"):
        done = compare(tmp_path / name)
        assert done.returncode == 1
        assert name in done.stderr
        assert "Traceback" not in done.stderr


def test_errors_are_of_the_prediction():
    check = Check("one", (10.0, 12.5), (110.0, 100.0), (1.0, 1.0), (1.0, 1.0))
    assert check.memory_error == pytest.approx(-0.2)
    assert check.speed_error == pytest.approx(0.1)
    assert not check.holds


def test_a_probe_is_predicted_on_its_own_micro_batches():
    config = load_config(REPOSITORY / "recipes/llama2-7b-dolly.yaml", [
        "data.max_length=256", "data.packing=bfd",
        "train.per_device_train_batch_size=1", "train.gradient_accumulation_steps=2",
    ])  # fmt: skip
    forecast = plan(config, gpu="h200", budget="22", synthetic="tiny")
    config = settle(forecast.config, replace(forecast.best[0], attention="sdpa"), forecast.budget_gib)
    assert config.train.memory_budget_gib == 22
    tokenizer = load_tokenizer(ModelConfig(name_or_path="bundled"))
    base = random_model(shape_config("tiny"), quantization="nf4", device=torch.device("cpu"))
    data = build_data(config.data, tokenizer, seed=0)
    measured = probe(config, base, data, tokenizer.pad_token_id, warmup_steps=0, timed_steps=2)
    assert len(measured.micros) == 2 * config.train.gradient_accumulation_steps
    load = load_from(measured.micros)
    tokens = measured.figures["real_tokens_per_step"]
    assert load.real_tokens * config.train.gradient_accumulation_steps == pytest.approx(tokens)
    # A CPU has no such memory: the figures are put in for the comparison alone.
    on_gpu = replace(measured, memory={"peak_reserved_gib": 1.0, "peak_allocated_gib": 1.0})
    check = check_probe(on_gpu, forecast.shape, forecast.gpu)
    assert check.step_ms[1] == measured.step_ms
    assert check.tokens_per_s[0] == pytest.approx(tokens / check.step_ms[0] * 1e3)
