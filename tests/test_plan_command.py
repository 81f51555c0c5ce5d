"""`packloop plan` on a machine without GPU."""

from __future__ import annotations

import pytest
import torch

from packloop.bench import plan as plans
from packloop.bench.plan import parse_budget, plan
from packloop.cli import main
from packloop.config import load_config
from packloop.data.loader import build_data
from packloop.errors import InputError
from packloop.gpus import GPUS

RECIPE = "recipes/llama2-7b-dolly.yaml"


@pytest.fixture(autouse=True, scope="module")
def documents_once():
    """Rows are tokenised once for all tests here: nearly all of them plan for the bundled ones."""
    made = {}

    def build(data, tokenizer, *, seed):
        key = data.model_dump_json(), tokenizer.name_or_path, seed
        if key not in made:
            made[key] = build_data(data, tokenizer, seed=seed)
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plans, "build_data", build)
        yield


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


def test_gated_products_are_planned_for_where_they_are_asked_for_or_at_hand(monkeypatch):
    def fastest(gated: str, gpu: str = "h200"):
        config = load_config(RECIPE, [f"kernels.gated={gated}"])
        return plan(config, gpu=gpu, budget="20GiB", synthetic="tiny").best[0]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    without, gated = fastest("none"), fastest("quack")
    assert fastest("auto") == without
    assert without.time.tokens_per_s < gated.time.tokens_per_s
    assert not [line for line in without.overrides if "gated" in line]
    assert "kernels.gated=quack" in gated.overrides
    with pytest.raises(InputError, match=r"kernels\.gated=quack: the a10g has compute capability 8\.6, 9\.x is needed"):
        fastest("quack", gpu="a10g")
    unfit = load_config(RECIPE, ["kernels.gated=quack", "model.quantization=none"])
    with pytest.raises(InputError, match=r"kernels\.gated=quack: needs bfloat16, an NF4 base"):
        plan(unfit, gpu="h200", budget="20GiB", synthetic="tiny")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(plans, "why_not_quack", lambda device: None)
    assert fastest("auto") == gated
    assert fastest("auto", gpu="h100") == fastest("none", gpu="h100")
    monkeypatch.setattr(plans, "why_not_quack", lambda device: "needs quack-kernels")
    assert fastest("auto") == without


def cells(out: str, row: str) -> list[str]:
    """Of the table's row of that name, the cells after it."""
    (line,) = [line for line in out.splitlines() if line.startswith(f"│ {row} ")]
    return [cell.strip() for cell in line.strip("│").split("│")[1:]]


def test_what_is_small_is_no_nothing_and_kinds_of_work_keep_their_order(monkeypatch, capsys):
    _, out, _ = run(monkeypatch, capsys, RECIPE, "--synthetic", "tiny", "--gpu", "a10g")
    assert cells(out, "base weights") == ["< 0.01", "< 0.01"]
    order = ["base GEMM", "attention", "NF4 dequantisation", "LoRA", "norms", "head + loss", "copies", "idle"]
    table = out.partition("one step, ms")[2].partition("├")[0]
    found = [line.split("│")[1].strip() for line in table.splitlines() if "│" in line]
    assert [name for name in found if name in order] == [name for name in order if name in found]
    assert {"base GEMM", "LoRA", "idle"} <= set(found)


def test_a_configuration_that_cannot_fit_is_named_where_others_do(monkeypatch, capsys):
    code, out, _ = run(
        monkeypatch, capsys, RECIPE, "--synthetic", "llama2-7b", "--gpu", "a10g", "--budget", "6"
    )  # 6 packs a micro-batch need more than that, one does not
    assert code == 0
    assert "as configured: 6 packs a micro-batch do not fit the budget, whatever its auto settings become" in " ".join(
        out.split()
    )
    assert len(cells(out, "in all")) == 1


def test_auto_is_settled_within_the_budget(monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, "recipes/demo.yaml", "train.gradient_checkpointing=auto", "--gpu", "h200")
    assert code == 0
    assert "as configured" in out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([RECIPE, "--synthetic", "tiny"], 1, "no GPU at hand: name one with --gpu"),
        ([RECIPE, "--synthetic", "tiny", "--gpu", "a10g", "--probe"], 1, "leave --probe out"),
        ([RECIPE, "kernels.attention=flash_attn_4", "--synthetic", "tiny", "--gpu", "a10g"], 2, "9.0 is needed"),
        ([RECIPE, "--synthetic", "tiny", "--gpu", "z80"], 2, f"known: {GPUS[0].key}"),
        ([RECIPE, "--synthetic", "tiny", "--gpu", "t4"], 1, "has no bfloat16"),
        ([RECIPE, "--synthetic", "tiny", "--gpu", "a10g", "--budget", "30"], 2, "--budget 30: the a10g has 22.0 GiB"),
        (
            [RECIPE, "train.memory_budget_gib=24", "--synthetic", "tiny", "--gpu", "a10g"],
            2,
            "memory_budget_gib=24.0: the",
        ),
        ([RECIPE, "--synthetic", "tiny", "--gpu", "a10g", "--budget", "much"], 2, "--budget 'much': an amount of"),
        ([RECIPE, "--gpu", "a10g"], 1, "its configuration cannot be read ("),
        ([RECIPE, "--synthetic", "huge", "--gpu", "a10g"], 2, "model shape 'huge'"),
        ([RECIPE, "--synthetic", "llama2-7b", "--gpu", "a10g", "--budget", "3"], 3, "base weights"),
        ([RECIPE, "kernels.layer=stock", "--synthetic", "tiny", "--gpu", "a10g"], 1, "fused layers"),
        (["recipes/bundled-base.yaml", "--synthetic", "tiny", "--gpu", "a10g"], 2, "lora.enabled=false"),
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
