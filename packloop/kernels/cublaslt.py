"""cuBLASLt through ctypes: a matrix product by any of the algorithms that its heuristic offers, without a workspace.

torch takes the one that the heuristic likes best. Others may be faster where power limits the GPU, and without a
workspace each sums every element of the result in one piece, in order of the inner dimension.
Source of names and values: cublasLt.h of CUDA 12 and 13, which do not differ here.

Shapes: x [M, K], w [K, N], out [M, N]. x and out have adjacent columns; w has adjacent columns or adjacent rows.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from ctypes import POINTER, byref, c_float, c_int, c_int64, c_size_t, c_uint64, c_void_p
from functools import cache

import torch
from torch import Tensor

_COMPUTE_32F, _R_32F = 68, 0
_TRANSA = 3  # of cublasLtMatmulDescAttributes_t
_MAX_WORKSPACE_BYTES = 1  # of cublasLtMatmulPreferenceAttributes_t
_DTYPES = {torch.float16: 2, torch.bfloat16: 14}
# More than the heuristic has ever been seen to offer.
_MOST_ALGORITHMS = 32
# Bytes: the heuristic, told nothing else, offers what may need addresses that are multiples of this.
_MOST_ALIGNMENT = 256


class CublasLtError(RuntimeError):
    """The library refused a call."""


class _HeuristicResult(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t, whose first field is the opaque algorithm."""

    _fields_ = [
        ("algorithm", c_uint64 * 8),
        ("workspace_bytes", c_size_t),
        ("state", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    ]


@cache
def why_not() -> str | None:
    """None where the library that torch itself uses can be called, otherwise why not."""
    if torch.version.cuda is None:
        return "needs a torch built for CUDA"
    try:
        _library()
    except (OSError, AttributeError) as error:  # no such file, or one without these functions
        return f"cannot load cuBLASLt ({error})"
    return None


@cache
def _library() -> ctypes.CDLL:
    """The library of torch's own CUDA, by the name under which torch has loaded it."""
    library = ctypes.CDLL(f"libcublasLt.so.{torch.version.cuda.split('.')[0]}")
    pointer = POINTER(c_void_p)
    arguments = {
        "cublasLtCreate": [pointer],
        "cublasLtMatmulDescCreate": [pointer, c_int, c_int],
        "cublasLtMatmulDescSetAttribute": [c_void_p, c_int, c_void_p, c_size_t],
        "cublasLtMatmulDescDestroy": [c_void_p],
        "cublasLtMatrixLayoutCreate": [pointer, c_int, c_uint64, c_uint64, c_int64],
        "cublasLtMatrixLayoutDestroy": [c_void_p],
        "cublasLtMatmulPreferenceCreate": [pointer],
        "cublasLtMatmulPreferenceSetAttribute": [c_void_p, c_int, c_void_p, c_size_t],
        "cublasLtMatmulPreferenceDestroy": [c_void_p],
        "cublasLtMatmulAlgoGetHeuristic": [*[c_void_p] * 7, c_int, c_void_p, POINTER(c_int)],
        "cublasLtMatmul": [*[c_void_p] * 14, c_size_t, c_void_p],
    }
    for name, types in arguments.items():
        getattr(library, name).argtypes = types
    return library


@cache
def _handle(device_index: int) -> c_void_p:
    handle = c_void_p()
    with torch.cuda.device(device_index):
        _call("cublasLtCreate", byref(handle))
    return handle


def _call(name: str, *arguments) -> None:
    if status := getattr(_library(), name)(*arguments):
        raise CublasLtError(f"{name} failed with cublasStatus_t {status}")


def on_device(device: torch.device) -> AbstractContextManager:
    """Makes it the current one, which a handle and a stream must belong to; costs next to nothing where it is."""
    is_current = device.index is None or device.index == torch.cuda.current_device()
    return nullcontext() if is_current else torch.cuda.device(device)


def fits(x_MK: Tensor, w_KN: Tensor, out_MN: Tensor) -> bool:
    """Whether these are 16-bit matrices of one dtype on one GPU, shaped and laid out as the head of this file says."""
    return (
        x_MK.is_cuda
        and x_MK.device == w_KN.device == out_MN.device
        and x_MK.dtype in _DTYPES
        and x_MK.dtype == w_KN.dtype == out_MN.dtype
        and x_MK.shape[1] == w_KN.shape[0]
        and out_MN.shape == (x_MK.shape[0], w_KN.shape[1])
        and x_MK.stride(1) == 1
        and out_MN.stride(1) == 1
        and 1 in w_KN.stride()
    )


class Product:
    """`x @ w` for operands of one shape, strides, dtype and device (see `fits`) at addresses that `is_aligned` takes.

    algorithms: what the heuristic offers for them, its favourite first; each an argument for `run`. CublasLtError
    where the library refuses.
    """

    def __init__(self, x_MK: Tensor, w_KN: Tensor, out_MN: Tensor):
        (num_rows, inner), num_columns = x_MK.shape, w_KN.shape[1]
        self._alignment = _alignment(x_MK, w_KN, out_MN)
        self._handle = _handle(x_MK.device.index)
        self._one, self._zero = c_float(1.0), c_float(0.0)
        owned: list[tuple[Callable, c_void_p]] = []
        weakref.finalize(self, _destroy, owned)  # also where what follows raises
        # To the library, whose matrices have adjacent rows, the product is out^T = w^T x^T.
        is_transposed = w_KN.stride(0) == 1
        self._descriptor = c_void_p()
        _call("cublasLtMatmulDescCreate", byref(self._descriptor), _COMPUTE_32F, _R_32F)
        owned.append((_library().cublasLtMatmulDescDestroy, self._descriptor))
        if is_transposed:
            value = c_int(1)
            _call("cublasLtMatmulDescSetAttribute", self._descriptor, _TRANSA, byref(value), ctypes.sizeof(value))
        dtype = _DTYPES[x_MK.dtype]
        w_shape = (inner, num_columns, w_KN.stride(1)) if is_transposed else (num_columns, inner, w_KN.stride(0))
        shapes = (w_shape, (inner, num_rows, x_MK.stride(0)), (num_columns, num_rows, out_MN.stride(0)))
        self._layouts = []
        for rows, columns, leading in shapes:
            layout = c_void_p()
            _call("cublasLtMatrixLayoutCreate", byref(layout), dtype, rows, columns, leading)
            owned.append((_library().cublasLtMatrixLayoutDestroy, layout))
            self._layouts.append(layout)
        with on_device(x_MK.device):
            self.algorithms = self._offered()

    def is_aligned(self, x_MK: Tensor, w_KN: Tensor, out_MN: Tensor) -> bool:
        """Whether all lie at multiples of what divides the addresses this was made for, at most 256 bytes."""
        return (x_MK.data_ptr() | w_KN.data_ptr() | out_MN.data_ptr()) % self._alignment == 0

    def _offered(self) -> list[ctypes.Array]:
        w, x, out = self._layouts
        preference, most_bytes = c_void_p(), c_uint64(0)
        results, count = (_HeuristicResult * _MOST_ALGORITHMS)(), c_int()
        _call("cublasLtMatmulPreferenceCreate", byref(preference))
        try:
            size = ctypes.sizeof(most_bytes)
            _call("cublasLtMatmulPreferenceSetAttribute", preference, _MAX_WORKSPACE_BYTES, byref(most_bytes), size)
            matrices = (w, x, out, out, preference)
            arguments = (self._handle, self._descriptor, *matrices, _MOST_ALGORITHMS, byref(results), byref(count))
            _call("cublasLtMatmulAlgoGetHeuristic", *arguments)
        finally:
            _library().cublasLtMatmulPreferenceDestroy(preference)
        return [result.algorithm for result in results[: count.value] if result.state == 0]

    def run(self, algorithm: ctypes.Array, x_MK: Tensor, w_KN: Tensor, out_MN: Tensor) -> None:
        """out = x @ w on their device's current stream, for operands like those that this was made for.

        CublasLtError where the library refuses the algorithm.
        """
        w, x, out = self._layouts
        with on_device(x_MK.device):
            _call(
                "cublasLtMatmul",
                self._handle,
                self._descriptor,
                byref(self._one),
                w_KN.data_ptr(),
                w,
                x_MK.data_ptr(),
                x,
                byref(self._zero),
                out_MN.data_ptr(),
                out,
                out_MN.data_ptr(),
                out,
                byref(algorithm),
                None,
                0,
                torch.cuda.current_stream(x_MK.device).cuda_stream,
            )


def _destroy(owned: list[tuple[Callable, c_void_p]]) -> None:
    for destroy, pointer in reversed(owned):
        destroy(pointer)


def _alignment(*operands: Tensor) -> int:
    """The largest power of two, up to `_MOST_ALIGNMENT`, that divides all their addresses."""
    bits = _MOST_ALIGNMENT
    for operand in operands:
        bits |= operand.data_ptr()
    return bits & -bits
