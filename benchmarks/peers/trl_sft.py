"""TRL's SFTTrainer on a checkpoint, by turns: python -m benchmarks.peers.trl_sft --model DIR --data FILE [options]"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, set_seed

from benchmarks.peers import live, rows, settings, sft
from packloop.engine.budget import limit_memory


class Trl:
    """A loaded base, which gets a fresh adapter a turn, drawn from the seed as SFTTrainer would draw it."""

    def __init__(self, arguments: argparse.Namespace):
        self.who = "TRL + Liger" if arguments.liger else "TRL"
        self._loaded = arguments
        limit_memory(arguments.memory_cap_gib)
        self._tokenizer = rows.load_tokenizer(arguments.model)
        self._once = rows.documents(arguments.data, self._tokenizer, arguments.packing, arguments.length)
        self._base = load_model(arguments)
        if arguments.kbit_preparation:
            self._base = prepare_model_for_kbit_training(self._base, use_gradient_checkpointing=arguments.checkpointing)

    def turn(self, arguments: argparse.Namespace) -> dict[str, Any]:
        settings.check_turn(self._loaded, arguments)
        set_seed(arguments.seed)
        adapter = LoraConfig(
            r=settings.LORA_RANK,
            lora_alpha=settings.LORA_ALPHA,
            lora_dropout=arguments.dropout,
            target_modules=settings.TARGETS[arguments.targets],
            bias="none",
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(self._base, adapter)
        on_gpu = torch.cuda.is_available()
        try:
            return sft.train(
                model,
                self._tokenizer,
                self._once,
                arguments,
                columns=("input_ids", "labels"),
                use_liger_kernel=arguments.liger,
                bf16=arguments.autocast,
                # bitsandbytes pages on CUDA only.
                optim="paged_adamw_32bit" if on_gpu else "adamw_torch",
                use_cpu=not on_gpu,
            )
        finally:
            self._base = model.unload()


def load_model(arguments: argparse.Namespace) -> PreTrainedModel:
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
        device_map={"": 0 if torch.cuda.is_available() else "cpu"},
        attn_implementation=arguments.attention,
    )
    model.config.use_cache = False
    return model


def parse(argv: list[str]) -> argparse.Namespace:
    parser = settings.peer_parser(__doc__)
    parser.add_argument("--attention", choices=("eager", "sdpa", "flash_attention_2"), default="flash_attention_2")
    parser.add_argument("--liger", action="store_true", help="Liger's kernels in the model's layers")
    parser.add_argument("--kbit-preparation", action="store_true", help="norms, embedding and head in fp32")
    parser.add_argument("--autocast", action=argparse.BooleanOptionalAction, default=True, help="to bf16")
    return parser.parse_args(argv)


if __name__ == "__main__":
    live.serve(parse, Trl)
