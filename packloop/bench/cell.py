"""One process of a matrix: `python -m packloop.bench.cell DIRECTORY CELL`, or the references that gates hold cells to.

It reads the session's plan from DIRECTORY, measures, and writes one file. Its exit code says what came of it: 0 a
result is written, 1 and 2 what the user gave cannot run, 3 out of memory, `OTHER_CONDITIONS` not the session's machine.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import LlamaForCausalLM, PretrainedConfig

import packloop.bench.session as sessions
from packloop.bench import gate as gates
from packloop.bench.ceilings import measure_ceilings
from packloop.bench.conditions import describe_conditions, gpu_state
from packloop.bench.floor import Floor
from packloop.bench.flops import count_parameters, executed_flops, flop_figures, needed_flops, work_of
from packloop.bench.probe import Probe, probe
from packloop.bench.profile import profile_step
from packloop.bench.results import Cell, Figures, Memory, Profile, save_cell
from packloop.bench.results import Floor as FloorRecord
from packloop.bench.shapes import SHAPES
from packloop.bench.steps import Job
from packloop.bench.synthetic import random_model, shape_config
from packloop.config import ModelConfig, RunConfig, parse_config
from packloop.data.loader import TrainingData, build_data
from packloop.engine.batch import Micro
from packloop.engine.budget import check_budget, is_out_of_memory
from packloop.engine.model import load_base, load_tokenizer
from packloop.engine.run import set_numerics
from packloop.engine.vocabulary import check_rows, fit_padding
from packloop.errors import InputError, OutOfMemoryError

OUT_OF_MEMORY = 3
OTHER_CONDITIONS = 4
# A profile's times by name.
_OF_A_PROFILE = ("by_class_ms", "by_phase_ms")
# Windows whose floor is timed; the median of these is as good as that of all.
MOST_FLOORS = 5


@dataclass(frozen=True)
class Subject:
    """What cells of one model share: the frozen base, and the tokens of its rows."""

    shape: str
    architecture: PretrainedConfig
    base: LlamaForCausalLM
    tokenizer: Any
    device: torch.device

    def data(self, config: RunConfig) -> TrainingData:
        data = build_data(config.data, self.tokenizer, seed=config.train.seed)
        check_rows(data, self.tokenizer, self.base.config.vocab_size)
        return data


Made = TypeVar("Made")


def load_subject(config: RunConfig, synthetic: str | None, tokenizer: str | None) -> Subject:
    """The base as `train` loads it, or a shape's with random weights.

    InputError where the tokens do not fit it, ConfigError, before it is loaded, for a budget that the GPU cannot give.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_budget(config.train.memory_budget_gib, device)
    source = tokenizer or (None if synthetic is None else "bundled")
    if source is None:
        made = load_tokenizer(config.model)
    else:
        made = load_tokenizer(ModelConfig(name_or_path=source), named="--tokenizer")
    if synthetic is None:
        base = load_base(config.model, device, trains=True)
        shape = sessions.public(config.model.name_or_path)
    else:
        base = random_model(
            shape_config(synthetic),
            quantization=config.model.quantization,
            device=device,
            seed=config.train.seed,
            dtype=getattr(torch, config.model.dtype),
            double_quant=config.model.double_quant,
        )
        shape = synthetic if synthetic in SHAPES else Path(synthetic).name
    if source is not None and len(made) > base.config.vocab_size:
        raise InputError(
            f"the tokenizer {source!r} has {len(made)} tokens and the model "
            f"{base.config.vocab_size}; use --tokenizer bundled or that of the model"
        )
    fit_padding(made, base.config.vocab_size)
    return Subject(shape, base.config, base, made, device)


