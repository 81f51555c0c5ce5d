"""Which layers recompute, cache weights or keep their products' inputs, for the most speed within a memory budget.

Each choice trades memory for time at its own rate, which is measured on the model at hand: milliseconds saved a GiB.
The best rates are bought first, until the budget is spent; one real forward and backward pass then checks the
purchase.
"""

from __future__ import annotations

import gc
import statistics
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn

from packloop.errors import OutOfMemoryError
from packloop.kernels.decoder_layer import FusedLayer, activation_bytes, decoder_layer
from packloop.kernels.patch import FusedLayers, find_llama, load_backend, packed_loss_sum, patched

# Left to the driver, the CUDA context and what other libraries allocate, where no budget is given.
MARGIN_GIB = 2.0
_MEASURED_ROUNDS = 9


@dataclass(frozen=True)
class MemoryPlan:
    """Numbers of layers: recomputed (the first), cached (the first), with their products' inputs kept (the last)."""

    recompute_layers: int
    cached_layers: int
    keep_inputs_layers: int

    def __str__(self) -> str:
        return (
            f"{self.recompute_layers} layers recomputed, {self.cached_layers} with dequantised weights cached, "
            f"{self.keep_inputs_layers} with inputs kept"
        )


def plan_memory(
    model: nn.Module,
    micro: tuple,
    *,
    attention: str,
    fixed: dict[str, int],
    budget_gib: float | None,
    paged_bytes: int,
) -> tuple[MemoryPlan, str]:
    """(plan, why) for a fused model on CUDA whose weights, gradients and optimizer state are in place.

    micro: one full micro-batch as `engine.batch.to_device` returns it. fixed: fields of the plan that are not free.
    budget_gib: reserved memory allowed, default the device less a margin; it is enforced from here on. Raises
    OutOfMemoryError where even the smallest plan does not fit. Gradients are left zeroed, generators as they were.
    """
    device = micro[0].device
    total_bytes = torch.cuda.get_device_properties(device).total_memory
    budget_bytes = (budget_gib or total_bytes / 2**30 - MARGIN_GIB) * 2**30
    if budget_gib:
        torch.cuda.set_per_process_memory_fraction(min(1.0, budget_bytes / total_bytes), device)
    llama = find_llama(model)
    num_layers = len(llama.model.layers)
    smallest = MemoryPlan(**{"recompute_layers": num_layers, "cached_layers": 0, "keep_inputs_layers": 0, **fixed})
    if len(fixed) == 3:
        return smallest, "as set"
    used_bytes = _peak_bytes(model, micro, attention, smallest)
    if used_bytes is None:
        raise OutOfMemoryError(_table(model, micro, budget_bytes, paged_bytes))
    spare_bytes = budget_bytes - paged_bytes - used_bytes
    rates = _measure(llama, micro, attention)
    plan = _spend(smallest, fixed, rates, spare_bytes, num_layers)
    while (peak := _peak_bytes(model, micro, attention, plan)) is None or peak + paged_bytes > budget_bytes:
        smaller = _one_less(plan, fixed, num_layers)
        if smaller == plan:
            break
        plan = smaller
    described = ", ".join(f"{name} {rate.ms:.2f} ms for {rate.bytes / 2**30:.2f} GiB" for name, rate in rates.items())
    return plan, (
        f"a layer's {described}; peak {(peak or used_bytes) / 2**30:.1f} GiB of {budget_bytes / 2**30:.1f} allowed"
    )


@dataclass(frozen=True)
class _Rate:
    """What one layer saves, and its price."""

    ms: float
    bytes: int


