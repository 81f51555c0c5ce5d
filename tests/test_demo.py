"""`make demo` as it is run: one training of `recipes/demo.yaml`, whose figures every test here looks at."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from packloop.bundled.score import is_right
from packloop.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "demo.py"

# Far above what it takes on an idle machine: a busy one is not a failure.
pytestmark = pytest.mark.timeout(1200)


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> tuple[subprocess.CompletedProcess, Path, dict]:
    """(the finished process, the run's directory, the figures that the demo wrote down).

    PACKLOOP_DEMO_LOG names what `make demo` has just printed, where that has passed and need not run again.
    """
    if log := os.environ.get("PACKLOOP_DEMO_LOG"):
        run_dir, printed = ROOT / "runs" / "demo", Path(log).read_text(encoding="utf-8")
        return subprocess.CompletedProcess([], 0, printed, ""), run_dir, read_result(run_dir)
    run_dir = tmp_path_factory.mktemp("demo") / "run"
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT), "COLUMNS": "80"}
    environment.pop("OMP_NUM_THREADS", None)
    process = subprocess.run(
        [sys.executable, str(SCRIPT), str(run_dir)], env=environment, capture_output=True, text=True
    )
    return process, run_dir, read_result(run_dir)


def read_result(run_dir: Path) -> dict:
    return json.loads(run_dir.with_name(f"{run_dir.name}-result.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def script():
    """The demo's own functions."""
    spec = importlib.util.spec_from_file_location("packloop_demo", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def num_right(result: dict, model: str) -> int:
    return sum(is_right(row, text) for row, text in zip(result["rows"], result[model]["instructions"], strict=True))


def test_passes(demo):
    process, _, _ = demo
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]


def test_tuned_model_names_kind_and_entity_of_new_texts(demo):
    _, _, result = demo
    assert len(result["rows"]) >= 200
    assert num_right(result, "tuned") >= 0.7 * len(result["rows"])
    assert num_right(result, "base") < 0.1 * len(result["rows"])
    # The score looks for kind and entity anywhere; what was learnt are whole instructions.
    begun = [text.startswith(("Write ", "Draft ")) for text in result["tuned"]["instructions"]]
    assert sum(begun) >= 0.9 * len(begun)


def test_response_loss_is_at_least_halved(demo):
    _, run_dir, result = demo
    assert result["tuned"]["loss"] <= 0.5 * result["base"]["loss"]
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    evaluated = [values["eval_loss"] for values in map(json.loads, lines) if "eval_loss" in values]
    assert result["tuned"]["loss"] == pytest.approx(evaluated[-1], rel=1e-5)  # the loop's, the adapter not yet saved


def test_prints_rows_side_by_side_and_the_figures(demo):
    process, _, result = demo
    shown = process.stdout
    for title in ("input", "generated", "ground truth"):
        assert shown.count(f"] {title}\n") >= 3
    assert result["rows"][0]["response"].split("\n")[0] in shown
    assert result["tuned"]["instructions"][0] in shown
    summary = shown.partition("== Summary")[2]
    for model in ("base", "tuned"):
        assert f"{num_right(result, model) / len(result['rows']):.1%}" in summary
        assert f"{result[model]['loss']:.4f}" in summary


def test_leaves_a_run_and_a_merged_model(demo):
    _, run_dir, _ = demo
    for name in ("adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "README.md"):
        assert (run_dir / name).is_file()
    for name in ("model.safetensors", "config.json", "tokenizer.json", "README.md"):
        assert (run_dir.with_name(f"{run_dir.name}-merged") / name).is_file()


def test_a_demo_that_learns_too_little_fails(script):
    def measured(loss: float, right: int):
        return script.Measurement(loss=loss, num_right=right, instructions=[])

    assert script.find_faults(measured(6.0, 9), measured(3.0, 70), 100) == []
    faults = script.find_faults(measured(6.0, 10), measured(3.1, 69), 100)
    assert len(faults) == 3
    assert "69.0%" in faults[0]
    assert "10.0%" in faults[1]
    assert "3.1000" in faults[2]


def test_other_files_are_not_removed(script, tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "letter.txt").write_text("keep me")
    with pytest.raises(InputError, match="not empty"):
        script.main([str(run_dir)])
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert (run_dir / "letter.txt").read_text() == "keep me"
