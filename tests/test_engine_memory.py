"""What `auto` settings are chosen by where there is no GPU: its measurements are stood in for."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from small_job import small_config

from packloop.bench.steps import Job
from packloop.bench.synthetic import random_model, shape_config
from packloop.data.loader import build_data
from packloop.engine import memory, plan
from packloop.engine.budget import GIB, is_out_of_memory
from packloop.engine.model import load_tokenizer
from packloop.engine.planner.policy import LayerCosts, MemoryPlan, Price
from packloop.errors import OutOfMemoryError
from packloop.kernels.operations import AUTO

MICRO = (torch.zeros(1, 8, dtype=torch.long),)
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
        return LayerCosts(recomputation=Price(2.0, GIB), cache=Price(1.0, GIB), inputs=Price(0.5, GIB))

    monkeypatch.setattr(memory, "settle_on_gpu", lambda *_arguments: (80.0, None))
    monkeypatch.setattr(memory, "_peak_bytes", lambda *_arguments: GIB)
    monkeypatch.setattr(memory, "_measure", measure)
    before = torch.get_rng_state()
    found, _ = memory.plan_memory(model, MICRO, attention="sdpa", fixed={}, budget_gib=None, paged_bytes=0)
    assert found == MemoryPlan(recompute_layers=0, cached_layers=layers, keep_inputs_layers=layers)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture
def passes_raise(monkeypatch):
    """Makes forward and backward passes raise this, on what the code takes to be a GPU."""

    def make(error: BaseException) -> None:
        @contextmanager
        def patched(*_arguments, **_options):
            raise error
            yield

        monkeypatch.setattr(memory, "patched", patched)
        monkeypatch.setattr(memory, "settle_on_gpu", lambda *_arguments: (80.0, None))
        monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: None)
        for name in ("empty_cache", "reset_peak_memory_stats", "set_rng_state", "synchronize"):
            monkeypatch.setattr(torch.cuda, name, lambda *_arguments: None)

    return make


@pytest.mark.parametrize("error", OF_MEMORY, ids=lambda error: str(error)[:30])
def test_a_plan_without_memory_does_not_fit_whoever_wanted_it(model, passes_raise, error):
    passes_raise(error)
    model.train()
    assert memory._peak_bytes(model, MICRO, MemoryPlan(0, 0, 0), "sdpa", AUTO) is None
    assert model.training
    with pytest.raises(OutOfMemoryError, match="out of memory with every layer recomputed"):
        memory.plan_memory(model, MICRO, attention="sdpa", fixed={}, budget_gib=None, paged_bytes=0)


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: an illegal memory access"), ValueError("out of memory")])
def test_any_other_error_of_a_trial_is_its_own(model, passes_raise, error):
    passes_raise(error)
    model.eval()
    with pytest.raises(type(error)) as caught:
        memory._peak_bytes(model, MICRO, MemoryPlan(0, 0, 0), "sdpa", AUTO)
    assert caught.value is error
    assert not model.training


def test_what_is_of_memory_is_told_by_its_text():
    assert all(is_out_of_memory(error) for error in OF_MEMORY)
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))
