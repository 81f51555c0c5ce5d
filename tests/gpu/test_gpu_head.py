"""Head and loss on a GPU: the loss, every gradient, the memory they take, and no stop of the GPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from kernel_oracle import DEVICE, compare, random

from packloop.kernels.linear_cross_entropy import linear_cross_entropy

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def make_case(num_slots: int, num_labels: int, vocabulary: int, num_features: int):
    """Hidden states, the head's weight, distinct slots in no order, their labels."""
    generator = torch.Generator(DEVICE).manual_seed(1)
    hidden = random(num_slots, num_features)
    weight = random(vocabulary, num_features, scale=2 * num_features**-0.5, seed=1)
    index = torch.randperm(num_slots, generator=generator, device=DEVICE)[:num_labels]
    ids = torch.randint(0, vocabulary, (num_labels,), generator=generator, device=DEVICE)
    return hidden, weight, index, ids


def plain(hidden: torch.Tensor, weight: torch.Tensor, index: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Hugging Face's: logits in the inputs' dtype, the loss of them in at least float32."""
    logits = hidden[index] @ weight.T
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), ids, reduction="sum")


@pytest.mark.parametrize("trains_head", [False, True])
@pytest.mark.parametrize(("vocabulary", "num_features"), [(300, 64), (8191, 200), (32000, 4096), (128256, 2048)])
@pytest.mark.parametrize(("num_slots", "num_labels"), [(1, 1), (63, 40), (1000, 1000), (4095, 3000)])
def test_loss_and_every_gradient(
    num_slots: int, num_labels: int, vocabulary: int, num_features: int, trains_head: bool
):
    hidden, weight, index, ids = make_case(num_slots, num_labels, vocabulary, num_features)
    inputs = [hidden.requires_grad_(), weight.requires_grad_(trains_head)]
    compare(
        lambda hidden, weight: linear_cross_entropy(hidden, weight, index, ids),
        lambda hidden, weight: plain(hidden, weight, index, ids),
        lambda hidden, weight: plain(hidden, weight, index, ids),
        inputs,
    )
    # bf16's ulp of a sum is wide: from the same logits the two losses are equal to float32's rounding.
    with torch.no_grad():
        found, stock = linear_cross_entropy(*inputs, index, ids), plain(*inputs, index, ids)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(stock.item(), rel=1e-4)


def test_slots_without_a_label_get_no_gradient():
    hidden, weight, index, ids = make_case(1000, 300, 32000, 512)
    (d_hidden,) = torch.autograd.grad(linear_cross_entropy(hidden.requires_grad_(), weight, index, ids), hidden)
    others = torch.ones(1000, dtype=torch.bool, device=DEVICE)
    others[index] = False
    assert not d_hidden[others].any()
    assert d_hidden[index].any(dim=1).all()
    nothing = linear_cross_entropy(hidden, weight, index[:0], ids[:0])
    nothing.backward()
    assert nothing.item() == 0
    assert not hidden.grad.any()


@pytest.mark.parametrize("vocabulary", [32000, 128256])
def test_16_k_slots_take_less_than_one_gib(vocabulary: int):
    """The logits alone would take 1 GiB in bf16 at a vocabulary of 32 k, and 4 GiB at 128 k."""
    hidden, weight, index, ids = make_case(16384, 16384, vocabulary, 4096)
    hidden.requires_grad_()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_cross_entropy(hidden, weight, index, ids).backward()
    taken_gib = (torch.cuda.max_memory_allocated() - before) / 2**30
    print(f"16,384 slots x {vocabulary:,} tokens: {taken_gib:.2f} GiB")
    assert taken_gib < 1


def test_it_does_not_stop_the_gpu():
    hidden, weight, index, ids = make_case(1000, 1000, 32000, 512)
    hidden.requires_grad_()
    linear_cross_entropy(hidden, weight, index, ids).backward()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_cross_entropy(hidden, weight, index, ids).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
