"""The output directory of a new run: what it may hold, and what is said where it may not."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from small_job import fork, read_metrics, read_steps, small_config, wait

from packloop.engine.checkpoint import find_checkpoint
from packloop.engine.finished_run import open_run
from packloop.engine.loop import train
from packloop.engine.output_dir import Claim, check_output_dir
from packloop.errors import InputError

SECTIONS = {"train": {"max_steps": 3}, "checkpoint": {"every": 3}}


def kill(values: dict) -> None:
    if values["step"] == 2:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def killed(small_base, small_rows, tmp_path_factory) -> Path:
    """A run that ended before its first checkpoint."""
    directory = tmp_path_factory.mktemp("killed")
    config = small_config(small_base, small_rows, directory / "run", **SECTIONS, log={"trackers": trackers()})
    child = fork(lambda: train(config, on_step=kill), directory / "log")
    assert wait(child) == -signal.SIGKILL, (directory / "log").read_text()
    assert [step["step"] for step in read_steps(directory / "run")] == [1, 2]
    return directory / "run"


def trackers() -> list[str]:
    return ["tensorboard"] if importlib.util.find_spec("tensorboard") else []


def leave_half_a_save(run_dir: Path) -> None:
    (run_dir / "checkpoints/.step-000003.tmp").mkdir(parents=True)
    (run_dir / "checkpoints/.step-000003.tmp/state.json").write_text("{")


def leave_half_a_line(run_dir: Path) -> None:
    (run_dir / "checkpoints").mkdir()
    (run_dir / ".environment.json.tmp").write_text("{")
    with (run_dir / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 99')


@pytest.mark.parametrize("leave", [lambda run_dir: None, leave_half_a_save, leave_half_a_line])
def test_a_run_that_ended_before_its_first_checkpoint_starts_over(
    killed, small_base, small_rows, tmp_path, leave, caplog
):
    run_dir = tmp_path / "run"
    shutil.copytree(killed, run_dir)
    leave(run_dir)
    config = small_config(small_base, small_rows, run_dir, **SECTIONS)
    # What --resume says then can be followed.
    with pytest.raises(InputError, match=r"no usable checkpoint in .*; start a new run without --resume"):
        train(config, resume="latest")
    with pytest.raises(InputError, match="it has no checkpoint either: train it anew"):
        open_run(run_dir)
    caplog.clear()
    with caplog.at_level("INFO", logger="packloop"):
        train(config)
    told = [message for message in caplog.messages if "starting over" in message]
    assert told == [f"starting over in {run_dir}: the run in it ended before its first checkpoint"]
    train(small_config(small_base, small_rows, tmp_path / "whole", **SECTIONS))
    assert read_metrics(run_dir) == read_metrics(tmp_path / "whole")
    assert [path.name for path in sorted((run_dir / "checkpoints").iterdir())] == ["latest", "step-000003"]


@pytest.mark.parametrize(
    "name",
    [
        "notes.txt",
        "adapter_model.safetensors",
        "model.safetensors",
        "checkpoints/mine.txt",
        "checkpoints/step-000003.damaged/state.json",
        "checkpoints/.step-000003.old/state.json",
        "packloop/notes.txt",
        "data/rows.jsonl",
    ],
)
def test_what_is_not_of_such_a_run_is_refused_and_left_alone(killed, tmp_path, name):
    run_dir = tmp_path / "run"
    shutil.copytree(killed, run_dir)
    (run_dir / name).parent.mkdir(parents=True, exist_ok=True)
    (run_dir / name).write_text("of another")
    before = contents(run_dir)
    said = rf"is not empty \('{name.split('/')[0]}' is in it\) and has no checkpoint to resume; choose another train\."
    with pytest.raises(InputError, match=said) as caught:
        check_output_dir(run_dir, resume=None)
    assert "--resume" not in str(caught.value)
    assert contents(run_dir) == before


def contents(directory: Path) -> dict[str, bytes]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


@pytest.mark.parametrize("name", ["tokenizer.json", "metrics.jsonl", "checkpoints/latest"])
def test_names_that_a_run_uses_do_not_make_one(tmp_path, name):
    """A run's first file is config.resolved.yaml; a tokenizer, say, may be somebody's own."""
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("")
    with pytest.raises(InputError, match="has no checkpoint to resume"):
        check_output_dir(tmp_path, resume=None)


def test_a_link_is_not_a_runs_file(killed, tmp_path):
    shutil.copytree(killed, tmp_path / "run")
    (tmp_path / "run/metrics.jsonl").rename(tmp_path / "elsewhere")
    (tmp_path / "run/metrics.jsonl").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"'metrics\.jsonl' is in it"):
        check_output_dir(tmp_path / "run", resume=None)


@pytest.mark.parametrize("resume", [None, "latest"])
@pytest.mark.parametrize("name", ["file", "file/run", "file/a/b"])
def test_a_file_where_a_directory_is_needed(tmp_path, name, resume):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(
        InputError, match=r"is a file and a directory is needed; choose another train\.output"
    ) as caught:
        check_output_dir(tmp_path / name, resume=resume)
    assert str(tmp_path / "file") in str(caught.value)
    assert "not empty" not in str(caught.value)


@pytest.mark.parametrize("resume", [None, "latest"])
def test_a_path_that_cannot_be_written_is_said_before_anything_is_loaded(small_base, small_rows, tmp_path, resume):
    path = Path("/proc/nope/x")
    config = small_config(tmp_path / "no-model", tmp_path / "no-rows.jsonl", path)
    said = r"train\.output_dir='/proc/nope/x' cannot be written, .* in '/proc' \(.*\); choose another train\.output_dir"
    with pytest.raises(InputError, match=said) as caught:
        train(config, resume=resume)
    assert "--resume" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a file system")
def test_a_read_only_file_system_is_said(tmp_path):
    command = ["mount", "-t", "tmpfs", "-o", "size=64k,ro", "tmpfs", str(tmp_path)]
    if subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("no file system can be mounted here")
    try:
        for path in (tmp_path, tmp_path / "run"):
            with pytest.raises(InputError, match=r"cannot be written, .*Read-only file system.*; choose another"):
                check_output_dir(path, resume=None)
    finally:
        subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


def test_nothing_is_left_where_a_run_may_begin(tmp_path):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "new", tmp_path / "new/deeper"):
        check_output_dir(path, resume=None)
    assert [path.name for path in tmp_path.rglob("*")] == ["empty"]
    (tmp_path / "empty/.packloop-probe-of-another-rank").mkdir()
    check_output_dir(tmp_path / "empty", resume=None)


def test_a_finished_run_is_offered_to_be_resumed(small_base, small_rows, tmp_path):
    config = small_config(small_base, small_rows, tmp_path / "run", **SECTIONS)
    train(config)
    with pytest.raises(InputError, match=r"is not empty; continue the run in it with --resume latest, or choose"):
        train(config)
    assert find_checkpoint(tmp_path / "run", "latest").state.step == 3


def test_two_runs_cannot_write_to_one_directory(small_base, small_rows, tmp_path):
    run_dir, refused = tmp_path / "run", []
    config = small_config(small_base, small_rows, run_dir, train={"max_steps": 5}, checkpoint={"every": 3})

    def start_another(values: dict) -> None:
        if values["step"] in (1, 4):  # before the first checkpoint and after it
            resume = "latest" if values["step"] == 4 else None
            with pytest.raises(InputError, match=r"^train\.output_dir='.*' is in use by another run of packloop; wait"):
                train(config, resume=resume)
            refused.append(values["step"])

    train(config, on_step=start_another)
    assert refused == [1, 4]
    assert [step["step"] for step in read_steps(run_dir)] == [1, 2, 3, 4, 5]
    with Claim(run_dir) as claim:
        claim.take()
        with pytest.raises(InputError, match="is in use"):
            train(config, resume="latest")
    train(config, resume="latest")


def test_a_claim_ends_with_its_process(tmp_path):
    def claim_and_die() -> None:
        claim = Claim(tmp_path)
        claim.take()
        os.kill(os.getpid(), signal.SIGKILL)

    assert wait(fork(claim_and_die, tmp_path / "log")) == -signal.SIGKILL
    with Claim(tmp_path) as claim, Claim(tmp_path) as other, Claim(tmp_path / "not there") as none:
        claim.take()
        claim.take()
        none.take()
        with pytest.raises(InputError, match="is in use"):
            other.take()
    with other:
        other.take()
