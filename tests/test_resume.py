"""A run that was interrupted and resumed leaves what an uninterrupted one leaves, to the last bit."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from small_job import fork, read_metrics, read_steps, rows, small_config, tensors_equal, wait, wait_for_step, write_rows

from packloop import cli
from packloop.config import RunConfig, dump_config, parse_config
from packloop.engine import checkpoint as checkpoint_module
from packloop.engine import loop
from packloop.engine.checkpoint import find_checkpoint
from packloop.engine.loop import train
from packloop.engine.run_dir import config_for_resume
from packloop.errors import ConfigError, InputError

STEPS_PER_EPOCH, NUM_STEPS = 4, 11
SECTIONS = {
    "lora": {"dropout": 0.1},
    "data": {"eval_split": 2, "max_length": 96},
    "train": {"max_steps": NUM_STEPS, "lr_scheduler_type": "cosine", "eval_every": 3},
    "checkpoint": {"every": 2, "keep": 9},
}


def config_of(base: Path, rows: Path, run_dir: Path, **changes: dict) -> RunConfig:
    names = {**SECTIONS, **changes}
    return small_config(base, rows, run_dir, **{n: SECTIONS.get(n, {}) | changes.get(n, {}) for n in names})


@pytest.fixture(scope="module")
def small_rows(tmp_path_factory) -> Path:
    """12 rows, of which 2 are held out: epochs of 4 steps."""
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", 12)


@pytest.fixture(scope="module")
def whole(small_base, small_rows, tmp_path_factory) -> Path:
    """The run that nothing interrupts."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    train(config_of(small_base, small_rows, run_dir))
    epochs = [values["epoch"] for values in read_metrics(run_dir) if "loss" in values]
    assert epochs == [0] * 3 + [1] * 4 + [2] * 4, "the position after each step: the fourth ends an epoch"
    return run_dir


def assert_equal_runs(resumed: Path, whole: Path) -> None:
    assert read_metrics(resumed) == read_metrics(whole)
    assert tensors_equal(*(load_file(run_dir / "adapter_model.safetensors") for run_dir in (resumed, whole))), "adapter"
    last = f"checkpoints/step-{NUM_STEPS:06d}"
    for file in ("adapter_model.safetensors", "optimizer.safetensors", "rng.safetensors"):
        assert tensors_equal(*(load_file(run_dir / last / file) for run_dir in (resumed, whole))), file
    states = [json.loads((run_dir / last / "state.json").read_text()) for run_dir in (resumed, whole)]
    assert states[0] == states[1]


def test_two_runs_of_one_configuration_are_equal(whole, small_base, small_rows, tmp_path):
    train(config_of(small_base, small_rows, tmp_path / "run"))
    assert_equal_runs(tmp_path / "run", whole)
    # What is compared could also be equal because nothing depends on it.
    other = config_of(small_base, small_rows, tmp_path / "other", train={"seed": 1})
    train(other)
    assert read_metrics(tmp_path / "other") != read_metrics(whole)


@pytest.mark.parametrize(
    ("step", "number", "last"),
    [
        (1, signal.SIGINT, 2),
        (STEPS_PER_EPOCH - 1, signal.SIGINT, STEPS_PER_EPOCH - 1),  # an evaluation is due there
        (STEPS_PER_EPOCH, signal.SIGTERM, STEPS_PER_EPOCH + 1),
        (STEPS_PER_EPOCH + 1, signal.SIGTERM, STEPS_PER_EPOCH + 2),  # and here, when the next step is done
    ],
)
def test_a_signal_saves_within_one_step_and_the_run_continues_exactly(
    whole, small_base, small_rows, tmp_path, step, number, last
):
    """An evaluation that is due then comes when the run goes on."""

    def send(values: dict) -> None:
        if values["step"] == step:
            os.kill(os.getpid(), number)

    config = config_of(small_base, small_rows, tmp_path / "run")
    result = train(config, on_step=send)
    assert (result.stopped_by, result.state.step) == (number, last)
    assert find_checkpoint(tmp_path / "run", "latest").state.step == last
    assert read_metrics(tmp_path / "run")[-1]["step"] == last
    assert "loss" in read_metrics(tmp_path / "run")[-1]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert train(config, resume="latest").stopped_by is None
    assert_equal_runs(tmp_path / "run", whole)


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"quantization": "nf4"}, "kernels": {"layer": "stock"}},
        {"model": {"quantization": "nf4", "dtype": "bfloat16"}, "train": {"gradient_checkpointing": 1}},
        {"data": {"packing": "wrapped"}, "kernels": {"attention": "eager"}},
        {"data": {"packing": "none"}, "train": {"weight_decay": 0.1, "lr_scheduler_type": "linear"}},
        {"lora": {"enabled": False}, "train": {"learning_rate": 1e-3}},
    ],
    ids=["nf4-stock", "nf4-bfloat16", "wrapped-eager", "none", "whole-model"],
)
def test_every_kind_of_run_resumes_exactly(small_base, small_rows, tmp_path, changes):
    config = config_of(small_base, small_rows, tmp_path / "whole", **changes)
    train(config)
    assert_resumes_from_step_6(tmp_path / "whole", tmp_path / "resumed", config)


