"""Products by cuBLASLt's algorithms: torch's bits from whichever runs, in the operands' own layouts."""

from __future__ import annotations

import pytest
import torch
from kernel_oracle import DEVICE, DTYPE, random

from packloop.kernels import cublaslt, matmul

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

# Rows, inner, columns: products of Llama's layers with and without adapters' columns, and odd ones.
SHAPES = [(4096, 4160, 4096), (2048, 4096, 11008), (12288, 4288, 12288), (1000, 4096, 4104), (4095, 1032, 4096)]


@pytest.fixture(autouse=True)
def _nothing_chosen_yet(monkeypatch):
    monkeypatch.setattr(matmul, "_choices", {})
    monkeypatch.setattr(matmul, "_chosen", [])
    monkeypatch.setattr(matmul, "_timed", {})


@pytest.fixture
def force(monkeypatch):
    """Has every product run by this one's algorithm of that number."""

    def choose(product: cublaslt.Product, number: int) -> None:
        choice = matmul.Choice(product, product.algorithms[number], 0.5)
        monkeypatch.setattr(matmul, "_choices", {})
        monkeypatch.setattr(matmul, "_timed", {})
        monkeypatch.setattr(matmul, "_choose", lambda *_operands: choice)

    return choose


def leave_nan(rows: int, columns: int) -> None:
    """In the memory that the next result of this size is given. (What torch fills by itself is deterministic only.)"""
    torch.full((rows, columns), float("nan"), device=DEVICE, dtype=DTYPE)


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
        leave_nan(shape[0], shape[2])
        assert torch.equal(matmul.matmul(x, w, by=by), expected)


@pytest.mark.parametrize("spare", [0, 64])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("shape", [(2048, 4160, 4096), (1000, 4096, 4104), (4095, 1032, 4096)])
def test_every_algorithm_on_offer_computes_the_product_in_its_place(shape, transposed, spare, force):
    """Forced one by one and held to twice torch's own error; a choice is held to torch's bits besides."""
    x, w, wide = operands(*shape, transposed=transposed, spare=spare)
    out = wide[:, : shape[2]]
    product = cublaslt.Product(x, w, out)
    assert product.algorithms
    exact = x.double() @ w.double()
    allowed = 2 * (torch.mm(x, w).double() - exact).abs().max()
    for number, algorithm in enumerate(product.algorithms):
        wide.fill_(float("nan"))
        try:
            product.run(algorithm, x, w, out)
        except cublaslt.CublasLtError:
            assert bool(wide.isnan().all())
            continue
        assert (out.double() - exact).abs().max() <= allowed, f"algorithm {number}"
        assert bool(wide[:, shape[2] :].isnan().all()), f"algorithm {number}"
        by_itself = out.clone()
        force(product, number)
        wide.fill_(float("nan"))
        assert matmul.matmul(x, w, out=out) is out
        assert torch.equal(out, by_itself), f"algorithm {number}"


@pytest.mark.parametrize("moved", ["x", "w", "out"])
@pytest.mark.parametrize("elements", [1, 8, 128])
def test_operands_less_aligned_than_the_first_are_torchs(moved, elements, force, monkeypatch):
    """The same shapes and strides, two bytes, 16 or 256 further on."""
    rows, inner, columns = 2048, 4160, 4096
    shapes = {"x": (rows, inner), "w": (inner, columns), "out": (rows, columns)}
    first = {name: random(*shape, seed=number) for number, (name, shape) in enumerate(shapes.items())}
    later = dict(first)
    shape = shapes[moved]
    later[moved] = random(shape[0] * shape[1] + elements, seed=3)[elements:].view(shape)
    product = cublaslt.Product(*first.values())
    assert all(one.data_ptr() % 256 == 0 for one in first.values())
    force(product, 0)
    ran = []
    run = product.run
    monkeypatch.setattr(product, "run", lambda *arguments: (ran.append(1), run(*arguments)))
    matmul.matmul(first["x"], first["w"], out=first["out"])
    assert len(ran) == 1
    # Into the same place: torch, too, may take another algorithm for another alignment.
    expected = torch.mm(later["x"], later["w"], out=later["out"]).clone()
    later["out"].fill_(float("nan"))
    matmul.matmul(later["x"], later["w"], out=later["out"])
    assert len(ran) == (2 if elements == 128 else 1)
    if elements == 128:
        torch.testing.assert_close(later["out"], expected)
    else:
        assert torch.equal(later["out"], expected)


def test_deterministic_products_are_torchs():
    x, w, out = operands(4096, 4160, 4096, transposed=True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.equal(matmul.matmul(x, w, out=out, by="cublaslt"), torch.mm(x, w))
    finally:
        torch.use_deterministic_algorithms(False)
    assert not matmul._choices


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_product_runs_on_its_operands_device(force):
    x, w, out = (one.to("cuda:1") for one in operands(2048, 4160, 4096, transposed=False))
    assert torch.cuda.current_device() == 0
    expected = torch.mm(x, w)
    assert torch.equal(matmul.matmul(x, w, out=out), expected)
    force(cublaslt.Product(x, w, out), 0)
    out.fill_(float("nan"))
    matmul.matmul(x, w, out=out)
    torch.testing.assert_close(out, expected)
    assert torch.cuda.current_device() == 0


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


@pytest.mark.parametrize("spare", [0, 64])
def test_almost_as_many_rows_run_by_the_algorithm_that_was_timed(spare, monkeypatch):
    monkeypatch.setattr(matmul, "_LEAST_GAIN", -1.0)
    monkeypatch.setattr(matmul, "_times_ms", lambda runs: [1.0] + [0.5] * (len(runs) - 1))
    x, w, wide = operands(4096, 4160, 4096, transposed=True, spare=spare)
    out = wide[:, :4096]
    timed = matmul.choice_for(x, w, out)
    monkeypatch.setattr(matmul, "_choose", lambda *_operands: pytest.fail("timed again"))
    for rows in (4000, 3968, 4095, 3200, 3100, 3712):
        found = matmul.choice_for(x[:rows], w, out[:rows])
        assert found.algorithm in (timed.algorithm, None)
        assert timed.algorithm is not None
        out.fill_(float("nan"))
        matmul.matmul(x[:rows], w, out=out[:rows])
        assert torch.equal(out[:rows], torch.mm(x[:rows], w))
        assert bool(out[rows:].isnan().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_dtypes_are_torchs(dtype):
    x, w = random(2048, 2048, dtype=dtype), random(2048, 2048, seed=1, dtype=dtype)
    assert torch.equal(matmul.matmul(x, w), torch.mm(x, w))
    assert matmul.choice_for(x, w, torch.empty_like(x)).algorithm is None


def test_a_small_product_is_torchs():
    x, w, out = operands(64, 4096, 4096, transposed=True)
    assert matmul.choice_for(x, w, out).algorithm is None
