"""A profile as it is kept and read: JSON with every figure, and a report with its tables, plot and trace."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any, Literal

from packloop.bench import kernel_classes as classes
from packloop.bench.breakdown import PHASES, Part
from packloop.bench.document import Block, Bullets, Document, Heading, Paragraph, Picture, Table, write_document
from packloop.bench.profile_advice import Advice
from packloop.bench.profile_plot import PLOT_KEY, profile_plot
from packloop.bench.results import Ceilings, Conditions, Memory, Record

SCHEMA = 1
NONE = "-"
# A larger share of the busy time that nobody can place is said aloud.
_NOTABLE = 0.01


class AttentionTime(Record):
    """A backend timed alone on the profiled documents: an average step's milliseconds, all layers, RoPE apart."""

    name: str
    forward_ms: float
    backward_ms: float
    rope_ms: float


class UnknownKernel(Record):
    """Something of class `other`, an average step's."""

    name: str
    ms: float
    count: float


class ProfileResult(Record):
    """Everything that was found. step_ms: of an average step; step_ms_all: timed alone, then under the profiler."""

    schema_version: Literal[1] = SCHEMA
    shape: str
    device: Literal["gpu", "cpu"]
    config: dict[str, Any]
    warmup_steps: int
    step_ms: float
    step_ms_all: list[float]
    profiled_step_ms_all: list[float]
    busy_ms: float
    idle_ms: float
    unattributed_ms: float
    slot_tokens_per_step: float
    real_tokens_per_step: float
    label_tokens_per_step: float
    parts: list[Part]
    ceilings: Ceilings | None
    attention: list[AttentionTime]
    unknown: list[UnknownKernel]
    memory: Memory | None
    advice: Advice
    conditions: Conditions


def write_profile(result: ProfileResult, trace: Path, directory: Path) -> None:
    """Fills the directory: profile.json, report.md, report.html, the plot as SVG and PNG, and trace.json.gz."""
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result.model_dump(mode="json"), indent=1) + "\n"
    (directory / "profile.json").write_text(text, encoding="utf-8")
    with trace.open("rb") as plain, gzip.open(directory / "trace.json.gz", "wb") as packed:
        shutil.copyfileobj(plain, packed)
    svg, png = profile_plot(result.parts, idle_ms=result.idle_ms, step_ms=result.step_ms, title=_title(result))
    write_document(_document(result, svg), directory)
    (directory / "plots" / f"{PLOT_KEY}.png").write_bytes(png)


def _title(result: ProfileResult) -> str:
    clock = "GPU time" if result.device == "gpu" else "CPU time of operators"
    return f"{result.shape} on {result.conditions.device}: {clock} of one step, {result.step_ms:,.1f} ms"


def _document(result: ProfileResult, svg: str) -> Document:
    document = Document("Profile of a training step")
    document.add(Paragraph(result.advice.sentence), Bullets(_facts(result)))
    document.add(
        Picture(
            PLOT_KEY,
            "Milliseconds of a step by phase and class of work",
            svg,
            "Upper bars: measured. Lower, pale bars: the floors of those classes that have one.",
        ),
        Heading("By phase and class"),
        parts_table(result),
        Bullets(_notes(result)),
        Heading("Settings, by what each would save at most"),
        *_candidates(result),
    )
    if result.attention:
        document.add(Heading("Attention, timed alone on these documents"), _attention_table(result))
    if result.unknown:
        document.add(Heading("Other: kernels of no known class"), _unknown_table(result))
    return document


def _facts(result: ProfileResult) -> list[str]:
    config, conditions = result.config, result.conditions
    train, kernels = config["train"], config["kernels"]
    slots, real = result.slot_tokens_per_step, result.real_tokens_per_step
    rate = real / result.step_ms * 1e3
    timed, traced = (
        ", ".join(f"{ms:,.1f}" for ms in times) for times in (result.step_ms_all, result.profiled_step_ms_all)
    )
    versions = ", ".join(f"{name} {version}" for name, version in conditions.versions.items())
    shared = ", which is more than slots as beginnings that documents share are computed once" if real > slots else ""
    facts = [
        f"{result.shape} on {conditions.device}; {versions}; commit {(conditions.commit or 'unknown')[:10]}"
        f"{' with uncommitted changes' if conditions.uncommitted_changes else ''}; {conditions.date}",
        f"{train['per_device_train_batch_size']} x {train['gradient_accumulation_steps']} packs of "
        f"{config['data']['max_length']} ({config['data']['packing']}), {config['model']['quantization']}, layers "
        f"{kernels['layer']}, attention {kernels['attention']}; of the layers, recomputed: "
        f"{train['gradient_checkpointing']}, weights kept dequantised: {kernels['dequant_cache']}, inputs kept: "
        f"{kernels['keep_inputs']}",
        f"{slots:,.0f} slots, {real:,.0f} real and {result.label_tokens_per_step:,.0f} label tokens a step{shared}; "
        f"{rate:,.0f} real tokens/s",
        f"steps timed alone: {timed} ms; under the profiler: {traced} ms",
    ]
    if result.ceilings is not None:
        facts.append(
            f"measured in this process: products of a layer {result.ceilings.gemm_tflops:,.4g} TFLOP/s, a copy "
            f"{result.ceilings.copy_tb_per_s:.3g} TB/s"
        )
    if result.memory is not None:
        facts.append(f"peak {result.memory.peak_reserved_gib:.1f} GiB reserved")
    return facts


