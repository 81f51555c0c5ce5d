"""The oracles against independent sources: autograd, Hugging Face, bitsandbytes, published vectors."""

from __future__ import annotations

import subprocess
import sys

import bitsandbytes.functional
import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from packloop.kernels import nf4, reference, rms_norm, rope, swiglu
from packloop.kernels.dropout import dropout_apply


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def test_rms_norm_is_hugging_faces_bit_for_bit():
    for dtype in (torch.float32, torch.bfloat16):
        stock = LlamaRMSNorm(40, eps=1e-5)
        stock.weight.data = random(40)
        stock.to(dtype)
        x_TH = random(9, 40, seed=1).to(dtype)
        assert torch.equal(reference.rms_norm(x_TH, stock.weight, 1e-5), stock(x_TH))


def test_rms_norm_backward_is_autograds():
    x_TH, weight_H, dy_TH = random(7, 24).requires_grad_(), random(24, seed=1).requires_grad_(), random(7, 24, seed=2)
    expected = torch.autograd.grad(reference.rms_norm(x_TH, weight_H, 1e-5), (x_TH, weight_H), dy_TH)
    rstd_T = torch.rsqrt(x_TH.detach().square().mean(-1) + 1e-5)
    found = reference.rms_norm_backward(dy_TH, x_TH.detach(), weight_H.detach(), rstd_T)
    for value, target in zip(found, expected):
        torch.testing.assert_close(value, target, rtol=1e-12, atol=1e-12)


