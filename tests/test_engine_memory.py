"""What `auto` settings are chosen by where there is no GPU: its measurements are stood in for."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager, nullcontext

import pytest
import torch
from small_job import small_config

from packloop.bench.steps import Job
from packloop.bench.synthetic import random_model, shape_config
from packloop.config import parse_config
from packloop.data.loader import build_data
from packloop.engine import memory, out_of_memory, plan
from packloop.engine.budget import GIB, is_out_of_memory
from packloop.engine.memory import Passes
from packloop.engine.model import load_tokenizer
from packloop.engine.planner.policy import LayerCosts, MemoryPlan, Price
from packloop.errors import OutOfMemoryError
from packloop.kernels.operations import AUTO

MICRO = (torch.zeros(1, 8, dtype=torch.long),)
SETTLED = parse_config({"kernels": {"layer": "fused", "attention": "sdpa", "gated": "none"}})
COSTS = LayerCosts(recomputation=Price(2.0, GIB), cache=Price(1.0, GIB), inputs=Price(0.5, GIB))
FIELDS = ("recompute_layers", "cached_layers", "keep_inputs_layers")
OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory"),
]


@pytest.fixture
def model():
    return random_model(shape_config("tiny"), quantization="none", device=torch.device("cpu"))


def test_choosing_leaves_the_generators_as_they_were(small_base, small_rows, tmp_path, monkeypatch):
    """Backends are timed on random inputs."""
    config = small_config(small_base, small_rows, tmp_path / "run")
    tokenizer = load_tokenizer(config.model)
    base = random_model(shape_config("tiny"), quantization="none", device=torch.device("cpu"))
    job = Job(config, base, build_data(config.data, tokenizer, seed=0), tokenizer.pad_token_id)
    drawn = []

    def choose_backend(*_requested, **_of_the_run):
        drawn.append(torch.rand(3))
        return "eager", "fastest"

    monkeypatch.setattr(plan, "choose_backend", choose_backend)
    before = torch.get_rng_state()
    job.resolve()
    assert job.config.kernels.attention == "eager"
    assert len(drawn) == 1
    assert torch.equal(torch.get_rng_state(), before)
    job.close()


def test_a_plan_leaves_the_generators_as_they_were(model, monkeypatch):
    """A layer is measured on random inputs, with a dropout mask's seed in training."""
    layers = model.config.num_hidden_layers

    def measure(*_arguments) -> LayerCosts:
        torch.rand(3)
        return COSTS

    monkeypatch.setattr(memory, "settle_on_gpu", lambda *_arguments: (80.0, None))
    monkeypatch.setattr(memory, "_run_passes", lambda *_arguments: Passes(GIB, 0))
    monkeypatch.setattr(memory, "_measure", measure)
    before = torch.get_rng_state()
    found, _ = memory.plan_memory(model, MICRO, config=SETTLED, fixed={}, paged_bytes=0)
    assert found == MemoryPlan(recompute_layers=0, cached_layers=layers, keep_inputs_layers=layers)
    assert torch.equal(torch.get_rng_state(), before)


def test_costs_are_measured_in_training_as_dropout_is_part_of_them(model, planned, monkeypatch):
    modes = []

    def measure(llama, *_arguments) -> LayerCosts:
        modes.append({module.training for module in llama.modules()})
        return COSTS

    model.eval()
    planned({}, measure=measure)
    assert modes == [{True}]
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("fixed", [{}, {"cached_layers": 1}], ids=str)
def test_without_memory_to_measure_in_the_smallest_plan_that_ran_is_taken(planned, model, fixed):
    def measure(*_arguments) -> LayerCosts:
        raise OF_MEMORY[0]

    layers = model.config.num_hidden_layers
    found, why, tried = planned({}, fixed, measure=measure)
    assert tried == [found] == [MemoryPlan(**{**dict(zip(FIELDS, (layers, 0, 0))), **fixed})]
    assert why == "no memory is left to measure what a larger plan saves"


