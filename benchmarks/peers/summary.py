"""What rows come to: ratios of rates against their bounds, a line a row, and the table at the end."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.peers.cases import Case, Check
from benchmarks.peers.protocol import is_measured

Row = dict[str, Any]


def rates(rows: list[Row], turn: str) -> list[float]:
    """Real tokens a second of the turns of this name that were measured."""
    return [row["real_tokens_per_s"]["median"] for row in rows if row["turn"] == turn and is_measured(row)]


def judge(case: Case, rows: list[Row]) -> list[dict[str, Any]]:
    """A over B and the case's other checks, each with its ratio, range over single turns, bound and verdict.

    ratio and met are None where a side has no rate, met also where there is no bound.
    """
    fractions = [row["fraction_of_floor"] for row in rows if row["turn"] == "A" and "fraction_of_floor" in row]
    of_floor = statistics.mean(fractions) if fractions else None
    verdicts = []
    for check in (Check("A", "B", case.bound), *case.checks):
        over, under = rates(rows, check.over), rates(rows, check.under)
        verdict = {"over": check.over, "under": check.under, "bound": check.bound, "ratio": None, "met": None}
        if over and under:
            ratio = statistics.mean(over) / statistics.mean(under)
            verdict |= {"ratio": ratio, "ratio_range": [min(over) / max(under), max(over) / min(under)]}
            verdict |= {"rates": [statistics.mean(over), statistics.mean(under)]}
            if check.bound is not None:
                verdict["met"] = ratio >= check.bound
        if check.over == "A":
            verdict["fraction_of_floor"] = of_floor
            if case.or_of_floor is not None and of_floor is not None and verdict["met"] is False:
                verdict["met"] = of_floor >= case.or_of_floor
        verdicts.append(verdict)
    return verdicts


def describe(row: Row) -> str:
    """One line."""
    head = f"{row['turn']:<26}{row['who']:<14}"
    for why in ("skipped", "failed"):
        if why in row:
            return f"{head}{why}: {row[why]}"
    if row.get("out_of_memory"):
        return f"{head}out of memory: {row['reason']}"
    rate, settings = row["real_tokens_per_s"], row["settings"]
    shown = f"{rate['median']:>9,.0f} real tokens/s ({rate['min']:,.0f} to {rate['max']:,.0f})"
    shown += f", {row['step_ms']['median']:,.0f} ms, batch {settings['batch']}, {settings['packing']}"
    if "peak_counted_gib" in row:
        shown += f", {row['peak_counted_gib']:.1f} GiB"
    if "fraction_of_floor" in row:
        shown += f", {row['fraction_of_floor']:.3f} of the floor"
    return head + shown + f", turn {row['turn_s']:.0f} s, then holds {row['held_gib']:.1f} GiB"


def table(results: list[dict[str, Any]]) -> str:
    """Of every case's checks: rates, ratio with its range, bound, whether it is met, and the fraction of the floor."""
    lines = [("case", "over", "under", "tokens/s", "ratio (range)", "bound", "met", "of floor")]
    for result in results:
        who = {row["turn"]: row["who"] for row in result["rows"]}
        for verdict in result["verdicts"]:
            names = [who["B"] if name == "B" and "B" in who else name for name in (verdict["over"], verdict["under"])]
            lines.append((result["case"], "packloop" if names[0] == "A" else names[0], names[1], *_figures(verdict)))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def _figures(verdict: dict[str, Any]) -> tuple[str, str, str, str, str]:
    bound = "-" if verdict["bound"] is None else f"{verdict['bound']:.3g}"
    met = {None: "-", True: "yes", False: "NO"}[verdict["met"]]
    fraction = verdict.get("fraction_of_floor")
    of_floor = "-" if fraction is None else f"{fraction:.3f}"
    if verdict["ratio"] is None:
        return "-", "no rate", bound, met, of_floor
    low, high = verdict["ratio_range"]
    over, under = verdict["rates"]
    ratio = f"{verdict['ratio']:.3f} ({low:.3f} to {high:.3f})"
    return f"{over:,.0f} / {under:,.0f}", ratio, bound, met, of_floor
