"""Two results directories compared: what counts as slower, what is refused, what fails."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from bench_cells import cell, conditions, figures
from typer.testing import CliRunner

from packloop import cli
from packloop.bench.compare import FEWEST_STEPS, compare_directories, describe_comparison, rate_ratio
from packloop.bench.results import Cell, Figures, load_cell, save_cell
from packloop.bench.steps import Lap, lap_figures
from packloop.errors import ConfigError, InputError


def saved(directory: Path, *cells: Cell) -> Path:
    for one in cells:
        save_cell(directory, one)
    return directory


def compared(tmp_path: Path, before: Cell, after: Cell, **options):
    options = {"fail_below": 0.97} | options
    return compare_directories(saved(tmp_path / "a", before), saved(tmp_path / "b", after), **options)


def exit_code(*words: str | Path) -> int:
    """Of `packloop bench` with these words."""
    return CliRunner().invoke(cli.app, ["bench", *map(str, words)]).exit_code


def judged(tmp_path: Path, before: Cell, after: Cell, **options):
    """The verdict on one pair."""
    (verdict,) = compared(tmp_path, before, after, **options).verdicts
    return verdict


@pytest.mark.parametrize(
    ("rate", "noise", "words", "is_failure"),
    [
        (9000, 0.005, "SLOWER", True),
        (9900, 0.005, "no change that counts", False),
        (11000, 0.005, "faster", False),
        (9600, 0.2, "undecided: below the threshold, within the noise", False),
    ],
)
def test_slower_only_where_the_noise_cannot_explain_it(tmp_path, rate, noise, words, is_failure):
    before = cell("a", figures=figures(10000, noise=noise))
    verdict = judged(tmp_path, before, cell("a", figures=figures(rate, noise=noise)))
    assert (verdict.words, verdict.is_failure) == (words, is_failure)
    assert verdict.ratio.low <= verdict.ratio.value <= verdict.ratio.high
    assert verdict.ratio.value == pytest.approx(rate / 10000)


def test_the_interval_widens_with_the_noise_and_is_the_same_each_time():
    quiet, loud = (cell("a", figures=figures(10000, noise=noise)) for noise in (0.01, 0.1))
    first, second = rate_ratio(quiet, quiet), rate_ratio(loud, loud)
    assert second.high - second.low > 5 * (first.high - first.low) > 0
    assert rate_ratio(loud, loud) == second


def test_the_interval_holds_what_it_says_from_the_fewest_steps_on():
    """Of two equal sides in normal noise, and in noise with long tails; with 3 steps it would not."""
    generator = np.random.default_rng(3)
    draws = {
        "normal": lambda size: 1 + 0.01 * generator.standard_normal(size),
        "long tails": lambda size: np.exp(0.01 * np.exp(0.8 * generator.standard_normal(size))),
    }
    coverage = {}
    for name, draw in draws.items():
        for steps in (3, FEWEST_STEPS):
            held = 0
            for _ in range(250):
                ratio = rate_ratio(*(cell("a", figures=of_steps(draw(steps))) for _ in range(2)))
                held += ratio.low <= 1 <= ratio.high
            coverage[name, steps] = held / 250
    assert min(coverage[name, FEWEST_STEPS] for name in draws) >= 0.94
    assert max(coverage[name, 3] for name in draws) < 0.93


def of_steps(relative_ms: np.ndarray) -> Figures:
    laps = [Lap(float(ms) * 1e3, 16000, 16384, 15900, 1.0) for ms in relative_ms]
    return Figures(**lap_figures(laps, 0))


@pytest.mark.parametrize("steps", [1, 3, 4])
def test_with_too_few_steps_nothing_is_judged_and_the_exit_code_says_so(tmp_path, steps):
    before, after = (cell("x", figures=figures(rate, steps=steps)) for rate in (10000, 5000))
    comparison = compared(tmp_path, before, after)
    assert (comparison.failures, [verdict.name for verdict in comparison.unjudged]) == ([], ["x"])
    shown = describe_comparison(comparison)
    assert f"NOT JUDGED: {steps} timed steps, 5 are needed" in shown
    columns = [entry.strip() for entry in shown.splitlines()[2].split("|")[1:-1]]
    assert columns[3:5] == ["0.500", ""], "the ratio is told, without an interval"
    assert shown.splitlines()[-1].startswith("NOT JUDGED: 1 of 1 cell: x: too few timed steps")
    assert "--steps 5" in shown
    assert exit_code("compare", tmp_path / "a", tmp_path / "b") == 2


def test_too_few_steps_hide_no_failure(tmp_path):
    few = figures(10000, steps=3)
    sides = [tmp_path / "a", tmp_path / "b"]
    saved(sides[0], cell("x", figures=few, peak_gib=20), cell("gone"))
    saved(sides[1], cell("x", figures=few, peak_gib=30))
    comparison = compare_directories(*sides, fail_below=0.97)
    assert {verdict.name for verdict in comparison.failures} == {"x", "gone"}
    assert "NOT JUDGED: 3 timed steps, 5 are needed; MEMORY grew by 50.0%" in describe_comparison(comparison)
    assert describe_comparison(comparison).splitlines()[-1] == "FAILED: 2 of 2 cells: gone, x"
    assert exit_code("compare", *sides) == 1


def test_warm_up_steps_do_not_count():
    slow_start = figures(10000, warmup=4)
    assert rate_ratio(cell("a", figures=figures(10000)), cell("a", figures=slow_start)).low > 0.97


def test_a_cell_that_is_gone_fails_and_a_new_one_is_said(tmp_path):
    comparison = compare_directories(
        saved(tmp_path / "a", cell("kept"), cell("gone")),
        saved(tmp_path / "b", cell("kept"), cell("new")),
        fail_below=0.97,
    )
    words = {verdict.name: verdict.words for verdict in comparison.verdicts}
    assert words["gone"] == "MISSING in B"
    assert words["new"].startswith("new in B")
    assert [verdict.name for verdict in comparison.failures] == ["gone"]
    shown = describe_comparison(comparison)
    assert shown.splitlines()[2].startswith("| gone")
    assert shown.splitlines()[-1] == "FAILED: 1 of 3 cells: gone"


@pytest.mark.parametrize("status", ["out_of_memory", "failed", "wrong"])
def test_a_measured_cell_that_is_none_any_more_fails(tmp_path, status):
    verdict = judged(tmp_path, cell("a"), cell("a", None, status=status, reason="because"))
    assert verdict.is_failure
    assert "because" in verdict.words


def test_out_of_memory_in_both_is_no_failure_and_recovery_neither(tmp_path):
    lost = cell("a", None, status="out_of_memory", reason="22 GiB were not enough")
    assert not judged(tmp_path / "1", lost, lost).is_failure
    assert not judged(tmp_path / "2", lost, cell("a")).is_failure


def test_a_wrong_result_fails_even_where_it_was_wrong_before(tmp_path):
    wrong = cell("a", status="wrong", reason="losses differ")
    assert judged(tmp_path, wrong, wrong).is_failure


def test_memory_that_grows_by_more_than_a_twentieth_fails(tmp_path):
    assert not judged(tmp_path / "1", cell("a", peak_gib=20), cell("a", peak_gib=20.9)).is_failure
    verdict = judged(tmp_path / "2", cell("a", peak_gib=20), cell("a", peak_gib=21.2))
    assert verdict.is_failure
    assert "MEMORY grew by 6.0%" in verdict.words


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"conditions": conditions(device="NVIDIA A10G")}, "device"),
        ({"conditions": conditions(driver="590.2")}, "driver"),
        ({"conditions": conditions(versions={"torch": "2.12.0", "packloop": "0.1.0"})}, "versions.torch"),
        ({"batch": 6}, "train.per_device_train_batch_size"),
        ({"figures": figures(10000, steps=20)}, "timed_steps"),
        ({"figures": figures(10000, tokens=15000)}, "real_tokens_per_step"),
        ({"shape": "llama3-8b"}, "shape"),
        ({"who": "trl"}, "who"),
    ],
)
def test_different_conditions_are_refused_until_allowed(tmp_path, changes, key):
    before, after = cell("a"), cell("a", **changes)
    with pytest.raises(ConfigError, match=key):
        judged(tmp_path, before, after)
    keys = [key, "slot_tokens_per_step", "label_tokens_per_step"]
    assert judged(tmp_path, before, after, allow_different=keys).words
    assert judged(tmp_path, before, after, allow_different=["all"]).words
    with pytest.raises(ConfigError, match=key):
        judged(tmp_path, before, after, allow_different=["python"])


def test_a_mistyped_key_is_not_taken_for_one_that_allows(tmp_path):
    before, after = cell("a"), cell("a", conditions=conditions(driver="590.2"))
    with pytest.raises(ConfigError, match=r"--allow-different drivr: .*did you mean driver\?") as caught:
        judged(tmp_path, before, after, allow_different=["drivr"])
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"did you mean train\.per_device_train_batch_size"):
        judged(tmp_path, before, after, allow_different=["driver", "train.per_device_batch_size"])
    for key in ("versions", "versions.absent", "config", "train", "timed_steps", "all"):
        assert judged(tmp_path, before, after, allow_different=["driver", key]).words


def test_commit_date_clocks_and_packloop_s_version_may_differ(tmp_path):
    after = conditions(
        commit="fff",
        uncommitted_changes=True,
        date="2026-02-03",
        after=None,
        versions={"torch": "2.11.0", "packloop": "2"},
    )
    verdict = judged(tmp_path, cell("a"), cell("a", conditions=after, session="another"))
    assert not verdict.is_failure


AUTO = {"kernels": {"dequant_cache": "auto", "layer": "auto"}, "train": {"gradient_accumulation_steps": 2}}


def settled(cached: int, asked: dict | None = AUTO, **changes) -> Cell:
    """A cell whose `auto` became the fused layer and that many cached layers."""
    config = {"kernels": {"dequant_cache": cached, "layer": "fused"}, "train": {"gradient_accumulation_steps": 2}}
    return cell("a", asked=asked, config=config, **changes)


def test_what_was_asked_for_is_compared_and_what_auto_chose_is_told(tmp_path):
    comparison = compared(tmp_path / "auto", settled(31), settled(32))
    assert comparison.choices == {"a": ["kernels.dequant_cache: 31 -> 32"]}
    assert not comparison.differences
    shown = describe_comparison(comparison)
    assert "auto chose otherwise in B, a: kernels.dequant_cache: 31 -> 32" in shown
    assert shown.endswith("passed: 1 cell")
    assert not compared(tmp_path / "same", settled(31), settled(31)).choices
    # The same choice, but in B it was asked for.
    fixed = {**AUTO, "kernels": {"dequant_cache": 31, "layer": "auto"}}
    with pytest.raises(ConfigError, match=r"config\.kernels\.dequant_cache: auto -> 31;"):
        compared(tmp_path / "fixed", settled(31), settled(31, fixed))
    lost = cell("a", None, status="out_of_memory", reason="no room", config=AUTO, asked=AUTO)
    comparison = compared(tmp_path / "lost", settled(31), lost)
    assert comparison.failures
    assert not comparison.choices


def test_a_side_that_does_not_tell_what_was_asked_is_held_to_what_it_ran(tmp_path):
    for name, sides in {"before": (None, AUTO), "after": (AUTO, None), "both": (None, None)}.items():
        same = [settled(31, asked) for asked in sides]
        assert judged(tmp_path / name / "same", *same).words == "no change that counts"
        with pytest.raises(ConfigError, match=r"config\.kernels\.dequant_cache: 31 -> 32;"):
            judged(tmp_path / name / "other", settled(31, sides[0]), settled(32, sides[1]))


def test_a_cell_s_file_from_before_what_was_asked_was_recorded_is_read(tmp_path):
    path = save_cell(tmp_path, settled(31))
    values = json.loads(path.read_text())
    assert values.pop("asked") == AUTO
    path.write_text(json.dumps(values))
    assert load_cell(path) == settled(31, None)


def test_a_lower_power_limit_is_another_condition(tmp_path):
    capped = conditions()
    capped = capped.model_copy(update={"before": capped.before.model_copy(update={"power_limit_w": 300.0})})
    with pytest.raises(ConfigError, match=r"power_limit_w: 700\.0 -> 300\.0"):
        judged(tmp_path, cell("a"), cell("a", conditions=capped))


@pytest.mark.parametrize(
    ("arrange", "error", "words"),
    [
        (lambda a, b: saved(a, cell("x")), ConfigError, "no such directory"),
        (lambda a, b: (saved(a, cell("x")), b.mkdir()), InputError, "no cells"),
        (lambda a, b: (saved(a, cell("x")), _other_version(b)), InputError, "schema version 7, this packloop reads 1"),
    ],
)
def test_results_that_cannot_be_compared_get_one_line(tmp_path, arrange, error, words):
    arrange(tmp_path / "a", tmp_path / "b")
    with pytest.raises(error, match=words) as raised:
        compare_directories(tmp_path / "a", tmp_path / "b", fail_below=0.97)
    assert "\n" not in str(raised.value)


def _other_version(directory: Path) -> None:
    path = save_cell(directory, cell("x"))
    path.write_text(path.read_text().replace('"schema_version": 1', '"schema_version": 7'))


def test_a_threshold_that_is_no_ratio_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="--fail-below 97"):
        judged(tmp_path, cell("a"), cell("a"), fail_below=97)


@pytest.mark.parametrize(("rate", "code"), [(10000, 0), (9000, 1)])
def test_the_command_s_exit_code_is_the_verdict(tmp_path, capsys, monkeypatch, rate, code):
    saved(tmp_path / "a", cell("x"))
    saved(tmp_path / "b", cell("x", rate))
    arguments = ["packloop", "bench", "compare", str(tmp_path / "a"), str(tmp_path / "b"), "--fail-below", "0.95"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert (ended.value.code or 0) == code
    assert ("FAILED" in capsys.readouterr().out) == bool(code)
