"""LoRA linear groups without a GPU: torch's products, the same code as on one but for the fused dropout."""

from __future__ import annotations

import bitsandbytes
import peft
import pytest
import torch
from torch import nn

from packloop.kernels import reference
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
from packloop.kernels.nf4 import Nf4Weight

OUT_FEATURES = (24, 8, 16)


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def make_loras(present: tuple[bool, ...], *, dtype: torch.dtype = torch.float64, num_features: int = 32):
    return [
        Lora(
            random(4, num_features, dtype=dtype, seed=10 + i).requires_grad_(),
            random(num_outputs, 4, dtype=dtype, seed=20 + i).requires_grad_(),
            0.5,
        )
        if has_lora
        else None
        for i, (num_outputs, has_lora) in enumerate(zip(OUT_FEATURES, present))
    ]


def expected_outputs(x, weights, loras, dropout: Dropout | None = None) -> torch.Tensor:
    p = 0.0 if dropout is None else dropout.p
    mask = None if dropout is None else reference.dropout_mask(tuple(x.shape), p, dropout.seed, stream=dropout.stream)
    return torch.cat(
        [
            reference.lora_linear(
                x,
                weight,
                *(() if lora is None else lora),
                keep_mask_TH=mask,
                keep_probability=reference.keep_probability(p),
            )
            for weight, lora in zip(weights, loras)
        ],
        dim=1,
    )


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("present", [(True, True, True), (True, False, True), (False, False, False)])
def test_outputs_and_every_gradient_are_the_oracles(present: tuple[bool, ...], joined: bool, p: float):
    x = random(63, 32).requires_grad_()
    weights = [random(o, 32, seed=30 + i) for i, o in enumerate(OUT_FEATURES)]
    loras = make_loras(present)
    dropout = Dropout(p, seed=123, stream=5)
    handles = [DenseWeight(torch.cat(weights))] if joined else [DenseWeight(weight) for weight in weights]
    found = lora_linear_group(x, handles, OUT_FEATURES, loras, dropout=dropout)
    expected = expected_outputs(x, weights, loras, dropout)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    leaves = [x, *(master for lora in loras if lora is not None for master in lora[:2])]
    dy = random(*found.shape, seed=40)
    gradients = zip(torch.autograd.grad(found, leaves, dy), torch.autograd.grad(expected, leaves, dy))
    for value, target in gradients:
        torch.testing.assert_close(value, target, rtol=1e-12, atol=1e-12)


def test_gradients_stand_up_to_finite_differences():
    x, loras = random(5, 32).requires_grad_(), make_loras((True, False, True))
    weight = DenseWeight(random(sum(OUT_FEATURES), 32, seed=3))

    def outputs(x, a0, b0, a2, b2):
        members = [Lora(a0, b0, 0.5), None, Lora(a2, b2, 0.5)]
        return lora_linear_group(x, [weight], OUT_FEATURES, members, dropout=Dropout(0.2, 9))

    torch.autograd.gradcheck(outputs, (x, *loras[0][:2], *loras[2][:2]))


