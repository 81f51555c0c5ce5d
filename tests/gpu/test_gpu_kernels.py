"""The Triton kernels on a GPU in bf16, judged beside the same-dtype PyTorch expression.

The rule: |ours - exact| may be at most `factor` times the greatest error of the PyTorch expression in bf16, plus 2 ulp
of the exact value; factor is 2 for outputs and 3 for gradients. Exact is the oracle in float64.
"""

from __future__ import annotations

import bitsandbytes.functional
import pytest
import torch

from packloop.kernels import dropout, nf4, reference, rms_norm, rope, swiglu
from packloop.kernels.extended_weight import ExtendedWeight, extended_group_backward, extended_group_forward
from packloop.kernels.lora_linear import (
    DenseWeight,
    Dropout,
    Lora,
    join_loras,
    lora_group_backward,
    lora_group_forward,
    lora_linear_group,
)

DEVICE = "cuda"
DTYPE = torch.bfloat16

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture(autouse=True)
def _poisoned_outputs():
    """New memory holds NaN, so an element that a kernel leaves out shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.cuda.empty_cache()


def random(*shape: int, scale: float = 1.0, seed: int = 0, dtype: torch.dtype | None = None) -> torch.Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return (torch.randn(*shape, device=DEVICE, generator=generator) * scale).to(DTYPE if dtype is None else dtype)


def assert_no_worse(found: torch.Tensor, stock: torch.Tensor, exact: torch.Tensor, factor: float) -> None:
    found, stock, exact = found.double(), stock.double(), exact.double()
    assert bool(found.isfinite().all())
    allowed = factor * (stock - exact).abs().max() + 2 * torch.finfo(DTYPE).eps * exact.abs()
    excess = ((found - exact).abs() - allowed).max()
    assert excess <= 0, (
        f"error exceeds the allowance by {excess:.3e}; PyTorch's own is {(stock - exact).abs().max():.3e}"
    )


def compare(ours, stock, oracle, inputs: list[torch.Tensor]) -> None:
    """Outputs and gradients for every input that requires one; the oracle gets the inputs in float64."""
    wide = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
    results = []
    for function, arguments in ((ours, inputs), (stock, inputs), (oracle, wide)):
        outputs = function(*arguments)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        leaves = [x for x in arguments if x.requires_grad]
        gradients = [random(*y.shape, seed=50 + i).to(y.dtype) for i, y in enumerate(outputs)]
        results.append((outputs, torch.autograd.grad(outputs, leaves, gradients)))
    for factor, (found, expected, exact) in zip((2, 3), zip(*results)):
        for triple in zip(found, expected, exact):
            assert_no_worse(*triple, factor)


def dropped(x: torch.Tensor, p: float, seed: int, stream: int = 0) -> torch.Tensor:
    return reference.dropout_mask(tuple(x.shape), p, seed, stream=stream, device=x.device)


# RMSNorm


@pytest.mark.parametrize("num_features", [64, 1000, 4096, 5120])
@pytest.mark.parametrize("num_tokens", [1, 2, 63, 100, 1000, 4095, 16384, 32767])
def test_add_rms_norm(num_tokens: int, num_features: int):
    residual = random(num_tokens, num_features).requires_grad_()
    update = random(num_tokens, num_features, scale=0.3, seed=1).requires_grad_()
    weight = random(num_features, seed=2).requires_grad_(num_tokens % 2 == 1)
    compare(
        lambda *a: rms_norm.add_rms_norm(*a, 1e-5),
        lambda *a: reference.add_rms_norm(*a, 1e-5),
        lambda *a: reference.add_rms_norm(*a, 1e-5),
        [residual, update, weight],
    )


def test_rms_norm_alone_on_strided_rows():
    x = random(1000, 3 * 4096)[:, 4096:8192]
    weight = random(4096, seed=1)
    buffer = torch.full((1000, 4096 + 64), float("nan"), dtype=DTYPE, device=DEVICE)
    _, found, _ = rms_norm.add_rms_norm_forward(x, None, weight, 1e-5, normed_out=buffer[:, :4096])
    exact = reference.rms_norm(x.double(), weight.double(), 1e-5)
    assert_no_worse(found, reference.rms_norm(x, weight, 1e-5), exact, 2)
    assert bool(buffer[:, 4096:].isnan().all())


# RoPE


def stock_rope(x_THD: torch.Tensor, cos_PD: torch.Tensor, sin_PD: torch.Tensor, positions_T: torch.Tensor):
    """Hugging Face's expression: tables rounded to the dtype, products and sum rounded one by one."""
    cos, sin = (torch.cat((t, t), -1)[positions_T.long()][:, None].to(x_THD.dtype) for t in (cos_PD, sin_PD))
    first, second = x_THD.chunk(2, dim=-1)
    return x_THD * cos + torch.cat((-second, first), dim=-1) * sin


