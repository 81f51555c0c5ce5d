"""Attention of packed documents on the CPU, in Triton's interpreter, against the oracles.

test_interpreter.py runs this. float32 only, as test_kernels_interpreted.py; bf16 and long documents are tests/gpu's.
"""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from interpreter import interpreted, ordinary

from packloop.kernels import document_attention, reference
from packloop.kernels.attention import DocumentLayout
from packloop.kernels.document_attention import (
    BackwardTiles,
    DocumentAttention,
    Tiles,
    plan_documents,
    plan_keys,
    plan_queries,
)
from packloop.kernels.rope import Rotation

SCALE = 0.11
pytestmark = pytest.mark.usefixtures("poisoned_outputs")


LARGE = Tiles(owned=64, streamed=64, num_warps=4, num_stages=1)
WIDE, TALL = (Tiles(owned=owned, streamed=48 - owned, num_warps=4, num_stages=1) for owned in (16, 32))


class Case(NamedTuple):
    """Documents of these lengths with their inputs in column slices of one buffer."""

    lengths: list[int]
    heads: tuple[int, int, int]
    layout: DocumentLayout
    rotation: Rotation
    qkv: torch.Tensor
    d_out: torch.Tensor

    def split(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        num_heads, num_kv_heads, head_dim = self.heads
        sizes = [8, num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim, 5]
        return [part.unflatten(1, (-1, head_dim)) for part in buffer.split(sizes, dim=1)[1:4]]


def make_case(lengths: list[int], heads: tuple[int, int, int]) -> Case:
    num_heads, num_kv_heads, head_dim = heads
    num_slots = sum(lengths)
    generator = torch.Generator().manual_seed(num_slots)
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    document_ids = torch.arange(len(lengths), dtype=torch.int32).repeat_interleave(torch.tensor(lengths))
    # The first document starts at position 3, as the tail of a row under `wrapped` does.
    positions = torch.cat([torch.arange(n) + 3 * (i == 0) for i, n in enumerate(lengths)])
    tables = reference.rope_tables(1 / 10000 ** (torch.arange(0, head_dim, 2) / head_dim), max(lengths) + 3, 1.2)
    return Case(
        lengths,
        heads,
        DocumentLayout(document_ids[None], bounds, max(lengths), is_packed=True),
        Rotation(*tables, positions),
        torch.randn(num_slots, 8 + (num_heads + 2 * num_kv_heads) * head_dim + 5, generator=generator),
        torch.randn(num_slots, num_heads, head_dim, generator=generator),
    )


def ours(case: Case, backend: DocumentAttention, rotation: Rotation | None) -> list[torch.Tensor]:
    """(out, dq, dk, dv); everything beside the slices that are to be written stays as it was."""
    buffer = case.qkv.clone()
    inputs = case.split(buffer)
    out, saved = backend.forward(*inputs, case.layout, SCALE, rotation=rotation)
    assert torch.equal(buffer[:, :8], case.qkv[:, :8])
    assert torch.equal(buffer[:, -5:], case.qkv[:, -5:])
    gradients = torch.full_like(buffer, float("nan"))
    views = case.split(gradients)
    backend.backward(saved, case.d_out, *inputs, case.layout, SCALE, *views, rotation=rotation)
    assert int(gradients.isnan().sum()) == 13 * len(gradients)
    return [out, *views]


def expected(case: Case, rotation: Rotation | None) -> list[torch.Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in case.split(case.qkv)]
    q, k, v = leaves
    if rotation is not None:
        q, k = (reference.rope(x, rotation.cos_PD, rotation.sin_PD, rotation.position_ids_T) for x in (q, k))
    out = reference.attention(q, k, v, case.layout.document_ids_BL[0], scale=SCALE)
    return [out, *torch.autograd.grad(out, leaves, case.d_out)]


def assert_equal_within_rounding(case: Case, backend: DocumentAttention, rotation: Rotation | None) -> None:
    for found, target in zip(ours(case, backend, rotation), expected(case, rotation)):
        torch.testing.assert_close(found, target, rtol=1e-5, atol=2e-5)


@interpreted
@pytest.mark.parametrize(
    ("lengths", "heads", "rotates"),
    [
        ([1, 63, 0, 64, 65], (1, 1, 64), True),  # about a tile of 64
        ([2, 65], (1, 1, 64), False),
        ([33, 1], (2, 2, 128), True),
        ([130], (1, 1, 16), False),
    ],
)
def test_forward_and_every_gradient(lengths: list[int], heads: tuple[int, int, int], rotates: bool):
    case = make_case(lengths, heads)
    assert_equal_within_rounding(
        case, DocumentAttention(LARGE, BackwardTiles(LARGE, LARGE)), case.rotation if rotates else None
    )


@interpreted
@pytest.mark.parametrize(("lengths", "heads"), [([20, 13], (4, 2, 64)), ([2, 9], (8, 1, 16))])
def test_grouped_heads_and_every_gradient(lengths: list[int], heads: tuple[int, int, int]):
    case = make_case(lengths, heads)
    assert_equal_within_rounding(case, DocumentAttention(LARGE, BackwardTiles(LARGE, LARGE)), case.rotation)


@interpreted
@pytest.mark.parametrize(
    "backend",
    [
        DocumentAttention(WIDE, BackwardTiles(queries=WIDE, keys=TALL)),
        DocumentAttention(TALL, BackwardTiles(queries=TALL, keys=WIDE)),
    ],
)
def test_any_tiles(backend: DocumentAttention):
    case = make_case([33, 1, 40], (2, 1, 16))
    assert_equal_within_rounding(case, backend, case.rotation)


@interpreted
def test_forward_leaves_q_and_k_turned():
    case = make_case([40, 7], (2, 1, 32))
    buffer = case.qkv.clone()
    q, k, v = case.split(buffer)
    out = torch.full((47, 80), float("nan"))
    found, _ = DocumentAttention().forward(
        q, k, v, case.layout, SCALE, rotation=case.rotation, out=out[:, 8:72].unflatten(1, (2, 32))
    )
    assert found.data_ptr() == out[:, 8:].data_ptr()
    assert int(out.isnan().sum()) == 47 * 16
    before = case.split(case.qkv)
    for turned, x in zip((q, k), before):
        cos_PD, sin_PD, positions_T = case.rotation.cos_PD, case.rotation.sin_PD, case.rotation.position_ids_T
        torch.testing.assert_close(turned, reference.rope(x, cos_PD, sin_PD, positions_T), rtol=2e-6, atol=2e-6)
    assert torch.equal(v, before[2])


@interpreted
def test_documents_apart_and_results_repeat():
    case = make_case([20, 35, 9], (2, 1, 16))
    first = ours(case, DocumentAttention(), case.rotation)
    for found, again in zip(ours(case, DocumentAttention(), case.rotation), first):
        assert torch.equal(found, again)
    case.qkv[20:55] += 1
    case.d_out[20:55] += 1
    others = torch.tensor([*range(20), *range(55, 64)])
    for found, before in zip(ours(case, DocumentAttention(), case.rotation), first):
        assert torch.equal(found[others], before[others])
        assert not torch.equal(found[20:55], before[20:55])


@interpreted
@pytest.mark.parametrize("head_by_head", [False, True], ids=["slot by slot", "head by head"])
def test_under_autograd(head_by_head: bool):
    """Also of memory that lies head by head, as a stock layer's q and k of one row do."""
    case = make_case([17, 30], (4, 2, 32))
    leaves = [x.detach().clone().requires_grad_() for x in case.split(case.qkv)]
    given = [x.transpose(0, 1).contiguous().transpose(0, 1) if head_by_head else x for x in leaves]
    out = DocumentAttention()(*given, case.layout, SCALE)
    for found, target in zip([out, *torch.autograd.grad(out, leaves, case.d_out)], expected(case, None)):
        torch.testing.assert_close(found, target, rtol=1e-5, atol=2e-5)


def test_plan_lists_every_tile_once_longest_document_first():
    plan = plan_documents(torch.tensor([0, 5, 5, 70, 198], dtype=torch.int32), 64)
    assert plan.dtype == torch.int32
    assert plan.tolist() == [[70, 198, 1], [70, 198, 0], [5, 70, 1], [5, 70, 0], [0, 5, 0]]
    assert plan_documents(torch.tensor([0, 0]), 64).shape == (0, 3)
    assert plan_documents(torch.tensor([0]), 64).shape == (0, 3)


def test_refuses_what_it_cannot_read():
    layout = make_case([4], (1, 1, 16)).layout
    q = torch.zeros(4, 2, 16)
    with pytest.raises(ValueError, match=r"adjacent features and heads"):
        DocumentAttention().forward(torch.zeros(2, 4, 16).transpose(0, 1), q, q, layout, SCALE)
    with pytest.raises(ValueError, match=r"heads of 24 features"):
        DocumentAttention().forward(*[torch.zeros(4, 2, 24)] * 3, layout, SCALE)
    with pytest.raises(ValueError, match=r"scale -1"):
        DocumentAttention().forward(q, q, q, layout, -1)


@interpreted
def test_saved_output_is_freed_with_its_graph_without_the_garbage_collector():
    """The function saves its own output; held by the graph's node itself it would keep its graph, and all in it."""
    gc.disable()
    try:
        q, k, v = (torch.randn(20, 2, 16, requires_grad=True) for _ in range(3))
        bounds = torch.tensor([0, 8, 20], dtype=torch.int32)
        layout = DocumentLayout(torch.zeros(1, 20, dtype=torch.int32), bounds, 12, True, bounds)
        before = q * 1.0
        out = DocumentAttention()(before, k, v, layout, 0.25)
        held = weakref.ref(before)
        del before, out
        assert held() is None
    finally:
        gc.enable()


# Shared beginnings: what each document begins with, and its own tokens; -1 for a document that shares nothing.
GROUPS = [
    ([17, 5, 40, 1], [-1, 0, 0, 0]),
    ([20, 33, 7, 16, 45, 1, 30, 12], [-1, 0, 0, -1, 3, 3, -1, -1]),
    ([66, 3, 70], [-1, 0, 0]),
]


def shared_case(lengths: list[int], prefix_of: list[int], heads: tuple[int, int, int]) -> Case:
    case = make_case(lengths, heads)
    offset = torch.tensor([0 if p < 0 else lengths[p] for p in prefix_of])
    positions = torch.cat([torch.arange(n) + begin for n, begin in zip(lengths, offset)])
    tables = reference.rope_tables(
        1 / 10000 ** (torch.arange(0, heads[2], 2) / heads[2]), int(positions.max()) + 1, 1.2
    )
    layout = replace(case.layout, prefix_of=torch.tensor(prefix_of, dtype=torch.int32))
    return case._replace(layout=layout, rotation=Rotation(*tables, positions))


@interpreted
@pytest.mark.parametrize(
    ("group", "heads", "tiles", "rotates"),
    [(0, (2, 1, 16), WIDE, True), (1, (1, 1, 32), TALL, True), (2, (1, 1, 16), LARGE, False)],
)
def test_documents_that_share_their_beginning(group, heads, rotates, tiles, monkeypatch):
    monkeypatch.setattr(document_attention, "_ROWS_PER_PART", 48)
    lengths, prefix_of = GROUPS[group]
    case = shared_case(lengths, prefix_of, heads)
    rotation = case.rotation if rotates else None
    leaves = [x.detach().clone().requires_grad_() for x in case.split(case.qkv)]
    q, k, v = leaves
    if rotates:
        q, k = (reference.rope(x, rotation.cos_PD, rotation.sin_PD, rotation.position_ids_T) for x in (q, k))
    # Whole documents, each with a copy of its beginning: the copies' outputs but one belong to nobody.
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    runs = [list(range(*span)) for span in pairwise(bounds)]
    slots = [(runs[p] if p >= 0 else []) + run for run, p in zip(runs, prefix_of)]
    copies = torch.tensor([slot for document in slots for slot in document])
    ids = torch.arange(len(slots)).repeat_interleave(torch.tensor([len(s) for s in slots]))
    own = torch.cat([torch.arange(len(s)) >= len(s) - len(run) for s, run in zip(slots, runs)])
    out = reference.attention(q[copies], k[copies], v[copies], ids, scale=SCALE)[own]
    target = [out, *torch.autograd.grad(out, leaves, case.d_out)]
    backend = DocumentAttention(tiles, BackwardTiles(tiles, tiles))
    for found, wanted in zip(ours(case, backend, rotation), target):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=3e-5)