def measure(directory: Path, plan: sessions.Plan, cell: sessions.CellPlan) -> Cell:
    """The cell's result: its steps first, alone in memory; then its gate, the ceilings and the floor."""
    config = parse_config(cell.config)
    subject = load_subject(config, cell.synthetic, cell.tokenizer)
    data = subject.data(config)
    states, profiles = [gpu_state()], []

    def after_steps(step, window) -> None:
        states.append(gpu_state())
        if cell.profile:
            profiles.append(_where_it_fits("profile", lambda: profile_step(step, window)))

    taken = probe(
        config,
        subject.base,
        data,
        subject.tokenizer.pad_token_id,
        warmup_steps=plan.warmup,
        timed_steps=plan.steps,
        after=after_steps,
    )
    say(f"steps: {taken.real_tokens_per_s:,.0f} real tokens/s")
    profile = _of_plain_step(profiles[0], taken.step_ms) if profiles and profiles[0] else None
    gate = None
    if cell.reference is not None:
        reference = sessions.load_reference(directory, cell.reference)
        gate = gates.judge(_gate_run(taken.config, subject, data), reference, config.model.dtype, plan.gate)
    dtype = getattr(torch, config.model.dtype)
    num_slots = max(micro.num_slots for micro in taken.micros)
    ceilings = measure_ceilings(subject.architecture, num_slots, dtype, subject.device)
    floor = _where_it_fits("floor", lambda: _floor(taken, subject)) if cell.floor else None
    conditions = describe_conditions(states[0], states[1], commit=plan.commit)
    work = work_of(taken.micros, taken.config.kernels.attention).over(plan.steps)
    passed = gate is None or gate.passed
    return Cell(
        name=cell.name,
        session=sessions.session_of(directory),
        status="measured" if passed else "wrong",
        reason=None if passed else gates.describe_failure(gate),
        shape=subject.shape,
        num_parameters=count_parameters(subject.architecture),
        settings=sessions.public(cell.settings),
        config=sessions.described_config(taken.config.model_dump(mode="json"), plan, cell),
        asked=sessions.described_config(cell.config, plan, cell),
        figures=Figures(**taken.figures),
        memory=None if taken.memory is None else Memory(**taken.memory),
        flops=flop_figures(
            needed=needed_flops(subject.architecture, taken.config.lora, work),
            executed=executed_flops(subject.architecture, taken.config, work),
            step_ms=taken.step_ms,
            device=conditions.device,
            dtype=taken.config.model.dtype,
            ceilings=ceilings,
        ),
        ceilings=ceilings,
        floor=floor,
        profile=profile,
        loss_gate=gate,
        conditions=conditions,
    )


def take_gate_steps(config: RunConfig, base: LlamaForCausalLM, data: TrainingData, pad_token_id: int) -> gates.GateRun:
    """`gates.GATE_STEPS` optimizer steps on the first window of the epoch; `base` is left as it was."""
    job = Job(config, base, data, pad_token_id)
    try:
        _draw_adapters(job)
        options = job.resolve()
        with job.stepping(options) as step:
            window = job.next_window()
            laps = [step(window) for _ in range(gates.GATE_STEPS)]
    finally:
        job.close()
    return gates.GateRun([lap.loss for lap in laps], [lap.grad_norm for lap in laps])


def _gate_run(config: RunConfig, subject: Subject, data: TrainingData) -> gates.GateRun:
    """The gate's steps, as the timed ones were taken; every layer recomputed where those without dropout find no room.

    Without dropout other kernels run, on wider buffers, which a plan for the timed steps did not count.
    """
    config, pad_token_id = gates.gate_config(config), subject.tokenizer.pad_token_id
    try:
        return take_gate_steps(config, subject.base, data, pad_token_id)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        # And no more in here: the error's traceback holds the activations of the step that found no room.
    smallest = {"kernels": {"dequant_cache": 0, "keep_inputs": 0}, "train": {"gradient_checkpointing": "all"}}
    sections = {name: getattr(config, name).model_copy(update=values) for name, values in smallest.items()}
    return take_gate_steps(config.model_copy(update=sections), subject.base, data, pad_token_id)


def _draw_adapters(job: Job) -> None:
    """The gate's adapters, the same on every device."""
    b_std = gates.lora_b_std(job.config)
    generator = torch.Generator().manual_seed(job.config.train.seed)
    for name, parameter in job.flat.named.items():
        drawn = torch.empty(parameter.shape)
        if "lora_A" in name:
            drawn.uniform_(-(parameter.shape[1] ** -0.5), parameter.shape[1] ** -0.5, generator=generator)
        else:
            drawn.normal_(std=b_std, generator=generator)
        parameter.data.copy_(drawn)