def _measure(llama: nn.Module, micro: tuple, attention: str) -> dict[str, _Rate]:
    """The rates of not recomputing, caching and keeping inputs, of one layer in the middle of the model."""
    _, position_ids_BL, layout, *_ = micro
    fused = FusedLayers(llama.model, load_backend(attention), ["products"] * len(llama.model.layers), 0)
    layer = fused.layers[len(fused.layers) // 2]
    batch = fused.batch(llama.model, position_ids_BL, layout)
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
    for master in (*layer.masters, *cached.masters):
        master.grad.zero_()
    return {
        "recomputation": _Rate(times["input"] - times["products"], sizes["products"]),
        "cache": _Rate(times["products"] - times["cached"], cache_bytes),
        "inputs": _Rate(times["products"] - times["all"], sizes["inputs"]),
    }


def _spend(
    plan: MemoryPlan, fixed: dict[str, int], rates: dict[str, _Rate], spare_bytes: float, num_layers: int
) -> MemoryPlan:
    """Buys layers of each kind, best milliseconds a byte first."""
    fields = {"recomputation": "recompute_layers", "cache": "cached_layers", "inputs": "keep_inputs_layers"}
    for name in sorted(rates, key=lambda name: -rates[name].ms / max(rates[name].bytes, 1)):
        rate, field = rates[name], fields[name]
        if field in fixed or rate.ms <= 0 or rate.bytes == 0:
            continue
        most = num_layers - plan.recompute_layers if name == "inputs" else num_layers
        bought = max(0, min(most, int(spare_bytes // rate.bytes)))
        spare_bytes -= bought * rate.bytes
        plan = replace(plan, **{field: num_layers - bought if name == "recomputation" else bought})
    return plan


def _one_less(plan: MemoryPlan, fixed: dict[str, int], num_layers: int) -> MemoryPlan:
    """The plan with one layer less of what saves the least, or the same plan where nothing is left to give up."""
    if plan.keep_inputs_layers and "keep_inputs_layers" not in fixed:
        return replace(plan, keep_inputs_layers=plan.keep_inputs_layers - 1)
    if plan.cached_layers and "cached_layers" not in fixed:
        return replace(plan, cached_layers=plan.cached_layers - 1)
    if plan.recompute_layers < num_layers and "recompute_layers" not in fixed:
        return replace(plan, recompute_layers=plan.recompute_layers + 1)
    return plan


def _peak_bytes(model: nn.Module, micro: tuple, attention: str, plan: MemoryPlan) -> int | None:
    """Reserved memory at the peak of one forward and backward pass; None where it does not fit."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    states = torch.get_rng_state(), torch.cuda.get_rng_state()
    was_training = model.training
    model.train()
    try:
        with patched(model, attention=attention, fused=True, **asdict(plan)) as llama:
            packed_loss_sum(llama, *micro).backward()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_reserved()
    except torch.OutOfMemoryError:
        return None
    finally:
        model.train(was_training)
        torch.set_rng_state(states[0])
        torch.cuda.set_rng_state(states[1])
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()


def _table(model: nn.Module, micro: tuple, budget_bytes: float, paged_bytes: int) -> str:
    """Where the memory goes, for the error: weights, trained state, one layer, the head; and what to change."""
    llama = find_llama(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    frozen_bytes = sum(_bytes(p) for p in model.parameters() if not p.requires_grad)
    num_slots = micro[0].numel()
    rows = {
        "frozen weights": frozen_bytes,
        "adapter, its gradient": 2 * sum(_bytes(p) for p in trained),
        "optimizer state": paged_bytes or 2 * sum(_bytes(p) for p in trained),
        f"inputs of {len(llama.model.layers)} layers, {num_slots:,} slots": len(llama.model.layers)
        * num_slots
        * llama.config.hidden_size
        * llama.model.norm.weight.element_size(),
        "allowed": int(budget_bytes),
    }
    listed = "\n".join(f"  {name:<44}{size / 2**30:>8.2f} GiB" for name, size in rows.items())
    return (
        f"out of memory with every layer recomputed:\n{listed}\n"
        "lower train.per_device_train_batch_size (and raise gradient_accumulation_steps), data.max_length or lora.r, "
        "or raise train.memory_budget_gib"
    )


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