@pytest.fixture
def planned(model, monkeypatch):
    """`plan_memory` for given results of trials, by plan and otherwise of 1 GiB; gives (plan, why, plans tried)."""

    def run(
        results: dict[MemoryPlan, Passes | None],
        fixed: dict[str, int] | None = None,
        paged_bytes: int = 0,
        measure: Callable[..., LayerCosts] = lambda *_arguments: COSTS,
    ):
        tried = []

        def run_passes(_model, _micro, found: MemoryPlan, *_arguments) -> Passes | None:
            tried.append(found)
            return results.get(found, Passes(GIB, 0))

        monkeypatch.setattr(memory, "settle_on_gpu", lambda *_arguments: (80.0, None))
        monkeypatch.setattr(memory, "_run_passes", run_passes)
        monkeypatch.setattr(memory, "_measure", measure)
        fixed = {} if fixed is None else fixed
        found, why = memory.plan_memory(model, MICRO, config=SETTLED, fixed=fixed, paged_bytes=paged_bytes)
        return found, why, tried

    return run


@pytest.mark.parametrize(
    ("taken", "paged_bytes"),
    [
        pytest.param(Passes(GIB, 1), 0, id="a retry"),
        pytest.param(Passes(80 * GIB, 0), 1, id="over the budget"),
        pytest.param(None, 0, id="no memory"),
    ],
)
def test_a_plan_whose_passes_do_not_fit_gives_way_to_one_layer_less(planned, model, taken, paged_bytes):
    layers = model.config.num_hidden_layers
    most, less = MemoryPlan(0, layers, layers), MemoryPlan(0, layers, layers - 1)
    found, why, tried = planned({most: taken}, paged_bytes=paged_bytes)
    assert tried == [MemoryPlan(layers, 0, 0), most, less]
    assert found == less
    assert "retries" not in why


def test_a_plan_at_the_budget_fits_without_a_retry(planned, model):
    layers = model.config.num_hidden_layers
    most = MemoryPlan(0, layers, layers)
    assert planned({most: Passes(80 * GIB - 1, 0)}, paged_bytes=1)[0] == most


@pytest.mark.parametrize("fixed", [{}, {"cached_layers": 1}], ids=str)
def test_the_smallest_plan_is_taken_with_retries_and_says_so(planned, model, fixed):
    layers = model.config.num_hidden_layers
    plans = [MemoryPlan(r, c, k) for r in range(layers + 1) for c in range(layers + 1) for k in range(layers + 1)]
    found, why, tried = planned({found: Passes(GIB, 18) for found in plans}, fixed)
    assert found == tried[0] == tried[-1] == MemoryPlan(**{**dict(zip(FIELDS, (layers, 0, 0))), **fixed})
    assert "18 retries of the allocator" in why


@pytest.fixture
def faked_gpu(monkeypatch):
    """Makes the code take this host for a GPU with 80 GiB allowed and 2 GiB reserved; counts of retries to be set."""
    counts = {"num_alloc_retries": 5}
    monkeypatch.setattr(memory, "settle_on_gpu", lambda *_arguments: (80.0, None))
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda: counts)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 2 * GIB)
    for name in ("empty_cache", "reset_peak_memory_stats", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda *_arguments: None)
    return counts


@pytest.mark.parametrize("retries", [(0, 0, 0), (0, 0, 2), (1, 0, 2)])
def test_a_trial_is_three_passes_and_counts_their_own_retries(model, faked_gpu, monkeypatch, retries):
    passes = []
    weight = torch.zeros(2, requires_grad=True)

    def loss_sum(*_arguments) -> torch.Tensor:
        faked_gpu["num_alloc_retries"] += retries[len(passes)]
        passes.append(weight.sum())
        return passes[-1]

    monkeypatch.setattr(memory, "patched", lambda *_arguments, **_options: nullcontext())
    monkeypatch.setattr(memory, "packed_loss_sum", loss_sum)
    found = memory._run_passes(model, MICRO, MemoryPlan(0, 0, 0), "sdpa", AUTO)
    assert found == Passes(2 * GIB, sum(retries))
    assert weight.grad.tolist() == [3.0, 3.0]


@pytest.fixture
def passes_raise(faked_gpu, monkeypatch):
    """Makes forward and backward passes raise this, on what the code takes to be a GPU."""

    def make(error: BaseException) -> None:
        @contextmanager
        def patched(*_arguments, **_options):
            raise error
            yield

        monkeypatch.setattr(memory, "patched", patched)

    return make