def take_references(directory: Path, plan: sessions.Plan, keys: list[str]) -> None:
    """Writes the references of these keys, which share a model."""
    first = plan.references[keys[0]]
    config = parse_config(first.config)
    subject = load_subject(config, first.synthetic, first.tokenizer)
    for key in keys:
        planned = plan.references[key]
        config = parse_config(planned.config)
        ways = [config]
        if planned.may_fall_back:
            kernels = config.kernels.model_copy(update={"attention": "sdpa"})
            ways.append(config.model_copy(update={"kernels": kernels}))
        data = subject.data(config)
        for way in ways:
            try:
                run = take_gate_steps(way, subject.base, data, subject.tokenizer.pad_token_id)
            except (RuntimeError, OutOfMemoryError) as error:
                is_memory = isinstance(error, OutOfMemoryError) or is_out_of_memory(error)
                if way is ways[-1] or not is_memory:
                    raise
                continue
            name = gates.describe_way(way)
            reference = gates.Reference(name=name, losses=run.losses, grad_norms=run.grad_norms)
            sessions.save_reference(directory, key, reference)
            say(f"reference: {name}: losses {', '.join(f'{loss:.4f}' for loss in run.losses)}")
            break


def _where_it_fits(what: str, make: Callable[[], Made | None]) -> Made | None:
    """What `make` returns, or None where memory does not suffice for it: the steps are measured all the same."""
    try:
        return make()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    say(f"{what}: left out, for want of memory")
    return None


def say(text: str) -> None:
    print(text, flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("cell", nargs="?")
    parser.add_argument("--references", nargs="+", default=[])
    given = parser.parse_args(arguments)
    end_with_parent()
    warnings.filterwarnings("ignore", module="peft|transformers")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("packloop").setLevel(logging.INFO)
    plan = sessions.load_plan(given.directory)
    first = plan.references[given.references[0]] if given.references else plan.cell(given.cell)
    set_numerics(parse_config(first.config))  # before anything asks for a GPU: its allocator is set up once
    try:
        sessions.check_conditions(given.directory, describe_conditions(None, None, commit=plan.commit))
    except InputError as error:
        fail(str(error), OTHER_CONDITIONS)
    try:
        if given.references:
            take_references(given.directory, plan, given.references)
        else:
            save_cell(given.directory, measure(given.directory, plan, plan.cell(given.cell)))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        fail(re.split(r"\n|\. (?=GPU|If|Of|See|Process)", str(error))[0], OUT_OF_MEMORY)
    except InputError as error:
        fail(str(error), error.exit_code)


def fail(reason: str, exit_code: int) -> None:
    print(f"error: {reason}", file=sys.stderr, flush=True)
    raise SystemExit(exit_code)


def end_with_parent() -> None:
    """Ends this process when the one that started it does, however that ends: standard input is a pipe from it."""

    def wait() -> None:
        while os.read(0, 1):
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _of_plain_step(profile: Profile, step_ms: float) -> Profile:
    """Of a step without the profiler, which slows the host: on a GPU the same shares of it, on a CPU the same times."""
    if profile.device == "cpu":
        total_ms = max(step_ms, profile.busy_ms)
        return profile.model_copy(update={"step_ms": total_ms, "idle_share": 1 - profile.busy_ms / total_ms})
    factor = step_ms / profile.step_ms
    scaled = {name: {key: ms * factor for key, ms in getattr(profile, name).items()} for name in _OF_A_PROFILE}
    return profile.model_copy(update={"step_ms": step_ms, "busy_ms": profile.busy_ms * factor, **scaled})


def _floor(taken: Probe, subject: Subject) -> FloorRecord:
    """Of the timed steps, window by window. Products are chosen, and parts timed, at the mean micro-batch's size."""
    device, num_micros = subject.device, taken.config.train.gradient_accumulation_steps
    num_slots = round(sum(micro.num_slots for micro in taken.micros) / len(taken.micros))
    num_labels = round(sum(micro.label_index.numel() for micro in taken.micros) / len(taken.micros))
    dtype = getattr(torch, taken.config.model.dtype)
    floor = Floor(subject.architecture, num_slots=num_slots, num_labels=num_labels, dtype=dtype, device=device)
    micros = [Micro.of(batch, device, finds_tokens=False) for batch in taken.micros[: MOST_FLOORS * num_micros]]
    windows = [micros[start : start + num_micros] for start in range(0, len(micros), num_micros)]
    times_ms = sorted(floor.step_ms(window) for window in windows)
    ms = times_ms[len(times_ms) // 2]
    layers = subject.architecture.num_hidden_layers
    parts_ms = {
        name: product.ms * num_micros * (1 if name.startswith("head") else layers)
        for name, product in floor.products.items()
    }
    parts_ms["attention and gaps"] = max(0.0, ms - sum(parts_ms.values()))
    return FloorRecord(
        fraction=ms / taken.step_ms, ms=ms, parts_ms=parts_ms, attention=f"{floor.attention}: {floor.why_attention}"
    )


if __name__ == "__main__":
    main()
