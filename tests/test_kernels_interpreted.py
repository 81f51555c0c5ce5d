"""Every Triton kernel on the CPU, in Triton's interpreter, against the oracles.

test_interpreter.py runs this. float32 only: the interpreter's bf16 truncates, and its bf16 products are
wrong. Index overflow cannot be shown here (2^31 elements take hours); tests/gpu does it.
"""

from __future__ import annotations

import pytest
import torch
from interpreter import interpreted

from packloop.kernels import dropout, nf4, reference, rms_norm, rope, swiglu
from packloop.kernels.adapters import AdapterCopies
from packloop.kernels.linear_cross_entropy import cross_entropy_
from packloop.kernels.lora_linear import (
    Dropout,
    Lora,
    lora_a_gradient,
    lora_b_gradients,
    lora_group_forward,
    lora_input_gradient,
)

pytestmark = pytest.mark.usefixtures("poisoned_outputs")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def poisoned_columns(
    num_rows: int, num_columns: int, left: int = 8, right: int = 5
) -> tuple[torch.Tensor, torch.Tensor]:
    """A buffer of NaN and a slice of its columns to be written."""
    buffer = torch.full((num_rows, left + num_columns + right), float("nan"))
    return buffer, buffer[:, left : left + num_columns]


def assert_only_slice_written(buffer: torch.Tensor, view: torch.Tensor) -> None:
    assert not view.isnan().any()
    assert int(buffer.isnan().sum()) == buffer.numel() - view.numel()


def assert_near(value: torch.Tensor, target: torch.Tensor) -> None:
    torch.testing.assert_close(value, target, rtol=2e-6, atol=2e-6)


# RMSNorm


@interpreted
@pytest.mark.parametrize(("num_tokens", "num_features"), [(1, 1), (3, 63), (7, 100), (2, 128), (5, 1000)])
def test_add_rms_norm_and_every_gradient(num_tokens: int, num_features: int):
    residual, update = (random(num_tokens, num_features, seed=seed).requires_grad_() for seed in (0, 1))
    weight = random(num_features, seed=2).requires_grad_()
    found = rms_norm.add_rms_norm(residual, update, weight, 1e-5)
    expected = reference.add_rms_norm(residual, update, weight, 1e-5)
    gradients = [random(num_tokens, num_features, seed=seed) for seed in (3, 4)]
    for value, target in zip(found, expected):
        assert_near(value, target)
    leaves = (residual, update, weight)
    targets = torch.autograd.grad(expected, leaves, gradients)
    for value, target in zip(torch.autograd.grad(found, leaves, gradients), targets):
        torch.testing.assert_close(value, target, rtol=1e-5, atol=1e-5)


@interpreted
def test_rms_norm_alone_and_frozen():
    x, weight, dy = random(6, 48).requires_grad_(), random(48, seed=1), random(6, 48, seed=2)
    found, expected = rms_norm.rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6)
    assert_near(found, expected)
    assert_near(*(torch.autograd.grad(y, x, dy)[0] for y in (found, expected)))


@interpreted
def test_rms_norm_on_strided_rows_and_over_its_inputs():
    wide = random(5, 200)
    residual, update = wide[:, 8:72], wide[:, 100:164]
    weight = random(64, seed=1)
    expected = reference.add_rms_norm(residual, update, weight, 1e-5)
    buffer, view = poisoned_columns(5, 64)
    total, normed, rstd = rms_norm.add_rms_norm_forward(
        residual, update, weight, 1e-5, residual_out=update, normed_out=view
    )
    assert total.data_ptr() == update.data_ptr()
    assert_near(total, expected[0])
    assert_near(normed, expected[1])
    assert_only_slice_written(buffer, view)
    d_normed, d_total = random(5, 64, seed=3), random(5, 64, seed=4)
    target = reference.rms_norm_backward(d_normed, total, weight, rstd)[0] + d_total
    found, d_weight = rms_norm.add_rms_norm_backward(d_normed, d_total, total, weight, rstd, d_residual=d_total)
    assert_near(found, target)
    assert d_weight is None
    assert found.data_ptr() == d_total.data_ptr()


# RoPE