def _notes(result: ProfileResult) -> list[str]:
    joined_ms = sum(part.joined_ms for part in result.parts)
    notes = [
        "Floors: of products, the FLOPs that ran / the rate measured; of what moves data, each operand's bytes once / "
        "the copy rate; of attention, the fastest backend measured. Data that stays in a cache can beat its floor. A "
        "class without a floor has none that says anything.",
        "The gradient of head and loss is made in their forward pass and counted there.",
    ]
    if joined_ms:
        notes.append(
            f"{joined_ms:,.1f} ms are products in which the base and its adapters are one; their time is split between "
            f"`{classes.BASE_GEMM}` and `{classes.LORA}` by FLOPs, those with the zeros of a block-diagonal B included."
        )
    if any(part.cls == classes.ROPE for part in result.parts) and result.config["kernels"]["attention"] == "document":
        notes.append("This attention applies RoPE itself; what is left under RoPE are its tables.")
    if result.device == "cpu":
        notes.append(
            "These are times of operators on a CPU, under the profiler, in place of a GPU's kernels: they show that "
            "the profile works and say nothing of a GPU."
        )
    if result.unattributed_ms > _NOTABLE * result.busy_ms:
        notes.append(
            f"{result.unattributed_ms:,.1f} ms of kernels could not be led back to their launch: classed by name, and "
            "counted in the phase of the kernel before."
        )
    return notes


def parts_table(result: ProfileResult) -> Table:
    """A row for each class in each phase, each phase's sum, idle, and the step."""
    columns = ["phase", "class", "#ms", "#of the step", "#floor ms", "#floor / measured", "#kernels"]
    rows = []
    for phase in PHASES:
        parts = [part for part in result.parts if part.phase == phase]
        rows += [_row(result, phase, part.cls, part.ms, part.floor_ms, part.kernels) for part in parts]
        if parts:
            total_ms, kernels = sum(part.ms for part in parts), sum(part.kernels for part in parts)
            rows.append(_row(result, phase, "all", total_ms, None, kernels))
    rows.append(_row(result, "", "idle", result.idle_ms, None, None))
    rows.append(_row(result, "", "step", result.step_ms, None, sum(part.kernels for part in result.parts)))
    return Table(columns, rows)


def _row(
    result: ProfileResult, phase: str, cls: str, ms: float, floor_ms: float | None, kernels: float | None
) -> list[str]:
    return [
        phase,
        cls,
        f"{ms:,.2f}",
        f"{ms / result.step_ms:.1%}",
        NONE if floor_ms is None else f"{floor_ms:,.2f}",
        NONE if floor_ms is None or ms == 0 else f"{floor_ms / ms:.0%}",
        NONE if kernels is None else f"{kernels:,.0f}",
    ]


def _candidates(result: ProfileResult) -> list[Block]:
    if not result.advice.candidates:
        return [Paragraph("None of packloop's settings bears on what this run spends its time on.")]
    rows = [
        [one.setting, f"{one.saves_ms:,.1f}", f"{one.saves_share:.1%}", one.how, one.needs or NONE]
        for one in result.advice.candidates
    ]
    columns = ["setting", "#saves ms at most", "#of the step", "how that was worked out", "needs"]
    return [Table(columns, rows), Paragraph("What two of them save together is less than the sum.")]


def _attention_table(result: ProfileResult) -> Table:
    rows = [
        [one.name, f"{one.forward_ms:,.2f}", f"{one.backward_ms:,.2f}", f"{one.rope_ms:,.2f}"]
        for one in result.attention
    ]
    return Table(["backend", "#forward ms", "#backward ms", "#RoPE apart ms"], rows)


def _unknown_table(result: ProfileResult, most: int = 20) -> Table:
    rows = [[one.name[:120], f"{one.ms:,.3f}", f"{one.count:,.0f}"] for one in result.unknown[:most]]
    return Table(["kernel", "#ms", "#times"], rows)
