"""`packloop bench compare`: one results directory against another, cell by cell, with the noise of both counted in.

The rule. A cell's steps give one rate each: the real tokens of a mean step over the step's milliseconds. Of the steps
of both sides, drawn with replacement 10,000 times, the ratios of medians (B to A) give an interval that holds 95 % of
them. A cell is slower only where the interval's upper end is below the threshold, faster only where its lower end is
above 1. It knows the noise from step to step, not that from one process to the next.

With fewer than 5 timed steps on a side its rate is not judged. In simulations with two equal sides (normal, lognormal
and spiky noise) the interval holds the true ratio 1 in 94 to 97 % of cases from 5 steps on, but with 4 in 92 to 94 %,
with 3 in 88 to 90 % and with 2 in 65 to 69 %: a median's draws are then too often the two or three values themselves.
Where noise carries over from one step to the next (correlation 0.5) it is 80 % even with 10.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from packloop.bench.document import Table, markdown_table
from packloop.bench.results import Cell, Figures, load_cells
from packloop.errors import ConfigError

RESAMPLES = 10_000
COVERAGE = 0.95
# Below this the interval of a median holds less than it says.
FEWEST_STEPS = 5
MEMORY_GROWTH = 1.05

# Conditions that differ between two runs of the same thing: what is compared, the moment, and where it is written.
_NATURAL = ("commit", "uncommitted_changes", "date", "before", "after", "versions.packloop", "config.train.output_dir")
_WORKLOAD = ("warmup_steps", "timed_steps", "real_tokens_per_step", "slot_tokens_per_step", "label_tokens_per_step")
_STATUS_WORDS = {"out_of_memory": "out of memory", "wrong": "wrong result", "failed": "failed", "measured": "measured"}


@dataclass(frozen=True)
class Ratio:
    """Median rate of B to that of A, with the interval of its resampled values."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Verdict:
    """What came of one cell. is_failure: the comparison as a whole then fails; is_judged: its rate could be judged."""

    name: str
    words: str
    is_failure: bool = False
    is_judged: bool = True
    rates: tuple[float, float] | None = None
    ratio: Ratio | None = None
    peaks_gib: tuple[float, float] | None = None
    loss_difference: float | None = None


@dataclass
class Comparison:
    """All cells of both sides. differences: condition -> values, those allowed to differ included.

    choices: cell -> what `auto` chose otherwise in B, `kernels.dequant_cache: 31 -> 32`, where the same was asked for.
    """

    verdicts: list[Verdict]
    differences: dict[str, list[str]] = field(default_factory=dict)
    choices: dict[str, list[str]] = field(default_factory=dict)

    @property
    def failures(self) -> list[Verdict]:
        return [verdict for verdict in self.verdicts if verdict.is_failure]

    @property
    def unjudged(self) -> list[Verdict]:
        return [verdict for verdict in self.verdicts if not verdict.is_judged]


def compare_directories(
    before: Path, after: Path, *, fail_below: float, allow_different: Sequence[str] = ()
) -> Comparison:
    """B (`after`) against A (`before`), paired by the cells' names.

    allow_different: keys of conditions, each with all below it, or `all`. ConfigError where others differ, and for a
    key that no cell has.
    """
    if not 0 < fail_below <= 1:
        raise ConfigError(f"--fail-below {fail_below} is no ratio above 0 and up to 1; 0.97 allows a loss of 3 %")
    sides = [_by_name(directory) for directory in (before, after)]
    _check_allowed(allow_different, sides)
    differences = _differences(*sides)
    refused = {key: values for key, values in differences.items() if not _is_allowed(key, allow_different)}
    if refused:
        raise ConfigError(_refusal(refused))
    names = list(dict.fromkeys([*sides[0], *sides[1]]))
    verdicts = [_judge(name, sides[0].get(name), sides[1].get(name), fail_below) for name in names]
    choices = {name: _choices(sides[0][name], sides[1][name]) for name in names if all(name in side for side in sides)}
    return Comparison(verdicts, differences, {name: found for name, found in choices.items() if found})


def _by_name(directory: Path) -> dict[str, Cell]:
    if not directory.is_dir():
        raise ConfigError(f"results {str(directory)!r}: no such directory; `packloop bench run` writes one")
    return {cell.name: cell for cell in load_cells(directory)}


def _differences(before: dict[str, Cell], after: dict[str, Cell]) -> dict[str, list[str]]:
    """Condition -> the differing values of each cell that has them, as `A -> B`, every distinct one once."""
    found: dict[str, list[str]] = {}
    for name in before.keys() & after.keys():
        left, right = _conditions(before[name], after[name]), _conditions(after[name], before[name])
        if before[name].figures and after[name].figures:
            left, right = left | _workload(before[name].figures), right | _workload(after[name].figures)
        for key in sorted(left.keys() | right.keys()):
            if left.get(key) != right.get(key):
                change = f"{left.get(key)} -> {right.get(key)}"
                if change not in found.setdefault(key, []):
                    found[key].append(change)
    return dict(sorted(found.items()))