@interpreted
@pytest.mark.parametrize("num_key_heads", [8, 2, 1])
@pytest.mark.parametrize(("num_tokens", "head_dim"), [(1, 64), (9, 128), (7, 6)])
def test_rope_and_its_gradient(num_tokens: int, head_dim: int, num_key_heads: int):
    inv_freq = 1.0 / 10000 ** (torch.arange(0, head_dim, 2) / head_dim)
    cos_PD, sin_PD = reference.rope_tables(inv_freq, 40)
    positions_T = torch.randint(0, 40, (num_tokens,), generator=torch.Generator().manual_seed(5), dtype=torch.int32)
    leaves = tuple(random(num_tokens, heads * head_dim, seed=heads).requires_grad_() for heads in (8, num_key_heads))
    found = rope.rope(*leaves, cos_PD, sin_PD, positions_T)
    expected = [reference.rope(x.unflatten(1, (-1, head_dim)), cos_PD, sin_PD, positions_T).flatten(1) for x in leaves]
    gradients = [torch.randn_like(x) for x in leaves]
    for value, target in zip(found, expected):
        assert_near(value, target)
    for value, target in zip(
        torch.autograd.grad(found, leaves, gradients), torch.autograd.grad(expected, leaves, gradients)
    ):
        assert_near(value, target)


@interpreted
def test_rope_in_place_in_slices_of_one_buffer():
    qkv, positions_T = random(6, 4 * 16 + 2 * 16 + 2 * 16), torch.tensor([0, 1, 2, 0, 1, 30])
    before = qkv.clone()
    cos_PD, sin_PD = reference.rope_tables(torch.rand(8), 31)
    q, k = qkv[:, :64], qkv[:, 64:96]
    rope.rope_(q, k, cos_PD, sin_PD, positions_T)
    for view, source in ((q, before[:, :64]), (k, before[:, 64:96])):
        assert_near(view, reference.rope(source.unflatten(1, (-1, 16)), cos_PD, sin_PD, positions_T).flatten(1))
    assert torch.equal(qkv[:, 96:], before[:, 96:])
    rope.rope_(q, k, cos_PD, sin_PD, positions_T, inverse=True)
    assert_near(qkv, before)


# SwiGLU


@interpreted
@pytest.mark.parametrize(("num_tokens", "num_features"), [(1, 1), (3, 63), (4, 100), (2, 1000), (2, 1100)])
def test_swiglu_and_every_gradient(num_tokens: int, num_features: int):
    leaves = tuple(random(num_tokens, num_features, seed=seed).requires_grad_() for seed in (0, 1))
    found, expected = swiglu.swiglu(*leaves), reference.swiglu(*leaves)
    assert_near(found, expected)
    dy = random(num_tokens, num_features, seed=2)
    for value, target in zip(torch.autograd.grad(found, leaves, dy), torch.autograd.grad(expected, leaves, dy)):
        assert_near(value, target)


@interpreted
def test_swiglu_on_halves_of_one_buffer_over_its_inputs():
    gate_up, d_hidden = random(5, 2 * 40), random(5, 40, seed=1)
    gate, up = gate_up.chunk(2, dim=1)
    product, expected = reference.swiglu(gate, up), reference.swiglu_backward(d_hidden, gate, up)
    buffer, view = poisoned_columns(5, 40)
    assert_near(swiglu.swiglu_forward(gate, up, out=view), product)
    assert_only_slice_written(buffer, view)
    swiglu.swiglu_backward(d_hidden, gate, up, d_gate=gate, d_up=up, hidden_out=d_hidden)
    assert_near(gate_up, torch.cat(expected, dim=1))
    assert torch.equal(d_hidden, view)  # the product is rebuilt bit for bit


@interpreted
def test_swiglu_on_every_other_column_over_its_inputs():
    gate_up, d_hidden = random(5, 2 * 40), random(5, 40, seed=1)
    gate, up = gate_up[:, 0::2], gate_up[:, 1::2]
    product, expected = reference.swiglu(gate, up), reference.swiglu_backward(d_hidden, gate, up)
    assert_near(swiglu.swiglu_forward(gate, up), product)
    apart = swiglu.swiglu_backward(d_hidden, gate, up)
    swiglu.swiglu_backward(d_hidden, gate, up, d_gate=gate, d_up=up, hidden_out=d_hidden)
    for found, halved, value in zip((gate, up), apart, expected):
        assert_near(found, value)
        assert torch.equal(found, halved)
    assert_near(d_hidden, product)
    with pytest.raises(ValueError, match="adjacent features"):
        swiglu.swiglu_forward(gate, up.contiguous())


# NF4


