"""LoRA linear groups without a GPU: torch's products, the same code as on one but for the fused dropout."""

from __future__ import annotations

import bitsandbytes
import pytest
import torch

from packloop.kernels import reference
from packloop.kernels.adapters import AdapterCopies
from packloop.kernels.base_weights import GroupWeights
from packloop.kernels.extended_weight import ExtendedWeight, extended_group_forward, extended_input_gradient
from packloop.kernels.lora_linear import (
    Dropout,
    Lora,
    LoraGroup,
    lora_a_gradient,
    lora_b_gradients,
    lora_group_forward,
    lora_input_gradient,
)

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


def copies_of(loras, *, dtype: torch.dtype = torch.float64) -> LoraGroup:
    copies = AdapterCopies(dtype, torch.device("cpu"))
    group = copies.group(OUT_FEATURES, loras)
    copies.refresh()
    return group


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


@pytest.mark.parametrize("dropout", [None, Dropout(0.1, seed=123, stream=5), Dropout(0.2, seed=torch.tensor(9))])
@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("present", [(True, True, True), (True, False, True), (False, False, False)])
def test_outputs_and_every_gradient_are_the_oracles(present: tuple[bool, ...], joined: bool, dropout: Dropout | None):
    """y goes into a column slice of a wider buffer, and dy comes as one."""
    x, loras = random(63, 32).requires_grad_(), make_loras(present)
    weights = [random(o, 32, seed=30 + i) for i, o in enumerate(OUT_FEATURES)]
    expected = expected_outputs(x, weights, loras, dropout)
    dy = random(63, 60, seed=40)[:, 4:52]
    masters = [master for lora in loras if lora is not None for master in lora[:2]]
    dx, *targets = torch.autograd.grad(expected, [x, *masters], dy)

    group, blocks = copies_of(loras), [torch.cat(weights)] if joined else weights
    if group.a_RH is None:
        dropout = None
    out = torch.full((63, 60), float("nan"), dtype=torch.float64)
    found, projected = lora_group_forward(x.detach(), blocks, group, dropout, out=out[:, 6:54])
    assert bool(out[:, :6].isnan().all() and out[:, 54:].isnan().all())
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    d_projected, d_b = lora_b_gradients(dy, projected, group, dropout)
    found_dx = lora_input_gradient(dy, d_projected, blocks, group, dropout)
    torch.testing.assert_close(found_dx, dx, rtol=1e-12, atol=1e-12)
    assert [gradient is not None for gradient in d_b] == list(present)
    if group.a_RH is None:
        return
    d_a = lora_a_gradient(d_projected, x.detach(), group, dropout)
    torch.testing.assert_close(d_a, torch.cat(targets[::2]), rtol=1e-12, atol=1e-12)
    for value, target in zip([gradient for gradient in d_b if gradient is not None], targets[1::2], strict=True):
        torch.testing.assert_close(value, target, rtol=1e-12, atol=1e-12)


def test_gradients_of_the_masters_are_summed_in_float32_under_a_bf16_base():
    x, dy = random(400, 32, dtype=torch.bfloat16), random(400, 48, dtype=torch.bfloat16, seed=1)
    group = copies_of(make_loras((True, True, True), dtype=torch.float32), dtype=torch.bfloat16)
    weights = [random(48, 32, dtype=torch.bfloat16, seed=3)]
    _, projected = lora_group_forward(x, weights, group)
    d_projected, d_b = lora_b_gradients(dy, projected, group, None)
    d_a = lora_a_gradient(d_projected, x, group, None)
    targets = [dy[:, :24].double().T @ projected[:, :4].double(), d_projected.double().T @ x.double()]
    for value, target in zip([d_b[0], d_a], targets):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), target, rtol=1e-5, atol=1e-4)


def nf4_members(out_features: tuple[int, ...], num_features: int):
    members = [bitsandbytes.nn.Params4bit(random(o, num_features).float(), quant_type="nf4") for o in out_features]
    return [member._quantize(torch.device("cpu")) for member in members]


@pytest.mark.parametrize("dropout", [None, Dropout(0.2, 5)])
@pytest.mark.parametrize("kept", [False, True])
def test_an_nf4_base_with_its_adapters_beside_it_is_the_dense_one(dropout: Dropout | None, kept: bool):
    loras = make_loras((True, False, True), dtype=torch.float32, num_features=64)
    group, members = copies_of(loras, dtype=torch.float32), nf4_members(OUT_FEATURES, 64)
    dense = torch.cat([bitsandbytes.functional.dequantize_4bit(w.data, w.quant_state) for w in members])
    made = GroupWeights(members, group, torch.float32)
    assert made.dense_bytes == 4 * (48 + 8) * (64 + 8)
    if kept:
        made.keep()
    forward, backward = made(), made(for_backward=True)
    assert isinstance(forward, ExtendedWeight)
    assert (forward is backward) == kept
    assert torch.equal(forward.base, dense)

    x = torch.full((13, 64 + 8), float("nan"))
    x[:, :64] = random(13, 64, dtype=torch.float32)
    dy = torch.full((13, 48 + 8), float("nan"))
    dy[:, :48] = random(13, 48, dtype=torch.float32, seed=4)
    y_target, projected_target = lora_group_forward(x[:, :64], [dense], group, dropout)
    d_projected_target, _ = lora_b_gradients(dy[:, :48], projected_target, group, dropout)
    dx_target = lora_input_gradient(dy[:, :48], d_projected_target, [dense], group, dropout)

    torch.testing.assert_close(extended_group_forward(x, forward, group, dropout), y_target)
    torch.testing.assert_close(x[:, 64:], projected_target)
    d_projected, _ = lora_b_gradients(dy[:, :48], x[:, 64:], group, dropout, out=dy[:, 48:])
    assert d_projected.data_ptr() == dy[:, 48:].data_ptr()
    if dropout is None:  # with dropout the adapters' part of dx has a mask of its own
        torch.testing.assert_close(extended_input_gradient(dy, backward), dx_target)
    else:
        torch.testing.assert_close(
            lora_input_gradient(dy[:, :48], d_projected, [backward.base], group, dropout), dx_target
        )


def test_adapters_and_weights_that_do_not_fit_are_refused():
    good = make_loras((True, True, True))
    with pytest.raises(ValueError, match="one scaling"):
        copies_of([good[0], good[1]._replace(scaling=1.0), None])
    with pytest.raises(ValueError, match="48 rows in all"):
        lora_group_forward(random(3, 32), [random(40, 32)], copies_of(good))
    with pytest.raises(ValueError, match="either all NF4 or all dense"):
        GroupWeights([*nf4_members((24,), 32), random(8, 32)], copies_of(good), torch.float32)
