"""The loss gate on real tiny steps: the same steps pass however they are computed, and wrong ones do not."""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from tiny_run import save_small_shape

from packloop.bench import gate as gates
from packloop.bench.cell import load_subject, take_gate_steps
from packloop.config import DataConfig, parse_config
from packloop.data.loader import build_data
from packloop.kernels import attention

BASE = {
    "model": {"dtype": "float32"},
    "lora": {"r": 8, "dropout": 0.1, "target_modules": "all-linear"},
    "data": {"source": "bundled", "max_length": 96, "packing": "bfd"},
    "train": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-3},
    "kernels": {"attention": "sdpa", "layer": "fused"},
}


def config(**sections):
    return parse_config({name: values | sections.get(name, {}) for name, values in BASE.items()})


@functools.cache
def small_shape() -> str:
    directory = tempfile.mkdtemp(prefix="small-shape-")
    atexit.register(shutil.rmtree, directory)
    return str(save_small_shape(Path(directory)))


@functools.cache
def subject_of(name: str, dtype: str):
    """A base that every test here steps on; that steps leave it as it was is a test by itself."""
    run = config(model={"name_or_path": name, "dtype": dtype})
    return load_subject(run, None if name == "bundled" else small_shape(), None)


@functools.cache
def data_of(name: str, dtype: str, values: str, seed: int):
    data = DataConfig.model_validate_json(values)
    return build_data(data, subject_of(name, dtype).tokenizer, seed=seed)


def steps(run):
    name, dtype = run.model.name_or_path, run.model.dtype
    subject = subject_of(name, dtype)
    data = data_of(name, dtype, run.data.model_dump_json(), run.train.seed)
    return take_gate_steps(run, subject.base, data, subject.tokenizer.pad_token_id)


@functools.cache
def reference_of(values: str):
    way = parse_config(json.loads(values))
    taken = steps(way)
    return gates.Reference(name=gates.describe_way(way), losses=taken.losses, grad_norms=taken.grad_norms)


def held(run, cell=None):
    """The gate of the steps that `cell` takes, `run`'s by default, held to the reference of `run`."""
    reference = reference_of(gates.reference_config(run, None).model_dump_json())
    return gates.judge(steps(gates.gate_config(cell or run)), reference, run.model.dtype, None)


@pytest.mark.parametrize("packing", ["wrapped", "bfd", "none"])
def test_the_same_steps_pass_in_float32_whatever_way_they_are_taken(packing):
    run = config(data={"packing": packing})
    gate = held(run)
    assert gate.reference == "stock eager, pack by pack"
    assert gate.passed
    assert gate.allowed == 1e-4
    assert gate.largest_difference < 1e-5
    assert gate.largest_gradient_difference < 1e-4
    assert len(set(gate.losses)) == gates.GATE_STEPS, "the updates must show"
    recomputed = config(data={"packing": packing}, train={"gradient_checkpointing": "all"}, kernels={"layer": "stock"})
    assert held(run, recomputed).passed


@pytest.mark.parametrize("kernels", [{}, {"padding": "drop", "attention": "document", "prefix_reuse": "micro_batch"}])
def test_a_reference_has_every_document_by_itself_in_padded_rows(kernels):
    run = config(kernels=kernels)
    for way in (None, run):
        reference = gates.reference_config(run, way).kernels
        assert (reference.padding, reference.prefix_reuse) == ("keep", "none")
        assert reference.attention == ("eager" if way is None else run.kernels.attention)


def test_the_same_steps_pass_in_bf16():
    gate = held(config(model={"dtype": "bfloat16"}))
    assert gate.passed
    assert gate.largest_difference < gate.allowed / 4
    assert gate.largest_gradient_difference < gate.allowed_gradient / 4


WRONG_STEPS = {
    "learning rate": {"train": {"learning_rate": 1.1e-3}},
    "adapters of some layers only": {"lora": {"target_modules": ["q_proj", "v_proj"]}},
    "adapters' scale": {"lora": {"alpha": 17}},
    "labels": {"data": {"loss_on": "response"}},
    "documents see each other": {"data": {"packing": "wrapped"}},
    "one micro-batch of two": {"train": {"gradient_accumulation_steps": 1}},
}


@pytest.mark.parametrize("changes", WRONG_STEPS.values(), ids=WRONG_STEPS)
def test_other_steps_do_not_pass_in_float32(changes):
    gate = held(config(), config(**changes))
    assert not gate.passed
    assert "its steps are not the reference's" in gates.describe_failure(gate)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_mask_that_lets_documents_see_each_other_does_not_pass(dtype, monkeypatch):
    """On trained weights: random ones of this size hardly attend to anything."""

    def leaking(q, k, v, layout, scale):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)

    run = config(
        model={"name_or_path": "bundled", "dtype": dtype},
        data={"max_length": 256},
        train={"gradient_accumulation_steps": 1},
    )
    assert held(run).passed
    monkeypatch.setitem(attention._DIFFERENTIATED, "sdpa", leaking)
    assert not held(run).passed


def test_steps_that_update_nothing_do_not_pass_in_bf16():
    run = config(model={"dtype": "bfloat16"}, train={"learning_rate": 1e-2})
    idle = config(model={"dtype": "bfloat16"}, train={"learning_rate": 1e-12})
    assert held(run).passed
    assert not held(run, idle).passed


def test_a_tolerance_of_one_s_own_scales_both():
    run = gates.GateRun([1.0, 0.9], [2.0, 2.1])
    reference = gates.Reference(name="r", losses=[1.0, 0.905], grad_norms=[2.0, 2.1])
    assert gates.judge(run, reference, "bfloat16", None).passed
    tight = gates.judge(run, reference, "bfloat16", 1e-3)
    assert not tight.passed
    assert (tight.allowed, tight.allowed_gradient) == (1e-3, pytest.approx(2e-3))
    assert tight.largest_difference == pytest.approx(5e-3)


def test_gate_steps_leave_the_base_as_it_was():
    first = steps(gates.gate_config(config()))
    steps(gates.gate_config(config(train={"learning_rate": 0.1})))
    again = steps(gates.gate_config(config()))
    assert first == again