@interpreted
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize(("num_rows", "num_columns", "blocksize"), [(1, 64, 64), (40, 136, 64), (130, 264, 128)])
def test_nf4_is_bitsandbytes_bit_for_bit(num_rows: int, num_columns: int, blocksize: int, double_quant: bool):
    import bitsandbytes.functional

    packed, state = bitsandbytes.functional.quantize_4bit(
        random(num_rows, num_columns), blocksize=blocksize, compress_statistics=double_quant, quant_type="nf4"
    )
    expected = bitsandbytes.functional.dequantize_4bit(packed, state)
    assert torch.equal(nf4.dequantize(packed, state), expected)
    buffer, view = poisoned_columns(num_rows, num_columns)
    assert torch.equal(nf4.dequantize(packed, state, out=view), expected)
    assert_only_slice_written(buffer, view)


@interpreted
@pytest.mark.parametrize("interleaved", [False, True])
def test_nf4_rows_of_a_group_one_below_the_other_or_in_turns(interleaved: bool):
    import bitsandbytes.functional

    pairs = [
        bitsandbytes.functional.quantize_4bit(random(40, 128, seed=seed), blocksize=64, quant_type="nf4")
        for seed in (0, 1)
    ]
    dense = [bitsandbytes.functional.dequantize_4bit(*pair) for pair in pairs]
    expected = torch.stack(dense, dim=1).flatten(0, 1) if interleaved else torch.cat(dense)
    for by in ("triton", "torch"):
        buffer, view = poisoned_columns(80, 128)
        assert torch.equal(nf4.Nf4Group(pairs, interleaved=interleaved).dequantize(view, by=by), expected)
        assert_only_slice_written(buffer, view)


# Dropout and the products with a dropped-out input


@interpreted
@pytest.mark.parametrize("shape", [(1,), (3, 7), (4097,), (20, 1000)])
@pytest.mark.parametrize("seed", [0, 2**62 + 12345, torch.tensor(2**40 + 9)])
def test_dropout_has_the_references_mask(shape: tuple[int, ...], seed):
    x = random(*shape) + 10
    found = dropout.dropout_apply(x, 0.1, seed, stream=3)
    mask = reference.dropout_mask(shape, 0.1, seed, stream=3)
    assert torch.equal(found != 0, mask)
    assert_near(found, x * mask / reference.keep_probability(0.1))
    assert torch.equal(dropout.dropout_apply(x, 0.1, seed, stream=3, rescale=False), x * mask)


@interpreted
def test_the_masks_counter_is_64_bits_wide():
    import triton
    import triton.language as tl

    # `dropout` holds the kernel's helper; a counter above 2^32 stands for an element above 2^35.
    global kept_at
    kept_at = dropout._kept

    @triton.jit
    def kept_kernel(out_ptr, first_group, seed, stream, threshold):
        groups = first_group.to(tl.int64) * 1000 + tl.arange(0, 4)
        kept = kept_at(groups, seed, stream, threshold, [32])
        tl.store(out_ptr + tl.arange(0, 32), kept.to(tl.int32))

    first = 9_000_001  # times 1000 is above 2^33
    found = torch.zeros(32, dtype=torch.int32)
    kept_kernel[(1,)](found, first, 5, 0, reference.dropout_threshold(0.5))
    counters = torch.arange(4, dtype=torch.int64) + first * 1000
    words = torch.stack(reference._philox(counters, torch.tensor(5), 0), dim=-1)
    halves = torch.stack((words & 0xFFFF, words >> 16), dim=-1).reshape(-1)
    assert torch.equal(found.bool(), halves >= 32768)


@interpreted
@pytest.mark.parametrize(("num_tokens", "num_features", "num_ranks"), [(1, 8, 1), (63, 72, 12), (100, 64, 40)])
def test_products_with_a_dropped_out_input(num_tokens: int, num_features: int, num_ranks: int):
    x = random(num_tokens, num_features + 16)[:, 8:-8]
    a, d_projected = random(num_ranks, num_features, seed=1), random(num_tokens, num_ranks, seed=2)
    mask = reference.dropout_mask((num_tokens, num_features), 0.1, 77, stream=2)
    buffer, view = poisoned_columns(num_tokens, num_ranks)
    found = dropout.dropout_project(x, a, 0.1, 77, stream=2, scale=0.5, out=view)
    torch.testing.assert_close(found, 0.5 * (x * mask) @ a.T, rtol=1e-5, atol=1e-5)
    assert_only_slice_written(buffer, view)
    found = dropout.dropout_weight_gradient(d_projected, x, 0.1, 77, stream=2)
    torch.testing.assert_close(found, d_projected.T @ (x * mask), rtol=1e-5, atol=1e-5)
    before = random(num_tokens, num_features, seed=3)
    buffer, view = poisoned_columns(num_tokens, num_features)
    view.copy_(before)
    dropout.dropout_add_input_gradient_(view, d_projected, a, 0.1, 77, stream=2)
    torch.testing.assert_close(view, before + mask * (d_projected @ a), rtol=1e-5, atol=1e-5)
    assert_only_slice_written(buffer, view)


