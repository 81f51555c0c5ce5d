"""Products with the base's weights: by torch, or by the fastest of cuBLASLt's algorithms on the operands at hand.

torch takes the algorithm that a heuristic names, which knows nothing of the power limit that large products run
into. Here every algorithm on offer that gives torch's bits is timed, once for each shape, on the operands of the first
call, after the GPU has been kept at work for a while. The operator `packloop::mm` shows in profiles what ran.

Rows within a quarter of a number that was timed run by the algorithm found there: micro-batches whose documents lie end
to end have as many sizes as there are micro-batches.

Bits are compared on those operands, for the first few numbers of rows that follow a timed one on theirs, and nowhere
else: all rows of a result below 16 MiB, of a larger one every n-th, which come to about 8 MiB. That other rows and
later operands give torch's bits too is inferred, not checked, so under `torch.use_deterministic_algorithms` every
product is torch's.

Shapes: x [M, K], w [K, N], out [M, N], as in `cublaslt`.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from packloop.kernels import cublaslt

ProductLibrary = Literal["auto", "cublaslt", "torch"]

logger = logging.getLogger(__name__)

# Below this many FLOPs a product is over before its algorithm matters.
_LEAST_FLOPS = 5e9
# Shapes for which an algorithm is looked for; the rest, of batches whose sizes differ, run as torch has it.
MOST_SHAPES = 48
# Of all shapes, those that follow a timed one counted in; each holds a few descriptors.
_MOST_KNOWN = 4096
_NEAR = 1 / 4
# Numbers of rows that follow a timed one with torch's bits before the next are taken to have them: a comparison takes
# as long as two products more.
_COMPARED = 4
# Seconds of products before the timed ones: the GPU's power limit must have set in.
_WARM_UP_S = 0.2
_ROUNDS, _REPEATS = 5, 2
# An algorithm must save this share of torch's time. In turns all run at one clock; under a power limit, one that draws
# more lowers it for all, and by itself takes back up to this much of what it seemed to save.
_LEAST_GAIN = 0.04
# Bytes of torch's result that others are compared with.
_SAMPLE_BYTES = 8 * 2**20


@dataclass(frozen=True)
class Choice:
    """What one shape's product runs by. gain: share of torch's time that the algorithm saved; algorithm None: torch."""

    product: cublaslt.Product | None = None
    algorithm: object = None
    gain: float = 0.0


@dataclass
class Timed:
    """What was chosen for a number of rows, and for how many others the bits were compared and were torch's."""

    rows: int
    choice: Choice
    compared: int = 0


_TORCH = Choice()
# By shape, with the place in the list, which is what the operator is given.
_choices: dict[tuple, tuple[Choice, int]] = {}
_chosen: list[Choice] = []
# By all of a shape but its rows: those that were timed, with what was chosen.
_timed: dict[tuple, list[Timed]] = {}


def why_not_cublaslt(device: torch.device) -> str | None:
    """None where `cublaslt` can run on the device, otherwise why not."""
    if device.type != "cuda":
        return f"needs a CUDA GPU, the device is {device.type}"
    return cublaslt.why_not()


@torch.no_grad()
def matmul(x_MK: Tensor, w_KN: Tensor, *, out: Tensor | None = None, by: ProductLibrary = "auto") -> Tensor:
    """`x @ w` outside autograd, into `out` when given; torch's bits as far as they are compared.

    The first call of a shape on a GPU times the algorithms, about half a second. `by="torch"` does not, nor does any
    call under deterministic algorithms. Raises ValueError where `by="cublaslt"` cannot run.
    """
    if by == "cublaslt" and (reason := why_not_cublaslt(x_MK.device)):
        raise ValueError(f"cublaslt {reason}")
    if by == "torch" or not x_MK.is_cuda:
        return torch.mm(x_MK, w_KN) if out is None else torch.mm(x_MK, w_KN, out=out)
    if out is None:
        out = torch.empty(x_MK.shape[0], w_KN.shape[1], dtype=x_MK.dtype, device=x_MK.device)
    choice, number = _choice_for(x_MK, w_KN, out)
    if choice.algorithm is None:
        return torch.mm(x_MK, w_KN, out=out)
    torch.ops.packloop.mm(x_MK, w_KN, out, number)
    return out


def choice_for(x_MK: Tensor, w_KN: Tensor, out_MN: Tensor) -> Choice:
    """What products of these shapes run by: chosen at the first call, which overwrites `out` with their product."""
    return _choice_for(x_MK, w_KN, out_MN)[0]


def _choice_for(x_MK: Tensor, w_KN: Tensor, out_MN: Tensor) -> tuple[Choice, int]:
    if torch.are_deterministic_algorithms_enabled():
        return _TORCH, -1
    x_key = x_MK.device, x_MK.dtype, x_MK.shape, x_MK.stride()
    w_key = w_KN.device, w_KN.dtype, w_KN.shape, w_KN.stride()
    key = (*x_key, *w_key, out_MN.device, out_MN.dtype, out_MN.shape, out_MN.stride())
    if (known := _choices.get(key)) is not None:
        return known
    rows = x_MK.shape[0]
    family = (*x_key[:2], x_MK.shape[1], x_MK.stride(), *w_key, out_MN.device, out_MN.dtype, out_MN.stride())
    near = [timed for timed in _timed.get(family, ()) if abs(timed.rows - rows) <= _NEAR * timed.rows]
    num_timed = sum(map(len, _timed.values()))
    is_full = len(_choices) >= _MOST_KNOWN or (not near and num_timed >= MOST_SHAPES)
    if is_full or out_MN.shape != (rows, w_KN.shape[1]):
        return _TORCH, -1
    if near:
        choice = _adapted(min(near, key=lambda timed: abs(timed.rows - rows)), x_MK, w_KN, out_MN)
    else:
        choice = _choose(x_MK, w_KN, out_MN)
        _timed.setdefault(family, []).append(Timed(rows, choice))
    _chosen.append(choice)
    _choices[key] = choice, len(_chosen) - 1
    return _choices[key]


