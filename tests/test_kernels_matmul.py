"""Products with base weights where there is no GPU, and how many shapes get an algorithm looked for."""

from __future__ import annotations

import pytest
import torch

from packloop.kernels import cublaslt, matmul
from packloop.kernels.matmul import Choice, choice_for


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("by", ["auto", "torch"])
@pytest.mark.parametrize("transposed", [True, False])
def test_a_cpu_has_torchs_product_in_the_place_given(by, transposed):
    x, w = random(6, 8), random(10, 8).T if transposed else random(8, 10)
    wide = torch.full((6, 13), float("nan"))
    found = matmul.matmul(x, w, out=wide[:, :10], by=by)
    assert found.data_ptr() == wide.data_ptr()
    torch.testing.assert_close(found, torch.mm(x, w))
    assert wide[:, 10:].isnan().all()
    assert torch.equal(matmul.matmul(x, w, by=by), torch.mm(x, w))


@pytest.mark.parametrize("by", ["auto", "torch"])
def test_a_product_requires_no_gradient_whatever_its_operands_do(by):
    x, w, out = random(6, 8).requires_grad_(), random(8, 10).requires_grad_(), torch.empty(6, 10)
    assert not matmul.matmul(x, w, by=by).requires_grad
    assert not matmul.matmul(x, w, out=out, by=by).requires_grad
    assert torch.equal(out, x.detach() @ w.detach())


def test_what_no_gpu_holds_does_not_fit_the_library():
    x = random(4, 4).bfloat16()
    assert not cublaslt.fits(x, x, x)


def test_a_shape_is_looked_at_once_and_so_many_at_most(monkeypatch):
    looked_at = []

    def choose(x, w, out):
        looked_at.append(tuple(w.shape))
        return Choice(None, object(), 0.1)

    forget(monkeypatch)
    monkeypatch.setattr(matmul, "_choose", choose)
    w = random(8, 10)
    x = random(1, 8)
    for width in [*range(10, matmul.MOST_SHAPES + 18), 10, 11]:
        found = choice_for(x, random(8, width), torch.empty(1, width))
        assert (found.algorithm is not None) == (width < matmul.MOST_SHAPES + 10)
    assert looked_at == [(8, width) for width in range(10, matmul.MOST_SHAPES + 10)]
    # Other strides, dtypes and places are another shape, for which there is no room left.
    out = torch.empty(1, 10)
    assert choice_for(x, w, out).algorithm is not None
    assert choice_for(random(8, 1).T, w, out).algorithm is None
    assert choice_for(x, w.double(), out).algorithm is None
    assert choice_for(x, w, out.double()).algorithm is None
    assert choice_for(x, w, torch.empty(2, 10)).algorithm is None
    assert choice_for(x, w.to("meta"), out).algorithm is None


def forget(monkeypatch) -> None:
    for name, nothing in (("_choices", {}), ("_chosen", []), ("_timed", {})):
        monkeypatch.setattr(matmul, name, nothing)


@pytest.mark.parametrize("chosen", [True, False])
def test_a_few_rows_more_or_less_run_by_the_same_algorithm(monkeypatch, chosen):
    """As micro-batches without padding have; a product for each shape, none where the library refuses it."""
    timed, made = [], []

    class Product:
        def __init__(self, x, w, out):
            if len(x) == 1000:
                raise cublaslt.CublasLtError("cublasLtMatmulAlgoGetHeuristic failed with cublasStatus_t 15")
            made.append(len(x))

        def is_aligned(self, x, w, out):
            return len(x) != 1010

        def run(self, algorithm, x, w, out):
            if len(x) == 1020:
                raise cublaslt.CublasLtError("cublasLtMatmul failed with cublasStatus_t 15")
            torch.mm(x, w, out=out)
            if len(x) == 1030:
                out[:, 0] += 1e-3  # other bits than torch's

    def choose(x, w, out):
        timed.append(len(x))
        return Choice(Product(x, w, out), "fastest", 0.1) if chosen else matmul._TORCH

    forget(monkeypatch)
    monkeypatch.setattr(matmul, "_choose", choose)
    monkeypatch.setattr(cublaslt, "Product", Product)
    w, found = random(8, 10), {}
    for rows in (1024, 1040, 1024, 960, 1000, 1010, 1020, 1030, 767, 1281, 2000):
        found[rows] = choice_for(random(rows, 8), w, torch.empty(rows, 10))
    assert timed == [1024, 767, 1281, 2000]
    expected = {rows: "fastest" if chosen and rows not in (1000, 1010, 1020, 1030) else None for rows in found}
    assert {rows: choice.algorithm for rows, choice in found.items()} == expected
    assert made == ([1024, 1040, 960, 1020, 1030, 767, 1281, 2000] if chosen else [])
    assert len({id(choice.product) for choice in found.values() if choice.product}) == (6 if chosen else 0)
    # Those that follow take none of the places of those that are timed.
    monkeypatch.setattr(matmul, "MOST_SHAPES", len(timed) + 1)
    assert len(matmul._choices) > matmul.MOST_SHAPES
    # Of other strides it is another product.
    choice_for(random(1024, 16)[:, :8], w, torch.empty(1024, 10))
    assert timed[-1] == 1024


