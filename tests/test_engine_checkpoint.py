"""Saving is all or nothing and loading trusts no file: kills, damage and full disks, on small tensors in real files."""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small_job import fork, read_metrics, small_config, tensors_equal, wait, write_rows

from packloop import cli
from packloop.config import dump_config
from packloop.engine.checkpoint import capture_rng, find_checkpoint, restore_rng, save_checkpoint, verify
from packloop.engine.loop import train
from packloop.engine.state import TrainState
from packloop.errors import InputError

FILES = ("adapter_model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json", "config.resolved.yaml")


def tensors(step: int, num_elements: int = 600) -> dict[str, torch.Tensor]:
    return {"a": torch.full((num_elements,), float(step)), "b": torch.arange(40.0) * step}


def save(run_dir: Path, step: int, *, keep: int = 9) -> Path:
    return save_checkpoint(
        run_dir,
        state=TrainState(step=step, epoch=1, cursor=step),
        write_weights=lambda directory: save_file(tensors(step), directory / "adapter_model.safetensors"),
        optimizer=tensors(step + 100),
        rng=capture_rng(0),
        config_yaml=f"train: {{seed: {step}}}\n",
        keep=keep,
    )


def assert_is(checkpoint, step: int) -> None:
    assert checkpoint.state == TrainState(step=step, epoch=1, cursor=step)
    assert tensors_equal(checkpoint.weights, tensors(step))
    assert tensors_equal(checkpoint.optimizer, tensors(step + 100))


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


# What can happen to a file. Each takes (file, another file of the checkpoint).


