"""`packloop plan` on a machine without GPU."""

from __future__ import annotations

import pytest

from packloop.bench.plan import parse_budget
from packloop.cli import main
from packloop.config import load_config
from packloop.errors import InputError
from packloop.gpus import GPUS

RECIPE = "recipes/llama2-7b-dolly.yaml"


def run(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["packloop", "plan", *arguments])
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as left:
        main()
    out, err = capsys.readouterr()
    return left.value.code or 0, out, err


def test_prints_tables_and_settings_that_train_takes(monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, RECIPE, "--synthetic", "tiny", "--gpu", "a10g", "--budget", "20GiB")
    assert code == 0
    for part in ("base weights", "activations", "base GEMM", "real tokens/s", "in all", "best settings"):
        assert part in out
    (line,) = [line for line in out.splitlines() if "train.per_device_train_batch_size=" in line]
    config = load_config(RECIPE, line.split())
    train = config.train
    assert train.per_device_train_batch_size * train.gradient_accumulation_steps == 12
    assert "global batch of 12 packs is kept" in out
    assert "projected to the a10g" in out


@pytest.mark.parametrize("how", [["--budget", "22GiB"], ["train.memory_budget_gib=22"]])
def test_a_budget_that_leaves_cuda_nothing_is_made_smaller_and_said(monkeypatch, capsys, how):
    code, out, _ = run(monkeypatch, capsys, RECIPE, *how, "--synthetic", "tiny", "--gpu", "a10g")
    assert code == 0
    assert "budget 21.5 GiB" in out
    words = " ".join(out.split())
    assert "of the 22.0 GiB of the a10g CUDA's own context takes about 0.5, so 21.5 GiB are the budget" in words


def test_auto_is_settled_within_the_budget(monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, "recipes/demo.yaml", "train.gradient_checkpointing=auto", "--gpu", "h200")
    assert code == 0
    assert "as configured" in out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([RECIPE, "--synthetic", "tiny"], 1, "no GPU at hand: name one with --gpu"),
        ([RECIPE, "--synthetic", "tiny", "--gpu", "a10g", "--probe"], 1, "leave --probe out"),
        ([RECIPE, "kernels.attention=flash_attn_4", "--synthetic", "tiny", "--gpu", "a10g"], 1, "9.0 is needed"),
        ([RECIPE, "--synthetic", "tiny", "--gpu", "z80"], 1, f"known: {GPUS[0].key}"),
        ([RECIPE, "--synthetic", "tiny", "--gpu", "t4"], 1, "has no bfloat16"),
        ([RECIPE, "--synthetic", "tiny", "--gpu", "a10g", "--budget", "30"], 2, "--budget 30: the a10g has 22.0 GiB"),
        (
            [RECIPE, "train.memory_budget_gib=24", "--synthetic", "tiny", "--gpu", "a10g"],
            2,
            "memory_budget_gib=24.0: the",
        ),
        ([RECIPE, "--synthetic", "tiny", "--gpu", "a10g", "--budget", "much"], 1, "an amount of memory is needed"),
        ([RECIPE, "--synthetic", "huge", "--gpu", "a10g"], 1, "model shape 'huge'"),
        ([RECIPE, "--synthetic", "llama2-7b", "--gpu", "a10g", "--budget", "3"], 3, "base weights"),
        ([RECIPE, "kernels.layer=stock", "--synthetic", "tiny", "--gpu", "a10g"], 1, "fused layers"),
        (["recipes/bundled-base.yaml", "--synthetic", "tiny", "--gpu", "a10g"], 1, "lora.enabled=false"),
        ([RECIPE, "kernels.attention=eager", "--synthetic", "tiny", "--gpu", "a10g"], 1, "predictions know"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_bad_input_gets_one_clear_line(monkeypatch, capsys, arguments, code, message):
    found, out, err = run(monkeypatch, capsys, *arguments)
    assert (found, out) == (code, "")
    assert err.startswith("error: ")
    assert message in err
    assert code == 3 or err.count("\n") == 1


def test_budgets_are_read_in_decimal_and_binary_units():
    assert parse_budget("22") == parse_budget("22GiB") == parse_budget(" 22 gib") == 22.0
    assert parse_budget("24GB") == pytest.approx(22.35, abs=0.01)
    assert parse_budget("512MiB") == 0.5
    for bad in ("", "0", "-3", "22 apples", "GiB"):
        with pytest.raises(InputError, match="an amount of memory is needed"):
            parse_budget(bad)