@ordinary
def test_plans_of_shared_beginnings():
    bounds = torch.tensor([0, 70, 75, 1200, 1230], dtype=torch.int32)
    prefix_of = torch.tensor([-1, 0, 0, -1], dtype=torch.int32)
    assert plan_queries(bounds, 1024, prefix_of).tolist() == [
        [75, 1200, 1, 0, 70],
        [75, 1200, 0, 0, 70],
        [0, 70, 0, 0, 0],
        [1200, 1230, 0, 0, 0],
        [70, 75, 0, 0, 70],
    ]
    keys, sums = plan_keys(bounds, 64, prefix_of)
    assert keys[:6].tolist() == [
        [0, 70, 0, 0, 512, 0],
        [0, 70, 0, 512, 1024, 1],
        [0, 70, 0, 1024, 1200, 2],
        [0, 70, 1, 64, 576, 3],
        [0, 70, 1, 576, 1088, 4],
        [0, 70, 1, 1088, 1200, 5],
    ]
    assert sums.tolist() == [[0, 70, 0, 0, 3], [0, 70, 1, 3, 6]]
    assert keys[-1].tolist() == [70, 75, 0, 0, 5, -1]
    assert (keys[6:, 5] == -1).all()
    with pytest.raises(ValueError, match=r"documents \[1, 3\] begin with document 0 and must follow it"):
        plan_keys(bounds, 64, torch.tensor([-1, 0, -1, 0], dtype=torch.int32))
