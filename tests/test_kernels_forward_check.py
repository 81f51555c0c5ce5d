"""The check before training that the replaced forward is the one that runs: it passes, leaves no trace, and fires."""

from __future__ import annotations

import dataclasses
import random
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from small_job import read_steps, small_config
from test_kernels_patch import make_llama, with_adapter

from packloop.engine import loop
from packloop.engine.optim import FlatParameters
from packloop.errors import InputError
from packloop.kernels.attention import load_backend
from packloop.kernels.forward_check import check_forward
from packloop.kernels.llama_rope import rope_tables
from packloop.kernels.patch import find_llama, patched


@pytest.fixture(params=["stock", "fused"])
def fused(request) -> bool:
    return request.param == "fused"


def put_back(module) -> None:
    """The stock forward, as something that undoes the patch would leave it; gone when the patch is left."""
    module.forward = type(module).forward.__get__(module)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_it_passes_and_leaves_no_trace(attention: str, fused: bool):
    model = with_adapter(make_llama())
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
    model.train()
    flat = FlatParameters(model)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    with patched(model, attention=attention, fused=fused, recompute_layers=1) as llama:
        for _ in range(2):
            check_forward(llama, attention)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])
    assert not flat.gradient.any()
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_it_fires_where_a_layers_forward_was_put_back():
    with patched(make_llama(), attention="sdpa") as llama:
        put_back(llama.model.layers[1].self_attn)
        message = (
            r"kernels\.attention=sdpa is not what runs: .* layer 1 called it 0 times and another attention 1 times"
        )
        with pytest.raises(ValueError, match=message):
            check_forward(llama, "sdpa")


def test_it_fires_where_the_models_forward_was_put_back(fused: bool):
    with patched(make_llama(), attention="sdpa", fused=fused) as llama:
        put_back(llama.model)
        with pytest.raises(ValueError, match=r"LlamaModel\.forward is the stock one"):
            check_forward(llama, "sdpa")


def test_it_fires_where_another_attention_runs_than_was_asked_for(fused: bool):
    with (
        patched(make_llama(), attention="eager", fused=fused) as llama,
        pytest.raises(ValueError, match="layer 0 called it 0 times and another attention"),
    ):
        check_forward(llama, "sdpa")


def test_it_fires_where_one_fused_layer_attends_by_something_else():
    with patched(make_llama(), attention="sdpa", fused=True) as llama:
        layers = llama.model.forward.run_layers.layers
        layers[1] = dataclasses.replace(layers[1], attention=load_backend("sdpa"))
        with pytest.raises(ValueError, match="layer 1 called it 0 times and another attention 0 times"):
            check_forward(llama, "sdpa")


def test_it_fires_where_a_fused_model_runs_the_stock_attention_as_well():
    with patched(make_llama(), attention="sdpa", fused=True) as llama:

        def attend_too(module, inputs, hidden):
            positions = torch.arange(hidden.shape[1])[None]
            llama.model.layers[0].self_attn(hidden, position_embeddings=rope_tables(llama.model, positions))

        llama.model.embed_tokens.register_forward_hook(attend_too)
        with pytest.raises(ValueError, match="layer 0 called it 1 times and another attention 1 times"):
            check_forward(llama, "sdpa")


def test_it_fires_where_a_layer_runs_twice(fused: bool):
    with patched(make_llama(), attention="sdpa", fused=fused) as llama:
        run_layers = llama.model.forward.run_layers
        owner = run_layers if fused else llama.model
        owner.layers[1] = owner.layers[0]
        with pytest.raises(ValueError, match="layer 0 called it 2 times"):
            check_forward(llama, "sdpa")


def test_training_stops_with_one_line_before_the_first_step(small_base, small_rows, tmp_path, monkeypatch):
    @contextmanager
    def patched_and_undone(model, **options):
        with patched(model, **options) as llama:
            put_back(find_llama(model).model.layers[0].self_attn)
            yield llama

    monkeypatch.setattr(loop, "patched", patched_and_undone)
    config = small_config(small_base, small_rows, tmp_path / "run", kernels={"layer": "stock"}, train={"max_steps": 2})
    with pytest.raises(InputError, match=r"kernels\.attention=sdpa is not what runs: .* layer 0 ") as caught:
        loop.train(config)
    assert "\n" not in str(caught.value)
    assert read_steps(tmp_path / "run") == []
