"""The training loop: the sole owner of the order of a step."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn

from packloop.config import RunConfig, dump_config
from packloop.data.loader import eval_batches
from packloop.engine import schedule
from packloop.engine.batch import Micro
from packloop.engine.budget import lift_limit
from packloop.engine.checkpoint import capture_rng, disk_errors, save_checkpoint, set_newer_aside
from packloop.engine.environment import describe_environment
from packloop.engine.evaluate import evaluate
from packloop.engine.finished_run import lacks_evaluation
from packloop.engine.metrics import MetricsFile, StepClock, StepConsole, peak_gib, reset_peak
from packloop.engine.model_card import write_adapter_card
from packloop.engine.nonfinite import NonFiniteError, after_divergence, non_finite
from packloop.engine.optim import AdamW, FlatParameters
from packloop.engine.out_of_memory import MemoryAccount
from packloop.engine.output_dir import Claim
from packloop.engine.plan import patch_options
from packloop.engine.run import Run, prepare_run
from packloop.engine.run_dir import write_final_weights, write_run_files, write_weights
from packloop.engine.state import TrainState
from packloop.engine.stop import Stop, stop_signals
from packloop.errors import InputError
from packloop.kernels.forward_check import check_forward
from packloop.kernels.patch import packed_loss_sum, patched


@dataclass(frozen=True)
class StepReport:
    """One optimizer step over all ranks. loss: nats per label token; grad_norm: L2, before clipping."""

    loss: float
    grad_norm: float
    label_tokens: int
    slot_tokens: int
    real_tokens: int
    stop_votes: int


@dataclass(frozen=True)
class TrainResult:
    """What `train` leaves: the directory, how far it came, and the signal that ended it early, if one did."""

    run_dir: Path
    state: TrainState
    stopped_by: int | None


def train_step(
    llama: nn.Module,
    flat: FlatParameters,
    optimizer: AdamW,
    micros: list[Micro],
    *,
    accelerator: Accelerator,
    learning_rate: float,
    max_grad_norm: float,
    stop_requested: bool = False,
    meanwhile: Callable[[], None] | None = None,
) -> StepReport:
    """One optimizer step: gradient of the summed loss / labels that count, over all micro-batches and ranks.

    Losses are summed, never averaged, and divided once, by the number of counted labels of the whole step, so the
    gradient does not depend on how the step's packs are split. meanwhile: host work done while the device still
    computes, such as fetching the next step's window. Mutates weights, moments and the gradient buffer. Raises
    NonFiniteError, before the optimizer, with the rows of the micro-batches at fault.
    """
    flat.zero_gradient()
    losses = []
    for micro in micros:
        loss_sum = packed_loss_sum(llama, *micro.inputs)
        loss_sum.backward()
        losses.append(loss_sum.detach())
        micro.layout.drop_masks()  # memory is planned for those of one micro-batch
    counts = torch.tensor(
        [
            sum(micro.batch.num_label_tokens for micro in micros),
            sum(micro.batch.num_slots for micro in micros),
            sum(micro.batch.num_real_tokens for micro in micros),
            int(stop_requested),
        ],
        dtype=torch.float64,
    ).to(accelerator.device, non_blocking=True)
    totals = torch.cat([torch.stack(losses).double().sum()[None], counts])
    if accelerator.num_processes > 1:
        totals = accelerator.reduce(totals, "sum")
        flat.gradient.copy_(accelerator.reduce(flat.gradient, "sum"))
    sums = torch.cat([totals, flat.gradient.norm().double()[None]])
    optimizer.prefetch()
    if meanwhile is not None:
        meanwhile()
    # The step's one host read: nothing is stepped before its gradient is known to be finite.
    loss_sum, labels, slots, real, stop_votes, gradient_norm = sums.tolist()
    grad_norm = gradient_norm / max(labels, 1.0)
    if not (math.isfinite(loss_sum) and math.isfinite(grad_norm)):
        raise non_finite(llama, flat, losses, micros, accelerator)
    clip = min(1.0, max_grad_norm / (grad_norm + 1e-6))
    flat.gradient.mul_(clip / max(labels, 1.0))
    optimizer.step(learning_rate)
    return StepReport(
        loss=loss_sum / max(labels, 1.0),
        grad_norm=grad_norm,
        label_tokens=int(labels),
        slot_tokens=int(slots),
        real_tokens=int(real),
        stop_votes=int(stop_votes),
    )


def train(
    config: RunConfig, *, resume: str | None = None, on_step: Callable[[dict], None] | None = None
) -> TrainResult:
    """Runs the whole job of `config` and writes its output directory; `resume` is `latest` or a checkpoint's path.

    on_step: called on every rank with each step's metrics. Raises InputError (and ConfigError) with one line for
    anything the user can mend, OutOfMemoryError with a table of where the memory went; checkpoints already written stay
    valid.
    """
    account = MemoryAccount(config)
    try:
        with account.explain_exhaustion(), Claim(Path(config.train.output_dir)) as claim:
            return _train(config, resume, on_step, account, claim)
    except NonFiniteError as error:
        remedy = after_divergence(Path(config.train.output_dir), resume)
        raise NonFiniteError(f"{error}; {remedy}") from error
    finally:
        if account.config.train.memory_budget_gib is not None:
            lift_limit()  # the budget is this run's, not the process's


def _train(
    config: RunConfig, resume: str | None, on_step: Callable[[dict], None] | None, account: MemoryAccount, claim: Claim
) -> TrainResult:
    run = prepare_run(config, resume, account, claim)
    config, model, state, accelerator = run.config, run.model, run.state, run.accelerator
    if accelerator.is_main_process:
        if run.is_resumed:
            set_newer_aside(run.directory, state.step)
        run.directory.mkdir(parents=True, exist_ok=True)
        claim.take()
        write_run_files(run.directory, config, describe_environment(), run.tokenizer)
    if config.log.trackers:
        accelerator.init_trackers("packloop", config={"config": config.model_dump_json()})
    metrics = MetricsFile(run.directory / "metrics.jsonl", enabled=accelerator.is_main_process, resume_step=state.step)
    console = StepConsole(
        num_steps=run.num_steps, first_step=state.step, every=config.log.every, enabled=accelerator.is_main_process
    )
    _announce(console, run)
    model.train()
    with (
        closing(metrics),
        closing(console),  # or an error would leave a terminal with the bar's hidden cursor
        stop_signals() as stop,
        patched(model, **patch_options(config, model)) as llama,
    ):
        _check_forward(llama, config)
        stopped = _take_steps(run, llama, stop, metrics, console, on_step)
    if accelerator.is_main_process and state.step == run.num_steps:  # a run that was stopped leaves a checkpoint
        write_final_weights(run.directory, model)
        with disk_errors(run.directory):
            write_adapter_card(run.directory, config)
    accelerator.wait_for_everyone()
    if config.log.trackers:
        accelerator.end_training()
    stopped_by = (stop.signal or signal.SIGTERM) if stopped else None
    return TrainResult(run_dir=run.directory, state=state, stopped_by=stopped_by)


def _take_steps(
    run: Run,
    llama: nn.Module,
    stop: Stop,
    metrics: MetricsFile,
    console: StepConsole,
    on_step: Callable[[dict], None] | None,
) -> bool:
    """Every step that is left, with the evaluations and checkpoints that are due; whether it was asked to stop."""
    config, state, accelerator, num_steps = run.config, run.state, run.accelerator, run.num_steps
    stopped = False
    # A checkpoint's run may have ended before the evaluation that follows it.
    may_lack_one = run.is_resumed and _evaluation_due(run)
    if may_lack_one and broadcast_object_list([lacks_evaluation(run.directory, state.step)])[0]:
        _evaluate(run, llama, metrics, console)
        stopped = state.step < num_steps and stop.voted(accelerator)
    reset_peak(accelerator.device)
    clock = StepClock()
    while state.step < num_steps and not stopped:
        learning_rate = _learning_rate(config, state.step, num_steps)
        report = train_step(
            llama,
            run.flat,
            run.optimizer,
            run.windows.take(),
            accelerator=accelerator,
            learning_rate=learning_rate,
            max_grad_norm=config.train.max_grad_norm,
            stop_requested=stop.signal is not None,
            meanwhile=run.windows.prepare,
        )
        state.advance(
            position=run.windows.position, slots=report.slot_tokens, real=report.real_tokens, labels=report.label_tokens
        )
        values = _step_values(state, report, learning_rate, clock.lap_ms(), accelerator)
        metrics.write(values)
        console.step(values, due=_due(run, config.log.every) or state.step == num_steps)
        accelerator.log(values, step=state.step)
        if on_step:
            on_step(values)
        stopped, last = report.stop_votes > 0, state.step == num_steps
        is_saved = _due(run, config.checkpoint.every) or stopped or last
        if is_saved:  # before an evaluation, which may take long and die
            _save(run)
        if _evaluation_due(run):
            stopped = stopped or stop.voted(accelerator)  # asked for since the step's own vote
            if not stopped:
                _evaluate(run, llama, metrics, console)
                stopped = not last and stop.voted(accelerator)
            if stopped and not is_saved:
                _save(run)
        clock.restart()  # evaluation and saving are not part of the next step
    return stopped


def _check_forward(llama: nn.Module, config: RunConfig) -> None:
    try:
        check_forward(llama, config.kernels.attention)
    except ValueError as error:
        raise InputError(str(error)) from None


def _learning_rate(config: RunConfig, step: int, num_steps: int) -> float:
    return config.train.learning_rate * schedule.multiplier(
        config.train.lr_scheduler_type,
        step,
        num_steps=num_steps,
        num_warmup_steps=schedule.num_warmup_steps(config.train.warmup_ratio, num_steps),
    )


def _save(run: Run) -> None:
    rng = gather_object([capture_rng(run.accelerator.process_index)])
    if run.accelerator.is_main_process:
        save_checkpoint(
            run.directory,
            state=run.state,
            write_weights=lambda directory: write_weights(directory, run.model),
            optimizer=run.optimizer.state_tensors(),
            rng={name: tensor for one in rng for name, tensor in one.items()},
            config_yaml=dump_config(run.config),
            keep=run.config.checkpoint.keep,
        )
    run.accelerator.wait_for_everyone()


def _evaluate(run: Run, llama: nn.Module, metrics: MetricsFile, console: StepConsole) -> None:
    batches = eval_batches(
        run.data.eval,
        packing=run.config.data.packing,
        max_length=run.config.data.max_length,
        per_device_batch_size=run.config.train.per_device_train_batch_size,
        rank=run.accelerator.process_index,
        world_size=run.accelerator.num_processes,
        pad_token_id=run.tokenizer.pad_token_id,
    )
    loss, num_labels = evaluate(run.model, llama, batches, run.accelerator)
    values = {"step": run.state.step, "eval_loss": loss, "eval_label_tokens": num_labels}
    metrics.write(values)
    run.accelerator.log(values, step=run.state.step)
    console.say(f"step {run.state.step}  eval loss {loss:.4f} on {num_labels:,} label tokens")


def _evaluation_due(run: Run) -> bool:
    is_last = run.state.step == run.num_steps
    return run.data.eval is not None and (_due(run, run.config.train.eval_every) or is_last)


def _due(run: Run, every: str | int) -> bool:
    if every == "epoch":
        return run.state.step % run.loader.steps_per_epoch == 0
    return every != "never" and run.state.step % every == 0


def _step_values(
    state: TrainState, report: StepReport, learning_rate: float, step_ms: float, accelerator: Accelerator
) -> dict:
    seconds = step_ms / 1e3
    return {
        "step": state.step,
        "epoch": state.epoch,
        "loss": report.loss,
        "learning_rate": learning_rate,
        "grad_norm": report.grad_norm,
        "slot_tokens": report.slot_tokens,
        "real_tokens": report.real_tokens,
        "label_tokens": report.label_tokens,
        "slot_tokens_per_s": report.slot_tokens / seconds,
        "real_tokens_per_s": report.real_tokens / seconds,
        "label_tokens_per_s": report.label_tokens / seconds,
        "step_ms": step_ms,
        "peak_gib": peak_gib(accelerator.device),
    }


def _announce(console: StepConsole, run: Run) -> None:
    documents, config = run.data.train, run.config
    paged = "paged" if run.optimizer.is_paged else "not paged"
    console.say(
        f"{documents.offsets.size - 1:,} documents in {run.loader.num_packs:,} packs of {config.data.max_length} "
        f"({config.data.packing}), {run.num_steps:,} steps, {run.flat.weight.numel():,} trained parameters, "
        f"attention {config.kernels.attention}, optimizer state {paged}"
    )
