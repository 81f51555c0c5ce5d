"""The training loop: the sole owner of the order of a step."""

from __future__ import annotations

import logging
import math
import os
import signal
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object, set_seed
from torch import nn

from packloop.config import RunConfig, dump_config
from packloop.data.loader import PackLoader, TrainingData, build_data, eval_batches
from packloop.engine import schedule
from packloop.engine.batch import Micro, Windows
from packloop.engine.budget import check_budget, grow_segments
from packloop.engine.checkpoint import (
    Checkpoint,
    capture_rng,
    disk_errors,
    find_checkpoint,
    restore_rng,
    save_checkpoint,
    set_newer_aside,
)
from packloop.engine.environment import describe_environment
from packloop.engine.evaluate import evaluate
from packloop.engine.finished_run import lacks_evaluation
from packloop.engine.metrics import MetricsFile, StepClock, StepConsole, peak_gib, reset_peak
from packloop.engine.model import load_model, load_tokenizer
from packloop.engine.model_card import write_adapter_card
from packloop.engine.nonfinite import NonFiniteError, after_divergence, non_finite
from packloop.engine.optim import AdamW, FlatParameters
from packloop.engine.out_of_memory import MemoryAccount
from packloop.engine.output_dir import check_output_dir
from packloop.engine.plan import finds_tokens, layout_preparation, patch_options, resolve_auto
from packloop.engine.planner.layout import arrangement
from packloop.engine.run_dir import (
    config_for_resume,
    load_trained_tensors,
    write_final_weights,
    write_run_files,
    write_weights,
)
from packloop.engine.state import TrainState
from packloop.engine.stop import stop_signals
from packloop.engine.trackers import check_trackers
from packloop.errors import InputError
from packloop.kernels.forward_check import check_forward
from packloop.kernels.patch import packed_loss_sum, patched

logger = logging.getLogger(__name__)


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
    with account.explain_exhaustion():
        try:
            return _train(config, resume, on_step, account)
        except NonFiniteError as error:
            remedy = after_divergence(Path(config.train.output_dir), resume)
            raise NonFiniteError(f"{error}; {remedy}") from error