def test_swiglu_backward_is_autograds():
    gate_TI, up_TI, dh_TI = (random(5, 12, seed=seed) for seed in range(3))
    gate_TI.requires_grad_()
    up_TI.requires_grad_()
    expected = torch.autograd.grad(torch.nn.functional.silu(gate_TI) * up_TI, (gate_TI, up_TI), dh_TI)
    for value, target in zip(reference.swiglu_backward(dh_TI, gate_TI, up_TI), expected):
        torch.testing.assert_close(value, target, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("head_dim", [8, 64, 128])
def test_rope_is_hugging_faces(head_dim: int):
    inv_freq = 1.0 / 10000 ** (torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    cos_PD, sin_PD = reference.rope_tables(inv_freq, 64)
    positions_T = torch.tensor([0, 1, 2, 0, 1, 63])
    x_THD = random(6, 3, head_dim)
    full_cos, full_sin = (torch.cat((table, table), -1)[positions_T].double()[None] for table in (cos_PD, sin_PD))
    stock, _ = apply_rotary_pos_emb(x_THD.transpose(0, 1)[None], x_THD.transpose(0, 1)[None], full_cos, full_sin)
    found = reference.rope(x_THD, cos_PD, sin_PD, positions_T)
    torch.testing.assert_close(found, stock[0].transpose(0, 1), rtol=1e-12, atol=1e-12)
    back = reference.rope(found, cos_PD, sin_PD, positions_T, inverse=True)
    torch.testing.assert_close(back, x_THD, rtol=1e-6, atol=1e-6)  # float32 tables: cos^2 + sin^2 is 1 to 1e-7


def test_rope_tables_hold_at_32k():
    inv_freq = 1.0 / 10000 ** (torch.arange(0, 128, 2, dtype=torch.float64) / 128)
    cos_PD, _ = reference.rope_tables(inv_freq, 32768)
    exact = torch.cos(32767 * inv_freq)
    assert (cos_PD[32767].double() - exact).abs().max() < 1e-7
    assert (torch.cos((32767 * inv_freq).bfloat16()).double() - exact).abs().max() > 0.1  # what bf16 angles would do


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("blocksize", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_nf4_is_bitsandbytes_bit_for_bit(double_quant: bool, blocksize: int, dtype: torch.dtype):
    weight = random(96, 200, dtype=dtype)
    packed, state = bitsandbytes.functional.quantize_4bit(
        weight, blocksize=blocksize, compress_statistics=double_quant, quant_type="nf4"
    )
    absmax = state.absmax
    if double_quant:
        outer = state.state2
        absmax = reference.nf4_absmax(absmax, outer.code, outer.absmax, state.offset, outer.blocksize)
    expected = bitsandbytes.functional.dequantize_4bit(packed, state)
    assert torch.equal(reference.nf4_dequantize(packed, absmax, (96, 200), dtype, blocksize), expected)
    assert torch.equal(nf4.dequantize(packed, state), expected)
    rows = torch.full((100, 220), float("nan"), dtype=dtype)
    assert torch.equal(nf4.dequantize(packed, state, out=rows[2:98, 4:204]), expected)
    assert int(rows.isnan().sum()) == 100 * 220 - 96 * 200


def test_nf4_refuses_another_type_and_a_wrong_buffer():
    packed, state = bitsandbytes.functional.quantize_4bit(random(64, 64, dtype=torch.float32), quant_type="fp4")
    with pytest.raises(ValueError, match="fp4"):
        nf4.dequantize(packed, state)
    packed, state = bitsandbytes.functional.quantize_4bit(random(64, 64, dtype=torch.float32), quant_type="nf4")
    with pytest.raises(ValueError, match="adjacent columns"):
        nf4.dequantize(packed, state, out=torch.empty(64, 64).T)


@pytest.mark.parametrize("num_key_heads", [8, 2, 1])
def test_attention_is_sdpa_document_by_document(num_key_heads: int):
    lengths = (5, 1, 9)
    q, k, v = random(15, 8, 16), random(15, num_key_heads, 16, seed=1), random(15, num_key_heads, 16, seed=2)
    document_ids = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    found = reference.attention(q, k, v, document_ids)
    parts = zip(q.split(lengths), k.split(lengths), v.split(lengths))
    expected = [
        torch.nn.functional.scaled_dot_product_attention(
            *(part.transpose(0, 1)[None] for part in triple), is_causal=True, enable_gqa=True
        )[0].transpose(0, 1)
        for triple in parts
    ]
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-12, atol=1e-12)


def test_linear_cross_entropy_by_hand():
    hidden, weight = random(3, 4), random(5, 4, seed=1)
    labels = torch.tensor([4, 0, 2])
    logits = hidden @ weight.T
    expected = sum(torch.logsumexp(row, 0) - row[label] for row, label in zip(logits, labels))
    torch.testing.assert_close(reference.linear_cross_entropy(hidden, weight, labels), expected)
    assert reference.linear_cross_entropy(hidden[:0], weight, labels[:0]) == 0


def test_philox_gives_the_published_vector():
    # philox4x32, 7 rounds, counter 0, key 0: kat_vectors of Random123.
    words = reference._philox(torch.zeros(1, dtype=torch.int64), torch.zeros((), dtype=torch.int64), 0)
    assert [int(word) for word in words] == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]


def test_dropout_mask_depends_on_seed_stream_and_element_only():
    mask = reference.dropout_mask((30, 40), 0.25, 7)
    assert torch.equal(mask, reference.dropout_mask((30, 40), 0.25, torch.tensor(7)))
    assert torch.equal(mask.reshape(-1)[:100], reference.dropout_mask((100,), 0.25, 7))
    others = [
        reference.dropout_mask((30, 40), 0.25, 8),
        reference.dropout_mask((30, 40), 0.25, 7 + 2**32),
        reference.dropout_mask((30, 40), 0.25, 7, stream=1),
    ]
    for other in others:  # two independent masks agree on 0.75^2 + 0.25^2 = 0.625 of 1200 elements, sd 0.014
        assert abs((mask == other).float().mean() - 0.625) < 0.07


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5])
def test_dropout_keeps_its_share_and_the_mean(p: float):
    kept = dropout_apply(torch.ones(400_000, dtype=torch.float64), p, 3)
    assert set(kept.unique().tolist()) == {0.0, 1 / reference.keep_probability(p)}
    share = (kept != 0).double().mean()
    assert abs(share - (1 - p)) < 5 * (p * (1 - p) / 400_000) ** 0.5
    halves = (kept != 0).double().reshape(-1, 8)
    correlation = torch.corrcoef(halves.T) - torch.eye(8, dtype=torch.float64)
    assert correlation.abs().max() < 5 / 50_000**0.5  # the 8 decisions of one Philox call are independent