def _conditions(cell: Cell, other: Cell) -> dict[str, Any]:
    """What the cell must share with `other` for their rates to be comparable, flat, by dotted key.

    Of the configuration what was asked for; what came of it where one of the two does not tell what was asked for.
    """
    found: dict[str, Any] = {"shape": cell.shape, "who": cell.who}
    found |= dict(_flat(cell.conditions.model_dump(mode="json")))
    config = cell.config if cell.asked is None or other.asked is None else cell.asked
    found |= {f"config.{key}": value for key, value in _flat(config)}
    found["power_limit_w"] = cell.conditions.before.power_limit_w if cell.conditions.before else None
    return {key: value for key, value in found.items() if not any(_is_under(key, natural) for natural in _NATURAL)}


def _choices(before: Cell, after: Cell) -> list[str]:
    """What was settled otherwise from the same request, of two cells that were measured."""
    if before.asked is None or after.asked is None or not (before.figures and after.figures):
        return []
    asked = [dict(_flat(cell.asked)) for cell in (before, after)]
    chosen = [dict(_flat(cell.config)) for cell in (before, after)]
    return [
        f"{key}: {value} -> {chosen[1].get(key)}"
        for key, value in chosen[0].items()
        if value != chosen[1].get(key) and asked[0].get(key) == asked[1].get(key)
    ]


def _workload(figures: Figures) -> dict[str, float]:
    return {key: round(getattr(figures, key), 1) for key in _WORKLOAD}


def _is_under(key: str, ancestor: str) -> bool:
    return key == ancestor or key.startswith(f"{ancestor}.")


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs = []
    for key, value in values.items():
        if isinstance(value, dict) and value:
            pairs.extend(_flat(value, f"{prefix}{key}."))
        else:
            pairs.append((f"{prefix}{key}", value))
    return pairs


def _is_allowed(key: str, allowed: Sequence[str]) -> bool:
    bare = key.removeprefix("config.")
    return any(one == "all" or _is_under(key, one) or _is_under(bare, one) for one in allowed)


def _check_allowed(allowed: Sequence[str], sides: list[dict[str, Cell]]) -> None:
    """ConfigError for a key that allows nothing: it is mistyped. A package may be missing from all versions."""
    known = {"versions", *_WORKLOAD}
    for cell in (cell for side in sides for cell in side.values()):
        known |= _conditions(cell, cell).keys()
    for one in allowed:
        if one.startswith("versions.") or any(_is_allowed(key, [one]) for key in known):
            continue
        bare = {key.removeprefix("config.") for key in known}
        near = difflib.get_close_matches(one, sorted(known | bare), n=1)
        hint = f"; did you mean {near[0]}?" if near else ", for example device, versions.torch or kernels.attention"
        raise ConfigError(f"--allow-different {one}: no condition of these results{hint}")


def _refusal(refused: dict[str, list[str]]) -> str:
    shown = "; ".join(f"{key}: {', '.join(values[:2])}" for key, values in list(refused.items())[:6])
    more = f"; and {len(refused) - 6} more" if len(refused) > 6 else ""
    flags = " ".join(f"--allow-different {key}" for key in list(refused)[:3]) if len(refused) <= 3 else ""
    return (
        f"the two were not run under the same conditions: {shown}{more}; run them alike, or compare all the same with "
        f"{flags or '--allow-different KEY for each, or --allow-different all'}"
    )


def _judge(name: str, before: Cell | None, after: Cell | None, fail_below: float) -> Verdict:
    if after is None:
        return Verdict(name, "MISSING in B", is_failure=True)
    if before is None:
        return Verdict(
            name,
            f"new in B, {_STATUS_WORDS[after.status]}: nothing to compare with",
            is_failure=after.status == "wrong",
        )
    if before.status != "measured" or after.status != "measured":
        return _judge_status(name, before, after)
    return _judge_rates(name, before, after, fail_below)


def _judge_status(name: str, before: Cell, after: Cell) -> Verdict:
    was, now = _STATUS_WORDS[before.status], _STATUS_WORDS[after.status]
    reason = f": {after.reason}" if after.reason else ""
    if before.status == after.status:
        return Verdict(name, f"{now} in both", is_failure=after.status == "wrong")
    if after.status == "measured":
        return Verdict(name, f"was {was}, now measured")
    return Verdict(
        name, f"was {was}, now {now.upper()}{reason}", is_failure=before.status == "measured" or after.status == "wrong"
    )


