"""`packloop bench run` on the CPU, every cell in a real process: results, failures, out of memory, stop and go on."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from forked import fork_from
from small_job import too_long
from typer.testing import CliRunner

from packloop.bench import run as runs
from packloop.bench import session as sessions
from packloop.bench.cell import load_subject
from packloop.bench.matrix import read_matrix
from packloop.bench.report import write_report
from packloop.bench.results import load_cell, load_cells
from packloop.bench.run import run_matrix
from packloop.cli import app
from packloop.config import parse_config
from packloop.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
TINY = {
    "base": {
        "model": {"dtype": "float32"},
        "lora": {"r": 8, "dropout": 0.1},
        "data": {"max_length": 64},
        "train": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "gradient_checkpointing": "none"},
        "kernels": {"attention": "sdpa"},
    },
    "synthetic": "tiny",
    "warmup": 1,
    "steps": 3,
}


def write(directory: Path, **keys) -> Path:
    path = directory / "matrix.yaml"
    path.write_text(yaml.safe_dump(TINY | keys, sort_keys=False))
    return path


def start(matrix: Path, output: Path) -> subprocess.Popen:
    script = "from packloop.cli import main; main()"
    return subprocess.Popen(
        [sys.executable, "-P", "-c", script, "bench", "run", str(matrix), "--output", str(output)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


class Gate:
    """A named pipe where a cell's rows should be: whoever reads them stands still until the pipe is taken away.

    However late the test's own process gets to run, the cell is found where it stands.
    """

    def __init__(self, path: Path):
        self.path = path
        os.mkfifo(path)

    def wait_for_reader(self, process: subprocess.Popen) -> None:
        """Until the cell's process, which `process` started, reads its rows; it then waits for what never comes."""
        deadline = time.monotonic() + 240
        while (writer := self._open()) is None:
            assert process.poll() is None, process.stdout.read()
            assert time.monotonic() < deadline, "no cell asked for its rows"
            time.sleep(0.02)
        self._writer = writer

    def _open(self) -> int | None:
        try:
            return os.open(self.path, os.O_WRONLY | os.O_NONBLOCK)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return None  # nobody reads yet

    def replace(self, text: str) -> None:
        """A file of these rows in the pipe's place."""
        os.close(self._writer)
        self.path.unlink()
        self.path.write_text(text)