def _adapted(near: Timed, x_MK: Tensor, w_KN: Tensor, out_MN: Tensor) -> Choice:
    """The choice made for almost as many rows, for these: torch where it does not give torch's bits, or was made for
    addresses that are multiples of more. Bits that are compared leave the product in `out`.
    """
    found = near.choice
    if found.algorithm is None or not found.product.is_aligned(x_MK, w_KN, out_MN):
        return _TORCH
    with cublaslt.on_device(x_MK.device):
        try:
            product = cublaslt.Product(x_MK, w_KN, out_MN)
        except cublaslt.CublasLtError:
            return _TORCH
        if near.compared < _COMPARED:
            torch.mm(x_MK, w_KN, out=out_MN)
            if not _gives(product, found.algorithm, x_MK, w_KN, out_MN, _sampled(out_MN).clone()):
                return _TORCH
            near.compared += 1
    return Choice(product, found.algorithm, found.gain)


def _sampled(out_MN: Tensor) -> Tensor:
    """Every so many rows; an odd number, so that all rows of a tile have their turn."""
    return out_MN[:: max(1, out_MN.numel() * out_MN.element_size() // _SAMPLE_BYTES) | 1]


def _gives(product: cublaslt.Product, algorithm, x_MK: Tensor, w_KN: Tensor, out_MN: Tensor, expected: Tensor) -> bool:
    """Whether the algorithm runs, and the sampled rows of `out` are then `expected` bit for bit."""
    _sampled(out_MN).fill_(float("nan"))
    try:
        product.run(algorithm, x_MK, w_KN, out_MN)
    except cublaslt.CublasLtError:
        return False  # offered, and then refused
    return torch.equal(_sampled(out_MN), expected)


@torch.no_grad()
def _choose(x_MK: Tensor, w_KN: Tensor, out_MN: Tensor) -> Choice:
    flops = 2.0 * x_MK.shape[0] * x_MK.shape[1] * w_KN.shape[1]
    if flops < _LEAST_FLOPS or cublaslt.why_not() or not cublaslt.fits(x_MK, w_KN, out_MN):
        return _TORCH
    with cublaslt.on_device(x_MK.device):
        return _fastest(x_MK, w_KN, out_MN)


def _fastest(x_MK: Tensor, w_KN: Tensor, out_MN: Tensor) -> Choice:
    shapes = f"{tuple(x_MK.shape)} x {tuple(w_KN.shape)}"
    try:
        product = cublaslt.Product(x_MK, w_KN, out_MN)
    except cublaslt.CublasLtError as error:
        logger.info("kernels.matmul: %s by torch: %s", shapes, error)
        return _TORCH
    runs: list[Callable[[], object]] = [lambda: torch.mm(x_MK, w_KN, out=out_MN)]
    runs[0]()
    expected = _sampled(out_MN).clone()
    algorithms = [None]
    for algorithm in product.algorithms:
        if _gives(product, algorithm, x_MK, w_KN, out_MN, expected):
            algorithms.append(algorithm)
            runs.append(lambda algorithm=algorithm: product.run(algorithm, x_MK, w_KN, out_MN))
    times = _times_ms(runs)
    best = min(range(len(times)), key=times.__getitem__)
    gain = 1 - times[best] / times[0]
    compared = f"{len(product.algorithms)} algorithms, {len(runs) - 1} with torch's bits, {100 * gain:.1f} % to gain"
    logger.debug("kernels.matmul: %s: %s", shapes, compared)
    return Choice(product, algorithms[best], gain) if gain >= _LEAST_GAIN else _TORCH


def _times_ms(runs: list[Callable[[], object]]) -> list[float]:
    """Of each, the median of rounds in which all take turns on the current device."""
    started = time.perf_counter()
    while time.perf_counter() - started < _WARM_UP_S:
        for run in runs:
            run()
        torch.cuda.synchronize()
    laps = []
    for _ in range(_ROUNDS):
        for run in runs:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(_REPEATS):
                run()
            end.record()
            laps.append((start, end))
    torch.cuda.synchronize()
    ms = [start.elapsed_time(end) / _REPEATS for start, end in laps]
    return [statistics.median(ms[index :: len(runs)]) for index in range(len(runs))]


def _run_chosen(x_MK: Tensor, w_KN: Tensor, out_MN: Tensor, number: int) -> None:
    product, algorithm = _chosen[number].product, _chosen[number].algorithm
    if product.is_aligned(x_MK, w_KN, out_MN):
        try:
            product.run(algorithm, x_MK, w_KN, out_MN)
            return
        except cublaslt.CublasLtError as error:
            logger.debug("kernels.matmul: by torch this time: %s", error)
    torch.mm(x_MK, w_KN, out=out_MN)


_LIBRARY = torch.library.Library("packloop", "FRAGMENT")
_LIBRARY.define("mm(Tensor x, Tensor w, Tensor(a!) out, int choice) -> ()")
_LIBRARY.impl("mm", _run_chosen, "CUDA")