def test_it_is_pefts_layer_at_dropout_zero():
    torch.manual_seed(0)
    model = nn.ModuleDict({"q_proj": nn.Linear(32, 24, bias=False), "v_proj": nn.Linear(32, 16, bias=False)})
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    layers = peft.LoraModel(model, config, "default").model
    x = torch.randn(2, 10, 32, requires_grad=True)
    expected = torch.cat([layers["q_proj"](x), layers["v_proj"](x)], dim=-1)
    loras = [
        Lora(layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"])
        for layer in layers.values()
    ]
    found = lora_linear_group(x, [DenseWeight(layer.base_layer.weight) for layer in layers.values()], (24, 16), loras)
    torch.testing.assert_close(found, expected)
    leaves = [x, *(master for lora in loras for master in lora[:2])]
    dy = torch.randn_like(found)
    for value, target in zip(torch.autograd.grad(found, leaves, dy), torch.autograd.grad(expected, leaves, dy)):
        torch.testing.assert_close(value, target, rtol=1e-5, atol=1e-5)


def test_masters_are_float32_and_accumulate_under_a_bf16_base():
    x = random(40, 32, dtype=torch.bfloat16).requires_grad_()
    loras = make_loras((True, True, True), dtype=torch.float32)
    weight = DenseWeight(random(sum(OUT_FEATURES), 32, dtype=torch.bfloat16, seed=3))
    for _ in range(2):
        lora_linear_group(x, [weight], OUT_FEATURES, loras).float().sum().backward()
    gradients = [master.grad.clone() for lora in loras for master in lora[:2]]
    assert all(gradient.dtype == torch.float32 for gradient in gradients)
    once = torch.autograd.grad(
        lora_linear_group(x, [weight], OUT_FEATURES, loras).float().sum(), [m for lora in loras for m in lora[:2]]
    )
    for gradient, single in zip(gradients, once):
        assert torch.equal(gradient, 2 * single)


def test_dropout_repeats_itself_under_checkpointing_bit_for_bit():
    x, loras = random(40, 32, dtype=torch.float32).requires_grad_(), make_loras((True,) * 3, dtype=torch.float32)
    weight = DenseWeight(random(sum(OUT_FEATURES), 32, dtype=torch.float32, seed=3))
    seed = torch.tensor(77)

    def outputs(x):
        return lora_linear_group(x, [weight], OUT_FEATURES, loras, dropout=Dropout(0.1, seed)).square()

    leaves = [x, *(master for lora in loras for master in lora[:2])]
    plain = torch.autograd.grad(outputs(x).sum(), leaves)
    recomputed = torch.autograd.grad(torch.utils.checkpoint.checkpoint(outputs, x, use_reentrant=False).sum(), leaves)
    for value, target in zip(recomputed, plain):
        assert torch.equal(value, target)


def test_an_nf4_base_is_used_as_bitsandbytes_dequantises_it():
    weights = [bitsandbytes.nn.Params4bit(random(o, 64, dtype=torch.float32), quant_type="nf4") for o in (16, 24)]
    weights = [weight._quantize(torch.device("cpu")) for weight in weights]
    dense = [bitsandbytes.functional.dequantize_4bit(w.data, w.quant_state) for w in weights]
    handle = Nf4Weight(tuple(weights), torch.float32)
    assert torch.equal(handle.dense(), torch.cat(dense))
    x = random(9, 64, dtype=torch.float32).requires_grad_()
    loras = [None, Lora(random(4, 64, dtype=torch.float32), random(24, 4, dtype=torch.float32), 2.0)]
    found = lora_linear_group(x, [handle], (16, 24), loras)
    torch.testing.assert_close(found, expected_outputs(x, dense, loras))


def test_no_gradient_is_made_for_an_input_that_needs_none():
    class Counted:
        calls = 0

        def dense(self) -> torch.Tensor:
            Counted.calls += 1
            return random(sum(OUT_FEATURES), 32)

    loras = make_loras((True,) * 3)
    x = random(6, 32)
    lora_linear_group(x, [Counted()], OUT_FEATURES, loras).sum().backward()
    assert Counted.calls == 1  # backward did not ask for the base weight
    assert x.grad is None
    assert all(master.grad is not None for lora in loras for master in lora[:2])


@pytest.mark.parametrize("dy_in_pieces", [True, False])
@pytest.mark.parametrize("joined", [True, False])
def test_raw_backward_takes_strided_slices_pieces_and_buffers(joined: bool, dy_in_pieces: bool):
    x = random(11, 32).requires_grad_()
    weights = [random(o, 32, seed=30 + i) for i, o in enumerate(OUT_FEATURES)]
    loras = make_loras((True, False, True))
    group = join_loras(OUT_FEATURES, loras, torch.float64)
    blocks = [torch.cat(weights)] if joined else weights
    out = torch.full((11, 60), float("nan"), dtype=torch.float64)
    y, projected = lora_group_forward(x.detach(), blocks, group, out=out[:, 6:54])
    expected = expected_outputs(x, weights, loras)
    torch.testing.assert_close(y, expected)
    assert bool(out[:, :6].isnan().all() and out[:, 54:].isnan().all())
    dy = random(11, 60, seed=41)[:, 4:52]
    leaves = [x, *loras[0][:2], *loras[2][:2]]
    dx_target, *targets = torch.autograd.grad(expected, leaves, dy)
    given = list(dy.split(OUT_FEATURES, dim=1)) if dy_in_pieces else dy
    buffer = torch.full((11, 40), float("nan"), dtype=torch.float64)
    dx, gradients = lora_group_backward(given, x.detach(), projected, blocks, group, dx=buffer[:, :32])
    torch.testing.assert_close(dx, dx_target)
    assert dx.data_ptr() == buffer.data_ptr()
    assert gradients[1] is None
    for value, target in zip([*gradients[0], *gradients[2]], targets):
        torch.testing.assert_close(value, target)


@pytest.mark.parametrize("dropout", [None, Dropout(0.2, 5)])
def test_the_extended_weight_gives_the_same_results(dropout: Dropout | None):
    loras = make_loras((True, False, True))
    group = join_loras(OUT_FEATURES, loras, torch.float64)
    num_outputs, num_ranks = sum(OUT_FEATURES), 8
    weight = ExtendedWeight.allocate(32, group, dtype=torch.float64, device="cpu")
    weight.base.copy_(random(num_outputs, 32, seed=3))
    for _ in range(2):  # writing the adapters again replaces them
        weight.write_adapters(group)
    x = torch.full((13, 32 + num_ranks), float("nan"), dtype=torch.float64)
    x[:, :32] = random(13, 32)
    dy = torch.full((13, num_outputs + num_ranks), float("nan"), dtype=torch.float64)
    dy[:, :num_outputs] = random(13, num_outputs, seed=4)
    y = extended_group_forward(x, weight, group, dropout)
    dx, gradients = extended_group_backward(dy, x, weight, group, dropout)
    y_target, projected = lora_group_forward(x[:, :32], [weight.base], group, dropout)
    dx_target, targets = lora_group_backward(dy[:, :num_outputs], x[:, :32], projected, [weight.base], group, dropout)
    torch.testing.assert_close(y, y_target)
    torch.testing.assert_close(dx, dx_target)
    for pair, target in zip(gradients, targets):
        assert (pair is None) == (target is None)
        for value, wanted in zip(pair or (), target or ()):
            torch.testing.assert_close(value, wanted)


def test_adapters_that_do_not_fit_are_refused():
    x, weight = random(3, 32), DenseWeight(random(48, 32))
    good = make_loras((True, True, True))
    with pytest.raises(ValueError, match="2 adapters for 3 linear layers"):
        lora_linear_group(x, [weight], OUT_FEATURES, good[:2])
    with pytest.raises(ValueError, match=r"B \(8, 4\) on 24 outputs"):
        lora_linear_group(x, [weight], OUT_FEATURES, [good[1], None, None])
    with pytest.raises(ValueError, match="one scaling"):
        lora_linear_group(x, [weight], OUT_FEATURES, [good[0], good[1]._replace(scaling=1.0), None])
    with pytest.raises(ValueError, match="48 rows in all"):
        lora_linear_group(x, [DenseWeight(random(40, 32))], OUT_FEATURES, good)
