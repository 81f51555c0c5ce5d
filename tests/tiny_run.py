"""A tiny random Llama with a tokenizer of its own, and a finished run on it, written by the package's own writers."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from packloop.bench.synthetic import shape_config
from packloop.config import RunConfig, parse_config
from packloop.engine.environment import describe_environment
from packloop.engine.model import load_model, load_tokenizer
from packloop.engine.model_card import write_adapter_card
from packloop.engine.run_dir import write_run_files, write_weights

# Of the bundled tokenizer.
VOCABULARY = 2048
TEXT = [
    "Write a note to the landlord about the leaking tap in the kitchen.",
    "Dear Ms Ortega, the tap in the kitchen leaks. Could you send somebody this week? Yours, Sam",
    "### Instruction:\nUse the Input below to create an instruction\n\n### Input:\n\n### Response:\n",
]


def save_tokenizer(directory: Path) -> None:
    """A byte-level BPE of about 300 tokens that puts BOS in front, as Llama's does; it names no padding token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(directory)


def save_base(directory: Path, *, dtype: torch.dtype = torch.float32, seed: int = 0, **settings) -> Path:
    """A random Llama of 2 layers with grouped key/value heads. `settings` go into its config."""
    values = {
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 160,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**(values | settings))).to(dtype)
    for parameter in model.parameters():
        if parameter.dim() == 2:  # the default of 0.02 makes a model whose logits hardly depend on anything
            parameter.data.normal_(std=0.15)
    model.save_pretrained(directory)
    # Settings that the installed transformers drops are still found in checkpoints that others wrote.
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | settings))
    save_tokenizer(directory)
    return directory


def save_small_shape(directory: Path) -> Path:
    """The shape `tiny` with the bundled tokenizer's vocabulary, which `--synthetic` takes as it takes a name.

    A sixteenth of the shape's own vocabulary: products with the head in bf16 are most of a step on many CPUs.
    """
    shape_config("tiny", vocab_size=VOCABULARY).save_pretrained(directory)
    return directory


def run_config(base: Path, run_dir: Path, **sections: dict) -> RunConfig:
    values = {
        "model": {"name_or_path": str(base), "dtype": "float32", "quantization": "nf4"},
        "lora": {"r": 4, "alpha": 8, "dropout": 0.0, "target_modules": ["q_proj", "v_proj", "down_proj"]},
        "train": {"output_dir": str(run_dir)},
    }
    return parse_config({name: values.get(name, {}) | sections.get(name, {}) for name in {**values, **sections}})


def save_run(config: RunConfig, *, adapter_std: float = 0.1) -> Path:
    """The directory that training `config` leaves, its adapter random instead of trained (`lora_B` is 0 for std 0)."""
    run_dir = Path(config.train.output_dir)
    torch.manual_seed(1)
    model = load_model(config.model, config.lora, torch.device("cpu"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=adapter_std)
    write_run_files(run_dir, config, describe_environment(), load_tokenizer(config.model))
    write_weights(run_dir, model)
    steps = [{"step": n, "loss": 3.0 / n, "real_tokens": 100, "label_tokens": 40} for n in (1, 2, 3)]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    write_adapter_card(run_dir, config)
    return run_dir
