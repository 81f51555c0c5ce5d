"""TRL's SFTTrainer on a checkpoint: python -m benchmarks.peers.trl_sft --model DIR --data FILE [options]"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, set_seed
from trl import SFTConfig, SFTTrainer

from benchmarks.peers import measure, rows, settings


def train(arguments: argparse.Namespace) -> dict[str, Any]:
    on_gpu = torch.cuda.is_available()
    measure.cap_memory(arguments.memory_cap_gib, 0)
    tokenizer = rows.load_tokenizer(arguments.model)
    once = rows.documents(arguments.data, tokenizer, arguments.packing, arguments.length)
    num_steps = arguments.warmup + arguments.steps
    given = rows.enough_documents(
        once,
        num_packs=num_steps * arguments.batch * arguments.accumulation,
        length=arguments.length,
        seed=arguments.seed,
    )
    set_seed(arguments.seed)
    model = load_model(arguments, on_gpu)
    if arguments.kbit_preparation:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=arguments.checkpointing)
    with tempfile.TemporaryDirectory() as output_dir:
        trainer = SFTTrainer(
            model=model,
            args=trainer_config(arguments, output_dir, num_steps, on_gpu),
            train_dataset=Dataset.from_dict({"input_ids": given, "labels": given}),
            processing_class=tokenizer,
            peft_config=LoraConfig(
                r=settings.LORA_RANK,
                lora_alpha=settings.LORA_ALPHA,
                lora_dropout=arguments.dropout,
                target_modules=settings.TARGETS[arguments.targets],
                bias="none",
                task_type="CAUSAL_LM",
            ),
        )
        rows.check_same_tokens(trainer.train_dataset, given, arguments.packing)
        return measure.measure_trainer(trainer, arguments)


def load_model(arguments: argparse.Namespace, on_gpu: bool) -> PreTrainedModel:
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        arguments.model,
        dtype=torch.bfloat16,
        quantization_config=quantization,
        device_map={"": 0 if on_gpu else "cpu"},
        attn_implementation=arguments.attention,
    )
    model.config.use_cache = False
    return model


def trainer_config(arguments: argparse.Namespace, output_dir: str, num_steps: int, on_gpu: bool) -> SFTConfig:
    return SFTConfig(
        output_dir=output_dir,
        max_length=arguments.length,
        packing=True,
        packing_strategy=arguments.packing,
        per_device_train_batch_size=arguments.batch,
        gradient_accumulation_steps=arguments.accumulation,
        gradient_checkpointing=arguments.checkpointing,
        use_liger_kernel=arguments.liger,
        bf16=arguments.autocast,
        # bitsandbytes pages on CUDA only.
        optim="paged_adamw_32bit" if on_gpu else "adamw_torch",
        learning_rate=settings.LEARNING_RATE,
        lr_scheduler_type="constant",
        max_grad_norm=settings.MAX_GRAD_NORM,
        max_steps=num_steps,
        use_cpu=not on_gpu,
        seed=arguments.seed,
        **settings.QUIET_TRAINER,
    )


def main() -> None:
    parser = settings.peer_parser(__doc__)
    parser.add_argument("--attention", choices=("eager", "sdpa", "flash_attention_2"), default="flash_attention_2")
    parser.add_argument("--liger", action="store_true", help="Liger's kernels in the model's layers")
    parser.add_argument("--kbit-preparation", action="store_true", help="norms, embedding and head in fp32")
    parser.add_argument("--autocast", action=argparse.BooleanOptionalAction, default=True, help="to bf16")
    arguments = parser.parse_args()
    row = measure.or_out_of_memory(lambda: train(arguments))
    settings.print_row("TRL + Liger" if arguments.liger else "TRL", row, arguments, measure.device_name())


if __name__ == "__main__":
    main()
