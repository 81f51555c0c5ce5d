"""What the backends hand to flash-attn and flash-attn-4, which are stood in for: functions, arguments, shapes."""

from __future__ import annotations

import sys
from itertools import pairwise
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

from packloop.kernels.attention import DocumentLayout, load_backend
from packloop.kernels.flash_attention import CALLS, FlashAttn2, FlashAttn4

HEADS, KV_HEADS, HEAD_DIM, SCALE = 4, 2, 64, 0.1


def layout_of(*rows: list[int], is_packed: bool) -> DocumentLayout:
    """Rows of documents of these lengths, padding a document of its own at the end of a row, as the loader has it."""
    lengths = [length for row in rows for length in row]
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    ids = [torch.arange(len(row), dtype=torch.int32).repeat_interleave(torch.tensor(row)) for row in rows]
    ids = torch.stack(ids)
    return DocumentLayout(ids if is_packed else -ids.clamp(max=1), bounds, max(lengths), is_packed=is_packed)


def attend(q_LHD: Tensor, k_LKD: Tensor, v_LKD: Tensor, scale: float) -> Tensor:
    """Causal attention of one document, in float64."""
    q, k, v = (x.double().transpose(0, 1) for x in (q_LHD, k_LKD, v_LKD))
    k, v = (x.repeat_interleave(q.shape[0] // x.shape[0], 0) for x in (k, v))
    scores = (q @ k.transpose(1, 2) * scale).masked_fill(torch.ones(q.shape[1], q.shape[1]).triu(1).bool(), -torch.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1).to(q_LHD.dtype)


def gradients_of(documents, scale: float) -> None:
    """Fills dq, dk and dv of (dout, q, k, v, dq, dk, dv) of each document."""
    for d_out, q, k, v, *targets in documents:
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            out = attend(*leaves, scale)
        for target, gradient in zip(targets, torch.autograd.grad(out, leaves, d_out), strict=True):
            target.copy_(gradient)


class Package:
    """flash-attn's functions on a CPU; calls: (function's name, its arguments)."""

    def __init__(self):
        self.calls: list[tuple[str, dict]] = []

    def _documents(self, tensors: list[Tensor], cu_seqlens: Tensor):
        bounds = cu_seqlens.tolist()
        return [[x[start:stop] for x in tensors] for start, stop in pairwise(bounds)]

    def _flash_attn_forward(self, **given):
        self.calls.append(("_flash_attn_forward", given))
        rows = zip(given["q"], given["k"], given["v"], strict=True)
        out = torch.stack([attend(*row, given["softmax_scale"]) for row in rows])
        return out, torch.zeros(out.shape[0], HEADS, out.shape[1]), torch.empty(0), torch.zeros(2, dtype=torch.int64)

    def _flash_attn_varlen_forward(self, **given):
        self.calls.append(("_flash_attn_varlen_forward", given))
        documents = self._documents([given[name] for name in "qkv"], given["cu_seqlens_q"])
        out = torch.cat([attend(*document, given["softmax_scale"]) for document in documents])
        return out, torch.zeros(HEADS, len(out)), torch.empty(0), torch.zeros(2, dtype=torch.int64)

    def _flash_attn_backward(self, **given):
        self.calls.append(("_flash_attn_backward", given))
        rows = zip(*(given[name] for name in ("dout", "q", "k", "v", "dq", "dk", "dv")), strict=True)
        gradients_of(rows, given["softmax_scale"])

    def _flash_attn_varlen_backward(self, **given):
        self.calls.append(("_flash_attn_varlen_backward", given))
        tensors = [given[name] for name in ("dout", "q", "k", "v", "dq", "dk", "dv")]
        gradients_of(self._documents(tensors, given["cu_seqlens_q"]), given["softmax_scale"])


@pytest.fixture
def package(monkeypatch):
    fake, module = Package(), ModuleType("flash_attn")
    module.flash_attn_interface = fake
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    return fake


def tensors_of(layout: DocumentLayout, head_dim: int = HEAD_DIM) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """(q, k and v as slices of one buffer, slices of another for their gradients, d_out as a slice)."""
    num_slots, generator = layout.document_ids_BL.numel(), torch.Generator().manual_seed(0)
    sizes = [HEADS * head_dim, KV_HEADS * head_dim, KV_HEADS * head_dim, 3]
    buffer = torch.randn(num_slots, sum(sizes), generator=generator)
    inputs, views = (
        [part.unflatten(1, (-1, head_dim)) for part in made.split(sizes, 1)[:3]]
        for made in (buffer, torch.full_like(buffer, torch.nan))
    )
    d_out = torch.randn(num_slots, HEADS * head_dim + 5, generator=generator)[:, : HEADS * head_dim]
    return inputs, views, d_out.unflatten(1, (-1, head_dim))


FULL_ROWS = {
    "two rows": layout_of([7], [7], is_packed=False),
    "one row": layout_of([5], is_packed=False),
    "rows of one token": layout_of([1], [1], [1], is_packed=False),
}
OTHERS = {
    "packed": layout_of([3, 4], [2, 5], is_packed=True),
    "one row of three documents": layout_of([3, 4, 7], is_packed=True),
    "a row that ends in padding": layout_of([7], [4, 3], is_packed=False),
    "every row ends in padding": layout_of([5, 2], [4, 3], is_packed=False),
    "one row that ends in padding": layout_of([5, 3], is_packed=False),
}


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("layout", FULL_ROWS.values(), ids=FULL_ROWS)
def test_full_rows_of_one_document_go_by_the_dense_functions(package, layout, deterministic, monkeypatch):
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    (q, k, v), gradients, d_out = tensors_of(layout)
    backend = FlashAttn2()
    with torch.no_grad():
        out, saved = backend.forward(q, k, v, layout, SCALE)
        backend.backward(saved, d_out, q, k, v, layout, SCALE, *gradients)
    (forward, given), (backward, given_back) = package.calls
    assert (forward, backward) == ("_flash_attn_forward", "_flash_attn_backward")
    num_rows, length = layout.document_ids_BL.shape
    wide, narrow = (num_rows, length, HEADS, HEAD_DIM), (num_rows, length, KV_HEADS, HEAD_DIM)
    options = {"dropout_p": 0.0, "softmax_scale": SCALE, "causal": True, "softcap": 0.0, "alibi_slopes": None}
    options |= {"window_size_left": -1, "window_size_right": -1}
    shapes = {"q": wide, "k": narrow, "v": narrow, "dout": wide, "out": wide, "dq": wide, "dk": narrow, "dv": narrow}
    for name, arguments in package.calls:
        assert set(arguments) == set(CALLS["flash_attn"][name])
        assert {key: arguments[key] for key in options} == options
        assert all(tuple(arguments[key].shape) == shape for key, shape in shapes.items() if key in arguments)
        # Nothing is copied: rows of slots keep the strides that they have in the wider buffers.
        for key, tensor in {"q": q, "k": k, "v": v, "dout": d_out, **dict(zip(("dq", "dk", "dv"), gradients))}.items():
            assert key not in arguments or arguments[key].data_ptr() == tensor.data_ptr()
    assert given["return_softmax"] is False
    assert given_back["deterministic"] is deterministic
    assert given_back["softmax_lse"].shape == (num_rows, HEADS, length)
    assert given_back["rng_state"] is saved[2]
    assert out.shape == (num_rows * length, HEADS, HEAD_DIM)


@pytest.mark.parametrize(
    ("layout", "head_dim"),
    [*((layout, HEAD_DIM) for layout in OTHERS.values()), *((FULL_ROWS["two rows"], size) for size in (80, 96, 256))],
    ids=[*OTHERS, *(f"two rows, heads of {size}" for size in (80, 96, 256))],
)
def test_others_go_by_the_bounds_of_documents(package, layout, head_dim):
    (q, k, v), gradients, d_out = tensors_of(layout, head_dim)
    backend = FlashAttn2()
    with torch.no_grad():
        _, saved = backend.forward(q, k, v, layout, SCALE)
        backend.backward(saved, d_out, q, k, v, layout, SCALE, *gradients)
    assert [name for name, _ in package.calls] == ["_flash_attn_varlen_forward", "_flash_attn_varlen_backward"]
    for name, given in package.calls:
        assert set(given) == set(CALLS["flash_attn"][name])
        assert given["cu_seqlens_q"] is given["cu_seqlens_k"] is layout.cu_seqlens
        assert given["max_seqlen_q"] == given["max_seqlen_k"] == layout.max_seqlen
        assert (given["causal"], given["softmax_scale"], given["q"]) == (True, SCALE, q)


@pytest.mark.parametrize("layout", [*FULL_ROWS.values(), *OTHERS.values()], ids=[*FULL_ROWS, *OTHERS])
def test_outputs_and_gradients_lie_where_they_belong(package, layout):
    """Beside the backend `eager`, whose mask knows rows and documents: real tokens only, as losses see no others."""
    (q, k, v), gradients, d_out = tensors_of(layout)
    real = layout.document_ids_BL.flatten() >= 0
    d_out = d_out * real[:, None, None]
    backend = FlashAttn2()
    with torch.no_grad():
        out, saved = backend.forward(q, k, v, layout, SCALE)
        backend.backward(saved, d_out, q, k, v, layout, SCALE, *gradients)
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    expected = load_backend("eager")(*leaves, layout, SCALE)
    torch.testing.assert_close(out[real], expected.detach()[real])
    for found, gradient in zip(gradients, torch.autograd.grad(expected, leaves, d_out), strict=True):
        torch.testing.assert_close(found[real], gradient[real])


def test_autograd_sees_the_dense_functions(package):
    layout = FULL_ROWS["two rows"]
    inputs = [x.detach().clone().requires_grad_() for x in tensors_of(layout)[0]]
    found = torch.autograd.grad(FlashAttn2()(*inputs, layout, SCALE).square().sum(), inputs)
    expected = torch.autograd.grad(load_backend("eager")(*inputs, layout, SCALE).square().sum(), inputs)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_flash_attn_4_is_given_what_its_signature_is_compared_with():
    given = {}

    def called(name):
        return lambda **arguments: given.update({name: arguments}) or (torch.zeros(7, HEADS, HEAD_DIM), torch.zeros(1))

    backend = FlashAttn4.__new__(FlashAttn4)
    backend._package = SimpleNamespace(**{name: called(name) for name in CALLS["flash_attn_4"]})
    layout = layout_of([3, 4], is_packed=True)
    (q, k, v), gradients, d_out = tensors_of(layout)
    _, saved = backend.forward(q, k, v, layout, SCALE)
    backend.backward(saved, d_out, q, k, v, layout, SCALE, *gradients)
    assert {name: set(arguments) for name, arguments in given.items()} == {
        name: set(arguments) for name, arguments in CALLS["flash_attn_4"].items()
    }
    assert all(one["q"] is q and one["v"] is v and one["causal"] for one in given.values())
    assert given["_flash_attn_bwd"]["dk"] is gradients[1]
