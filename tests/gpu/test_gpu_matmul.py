"""Products by cuBLASLt's algorithms: torch's bits from whichever runs, in the operands' own layouts."""

from __future__ import annotations

import pytest
import torch
from kernel_oracle import DTYPE, poisoned_memory, random

from packloop.kernels import cublaslt, matmul

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

# Rows, inner, columns: products of Llama's layers with and without adapters' columns, and odd ones.
SHAPES = [(4096, 4160, 4096), (2048, 4096, 11008), (12288, 4288, 12288), (1000, 4096, 4104), (4095, 1032, 4096)]


@pytest.fixture(autouse=True)
def _poisoned_outputs(monkeypatch):
    monkeypatch.setattr(matmul, "_choices", {})
    monkeypatch.setattr(matmul, "_chosen", [])
    with poisoned_memory():
        yield


def operands(rows: int, inner: int, columns: int, *, transposed: bool, spare: int = 0):
    """x, w and a place for the product, each beside `spare` columns of a wider buffer."""
    x = random(rows, inner + spare)[:, :inner]
    w = random(columns, inner + spare, seed=1)[:, :inner].T if transposed else random(inner, columns + spare, seed=1)
    out = torch.full((rows, columns + spare), float("nan"), device=x.device, dtype=DTYPE)
    return x, w[:, :columns], out


@pytest.mark.parametrize("spare", [0, 64])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_runs_gives_torchs_bits(shape, transposed, spare):
    x, w, wide = operands(*shape, transposed=transposed, spare=spare)
    expected = torch.mm(x, w)
    out = wide[:, : shape[2]]
    for by in ("cublaslt", "auto", "torch"):
        wide.fill_(float("nan"))
        assert matmul.matmul(x, w, out=out, by=by) is out
        assert torch.equal(out, expected)
        assert bool(wide[:, shape[2] :].isnan().all())
        assert torch.equal(matmul.matmul(x, w, by=by), expected)


@pytest.mark.parametrize("transposed", [True, False])
def test_every_algorithm_on_offer_computes_the_product(transposed):
    x, w, out = operands(2048, 4160, 4096, transposed=transposed)
    product = cublaslt.Product(x, w, out)
    assert len(product.algorithms) > 1
    exact = x.double() @ w.double()
    allowed = 2 * (torch.mm(x, w).double() - exact).abs().max()
    for algorithm in product.algorithms:
        out.fill_(float("nan"))
        product.run(algorithm, x, w, out)
        assert (out.double() - exact).abs().max() <= allowed


def test_a_choice_is_an_algorithm_with_a_gain_or_torch_and_holds_no_memory():
    x, w, out = operands(12288, 4288, 12288, transposed=True)
    torch.mm(x, w, out=out)  # torch's own workspace
    before = torch.cuda.memory_allocated()
    choice = matmul.choice_for(x, w, out)
    assert torch.cuda.memory_allocated() == before
    assert (choice.algorithm is None) == (choice.gain == 0.0)
    assert torch.equal(out, torch.mm(x, w))


def test_an_algorithm_that_was_chosen_runs_and_shows_in_a_profile(monkeypatch):
    monkeypatch.setattr(matmul, "_LEAST_GAIN", -1.0)  # the fastest, though it be torch's own
    monkeypatch.setattr(matmul, "_times_ms", lambda runs: [1.0] + [0.5] * (len(runs) - 1))
    x, w, out = operands(2048, 4160, 4096, transposed=False)
    assert matmul.choice_for(x, w, out).algorithm is not None
    out.fill_(float("nan"))
    with torch.profiler.profile(record_shapes=True) as profiler:
        matmul.matmul(x, w, out=out)
        torch.cuda.synchronize()
    assert torch.equal(out, torch.mm(x, w))
    (event,) = [event for event in profiler.events() if event.name == "packloop::mm"]
    assert event.input_shapes[:3] == [[2048, 4160], [4160, 4096], [2048, 4096]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_dtypes_are_torchs(dtype):
    x, w = random(2048, 2048, dtype=dtype), random(2048, 2048, seed=1, dtype=dtype)
    assert torch.equal(matmul.matmul(x, w), torch.mm(x, w))
    assert matmul.choice_for(x, w, torch.empty_like(x)).algorithm is None


def test_a_small_product_is_torchs():
    x, w, out = operands(64, 4096, 4096, transposed=True)
    assert matmul.choice_for(x, w, out).algorithm is None