@pytest.mark.parametrize("error", OF_MEMORY, ids=lambda error: str(error)[:30])
def test_a_plan_without_memory_does_not_fit_whoever_wanted_it(model, passes_raise, error):
    passes_raise(error)
    model.train()
    assert memory._run_passes(model, MICRO, MemoryPlan(0, 0, 0), "sdpa", AUTO) is None
    assert model.training
    with pytest.raises(OutOfMemoryError, match="out of memory with 2 layers recomputed, 0 with"):
        memory.plan_memory(model, MICRO, config=SETTLED, fixed={}, paged_bytes=0)


REMEDIES = {
    "recompute_layers": "train.gradient_checkpointing=all",
    "cached_layers": "kernels.dequant_cache=none",
    "keep_inputs_layers": "kernels.keep_inputs=none",
}


@pytest.mark.parametrize(
    ("fixed", "advised"),
    [
        ({}, []),
        ({"recompute_layers": 0}, ["recompute_layers"]),
        ({"recompute_layers": 2}, []),
        ({"cached_layers": 2}, ["cached_layers"]),
        ({"keep_inputs_layers": 2}, []),
        ({"recompute_layers": 1, "keep_inputs_layers": 2}, ["recompute_layers", "keep_inputs_layers"]),
        ({"recompute_layers": 0, "cached_layers": 1}, ["recompute_layers", "cached_layers"]),
        ({"cached_layers": 0, "keep_inputs_layers": 0}, []),
    ],
    ids=str,
)
def test_where_the_smallest_plan_does_not_run_what_is_set_is_told_and_what_to_set(model, monkeypatch, fixed, advised):
    monkeypatch.setattr(memory, "settle_on_gpu", lambda *_arguments: (80.0, None))
    monkeypatch.setattr(memory, "_run_passes", lambda *_arguments: None)
    assert model.config.num_hidden_layers == 2
    with pytest.raises(OutOfMemoryError) as caught:
        memory.plan_memory(model, MICRO, config=SETTLED, fixed=fixed, paged_bytes=0)
    first, *rows, told = str(caught.value).splitlines()
    smallest = MemoryPlan(**{"recompute_layers": 2, "cached_layers": 0, "keep_inputs_layers": 0, **fixed})
    assert first == f"out of memory with {smallest}; predicted:"
    parts = [row.rsplit(maxsplit=2)[0].strip() for row in rows]
    assert ("cached dequantised weights" in parts) == (smallest.cached_layers > 0)
    assert parts[0] == "base weights"
    assert parts[-3:] == ["reserved in all", "paged optimizer state", "allowed"]
    use = f"use {', or '.join(REMEDIES[field] for field in advised)}, also with --resume; " if advised else ""
    assert told.startswith(f"{use}in a new run: a lower train.per_device_train_batch_size with more")
    assert [field for field, text in REMEDIES.items() if text in told] == advised


def test_a_budget_in_the_way_is_to_be_raised(model, monkeypatch):
    monkeypatch.setattr(memory, "settle_on_gpu", lambda *_arguments: (20.0, None))
    monkeypatch.setattr(memory, "_run_passes", lambda *_arguments: None)
    monkeypatch.setattr(out_of_memory, "may_be_raised", lambda budget_gib: budget_gib == 20.0)
    config = SETTLED.model_copy(update={"train": SETTLED.train.model_copy(update={"memory_budget_gib": 20.0})})
    told = r"allowed +20\.00 GiB\nuse a higher train\.memory_budget_gib, also with --resume; in a new run"
    with pytest.raises(OutOfMemoryError, match=told):
        memory.plan_memory(model, MICRO, config=config, fixed={}, paged_bytes=0)


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: an illegal memory access"), ValueError("out of memory")])
def test_any_other_error_of_a_trial_is_its_own(model, passes_raise, error):
    passes_raise(error)
    model.eval()
    with pytest.raises(type(error)) as caught:
        memory._run_passes(model, MICRO, MemoryPlan(0, 0, 0), "sdpa", AUTO)
    assert caught.value is error
    assert not model.training


def test_what_is_of_memory_is_told_by_its_text():
    assert all(is_out_of_memory(error) for error in OF_MEMORY)
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))