def test_tied_embeddings_resume_exactly(small_rows, tmp_path):
    from tiny_run import save_base

    base = save_base(tmp_path / "tied", tie_word_embeddings=True)
    changes = {"lora": {"enabled": False}, "train": {"learning_rate": 1e-3}}
    config = config_of(base, small_rows, tmp_path / "whole", **changes)
    train(config)
    assert_resumes_from_step_6(tmp_path / "whole", tmp_path / "resumed", config)


def test_frequencies_that_go_by_the_longest_document_resume_and_evaluate_exactly(small_rows, tmp_path):
    """RoPE of type `dynamic`, in micro-batches on both sides of the original context."""
    from tiny_run import save_base

    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    base = save_base(tmp_path / "base", max_position_embeddings=48, rope_parameters=rope)
    changes = {"data": {"packing": "none"}, "checkpoint": {"every": 1, "keep": 20}}
    whole = config_of(base, small_rows, tmp_path / "whole", **changes)
    train(whole)
    for step in (4, 7):
        copy = tmp_path / f"from-{step}"
        shutil.copytree(tmp_path / "whole", copy)
        config = config_of(base, small_rows, copy, **changes)
        train(config, resume=str(copy / f"checkpoints/step-{step:06d}"))
        assert_equal_runs(copy, tmp_path / "whole")
    for every in (1, 100):
        train(config_of(base, small_rows, tmp_path / f"eval-{every}", **changes, train={"eval_every": every}))
        assert read_steps(tmp_path / f"eval-{every}") == read_steps(tmp_path / "whole")


def assert_resumes_from_step_6(whole: Path, copy: Path, config: RunConfig) -> None:
    shutil.copytree(whole, copy)
    for name in ("step-000008", "step-000010", "step-000011"):
        shutil.rmtree(copy / "checkpoints" / name)
    elsewhere = config.train.model_copy(update={"output_dir": str(copy)})
    train(config.model_copy(update={"train": elsewhere}), resume="latest")
    assert read_metrics(copy) == read_metrics(whole)
    for name in ("step-000008", "step-000011"):
        for file in (path.name for path in (whole / "checkpoints" / name).glob("*.safetensors")):
            ours, expected = (load_file(run_dir / "checkpoints" / name / file) for run_dir in (copy, whole))
            assert tensors_equal(ours, expected), (name, file)


def test_ctrl_c_on_the_command_line_exits_130_and_resume_ends_with_0(whole, small_base, small_rows, tmp_path):
    run_dir, file, log, sent = (tmp_path / name for name in ("run", "run.yaml", "log", "sent"))
    file.write_text(dump_config(config_of(small_base, small_rows, run_dir)))

    def train_until_interrupted() -> None:
        loop.train = partial(train, on_step=lambda values: wait_in_step(values, 5, until=sent))
        run_cli("train", str(file))

    child = fork(train_until_interrupted, log)
    wait_for_step(run_dir, 3, child)
    os.kill(child, signal.SIGINT)
    sent.touch()
    assert wait(child) == 130
    said = log.read_text()
    assert f"continue with: packloop train {file} --resume latest" in said
    assert "Traceback" not in said
    assert not (run_dir / f"checkpoints/step-{NUM_STEPS:06d}").exists()
    assert wait(fork(lambda: run_cli("train", str(file), "--resume", "latest"), log)) == 0
    assert_equal_runs(run_dir, whole)


