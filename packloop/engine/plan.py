"""What every `auto` becomes, decided once, before the first step, and written into the resolved configuration."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, fields

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn

from packloop.config import RunConfig
from packloop.data.layout import without_padding
from packloop.data.loader import Batch, PackLoader
from packloop.engine.batch import to_device
from packloop.engine.budget import check_budget
from packloop.engine.memory import enforce_budget, plan_memory
from packloop.engine.planner.layout import choose_layout, largest_micro, typical_micro, why_not_as_asked
from packloop.engine.planner.policy import MemoryPlan, count_layers
from packloop.engine.planner.shape import heads_of
from packloop.errors import ConfigError
from packloop.kernels.attention import DocumentLayout, choose_backend, load_backend, prepare_layout, usable_backends
from packloop.kernels.operations import Operations, choose_operations
from packloop.kernels.patch import why_not_fused, why_not_interleaved

logger = logging.getLogger(__name__)

# Settings that are numbers of layers, in the order of a plan's.
_LAYERED = ("train.gradient_checkpointing", "kernels.dequant_cache", "kernels.keep_inputs")


def resolve_auto(
    config: RunConfig, model: nn.Module, loader: PackLoader, accelerator: Accelerator, *, paged_bytes: int = 0
) -> RunConfig:
    """The configuration with every `auto` replaced by what it chose, so that a resumed run makes the same choice.

    Rank 0 chooses for all. paged_bytes: optimizer state that the driver may move to the host, counted into the budget.
    train.memory_budget_gib is enforced from here on. The loader's position and torch's generators are left as they
    were. ConfigError where a requested kernel cannot run.
    """
    enforce_budget(model, config.train.memory_budget_gib, paged_bytes, accelerator.device)

    def choose() -> RunConfig:
        if warning := check_budget(config.train.memory_budget_gib, accelerator.device):
            logger.warning(warning)
        settled = _resolve_kernels(config, model, loader, accelerator.device)
        return _resolve_memory(settled, model, loader, accelerator.device, paged_bytes)

    return _chosen_for_all(choose, accelerator)


def resolve_kernels(config: RunConfig, model: nn.Module, loader: PackLoader, accelerator: Accelerator) -> RunConfig:
    """`resolve_auto` without what depends on memory: which kernels run, and how documents are laid out for them."""
    return _chosen_for_all(lambda: _resolve_kernels(config, model, loader, accelerator.device), accelerator)


def _chosen_for_all(choose: Callable[[], RunConfig], accelerator: Accelerator) -> RunConfig:
    """What rank 0 chooses, on every rank."""
    chosen, device = [None], accelerator.device
    if accelerator.is_main_process:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):  # backends are timed on random inputs
            chosen = [choose()]
    return broadcast_object_list(chosen)[0] if accelerator.num_processes > 1 else chosen[0]


def patch_options(config: RunConfig, model: nn.Module) -> dict:
    """Arguments of `kernels.patch.patched` for a resolved configuration."""
    num_layers = model.config.num_hidden_layers
    return {
        "attention": config.kernels.attention,
        "fused": config.kernels.layer == "fused",
        "recompute_layers": count_layers(config.train.gradient_checkpointing, num_layers),
        "cached_layers": count_layers(config.kernels.dequant_cache, num_layers),
        "keep_inputs_layers": count_layers(config.kernels.keep_inputs, num_layers),
        "operations": operations_of(config),
    }


def operations_of(config: RunConfig) -> Operations:
    """The settings of each operation."""
    return Operations(**{field.name: getattr(config.kernels, field.name) for field in fields(Operations)})


def layout_preparation(config: RunConfig) -> Callable[[DocumentLayout], None]:
    """What a resolved configuration's attention does with a micro-batch's layout ahead of the step."""
    backend, dtype = load_backend(config.kernels.attention), getattr(torch, config.model.dtype)
    return lambda layout: prepare_layout(backend, layout, dtype)


def finds_tokens(config: RunConfig) -> bool:
    """Whether micro-batches need their distinct tokens, as far as a configuration tells, its `auto` settled or not."""
    masks_inputs = config.lora.enabled and config.lora.dropout > 0 and _adapts_attention(config.lora.target_modules)
    return config.kernels.token_reuse != "none" and config.kernels.layer != "stock" and not masks_inputs


def _adapts_attention(target_modules: str | list[str]) -> bool:
    return target_modules == "all-linear" or bool({"q_proj", "k_proj", "v_proj"} & set(target_modules))


def _resolve_kernels(config: RunConfig, model: nn.Module, loader: PackLoader, device: torch.device) -> RunConfig:
    layer, reason = config.kernels.layer, why_not_fused(model)
    if layer == "fused" and reason:
        raise ConfigError(f"kernels.layer=fused: {reason}; use kernels.layer=stock")
    if layer == "auto":
        layer = "stock" if reason else "fused"
        if reason:
            logger.info("kernels.layer=stock: the fused layer cannot be used: %s", reason)
            for name in ("dequant_cache", "keep_inputs"):
                if (given := getattr(config.kernels, name)) not in ("auto", "none", 0):
                    raise ConfigError(
                        f"kernels.{name}={given}: only fused layers keep anything, and they cannot be used: {reason}; "
                        f"use kernels.{name}=auto"
                    )
    layout = _resolve_layout(config, model, loader, device)
    try:
        unfit = {"gated": why_not_interleaved(model) if layer == "fused" else None}
        operations = choose_operations(operations_of(config), device, fused=layer == "fused", unfit=unfit)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    kernels = config.kernels.model_copy(update={"layer": layer, **layout, **asdict(operations)})
    return config.model_copy(update={"kernels": kernels})


def _resolve_memory(
    config: RunConfig, model: nn.Module, loader: PackLoader, device: torch.device, paged_bytes: int
) -> RunConfig:
    plan = _plan(config, model, loader, device, paged_bytes)
    chosen = {
        "kernels": {"dequant_cache": plan.cached_layers, "keep_inputs": plan.keep_inputs_layers},
        "train": {"gradient_checkpointing": plan.recompute_layers},
    }
    sections = {}
    for name, values in chosen.items():
        section = getattr(config, name)
        autos = {key: value for key, value in values.items() if getattr(section, key) == "auto"}
        sections[name] = section.model_copy(update=autos)
    return config.model_copy(update=sections)


def _resolve_layout(config: RunConfig, model: nn.Module, loader: PackLoader, device: torch.device) -> dict[str, str]:
    """kernels.attention, padding and prefix_reuse: documents lie end to end where the attention that is taken can."""
    micro, named = typical_micro(config.data.packing, loader), config.kernels.attention
    dtype, head_dim = getattr(torch, config.model.dtype), heads_of(model.config)[2]
    reasons = usable_backends(is_packed=True, dtype=dtype, device=device, head_dim=head_dim)
    usable = [name for name, reason in reasons.items() if reason is None and named in ("auto", name)]
    choice = choose_layout(config, micro, usable, on_gpu=device.type == "cuda")
    timed = without_padding(micro) if choice.drops_padding else micro
    attention = _resolve_attention(config, model, timed, device, choice.among)
    if refusal := why_not_as_asked(config.kernels, attention, reasons):
        raise ConfigError(refusal)
    return {"attention": attention, **choice.under(attention)}


def _resolve_attention(
    config: RunConfig, model: nn.Module, micro: Batch, device: torch.device, among: tuple[str, ...] | None
) -> str:
    layout = to_device(micro, device)[2]
    try:
        name, why = choose_backend(
            config.kernels.attention,
            # A micro-batch of bfd may happen to have a document a row.
            is_packed=layout.is_packed or config.data.packing == "bfd",
            dtype=getattr(torch, config.model.dtype),
            device=device,
            heads=heads_of(model.config),
            layout=layout,
            among=among,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None
    logger.info("kernels.attention=%s: %s", name, why)
    return name


def _plan(
    config: RunConfig, model: nn.Module, loader: PackLoader, device: torch.device, paged_bytes: int
) -> MemoryPlan:
    """The numbers of layers as set, with each `auto` chosen for the memory there is."""
    num_layers = model.config.num_hidden_layers
    settings = {
        "recompute_layers": config.train.gradient_checkpointing,
        "cached_layers": config.kernels.dequant_cache,
        "keep_inputs_layers": config.kernels.keep_inputs,
    }
    fixed = {name: count_layers(value, num_layers) for name, value in settings.items() if value != "auto"}
    for name, value in zip(_LAYERED, settings.values(), strict=True):
        if isinstance(value, int) and value > num_layers:
            logger.warning("%s=%d: the model has %d layers, so it is all of them", name, value, num_layers)
    is_fused = config.kernels.layer == "fused"
    if not is_fused or config.model.quantization == "none":
        fixed.setdefault("cached_layers", 0)
    if not is_fused:
        fixed.setdefault("keep_inputs_layers", 0)
    if device.type != "cuda" or not is_fused:
        # A stock layer's memory is not ours to predict; a host's memory is not the scarce one.
        defaults = {
            "recompute_layers": num_layers if device.type == "cuda" else 0,
            "cached_layers": 0,
            "keep_inputs_layers": 0,
        }
        return MemoryPlan(**{**defaults, **fixed})
    plan, why = plan_memory(
        model,
        to_device(largest_micro(config, loader), device),
        config=config,
        fixed=fixed,
        paged_bytes=paged_bytes,
        operations=operations_of(config),
    )
    logger.info("memory: %s: %s", plan, why)
    return plan
