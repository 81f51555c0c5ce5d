"""The limit on a GPU's memory: what torch is told, for a GPU that the tests put in its place."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from small_job import small_config

from packloop.bench.synthetic import random_model, shape_config
from packloop.engine import budget, loop
from packloop.engine.loop import train
from packloop.engine.memory import enforce_budget
from packloop.errors import ConfigError, InputError, OutOfMemoryError

GIB = 2**30
GPU = torch.device("cuda")


@pytest.fixture
def fractions(monkeypatch) -> list[tuple[float, ...]]:
    """What `set_per_process_memory_fraction` is called with, on a GPU of 80 GiB of which 10 are reserved."""
    called = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 10 * GIB)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda index: SimpleNamespace(total_memory=80 * GIB, index=index)
    )
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *arguments: called.append(arguments))
    return called


@pytest.fixture(scope="module")
def model():
    return random_model(shape_config("tiny"), quantization="none", device=torch.device("cpu"))


def test_paged_state_is_taken_off_what_torch_may_reserve(fractions):
    assert budget.limit_memory(20.0) == 20 * GIB
    assert budget.limit_memory(20.0, 4 * GIB, torch.device("cuda:1")) == 16 * GIB
    assert fractions == [(0.25, 3), (0.2, 1)]


def test_paged_state_beyond_the_budget_leaves_nothing(fractions):
    assert budget.limit_memory(2.0, 4 * GIB) == 0
    assert fractions == [(0.0, 3)]


def test_nothing_is_limited_without_a_budget_or_a_gpu(fractions, monkeypatch):
    assert budget.limit_memory(None) is None
    assert budget.limit_memory(20.0, device=torch.device("cpu")) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert budget.limit_memory(20.0) is None
    budget.lift_limit()
    assert fractions == []


def test_a_lifted_limit_is_the_whole_gpu(fractions):
    budget.limit_memory(20.0)
    budget.lift_limit()
    assert fractions[-1] == (1.0,)


def test_more_than_the_gpu_has_is_refused_in_one_line(fractions):
    refusal = (
        r"^train\.memory_budget_gib=90: this GPU has 80\.0 GiB; give at most 79\.5, or leave it out for all but 2 GiB$"
    )
    for refuse in (budget.limit_memory, lambda gib: budget.check_budget(gib, GPU)):
        with pytest.raises(ConfigError, match=refusal):
            refuse(90.0)
    assert fractions == []


def test_cudas_own_memory_is_no_one_elses(fractions):
    assert budget.limit_memory(80.0) == budget.limit_memory(79.9) == int(79.5 * GIB)
    warning = budget.check_budget(80.0, GPU)
    assert warning.startswith(
        "train.memory_budget_gib=80: of the 80.0 GiB of this GPU CUDA's own context takes about 0.5"
    )
    assert warning.endswith("79.5 GiB are the budget")
    assert budget.check_budget(79.5, GPU) is budget.check_budget(None, GPU) is None
    assert budget.check_budget(900.0, torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("asked_gib", "settled_gib", "warns"),
    [(None, 20.0, False), (10.0, 10.0, False), (21.5, 21.5, False), (21.6, 21.5, True), (22.0, 21.5, True)],
)
def test_a_budget_is_settled_alike_for_a_gpu_that_is_not_there(asked_gib, settled_gib, warns):
    found_gib, warning = budget.settle_budget(asked_gib, 22.0, setting="--budget", gpu="the a10g")
    assert found_gib == settled_gib
    assert (warning is not None) == warns


def test_what_a_message_names_is_accepted():
    """Rounded down, so that giving it back brings no further line."""
    with pytest.raises(ConfigError, match=r"give at most 139\.2,"):
        budget.settle_budget(150.0, 139.79, setting="--budget 150", gpu="the h200")
    assert budget.settle_budget(139.2, 139.79, setting="--budget 139.2") == (139.2, None)


def test_a_model_that_is_in_place_already_must_fit(fractions, model):
    enforce_budget(model, 12.0, GIB, GPU)
    assert fractions == [(11 / 80, 3)]
    with pytest.raises(OutOfMemoryError, match=r"memory_budget_gib=12 does not hold the model:\n.*frozen weights"):
        enforce_budget(model, 12.0, 3 * GIB, GPU)
    enforce_budget(model, None, 3 * GIB, GPU)
    enforce_budget(model, 0.1, 0, torch.device("cpu"))


def test_a_runs_limit_ends_with_the_run(small_base, small_rows, tmp_path, monkeypatch):
    """For another run in the same process, whose budget is all of the GPU. On a GPU: tests/gpu/test_gpu_memory.py."""
    lifted = []
    monkeypatch.setattr(loop, "lift_limit", lambda: lifted.append(True))
    train(small_config(small_base, small_rows, tmp_path / "free", train={"max_steps": 1}))
    assert lifted == []
    limited = small_config(small_base, small_rows, tmp_path / "run", train={"max_steps": 1, "memory_budget_gib": 5.0})
    train(limited)
    assert lifted == [True]
    with pytest.raises(InputError, match="is not empty"):
        train(limited)
    assert lifted == [True] * 2
