"""The adapters' products by themselves on a GPU in bf16, at real shapes, by the rule of kernel_oracle.py."""

from __future__ import annotations

import pytest
import torch
from kernel_oracle import DEVICE, DTYPE, assert_no_worse, poisoned_memory, random

from packloop.kernels import adapter_products
from packloop.kernels.adapter_products import gradient_product, narrow_product
from packloop.kernels.reference import Block

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

# Outputs of each member, ranks of each; whether they take turns.
GROUPS = {
    "qkv": ((4096, 4096, 4096), 64, False),
    "qkv with grouped heads": ((4096, 1024, 1024), 64, False),
    "o": ((4096,), 64, False),
    "gate and up": ((11008, 11008), 64, True),
    "gate and up of small ranks": ((11008, 11008), 16, True),
    "odd": ((200, 72), 24, False),
}
SCALING = 0.25


@pytest.fixture(autouse=True)
def _poisoned_outputs():
    with poisoned_memory():
        yield


def beside(num_tokens: int, num_columns: int, num_ranks: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A wide operand and, in the same rows, one of the ranks."""
    both = random(num_tokens, num_columns + num_ranks, seed=seed)
    return both[:, :num_columns], both[:, num_columns:]


@pytest.mark.parametrize("num_tokens", [1024, 1999, 12288])
@pytest.mark.parametrize(
    ("num_features", "num_ranks"), [(4096, 16), (4096, 64), (4096, 128), (4096, 192), (4096, 256), (11008, 64)]
)
def test_products_with_a(num_tokens: int, num_features: int, num_ranks: int):
    x, d_projected = beside(num_tokens, num_features, num_ranks, seed=0)
    a = random(num_ranks, num_features, scale=num_features**-0.5, seed=1)
    blocks = [Block(slice(0, num_features), slice(0, num_ranks))]
    assert adapter_products.fits(x, a, d_projected, blocks=blocks)
    out = torch.full((num_tokens, num_features + num_ranks), float("nan"), dtype=DTYPE, device=DEVICE)
    narrow_product(x, a.T, blocks, scale=SCALING, out=out[:, num_features:])
    exact = SCALING * x.double() @ a.double().T
    assert_no_worse(out[:, num_features:], SCALING * (x @ a.T), exact, 2)
    assert out[:, :num_features].isnan().all()
    again = narrow_product(
        x, a.T, blocks, scale=SCALING, out=torch.empty(num_tokens, num_ranks, dtype=DTYPE, device=DEVICE)
    )
    assert torch.equal(again, out[:, num_features:])

    runs = []
    for _ in range(2):
        d_a = torch.ones(num_ranks, num_features, device=DEVICE)
        gradient_product(
            x, d_projected, blocks, list(d_a.split(8)) if num_ranks == 16 else [d_a], adds=True, transposed=True
        )
        runs.append(d_a)
    exact = d_projected.double().T @ x.double()
    assert_no_worse(runs[0] - 1, d_projected.T @ x, exact, 3)
    assert torch.equal(*runs)


@pytest.mark.parametrize("num_tokens", [1024, 1999, 12288])
@pytest.mark.parametrize("name", list(GROUPS))
def test_products_with_b(num_tokens: int, name: str):
    sizes, rank, in_turns = GROUPS[name]
    num_outputs, num_ranks = sum(sizes), rank * len(sizes)
    dy, projected = beside(num_tokens, num_outputs, num_ranks, seed=0)
    members, column = [], 0
    for index, size in enumerate(sizes):
        columns = slice(index, num_outputs, 2) if in_turns else slice(column, column + size)
        members.append(Block(columns, slice(index * rank, (index + 1) * rank)))
        column += size
    b = torch.zeros(num_outputs, num_ranks, dtype=DTYPE, device=DEVICE)
    for index, member in enumerate(members):
        b[member.columns, member.ranks] = random(sizes[index], rank, scale=0.05, seed=index)
    blocks = [Block(slice(0, num_outputs), slice(0, num_ranks))] if in_turns else members

    runs = []
    for _ in range(2):
        out = torch.empty(num_tokens, num_ranks, dtype=DTYPE, device=DEVICE)
        narrow_product(dy, b, blocks, scale=SCALING, out=out)
        targets = [torch.ones(size, rank, device=DEVICE) for size in sizes]
        gradient_product(dy, projected, blocks, targets, adds=True, in_turns=in_turns)
        made = [torch.empty_like(target) for target in targets]
        gradient_product(dy, projected, blocks, made, adds=False, in_turns=in_turns)
        runs.append([out, *targets, *made])
    assert all(torch.equal(*pair) for pair in zip(*runs))
    assert_no_worse(out, SCALING * (dy @ b), SCALING * dy.double() @ b.double(), 2)
    for member, target, gradient in zip(members, targets, made):
        left, right = dy[:, member.columns], projected[:, member.ranks]
        exact = left.double().T @ right.double()
        for found in (target - 1, gradient):
            assert_no_worse(found, left.T @ right, exact, 3)


def test_rows_beyond_two_to_the_31_elements():
    num_tokens, rank = 70000, 16
    x = torch.zeros(num_tokens, 2**31 // num_tokens // 16 * 16 + 512, dtype=DTYPE, device=DEVICE)
    wide = x[:, -4096:]
    wide[-1] = 1
    blocks = [Block(slice(0, 4096), slice(0, rank))]
    w = torch.ones(4096, rank, dtype=DTYPE, device=DEVICE)
    out = narrow_product(wide, w, blocks, scale=1.0, out=torch.empty(num_tokens, rank, dtype=DTYPE, device=DEVICE))
    assert bool((out[-1] == 4096).all())
    assert bool((out[:-1] == 0).all())
    total = torch.zeros(4096, rank, device=DEVICE)
    gradient_product(wide, torch.ones_like(out), blocks, [total], adds=True)
    assert bool((total == 1).all())


def test_what_does_not_pay_is_left_to_torch():
    blocks = [Block(slice(0, 4096), slice(0, 64))]
    x = random(1024, 4096 + 8)
    assert not adapter_products.fits(x[:, :4096], blocks=blocks)  # rows of 8 more
    assert not adapter_products.fits(random(1023, 4096), blocks=blocks)
    assert not adapter_products.fits(random(1024, 4096).float(), blocks=blocks)
    assert adapter_products.fits(random(1024, 4096), blocks=blocks)
