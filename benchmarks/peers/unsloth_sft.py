"""Unsloth on a checkpoint, by turns: python -m benchmarks.peers.unsloth_sft --model DIR --data FILE [options]"""

from __future__ import annotations

import unsloth  # isort: skip (it edits transformers, peft and trl, so it comes before them)

import argparse
from typing import Any

import torch

from benchmarks.peers import live, rows, settings, sft
from packloop.engine.budget import limit_memory


class Unsloth:
    """A loaded model with its adapter, which is set back to its first values after a turn."""

    who = "Unsloth"

    def __init__(self, arguments: argparse.Namespace):
        self._loaded = arguments
        limit_memory(arguments.memory_cap_gib)
        self._once = rows.documents(
            arguments.data, rows.load_tokenizer(arguments.model), arguments.packing, arguments.length
        )
        # "unsloth" recomputes with the activations kept on the host meanwhile.
        checkpointing = "unsloth" if arguments.checkpointing else False
        model, self._tokenizer = unsloth.FastLanguageModel.from_pretrained(
            arguments.model,
            max_seq_length=arguments.length,
            dtype=torch.bfloat16,
            load_in_4bit=True,
            use_gradient_checkpointing=checkpointing,
            local_files_only=True,
            random_state=arguments.seed,
        )
        self._model = unsloth.FastLanguageModel.get_peft_model(
            model,
            r=settings.LORA_RANK,
            lora_alpha=settings.LORA_ALPHA,
            lora_dropout=arguments.dropout,
            target_modules=settings.TARGETS[arguments.targets],
            bias="none",
            use_gradient_checkpointing=checkpointing,
            random_state=arguments.seed,
        )
        self._trained = {name: p for name, p in self._model.named_parameters() if p.requires_grad}
        self._first = {name: p.detach().to("cpu", copy=True) for name, p in self._trained.items()}

    def turn(self, arguments: argparse.Namespace) -> dict[str, Any]:
        settings.check_turn(self._loaded, arguments)
        # Every trainer wraps the model's forward in autocast once more.
        own_forward = self._model.__dict__.get("forward")
        try:
            row = sft.train(
                self._model,
                self._tokenizer,
                self._once,
                arguments,
                columns=("input_ids",),
                bf16=True,
                optim="paged_adamw_32bit",
                dataset_num_proc=1,
            )
        finally:
            self._model.__dict__.pop("forward", None)
            if own_forward is not None:
                self._model.forward = own_forward
            for name, parameter in self._trained.items():
                parameter.grad = None
                parameter.data.copy_(self._first[name])
        from unsloth.models._utils import HAS_FLASH_ATTENTION

        return {**row, "flash_attention_2": bool(HAS_FLASH_ATTENTION)}


def parse(argv: list[str]) -> argparse.Namespace:
    return settings.peer_parser(__doc__).parse_args(argv)


if __name__ == "__main__":
    live.serve(parse, Unsloth)