@pytest.mark.parametrize("group", [1, 4, 8])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("num_tokens", [1, 63, 1000, 4097, 32768])
def test_rope(num_tokens: int, head_dim: int, group: int):
    num_heads = 2048 // head_dim
    inv_freq = 1.0 / 10000 ** (torch.arange(0, head_dim, 2, device=DEVICE) / head_dim)
    cos_PD, sin_PD = reference.rope_tables(inv_freq, 32768)
    positions_T = torch.arange(num_tokens, device=DEVICE, dtype=torch.int32 if group == 4 else torch.int64)
    if group == 8:
        positions_T = positions_T % 100
    q = random(num_tokens, num_heads * head_dim).requires_grad_()
    k = random(num_tokens, num_heads // group * head_dim, seed=1).requires_grad_()

    def heads_of(function):
        def apply(*tensors):
            return tuple(
                function(x.unflatten(1, (-1, head_dim)), cos_PD, sin_PD, positions_T).flatten(1) for x in tensors
            )

        return apply

    compare(
        lambda q, k: rope.rope(q, k, cos_PD, sin_PD, positions_T),
        heads_of(stock_rope),
        heads_of(reference.rope),
        [q, k],
    )


def test_rope_in_place_in_slices_of_one_buffer():
    qkv = random(1000, 6144)  # 32 query heads and 8 + 8 key and value heads of 128
    before = qkv.clone()
    inv_freq = 1.0 / 10000 ** (torch.arange(0, 128, 2, device=DEVICE) / 128)
    cos_PD, sin_PD = reference.rope_tables(inv_freq, 1000)
    positions_T = torch.arange(1000, device=DEVICE)
    q, k = qkv[:, :4096], qkv[:, 4096:5120]
    found = rope.rope(before[:, :4096], before[:, 4096:5120], cos_PD, sin_PD, positions_T)
    rope.rope_(q, k, cos_PD, sin_PD, positions_T)
    assert torch.equal(q, found[0])
    assert torch.equal(k, found[1])
    assert torch.equal(qkv[:, 5120:], before[:, 5120:])


# SwiGLU


@pytest.mark.parametrize(
    ("num_tokens", "num_features"),
    [(t, i) for t in (1, 63, 1000, 8191) for i in (96, 1000, 11008, 14336)] + [(32768, 1000), (32767, 2816)],
)
def test_swiglu(num_tokens: int, num_features: int):
    gate_up = random(num_tokens, 2 * num_features).requires_grad_()
    compare(
        lambda x: swiglu.swiglu(*x.chunk(2, dim=1)),
        lambda x: torch.nn.functional.silu(x.chunk(2, dim=1)[0]) * x.chunk(2, dim=1)[1],
        lambda x: reference.swiglu(*x.chunk(2, dim=1)),
        [gate_up],
    )


def test_swiglu_backward_over_its_inputs_rebuilds_the_product_bit_for_bit():
    gate_up, d_hidden = random(1000, 2 * 11008), random(1000, 11008, seed=1)
    product = swiglu.swiglu_forward(*gate_up.chunk(2, dim=1))
    expected = torch.cat(swiglu.swiglu_backward(d_hidden, *gate_up.chunk(2, dim=1)), dim=1)
    gate, up = gate_up.chunk(2, dim=1)
    swiglu.swiglu_backward(d_hidden, gate, up, d_gate=gate, d_up=up, hidden_out=d_hidden)
    assert torch.equal(gate_up, expected)
    assert torch.equal(d_hidden, product)


# NF4


@pytest.mark.parametrize("lookup", ["load", "gather"])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", [(1, 64), (130, 264), (1024, 4096), (4096, 4096), (11008, 4096), (4096, 11008)])
def test_nf4_is_bitsandbytes_bit_for_bit(shape: tuple[int, int], double_quant: bool, lookup: str, monkeypatch):
    monkeypatch.setattr(nf4, "_LOOKUP", lookup)
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        packed, state = bitsandbytes.functional.quantize_4bit(
            random(*shape, dtype=dtype), compress_statistics=double_quant, quant_type="nf4", blocksize=64
        )
        expected = bitsandbytes.functional.dequantize_4bit(packed, state)
        assert torch.equal(nf4.dequantize(packed, state), expected)
        buffer = torch.full((shape[0] + 2, shape[1] + 64), float("nan"), dtype=dtype, device=DEVICE)
        view = buffer[1:-1, : shape[1]]
        assert torch.equal(nf4.dequantize(packed, state, out=view), expected)
        assert int(buffer.isnan().sum()) == buffer.numel() - view.numel()


# Dropout and the products with a dropped-out input


@pytest.mark.parametrize("seed_on_device", [True, False])
@pytest.mark.parametrize("shape", [(1,), (63, 100), (1000, 1000), (4097, 4096)])
def test_dropout_has_the_references_mask(shape: tuple[int, ...], seed_on_device: bool):
    x = random(*shape).abs() + 1
    seed = 2**40 + 9
    given = torch.tensor(seed, device=DEVICE) if seed_on_device else seed
    found = dropout.dropout_apply(x, 0.1, given, stream=3)
    mask = dropped(x, 0.1, seed, stream=3)
    assert torch.equal(found != 0, mask)
    exact = x.double() * mask / reference.keep_probability(0.1)
    assert_no_worse(found, x * mask / reference.keep_probability(0.1), exact, 2)
    on_cpu = reference.dropout_mask(shape, 0.1, seed, stream=3)
    assert torch.equal(mask.cpu(), on_cpu)


@pytest.mark.parametrize(
    ("num_features", "num_ranks"), [(64, 8), (1000, 16), (4096, 64), (4096, 128), (4096, 192), (11008, 64)]
)
@pytest.mark.parametrize("num_tokens", [1, 63, 1000, 8191, 16384])
def test_products_with_a_dropped_out_input(num_tokens: int, num_features: int, num_ranks: int):
    x = random(num_tokens, num_features + 64)[:, :num_features]
    a = random(num_ranks, num_features, scale=num_features**-0.5, seed=1)
    d_projected = random(num_tokens, num_ranks, seed=2)
    mask = dropped(x, 0.1, 77, stream=2)

    found = dropout.dropout_project(x, a, 0.1, 77, stream=2, scale=0.25)
    exact = 0.25 * (x.double() * mask) @ a.double().T
    assert_no_worse(found, 0.25 * ((x * mask) @ a.T), exact, 2)
    assert torch.equal(found, dropout.dropout_project(x, a, 0.1, 77, stream=2, scale=0.25))

    found = dropout.dropout_weight_gradient(d_projected, x, 0.1, 77, stream=2)
    exact = d_projected.double().T @ (x.double() * mask)
    assert found.dtype == torch.float32
    assert_no_worse(found, d_projected.T @ (x * mask), exact, 3)
    assert torch.equal(found, dropout.dropout_weight_gradient(d_projected, x, 0.1, 77, stream=2))

    dx = random(num_tokens, num_features, seed=3)
    exact = dx.double() + mask * (d_projected.double() @ a.double())
    stock = dx + mask * (d_projected @ a)
    assert_no_worse(dropout.dropout_add_input_gradient_(dx, d_projected, a, 0.1, 77, stream=2), stock, exact, 3)


def test_a_new_seed_compiles_nothing():
    x = random(1000, 1000)
    dropout.dropout_apply(x, 0.1, 3, stream=3)
    kernels = dropout._dropout_kernel.device_caches[torch.cuda.current_device()][0]
    num_compiled = len(kernels)
    for seed in (1, 2, 16, 17, 123457):
        dropout.dropout_apply(x, 0.2, seed, stream=seed)
    assert len(kernels) == num_compiled


# LoRA linear groups


def make_group(present: tuple[bool, ...], out_features: tuple[int, ...], num_features: int, rank: int = 64):
    """The base weights and adapters with float32 masters; B is not zero, as after some steps."""
    weights = [random(o, num_features, scale=num_features**-0.5, seed=10 + i) for i, o in enumerate(out_features)]
    loras = [
        Lora(
            random(rank, num_features, scale=num_features**-0.5, seed=20 + i, dtype=torch.float32).requires_grad_(),
            random(o, rank, scale=0.05, seed=30 + i, dtype=torch.float32).requires_grad_(),
            0.25,
        )
        if has_lora
        else None
        for i, (o, has_lora) in enumerate(zip(out_features, present))
    ]
    return weights, loras


def stock_group(x, weights, loras, dropout_: Dropout | None) -> torch.Tensor:
    p = 0.0 if dropout_ is None else dropout_.p
    mask = None if dropout_ is None else dropped(x, p, dropout_.seed, dropout_.stream)
    return torch.cat(
        [
            reference.lora_linear(
                x,
                weight.to(x.dtype),
                *(lora or ()),
                keep_mask_TH=mask,
                keep_probability=reference.keep_probability(p),
            )
            for weight, lora in zip(weights, loras)
        ],
        dim=1,
    )


GROUPS = {
    "qkv, adapters on q and v": ((True, False, True), (4096, 4096, 4096), 4096),
    "qkv with grouped heads": ((True, True, True), (4096, 1024, 1024), 4096),
    "gate and up": ((True, True), (11008, 11008), 4096),
    "down": ((True,), (4096,), 11008),
    "small and odd": ((False, True), (72, 40), 200),
}


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("name", list(GROUPS))
@pytest.mark.parametrize("num_tokens", [1, 63, 1000, 4097])
def test_lora_linear_group(num_tokens: int, name: str, p: float):
    present, out_features, num_features = GROUPS[name]
    weights, loras = make_group(present, out_features, num_features)
    x = random(num_tokens, num_features).requires_grad_()
    dropout_ = Dropout(p, 11, 3)
    masters = [master for lora in loras if lora is not None for master in lora[:2]]

    def with_masters(function):
        def apply(x, *given):
            remaining = iter(given)
            members = [None if lora is None else Lora(next(remaining), next(remaining), 0.25) for lora in loras]
            return function(x, members)

        return apply

    compare(
        with_masters(
            lambda x, members: lora_linear_group(
                x, [DenseWeight(torch.cat(weights))], out_features, members, dropout=dropout_
            )
        ),
        with_masters(lambda x, members: stock_group(x, weights, members, dropout_)),
        with_masters(lambda x, members: stock_group(x, weights, members, dropout_)),
        [x, *masters],
    )


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("name", ["qkv with grouped heads", "gate and up", "down"])
def test_the_extended_weight(name: str, p: float):
    present, out_features, num_features = GROUPS[name]
    weights, loras = make_group(present, out_features, num_features)
    group = join_loras(out_features, loras, DTYPE)
    dropout_ = Dropout(p, 11, 3) if p else None
    num_outputs, num_ranks = sum(out_features), group.a_RH.shape[0]
    weight = ExtendedWeight.allocate(num_features, group, dtype=DTYPE, device=DEVICE)
    weight.base.copy_(torch.cat(weights))
    weight.write_adapters(group)
    x = torch.full((1000, num_features + num_ranks), float("nan"), dtype=DTYPE, device=DEVICE)
    x[:, :num_features] = random(1000, num_features)
    dy = torch.full((1000, num_outputs + num_ranks), float("nan"), dtype=DTYPE, device=DEVICE)
    dy[:, :num_outputs] = random(1000, num_outputs, seed=1)
    found = extended_group_forward(x, weight, group, dropout_)
    d_found, _ = extended_group_backward(dy, x, weight, group, dropout_)
    x, dy = x[:, :num_features], dy[:, :num_outputs]
    stock, projected = lora_group_forward(x, weights, group, dropout_)
    d_stock, _ = lora_group_backward(dy, x, projected, weights, group, dropout_)
    wide = x.double().requires_grad_()
    exact = stock_group(wide, weights, loras, dropout_)
    assert_no_worse(found, stock, exact.detach(), 2)
    assert_no_worse(d_found, d_stock, torch.autograd.grad(exact, wide, dy.double())[0], 3)


def test_a_step_of_every_kernel_does_not_stop_the_gpu():
    weights, loras = make_group((True, False, True), (512, 512, 512), 512)
    packed, state = bitsandbytes.functional.quantize_4bit(weights[0], quant_type="nf4", compress_statistics=True)
    cos_PD, sin_PD = reference.rope_tables(torch.rand(32, device=DEVICE), 100)
    positions_T = torch.arange(100, device=DEVICE)
    x = random(100, 512).requires_grad_()
    seed = torch.tensor(5, device=DEVICE)

    def step():
        nf4.dequantize(packed, state)
        residual, normed = rms_norm.add_rms_norm(x, x, weights[0][0], 1e-5)
        handle = DenseWeight(torch.cat(weights))
        qkv = lora_linear_group(normed, [handle], (512,) * 3, loras, dropout=Dropout(0.1, seed))
        q, k = rope.rope(qkv[:, :512], qkv[:, 512:1024], cos_PD, sin_PD, positions_T)
        (swiglu.swiglu(q, k) + residual).sum().backward()

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# More than 2^31 elements: an int32 offset would wrap

LAST = 5


@pytest.fixture
def _room_for_large_tensors():
    torch.utils.deterministic.fill_uninitialized_memory = False
    free_gib = torch.cuda.mem_get_info()[0] / 2**30
    if free_gib < 40:
        pytest.skip(f"40 GiB of GPU memory are needed, {free_gib:.0f} are free")


def large(num_rows: int, num_columns: int) -> torch.Tensor:
    x = torch.zeros(num_rows, num_columns, dtype=DTYPE, device=DEVICE)
    x[-LAST:] = random(LAST, num_columns)
    return x


@pytest.mark.usefixtures("_room_for_large_tensors")
def test_rows_beyond_two_to_the_31_elements():
    x, weight = large(530_000, 4096), random(4096, seed=1)
    expected = rms_norm.rms_norm(x[-LAST:].clone(), weight, 1e-5)
    _, found, rstd = rms_norm.add_rms_norm_forward(x, None, weight, 1e-5)
    assert torch.equal(found[-LAST:], expected)
    dx, _ = rms_norm.add_rms_norm_backward(found, x, x, weight, rstd)
    target, _ = rms_norm.add_rms_norm_backward(expected, x[-LAST:], x[-LAST:], weight, rstd[-LAST:])
    assert torch.equal(dx[-LAST:], target)
    del dx, found
    cos_PD, sin_PD = reference.rope_tables(torch.rand(64, device=DEVICE), 10)
    positions_T = torch.full((530_000,), 7, device=DEVICE)
    target, _ = rope.rope(x[-LAST:].clone(), x[-LAST:, :128].clone(), cos_PD, sin_PD, positions_T[-LAST:])
    rope.rope_(x, torch.zeros(530_000, 128, dtype=DTYPE, device=DEVICE), cos_PD, sin_PD, positions_T)
    assert torch.equal(x[-LAST:], target)


@pytest.mark.usefixtures("_room_for_large_tensors")
def test_swiglu_beyond_two_to_the_31_elements():
    gate_up = large(100_000, 2 * 11008)
    expected = swiglu.swiglu_forward(*gate_up[-LAST:].clone().chunk(2, dim=1))
    gate, up = gate_up.chunk(2, dim=1)
    found = swiglu.swiglu_forward(gate, up)
    assert torch.equal(found[-LAST:], expected)
    target = torch.cat(swiglu.swiglu_backward(expected, gate[-LAST:], up[-LAST:]), dim=1)
    swiglu.swiglu_backward(found, gate, up, d_gate=gate, d_up=up)
    assert torch.equal(gate_up[-LAST:], target)


@pytest.mark.usefixtures("_room_for_large_tensors")
def test_dropout_beyond_two_to_the_31_elements():
    x = large(530_000, 4096)
    first = (530_000 - LAST) * 4096 // 8
    counters = torch.arange(first, 530_000 * 4096 // 8, device=DEVICE)
    words = torch.stack(reference._philox(counters, torch.tensor(5, device=DEVICE), 0), dim=-1)
    halves = torch.stack((words & 0xFFFF, words >> 16), dim=-1).reshape(LAST, 4096)
    mask = halves >= reference.dropout_threshold(0.1)
    assert torch.equal(dropout.dropout_apply(x, 0.1, 5, rescale=False)[-LAST:], x[-LAST:] * mask)
    a, d_projected = random(64, 4096, scale=4096**-0.5, seed=1), torch.zeros(530_000, 64, dtype=DTYPE, device=DEVICE)
    d_projected[-LAST:] = random(LAST, 64, seed=2)
    exact = (x[-LAST:] * mask).double()
    found = dropout.dropout_project(x, a, 0.1, 5)
    assert_no_worse(found[-LAST:], (x[-LAST:] * mask) @ a.T, exact @ a.double().T, 2)
    found = dropout.dropout_weight_gradient(d_projected, x, 0.1, 5)
    stock = d_projected[-LAST:].T @ (x[-LAST:] * mask)
    assert_no_worse(found, stock, d_projected[-LAST:].double().T @ exact, 3)
    target = x[-LAST:].double() + mask * (d_projected[-LAST:].double() @ a.double())
    stock = x[-LAST:] + mask * (d_projected[-LAST:] @ a)
    found = dropout.dropout_add_input_gradient_(x, d_projected, a, 0.1, 5)
    assert_no_worse(found[-LAST:], stock, target, 3)
