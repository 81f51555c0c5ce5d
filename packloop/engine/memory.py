"""The numbers of layers that recompute, cache weights or keep inputs, chosen on the GPU at hand within a memory budget.

What each choice saves is measured on the model; `planner.policy` chooses; three real forward and backward passes in
a row then check the choice.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import NamedTuple, TypeVar

import torch
from torch import nn

from packloop.config import RunConfig
from packloop.engine.budget import GIB, is_out_of_memory, limit_memory, settle_on_gpu
from packloop.engine.out_of_memory import held, remedies, table
from packloop.engine.planner.allocations import MicroBatch
from packloop.engine.planner.memory import MemoryModel
from packloop.engine.planner.policy import LayerCosts, MemoryPlan, Price, choose_plan, fits_bytes, smallest_plan
from packloop.engine.planner.shape import ModelShape
from packloop.errors import OutOfMemoryError
from packloop.kernels.activation_bytes import activation_bytes
from packloop.kernels.attention import load_backend
from packloop.kernels.decoder_layer import FusedLayer, decoder_layer
from packloop.kernels.operations import AUTO, Operations
from packloop.kernels.patch import FusedLayers, find_llama, packed_loss_sum, patched

T = TypeVar("T")

_MEASURED_ROUNDS = 9
_PASSES = 3


class Passes(NamedTuple):
    """What forward and backward passes in a row took: reserved memory at the peak, and retries of the allocator.

    In a retry it is at its limit, gives back what it has cached and maps it anew: that is slow, and leaves other gaps
    each time, among which a later step may not fit.
    """

    peak_bytes: int
    retries: int

    def fit(self, allowed_bytes: float) -> bool:
        return not self.retries and self.peak_bytes <= allowed_bytes


def enforce_budget(model: nn.Module, budget_gib: float | None, paged_bytes: int, device: torch.device) -> None:
    """`limit_memory` for a model whose weights and trained state are in place.

    ConfigError for a budget larger than the device, OutOfMemoryError for one that what is in place already exceeds.
    """
    allowed_bytes = limit_memory(budget_gib, paged_bytes, device)
    if allowed_bytes is None:
        return
    torch.cuda.empty_cache()
    if torch.cuda.memory_reserved(device) > allowed_bytes:
        listed = table(held(model, paged_bytes) | {"allowed": round(budget_gib * GIB)})
        raise OutOfMemoryError(
            f"train.memory_budget_gib={budget_gib:g} does not hold the model:\n{listed}\n"
            "raise it, also with --resume; in a new run: a lower lora.r, or model.quantization=nf4 where it is none"
        )


def plan_memory(
    model: nn.Module,
    micro: tuple,
    *,
    config: RunConfig,
    fixed: dict[str, int],
    paged_bytes: int,
    operations: Operations = AUTO,
) -> tuple[MemoryPlan, str]:
    """(plan, why) for a fused model on CUDA whose weights, gradients and optimizer state are in place.

    micro: one full micro-batch as `engine.batch.to_device` returns it. config: settled but for the plan's fields.
    fixed: those of them that are not free. The budget is of memory reserved and paged together, as `settle_on_gpu` has
    it; `enforce_budget` limits it.
    A plan whose passes need a retry of the allocator gives way to a smaller one; the smallest need only run, and is
    taken where it leaves no memory to measure in.
    Raises OutOfMemoryError where even that does not. Gradients are left zeroed, generators as they were.
    """
    device = micro[0].device
    attention = config.kernels.attention
    budget_bytes = settle_on_gpu(config.train.memory_budget_gib, device)[0] * GIB
    llama = find_llama(model)
    num_layers = len(llama.model.layers)
    smallest = smallest_plan(num_layers, fixed)
    if len(fixed) == 3:
        return smallest, "as set"
    least = _run_passes(model, micro, smallest, attention, operations)
    if least is None:
        raise OutOfMemoryError(_does_not_fit(smallest, llama, micro, config, budget_bytes))
    costs = _rehearse(model, device, lambda: _measure(llama, micro, attention, operations))
    if costs is None:
        _forget()
        return smallest, "no memory is left to measure what a larger plan saves"
    allowed_bytes = budget_bytes - paged_bytes
    spare_bytes = allowed_bytes - least.peak_bytes
    plan = choose_plan(costs, num_layers, fixed, fits_bytes(costs, num_layers, fixed, spare_bytes)) or smallest
    while (taken := _run_passes(model, micro, plan, attention, operations)) is None or not taken.fit(allowed_bytes):
        smaller = _one_less(plan, fixed, num_layers)
        if smaller == plan:
            break
        plan = smaller
    _forget()
    taken = taken or least
    why = f"a layer's {costs}; peak {taken.peak_bytes / GIB:.1f} GiB of {budget_bytes / GIB:.1f} allowed"
    if taken.retries:
        why += f"; {taken.retries} retries of the allocator: slow, and a later step may not fit"
    return plan, why


def _measure(llama: nn.Module, micro: tuple, attention: str, operations: Operations) -> LayerCosts:
    """What not recomputing, caching and keeping inputs save, of one layer in the middle of the model."""
    _, position_ids_BL, layout, *_ = micro
    keeps = ["products"] * len(llama.model.layers)
    fused = FusedLayers(llama.model, load_backend(attention), keeps, 0, operations)
    layer = fused.layers[len(fused.layers) // 2]
    batch = replace(fused.batch(llama.model, position_ids_BL, layout), distinct=None)  # the inputs here are no tokens'
    num_slots, num_features = position_ids_BL.numel(), llama.config.hidden_size
    weight = llama.model.norm.weight
    hidden_TH = torch.randn(num_slots, num_features, dtype=weight.dtype, device=weight.device)

    def milliseconds(candidate: FusedLayer) -> float:
        residual = hidden_TH.clone().requires_grad_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        x2, out = decoder_layer(residual, hidden_TH, candidate, batch)
        torch.autograd.backward((x2, out), (hidden_TH, hidden_TH))
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    cached = fused.layers[len(fused.layers) // 2 - 1]
    for weights in cached.weights.values():
        weights.keep()
    candidates = {keeps: replace(layer, keeps=keeps) for keeps in ("input", "products", "all")} | {"cached": cached}
    # Round after round, so that a change of the GPU's clock falls on all of them.
    laps = {name: [] for name in candidates}
    for number in range(_MEASURED_ROUNDS + 2):
        for name, candidate in candidates.items():
            lap_ms = milliseconds(candidate)
            if number >= 2:
                laps[name].append(lap_ms)
    times = {name: statistics.median(values) for name, values in laps.items()}
    sizes = activation_bytes(layer, num_slots)
    cache_bytes = sum(weights.dense_bytes for weights in layer.weights.values())
    return LayerCosts(
        recomputation=Price(times["input"] - times["products"], sizes["products"]),
        cache=Price(times["products"] - times["cached"], cache_bytes),
        inputs=Price(times["products"] - times["all"], sizes["inputs"]),
    )


def _one_less(plan: MemoryPlan, fixed: dict[str, int], num_layers: int) -> MemoryPlan:
    """The plan with one layer less of what saves the least, or the same plan where nothing is left to give up."""
    if plan.keep_inputs_layers and "keep_inputs_layers" not in fixed:
        return replace(plan, keep_inputs_layers=plan.keep_inputs_layers - 1)
    if plan.cached_layers and "cached_layers" not in fixed:
        return replace(plan, cached_layers=plan.cached_layers - 1)
    if plan.recompute_layers < num_layers and "recompute_layers" not in fixed:
        return replace(plan, recompute_layers=plan.recompute_layers + 1)
    return plan


def _run_passes(
    model: nn.Module, micro: tuple, plan: MemoryPlan, attention: str, operations: Operations
) -> Passes | None:
    """What three forward and backward passes in a row take; None where memory ends.

    All but the first find memory as another has left it, in pieces, like every micro-batch of a run but the first.
    """

    def passes() -> Passes:
        with patched(model, attention=attention, fused=True, operations=operations, **asdict(plan)) as llama:
            for _ in range(_PASSES):
                packed_loss_sum(llama, *micro).backward()
        torch.cuda.synchronize()
        return Passes(torch.cuda.max_memory_reserved(), _retries() - retries_before)

    _forget()
    torch.cuda.reset_peak_memory_stats()
    retries_before = _retries()
    return _rehearse(model, micro[0].device, passes)


def _rehearse(model: nn.Module, device: torch.device, work: Callable[[], T]) -> T | None:
    """What `work` returns, the model in training as it will be; None where memory ends.

    Modules and generators are left as they were, and gradients zeroed.
    """
    modes = [(module, module.training) for module in model.modules()]  # a PEFT model's need not be its base's
    model.train()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            return work()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return None
    finally:
        for module, was_training in modes:
            module.training = was_training
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()


def _retries() -> int:
    return torch.cuda.memory_stats()["num_alloc_retries"]


def _forget() -> None:
    """Gives back what torch keeps reserved, so that whatever comes next finds none of it in pieces."""
    gc.collect()
    torch.cuda.empty_cache()


def _does_not_fit(plan: MemoryPlan, llama: nn.Module, micro: tuple, config: RunConfig, budget_bytes: float) -> str:
    """For the error: the smallest plan there is, where its memory goes as predicted, and what to change."""
    shape, slots = ModelShape.of_run(llama.config, config), MicroBatch(micro[0].numel(), config.kernels.attention)
    is_paged = config.train.optim == "paged_adamw_32bit"
    device = micro[0].device
    of_gpu = {"capability": torch.cuda.get_device_capability(device)} if device.type == "cuda" else {}
    forecast = MemoryModel(shape, slots, is_paged=is_paged, **of_gpu).forecast(plan)
    rows = forecast.parts_gib | {"reserved in all": forecast.reserved_gib}
    if is_paged:
        rows["paged optimizer state"] = forecast.managed_gib
    listed = table({name: round(gib * GIB) for name, gib in rows.items()} | {"allowed": round(budget_bytes)})
    layers = {"dequant_cache": plan.cached_layers, "keep_inputs": plan.keep_inputs_layers}
    tried = config.model_copy(
        update={
            "train": config.train.model_copy(update={"gradient_checkpointing": plan.recompute_layers}),
            "kernels": config.kernels.model_copy(update=layers),
        }
    )
    return f"out of memory with {plan}; predicted:\n{listed}\n{remedies(tried, len(llama.model.layers))}"
