"""The switches of single kernels: what each becomes, what is refused, and that only what was chosen runs.

Whose kernel runs is shown in Triton's interpreter, by test_interpreter.py.
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
from typing import get_args

import pytest
import torch
import yaml
from interpreter import interpreted, ordinary
from small_job import read_metrics, small_config
from test_fused_layer import make_model
from test_kernels_patch import packed
from tiny_run import save_base

from packloop import config as settings
from packloop.config import KernelsConfig, load_config
from packloop.engine import checkpoint
from packloop.engine.loop import train
from packloop.errors import ConfigError
from packloop.kernels import (
    cublaslt,
    document_kernels,
    gated,
    linear_cross_entropy,
    nf4,
    operations,
    reference,
    rms_norm,
    rope,
    swiglu,
)
from packloop.kernels.attention import load_backend
from packloop.kernels.lora_linear import LoraProducts
from packloop.kernels.matmul import ProductLibrary, matmul
from packloop.kernels.operations import AUTO, Operations, choose_operations
from packloop.kernels.patch import packed_loss_sum, patched
from packloop.kernels.token_reuse import TokenReuse

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
NAMES = [field.name for field in dataclasses.fields(Operations)]
OWN = {"matmul": "cublaslt", "gated": "quack", "token_reuse": "first_layer", "lora": "fused"}
TRITONS = [name for name in NAMES if name not in OWN]
FASTEST = {**dict.fromkeys(TRITONS, "triton"), **OWN}
OTHERS = {"gated": "none", "token_reuse": "first_layer", "lora": "fused"}  # where the rest is torch's


def all_of(implementation: str, **others: str) -> Operations:
    """Of each operation `torch`, or on `fastest` what `auto` is on a GPU; SwiGLU by itself where not."""
    values = FASTEST if implementation == "fastest" else {**dict.fromkeys(NAMES, implementation), **OTHERS}
    return Operations(**{**values, **others})


@ordinary
def test_auto_is_the_fastest_on_a_gpu_and_torch_elsewhere(monkeypatch):
    monkeypatch.setattr(reference, "_HAS_TRITON", True)
    monkeypatch.setattr(cublaslt, "why_not", lambda: None)
    on_hopper(monkeypatch)
    assert choose_operations(AUTO, CPU, fused=True) == all_of("torch")
    assert choose_operations(AUTO, CUDA, fused=True) == all_of("fastest")
    stock = choose_operations(AUTO, CUDA, fused=False)
    assert stock == all_of("torch", cross_entropy="triton", token_reuse="none", lora="torch")
    assert choose_operations(Operations(token_reuse="none"), CPU, fused=True).token_reuse == "none"
    with pytest.raises(ValueError, match=r"kernels\.token_reuse=first_layer: kernels\.layer=stock runs"):
        choose_operations(Operations(token_reuse="first_layer"), CPU, fused=False)
    for name in [*TRITONS, "matmul", "lora"]:
        single = choose_operations(Operations(**{name: "torch"}), CUDA, fused=True)
        # Who asks for torch's SwiGLU or products does not get another's that hold both.
        rest = {"gated": "none"} if name in ("swiglu", "matmul", "lora") else {}
        assert single == all_of("fastest", **{name: "torch"}, **rest)
    monkeypatch.setattr(reference, "_HAS_TRITON", False)
    assert choose_operations(AUTO, CUDA, fused=True) == all_of("torch", matmul="cublaslt", gated="quack")
    monkeypatch.setattr(cublaslt, "why_not", lambda: "needs a torch built for CUDA")
    on_hopper(monkeypatch, without="needs quack-kernels")
    assert choose_operations(AUTO, CUDA, fused=True) == all_of("torch")


@ordinary
def test_a_value_that_an_operation_does_not_have_is_refused():
    """Of token_reuse anything but `none` would be the reuse."""
    with pytest.raises(ValueError, match=r"kernels\.token_reuse='torch': allowed: auto, first_layer, none"):
        Operations(token_reuse="torch")
    with pytest.raises(ValueError, match=r"kernels\.matmul='triton'"):
        dataclasses.replace(AUTO, matmul="triton")


def on_hopper(monkeypatch, capability: tuple[int, int] = (9, 0), without: str | None = None) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(gated, "_why_not_installed", lambda: without)
    monkeypatch.setattr(gated, "_why_not_importable", lambda: None)
    monkeypatch.setattr(gated, "_why_not_running", lambda device: None)


@ordinary
def test_a_quack_that_cannot_run_is_refused(monkeypatch):
    asked = Operations(gated="quack")
    for_refusals = [
        (CPU, (9, 0), None, "needs a CUDA GPU, the device is cpu"),
        (CUDA, (8, 0), None, r"needs a GPU of compute capability 9.x, this one has 8\.0"),
        (CUDA, (9, 0), "needs quack-kernels, which is not installed", "needs quack-kernels, which is not installed"),
    ]
    for device, capability, missing, reason in for_refusals:
        on_hopper(monkeypatch, capability, missing)
        with pytest.raises(ValueError, match=rf"kernels\.gated=quack: {reason}; use kernels\.gated=none"):
            choose_operations(asked, device, fused=True)
        with pytest.raises(ValueError, match=f"quack {reason}"):
            gated.library_for(torch.bfloat16, device, "quack")
        assert gated.library_for(torch.bfloat16, device, "auto") == "none"
    on_hopper(monkeypatch)
    assert choose_operations(asked, CUDA, fused=True).gated == "quack"
    with pytest.raises(ValueError, match=r"has the adapters in its products, and kernels\.lora=torch has them apart"):
        choose_operations(dataclasses.replace(asked, lora="torch"), CUDA, fused=True)
    assert gated.library_for(torch.bfloat16, CUDA, "auto") == "quack"
    assert gated.library_for(torch.float32, CUDA, "auto") == "none"
    with pytest.raises(ValueError, match=r"needs model\.dtype=bfloat16, the weights are float32"):
        gated.library_for(torch.float32, CUDA, "quack")
    with pytest.raises(ValueError, match=r"kernels\.layer=stock runs Hugging Face's own code"):
        choose_operations(asked, CUDA, fused=False)
    assert choose_operations(Operations(gated="none"), CUDA, fused=True).gated == "none"
    unfit = {"gated": "needs an NF4 base"}
    assert choose_operations(AUTO, CUDA, fused=True, unfit=unfit).gated == "none"
    with pytest.raises(ValueError, match=r"kernels\.gated=quack: needs an NF4 base; use kernels\.gated=none"):
        choose_operations(asked, CUDA, fused=True, unfit=unfit)


@ordinary
@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("raise KeyError('no arch')", r"quack cannot be used \(KeyError: 'no arch'\); packloop is written for"),
        ("def linear_act_mod(*_, **__): raise TypeError('_LOC')", r"\(TypeError: _LOC\); it has to lie in a directory"),
        ("def linear_act_mod(*_, **__): pass", r"quack fails on this machine \(\w+: "),
    ],
    ids=["whatever its import raises", "outside site-packages", "products that do not run"],
)
def test_a_quack_that_is_there_and_cannot_be_used(monkeypatch, tmp_path, source, reason):
    (tmp_path / "quack" / "epilogue").mkdir(parents=True)
    for package in ("quack", "quack/epilogue"):
        (tmp_path / package / "__init__.py").touch()
    (tmp_path / "quack" / "epilogue" / "library.py").write_text(source)
    (tmp_path / "quack" / "gemm_interface.py").write_text("gemm_act = gemm_dact = None")
    (tmp_path / "quack" / "gemm_config.py").write_text("GemmConfig = dict")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    asked_once = (gated._why_not_installed, gated._why_not_importable, gated._why_not_running)
    asked_once += (gated._products, gated._config)
    for function in asked_once:
        function.cache_clear()
    try:
        with pytest.raises(ValueError, match=reason):
            gated.library_for(torch.bfloat16, CUDA, "quack")
        assert gated.library_for(torch.bfloat16, CUDA, "auto") == "none"
    finally:
        for function in asked_once:
            function.cache_clear()
        for name in [name for name in sys.modules if name.partition(".")[0] == "quack"]:
            del sys.modules[name]


@ordinary
def test_deterministic_products_are_torchs(monkeypatch):
    monkeypatch.setattr(reference, "_HAS_TRITON", True)
    monkeypatch.setattr(cublaslt, "why_not", lambda: None)
    on_hopper(monkeypatch)
    torch.use_deterministic_algorithms(True)
    try:
        assert choose_operations(AUTO, CUDA, fused=True) == all_of("fastest", matmul="torch")
        # A resumed run's setting, which may not change.
        assert choose_operations(Operations(matmul="cublaslt"), CUDA, fused=True).matmul == "cublaslt"
    finally:
        torch.use_deterministic_algorithms(False)


@ordinary
def test_a_cublaslt_that_cannot_run_is_refused(monkeypatch):
    asked = Operations(matmul="cublaslt")
    on_hopper(monkeypatch)
    with pytest.raises(ValueError, match=r"kernels\.matmul=cublaslt: needs a CUDA GPU, the device is cpu; use"):
        choose_operations(asked, CPU, fused=True)
    monkeypatch.setattr(cublaslt, "why_not", lambda: "needs a torch built for CUDA")
    with pytest.raises(ValueError, match=r"kernels\.matmul=cublaslt: needs a torch built for CUDA; use"):
        choose_operations(asked, CUDA, fused=True)
    monkeypatch.setattr(cublaslt, "why_not", lambda: None)
    assert choose_operations(asked, CUDA, fused=True).matmul == "cublaslt"
    with pytest.raises(ValueError, match=r"kernels\.layer=stock runs Hugging Face's own code"):
        choose_operations(asked, CUDA, fused=False)
    with pytest.raises(ValueError, match="cublaslt needs a CUDA GPU"):
        matmul(torch.ones(2, 8), torch.ones(8, 2), by="cublaslt")


@ordinary
@pytest.mark.parametrize("name", TRITONS)
def test_a_triton_that_cannot_run_is_refused(name: str, monkeypatch):
    on_hopper(monkeypatch)
    asked = Operations(**{name: "triton"})
    with pytest.raises(
        ValueError, match=f"kernels.{name}=triton: needs a CUDA GPU, the device is cpu; use kernels.{name}=auto"
    ):
        choose_operations(asked, CPU, fused=True)
    monkeypatch.setattr(reference, "_HAS_TRITON", True)
    assert getattr(choose_operations(asked, CUDA, fused=True), name) == "triton"
    if name != "cross_entropy":
        with pytest.raises(ValueError, match=r"kernels\.layer=stock runs Hugging Face's own code"):
            choose_operations(asked, CUDA, fused=False)
    monkeypatch.setattr(reference, "_HAS_TRITON", False)
    with pytest.raises(ValueError, match="pip install triton"):
        choose_operations(asked, CUDA, fused=True)


@ordinary
def test_a_function_that_is_asked_for_triton_never_takes_torch_instead():
    with pytest.raises(ValueError, match="Triton kernel needs a CUDA GPU"):
        swiglu.swiglu_forward(torch.ones(2, 8), torch.ones(2, 8), by="triton")


def test_every_operation_is_a_setting_of_the_same_name_and_values():
    assert settings._OF_FUSED_LAYERS == operations._OF_FUSED_LAYERS
    for name in NAMES:
        field = KernelsConfig.model_fields[name]
        others = {
            "matmul": ProductLibrary,
            "gated": gated.GatedLibrary,
            "token_reuse": TokenReuse,
            "lora": LoraProducts,
        }
        expected = get_args(others.get(name, reference.Implementation))
        if name == "gated":  # torch's is for tests
            expected = tuple(value for value in expected if value != "torch")
        assert get_args(field.annotation) == expected
        assert field.default == getattr(AUTO, name) == "auto"


@ordinary
def test_a_run_writes_what_auto_chose_and_refuses_what_cannot_run(small_base, small_rows, tmp_path):
    config = small_config(small_base, small_rows, tmp_path / "run", train={"max_steps": 1})
    train(config)
    resolved = load_config(tmp_path / "run/config.resolved.yaml").kernels
    assert {name: getattr(resolved, name) for name in NAMES} == dataclasses.asdict(all_of("torch"))
    asked = small_config(small_base, small_rows, tmp_path / "other", kernels={"nf4": "triton"})
    with pytest.raises(ConfigError, match=r"kernels\.nf4=triton: needs a CUDA GPU") as caught:
        train(asked)
    assert "\n" not in str(caught.value)


@ordinary
def test_a_checkpoint_from_before_the_settings_resumes_exactly(small_base, small_rows, tmp_path):
    config = small_config(
        small_base, small_rows, tmp_path / "whole", train={"max_steps": 4}, checkpoint={"every": 2, "keep": 9}
    )
    train(config)
    shutil.copytree(tmp_path / "whole", tmp_path / "old")
    shutil.rmtree(tmp_path / "old/checkpoints/step-000004")
    saved = tmp_path / "old/checkpoints/step-000002"
    values = yaml.safe_load((saved / "config.resolved.yaml").read_text())
    values["kernels"] = {key: value for key, value in values["kernels"].items() if key not in NAMES}
    (saved / "config.resolved.yaml").write_text(yaml.safe_dump(values))
    (saved / "manifest.json").unlink()
    checkpoint._seal(saved)
    elsewhere = config.train.model_copy(update={"output_dir": str(tmp_path / "old")})
    train(config.model_copy(update={"train": elsewhere}), resume="latest")
    assert read_metrics(tmp_path / "old") == read_metrics(tmp_path / "whole")


class Forbidden:
    """In a kernel's place: whoever launches it is found out."""

    def __getitem__(self, grid):
        raise AssertionError("launched")


