"""Unsloth on a checkpoint: python -m benchmarks.peers.unsloth_sft --model DIR --data FILE [options]"""

from __future__ import annotations

import unsloth  # isort: skip (it edits transformers, peft and trl, so it comes before them)

import argparse
import tempfile
from typing import Any

import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from benchmarks.peers import measure, rows, settings


def train(arguments: argparse.Namespace) -> dict[str, Any]:
    measure.cap_memory(arguments.memory_cap_gib, 0)
    once = rows.documents(arguments.data, rows.load_tokenizer(arguments.model), arguments.packing, arguments.length)
    num_steps = arguments.warmup + arguments.steps
    given = rows.enough_documents(
        once,
        num_packs=num_steps * arguments.batch * arguments.accumulation,
        length=arguments.length,
        seed=arguments.seed,
    )
    # "unsloth" recomputes with the activations kept on the host meanwhile.
    checkpointing = "unsloth" if arguments.checkpointing else False
    model, tokenizer = unsloth.FastLanguageModel.from_pretrained(
        arguments.model,
        max_seq_length=arguments.length,
        dtype=torch.bfloat16,
        load_in_4bit=True,
        use_gradient_checkpointing=checkpointing,
        local_files_only=True,
        random_state=arguments.seed,
    )
    model = unsloth.FastLanguageModel.get_peft_model(
        model,
        r=settings.LORA_RANK,
        lora_alpha=settings.LORA_ALPHA,
        lora_dropout=arguments.dropout,
        target_modules=settings.TARGETS[arguments.targets],
        bias="none",
        use_gradient_checkpointing=checkpointing,
        random_state=arguments.seed,
    )
    with tempfile.TemporaryDirectory() as output_dir:
        trainer = SFTTrainer(
            model=model,
            args=trainer_config(arguments, output_dir, num_steps),
            train_dataset=Dataset.from_dict({"input_ids": given}),
            processing_class=tokenizer,
        )
        rows.check_same_tokens(trainer.train_dataset, given, arguments.packing)
        row = measure.measure_trainer(trainer, arguments)
    from unsloth.models._utils import HAS_FLASH_ATTENTION

    return {**row, "flash_attention_2": bool(HAS_FLASH_ATTENTION)}


def trainer_config(arguments: argparse.Namespace, output_dir: str, num_steps: int) -> SFTConfig:
    return SFTConfig(
        output_dir=output_dir,
        max_length=arguments.length,
        packing=True,
        packing_strategy=arguments.packing,
        per_device_train_batch_size=arguments.batch,
        gradient_accumulation_steps=arguments.accumulation,
        gradient_checkpointing=arguments.checkpointing,
        bf16=True,
        optim="paged_adamw_32bit",
        learning_rate=settings.LEARNING_RATE,
        lr_scheduler_type="constant",
        max_grad_norm=settings.MAX_GRAD_NORM,
        max_steps=num_steps,
        seed=arguments.seed,
        dataset_num_proc=1,
        **settings.QUIET_TRAINER,
    )


def main() -> None:
    arguments = settings.peer_parser(__doc__).parse_args()
    row = measure.or_out_of_memory(lambda: train(arguments))
    settings.print_row("Unsloth", row, arguments, measure.device_name())


if __name__ == "__main__":
    main()
