"""Profiles of real steps on the CPU, and `packloop profile` from its arguments to its files."""

from __future__ import annotations

import gzip
import json
import os
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from small_job import small_config, write_rows
from tiny_run import VOCABULARY, save_small_shape
from torch.nn.modules import module as torch_module
from typer.testing import CliRunner

from packloop.bench import profile_run
from packloop.bench.breakdown import StepBreakdown, unknown_kernels
from packloop.bench.kernel_classes import CLASSES
from packloop.bench.profile import profile_step, profile_steps, trace_step
from packloop.bench.profile_report import ProfileResult, write_profile
from packloop.bench.steps import Job
from packloop.bench.synthetic import random_model, shape_config
from packloop.cli import app
from packloop.data.loader import build_data
from packloop.engine import loop, optim
from packloop.engine.model import load_tokenizer
from packloop.errors import InputError
from packloop.kernels import decoder_layer, nf4

NF4 = {"quantization": "nf4", "dtype": "bfloat16"}
LAYERS, HIDDEN, INTERMEDIATE, SLOTS = 2, 64, 128, 96
# Operators that read or write whole tensors: whose work each one is must be known.
_COMPUTING = ("mm", "bmm", "addmm", "mul", "mul_", "sub", "div", "pow", "mean", "rsqrt", "silu", "exp", "logsumexp")
_COMPUTING += ("_softmax", "_scaled_dot_product_flash_attention_for_cpu", "copy_", "cat", "index_select", "gather")
COMPUTING = {f"aten::{name}" for name in _COMPUTING}
BASE_WEIGHTS = LAYERS * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * INTERMEDIATE)


@pytest.fixture
def tiny_job(tmp_path):
    """Makes a job of the tiny shape on the CPU, whose settings the caller changes."""
    made = []

    def make(**sections) -> Job:
        sections.setdefault("model", NF4)
        sections.setdefault("lora", {"r": 8, "target_modules": "all-linear", "dropout": 0.0})
        config = small_config("bundled", write_rows(tmp_path / "rows.jsonl", 60), tmp_path / "run", **sections)
        tokenizer = load_tokenizer(config.model)
        data = build_data(config.data, tokenizer, seed=0)
        shape = shape_config("tiny", vocab_size=VOCABULARY)
        base = random_model(shape, quantization=config.model.quantization, device=torch.device("cpu"))
        made.append(Job(config, base, data, tokenizer.pad_token_id))
        return made[-1]

    yield make
    for job in made:
        job.close()


def one_step(job: Job, tmp_path) -> tuple[StepBreakdown, int]:
    """(the breakdown of one step, its label tokens)"""
    taken = profile_steps(job, job.resolve(), steps=1, warmup=1, trace=tmp_path / "trace.json")
    return taken.breakdowns[0], taken.laps[0].label_tokens


@pytest.mark.parametrize("layer", ["fused", "stock"])
@pytest.mark.parametrize("recomputed", [0, 1, 2])
def test_forward_recomputation_and_backward_are_told_apart(tiny_job, tmp_path, layer, recomputed):
    job = tiny_job(train={"gradient_checkpointing": recomputed}, kernels={"layer": layer})
    step, num_labels = one_step(job, tmp_path)
    phases = step.by_phase_ms()
    assert phases["forward"] > 0
    assert phases["backward"] > 0
    assert phases["update"] > 0
    assert ("recomputation" in phases) == (recomputed > 0)
    flops = {phase: step.parts[phase, "base GEMM"].flops for phase in ("forward", "recomputation", "backward")}
    # Two micro-batches of one pack.
    whole = 2.0 * 2 * SLOTS * BASE_WEIGHTS
    assert flops["forward"] == pytest.approx(whole, rel=1e-5)
    # A fused layer's recomputation ends before its last product.
    left_out = 2.0 * 2 * SLOTS * HIDDEN * INTERMEDIATE * recomputed if layer == "fused" else 0.0
    assert flops["recomputation"] == pytest.approx(whole * recomputed / LAYERS - left_out, rel=1e-5)
    # The embedding is frozen, so the first layer's q, k and v have no input gradient.
    assert flops["backward"] == pytest.approx(whole - 2.0 * 2 * SLOTS * 3 * HIDDEN * HIDDEN, rel=1e-5)
    for phase in [phase for phase in phases if phase != "update"]:
        for cls in ("base GEMM", "LoRA", "attention", "NF4 dequantisation", "norms", "RoPE", "activation"):
            assert step.parts[phase, cls].ms > 0, (phase, cls)
    assert step.parts["forward", "head + loss"].flops == 4.0 * HIDDEN * VOCABULARY * num_labels
    assert step.parts["update", "optimizer"].ms > 0
    assert set(step.by_class_ms()) <= set(CLASSES)
    assert not COMPUTING & {name for name, _, _ in unknown_kernels([step])}, "views and allocations only"
    joined = step.parts["forward", "LoRA"].joined_ms > 0
    assert joined == (layer == "fused")
    assert (step.rebuilt_ms > 0) == (layer == "fused")