def flip(file: Path, other: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(file: Path, other: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def empty(file: Path, other: Path) -> None:
    file.write_bytes(b"")


def zero(file: Path, other: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def delete(file: Path, other: Path) -> None:
    file.unlink()


def swap(file: Path, other: Path) -> None:
    file.rename(file.with_name("aside"))
    other.rename(file)
    file.with_name("aside").rename(other)


def link(file: Path, other: Path) -> None:
    """The same bytes, but from elsewhere, where they may change after they were looked at."""
    outside = file.parents[2] / "outside"
    file.rename(outside)
    file.symlink_to(outside)


@pytest.mark.parametrize("damage", [flip, truncate, empty, zero, delete, swap, link])
@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_damage_to_any_file_is_found_and_the_older_checkpoint_loaded(tmp_path, caplog, name, damage):
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    other = FILES[(FILES.index(name) + 1) % len(FILES)] if name in FILES else FILES[0]
    damage(newest / name, newest / other)
    assert_is(find_checkpoint(tmp_path, "latest"), 1)
    assert re.search(r"step-000002 is damaged \(.+\): set aside as step-000002\.damaged", caplog.text)
    assert names(tmp_path) == ["latest", "step-000001", "step-000002.damaged"]
    save(tmp_path, 2)
    assert_is(find_checkpoint(tmp_path, "latest"), 2)


def test_a_file_too_many_is_damage(tmp_path):
    save(tmp_path, 1)
    (save(tmp_path, 2) / "model.safetensors").write_bytes(b"")
    assert_is(find_checkpoint(tmp_path, "latest"), 1)


@pytest.mark.parametrize("manifest", ["", "[]", "{}", '{"files": []}', '{"files": {"state.json": 3}}', "\x00"])
def test_no_manifest_however_odd_is_an_exception(tmp_path, manifest):
    path = save(tmp_path, 1)
    (path / "manifest.json").write_text(manifest)
    assert verify(path)
    with pytest.raises(InputError, match="no usable checkpoint"):
        find_checkpoint(tmp_path, "latest")


def test_a_named_checkpoint_that_is_damaged_is_refused_and_left_where_it_is(tmp_path):
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    flip(path / "optimizer.safetensors", path)
    with pytest.raises(InputError, match=r"cannot be used: optimizer\.safetensors .* --resume latest"):
        find_checkpoint(tmp_path, str(path))
    assert path.is_dir()


@pytest.mark.parametrize("latest", [None, "", "step-000009\n", "../elsewhere\n"])
def test_latest_may_be_missing_or_wrong(tmp_path, latest):
    save(tmp_path, 1)
    save(tmp_path, 2)
    pointer = tmp_path / "checkpoints/latest"
    assert pointer.read_text() == "step-000002\n"
    if latest is None:
        pointer.unlink()
    else:
        pointer.write_text(latest)
    assert_is(find_checkpoint(tmp_path, "latest"), 2)


def test_step_numbers_are_compared_as_numbers(tmp_path):
    save(tmp_path, 999_999)
    save(tmp_path, 1_000_000, keep=1)
    assert names(tmp_path) == ["latest", "step-1000000"]
    assert_is(find_checkpoint(tmp_path, "latest"), 1_000_000)


def test_only_verified_checkpoints_count_as_kept(tmp_path):
    save(tmp_path, 1)
    flip(save(tmp_path, 2) / "state.json", tmp_path)
    save(tmp_path, 3, keep=2)
    assert names(tmp_path) == ["latest", "step-000001", "step-000003"]
    save(tmp_path, 4, keep=2)
    assert names(tmp_path) == ["latest", "step-000003", "step-000004"]
    assert (tmp_path / "checkpoints/latest").read_text() == "step-000004\n"


def test_generators_continue_exactly(tmp_path):
    import random

    import numpy as np

    def draw() -> tuple:
        return random.gauss(0, 1), random.random(), np.random.randn(), np.random.rand(), torch.rand(3).tolist()

    draw()
    save(tmp_path, 1)
    expected = draw()
    draw()
    restore_rng(find_checkpoint(tmp_path, "latest").rng, 0)
    assert draw() == expected


def test_kill_at_every_file_operation_of_a_save(tmp_path):
    """kill -9 at the n-th opening, renaming, making or removing of a file, until a save has fewer than n of them."""
    save(tmp_path / "before", 1)
    save(tmp_path / "before", 2)
    loaded, num_operations = set(), 0
    while True:
        run_dir = tmp_path / f"killed-at-{num_operations}"
        shutil.copytree(tmp_path / "before", run_dir)
        child = fork(lambda run_dir=run_dir, n=num_operations: save_until(run_dir, n), tmp_path / "log")
        code = wait(child)
        step = find_checkpoint(run_dir, "latest").state.step
        assert_is(find_checkpoint(run_dir, "latest"), step)
        loaded.add(step)
        save(run_dir, 3, keep=2)  # goes on over whatever was left lying about
        assert names(run_dir) == ["latest", "step-000002", "step-000003"]
        if code == 0:
            break
        assert code == -signal.SIGKILL, (tmp_path / "log").read_text()
        num_operations += 1
    assert num_operations > 20
    assert loaded == {2, 3}


def save_until(run_dir: Path, num_operations: int) -> None:
    watched = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"}
    count = -1

    def hook(event: str, _arguments) -> None:
        nonlocal count
        if event in watched:
            count += 1
            if count == num_operations:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    save(run_dir, 3, keep=2)
    os._exit(0)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own of 512 KiB."""
    mounted = tmp_path / "disk"
    mounted.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(mounted)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("only root may mount a small file system")
    yield mounted
    subprocess.run(["umount", "--lazy", str(mounted)], check=True)


def fill(directory: Path, *, leaving: int) -> Path:
    ballast = directory / "ballast"
    ballast.write_bytes(bytes(shutil.disk_usage(directory).free - leaving))
    return ballast


ONE_LINE = (
    r"^cannot write to '[^\n]+': [^\n]*No space left[^\n]* \(at least [\d.]+ MiB needed, [\d.]+ MiB free\)[^\n]+$"
)


def test_a_full_disk_leaves_the_last_good_checkpoint_whatever_did_not_fit(small_disk):
    save(small_disk, 1)
    messages = []
    for leaving in range(0, 60_000, 4096):
        ballast = fill(small_disk, leaving=leaving)
        try:
            save(small_disk, 2)
        except InputError as error:
            messages.append(str(error))
        ballast.unlink()
        found = find_checkpoint(small_disk, "latest")
        assert_is(found, found.state.step)
        if found.state.step == 2:
            break
        assert names(small_disk) == ["latest", "step-000001"]
    assert len(messages) >= 5
    assert all(re.search(ONE_LINE, message) and "free some space" in message for message in messages)
    assert found.state.step == 2


def test_training_on_a_disk_that_fills_up(small_disk, small_base, tmp_path):
    """Whatever a run was writing when the disk was full: one line, and with space again it goes on exactly."""
    rows = write_rows(tmp_path / "rows.jsonl", 8)
    sections = {"train": {"max_steps": 4}, "data": {"eval_split": 2}, "checkpoint": {"every": 1}}
    train(small_config(small_base, rows, tmp_path / "whole", **sections))
    run_dir = small_disk / "run"
    config = small_config(small_base, rows, run_dir, **sections)
    messages, saved = [], []
    for leaving_kib in range(0, 1000, 24):
        ballast = fill(small_disk, leaving=leaving_kib * 1024)
        resume = "latest" if saved and saved[-1] else None
        if not resume:
            shutil.rmtree(run_dir, ignore_errors=True)
        try:
            train(config, resume=resume)
            break
        except InputError as error:
            messages.append(str(error))
        ballast.unlink()
        saved.append(len(list((run_dir / "checkpoints").glob("step-*"))) if run_dir.exists() else 0)
    assert all(re.search(ONE_LINE, message) for message in messages), messages
    assert set(saved) >= {0, 1}
    assert read_metrics(run_dir) == read_metrics(tmp_path / "whole")


def test_a_limit_on_the_size_of_files_is_one_line_and_exit_code_1(small_base, tmp_path):
    """A limit that any user can have; the optimizer's tensors grow past it, and nothing else does."""
    rows = write_rows(tmp_path / "rows.jsonl", 8)
    config = small_config(small_base, rows, tmp_path / "run", lora={"r": 32}, checkpoint={"every": 1})
    (tmp_path / "run.yaml").write_text(dump_config(config))

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (150 * 1024, 150 * 1024))
        sys.argv = ["packloop", "train", str(tmp_path / "run.yaml")]
        cli.main()

    assert wait(fork(limited, tmp_path / "log")) == 1
    (line,) = [line for line in (tmp_path / "log").read_text().splitlines() if line.startswith("error: ")]
    assert re.search(r"cannot write to '.*/run/checkpoints': .*File too large.* MiB needed, .* MiB free", line)
    assert "Traceback" not in (tmp_path / "log").read_text()
    assert names(tmp_path / "run") == []