def _train(
    config: RunConfig, resume: str | None, on_step: Callable[[dict], None] | None, account: MemoryAccount
) -> TrainResult:
    run_dir = Path(config.train.output_dir)
    check_output_dir(run_dir, resume=resume)
    check_trackers(config.log.trackers)
    set_numerics(config)
    accelerator = Accelerator(
        mixed_precision="no",
        # Without being told so, accelerate takes torchrun's processes on a machine without GPU for runs of their own.
        cpu=not torch.cuda.is_available(),
        log_with=config.log.trackers or None,
        project_dir=run_dir,
    )
    checkpoint = None
    if resume:
        with accelerator.main_process_first():  # which sets damaged checkpoints aside, so that the others find none
            checkpoint = find_checkpoint(run_dir, resume)
        checkpoint.check_processes(accelerator.num_processes)  # on every rank, before anything is written
        account.config = config = config_for_resume(config, checkpoint.path)
    check_budget(config.train.memory_budget_gib, accelerator.device)

    tokenizer = load_tokenizer(config.model)
    data = build_data(config.data, tokenizer, seed=config.train.seed)
    state = checkpoint.state if checkpoint else TrainState()
    if checkpoint and state.data_digest is None:
        logger.info("%s does not say which data it was made with: that of now is taken for it", checkpoint.path.name)
    state.bind(data.train)
    set_seed(config.train.seed)  # every rank draws the same adapter
    model = load_model(config.model, config.lora, accelerator.device)
    flat = FlatParameters(model)
    optimizer = make_optimizer(config, flat)
    account.model, account.paged_bytes = model, optimizer.paged_bytes
    loader = make_loader(config, data, tokenizer.pad_token_id, accelerator)
    account.config = config = resolve_auto(config, model, loader, accelerator, paged_bytes=optimizer.paged_bytes)
    num_steps = config.train.max_steps or math.ceil(config.train.num_train_epochs * loader.steps_per_epoch)
    set_seed(config.train.seed, device_specific=True)  # every rank draws its own dropout
    if checkpoint:
        _restore(checkpoint, model, optimizer, loader, accelerator)
    windows = Windows(
        loader,
        accelerator.device,
        layout_preparation(config),
        arrange=arrangement(config.kernels),
        finds_tokens=finds_tokens(config),
    )

    if accelerator.is_main_process:
        if resume:
            set_newer_aside(run_dir, state.step)
        write_run_files(run_dir, config, describe_environment(), tokenizer)
    if config.log.trackers:
        accelerator.init_trackers("packloop", config={"config": config.model_dump_json()})
    metrics = MetricsFile(run_dir / "metrics.jsonl", enabled=accelerator.is_main_process, resume_step=state.step)
    console = StepConsole(
        num_steps=num_steps, first_step=state.step, every=config.log.every, enabled=accelerator.is_main_process
    )
    _announce(console, config, data, loader, num_steps, optimizer)
    model.train()
    with (
        closing(metrics),
        closing(console),  # or an error would leave a terminal with the bar's hidden cursor
        stop_signals() as stop,
        patched(model, **patch_options(config, model)) as llama,
    ):
        _check_forward(llama, config)
        save = partial(_save, run_dir, config, model, optimizer, state, accelerator)
        evaluate_now = partial(
            _evaluate, model, llama, data, config, tokenizer.pad_token_id, accelerator, state, metrics, console
        )
        stopped = False
        # A checkpoint's run may have ended before the evaluation that follows it.
        may_lack_one = checkpoint is not None and _evaluation_due(config, data, state, loader, num_steps)
        if may_lack_one and broadcast_object_list([lacks_evaluation(run_dir, state.step)])[0]:
            evaluate_now()
            stopped = state.step < num_steps and stop.voted(accelerator)
        reset_peak(accelerator.device)
        clock = StepClock()
        while state.step < num_steps and not stopped:
            learning_rate = _learning_rate(config, state.step, num_steps)
            report = train_step(
                llama,
                flat,
                optimizer,
                windows.take(),
                accelerator=accelerator,
                learning_rate=learning_rate,
                max_grad_norm=config.train.max_grad_norm,
                stop_requested=stop.signal is not None,
                meanwhile=windows.prepare,
            )
            state.advance(
                position=windows.position, slots=report.slot_tokens, real=report.real_tokens, labels=report.label_tokens
            )
            values = _step_values(state, report, learning_rate, clock.lap_ms(), accelerator)
            metrics.write(values)
            console.step(values, due=_due(config.log.every, state, loader) or state.step == num_steps)
            accelerator.log(values, step=state.step)
            if on_step:
                on_step(values)
            stopped, last = report.stop_votes > 0, state.step == num_steps
            is_saved = _due(config.checkpoint.every, state, loader) or stopped or last
            if is_saved:  # before an evaluation, which may take long and die
                save()
            if _evaluation_due(config, data, state, loader, num_steps):
                stopped = stopped or stop.voted(accelerator)  # asked for since the step's own vote
                if not stopped:
                    evaluate_now()
                    stopped = not last and stop.voted(accelerator)
                if stopped and not is_saved:
                    save()
            clock.restart()  # evaluation and saving are not part of the next step
    if accelerator.is_main_process and state.step == num_steps:  # a run that was stopped leaves a checkpoint
        write_final_weights(run_dir, model)
        with disk_errors(run_dir):
            write_adapter_card(run_dir, config)
    accelerator.wait_for_everyone()
    if config.log.trackers:
        accelerator.end_training()
    return TrainResult(run_dir=run_dir, state=state, stopped_by=(stop.signal or signal.SIGTERM) if stopped else None)


def _check_forward(llama: nn.Module, config: RunConfig) -> None:
    try:
        check_forward(llama, config.kernels.attention)
    except ValueError as error:
        raise InputError(str(error)) from None


def set_numerics(config: RunConfig) -> None:
    """Sets torch's precision, determinism and allocator as `config` asks, before anything is on a GPU."""
    torch.set_float32_matmul_precision("high" if config.train.tf32 else "highest")
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read by cuBLAS when it starts
    torch.use_deterministic_algorithms(config.train.deterministic)
    grow_segments()