def test_gated_products_are_the_bases_products(tiny_job, tmp_path):
    job = tiny_job()
    options = job.resolve()
    options["operations"] = replace(options["operations"], gated="torch")
    step = profile_steps(job, options, steps=1, warmup=1, trace=tmp_path / "trace.json").breakdowns[0]
    whole = 2.0 * 2 * SLOTS * BASE_WEIGHTS
    assert step.parts["forward", "base GEMM"].flops == pytest.approx(whole, rel=1e-5)
    left_out = 2.0 * 2 * SLOTS * 3 * HIDDEN * HIDDEN
    assert step.parts["backward", "base GEMM"].flops == pytest.approx(whole - left_out, rel=1e-5)


def test_cached_weights_leave_no_dequantisation(tiny_job, tmp_path):
    step, _ = one_step(tiny_job(kernels={"dequant_cache": "all"}), tmp_path)
    assert not any(sums.ms for (_, cls), sums in step.parts.items() if cls == "NF4 dequantisation")
    assert step.parts["forward", "base GEMM"].joined_ms > 0


def test_labels_are_gone_when_the_profile_is_done_and_change_no_result(tiny_job, tmp_path):
    watched = [
        (decoder_layer, "_forward"),
        (loop, "packed_loss_sum"),
        (optim.AdamW, "step"),
        (nf4.Nf4Group, "dequantize"),
    ]
    before = [vars(owner)[name] for owner, name in watched]
    num_hooks = len(torch_module._global_forward_pre_hooks), len(torch_module._global_forward_hooks)
    losses = []
    for profiles in (False, True):
        job = tiny_job()
        with job.stepping() as step:
            for _ in range(2):
                micros = job.next_window()
                lap = trace_step(step, micros, tmp_path / "trace.json")[0] if profiles else step(micros)
            losses.append(lap.loss)
    assert losses[0] == losses[1]
    assert all(vars(owner)[name] is original for (owner, name), original in zip(watched, before, strict=True))
    assert (len(torch_module._global_forward_pre_hooks), len(torch_module._global_forward_hooks)) == num_hooks


def test_one_step_of_a_cell_is_busy_with_known_classes(tiny_job):
    job = tiny_job(train={"gradient_checkpointing": "all"})
    with job.stepping() as step:
        step(job.next_window())
        profile = profile_step(step, job.next_window())
        longer = profile_step(step, job.next_window(), step_ms=1e6)
    assert profile.device == "cpu"
    assert {"base GEMM", "LoRA", "attention", "NF4 dequantisation"} <= set(profile.by_class_ms) <= set(CLASSES)
    assert profile.busy_ms == pytest.approx(sum(profile.by_class_ms.values()))
    assert profile.busy_ms == pytest.approx(sum(profile.by_phase_ms.values()))
    assert 0 < profile.busy_ms <= profile.step_ms
    assert profile.idle_share == pytest.approx(1 - profile.busy_ms / profile.step_ms)
    assert longer.idle_share > 0.9


def test_calibration_tells_classes_apart_as_a_profile_does(tiny_job, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[1])
    from benchmarks import check_plan

    job = tiny_job(train={"gradient_checkpointing": "all"})
    with job.stepping() as step:
        step(job.next_window())
        found = check_plan.profile(step, job.next_window())
    assert set(found["class_ms"]) <= set(CLASSES)
    # None of these operators' names says that.
    of_head = {name for name, cls, _, _ in found["kernels"] if cls == "head + loss"}
    assert {"aten::mm", "aten::sub"} <= of_head
    assert {cls for name, cls, _, _ in found["kernels"] if name.startswith("aten::")} >= {"LoRA", "norms"}
    assert sum(found["class_ms"].values()) == pytest.approx(sum(found["phase_ms"].values()), abs=0.02)
    assert set(found["phase_ms"]) == {"forward", "recomputation", "backward", "update"}
    of_logits = [
        count for name, shapes, count, _ in found["products"] if shapes.endswith(f" x [{HIDDEN}, {VOCABULARY}]")
    ]
    assert sum(of_logits) == 2  # micro-batches, a chunk each
    assert found["allocations"] == []


