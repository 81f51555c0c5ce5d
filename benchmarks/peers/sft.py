"""One turn of an SFTTrainer on a model that is loaded. Unsloth edits trl, so it is imported before this is."""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from benchmarks.peers import measure, rows, settings, work


def train(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    once: list[list[int]],
    arguments: argparse.Namespace,
    *,
    columns: tuple[str, ...],
    **of_the_package: Any,
) -> dict[str, Any]:
    """The row of a fresh trainer on `model`, which has its adapter. once: what `rows.documents` returns.

    columns: of the data set, each holding the documents' ids. of_the_package: fields of SFTConfig.
    """
    num_steps = arguments.warmup + arguments.steps
    given = rows.enough_documents(
        once,
        num_packs=num_steps * arguments.batch * arguments.accumulation,
        length=arguments.length,
        seed=arguments.seed,
    )
    with tempfile.TemporaryDirectory() as output_dir:
        trainer = SFTTrainer(
            model=model,
            args=_config(arguments, output_dir, num_steps, of_the_package),
            train_dataset=Dataset.from_dict(dict.fromkeys(columns, given)),
            processing_class=tokenizer,
        )
        rows.check_same_tokens(trainer.train_dataset, given, arguments.packing)
        pairs = work.pairs_per_token(trainer.train_dataset, arguments.packing)
        return measure.measure_trainer(trainer, arguments, pairs_per_token=pairs)


def _config(
    arguments: argparse.Namespace, output_dir: str, num_steps: int, of_the_package: dict[str, Any]
) -> SFTConfig:
    return SFTConfig(
        output_dir=output_dir,
        max_length=arguments.length,
        packing=True,
        packing_strategy=arguments.packing,
        per_device_train_batch_size=arguments.batch,
        gradient_accumulation_steps=arguments.accumulation,
        gradient_checkpointing=arguments.checkpointing,
        learning_rate=settings.LEARNING_RATE,
        lr_scheduler_type="constant",
        max_grad_norm=settings.MAX_GRAD_NORM,
        max_steps=num_steps,
        seed=arguments.seed,
        **of_the_package,
        **settings.QUIET_TRAINER,
    )
