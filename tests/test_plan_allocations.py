"""The planner's list of allocations against those of the real code, run on the CPU without its kernels' arithmetic."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from transformers import LlamaConfig
from triton.runtime.jit import JITFunction

from packloop.bench.synthetic import random_model
from packloop.config import LoraConfig, ModelConfig
from packloop.engine.model import attach_adapter
from packloop.engine.optim import FlatParameters
from packloop.engine.planner.allocations import MicroBatch, Step
from packloop.engine.planner.policy import MemoryPlan
from packloop.engine.planner.shape import ModelShape
from packloop.kernels import document_attention, gated, linear_cross_entropy, lora_linear, patch, reference
from packloop.kernels.attention import DocumentLayout
from packloop.kernels.document_attention import BackwardTiles, Tiles
from packloop.kernels.operations import Operations

ARCHITECTURE = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
SLOTS = 4096


class WithoutProducts(TorchDispatchMode):
    """Products that allocate their result and compute nothing: processors without bf16 take half a minute a case."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.mm.default:
            return args[0].new_empty(args[0].shape[0], args[1].shape[1])
        if func is torch.ops.aten.mm.out:
            return kwargs["out"]
        if func in (torch.ops.aten.addmm_.default, torch.ops.aten.baddbmm_.default):
            return args[0]
        return func(*args, **(kwargs or {}))


@pytest.fixture
def without_arithmetic(monkeypatch):
    """Host code as on a GPU, with launches that do nothing: what is allocated when does not depend on values."""
    tiles = Tiles(owned=64, streamed=32, num_warps=4, num_stages=2)
    monkeypatch.setattr(reference, "serves", lambda tensor, by="auto": False)
    monkeypatch.setattr(JITFunction, "run", lambda self, *args, **kwargs: None)
    monkeypatch.setattr(
        document_attention, "_default_tiles", lambda *_: (tiles, BackwardTiles(queries=tiles, keys=tiles))
    )

    # On a GPU one product that sums in fp32 where it is asked to.
    def wide_product(left, right, total=None):
        return torch.empty(left.shape[0], right.shape[1]) if total is None else total

    monkeypatch.setattr(lora_linear, "_wide_product", wide_product)
    for name in ("gated_forward", "gated_backward"):
        monkeypatch.setattr(gated, name, lambda *_args, **_kwargs: None)


def real_peak(
    lora: LoraConfig,
    plan: MemoryPlan,
    operations: Operations,
    *,
    num_labels: int = SLOTS,
    prefix_tokens: int = 0,
    **sizes: int,
) -> tuple[int, ModelShape]:
    """Bytes that one forward and backward pass has allocated at its peak, by torch's own records.

    prefix_tokens: of the first document, with which the others then begin. sizes: of the architecture.
    """
    torch.manual_seed(0)
    architecture = LlamaConfig(**{**ARCHITECTURE, "vocab_size": 1024, **sizes})
    base = random_model(architecture, quantization="nf4", device=torch.device("cpu"))
    model = attach_adapter(base, lora, base_name="base").train()
    FlatParameters(model)
    bounds = torch.arange(0, SLOTS + 1, 256, dtype=torch.int32)
    ids, prefix_of = torch.zeros(2, SLOTS // 2, dtype=torch.int32), None
    if prefix_tokens:
        bounds[1] = prefix_tokens
        prefix_of = torch.tensor([-1] + [0] * (len(bounds) - 2), dtype=torch.int32)
    layout = DocumentLayout(ids, bounds, 512, is_packed=True, cu_seqlens_cpu=bounds, prefix_of=prefix_of)
    ids, positions = torch.zeros(2, SLOTS // 2, dtype=torch.int64), torch.arange(SLOTS // 2).repeat(2, 1)
    index = torch.arange(num_labels)
    patching = patch.patched(model, attention="document", fused=True, operations=operations, **asdict(plan))
    with WithoutProducts(), patching as llama:
        for _ in range(2):  # the first makes what stays
            with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as made:
                patch.packed_loss_sum(llama, ids, positions, layout, index, torch.zeros_like(index)).backward()
    records = [event for event in made.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = peak = 0
    for record in sorted(records, key=lambda record: record.start_ns()):
        alive += record.nbytes()
        peak = max(peak, alive)
    return peak, ModelShape.of(architecture, ModelConfig(), lora)


PLANS = {
    "nothing kept": MemoryPlan(4, 0, 0),
    "all recomputed, cached": MemoryPlan(4, 4, 0),
    "products": MemoryPlan(0, 0, 0),
    "cached": MemoryPlan(0, 4, 0),
    "inputs": MemoryPlan(0, 0, 4),
    "mixed": MemoryPlan(2, 1, 1),
}


CASES = {name: (plan, "none") for name, plan in PLANS.items()}
CASES |= {f"gated, {name}": (plan, "torch") for name, plan in PLANS.items()}


@pytest.mark.parametrize(("plan", "by"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"], ids=["q,v", "all-linear"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_predicted_peak_is_the_real_codes(without_arithmetic, plan, targets, dropout, by):
    lora = LoraConfig(r=16, dropout=dropout, target_modules=targets)
    real, shape = real_peak(lora, plan, Operations(gated=by))
    shape = replace(shape, gated=by != "none")
    predicted = Step(shape, MicroBatch(slots=SLOTS, attention="document")).peak_bytes(plan)
    assert predicted == pytest.approx(real, rel=0.01)


@pytest.mark.parametrize("num_tokens", [230, 500])
def test_parts_of_a_shared_beginnings_gradient_are_planned_for(without_arithmetic, num_tokens):
    plan, lora = MemoryPlan(4, 4, 0), LoraConfig(r=16, target_modules=["q_proj", "v_proj"])
    # So many heads of keys beside products so narrow that attention's backward pass is the peak.
    sizes = {"intermediate_size": 64, "vocab_size": 64, "num_attention_heads": 16, "num_key_value_heads": 16}
    real, shape = real_peak(lora, plan, Operations(gated="none"), prefix_tokens=num_tokens, **sizes)
    shared, whole = (
        Step(replace(shape, gated=False), MicroBatch(SLOTS, "document", tokens)).peak_bytes(plan)
        for tokens in (num_tokens, 0)
    )
    assert shared == pytest.approx(real, rel=0.01)
    assert shared > 1.02 * whole, "not seen at the peak"


@pytest.mark.parametrize("num_labels", [0, 1000, 3500, SLOTS])
def test_predicted_peak_of_a_head_in_chunks_is_the_real_codes_for_any_number_of_labels(
    without_arithmetic, monkeypatch, num_labels
):
    vocabulary, plan, lora = 16384, MemoryPlan(4, 0, 0), LoraConfig(r=16, target_modules=["q_proj", "v_proj"])
    monkeypatch.setattr(linear_cross_entropy, "CHUNK_BYTES", 1024 * vocabulary * 2)
    real, shape = real_peak(lora, plan, Operations(), vocab_size=vocabulary, num_labels=num_labels)
    step = Step(shape, MicroBatch(slots=SLOTS, attention="document"))
    head, layer = (step.span(kind, "input", "input", False, True).peak for kind in ("head", "backward"))
    assert head > layer
    assert step.peak_bytes(plan) == pytest.approx(real, rel=0.002)