@pytest.fixture
def config_file(tmp_path):
    source = write_rows(tmp_path / "rows.jsonl", 60)
    path = tmp_path / "config.yaml"
    path.write_text(
        f"""
model: {{name_or_path: bundled}}
lora: {{r: 8, target_modules: all-linear}}
data: {{source: {source}, max_length: 96, template: {{prompt: "{{instruction}}\\n", response: "{{response}}"}}}}
train: {{per_device_train_batch_size: 1, gradient_accumulation_steps: 2, gradient_checkpointing: all}}
""",
        encoding="utf-8",
    )
    return path


def test_the_command_writes_table_plot_and_trace(config_file, tmp_path):
    output = tmp_path / "profile"
    shape = save_small_shape(tmp_path / "small")
    arguments = ["profile", str(config_file), "--synthetic", str(shape), "--steps", "2", "--warmup", "1"]
    done = CliRunner().invoke(app, [*arguments, "--output", str(output)], catch_exceptions=False)
    assert done.exit_code == 0
    result = json.loads((output / "profile.json").read_text(encoding="utf-8"))
    assert result["advice"]["sentence"] in done.stdout
    assert result["shape"] == "small with random weights"
    assert result["device"] == "cpu"
    assert len(result["step_ms_all"]) == len(result["profiled_step_ms_all"]) == 2
    assert sum(part["ms"] for part in result["parts"]) == pytest.approx(result["busy_ms"])
    assert result["busy_ms"] + result["idle_ms"] == pytest.approx(result["step_ms"])
    assert {part["phase"] for part in result["parts"]} == {"forward", "recomputation", "backward", "update"}
    floors = {(part["phase"], part["cls"]): part["floor_ms"] for part in result["parts"]}
    assert floors["backward", "base GEMM"] > 0
    assert floors["recomputation", "attention"] == pytest.approx(floors["forward", "attention"])
    assert floors["forward", "norms"] > 0
    assert floors["forward", "other"] is None

    trace = json.loads(gzip.decompress((output / "trace.json.gz").read_bytes()))
    assert any(event["name"].startswith("packloop layer") for event in trace["traceEvents"])
    svg = ElementTree.parse(output / "plots" / "time-by-class.svg").getroot()
    words = {text for element in svg.iter() for text in [(element.text or "").strip()] if text}
    assert {"forward", "recomputation", "backward", "update", "idle", "base GEMM", "NF4 dequantisation"} <= words
    image = pytest.importorskip("matplotlib.image").imread(output / "plots" / "time-by-class.png")
    assert image.shape[0] > 400
    assert image.shape[1] > 1000
    report = (output / "report.md").read_text(encoding="utf-8")
    assert "| forward " in report
    assert (output / "report.html").read_text(encoding="utf-8").count("<svg") == 1
    once = "beginnings that documents share are computed once"
    shared = ProfileResult.model_validate(result | {"real_tokens_per_step": result["slot_tokens_per_step"] + 1})
    assert once not in report
    write_profile(shared, output / "trace.json.gz", tmp_path / "shared")
    assert once in (tmp_path / "shared" / "report.md").read_text(encoding="utf-8")

    again = CliRunner().invoke(app, [*arguments, "--output", str(output)])
    assert isinstance(again.exception, InputError)
    assert "is not empty" in str(again.exception)
    assert json.loads((output / "profile.json").read_text(encoding="utf-8")) == result


def test_a_place_for_the_report_is_looked_for_before_steps_are_taken(config_file, tmp_path, monkeypatch):
    monkeypatch.setattr(profile_run, "_profile", lambda *_, **__: pytest.fail("steps were taken"))
    file = tmp_path / "file"
    file.write_text("mine")
    closed = tmp_path / "closed"
    closed.mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: path != closed)
    for output, expected in {
        file: "is a file; give a directory",
        file / "below" / "it": f"'{file}' is a file",
        closed / "new": f"'{closed}' cannot be written to",
    }.items():
        done = CliRunner().invoke(app, ["profile", str(config_file), "--synthetic", "tiny", "--output", str(output)])
        assert isinstance(done.exception, InputError)
        assert expected in str(done.exception)
        assert "\n" not in str(done.exception)
    assert file.read_text() == "mine"


def test_bad_input_is_refused_in_one_line(config_file, tmp_path):
    refusals = {
        ("--synthetic", "nothing-known"): "neither llama2-7b",
        ("lora.enabled=false", "model.quantization=none", "model.dtype=float32"): "lora.enabled=true",
        ("train.per_device_train_batch_size=4000",): "packs make no step",
    }
    for extra, expected in refusals.items():
        output = tmp_path / "refused"
        arguments = ["profile", str(config_file), *extra, "--output", str(output)]
        if "--synthetic" not in extra:
            arguments += ["--synthetic", "tiny"]
        done = CliRunner().invoke(app, arguments)
        assert isinstance(done.exception, InputError), extra
        assert expected in str(done.exception)
        assert "\n" not in str(done.exception)
        assert not output.exists()