def wait_in_step(values: dict, step: int, *, until: Path) -> None:
    """Holds a run in that step until the file is there, so that what the test sends never comes after its end."""
    deadline = time.monotonic() + 120
    while values["step"] == step and not until.exists() and time.monotonic() < deadline:
        time.sleep(0.002)


def run_cli(*arguments: str) -> None:
    sys.argv = ["packloop", *arguments]
    cli.main()


def test_a_run_killed_again_and_again_ends_equal(whole, small_base, small_rows, tmp_path):
    """kill -9 at random moments, saves included, from the first step to the last."""
    config = config_of(small_base, small_rows, tmp_path / "run", checkpoint={"every": 1, "keep": 2})
    moments = random.Random(0)
    target = 0
    while (target := target + moments.randint(2, 3)) < NUM_STEPS:
        resume = "latest" if (tmp_path / "run").exists() else None
        hold = partial(wait_in_step, step=min(target + 2, NUM_STEPS), until=tmp_path / "never")
        child = fork(partial(train, config, resume=resume, on_step=hold), tmp_path / "log")
        wait_for_step(tmp_path / "run", target, child)
        for _ in range(moments.randint(0, 400)):
            os.sched_yield()
        os.kill(child, signal.SIGKILL)
        assert wait(child) == -signal.SIGKILL
        with (tmp_path / "run/metrics.jsonl").open("a") as metrics:
            metrics.write('{"step": 99')  # what a crash in the middle of a write leaves
    train(config, resume="latest")
    assert_equal_runs(tmp_path / "run", whole)


def test_the_damaged_newest_checkpoint_is_set_aside_and_the_older_one_resumed(
    whole, small_base, small_rows, tmp_path, caplog
):
    shutil.copytree(whole, tmp_path / "run")
    newest = tmp_path / f"run/checkpoints/step-{NUM_STEPS:06d}"
    content = bytearray((newest / "optimizer.safetensors").read_bytes())
    content[-5] ^= 4
    (newest / "optimizer.safetensors").write_bytes(content)
    config = config_of(small_base, small_rows, tmp_path / "run")
    seen = []
    train(config, resume="latest", on_step=lambda values: seen.append(values["step"]))
    assert seen == [11]
    assert "step-000011 is damaged (optimizer.safetensors does not match the manifest)" in caplog.text
    assert newest.with_name("step-000011.damaged").is_dir()
    assert_equal_runs(tmp_path / "run", whole)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("train", "weight_decay", 0.5),
        ("train", "per_device_train_batch_size", 2),
        ("train", "max_steps", 13),
        ("train", "seed", 7),
        ("lora", "r", 8),
        ("lora", "dropout", 0.0),
        ("data", "packing", "wrapped"),
        ("data", "template", "dolly"),
        ("model", "quantization", "nf4"),
        ("kernels", "attention", "eager"),
    ],
)
def test_another_configuration_is_refused_naming_the_key(whole, small_base, small_rows, section, key, value):
    config = config_of(small_base, small_rows, whole, **{section: {key: value}})
    with pytest.raises(ConfigError, match=rf"{section}\.{key}: .* in the checkpoint, .* given") as caught:
        train(config, resume="latest")
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("num_rows", [12, 90])
def test_other_data_under_the_same_name_is_refused(whole, small_base, tmp_path, num_rows):
    """`--resume` promises the same rows in the same order, and a file's name says nothing of its rows."""
    shutil.copytree(whole, tmp_path / "run")
    source = tmp_path / "rows.jsonl"
    config = config_of(small_base, source, tmp_path / "run")
    saved = tmp_path / "run/checkpoints/step-000011/config.resolved.yaml"
    saved.write_text(dump_config(config))
    seal(saved.parent)
    before = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    changed = rows(num_rows)
    for row in changed[:6]:  # more than are held out
        row["instruction"] = f"Now: {row['instruction']}"
    source.write_text("".join(json.dumps(row) + "\n" for row in changed), encoding="utf-8")
    said = f"cannot resume on other data: 10 documents in the checkpoint, {num_rows - 2} now, .* another train"
    with pytest.raises(InputError, match=said) as caught:
        train(config, resume="latest")
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == before
    # The rows of then are the run's, in whatever file they lie.
    write_rows(source, 12)
    assert train(config, resume="latest").state.step == NUM_STEPS