def make_optimizer(config: RunConfig, flat: FlatParameters) -> AdamW:
    """The optimizer of `config.train` over the flat parameters."""
    return AdamW(
        flat,
        name=config.train.optim,
        betas=(config.train.adam_beta1, config.train.adam_beta2),
        eps=config.train.adam_epsilon,
        weight_decay=config.train.weight_decay,
    )


def make_loader(config: RunConfig, data: TrainingData, pad_token_id: int, accelerator: Accelerator) -> PackLoader:
    """This rank's packs of the training documents, at the first epoch's start."""
    return PackLoader(
        data.train,
        packing=config.data.packing,
        max_length=config.data.max_length,
        per_device_batch_size=config.train.per_device_train_batch_size,
        gradient_accumulation_steps=config.train.gradient_accumulation_steps,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        seed=config.train.seed,
        shuffle=config.data.shuffle,
        pad_token_id=pad_token_id,
    )


def _learning_rate(config: RunConfig, step: int, num_steps: int) -> float:
    return config.train.learning_rate * schedule.multiplier(
        config.train.lr_scheduler_type,
        step,
        num_steps=num_steps,
        num_warmup_steps=schedule.num_warmup_steps(config.train.warmup_ratio, num_steps),
    )


def _restore(
    checkpoint: Checkpoint, model: nn.Module, optimizer: AdamW, loader: PackLoader, accelerator: Accelerator
) -> None:
    state = checkpoint.state
    load_trained_tensors(model, checkpoint.weights)
    optimizer.load_state_tensors(checkpoint.optimizer, state.step)
    loader.load_state({"seed": loader.state()["seed"], "epoch": state.epoch, "cursor": state.cursor})
    restore_rng(checkpoint.rng, accelerator.process_index)  # last: nothing above may draw from it afterwards
    logger.info("resumed from %s at step %d", checkpoint.path.name, state.step)


def _save(run_dir, config: RunConfig, model, optimizer: AdamW, state: TrainState, accelerator: Accelerator) -> None:
    rng = gather_object([capture_rng(accelerator.process_index)])
    if accelerator.is_main_process:
        save_checkpoint(
            run_dir,
            state=state,
            write_weights=lambda directory: write_weights(directory, model),
            optimizer=optimizer.state_tensors(),
            rng={name: tensor for one in rng for name, tensor in one.items()},
            config_yaml=dump_config(config),
            keep=config.checkpoint.keep,
        )
    accelerator.wait_for_everyone()


def _evaluate(model, llama, data, config, pad_token_id, accelerator, state, metrics, console) -> None:
    batches = eval_batches(
        data.eval,
        packing=config.data.packing,
        max_length=config.data.max_length,
        per_device_batch_size=config.train.per_device_train_batch_size,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        pad_token_id=pad_token_id,
    )
    loss, num_labels = evaluate(model, llama, batches, accelerator)
    values = {"step": state.step, "eval_loss": loss, "eval_label_tokens": num_labels}
    metrics.write(values)
    accelerator.log(values, step=state.step)
    console.say(f"step {state.step}  eval loss {loss:.4f} on {num_labels:,} label tokens")


def _evaluation_due(
    config: RunConfig, data: TrainingData, state: TrainState, loader: PackLoader, num_steps: int
) -> bool:
    return data.eval is not None and (_due(config.train.eval_every, state, loader) or state.step == num_steps)


def _due(every: str | int, state: TrainState, loader: PackLoader) -> bool:
    if every == "epoch":
        return state.step % loader.steps_per_epoch == 0
    return every != "never" and state.step % every == 0


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


def _announce(
    console: StepConsole, config: RunConfig, data: TrainingData, loader: PackLoader, num_steps: int, optimizer: AdamW
) -> None:
    paged = "paged" if optimizer.is_paged else "not paged"
    console.say(
        f"{data.train.offsets.size - 1:,} documents in {loader.num_packs:,} packs of {config.data.max_length} "
        f"({config.data.packing}), {num_steps:,} steps, {optimizer.flat.weight.numel():,} trained parameters, "
        f"attention {config.kernels.attention}, optimizer state {paged}"
    )
