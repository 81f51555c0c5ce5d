"""cuBLASLt's calls where there is neither the library nor a GPU: both are stood in for."""

from __future__ import annotations

import ctypes
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from packloop.kernels import cublaslt


class Operand:
    """As much of a bf16 matrix on a GPU as the calls look at."""

    dtype, is_cuda = torch.bfloat16, True

    def __init__(
        self, *shape: int, strides: tuple[int, int] | None = None, address: int = 0x7F0000000000, gpu: int = 0
    ):
        self.shape, self._strides, self._address = shape, strides or (shape[1], 1), address
        self.device = torch.device("cuda", gpu)

    def stride(self, dim: int | None = None):
        return self._strides if dim is None else self._strides[dim]

    def data_ptr(self) -> int:
        return self._address


class Library:
    """What is called, on which device, and how many descriptors of each kind are alive. refused: (name, which call)."""

    def __init__(self, devices: SimpleNamespace):
        self._devices = devices
        self.calls: Counter[str] = Counter()
        self.called_on: dict[str, int] = {}
        self.alive: dict[int, str] = {}
        self.refused: tuple[str, int] | None = None

    def __getattr__(self, name: str):
        def call(*arguments) -> int:
            self.calls[name] += 1
            self.called_on[name] = self._devices.current
            if (name, self.calls[name]) == self.refused:
                return 15
            if name.endswith("Create"):
                pointer = arguments[0]._obj
                pointer.value = sum(self.calls.values())
                self.alive[pointer.value] = name.removesuffix("Create")
            elif name.endswith("Destroy"):
                assert self.alive.pop(arguments[0].value) == name.removesuffix("Destroy")
            elif name == "cublasLtMatmulAlgoGetHeuristic":
                arguments[-1]._obj.value = 3
                arguments[-2]._obj[1].state = 15  # one that the library itself calls unusable
            return 0

        return call


@pytest.fixture
def devices(monkeypatch) -> SimpleNamespace:
    """current: the device's number; switches: how often another was made the current one."""
    state = SimpleNamespace(current=0, switches=0)

    class Device:
        def __init__(self, device: torch.device):
            self._index = device.index

        def __enter__(self):
            self._before, state.current = state.current, self._index
            state.switches += 1

        def __exit__(self, *_error):
            state.current = self._before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: state.current)
    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=100 + device.index))
    return state


@pytest.fixture
def library(monkeypatch, devices) -> Library:
    stand_in = Library(devices)
    monkeypatch.setattr(cublaslt, "_library", lambda: stand_in)
    monkeypatch.setattr(cublaslt, "_handle", lambda index: ctypes.c_void_p(1 + index))
    return stand_in


def operands(**of_each) -> tuple[Operand, Operand, Operand]:
    """x [6, 8], w [8, 10] with adjacent rows, out [6, 10]."""
    return Operand(6, 8, **of_each), Operand(8, 10, strides=(1, 8), **of_each), Operand(6, 10, **of_each)


def test_what_is_created_is_destroyed_with_the_product(library):
    product = cublaslt.Product(*operands())
    assert len(product.algorithms) == 2
    assert sorted(library.alive.values()) == ["cublasLtMatmulDesc", *["cublasLtMatrixLayout"] * 3]
    del product
    assert library.alive == {}


@pytest.mark.parametrize(
    "refused",
    [
        ("cublasLtMatmulDescCreate", 1),
        ("cublasLtMatmulDescSetAttribute", 1),
        ("cublasLtMatrixLayoutCreate", 1),
        ("cublasLtMatrixLayoutCreate", 3),
        ("cublasLtMatmulPreferenceCreate", 1),
        ("cublasLtMatmulPreferenceSetAttribute", 1),
        ("cublasLtMatmulAlgoGetHeuristic", 1),
    ],
    ids=lambda refused: "-".join(map(str, refused)),
)
def test_a_product_that_is_refused_leaves_nothing_behind(library, refused):
    library.refused = refused
    with pytest.raises(cublaslt.CublasLtError, match=f"^{refused[0]} failed with cublasStatus_t 15$") as caught:
        cublaslt.Product(*operands())
    del caught  # its traceback holds the product
    assert library.alive == {}


@pytest.mark.parametrize("current", [0, 1])
def test_calls_are_made_on_the_operands_device(library, devices, current):
    devices.current = current
    x, w, out = operands(gpu=1)
    product = cublaslt.Product(x, w, out)
    product.run(product.algorithms[0], x, w, out)
    assert library.called_on["cublasLtMatmulAlgoGetHeuristic"] == library.called_on["cublasLtMatmul"] == 1
    assert devices.current == current
    assert devices.switches == (2 if current == 0 else 0)


@pytest.mark.parametrize(("first", "multiple"), [(0, 256), (4096, 256), (16, 16), (48, 16), (2, 2)])
def test_addresses_must_be_as_aligned_as_the_first(library, first, multiple):
    """One operand at an address of its own is enough, whichever it is."""
    for place in range(3):
        made_for = list(operands())
        made_for[place]._address += first
        product = cublaslt.Product(*made_for)
        for moved in range(3):
            for offset in (0, 256, 1024, multiple, multiple // 2):
                later = list(operands())
                later[moved]._address += offset
                assert product.is_aligned(*later) == (offset % multiple == 0)


def test_only_operands_of_one_device_dtype_and_shape_fit(library):
    assert cublaslt.fits(*operands())
    x, w, out = operands()
    assert not cublaslt.fits(x, w, Operand(5, 10))
    assert not cublaslt.fits(Operand(6, 9), w, out)
    assert not cublaslt.fits(x, Operand(8, 10, gpu=1), out)
    assert not cublaslt.fits(x, w, Operand(6, 10, gpu=1))
    assert not cublaslt.fits(Operand(6, 8, strides=(1, 6)), w, out)
    assert not cublaslt.fits(x, Operand(8, 10, strides=(20, 2)), out)


@pytest.mark.parametrize("raised", [OSError("no such file"), AttributeError("undefined symbol: cublasLtMatmul")])
def test_a_library_that_cannot_be_called_is_a_reason_and_no_error(monkeypatch, raised):
    def load():
        raise raised

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cublaslt, "_library", load)
    assert cublaslt.why_not.__wrapped__() == f"cannot load cuBLASLt ({raised})"
