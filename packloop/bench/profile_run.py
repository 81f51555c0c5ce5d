"""`packloop profile`: a few steps of a configuration under the profiler, and what they say."""

from __future__ import annotations

import logging
import statistics
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig

from packloop.bench.breakdown import BACKWARD, FORWARD, RECOMPUTATION, average_parts, unknown_kernels
from packloop.bench.ceilings import measure_ceilings
from packloop.bench.cell import load_subject
from packloop.bench.conditions import describe_conditions, gpu_state
from packloop.bench.output import require_writable
from packloop.bench.profile import ProfiledSteps, Room, measure_room, profile_steps
from packloop.bench.profile_advice import Situation, advise
from packloop.bench.profile_floor import AttentionTimes, measure_attention
from packloop.bench.profile_plot import require_matplotlib
from packloop.bench.profile_report import AttentionTime, ProfileResult, UnknownKernel, parts_table, write_profile
from packloop.bench.results import Ceilings, Memory
from packloop.bench.session import public
from packloop.bench.shapes import check_shape
from packloop.bench.steps import Job, memory_figures, synchronize
from packloop.config import RunConfig
from packloop.engine.budget import is_out_of_memory, lift_limit, limit_memory
from packloop.engine.planner.policy import count_layers
from packloop.engine.run import set_numerics
from packloop.errors import ConfigError, InputError, OutOfMemoryError
from packloop.kernels.patch import why_not_fused

logger = logging.getLogger(__name__)


def profile_command(
    config: RunConfig, *, synthetic: str | None, tokenizer: str | None, steps: int, warmup: int, output: Path
) -> None:
    """Profiles, prints table and sentence, and fills `output`, which must be empty or missing.

    synthetic: a shape, or a directory with a config.json, taken with random weights in place of the model.
    tokenizer: a name or directory in place of the model's; with synthetic, the bundled one is the default.
    """
    require_matplotlib()
    if synthetic is not None:
        check_shape(synthetic)
    require_writable(output)
    if output.exists() and any(output.iterdir()):
        raise InputError(f"--output {str(output)!r} is not empty; give a new directory, for example {output}-2")
    if not config.lora.enabled:
        raise ConfigError("lora.enabled=false: profile takes steps on a frozen base; use lora.enabled=true")
    with tempfile.TemporaryDirectory() as directory:
        trace = Path(directory) / "trace.json"
        try:
            result = _profile(config, synthetic, tokenizer, steps=steps, warmup=warmup, trace=trace)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise OutOfMemoryError(
                f"the steps do not fit the GPU's memory ({str(error).split('.')[0]}); lower "
                "train.per_device_train_batch_size, or use train.gradient_checkpointing=all"
            ) from None
        finally:
            lift_limit()
        if result is None:
            return
        write_profile(result, trace, output)
    _print(result, output)


def _profile(
    config: RunConfig, synthetic: str | None, tokenizer_name: str | None, *, steps: int, warmup: int, trace: Path
) -> ProfileResult | None:
    """None in all processes but the first, whose work the others only share."""
    # Before anything is on a GPU, as it gives each process its own.
    accelerator = Accelerator(mixed_precision="no", cpu=not torch.cuda.is_available())
    set_numerics(config)
    limit_memory(config.train.memory_budget_gib)
    subject = load_subject(config, synthetic, tokenizer_name)
    device, llama_config = subject.device, subject.architecture
    job = Job(config, subject.base, subject.data(config), subject.tokenizer.pad_token_id)
    options = job.resolve()
    before = gpu_state()
    taken = profile_steps(job, options, steps=steps, warmup=warmup, trace=trace)
    conditions = describe_conditions(before, gpu_state())
    memory = memory_figures(job.optimizer.paged_bytes)
    room, reason = measure_room(job, taken.num_slots), why_not_fused(job.model)
    job.close()
    if not accelerator.is_main_process:
        return None
    synchronize()
    lift_limit()
    ceilings, attention = _measure(llama_config, job.config, taken, device)
    situation = _situation(job.config, llama_config.num_hidden_layers, taken, room, reason, ceilings, attention)
    return ProfileResult(
        shape=subject.shape + (" with random weights" if synthetic is not None else ""),
        device="gpu" if situation.is_gpu else "cpu",
        config=public(job.config.model_dump(mode="json")),
        warmup_steps=warmup,
        step_ms=situation.step_ms,
        step_ms_all=[round(lap.ms, 3) for lap in taken.laps],
        profiled_step_ms_all=[round(lap.ms, 3) for lap in taken.traced_laps],
        busy_ms=taken.busy_ms,
        idle_ms=situation.idle_ms,
        unattributed_ms=_mean(breakdown.unattributed_ms for breakdown in taken.breakdowns),
        slot_tokens_per_step=situation.slot_tokens,
        real_tokens_per_step=situation.real_tokens,
        label_tokens_per_step=_mean(lap.label_tokens for lap in taken.laps),
        parts=situation.parts,
        ceilings=ceilings,
        attention=[_layers_times(times, llama_config.num_hidden_layers) for times in attention],
        unknown=[UnknownKernel(name=n, ms=ms, count=count) for n, ms, count in unknown_kernels(taken.breakdowns)],
        memory=None if memory is None else Memory(**memory),
        advice=advise(situation),
        conditions=conditions,
    )