@pytest.fixture
def forked_cells(monkeypatch):
    """Processes of cells that `run_matrix` starts from here; those of `start` and of the command line are real ones."""
    fork_from(runs, monkeypatch)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run without gate, stopped by SIGTERM in its second cell: (matrix, results, when the first was written)."""
    directory = tmp_path_factory.mktemp("stopped")
    rows = Gate(directory / "long.jsonl")
    long = {"data.source": str(directory / "long.jsonl"), "data.max_length": too_long(), "kernels.attention": "eager"}
    cells = {
        "plain": {"profile": True, "floor": True},
        "too-long": {"kernels.layer": "stock", "train.gradient_accumulation_steps": 1, **long},
        "wrong-target": {"lora.target_modules": ["q_prj"]},
    }
    matrix, output = write(directory, cells=cells, gate=False), directory / "results"
    process = start(matrix, output)
    rows.wait_for_reader(process)
    (child,) = psutil.Process(process.pid).children()
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 130, said
    assert said.splitlines()[-1].startswith("stopped; the same command goes on")
    # It ended its cell's process, and waited for that, before it ended itself.
    assert not child.is_running()
    row = {"instruction": "Write a long text.", "response": "a b c d e f g h " * too_long()}
    rows.replace(json.dumps(row) + "\n")
    return matrix, output, (output / "cells" / "plain.json").stat().st_mtime_ns


@pytest.mark.timeout(600)
def test_stopped_and_started_again_it_goes_on_at_the_next_cell(stopped, forked_cells, tmp_path):
    matrix, output, measured_at = stopped
    assert [cell.name for cell in load_cells(output)] == ["plain"]
    told = "- not measured yet, 2 of the matrix's 3 cells: too-long, wrong-target"
    assert told in write_report([output], tmp_path / "begun")[0].read_text().splitlines()
    result = CliRunner().invoke(app, ["bench", "run", str(matrix), "--output", str(output)])
    assert result.exit_code == 1  # one cell failed
    assert (output / "cells" / "plain.json").stat().st_mtime_ns == measured_at
    lines = result.output.splitlines()
    assert any(line.startswith("[1/3] plain: ") and line.endswith("(from before)") for line in lines)
    cells = {cell.name: cell for cell in load_cells(output)}
    assert len({cell.session for cell in cells.values()}) == 1
    assert "not measured yet" not in write_report([output], tmp_path / "whole")[0].read_text()

    plain = cells["plain"]
    assert plain.status == "measured"
    assert (plain.shape, plain.num_parameters, plain.settings) == ("tiny", 4_178_240, {})
    assert (plain.figures.warmup_steps, plain.figures.timed_steps) == (1, 3)
    assert plain.figures.slot_tokens_per_step == 2 * 64
    assert plain.config["kernels"]["layer"] == "fused", "what auto chose"
    assert plain.asked["kernels"]["layer"] == "auto"
    assert plain.asked["bench"] == plain.config["bench"]
    assert plain.config["bench"] == {"synthetic": "tiny", "tokenizer": None, "warmup": 1, "steps": 3}
    assert plain.loss_gate is None
    assert plain.floor.fraction > 0
    # Products timed apart, and what is left of the whole; apart they may take longer, however much on a busy CPU.
    assert sum(plain.floor.parts_ms.values()) >= plain.floor.ms * (1 - 1e-9)
    assert plain.profile.busy_ms <= plain.profile.step_ms
    assert plain.ceilings.gemm_tflops > 0
    assert plain.flops.peak_tflops == plain.ceilings.gemm_tflops
    assert plain.conditions.device.startswith("CPU")

    too_long_cell = cells["too-long"]
    assert too_long_cell.status == "out_of_memory"
    assert "can't allocate memory" in too_long_cell.reason
    assert too_long_cell.asked == too_long_cell.config
    assert too_long_cell.settings["data.source"] == "long.jsonl", "no folders of the machine"
    failed = cells["wrong-target"]
    assert failed.status == "failed"
    assert failed.reason.startswith("lora.target_modules=['q_prj'] match no layer of the model")
    assert [line for line in lines if line.startswith("wrong-target ") and "failed: lora.target_modules" in line]

    # Once more: what failed is tried again, what ran out of memory is a result.
    again = CliRunner().invoke(app, ["bench", "run", str(matrix), "--output", str(output), "--only", "too-long"])
    assert again.exit_code == 0
    assert "[1/1] too-long: out of memory" in again.output


def test_a_killed_run_leaves_no_process_that_goes_on_measuring(tmp_path):
    rows = Gate(tmp_path / "rows.jsonl")
    cells = {"plain": {"data.source": str(rows.path)}}
    process = start(write(tmp_path, cells=cells, gate=False), tmp_path / "results")
    rows.wait_for_reader(process)
    (child,) = psutil.Process(process.pid).children()
    process.kill()
    process.communicate(timeout=200)
    child.wait(timeout=200)
    assert not (tmp_path / "results" / "cells").exists()


def test_a_directory_with_another_matrix_or_other_conditions_is_refused(stopped, forked_cells, tmp_path):
    matrix, first, _ = stopped
    output = tmp_path / "results"
    shutil.copytree(first, output)
    with pytest.raises(InputError, match=r"was begun with another matrix \(steps: 3 -> 4\)"):
        run_matrix(matrix, output, steps=4)
    with pytest.raises(InputError, match=r"cell plain: train.seed: 0 -> 1"):
        run_matrix(matrix, output, overrides=["train.seed=1"])
    in_use = sessions.opened(output, sessions.make_plan(read_matrix(matrix)))
    with in_use, pytest.raises(InputError, match="another `packloop bench run` writes to it"):
        run_matrix(matrix, output)

    elsewhere = json.loads((output / "conditions.json").read_text()) | {"device": "NVIDIA H200"}
    (output / "conditions.json").write_text(json.dumps(elsewhere))
    (output / "cells" / "plain.json").unlink()
    with pytest.raises(InputError, match=r"under other conditions \(device: NVIDIA H200 -> CPU"):
        run_matrix(matrix, output, only=["plain"])

    values = json.loads((output / "matrix.json").read_text())
    values["plan"]["schema_version"] = 99
    (output / "matrix.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match="schema version 99, this packloop writes 1"):
        run_matrix(matrix, output)

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("words")
    with pytest.raises(InputError, match=r"is not empty and holds no matrix\.json"):
        run_matrix(matrix, tmp_path / "mine")


def test_a_wrong_step_has_no_rate(forked_cells, tmp_path, capsys):
    matrix = write(tmp_path, cells={"fused": {"kernels.layer": "fused"}})
    broken = [sys.executable, str(ROOT / "tests" / "bench_broken_cell.py")]
    assert not run_matrix(matrix, tmp_path / "results", command=broken)
    cell = load_cell(tmp_path / "results" / "cells" / "fused.json")
    assert cell.status == "wrong"
    assert cell.loss_gate.reference == "stock eager, pack by pack"
    assert not cell.loss_gate.passed
    said = capsys.readouterr().out
    table = said.partition("real tok/s")[2].splitlines()
    row = next(line for line in table if line.startswith("fused"))
    assert "wrong: its steps are not the reference's" in row
    assert f"{cell.figures.real_tokens_per_s.median:,.0f}" not in said

    # The right kernel, on the references that are there already.
    assert not run_matrix(matrix, tmp_path / "results")
    assert "(from before)" in capsys.readouterr().out
    (tmp_path / "results" / "cells" / "fused.json").unlink()
    assert run_matrix(matrix, tmp_path / "results")
    said = capsys.readouterr().out
    assert "references of the loss gate" not in said
    assert "of stock eager, pack by pack" in said
    assert load_cell(tmp_path / "results" / "cells" / "fused.json").loss_gate.largest_difference < 1e-5


def test_without_a_gpu_cells_that_need_one_are_named_and_nothing_runs(tmp_path):
    cells = {"plain": {}, "flash": {"kernels.attention": "flash_attn"}, "cudnn": {"kernels.attention": "cudnn"}}
    matrix = write(tmp_path, cells=cells)
    with pytest.raises(
        InputError, match=r"no CUDA GPU here, and kernels\.attention=flash_attn .* \(cells flash, cudnn\)"
    ):
        run_matrix(matrix, tmp_path / "results")
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("options", "keys", "named"),
    [
        ({"tokenizer": "./none"}, {}, "--tokenizer"),
        ({}, {"tokenizer": "./none"}, "{matrix}: tokenizer"),
        ({}, {"cells": {"plain": {}, "own": {"tokenizer": "./none"}}}, "{matrix}: cell own: tokenizer"),
    ],
)
def test_a_tokenizer_that_is_none_is_named_by_what_said_so_and_nothing_runs(tmp_path, options, keys, named):
    matrix = write(tmp_path, **({"cells": {"plain": {}}} | keys))
    with pytest.raises(InputError) as refused:
        run_matrix(matrix, tmp_path / "results", **options)
    assert str(refused.value).startswith(f"{named.format(matrix=matrix)}='./none' does not exist; ")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "results").exists()


def test_the_cell_s_own_process_does_not_blame_the_model_for_the_tokenizer():
    with pytest.raises(InputError, match=r"^--tokenizer='\./none' does not exist"):
        load_subject(parse_config(TINY["base"]), "tiny", "./none")


def test_a_process_that_cannot_start_ends_the_run_with_one_line(tmp_path):
    matrix = write(tmp_path, cells={"plain": {}}, gate=False)
    with pytest.raises(InputError, match=r"the process of cell plain cannot start: exit code 7; last words: no torch"):
        run_matrix(
            matrix, tmp_path / "results", command=[sys.executable, "-c", "print('no torch'); raise SystemExit(7)"]
        )


@pytest.mark.parametrize(
    ("text", "public"),
    [
        ("cannot read /home/me/data/rows.jsonl: gone", "cannot read rows.jsonl: gone"),
        ("model.name_or_path='/srv/models/llama' is of type", "model.name_or_path='llama' is of type"),
        ("30 tokens/s, 1/2 of it", "30 tokens/s, 1/2 of it"),
        ("meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-7b-hf"),
        ("see https://host/x, in ~/data/x", "see https://host/x, in x"),
        (
            "'https://huggingface.co/a/b/resolve/main/c.json': gone",
            "'https://huggingface.co/a/b/resolve/main/c.json': gone",
        ),
        (
            "hf://datasets/a/b and /srv/a/b of http://localhost:80/a/b",
            "hf://datasets/a/b and b of http://localhost:80/a/b",
        ),
        ("file:///home/me/rows.jsonl", "file://rows.jsonl"),
    ],
)
def test_reasons_name_no_folders(text, public):
    assert sessions.without_paths(text) == public


def test_a_file_as_output_is_refused(tmp_path):
    file = write(tmp_path, cells={"a": {}})
    with pytest.raises(InputError, match="is a file; give a directory"):
        run_matrix(file, file)
    with pytest.raises(InputError, match="is a file; give a directory elsewhere"):
        run_matrix(file, file / "below")


def test_a_refused_matrix_is_one_line_on_the_command_line(tmp_path):
    matrix = write(tmp_path, cells={})
    result = subprocess.run(
        [
            sys.executable,
            "-P",
            "-c",
            "from packloop.cli import main; main()",
            "bench",
            "run",
            str(matrix),
            "--output",
            "x",
        ],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert result.returncode == 2
    assert (
        result.stderr
        == f"error: {matrix}: the matrix is empty; give cells (name: settings) or axes (setting: values)\n"
    )
    assert not (tmp_path / "x").exists()
