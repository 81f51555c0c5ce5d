"""What a run is made of, put together before its first step: accelerator, data, model, optimizer, packs, state."""

from __future__ import annotations

import logging
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from transformers import PreTrainedTokenizerBase

from packloop.config import RunConfig
from packloop.data.loader import PackLoader, TrainingData, build_data
from packloop.engine.batch import Windows
from packloop.engine.budget import check_budget, grow_segments
from packloop.engine.checkpoint import Checkpoint, find_checkpoint, restore_rng
from packloop.engine.model import load_model, load_tokenizer
from packloop.engine.optim import AdamW, FlatParameters
from packloop.engine.out_of_memory import MemoryAccount
from packloop.engine.output_dir import Claim, check_output_dir
from packloop.engine.plan import finds_tokens, layout_preparation, resolve_auto
from packloop.engine.planner.layout import arrangement
from packloop.engine.run_dir import config_for_resume, load_trained_tensors
from packloop.engine.state import TrainState
from packloop.engine.trackers import check_trackers
from packloop.engine.vocabulary import check_rows, fit_padding
from packloop.kernels.patch import find_llama

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """A run that is ready for its next step. config: without any `auto`; state: advanced by every step."""

    directory: Path
    config: RunConfig
    accelerator: Accelerator
    tokenizer: PreTrainedTokenizerBase
    data: TrainingData
    model: nn.Module
    flat: FlatParameters
    optimizer: AdamW
    loader: PackLoader
    windows: Windows
    state: TrainState
    num_steps: int
    is_resumed: bool


def prepare_run(config: RunConfig, resume: str | None, account: MemoryAccount, claim: Claim) -> Run:
    """A new run, or one that goes on from a checkpoint: `latest` or a path. Its directory is not written to yet.

    account: told what takes memory, and under which configuration, as it comes to be. claim: of the directory, taken by
    the main process where the directory exists. Random generators are left as
    the next step has to find them.
    """
    run_dir = Path(config.train.output_dir)
    check_output_dir(run_dir, resume=resume)
    check_trackers(config.log.trackers)
    set_numerics(config)
    accelerator = _make_accelerator(config)
    if accelerator.is_main_process:
        claim.take()
    checkpoint = None
    if resume:
        with accelerator.main_process_first():  # which sets damaged checkpoints aside, so that the others find none
            checkpoint = find_checkpoint(run_dir, resume)
        checkpoint.check_processes(accelerator.num_processes)  # on every rank, before a run file is written
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
    vocabulary = find_llama(model).config.vocab_size
    check_rows(data, tokenizer, vocabulary)
    fit_padding(tokenizer, vocabulary)
    _warn_of_positions(config, data, find_llama(model).config.max_position_embeddings)
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
    return Run(
        directory=run_dir,
        config=config,
        accelerator=accelerator,
        tokenizer=tokenizer,
        data=data,
        model=model,
        flat=flat,
        optimizer=optimizer,
        loader=loader,
        windows=windows,
        state=state,
        num_steps=num_steps,
        is_resumed=checkpoint is not None,
    )


def _warn_of_positions(config: RunConfig, data: TrainingData, num_positions: int) -> None:
    """Where documents, or under `wrapped` packs, reach beyond the positions that the model was made for."""
    used = config.data.max_length if config.data.packing == "wrapped" else int(data.train.lengths.max())
    if used > num_positions:
        logger.warning(
            "data.max_length=%d: positions up to %d are trained on, and the model's config.json has %d "
            "(max_position_embeddings): those beyond are new to it, and generate refuses them",
            config.data.max_length,
            used,
            num_positions,
        )


def _make_accelerator(config: RunConfig) -> Accelerator:
    return Accelerator(
        mixed_precision="no",
        # Without being told so, accelerate takes torchrun's processes on a machine without GPU for runs of their own.
        cpu=not torch.cuda.is_available(),
        log_with=config.log.trackers or None,
        project_dir=Path(config.train.output_dir),
    )


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


def _restore(
    checkpoint: Checkpoint, model: nn.Module, optimizer: AdamW, loader: PackLoader, accelerator: Accelerator
) -> None:
    state = checkpoint.state
    load_trained_tensors(model, checkpoint.weights)
    optimizer.load_state_tensors(checkpoint.optimizer, state.step)
    loader.load_state({"seed": loader.state()["seed"], "epoch": state.epoch, "cursor": state.cursor})
    restore_rng(checkpoint.rng, accelerator.process_index)  # last: nothing above may draw from it afterwards
    logger.info("resumed from %s at step %d", checkpoint.path.name, state.step)
