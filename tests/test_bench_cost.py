"""Costs: what is measured, what is projected and by which arithmetic, the tutorial's rows, and price files."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

import pytest
import yaml
from bench_cells import cell, conditions

from packloop import cli
from packloop.bench.cost import (
    MEASURED,
    PROJECTED,
    TUTORIAL_DATA,
    DataSet,
    Split,
    estimate,
    measured_ceilings,
    scale_between,
    slowdown,
    splits_of,
)
from packloop.bench.cost_section import cost_blocks, cost_introduction, hours
from packloop.bench.document import Document, Paragraph, Table, render_markdown
from packloop.bench.prices import Instance, load_prices
from packloop.bench.results import Ceilings, Cell, Flops, Profile, save_cell
from packloop.bench.tutorial import INSTANCE, PUBLISHED, trains_like
from packloop.errors import ConfigError, InputError
from packloop.gpus import require_gpu

DATA = DataSet(rows=1000, epochs=2, tokens_per_row=100)
TUTORIAL_SETTINGS = {
    "kernels.layer": "stock",
    "kernels.attention": "eager",
    "data.packing": "wrapped",
    "train.gradient_checkpointing": "all",
    "model.quantization": "nf4",
    "model.dtype": "bfloat16",
    "lora.r": 64,
    "lora.dropout": 0.1,
    "lora.target_modules": ["q_proj", "v_proj"],
}
# 16,000 tokens at 10,000 tokens/s: a step of 1,600 ms, 100 of them idle.
PROFILE = Profile(
    step_ms=1600,
    busy_ms=1500,
    idle_share=1 / 16,
    by_class_ms={"base GEMM": 700, "attention": 200, "LoRA": 150, "norms": 250, "optimizer": 200},
)


def instance(name: str, gpu: str, dollars: float = 2.0, gpus: int = 1) -> Instance:
    return Instance(
        name=name, where="here", gpu=gpu, gpus=gpus, dollars_per_hour=dollars, date="2026-01", source="a test"
    )


def flops(hardware_tflops: float) -> Flops:
    return Flops(
        model_tflops=hardware_tflops,
        hardware_tflops=hardware_tflops,
        peak_tflops=989,
        peak_source="a test",
        model_utilisation=hardware_tflops / 989,
        hardware_utilisation=hardware_tflops / 989,
    )


def tutorial_cell(**changes) -> Cell:
    """Stock layers on an H200, in what the tutorial does without flash attention."""
    changes = {"settings": TUTORIAL_SETTINGS, "profile": PROFILE, "peak_gib": 14.0} | changes
    return cell("stock", 6000, **changes)


def test_on_the_cell_s_own_gpu_the_measured_rate_is_the_cost():
    one = estimate(cell("a", 10000), instance("x", "h200", dollars=36, gpus=2), DATA, {})
    assert one.basis == MEASURED
    assert one.seconds == pytest.approx(20)
    assert one.dollars == pytest.approx(20 / 3600 * 18)


def test_a_projection_scales_arithmetic_traffic_and_idle_each_its_way():
    one = estimate(cell("a", 10000, profile=PROFILE), instance("x", "a10g", dollars=1.212), DATA, {})
    step_ms = 900 * 989 / 70 + 600 * 4800 / 600 + 100
    assert one.basis == PROJECTED
    assert one.seconds == pytest.approx(20 * step_ms / 1600)
    assert one.dollars == pytest.approx(one.seconds / 3600 * 1.212)


def test_a_projection_onto_an_equal_gpu_changes_nothing():
    same = scale_between(require_gpu("h200"), require_gpu("h200"), {})
    assert slowdown(splits_of(cell("a", profile=PROFILE))[0], same) == pytest.approx(1)


def test_eager_attention_counts_as_traffic():
    assert splits_of(cell("a", profile=PROFILE)) == [Split(900, 600, 100, "profile")]
    eager = cell("a", profile=PROFILE, settings={"kernels.attention": "eager"})
    assert splits_of(eager) == [Split(700, 800, 100, "profile")]


def test_without_a_profile_the_split_is_by_flops_and_the_measured_gemm_rate():
    ceilings = Ceilings(gemm_tflops=700, copy_tb_per_s=4)
    (split,) = splits_of(cell("a", 10000, flops=flops(350), ceilings=ceilings))
    assert split.source == "FLOPs"
    assert (split.compute_ms, split.memory_ms) == pytest.approx((800, 800), rel=1e-3)
    (beyond,) = splits_of(cell("a", 10000, flops=flops(900), ceilings=ceilings))
    assert beyond.memory_ms == 0
    both = splits_of(cell("a", profile=PROFILE, flops=flops(350), ceilings=ceilings))
    assert [split.source for split in both] == ["profile", "FLOPs"]


def test_a_profile_of_a_cpu_is_no_split():
    assert splits_of(cell("a", profile=PROFILE.model_copy(update={"device": "cpu"}))) == []


def test_measured_rates_of_both_gpus_replace_the_makers():
    here = cell("a", ceilings=Ceilings(gemm_tflops=700, copy_tb_per_s=4.0))
    there = cell("b", ceilings=Ceilings(gemm_tflops=50, copy_tb_per_s=0.5), conditions=conditions(device="NVIDIA A10G"))
    pair = require_gpu("h200"), require_gpu("a10g")
    assert scale_between(*pair, measured_ceilings([here])).source == "datasheets"
    both = scale_between(*pair, measured_ceilings([here, there]))
    assert (both.compute, both.memory, both.source) == (14, 8, "measured")


@pytest.mark.parametrize(
    ("changes", "gpu", "words"),
    [
        ({"peak_gib": 21.7, "profile": PROFILE}, "a10g", "out of memory: 22.2 of 22.0 GiB"),
        ({}, "a10g", "no profile, no FLOPs"),
        ({"profile": PROFILE, "settings": {"kernels.attention": "flash_attn_4"}}, "a100", "no flash_attn_4 there"),
        ({"profile": PROFILE}, "t4", "no bf16"),
        ({"profile": PROFILE, "conditions": conditions(device="Some GPU")}, "a10g", "Some GPU is not in the GPU table"),
    ],
)
def test_what_cannot_be_projected_says_why(changes, gpu, words):
    one = estimate(cell("a", **changes), instance("x", gpu), DATA, {})
    assert (one.seconds, one.dollars, one.reason) == (None, None, words)


def test_the_tutorial_s_rows_are_as_published():
    without, with_flash = PUBLISHED
    assert (hours(without.seconds), without.dollars) == ("3:08 h", 3.7)
    assert (hours(with_flash.seconds), with_flash.dollars) == ("2:08 h", 2.6)
    assert round(without.dollars_at_its_price, 2) == 3.80
    assert round(with_flash.dollars_at_its_price, 2) == 2.59
    assert (without.batch, with_flash.batch) == (4, 6)
    (priced,) = load_prices(None, [INSTANCE])
    assert (priced.dollars_per_hour, priced.gpu) == (1.212, "a10g")


@pytest.mark.parametrize(
    ("changes", "is_like"),
    [
        ({}, True),
        ({"batch": 6}, False),
        ({"shape": "llama3-8b"}, False),
        ({"settings": TUTORIAL_SETTINGS | {"kernels.attention": "sdpa"}}, False),
        ({"settings": TUTORIAL_SETTINGS | {"kernels.layer": "fused"}}, False),
        ({"settings": TUTORIAL_SETTINGS | {"train.gradient_checkpointing": "none"}}, False),
        ({"settings": TUTORIAL_SETTINGS | {"data.packing": "bfd"}}, False),
        ({"settings": TUTORIAL_SETTINGS | {"data.max_length": 1024}}, False),
        ({"settings": TUTORIAL_SETTINGS | {"lora.r": 8}}, False),
        ({"settings": TUTORIAL_SETTINGS | {"lora.dropout": 0.0}}, False),
        ({"settings": TUTORIAL_SETTINGS | {"lora.target_modules": "all-linear"}}, False),
        ({"settings": TUTORIAL_SETTINGS | {"model.dtype": "float32"}}, False),
        ({"settings": TUTORIAL_SETTINGS | {"train.gradient_accumulation_steps": 4}}, False),
    ],
)
def test_the_error_is_checked_on_cells_that_train_as_the_tutorial_did(changes, is_like):
    assert trains_like(tutorial_cell(**changes), PUBLISHED[0]) is is_like
    assert not trains_like(tutorial_cell(**changes), PUBLISHED[1])


def test_the_tutorial_as_another_trainer_runs_it_is_like_it():
    theirs = trl_cell()
    assert trains_like(theirs, PUBLISHED[0])
    assert not trains_like(theirs, PUBLISHED[1])
    others = [{"liger": True}, {"lora_r": 8}, {"dropout": 0.0}, {"length": 1024}, {"targets": "all-linear"}]
    for change in [*others, {"accumulation": 1}, {"checkpointing": False}, {"packing": "bfd"}, {"batch": 8}]:
        assert not trains_like(trl_cell(**change), PUBLISHED[0]), change
    untold = dict(theirs.config)
    del untold["lora_r"]
    assert not trains_like(theirs.model_copy(update={"settings": untold, "config": untold}), PUBLISHED[0])


def trl_cell(**changes) -> Cell:
    settings = {
        "batch": 4,
        "accumulation": 2,
        "length": 2048,
        "packing": "wrapped",
        "targets": "qv",
        "lora_r": 64,
        "dropout": 0.1,
        "attention": "eager",
        "checkpointing": True,
        "liger": False,
    }
    settings |= changes
    return cell("batch-4", 5000, who="TRL").model_copy(update={"settings": settings, "config": settings})


def test_what_trains_something_else_is_not_beside_the_tutorial():
    faster = cell("small", 20000, settings=TUTORIAL_SETTINGS | {"lora.r": 8, "kernels.attention": "sdpa"})
    bfd = cell("bfd", 9000, settings=TUTORIAL_SETTINGS | {"data.packing": "bfd", "kernels.layer": "fused"})
    shorter = trl_cell(length=1024).model_copy(update={"name": "shorter"})
    text, tables = _section(tutorial_cell(), faster, bfd, shorter, trl_cell())
    beside = next(table for table in tables if table.columns[0] == "run")
    assert [row[0] for row in beside.rows[2:]] == ["bfd", "stock", "TRL: batch-4"]
    assert "something else: small (lora.r=8), TRL: shorter (length=1024)." in text
    assert "tutorial" not in _section(faster)[0]


def _section(*cells: Cell) -> tuple[str, list[Table]]:
    blocks = cost_blocks("one", list(cells), load_prices(), TUTORIAL_DATA, {})
    return render_markdown(Document("t", blocks)), [block for block in blocks if isinstance(block, Table)]


def test_published_and_projected_stand_beside_each_other_with_the_error():
    text, tables = _section(tutorial_cell())
    tutorial, error = tables[-2:]
    assert [row[0] for row in tutorial.rows] == [PUBLISHED[0].name, PUBLISHED[1].name, "stock"]
    assert tutorial.rows[0][4] == "$3.7 as published, $3.80 at its own price"
    assert tutorial.rows[2][-1] == PROJECTED
    seconds = TUTORIAL_DATA.tokens / 6000 * (700 * 989 / 70 + 800 * 8 + 100) / 1600
    assert error.rows == [
        [PUBLISHED[0].name, "3:08 h", "stock", "profile", hours(seconds), f"{seconds / (188 * 60) - 1:+.0%}"]
    ]
    assert "flash attention, and with it the batch from 4 to 6" in text


def test_what_the_tutorial_changed_at_once_is_told_apart_where_it_was_measured():
    flash = TUTORIAL_SETTINGS | {"kernels.attention": "flash_attn"}
    cells = [
        tutorial_cell(),
        cell("flash-4", 9000, settings=flash, profile=PROFILE),
        cell("flash-6", 9900, batch=6, settings=flash, profile=PROFILE),
    ]
    text, _ = _section(*cells)
    assert "flash attention at batch 4 is 1.50x eager, and batch 6 another 1.10x" in text
    assert "Apart" not in _section(tutorial_cell())[0]


def test_measured_and_projected_instances_are_in_tables_of_their_own():
    text, tables = _section(cell("a", profile=PROFILE))
    assert text.index("measured on this GPU:") < text.index("projected:")
    assert all("h200" in name for name in tables[0].columns[1:])
    assert not any("h200" in name for name in tables[1].columns[1:])


def test_cells_without_a_rate_have_no_cost_and_are_named():
    lost = cell("lost", None, status="out_of_memory", reason="22 GiB")
    wrong = cell("wrong", status="wrong", reason="losses")
    text, tables = _section(cell("a", profile=PROFILE), lost, wrong)
    assert "lost (out of memory), wrong (wrong result)" in text
    assert not any("wrong" in row[0] for table in tables for row in table.rows)
    assert isinstance(_only(cost_blocks("one", [lost], load_prices(), DATA, {})), Paragraph)


def _only(blocks):
    _, block = blocks
    return block


def test_a_cpu_s_rates_are_priced_nowhere():
    text, tables = _section(cell("a", conditions=conditions(device="CPU, AVX2, 2 threads")))
    assert tables == []
    assert "not in the GPU table" in text


def test_shipped_prices_are_dated_sourced_and_of_known_gpus():
    prices = load_prices()
    assert {one.model.key for one in prices} >= {"a10g", "a100-40gb", "a100-80gb", "h100", "h200"}
    assert all(one.source.startswith("https://") and one.date >= "2023" for one in prices)


GOOD = {
    "where": "here", "gpu": "a10g", "gpus": 1, "dollars_per_hour": 1.0, "date": "2026-01-02", "source": "an invoice",
}  # fmt: skip


def test_a_price_file_of_one_s_own_replaces_the_shipped_one(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "instances:\n  mine: {where: here, gpu: h200, gpus: 4, dollars_per_hour: 10, date: 2026-01-02, source: x}\n"
    )
    (mine,) = load_prices(path)
    assert (mine.name, mine.dollars_per_gpu_hour, mine.date) == ("mine", 2.5, "2026-01-02")


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        (None, InputError, "does not exist"),
        ("instances: [", ConfigError, "mine.yaml"),
        ("", ConfigError, "at least one instance"),
        ("instances: {}", ConfigError, "at least one instance"),
        ({"instances": {"x": GOOD}, "extra": 1}, ConfigError, "nothing else"),
        ({"instances": {"x": 1.2}}, ConfigError, "x must be a section"),
        ({"instances": {"x": GOOD | {"gpu": "b9000"}}}, ConfigError, "x.gpu: GPU 'b9000' is not known"),
        ({"instances": {"x": GOOD | {"dollars_per_hour": 0}}}, ConfigError, "x.dollars_per_hour: "),
        ({"instances": {"x": GOOD | {"dollars_per_hour": "cheap"}}}, ConfigError, "x.dollars_per_hour: "),
        ({"instances": {"x": GOOD | {"date": "soon"}}}, ConfigError, "x.date: a date as 2026-11-09"),
        ({"instances": {"x": GOOD | {"region": "here"}}}, ConfigError, "x.region: "),
        ({"instances": {"x": {"gpu": "a10g"}}}, ConfigError, "x.where: "),
        ("instances:\n  x: {}\n  x: {}\n", ConfigError, "given twice"),
    ],
)
def test_a_price_file_that_is_none_gets_one_line(tmp_path, content, error, words):
    path = tmp_path / "mine.yaml"
    if content is not None:
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    with pytest.raises(error) as raised:
        load_prices(path)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_an_unknown_instance_is_refused_before_anything_is_written(tmp_path, capsys, monkeypatch):
    save_cell(tmp_path / "results", cell("a"))
    arguments = ["packloop", "bench", "report", str(tmp_path / "results"), "--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", [*arguments, "--instance", "g9.huge"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --instance g9.huge: not in ")
    assert "g5.2xlarge" in line
    assert not (tmp_path / "out").exists()


def test_the_command_takes_a_data_set_and_instances(tmp_path, monkeypatch):
    save_cell(tmp_path / "results", cell("a", 10000))
    given = ["--rows", "1000", "--epochs", "2", "--tokens-per-row", "180", "--instance", "hyperstack-h200-sxm"]
    arguments = ["packloop", "bench", "report", str(tmp_path / "results"), "--output", str(tmp_path / "out"), *given]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    text = Path(tmp_path / "out" / "report.md").read_text()
    assert "1,000 rows x 2 epochs x 180 real tokens a row = 0.36 million tokens" in text
    assert f"36 s, ${36 / 3600 * 3.99:.2f}" in text or f"0.6 min, ${36 / 3600 * 3.99:.2f}" in text
    assert "p5.48xlarge" not in text


def test_the_report_says_where_its_default_tokens_per_row_are_from():
    def introduction(data: DataSet) -> str:
        return render_markdown(Document("t", cost_introduction([], data)))

    assert "151 is the mean of a sample of 100 rows of databricks-dolly-15k" in introduction(TUTORIAL_DATA)
    assert "sample of 100 rows" in introduction(DataSet(rows=4000, epochs=1, tokens_per_row=151))
    assert "sample" not in introduction(DATA)


def test_the_command_lines_defaults_are_the_tutorials_data():
    defaults = {name: one.default for name, one in inspect.signature(cli.report).parameters.items()}
    assert DataSet(defaults["rows"], defaults["epochs"], defaults["tokens_per_row"]) == TUTORIAL_DATA
