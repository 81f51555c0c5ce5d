"""Dropout and LoRA groups on a GPU in bf16, as the fused layer calls them, by the rule of kernel_oracle.py."""

from __future__ import annotations

import bitsandbytes.nn
import pytest
import torch
from kernel_oracle import DEVICE, DTYPE, assert_no_worse, gradient_of, judge, poisoned_memory, random

from packloop.kernels import dropout, nf4, reference
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

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture(autouse=True)
def _poisoned_outputs():
    with poisoned_memory():
        yield


def dropped(x: torch.Tensor, p: float, seed: int, stream: int = 0) -> torch.Tensor:
    return reference.dropout_mask(tuple(x.shape), p, seed, stream=stream, device=x.device)


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


# LoRA groups

# Which members have adapters, outputs of each, inputs.
GROUPS = {
    "qkv, adapters on q and v": ((True, False, True), (4096, 4096, 4096), 4096),
    "qkv with grouped heads": ((True, True, True), (4096, 1024, 1024), 4096),
    "gate and up": ((True, True), (11008, 11008), 4096),
    "down": ((True,), (4096,), 11008),
    "small and odd": ((False, True), (72, 40), 200),
}
SCALING = 0.25


def make_loras(present: tuple[bool, ...], out_features: tuple[int, ...], num_features: int, rank: int = 64):
    """Adapters with float32 masters; B is not zero, as after some steps."""
    return [
        Lora(
            random(rank, num_features, scale=num_features**-0.5, seed=20 + i, dtype=torch.float32).requires_grad_(),
            random(o, rank, scale=0.05, seed=30 + i, dtype=torch.float32).requires_grad_(),
            SCALING,
        )
        if has_lora
        else None
        for i, (o, has_lora) in enumerate(zip(out_features, present))
    ]


def make_weights(out_features: tuple[int, ...], num_features: int) -> list[torch.Tensor]:
    return [random(o, num_features, scale=num_features**-0.5, seed=10 + i) for i, o in enumerate(out_features)]


def copies_of(out_features: tuple[int, ...], loras: list[Lora | None]) -> LoraGroup:
    """The group in bf16, as the fused layer has it."""
    copies = AdapterCopies(DTYPE, torch.device(DEVICE))
    group = copies.group(out_features, loras)
    copies.refresh()
    return group


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


class Places:
    """Where the masters' gradients are added up: float32, those of A in one piece as in the engine's flat buffer.

    A's hold ones already, to which the gradient is added.
    """

    def __init__(self, loras: list[Lora | None]):
        present = [lora for lora in loras if lora is not None]
        stacked = torch.ones(sum(lora.a_rH.shape[0] for lora in present), present[0].a_rH.shape[1], device=DEVICE)
        self.a = list(stacked.split([lora.a_rH.shape[0] for lora in present]))
        self.b = [None if lora is None else torch.zeros_like(lora.b_Or) for lora in loras]

    def gradients(self) -> list[torch.Tensor]:
        """For each adapter A's, then B's."""
        d_b = [place for place in self.b if place is not None]
        return [gradient for a, b in zip(self.a, d_b, strict=True) for gradient in (a - 1, b)]


def judge_group(y, dx, places: Places, x: torch.Tensor, weights, loras, dropout_: Dropout | None) -> None:
    masters = [master for lora in loras if lora is not None for master in lora[:2]]

    def stock(x, *given):
        remaining = iter(given)
        members = [None if lora is None else Lora(next(remaining), next(remaining), SCALING) for lora in loras]
        return stock_group(x, weights, members, dropout_)

    judge(((y,), (dx, *places.gradients())), stock, stock, [x.detach().requires_grad_(), *masters])


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("name", list(GROUPS))
@pytest.mark.parametrize("num_tokens", [1, 63, 1000, 4097])
def test_a_group_over_a_dense_base(num_tokens: int, name: str, p: float):
    present, out_features, num_features = GROUPS[name]
    weights, loras = make_weights(out_features, num_features), make_loras(present, out_features, num_features)
    x, dropout_ = random(num_tokens, num_features), Dropout(p, 11, 3) if p else None
    group = copies_of(out_features, loras)
    y, projected = lora_group_forward(x, weights, group, dropout_)
    dy, places = gradient_of(y), Places(loras)
    d_projected, _ = lora_b_gradients(dy, projected, group, dropout_, into=places.b)
    lora_a_gradient(d_projected, x, group, dropout_, into=places.a)
    dx = lora_input_gradient(dy, d_projected, weights, group, dropout_)
    judge_group(y, dx, places, x, weights, loras, dropout_)


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("name", ["qkv, adapters on q and v", "qkv with grouped heads", "gate and up", "down"])
def test_a_group_over_an_nf4_base(name: str, p: float):
    """The adapters lie beside the dequantised weights, and their sums ride in the base's products."""
    present, out_features, num_features = GROUPS[name]
    loras, group_dropout = make_loras(present, out_features, num_features), Dropout(p, 11, 3) if p else None
    dense = make_weights(out_features, num_features)
    members = [bitsandbytes.nn.Params4bit(weight, quant_type="nf4").to(DEVICE) for weight in dense]
    weights = [nf4.dequantize(member) for member in members]
    group = copies_of(out_features, loras)
    num_outputs, num_ranks = sum(out_features), group.a_RH.shape[0]
    made = GroupWeights(members, group, DTYPE)
    forward, backward = made(), made(for_backward=True)
    assert isinstance(forward, ExtendedWeight)

    x_wide = torch.full((1000, num_features + num_ranks), float("nan"), dtype=DTYPE, device=DEVICE)
    x_wide[:, :num_features] = random(1000, num_features)
    x, projected = x_wide[:, :num_features], x_wide[:, num_features:]
    y = extended_group_forward(x_wide, forward, group, group_dropout)
    dy_wide = torch.full((1000, num_outputs + num_ranks), float("nan"), dtype=DTYPE, device=DEVICE)
    dy_wide[:, :num_outputs] = gradient_of(y)
    dy, spare = dy_wide[:, :num_outputs], dy_wide[:, num_outputs:]
    places = Places(loras)
    d_projected, _ = lora_b_gradients(dy, projected, group, group_dropout, out=spare, into=places.b)
    lora_a_gradient(d_projected, x, group, group_dropout, into=places.a)
    if group_dropout is None:
        dx = extended_input_gradient(dy_wide, backward)
    else:
        dx = lora_input_gradient(dy, d_projected, [backward.base], group, group_dropout)
    judge_group(y, dx, places, x, weights, loras, group_dropout)
