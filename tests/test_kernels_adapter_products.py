"""The adapters' products in Triton's interpreter, against the oracles; see test_kernels_interpreted.py."""

from __future__ import annotations

import pytest
import torch
from interpreter import interpreted, needs_triton, ordinary, run_in_interpreter
from test_kernels_interpreted import assert_only_slice_written, poisoned_columns, random

from packloop.kernels import adapter_kernels, adapter_products, reference
from packloop.kernels.adapter_products import Tile, gradient_product, narrow_product
from packloop.kernels.adapters import AdapterCopies
from packloop.kernels.lora_linear import Lora, lora_a_gradient, lora_b_gradients, lora_project
from packloop.kernels.reference import Block

pytestmark = pytest.mark.usefixtures("poisoned_outputs", "divided_sums")

# Whole sums, and sums in parts.
TILES = [Tile(16, 16, 4, 2, programs=1), Tile(32, 16, 4, 2, programs=64)]


@pytest.fixture
def divided_sums(monkeypatch):
    """Sums as short as a test's are divided too."""
    monkeypatch.setattr(adapter_products, "_LENGTH_PER_RANK", 0.1)


@ordinary
@needs_triton
def test_in_the_interpreter():
    run_in_interpreter(__file__)


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)


def blocks_of(sizes: tuple[int, ...], num_ranks: int, skips: int = 0) -> list[Block]:
    """Blocks of a block-diagonal matrix, with `skips` columns of others between them."""
    found, column = [], 0
    for index, size in enumerate(sizes):
        found.append(Block(slice(column, column + size), slice(index * num_ranks, (index + 1) * num_ranks)))
        column += size + skips
    return found


@interpreted
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(
    ("num_tokens", "sizes", "num_ranks"),
    [
        (37, (200,), 16),
        (64, (256,), 3),
        (5, (100, 36, 50), 8),
        (70, (130, 130), 20),
        (33, (300,), 136),
        (20, (64,), 192),
    ],
)
def test_narrow_products(num_tokens: int, sizes: tuple[int, ...], num_ranks: int, tile: Tile):
    blocks = blocks_of(sizes, num_ranks, skips=7)
    width, ranks = blocks[-1].columns.stop, num_ranks * len(sizes)
    x, w = random(num_tokens, width + 9)[:, 4 : 4 + width], random(width, ranks + 2, seed=1)[:, 1 : 1 + ranks]
    for matrix in (w, w.T.contiguous().T):  # as B lies, and as A
        buffer, out = poisoned_columns(num_tokens, ranks)
        narrow_product(x, matrix, blocks, scale=0.25, out=out, tile=tile)
        assert_close(out, reference.narrow_product(x, w, blocks, 0.25))
        assert_only_slice_written(buffer, out)
        again = narrow_product(x, matrix, blocks, scale=0.25, out=torch.empty_like(out), tile=tile)
        assert torch.equal(again, out)


@interpreted
@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(
    ("num_tokens", "sizes", "num_ranks"),
    [(1, (16,), 16), (270, (50,), 5), (90, (40, 24, 70), 8), (300, (64, 33), 16), (150, (40,), 150)],
)
def test_gradient_products(num_tokens: int, sizes: tuple[int, ...], num_ranks: int, tile: Tile, adds: bool):
    blocks = blocks_of(sizes, num_ranks, skips=3)
    width, ranks = blocks[-1].columns.stop, num_ranks * len(sizes)
    left = random(num_tokens, width + 9)[:, 4 : 4 + width]
    right = random(num_tokens, ranks + 5, seed=1)[:, 2 : 2 + ranks]
    expected = reference.gradient_product(left, right, blocks)
    runs = []
    for _ in range(2):
        fill = 2.0 if adds else float("nan")
        targets = [torch.full((size, num_ranks), fill) for size in sizes]
        gradient_product(left, right, blocks, targets, adds=adds, tile=tile)
        for target, gradient in zip(targets, expected, strict=True):
            assert_close(target, gradient + 2.0 if adds else gradient)
        runs.append(targets)
    assert all(torch.equal(*pair) for pair in zip(*runs))


