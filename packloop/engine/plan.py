"""What every `auto` becomes, decided once, before the first step, and written into the resolved configuration."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import asdict, fields

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn

from packloop.config import RunConfig
from packloop.data.layout import as_packed, most_shared_slots, share_prefixes, without_padding
from packloop.data.loader import Batch, PackLoader
from packloop.data.prefix import CommonPrefix
from packloop.engine.batch import to_device
from packloop.engine.budget import check_budget
from packloop.engine.memory import enforce_budget, plan_memory
from packloop.engine.planner.policy import MemoryPlan, count_layers
from packloop.engine.planner.shape import heads_of
from packloop.errors import ConfigError
from packloop.kernels.attention import (
    FLAT,
    SHARING,
    DocumentLayout,
    choose_backend,
    load_backend,
    prepare_layout,
    usable_backends,
)
from packloop.kernels.operations import Operations, choose_operations
from packloop.kernels.patch import why_not_fused, why_not_interleaved

logger = logging.getLogger(__name__)

# Of a longer run not all packs are looked through, which would take about a second: memory is planned for with padding.
_MOST_PACKS = 50_000
# What an epoch takes beside its packs, as a number of them.
_EPOCH_PACKS = 64
# Of few packs more epochs are looked through than a run has: benchmarks go on for as many steps as they are told.
_LEAST_PACKS = 1024
# Share of the slots for whose sake `auto` takes an attention that is not the fastest.
_WORTH_ANOTHER = 0.05


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


def arrangement(config: RunConfig) -> Callable[[Batch], Batch]:
    """How a configuration lays out the documents of a micro-batch; what is still `auto` changes nothing."""
    if config.kernels.prefix_reuse == "micro_batch":
        return share_prefixes
    return without_padding if config.kernels.padding == "drop" else as_packed


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
    kernels, micro = config.kernels, _first_micro(loader)
    is_asked = kernels.prefix_reuse == "micro_batch" or kernels.padding == "drop"
    drops = may_drop_padding(config, on_gpu=device.type == "cuda")
    shares = drops and kernels.prefix_reuse != "none" and config.data.packing != "wrapped"
    dropped, shared = without_padding(micro), share_prefixes(micro)
    dtype, head_dim = getattr(torch, config.model.dtype), heads_of(model.config)[2]
    reasons = usable_backends(is_packed=True, dtype=dtype, device=device, head_dim=head_dim)
    usable = [name for name, reason in reasons.items() if reason is None and kernels.attention in ("auto", name)]
    shares = shares and any(name in SHARING for name in usable)
    if drops and not is_asked:
        # Where little is left out of rows of one document each, they may suit a faster attention.
        leaves_out = config.data.packing == "bfd" or _saves(shared if shares else dropped, micro)
        drops = leaves_out and any(name in FLAT for name in usable)
    among = FLAT if drops else None
    # Attention is the smaller part of a step: who leaves out slots need not be the fastest.
    if drops and shares and (kernels.prefix_reuse == "micro_batch" or _saves(shared, dropped)):
        among = SHARING
    attention = _resolve_attention(config, model, dropped if drops else micro, device, among)
    shares = drops and shares and attention in SHARING
    if kernels.prefix_reuse == "micro_batch" and not shares:
        raise ConfigError(knows_no_beginnings(attention, reasons))
    if is_asked and attention not in FLAT:
        raise ConfigError(needs_rows(attention, reasons))
    drops = drops and attention in FLAT
    return {
        "attention": attention,
        "padding": "drop" if drops else "keep",
        "prefix_reuse": "micro_batch" if shares else "none",
    }


def may_drop_padding(config: RunConfig, *, on_gpu: bool) -> bool:
    """Whether padding is left out if the attention that is taken allows it."""
    if config.kernels.prefix_reuse == "micro_batch" or config.kernels.padding == "drop":
        return True
    return config.kernels.padding == "auto" and on_gpu and config.data.packing != "wrapped"


def _saves(arranged: Batch, batch: Batch) -> bool:
    """Whether an arrangement of the same documents leaves out slots worth another attention."""
    return arranged.num_slots <= (1 - _WORTH_ANOTHER) * batch.num_slots


def _resolve_attention(
    config: RunConfig, model: nn.Module, micro: Batch, device: torch.device, among: tuple[str, ...] | None
) -> str:
    layout = to_device(micro, device)[2]
    try:
        name, why = choose_backend(
            config.kernels.attention,
            # The first micro-batch of bfd may happen to have a document a row.
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


def needs_rows(attention: str, reasons: dict[str, str | None]) -> str:
    """Why padding cannot be dropped under this backend, and what to change. reasons: as of `usable_backends`."""
    return _needs_another(
        f"kernels.padding=drop: kernels.attention={attention} needs packs in rows of their own",
        FLAT,
        reasons,
        "kernels.padding=keep",
    )


def knows_no_beginnings(attention: str, reasons: dict[str, str | None]) -> str:
    """Why beginnings cannot be shared under this backend, and what to change. reasons: as of `usable_backends`."""
    fault = f"kernels.prefix_reuse=micro_batch: kernels.attention={attention} knows no beginnings that documents share"
    return _needs_another(fault, SHARING, reasons, "kernels.prefix_reuse=none")


def _needs_another(fault: str, names: tuple[str, ...], reasons: dict[str, str | None], otherwise: str) -> str:
    """The fault, and which of the named backends to use or, where none of them can run, why."""
    if able := [name for name in names if reasons.get(name) is None]:
        return f"{fault}; use {'one of ' if len(able) > 1 else ''}{', '.join(able)}, or {otherwise}"
    listed: dict[str, list[str]] = {}
    for name in names:
        listed.setdefault(reasons[name], []).append(name)
    why = "; ".join(f"{', '.join(alike)}: {reason}" for reason, alike in listed.items())
    return f"{fault}, and no other can run here ({why}); use {otherwise}"


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


def largest_micro(config: RunConfig, loader: PackLoader) -> Batch:
    """A micro-batch that has as many slots as any of the run may have, laid out as a settled configuration has it."""
    micro = _first_micro(loader)
    if config.kernels.prefix_reuse != "micro_batch":
        return micro
    num_epochs = epochs_looked_through(config, loader.num_packs, loader.steps_per_epoch)
    if num_epochs is None:
        return micro
    epochs = map(loader.micro_batches, range(num_epochs))
    return share_prefixes(micro, least_slots=most_shared_slots(CommonPrefix.of(loader.documents), epochs))


def epochs_looked_through(config: RunConfig, num_packs: int, steps_per_epoch: int) -> int | None:
    """Epochs whose micro-batches say how large one that shares beginnings gets; None where they take too long."""
    steps = config.train.max_steps
    num_epochs = math.ceil(steps / steps_per_epoch if steps else config.train.num_train_epochs)
    if num_epochs * (num_packs + _EPOCH_PACKS) > _MOST_PACKS:
        return None
    return max(num_epochs, math.ceil(_LEAST_PACKS / num_packs))


def _first_micro(loader: PackLoader) -> Batch:
    position = loader.state()
    micro = loader.next_window()[0]
    loader.load_state(position)
    return micro