@interpreted
def test_token_splits_of_the_weight_gradient_add_up():
    # 32-token blocks and 8 a split: 600 tokens make 2 splits, the last one partly empty.
    x, d_projected = random(600, 16), random(600, 3, seed=1)
    mask = reference.dropout_mask((600, 16), 0.3, 1)
    found = dropout.dropout_weight_gradient(d_projected, x, 0.3, 1)
    torch.testing.assert_close(found, d_projected.T @ (x * mask), rtol=1e-5, atol=2e-5)
    assert torch.equal(found, dropout.dropout_weight_gradient(d_projected, x, 0.3, 1))


# LoRA groups


@interpreted
def test_every_adapter_is_copied_and_copied_again_after_a_step():
    loras = [Lora(random(4, 48, seed=1), random(24, 4, seed=2), 0.5), None, Lora(random(3, 48), random(5, 3), 0.5)]
    copies = AdapterCopies(torch.float32, torch.device("cpu"))
    group = copies.group((24, 8, 5), loras)
    for _ in range(2):
        copies.refresh()
        assert torch.equal(group.a_RH, torch.cat([loras[0].a_rH, loras[2].a_rH]))
        expected = torch.zeros(37, 7)
        expected[:24, :4], expected[32:, 4:] = loras[0].b_Or, loras[2].b_Or
        assert torch.equal(group.b_OR, expected)
        for lora in (loras[0], loras[2]):
            lora.a_rH.mul_(1.5)
            lora.b_Or.add_(1.0)


@interpreted
def test_lora_group_with_dropout():
    x, out_features = random(37, 48).requires_grad_(), (24, 8, 16)
    weights = [random(o, 48, seed=o) for o in out_features]
    loras = [Lora(random(4, 48).requires_grad_(), random(o, 4, seed=o).requires_grad_(), 0.5) for o in out_features]
    loras[1] = None
    mask = reference.dropout_mask((37, 48), 0.1, 11, stream=3)
    expected = torch.cat(
        [
            reference.lora_linear(
                x, weight, *(lora or ()), keep_mask_TH=mask, keep_probability=reference.keep_probability(0.1)
            )
            for weight, lora in zip(weights, loras)
        ],
        dim=1,
    )
    leaves = [x, *(master for lora in loras if lora is not None for master in lora[:2])]
    dy = random(*expected.shape, seed=9)
    dx, da_0, db_0, da_2, db_2 = torch.autograd.grad(expected, leaves, dy)

    copies, dropout_ = AdapterCopies(torch.float32, torch.device("cpu")), Dropout(0.1, 11, 3)
    group = copies.group(out_features, loras)
    copies.refresh()
    found, projected = lora_group_forward(x.detach(), weights, group, dropout_)
    d_projected, d_b = lora_b_gradients(dy, projected, group, dropout_)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)
    pairs = [
        (lora_input_gradient(dy, d_projected, weights, group, dropout_), dx),
        (lora_a_gradient(d_projected, x.detach(), group, dropout_), torch.cat([da_0, da_2])),
        (d_b[0], db_0),
        (d_b[2], db_2),
    ]
    assert d_b[1] is None
    for value, target in pairs:
        torch.testing.assert_close(value, target, rtol=1e-5, atol=5e-5)


# Head


@interpreted
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("vocabulary", [40, 1000])
def test_loss_and_gradient_of_weighted_targets(vocabulary: int, weighted: bool):
    logits, labels = random(5, vocabulary), torch.tensor([3, 0, vocabulary - 1, 7, 7])
    weights = torch.tensor([1.0, 3.0, 2.0, 1.0, 17.0]) if weighted else None
    by_torch = logits.clone()
    losses = [
        cross_entropy_(x, labels, weights, needs_gradient=True, by=by)
        for x, by in ((logits, "triton"), (by_torch, "torch"))
    ]
    assert_near(*losses)
    assert_near(logits, by_torch)
