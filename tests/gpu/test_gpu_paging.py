"""Optimizer state that the driver may move to the host: by the type of its pointers, before and after a resume."""

from __future__ import annotations

import ctypes
import gc
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_job import read_metrics, small_config, tensors_equal, write_rows
from tiny_run import save_base
from torch import Tensor, nn

from packloop.engine import loop, run
from packloop.engine.optim import AdamW, FlatParameters

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

DEVICE = torch.device("cuda")
_IS_MANAGED = 8  # CU_POINTER_ATTRIBUTE_IS_MANAGED


def is_managed(tensor: Tensor) -> bool:
    """What the driver says of the tensor's memory."""
    torch.cuda.synchronize()  # a CUDA context must exist
    managed = ctypes.c_uint(2)
    result = ctypes.CDLL("libcuda.so.1").cuPointerGetAttribute(
        ctypes.byref(managed), ctypes.c_int(_IS_MANAGED), ctypes.c_ulonglong(tensor.data_ptr())
    )
    assert result == 0, f"cuPointerGetAttribute returned {result}"
    assert managed.value in (0, 1)
    return bool(managed.value)


def make_optimizer(name: str) -> AdamW:
    torch.manual_seed(0)
    flat = FlatParameters(nn.Linear(512, 512, bias=False, device=DEVICE))
    return AdamW(flat, name=name, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)


def take_steps(optimizer: AdamW, first: int, last: int) -> None:
    for step in range(first, last):
        generator = torch.Generator(DEVICE).manual_seed(step)
        optimizer.flat.gradient.copy_(torch.randn(optimizer.flat.gradient.shape, device=DEVICE, generator=generator))
        optimizer.step(1e-3)


def test_row24_paged_state_is_managed_memory_and_a_resume_fills_it_in_place(tmp_path):
    paged, plain = make_optimizer("paged_adamw_32bit"), make_optimizer("adamw_32bit")
    assert [paged.is_paged, plain.is_paged] == [True, False]
    assert paged.paged_bytes == 2 * 4 * 512 * 512
    assert plain.paged_bytes == 0
    assert [is_managed(moment) for moment in paged._moments()] == [True, True]
    assert [is_managed(moment) for moment in plain._moments()] == [False, False]
    assert not is_managed(paged.flat.weight)
    for optimizer in (paged, plain):
        take_steps(optimizer, 0, 3)
    assert torch.equal(paged.flat.weight, plain.flat.weight)

    save_file(paged.state_tensors(), tmp_path / "optimizer.safetensors")
    resumed = make_optimizer("paged_adamw_32bit")
    addresses = [moment.data_ptr() for moment in resumed._moments()]
    resumed.flat.weight.data.copy_(paged.flat.weight.data)
    resumed.load_state_tensors(load_file(tmp_path / "optimizer.safetensors"), 3)
    assert [moment.data_ptr() for moment in resumed._moments()] == addresses
    assert [is_managed(moment) for moment in resumed._moments()] == [True, True]
    assert resumed.is_paged
    assert tensors_equal(resumed.state_tensors(), paged.state_tensors())
    for optimizer in (paged, resumed):
        take_steps(optimizer, 3, 6)
    torch.cuda.synchronize()
    assert torch.equal(resumed.flat.weight, paged.flat.weight)
    assert tensors_equal(resumed.state_tensors(), paged.state_tensors())


def test_row24_a_resumed_run_is_paged_equal_and_takes_no_more_memory(tmp_path, monkeypatch):
    """NF4 base, dropout, recomputation: the whole loop, 6 steps, and again from the checkpoint after 3."""
    base = save_base(
        tmp_path / "base", dtype=torch.bfloat16, hidden_size=256, intermediate_size=512, num_attention_heads=4
    )
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    config = small_config(
        base,
        write_rows(tmp_path / "rows.jsonl"),
        whole,
        model={"quantization": "nf4", "dtype": "bfloat16"},
        lora={"r": 32, "dropout": 0.1, "target_modules": "all-linear"},
        train={"max_steps": 6, "gradient_checkpointing": "all", "learning_rate": 1e-3},
        kernels={"attention": "document", "layer": "fused", "dequant_cache": "none", "keep_inputs": "none"},
        checkpoint={"every": 3, "keep": 9},
    )
    managed: list[bool] = []
    make = run.make_optimizer

    def make_and_look(*arguments) -> AdamW:
        optimizer = make(*arguments)
        managed.extend(is_managed(moment) for moment in optimizer._moments())
        return optimizer

    monkeypatch.setattr(run, "make_optimizer", make_and_look)

    def peak_bytes(run_config, resume: str | None) -> int:
        gc.collect()
        torch.cuda.empty_cache()
        torch.ones(8, 8, device=DEVICE) @ torch.ones(8, 8, device=DEVICE)  # cuBLAS keeps its workspace from here on
        torch.cuda.reset_peak_memory_stats()
        loop.train(run_config, resume=resume)
        return torch.cuda.max_memory_allocated()

    peaks = [peak_bytes(config, None)]
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoints/step-000006")
    elsewhere = config.train.model_copy(update={"output_dir": str(resumed)})
    peaks.append(peak_bytes(config.model_copy(update={"train": elsewhere}), "latest"))

    assert managed == [True] * 4
    assert read_metrics(resumed) == read_metrics(whole)
    last = "checkpoints/step-000006"
    for file in ("adapter_model.safetensors", "optimizer.safetensors", "rng.safetensors"):
        assert tensors_equal(*(load_file(run_dir / last / file) for run_dir in (resumed, whole))), file
    print(f"peaks: {peaks[0] / 2**20:.1f} MiB, resumed {peaks[1] / 2**20:.1f} MiB")
    assert peaks[1] <= peaks[0] + 2**20
