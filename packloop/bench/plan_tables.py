"""A forecast of `packloop plan` as tables, the settings to paste, and what the figures rest on."""

from __future__ import annotations

from rich.console import Group
from rich.table import Table
from rich.text import Text

from packloop.bench.kernel_classes import CLASSES
from packloop.bench.plan import Forecast
from packloop.bench.plan_check import Check
from packloop.engine.planner.search import Candidate
from packloop.gpus import Gpu

_RUNNERS_UP = 5


def render(forecast: Forecast) -> Group:
    """Tables of memory and time, the settings to paste, and the runners-up."""
    best, configured = forecast.best[0], forecast.configured
    columns = [("best", best)] if configured is None else [("as configured", configured), ("best", best)]
    notes = [*forecast.notes, _basis(forecast.gpu)]
    if configured is None:
        notes.insert(0, _without_room(forecast))
    return Group(
        Text(_head(forecast)),
        _table("memory at the peak, GiB", columns, forecast.budget_gib),
        _times(columns),
        Text(_advice(forecast), no_wrap=True, overflow="ignore"),  # settings to paste stay one line
        _runners_up(forecast),
        Text("\n".join(f"- {note}" for note in notes)),
    )


def render_check(check: Check) -> Table:
    """Predicted, measured and error of two real steps."""
    table = _numbers(check.name, "", "predicted", "measured", "error")
    pairs = {
        "allocated GiB": check.allocated_gib,
        "reserved GiB": check.reserved_gib,
        "step ms": check.step_ms,
        "real tokens/s": check.tokens_per_s,
    }
    for name, (predicted, measured) in pairs.items():
        table.add_row(name, f"{predicted:,.2f}", f"{measured:,.2f}", f"{predicted / measured - 1:+.1%}")
    return table


def _head(forecast: Forecast) -> str:
    gpu, shape = forecast.gpu, forecast.shape
    return (
        f"{gpu.key}: {gpu.memory_gib:g} GiB, {gpu.bf16_tflops:g} TFLOP/s bf16, {gpu.gb_per_s:g} GB/s; "
        f"budget {forecast.budget_gib:.1f} GiB; {shape.num_layers} layers, "
        f"{shape.adapter_elements:,} trained parameters"
    )


def _table(title: str, columns: list[tuple[str, Candidate]], budget_gib: float) -> Table:
    table = _numbers(title, "part", *(name for name, _ in columns))
    names = dict.fromkeys(name for _, one in columns for name in one.memory.parts_gib)
    for name in names:
        table.add_row(name, *(_number(one.memory.parts_gib.get(name, 0.0)) for _, one in columns))
    reserved = {id(one): one.memory.reserved_gib - one.memory.allocated_gib for _, one in columns}
    table.add_row("reserved, not in use", *(_number(reserved[id(one)]) for _, one in columns), end_section=True)
    table.add_row("reserved", *(_number(one.memory.reserved_gib) for _, one in columns))
    table.add_row("paged optimizer state", *(_number(one.memory.managed_gib) for _, one in columns))
    fits = ["" if one.memory.counted_gib <= budget_gib else ", does not fit" for _, one in columns]
    table.add_row(
        "in all", *(f"{one.memory.counted_gib:.2f}{text}" for (_, one), text in zip(columns, fits, strict=True))
    )
    return table


def _times(columns: list[tuple[str, Candidate]]) -> Table:
    table = _numbers("one step, ms", "kind of work", *(name for name, _ in columns))
    kinds = dict.fromkeys(name for _, one in columns for name in one.time.parts_ms)
    for name in sorted(kinds, key=lambda kind: CLASSES.index(kind) if kind in CLASSES else len(CLASSES)):
        table.add_row(name, *(f"{one.time.parts_ms.get(name, 0.0):,.1f}" for _, one in columns))
    table.add_section()
    table.add_row("step", *(f"{one.time.step_ms:,.0f}" for _, one in columns))
    table.add_row("real tokens/s", *(f"{one.time.tokens_per_s:,.0f}" for _, one in columns))
    table.add_row("packs a micro-batch x accumulation", *(f"{one.batch} x {one.accumulation}" for _, one in columns))
    table.add_row("layers recomputed, cached, inputs kept", *(_counts(one) for _, one in columns))
    table.add_row("attention", *(one.attention for _, one in columns))
    return table


def _advice(forecast: Forecast) -> str:
    best, train = forecast.best[0], forecast.config.train
    asked = train.per_device_train_batch_size * train.gradient_accumulation_steps
    kept = "is kept" if best.global_batch == asked else f"becomes {best.global_batch}"
    lines = ["", f"best settings (the global batch of {asked} packs {kept}):", "  " + " ".join(best.overrides)]
    other = max(forecast.best, key=lambda one: one.time.tokens_per_s)
    if other.global_batch != asked and other.time.tokens_per_s > 1.02 * best.time.tokens_per_s:
        lines.append(
            f"faster with another global batch: {other.batch} x {other.accumulation} = {other.global_batch} packs, "
            f"{other.time.tokens_per_s:,.0f} tokens/s"
        )
    return "\n".join(lines) + "\n"


def _runners_up(forecast: Forecast) -> Table:
    table = _numbers(
        "best of each micro-batch",
        "packs x accumulation", "packs a step", "recomputed, cached, inputs", "GiB in all", "step ms", "real tokens/s",
    )  # fmt: skip
    for one in forecast.best[: _RUNNERS_UP + 1]:
        memory, time = one.memory, one.time
        table.add_row(
            f"{one.batch} x {one.accumulation}", str(one.global_batch), _counts(one), f"{memory.counted_gib:.2f}",
            f"{time.step_ms:,.0f}", f"{time.tokens_per_s:,.0f}",
        )  # fmt: skip
    return table


def _numbers(title: str, first: str, *others: str) -> Table:
    """A table of a column of names and columns of numbers."""
    table = Table(first, title=title, title_justify="left")
    for name in others:
        table.add_column(name, justify="right")
    return table


def _counts(one: Candidate) -> str:
    return f"{one.plan.recompute_layers}, {one.plan.cached_layers}, {one.plan.keep_inputs_layers}"


def _number(gib: float) -> str:
    if gib >= 0.005:
        return f"{gib:.2f}"
    return "< 0.01" if gib > 0 else "-"


def _without_room(forecast: Forecast) -> str:
    train = forecast.config.train
    return (
        f"as configured: {train.per_device_train_batch_size} packs a micro-batch do not fit the budget, whatever its "
        "auto settings become"
    )


def _basis(gpu: Gpu) -> str:
    if gpu.key == "h200":
        return "time: from shares of this GPU's ceilings measured on it in other configurations"
    return (
        f"time: projected to the {gpu.key} from shares of its ceilings that were measured on an H200; on such a GPU "
        "--probe checks it"
    )