def test_bits_are_compared_until_they_were_torchs_a_few_times(monkeypatch):
    compared = []

    class Product:
        def __init__(self, x, w, out):
            pass

        def is_aligned(self, *_):
            return True

    def gives(product, algorithm, x, w, out, expected):
        compared.append(len(x))
        return len(x) != 1010

    forget(monkeypatch)
    monkeypatch.setattr(matmul, "_choose", lambda x, w, out: Choice(Product(x, w, out), "fastest", 0.1))
    monkeypatch.setattr(matmul, "_COMPARED", 2)
    monkeypatch.setattr(matmul, "_gives", gives)
    monkeypatch.setattr(cublaslt, "Product", Product)
    w, found = random(8, 10), {}
    for rows in (1024, 1000, 1010, 1020, 1030, 1010, 900):
        found[rows] = choice_for(random(rows, 8), w, torch.empty(rows, 10)).algorithm
    assert compared == [1000, 1010, 1020]
    assert found == {rows: None if rows == 1010 else "fastest" for rows in found}


def test_deterministic_products_are_torchs(monkeypatch):
    forget(monkeypatch)
    monkeypatch.setattr(matmul, "_choose", lambda *_operands: Choice(None, object(), 0.1))
    x, w, out = random(6, 8), random(8, 10), torch.empty(6, 10)
    assert choice_for(x, w, out).algorithm is not None
    torch.use_deterministic_algorithms(True)
    try:
        assert choice_for(x, w, out).algorithm is None
        assert choice_for(x[:5], w, out[:5]).algorithm is None
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(matmul._choices) == 1
    assert choice_for(x, w, out).algorithm is not None


@pytest.mark.parametrize("runs", ["at the first call's address", "nowhere", "never"])
def test_a_chosen_algorithm_runs_where_it_may_and_torch_elsewhere(monkeypatch, runs):
    class Product:
        def is_aligned(self, *_operands):
            return runs != "nowhere"

        def run(self, algorithm, x, w, out):
            assert algorithm == "chosen"
            assert runs != "nowhere"
            if runs == "never":
                raise cublaslt.CublasLtError("cublasLtMatmul failed with cublasStatus_t 15")
            out.fill_(7.0)

    monkeypatch.setattr(matmul, "_chosen", [matmul.Choice(Product(), "chosen", 0.1)])
    x, w, out = random(6, 8), random(8, 10), torch.empty(6, 10)
    matmul._run_chosen(x, w, out, 0)
    expected = torch.full_like(out, 7.0) if runs == "at the first call's address" else torch.mm(x, w)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("refused", ["the product", "every algorithm"])
def test_what_the_library_refuses_is_torchs(monkeypatch, refused):
    """The library itself, which no CPU has, is stood in for."""

    class Product:
        algorithms = ("one", "another")

        def __init__(self, *_operands):
            if refused == "the product":
                raise cublaslt.CublasLtError("cublasLtMatmulAlgoGetHeuristic failed with cublasStatus_t 15")

        def run(self, *_arguments):
            raise cublaslt.CublasLtError("cublasLtMatmul failed with cublasStatus_t 15")

    monkeypatch.setattr(matmul, "_LEAST_FLOPS", 0.0)
    monkeypatch.setattr(matmul, "_times_ms", lambda runs: [1.0] * len(runs))
    monkeypatch.setattr(cublaslt, "why_not", lambda: None)
    monkeypatch.setattr(cublaslt, "fits", lambda *_operands: True)
    monkeypatch.setattr(cublaslt, "Product", Product)
    x, w = random(6, 8), random(8, 10)
    assert matmul._choose(x, w, torch.empty(6, 10)).algorithm is None
