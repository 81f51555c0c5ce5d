"""The elementwise kernels and NF4 on a GPU in bf16, by the rule of kernel_oracle.py."""

from __future__ import annotations

import bitsandbytes.functional
import pytest
import torch
from kernel_oracle import DEVICE, DTYPE, assert_no_worse, compare, poisoned_memory, random

from packloop.kernels import dropout, nf4, reference, rms_norm, rope, swiglu

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture(autouse=True)
def _poisoned_outputs():
    with poisoned_memory():
        yield


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


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", [(1, 64), (130, 264), (1024, 4096), (4096, 4096), (11008, 4096), (4096, 11008)])
def test_nf4_is_bitsandbytes_bit_for_bit(shape: tuple[int, int], double_quant: bool):
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
