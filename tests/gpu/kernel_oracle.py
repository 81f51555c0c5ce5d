"""What a kernel on a GPU in bf16 is judged by: the same-dtype PyTorch expression, and the oracle in float64.

The rule, for each element: |ours - exact| may be at most `factor` times the greatest error of the PyTorch expression in
bf16 anywhere in the tensor, plus 2 eps = 2^-6 of |exact|, which is 2 ulp at a power of two and up to 4 above it; factor
is 2 for outputs and 3 for gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

DEVICE = "cuda"
DTYPE = torch.bfloat16


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """New memory holds NaN, so an element that a kernel leaves out shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.cuda.empty_cache()


def random(*shape: int, scale: float = 1.0, seed: int = 0, dtype: torch.dtype | None = None) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return (torch.randn(shape, device=DEVICE, generator=generator) * scale).to(DTYPE if dtype is None else dtype)


def assert_no_worse(found: Tensor, stock: Tensor, exact: Tensor, factor: float) -> None:
    found, stock, exact = found.double(), stock.double(), exact.double()
    assert bool(found.isfinite().all())
    allowed = factor * (stock - exact).abs().max() + 2 * torch.finfo(DTYPE).eps * exact.abs()
    excess = ((found - exact).abs() - allowed).max()
    assert excess <= 0, (
        f"error exceeds the allowance by {excess:.3e}; PyTorch's own is {(stock - exact).abs().max():.3e}"
    )


def gradient_of(output: Tensor, index: int = 0) -> Tensor:
    """The gradient that arrives at a function's output number `index`, in every comparison the same."""
    return random(*output.shape, seed=50 + index).to(output.dtype)


def by_autograd(function: Callable, inputs: list[Tensor], *, exact: bool = False) -> tuple[tuple, tuple]:
    """(outputs, gradients for every input that requires one); `exact` gives the function its inputs in float64."""
    if exact:
        inputs = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    gradients = [gradient_of(y, i) for i, y in enumerate(outputs)]
    return outputs, torch.autograd.grad(outputs, [x for x in inputs if x.requires_grad], gradients)


def judge(found: tuple[tuple, tuple], stock: Callable, oracle: Callable, inputs: list[Tensor]) -> None:
    """AssertionError where an output or gradient in `found` breaks the rule."""
    results = found, by_autograd(stock, inputs), by_autograd(oracle, inputs, exact=True)
    for factor, triples in zip((2, 3), zip(*results)):
        for triple in zip(*triples, strict=True):
            assert_no_worse(*triple, factor)


def compare(ours: Callable, stock: Callable, oracle: Callable, inputs: list[Tensor]) -> None:
    """`judge` for a function that autograd differentiates."""
    judge(by_autograd(ours, inputs), stock, oracle, inputs)