KERNELS = {
    "rms_norm": (rms_norm, ["_rms_norm_forward_kernel", "_rms_norm_backward_kernel"]),
    "rope": (rope, ["_rope_kernel"]),
    "swiglu": (swiglu, ["_swiglu_forward_kernel", "_swiglu_backward_kernel"]),
    "nf4": (nf4, ["_nf4_dequantize_kernel"]),
    "cross_entropy": (linear_cross_entropy, ["_cross_entropy_kernel"]),
}


def loss_and_gradient(model, flat, *, operations: Operations = AUTO, attention: str = "sdpa"):
    flat.zero_gradient()
    with patched(model, attention=attention, fused=True, operations=operations) as llama:
        loss = packed_loss_sum(llama, *packed((5, 8)))
        loss.backward()
    return loss.item(), flat.gradient.clone()


@pytest.fixture(scope="module")
def with_kernels(tmp_path_factory):
    """(model, flat parameters, loss, gradient) of a fused NF4 model of one layer, all of it by Triton's kernels."""
    # bitsandbytes' CPU code dequantises rows that end within a block of 64 to other values than its GPU code.
    sizes = {"num_hidden_layers": 1, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
    base = save_base(tmp_path_factory.mktemp("base"), **sizes)
    model, flat = make_model(base, quantization="nf4", targets="all-linear")
    return model, flat, *loss_and_gradient(model, flat, operations=all_of("triton", matmul="torch"))


@interpreted
@pytest.mark.parametrize("name", TRITONS)
def test_torch_keeps_one_kernel_from_running_and_gives_its_results(name: str, with_kernels, monkeypatch):
    model, flat, expected_loss, expected = with_kernels
    module, kernels = KERNELS[name]
    for kernel in kernels:
        monkeypatch.setattr(module, kernel, Forbidden())
    with pytest.raises(AssertionError, match="launched"):
        loss_and_gradient(model, flat)
    operations = all_of("triton", **{name: "torch", "matmul": "torch"})
    loss, gradient = loss_and_gradient(model, flat, operations=operations)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert (gradient - expected).norm() <= 2e-6 * expected.norm()


@interpreted
@pytest.mark.parametrize("implementation", ["triton", "torch"])
def test_attention_that_rotates_does_not_where_rope_is_torchs(implementation: str, with_kernels, monkeypatch):
    model, flat, expected_loss, expected = with_kernels
    assert load_backend("document").rotates
    # The backend's own rotation starts with this kernel; RoPE's by itself is never its.
    monkeypatch.setattr(rope, "_rope_kernel", Forbidden())
    if implementation == "torch":
        monkeypatch.setattr(document_kernels, "document_attention_turn_kernel", Forbidden())
    operations = all_of("triton", rope=implementation, matmul="torch")
    loss, gradient = loss_and_gradient(model, flat, attention="document", operations=operations)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert (gradient - expected).norm() <= 1e-5 * expected.norm()