def test_dropout_refuses_probabilities_and_seeds_out_of_range():
    for p in (-0.1, 1.0):
        with pytest.raises(ValueError, match="dropout probability"):
            dropout_apply(torch.ones(4), p, 0)
    with pytest.raises(ValueError, match="seed"):
        dropout_apply(torch.ones(4), 0.1, -1)


def test_without_a_gpu_the_public_functions_are_the_oracles_and_differentiate():
    x, update, weight = (random(*shape).requires_grad_() for shape in ((6, 16), (6, 16), (16,)))
    torch.autograd.gradcheck(lambda *a: rms_norm.add_rms_norm(*a, 1e-5), (x, update, weight))
    torch.autograd.gradcheck(lambda *a: rms_norm.rms_norm(*a, 1e-5), (x, weight))
    torch.autograd.gradcheck(swiglu.swiglu, (x, update))
    cos_PD, sin_PD = reference.rope_tables(torch.tensor([1.0, 0.1], dtype=torch.float64), 9)
    positions_T = torch.tensor([3, 0, 1, 2, 0, 8])
    q, k = random(6, 16).requires_grad_(), random(6, 4, seed=1).requires_grad_()
    # float64 tables, or the inverse rotation is the transpose only to float32's precision.
    angles = positions_T.max() * torch.rand(9, 2, dtype=torch.float64)
    torch.autograd.gradcheck(lambda q, k: rope.rope(q, k, angles.cos(), angles.sin(), positions_T), (q, k))
    found = rope.rope(q, k, cos_PD, sin_PD, positions_T)[0]
    torch.testing.assert_close(
        found.unflatten(1, (4, 4)), reference.rope(q.unflatten(1, (4, 4)), cos_PD, sin_PD, positions_T)
    )


def test_a_frozen_norm_gets_no_gradient():
    x, weight = random(3, 8).requires_grad_(), random(8)
    rms_norm.rms_norm(x, weight, 1e-5).sum().backward()
    assert weight.grad is None
    _, d_weight = rms_norm.add_rms_norm_backward(x.detach(), None, x.detach(), weight, torch.ones(3))
    assert d_weight is None


def test_swiglu_backward_works_over_its_inputs_and_rebuilds_the_product():
    gate_up, d_hidden = random(5, 24), random(5, 12, seed=1)
    gate, up = gate_up.chunk(2, dim=1)
    product, expected = reference.swiglu(gate, up), reference.swiglu_backward(d_hidden, gate, up)
    found = swiglu.swiglu_backward(d_hidden, gate, up, d_gate=gate, d_up=up, hidden_out=d_hidden)
    assert torch.equal(gate_up, torch.cat(expected, dim=1))
    assert found[0].data_ptr() == gate_up.data_ptr()
    assert torch.equal(d_hidden, product)


def test_shapes_that_do_not_fit_are_refused():
    cos = sin = torch.ones(4, 4)
    positions = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="heads \\* 8"):
        rope.rope_(torch.ones(3, 12), torch.ones(3, 8), cos, sin, positions)
    with pytest.raises(ValueError, match="float32"):
        rope.rope_(torch.ones(3, 8), torch.ones(3, 8), cos.bfloat16(), sin.bfloat16(), positions)
    with pytest.raises(ValueError, match="same number of tokens"):
        rope.rope_(torch.ones(3, 8), torch.ones(3, 8), cos, sin, positions[:2])
    with pytest.raises(ValueError, match="adjacent features"):
        swiglu.swiglu_forward(torch.ones(3, 4), torch.ones(4, 3).T)
    with pytest.raises(ValueError, match="both buffers or neither"):
        swiglu.swiglu_backward(*(torch.ones(3, 4) for _ in range(3)), d_gate=torch.ones(3, 4))


def test_the_kernels_import_where_triton_is_not_installed():
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from packloop.kernels import dropout, lora_linear, nf4, reference, rms_norm, rope, swiglu\n"
        "assert rms_norm.rms_norm(torch.ones(2, 4), torch.ones(4), 1e-5).shape == (2, 4)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
