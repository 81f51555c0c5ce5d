"""LoRA linear groups without a GPU: torch's products, the same code as on one but for the fused dropout."""

from __future__ import annotations

import bitsandbytes
import pytest
import torch

from packloop.kernels import lora_linear, reference
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


@pytest.mark.parametrize("most_ranks", [8, 128])
@pytest.mark.parametrize(
    ("out_features", "present", "runs"),
    [
        ((16, 16, 16), (True, True, True), [[0, 1, 2]]),
        ((16, 16, 16), (True, False, True), [[0, 2]]),
        ((32, 8, 8), (True, True, True), [[0], [1, 2]]),
        ((8, 8, 16, 8), (True, True, False, True), [[0, 1], [3]]),
    ],
)
def test_members_of_one_shape_at_equal_distances_are_one_batched_product(
    out_features, present, runs, most_ranks: int, monkeypatch
):
    """Added to places as in a flat gradient, where A's lie in a row, then B's; returned where none are given."""
    monkeypatch.setattr(lora_linear, "_MOST_STACKED_RANKS", most_ranks)
    loras = [
        Lora(random(4, 32, seed=10 + i), random(o, 4, seed=20 + i), 0.5) if here else None
        for i, (o, here) in enumerate(zip(out_features, present))
    ]
    copies = AdapterCopies(torch.float64, torch.device("cpu"))
    group = copies.group(out_features, loras)
    copies.refresh()
    assert [[member[0] for member in run] for run in lora_linear._runs(group)] == runs
    x, dy = random(40, 32, seed=1), random(40, sum(out_features) + 3, seed=2)[:, : sum(out_features)]
    projected, spare = 0.5 * x @ group.a_RH.T, random(40, group.a_RH.shape[0] + 5)[:, : group.a_RH.shape[0]]
    flat = random(sum(master.numel() for lora in loras if lora for master in lora[:2]), seed=3)
    before, places = flat.clone(), {"a": [], "b": []}
    end = 0
    for name, index in (("a", 0), ("b", 1)):
        for lora in loras:
            if lora is None:
                places[name] += [None] if name == "b" else []
                continue
            places[name].append(flat[end : end + lora[index].numel()].view(lora[index].shape))
            end += lora[index].numel()

    d_projected, returned = lora_b_gradients(dy, projected, group, None, out=spare, into=places["b"])
    lora_a_gradient(d_projected, x, group, None, into=places["a"])
    _, made = lora_b_gradients(dy, projected, group, None)
    assert d_projected is spare
    added = flat - before
    expected_a, expected_b = [], []
    for (columns, ranks, b_Or), place, alone in zip(group.members(), returned, made):
        if b_Or is None:
            assert place is None
            assert alone is None
            continue
        torch.testing.assert_close(spare[:, ranks], 0.5 * dy[:, columns] @ b_Or, rtol=1e-12, atol=1e-12)
        expected_a.append(spare[:, ranks].T @ x)
        expected_b.append(dy[:, columns].T @ projected[:, ranks])
        torch.testing.assert_close(alone, expected_b[-1], rtol=1e-12, atol=1e-12)
    expected = torch.cat([gradient.flatten() for gradient in expected_a + expected_b])
    torch.testing.assert_close(added, expected, rtol=1e-11, atol=1e-11)


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
