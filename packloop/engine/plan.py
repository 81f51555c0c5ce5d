"""What every `auto` becomes, decided once, before the first step, and written into the resolved configuration."""

from __future__ import annotations

import logging

import torch
from torch import nn

from packloop.config import RunConfig
from packloop.data.loader import PackLoader
from packloop.engine.batch import to_device
from packloop.errors import ConfigError
from packloop.kernels.attention import choose_backend
from packloop.kernels.patch import why_not_fused

logger = logging.getLogger(__name__)


def resolve_auto(config: RunConfig, model: nn.Module, loader: PackLoader, device: torch.device) -> RunConfig:
    """The configuration with every `auto` replaced by what it chose, so that a resumed run makes the same choice.

    The loader's position is left as it was. ConfigError where a requested kernel cannot run here.
    """
    kernels = config.kernels
    layer = kernels.layer
    if layer == "auto":
        reason = why_not_fused(model)
        layer = "stock" if reason else "fused"
        if reason:
            logger.info("kernels.layer=stock: the fused layer cannot be used: %s", reason)
    attention = _resolve_attention(config, model, loader, device)
    cache = kernels.dequant_cache
    if cache == "auto":
        cache = "none" if layer == "stock" or config.model.quantization == "none" else _cache_that_fits(model, device)
    kernels = kernels.model_copy(update={"layer": layer, "attention": attention, "dequant_cache": cache})
    return config.model_copy(update={"kernels": kernels})


def patch_options(config: RunConfig, model: nn.Module) -> dict:
    """Arguments of `kernels.patch.patched` for a resolved configuration."""
    num_layers = model.config.num_hidden_layers
    counts = {"all": num_layers, "none": 0}
    recompute, cache = config.train.gradient_checkpointing, config.kernels.dequant_cache
    return {
        "attention": config.kernels.attention,
        "recompute_layers": counts.get(recompute, recompute),
        "fused": config.kernels.layer == "fused",
        "cached_layers": counts.get(cache, cache),
    }


def _resolve_attention(config: RunConfig, model: nn.Module, loader: PackLoader, device: torch.device) -> str:
    position = loader.state()
    layout = to_device(loader.next_window()[0], device)[2]
    loader.load_state(position)
    architecture = model.config
    head_dim = getattr(architecture, "head_dim", None) or architecture.hidden_size // architecture.num_attention_heads
    try:
        name, why = choose_backend(
            config.kernels.attention,
            is_packed=layout.is_packed,
            dtype=getattr(torch, config.model.dtype),
            device=device,
            heads=(architecture.num_attention_heads, architecture.num_key_value_heads, head_dim),
            layout=layout,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None
    logger.info("kernels.attention=%s: %s", name, why)
    return name


def _cache_that_fits(model: nn.Module, device: torch.device) -> int | str:
    return "none" if device.type != "cuda" else "all"
