"""Models of a named shape with random weights, made in memory or saved as a checkpoint: no download."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from packloop.bench.shapes import SHAPES, check_shape

WEIGHT_STD = 0.02


def shape_config(shape: str, vocab_size: int | None = None) -> LlamaConfig:
    """The configuration of a named shape, or of the model in a directory. InputError for anything else.

    vocab_size: instead of the shape's own.
    """
    check_shape(shape)
    if shape in SHAPES:
        config = LlamaConfig(
            **SHAPES[shape], tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, use_cache=False
        )
    else:
        config = LlamaConfig.from_pretrained(shape)
    if vocab_size is not None:
        config.vocab_size = vocab_size
    return config


def random_model(
    config: LlamaConfig,
    *,
    quantization: str,
    device: torch.device,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    double_quant: bool = True,
) -> LlamaForCausalLM:
    """A frozen model with normal random weights in `dtype`, its decoder's linear layers in NF4 on request.

    The same modules as loading a checkpoint with bitsandbytes gives, in seconds, as no weight passes through the host.
    """
    torch.manual_seed(seed)
    with torch.device("meta"):
        model = LlamaForCausalLM._from_config(config, dtype=dtype, attn_implementation="sdpa")
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            weight = _random(module.weight.shape, device, dtype)
            if quantization == "nf4" and name != "lm_head":
                _set_module(model, name, _nf4_linear(weight, double_quant))
            else:
                module.weight = nn.Parameter(weight, requires_grad=False)
        elif isinstance(module, nn.Embedding):
            module.weight = nn.Parameter(_random(module.weight.shape, device, dtype), requires_grad=False)
        elif hasattr(module, "variance_epsilon"):
            ones = torch.ones(module.weight.shape, dtype=dtype, device=device)
            module.weight = nn.Parameter(ones, requires_grad=False)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    return model.requires_grad_(False)


def _random(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=device).normal_(std=WEIGHT_STD)


def _nf4_linear(weight_OI: torch.Tensor, double_quant: bool) -> nn.Module:
    import bitsandbytes as bnb

    rows, columns = weight_OI.shape
    linear = bnb.nn.Linear4bit(
        columns, rows, bias=False, compute_dtype=weight_OI.dtype, quant_type="nf4", device="meta"
    )
    weight = bnb.nn.Params4bit(weight_OI, requires_grad=False, quant_type="nf4", compress_statistics=double_quant)
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
            name: torch.ones(shape, dtype=torch.bfloat16)
            if len(shape) == 1
            else _random(shape, device, torch.bfloat16).cpu()
            for name, shape in parameters.items()
        }
        save_file(tensors, output / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(parameters, file))
    (output / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(output)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(output)
