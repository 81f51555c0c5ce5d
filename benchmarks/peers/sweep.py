"""Which batch is whose best: a batch is when neither half nor double of it is faster."""

from __future__ import annotations

from typing import Any

from benchmarks.peers.protocol import is_measured

Row = dict[str, Any]


def best_batches(rows: list[Row]) -> list[str]:
    """A sentence a side, naming the batches that would still have to be tried for it to hold."""
    sides = dict.fromkeys(row["turn"] for row in rows)
    return [f"{side}: {_best([row for row in rows if row['turn'] == side])}" for side in sides]


def _best(rows: list[Row]) -> str:
    rates = {row["batch"]: row["real_tokens_per_s"]["median"] for row in rows if is_measured(row)}
    if not rates:
        return "no batch has a rate"
    # Where memory did not suffice, nothing is faster.
    tried = set(rates) | {row["batch"] for row in rows if row.get("out_of_memory")}
    best = max(rates, key=rates.get)
    neighbours = [batch for batch in (best // 2, best * 2) if batch > 0]
    words = f"batch {best} is the fastest, {rates[best]:,.0f} real tokens/s"
    if missing := [str(batch) for batch in neighbours if batch not in tried]:
        return f"{words}; {' and '.join(missing)} not tried"
    others = [f"{batch}: {rates[batch]:,.0f}" if batch in rates else f"{batch}: no memory" for batch in neighbours]
    return f"{words} and so its best ({', '.join(others)})"
