"""Models of a named shape with random weights, made in memory or saved as a checkpoint: no download."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from packloop.errors import InputError

SHAPES = {
    "llama2-7b": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    },
    "llama3-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
    },
    "tinyllama-1.1b": {
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
    },
    # For trying a benchmark on a CPU, never for measuring.
    "tiny": {
        "vocab_size": 32000,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    },
}
WEIGHT_STD = 0.02


def shape_config(shape: str, vocab_size: int | None = None) -> LlamaConfig:
    """The configuration of a named shape, or of the model in a directory. InputError for anything else.

    vocab_size: instead of the shape's own.
    """
    if shape in SHAPES:
        config = LlamaConfig(
            **SHAPES[shape], tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, use_cache=False
        )
    elif (Path(shape) / "config.json").is_file():
        config = AutoConfig.from_pretrained(shape)
        if not isinstance(config, LlamaConfig):
            raise InputError(f"model shape {shape!r} is a {config.model_type}; a llama is needed")
    else:
        raise InputError(
            f"model shape {shape!r} is neither {', '.join(SHAPES)} nor a directory with a model's config.json"
        )
    if vocab_size is not None:
        config.vocab_size = vocab_size
    return config


def random_model(config: LlamaConfig, *, quantization: str, device: torch.device, seed: int = 0) -> LlamaForCausalLM:
    """A frozen bf16 model with normal random weights, its decoder's linear layers in double-quantised NF4 on request.

    The same modules as loading a checkpoint with bitsandbytes gives, in seconds, as no weight passes through the host.
    """
    torch.manual_seed(seed)
    with torch.device("meta"):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            weight = _random(module.weight.shape, device)
            if quantization == "nf4" and name != "lm_head":
                _set_module(model, name, _nf4_linear(weight))
            else:
                module.weight = nn.Parameter(weight, requires_grad=False)
        elif isinstance(module, nn.Embedding):
            module.weight = nn.Parameter(_random(module.weight.shape, device), requires_grad=False)
        elif hasattr(module, "variance_epsilon"):
            ones = torch.ones(module.weight.shape, dtype=torch.bfloat16, device=device)
            module.weight = nn.Parameter(ones, requires_grad=False)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    return model.requires_grad_(False)


def _random(shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(std=WEIGHT_STD)


def _nf4_linear(weight_OI: torch.Tensor) -> nn.Module:
    import bitsandbytes as bnb

    rows, columns = weight_OI.shape
    linear = bnb.nn.Linear4bit(columns, rows, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", device="meta")
    weight = bnb.nn.Params4bit(weight_OI, requires_grad=False, quant_type="nf4", compress_statistics=True)
    linear.weight = weight.to(weight_OI.device)
    linear.support_avx512bf16_for_cpu = False
    return linear


def _set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def save_random_checkpoint(config: LlamaConfig, output: Path, tokenizer: str, seed: int = 0) -> None:
    """Writes bf16 safetensors shards, one a layer, with configuration and tokenizer."""
    config.dtype = torch.bfloat16
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(seed)
    output.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    shards: dict[str, dict[str, torch.Size]] = {}
    for name, parameter in model.named_parameters():
        layer = name.split(".")[2] if name.startswith("model.layers.") else "rest"
        shards.setdefault(f"model-{layer}.safetensors", {})[name] = parameter.shape
    index = {}
    for file, parameters in shards.items():
        tensors = {
            name: torch.ones(shape, dtype=torch.bfloat16) if len(shape) == 1 else _random(shape, device).cpu()
            for name, shape in parameters.items()
        }
        save_file(tensors, output / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(parameters, file))
    (output / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(output)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(output)