def seal(checkpoint: Path) -> None:
    """Makes the manifest say what the files are."""
    (checkpoint / "manifest.json").unlink()
    checkpoint_module._seal(checkpoint)


def test_a_checkpoint_that_does_not_know_its_data_is_continued_and_then_does(
    whole, small_base, small_rows, tmp_path, caplog
):
    shutil.copytree(whole, tmp_path / "run")
    for name in ("step-000008", "step-000010", "step-000011"):
        shutil.rmtree(tmp_path / "run/checkpoints" / name)
    older = tmp_path / "run/checkpoints/step-000006/state.json"
    state = json.loads(older.read_text())
    older.write_text(json.dumps({name: state[name] for name in state if name not in ("num_documents", "data_digest")}))
    seal(older.parent)
    caplog.set_level("INFO")
    train(config_of(small_base, small_rows, tmp_path / "run"), resume="latest")
    assert "step-000006 does not say which data it was made with" in caplog.text
    assert_equal_runs(tmp_path / "run", whole)  # state.json included


def test_every_changed_key_is_named(whole, small_base, small_rows):
    config = config_of(small_base, small_rows, whole, train={"weight_decay": 0.5, "seed": 7}, lora={"r": 8})
    with pytest.raises(ConfigError) as caught:
        train(config, resume="latest")
    assert all(key in str(caught.value) for key in ("train.weight_decay", "train.seed", "lora.r"))
    assert "output_dir:" not in str(caught.value)