def _judge_rates(name: str, before: Cell, after: Cell, fail_below: float) -> Verdict:
    steps = [len(step_rates(cell.figures)) for cell in (before, after)]
    is_judged = min(steps) >= FEWEST_STEPS
    ratio = rate_ratio(before, after) if is_judged else None
    if ratio is not None:
        words, is_failure = _speed(ratio, fail_below)
    else:
        given = " and ".join(map(str, dict.fromkeys(steps)))
        words, is_failure = f"NOT JUDGED: {given} timed steps, {FEWEST_STEPS} are needed", False
    peaks = None
    if before.memory and after.memory:
        peaks = before.memory.peak_counted_gib, after.memory.peak_counted_gib
        if peaks[0] > 0 and peaks[1] / peaks[0] > MEMORY_GROWTH:
            words, is_failure = f"{words}; MEMORY grew by {peaks[1] / peaks[0] - 1:.1%}", True
    rates = before.figures.real_tokens_per_s.median, after.figures.real_tokens_per_s.median
    losses = zip(before.figures.losses, after.figures.losses, strict=False)
    difference = max((abs(a - b) for a, b in losses), default=None)
    return Verdict(name, words, is_failure, is_judged, rates, ratio, peaks, difference)


def _speed(ratio: Ratio, fail_below: float) -> tuple[str, bool]:
    if ratio.high < fail_below:
        return "SLOWER", True
    if ratio.low > 1:
        return "faster", False
    if ratio.value < fail_below:
        return "undecided: below the threshold, within the noise", False
    return "no change that counts", False


def rate_ratio(before: Cell, after: Cell) -> Ratio:
    """Ratio of medians, B to A, with its bootstrap interval; the same draws every time.

    Of `FEWEST_STEPS` timed steps a side or more: with fewer the interval is too narrow.
    """
    generator = np.random.default_rng(0)
    medians = []
    for cell in (before, after):
        rates = step_rates(cell.figures)
        draws = generator.integers(0, len(rates), size=(RESAMPLES, len(rates)))
        medians.append(np.median(rates[draws], axis=1))
    tail = (1 - COVERAGE) / 2
    low, high = np.quantile(medians[1] / medians[0], [tail, 1 - tail])
    value = after.figures.real_tokens_per_s.median / before.figures.real_tokens_per_s.median
    return Ratio(value, float(low), float(high))


def step_rates(figures: Figures) -> np.ndarray:
    """Real tokens/s of every timed step, each step counted as the mean step's tokens."""
    timed_ms = np.array(figures.step_ms_all[figures.warmup_steps :], dtype=float)
    return figures.real_tokens_per_step / timed_ms * 1e3


def comparison_table(comparison: Comparison) -> Table:
    """One row a cell: failures first, then what is not judged."""
    columns = [
        "cell",
        "#A tokens/s",
        "#B tokens/s",
        "#B / A",
        "#95 % interval",
        "#A GiB",
        "#B GiB",
        "#loss off by",
        "verdict",
    ]
    rows = []
    for verdict in sorted(comparison.verdicts, key=lambda one: (not one.is_failure, one.is_judged)):
        rates = [f"{rate:,.0f}" for rate in verdict.rates] if verdict.rates else ["", ""]
        ratio = [f"{verdict.rates[1] / verdict.rates[0]:.3f}" if verdict.rates else ""]
        ratio.append(f"{verdict.ratio.low:.3f} to {verdict.ratio.high:.3f}" if verdict.ratio else "")
        peaks = [f"{peak:.1f}" for peak in verdict.peaks_gib] if verdict.peaks_gib else ["", ""]
        loss = "" if verdict.loss_difference is None else f"{verdict.loss_difference:.2g}"
        rows.append([verdict.name, *rates, *ratio, *peaks, loss, verdict.words])
    return Table(columns, rows)


def describe_comparison(comparison: Comparison) -> str:
    """The table, what `auto` chose otherwise, the conditions that were allowed to differ, and one line of result."""
    lines = [markdown_table(comparison_table(comparison)), ""]
    lines += [f"auto chose otherwise in B, {name}: {', '.join(found)}" for name, found in comparison.choices.items()]
    lines += [f"allowed to differ: {key}: {', '.join(values[:3])}" for key, values in comparison.differences.items()]
    total = len(comparison.verdicts)
    of_all = f"of {total} cell{'' if total == 1 else 's'}"
    if comparison.unjudged:
        names = ", ".join(verdict.name for verdict in comparison.unjudged)
        lines.append(
            f"NOT JUDGED: {len(comparison.unjudged)} {of_all}: {names}: too few timed steps to tell a change from "
            f"noise; run both sides with --steps {FEWEST_STEPS} or more"
        )
    if comparison.failures:
        names = ", ".join(verdict.name for verdict in comparison.failures)
        lines.append(f"FAILED: {len(comparison.failures)} {of_all}: {names}")
    elif not comparison.unjudged:
        lines.append(f"passed: {total} {of_all.rpartition(' ')[2]}")
    return "\n".join(lines)