@interpreted
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("ranks", [(8,), (5, 9), (16, 16, 16), (70, 70)])
def test_transposed_gradient_products(ranks: tuple[int, ...], tile: Tile):
    left, right = random(200, 77)[:, :70], random(200, sum(ranks), seed=1)
    targets = [torch.ones(rank, 70) for rank in ranks]
    gradient_product(left, right, blocks_of((70,), sum(ranks)), targets, adds=True, transposed=True, tile=tile)
    assert_close(torch.cat(targets), right.T @ left + 1)


@interpreted
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("rank", [4, 16, 20, 80])
def test_gradient_products_of_two_that_take_turns(rank: int, tile: Tile):
    left, right = random(200, 78)[:, :70], random(200, 2 * rank, seed=1)
    targets = [torch.ones(35, rank) for _ in range(2)]
    gradient_product(left, right, blocks_of((70,), 2 * rank), targets, adds=True, in_turns=True, tile=tile)
    for index, target in enumerate(targets):
        assert_close(target, left[:, index::2].T @ right[:, index * rank : (index + 1) * rank] + 1)


@interpreted
@pytest.mark.parametrize(
    ("sizes", "present", "interleaved"),
    [
        ((40, 16, 24), (True, True, True), False),
        ((40, 16, 24), (True, False, True), False),
        ((30,), (True,), False),
        ((32, 32), (True, True), True),
        ((32, 32), (True, False), True),
    ],
)
def test_a_groups_products_are_torchs(sizes, present, interleaved, monkeypatch):
    loras = [
        Lora(random(4, 48, seed=i), random(size, 4, seed=9 + i), 0.5) if is_in else None
        for i, (size, is_in) in enumerate(zip(sizes, present))
    ]
    copies = AdapterCopies(torch.float32, torch.device("cpu"))
    group = copies.group(sizes, loras, interleaved=interleaved)
    copies.refresh()
    x, dy = random(70, 60, seed=20)[:, :48], random(70, sum(sizes) + 6, seed=21)[:, : sum(sizes)]
    ranks = 4 * sum(present)
    results = {}
    for by in ("triton", "torch"):
        if by == "torch":
            monkeypatch.setattr(adapter_kernels, "adapter_product_kernel", None)
            monkeypatch.setattr(adapter_kernels, "adapter_gradient_kernel", None)
        projected = lora_project(x, group, None, out=torch.empty(70, ranks + 3)[:, :ranks], by=by)
        into = [torch.ones(size, 4) if is_in else None for size, is_in in zip(sizes, present)]
        d_projected, added = lora_b_gradients(dy, projected, group, None, into=into, by=by)
        _, made = lora_b_gradients(dy, projected, group, None, by=by)
        whole = torch.ones(ranks, 48)
        apart = [torch.ones(4, 48) for _ in range(sum(present))]
        lora_a_gradient(d_projected, x, group, None, into=list(whole.split(4)), by=by)
        lora_a_gradient(d_projected, x, group, None, into=apart, by=by)
        d_a = lora_a_gradient(d_projected, x, group, None, by=by)
        results[by] = [projected, d_projected, *added, *made, whole, *apart, d_a]
    for found, expected in zip(results["triton"], results["torch"], strict=True):
        assert (found is None) == (expected is None)
        if found is not None:
            assert_close(found, expected)


@ordinary
def test_what_the_kernels_do_not_take():
    blocks = blocks_of((8,), 4)
    assert not adapter_products.fits(torch.ones(4, 8), blocks=blocks)  # a CPU
    with pytest.raises(ValueError, match="Triton kernel needs a CUDA GPU"):
        adapter_products.fits(torch.ones(4, 8), blocks=blocks, by="triton")


@interpreted
def test_what_does_not_fit_is_left_to_torch():
    x, blocks = torch.ones(4, 8), blocks_of((8,), 4)
    assert adapter_products.fits(x, blocks=blocks)
    assert not adapter_products.fits(x, blocks=blocks, by="torch")
    assert not adapter_products.fits(x.double(), blocks=blocks)
    assert not adapter_products.fits(x.T, blocks=blocks)
    assert not adapter_products.fits(x, blocks=blocks_of((2,) * 4, 4))
    assert not adapter_products.fits(x, blocks=blocks_of((8,), 257))
    assert not adapter_products.fits(x, blocks=[*blocks, Block(slice(0, 8), slice(4, 6))])