def _situation(
    config: RunConfig,
    num_layers: int,
    taken: ProfiledSteps,
    room: Room,
    why_not_fused: str | None,
    ceilings: Ceilings | None,
    attention: list[AttentionTimes],
) -> Situation:
    recomputed = count_layers(config.train.gradient_checkpointing, num_layers)
    fastest = attention[0] if attention else None
    return Situation(
        config=config,
        num_layers=num_layers,
        parts=average_parts(taken.breakdowns, ceilings, _attention_floor(fastest, num_layers, recomputed)),
        step_ms=taken.step_ms,
        idle_ms=taken.step_ms - taken.busy_ms,
        slot_tokens=_mean(lap.slot_tokens for lap in taken.laps),
        real_tokens=_mean(lap.real_tokens for lap in taken.laps),
        rebuilt_ms=_mean(breakdown.rebuilt_ms for breakdown in taken.breakdowns),
        is_gpu=taken.breakdowns[0].is_gpu,
        fastest_attention=fastest.name if fastest else None,
        attention_ms=_step_attention_ms(fastest, num_layers, recomputed) if fastest else None,
        gemm_tflops=ceilings.gemm_tflops if ceilings else None,
        why_not_fused=why_not_fused,
        **vars(room),
    )


def _measure(
    llama_config: LlamaConfig, config: RunConfig, taken: ProfiledSteps, device: torch.device
) -> tuple[Ceilings | None, list[AttentionTimes]]:
    """What floors are made of; nothing where the memory left beside the base does not suffice for it."""
    dtype = getattr(torch, config.model.dtype)
    try:
        ceilings = measure_ceilings(llama_config, taken.num_slots, dtype, device)
        attention = measure_attention(
            llama_config, taken.layouts, num_steps=len(taken.laps), dtype=dtype, device=device
        )
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        logger.warning("floors are left out: their measurement does not fit the memory beside the model")
        return None, []
    return ceilings, attention


def _attention_floor(times: AttentionTimes | None, num_layers: int, recomputed: int) -> dict[str, float] | None:
    if times is None:
        return None
    forward_ms, backward_ms = times.forward_ms, times.backward_ms
    return {
        FORWARD: num_layers * forward_ms,
        RECOMPUTATION: recomputed * forward_ms,
        BACKWARD: num_layers * backward_ms,
    }


def _step_attention_ms(times: AttentionTimes, num_layers: int, recomputed: int) -> float:
    return num_layers * times.total_ms + recomputed * (times.forward_ms + times.rope_ms / 2)


def _layers_times(times: AttentionTimes, num_layers: int) -> AttentionTime:
    return AttentionTime(
        name=times.name,
        forward_ms=num_layers * times.forward_ms,
        backward_ms=num_layers * times.backward_ms,
        rope_ms=num_layers * times.rope_ms,
    )


def _mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)


def _print(result: ProfileResult, output: Path) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=110)
    source = parts_table(result)
    table = Table(title="Milliseconds of an average step" + (" (a CPU's operators)" if result.device == "cpu" else ""))
    for column in source.columns:
        table.add_column(column.removeprefix("#"), justify="right" if column.startswith("#") else "left", no_wrap=True)
    for row in source.rows:
        table.add_row(*row, style="bold" if row[1] in ("all", "step") else None, end_section=row[1] in ("all", "idle"))
    console.print(table)
    for line in (result.advice.sentence, f"report, plot and trace in {output}"):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
