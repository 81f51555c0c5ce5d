"""Documents that share their beginning, in bf16, held to whole documents by the rule of attention_oracle.py."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from attention_oracle import (
    DEVICE,
    DTYPE,
    HEADS,
    assert_no_worse,
    by_backend,
    by_pytorch,
    exact_rope,
    in_slices,
    instruction_like,
    layout_of,
    random_case,
    stock_rope,
)

from packloop.kernels import reference
from packloop.kernels.document_attention import DocumentAttention
from packloop.kernels.linear_cross_entropy import cross_entropy_
from packloop.kernels.rope import Rotation

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

# Lengths of runs, and for each the run that holds what its document begins with.
CASES = {
    "one group": ((35, 64, 1, 200, 33), (-1, 0, 0, 0, 0)),
    "long beginning": ((300, 5, 128, 700), (-1, 0, 0, 0)),
    "two groups": ((20, 65, 30, 64, 100, 1, 500, 77), (-1, 0, 0, -1, 3, 3, -1, -1)),
    "instructions": ((35, *instruction_like(12288)[:-1]), (-1, *[0] * (len(instruction_like(12288)) - 1))),
}


def rotation_at(positions_T: torch.Tensor, head_dim: int) -> Rotation:
    inv_freq = 1.0 / 10000 ** (torch.arange(0, head_dim, 2, device=DEVICE) / head_dim)
    return Rotation(*reference.rope_tables(inv_freq, int(positions_T.max()) + 1), positions_T.to(DEVICE))


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("rotates", [True, False])
def test_outputs_and_gradients_are_those_of_whole_documents(name: str, heads, rotates: bool):
    lengths, prefix_of = CASES[name]
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    runs = [torch.arange(a, b) for a, b in pairwise(bounds)]
    begins = [0 if p < 0 else lengths[p] for p in prefix_of]
    rotation = rotation_at(torch.cat([torch.arange(n) + b for n, b in zip(lengths, begins)]), heads[2])
    layout = replace(layout_of(lengths), prefix_of=torch.tensor(prefix_of, dtype=torch.int32))
    buffer, d_out = random_case(lengths, heads)
    scale = heads[2] ** -0.5
    found = by_backend(DocumentAttention(), buffer, d_out, heads, layout, scale, rotation if rotates else None)
    again = by_backend(DocumentAttention(), buffer, d_out, heads, layout, scale, rotation if rotates else None)
    assert all(torch.equal(one, other) for one, other in zip(found, again))

    # Whole documents, each with its own copy of the beginning, whose output nobody takes.
    slots = [torch.cat([runs[p], run]) if p >= 0 else run for run, p in zip(runs, prefix_of)]
    copies, whole = torch.cat(slots).to(DEVICE), tuple(map(len, slots))
    own = torch.cat([torch.arange(len(s)) >= len(s) - len(run) for s, run in zip(slots, runs)]).to(DEVICE)
    d_copies = torch.zeros(len(copies), *d_out.shape[1:], dtype=DTYPE, device=DEVICE)
    d_copies[own] = d_out
    at = rotation_at(torch.cat([torch.arange(n) for n in whole]), heads[2]) if rotates else None
    results = []
    for dtype, rope in ((DTYPE, stock_rope), (torch.float32, exact_rope)):
        inputs = [x[copies] for x in in_slices(heads, buffer)]
        out, *gradients = by_pytorch(inputs, d_copies, whole, scale, at, dtype, rope)
        summed = [
            torch.zeros(len(d_out), *g.shape[1:], device=DEVICE).index_add(0, copies, g.float()) for g in gradients
        ]
        results.append([out[own], *(s.to(dtype) for s in summed)])
    for triple, factor in zip(zip(found, *results), (2, 3, 3, 3)):
        assert_no_worse(*triple, factor)


@pytest.mark.parametrize("vocabulary", [300, 32000, 128256])
def test_a_targets_weight_multiplies_its_loss_and_gradient(vocabulary: int):
    logits = torch.randn(70, vocabulary, device=DEVICE).to(DTYPE)
    labels, weights = torch.randint(vocabulary, (70,), device=DEVICE), torch.arange(70.0, device=DEVICE)
    by_triton, by_torch = logits.clone(), logits.clone()
    losses = [
        cross_entropy_(x, labels, weights, needs_gradient=True, by=by)
        for x, by in ((by_triton, "triton"), (by_torch, "torch"))
    ]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(by_triton, by_torch)