def test_what_does_not_touch_the_numbers_may_change(whole, small_base, small_rows, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    changes = {"log": {"every": 3}, "checkpoint": {"every": 7, "keep": 1}, "train": {"eval_every": 2}}
    config = config_of(small_base, small_rows, tmp_path / "run", **changes)
    train(config, resume=str(tmp_path / "run/checkpoints/step-000010"))
    expected = [values for values in read_metrics(whole) if "loss" in values]
    assert [values for values in read_metrics(tmp_path / "run") if "loss" in values] == expected


@pytest.mark.parametrize("given", [{"gradient_checkpointing": "all"}, {}], ids=str)
def test_a_run_goes_on_with_less_memory_and_the_same_losses(whole, small_base, small_rows, tmp_path, given, caplog):
    """The file says `auto`, which on a CPU recomputes nothing."""
    config = config_of(small_base, small_rows, tmp_path / "run", kernels={"keep_inputs": 2})

    def stop(values: dict) -> None:
        if values["step"] == 5:
            os.kill(os.getpid(), signal.SIGINT)

    assert train(config, on_step=stop).state.step == 6
    caplog.clear()
    resumed = config_of(small_base, small_rows, tmp_path / "run", train=given, kernels={"keep_inputs": 2})
    with caplog.at_level("INFO", logger="packloop"):
        train(resumed, resume="latest")
    told = [message for message in caplog.messages if message.startswith("resumed with another use of memory")]
    which = [line.rpartition(": ")[2] for line in told]
    assert which == (["train.gradient_checkpointing 0 -> all"] if given else [])
    for directory in (tmp_path / "run", tmp_path / "run/checkpoints/latest"):
        if directory.is_file():
            directory = directory.with_name(directory.read_text().strip())
        written = yaml.safe_load((directory / "config.resolved.yaml").read_text())
        assert written["train"]["gradient_checkpointing"] == given.get("gradient_checkpointing", 0)
        assert written["kernels"]["keep_inputs"] == 2
    assert_equal_runs(tmp_path / "run", whole)


def test_auto_stands_for_the_checkpoints_choice_under_another_budget_too(tmp_path, caplog):
    saved = {"train": {"gradient_checkpointing": 12}, "kernels": {"dequant_cache": 3, "keep_inputs": "all"}}
    (tmp_path / "config.resolved.yaml").write_text(yaml.safe_dump(saved))
    given = parse_config({"train": {"memory_budget_gib": 22.0}, "kernels": {"keep_inputs": "none"}})
    with caplog.at_level("INFO", logger="packloop"):
        config = config_for_resume(given, tmp_path)
    assert (config.train.gradient_checkpointing, config.train.memory_budget_gib) == (12, 22.0)
    assert (config.kernels.dequant_cache, config.kernels.keep_inputs) == (3, "none")
    (told,) = caplog.messages
    assert told.endswith(": train.memory_budget_gib null -> 22.0, kernels.keep_inputs all -> none")


def test_resumed_from_an_older_checkpoint_the_newer_ones_are_set_aside(whole, small_base, small_rows, tmp_path):
    """`latest` must not return to a continuation that was given up, whose steps metrics.jsonl no longer has."""
    shutil.copytree(whole, tmp_path / "run")
    config = config_of(small_base, small_rows, tmp_path / "run")

    def stop(values: dict) -> None:
        if values["step"] == 5:
            os.kill(os.getpid(), signal.SIGINT)

    assert train(config, resume=str(tmp_path / "run/checkpoints/step-000004"), on_step=stop).state.step == 6
    assert (tmp_path / "run/checkpoints/step-000010.superseded").is_dir()
    seen = []
    train(config, resume="latest", on_step=lambda values: seen.append(values["step"]))
    assert seen == list(range(7, NUM_STEPS + 1))
    assert_equal_runs(tmp_path / "run", whole)


def test_the_output_directory_must_be_empty_and_the_choices_are_named(whole, small_base, small_rows, tmp_path):
    with pytest.raises(InputError, match=r"not empty; .*--resume latest.* another train\.output_dir") as caught:
        train(config_of(small_base, small_rows, whole))
    assert caught.value.exit_code == 1
    with pytest.raises(InputError, match="no usable checkpoint"):
        train(config_of(small_base, small_rows, tmp_path / "nothing"), resume="latest")
    with pytest.raises(InputError, match=r"cannot be used: manifest\.json is missing"):
        train(config_of(small_base, small_rows, whole), resume=str(tmp_path))


@pytest.mark.parametrize(
    ("num_processes", "on_gpu", "said"),
    [
        (2, False, "with 2 processes on a CPU each: it"),
        (1, True, "with 1 process on a GPU: it"),
    ],
)
def test_other_processes_or_devices_are_refused(whole, monkeypatch, num_processes, on_gpu, said):
    checkpoint = find_checkpoint(whole, "latest")
    checkpoint.check_processes(1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    of_one = "was written by 1 process on a CPU, whose .*; resume with 1 process on a CPU, or start a new run"
    with pytest.raises(ConfigError, match=f"cannot resume {checkpoint.path.name} {said} {of_one}"):
        checkpoint.check_processes(num_processes)


def test_a_finished_run_resumes_to_nothing(whole, small_base, small_rows, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    seen = []
    train(config_of(small_base, small_rows, tmp_path / "run"), resume="latest", on_step=seen.append)
    assert seen == []
    assert_equal_runs(tmp_path / "run", whole)


def resumed_kernels(tmp_path: Path, saved: dict, given: dict) -> dict:
    """`kernels` of a run that goes on, of which the checkpoint names what is `saved` beside one other choice."""
    written = {"kernels": {"layer": "fused", **saved}}
    (tmp_path / "config.resolved.yaml").write_text(yaml.safe_dump(written))
    return config_for_resume(parse_config({"kernels": given}), tmp_path).kernels.model_dump()


def test_what_an_older_run_does_not_name_is_what_ran_then(tmp_path):
    for given in ({}, {"gated": "none", "matmul": "torch"}):
        kernels = resumed_kernels(tmp_path, {}, given)
        assert (kernels["layer"], kernels["gated"], kernels["matmul"]) == ("fused", "none", "torch")
        assert kernels["token_reuse"] == "none"
    with pytest.raises(ConfigError, match=r"kernels\.gated: 'none' in the checkpoint, 'quack' given"):
        resumed_kernels(tmp_path, {}, {"gated": "quack"})


def test_a_run_with_gated_products_can_go_on_without_them_and_is_told(tmp_path, caplog):
    assert resumed_kernels(tmp_path, {"gated": "quack"}, {})["gated"] == "quack"
    assert not caplog.messages
    assert resumed_kernels(tmp_path, {"gated": "quack"}, {"gated": "none"})["gated"] == "none"
    (told,) = caplog.messages
    assert told == "kernels.gated=quack in the checkpoint, none from here on: equal to rounding only"
