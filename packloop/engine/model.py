"""The base model, its adapter and its tokenizer, loaded as training needs them."""

from __future__ import annotations

import logging
import os
import textwrap
from importlib.resources import files

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from packloop.config import LoraConfig, ModelConfig
from packloop.engine.model_files import check_model_files, is_path
from packloop.errors import ConfigError, InputError

logger = logging.getLogger(__name__)


def resolve_name(name_or_path: str) -> str:
    """`bundled` -> the directory of the tiny Llama in this package; `~` -> the home directory; else as it is."""
    return str(files("packloop.bundled") / "model") if name_or_path == "bundled" else os.path.expanduser(name_or_path)


def load_tokenizer(config: ModelConfig, *, named: str = "model.name_or_path") -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a padding token (its EOS where it names none: labels never depend on it).

    named: the setting or option that said which, for messages.
    """
    tokenizer = _load(AutoTokenizer, "tokenizer", config, named)
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"{named}={config.name_or_path!r}: its tokenizer has no EOS token, which ends every document; "
            "set eos_token in its tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(config: ModelConfig, device: torch.device, *, trains: bool = False) -> LlamaForCausalLM:
    """The frozen base on `device`: NF4 linear layers or `dtype`; norms, embedding and head in `dtype`; no KV cache.

    Raises InputError (or ConfigError) for a model that is not there, cannot be reached, is no Llama or lacks files, and
    if it `trains`, for one whose attention has dropout, which training would leave out.
    """
    dtype = getattr(torch, config.dtype)
    architecture: PretrainedConfig = _load(AutoConfig, "config", config)
    check_architecture(architecture, config, trains=trains)
    # Llama 2's early checkpoints ask for tensor-parallel slices of the linear layers: slower, other numerics, no NF4.
    architecture.pretraining_tp = 1
    quantization = None
    if config.quantization == "nf4":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=config.double_quant,
            bnb_4bit_compute_dtype=dtype,
        )
    model = _load(
        LlamaForCausalLM,
        "weights",
        config,
        config=architecture,
        dtype=dtype,
        quantization_config=quantization,
        device_map={"": device},
        attn_implementation="sdpa",
        use_safetensors=True,
    )
    for module in model.modules():
        # bitsandbytes repacks 4-bit weights in place at the first inference on a CPU with AVX512-BF16; the gradients
        # of every adapter on them are zero from then on.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    model.config.use_cache = False
    return model.requires_grad_(False)


def check_architecture(architecture: PretrainedConfig, config: ModelConfig, *, trains: bool) -> None:
    """InputError for a model that is no Llama, or that `trains` and has attention dropout, which would be left out."""
    if architecture.model_type != "llama":
        raise InputError(
            f"model.name_or_path={config.name_or_path!r} is of type {architecture.model_type!r}; "
            "a Llama model is needed"
        )
    if trains and architecture.attention_dropout:
        raise InputError(
            f"model.name_or_path={config.name_or_path!r}: its config.json has "
            f"attention_dropout={architecture.attention_dropout}, and no attention here has dropout; "
            "to train without, set it to 0 in a copy of the model"
        )


def attach_adapter(base: LlamaForCausalLM, config: LoraConfig, *, base_name: str) -> PeftModel:
    """A PEFT model with a fresh, trainable fp32 adapter on `base`, drawn from torch's global generator."""
    names = {name.rpartition(".")[2] for name, module in base.named_modules() if isinstance(module, nn.Linear)}
    names.discard("lm_head")
    if config.target_modules != "all-linear" and (unknown := set(config.target_modules) - names):
        raise ConfigError(
            f"lora.target_modules={sorted(unknown)} match no layer of the model; it has {', '.join(sorted(names))}"
        )
    adapter = PeftLoraConfig(
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        bias=config.bias,
        target_modules=config.target_modules,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_name,
    )
    model = get_peft_model(base, adapter, autocast_adapter_dtype=True)
    model.peft_config["default"].base_model_name_or_path = base_name
    return model


def load_model(model: ModelConfig, lora: LoraConfig, device: torch.device) -> PeftModel | LlamaForCausalLM:
    """The model to train: a PEFT model on a frozen base, or, with lora.enabled=false, a Llama that trains whole."""
    base = load_base(model, device, trains=True)
    if not lora.enabled:
        return base.requires_grad_(True)
    return attach_adapter(base, lora, base_name=model.name_or_path)


def _load(cls, part: str, source: ModelConfig, named: str = "model.name_or_path", /, **kwargs):
    """`cls.from_pretrained` with the run's source; its failures as one line that says what to do.

    part: of the model, as `check_model_files` calls it. named: the setting that the source comes from.
    """
    name = resolve_name(source.name_or_path)
    check_model_files(name, part, named=named)
    if source.trust_remote_code:
        kwargs["trust_remote_code"] = True
    try:
        return cls.from_pretrained(name, revision=source.revision or "main", **kwargs)
    except (OSError, ValueError) as error:
        reason = textwrap.shorten(str(error), 300, placeholder=" ...")
        where = f"{named}={source.name_or_path!r}"
        if not is_path(name):
            raise InputError(
                f"{where} is no directory here and cannot be loaded from the Hub ({reason}); "
                "give a local directory or a Hub name that this machine can reach, logged in where the model is gated"
            ) from error
        needed = "a tokenizer.json, as save_pretrained writes it" if part == "tokenizer" else "a Llama model's files"
        raise InputError(f"{where}: its {part} cannot be loaded ({reason}); needed is {needed}") from error
