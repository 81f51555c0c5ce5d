"""The backend `document` on a GPU, in bf16 and with RoPE inside, by the rule of attention_oracle.py."""

from __future__ import annotations

import pytest
import torch
from attention_oracle import (
    DEVICE,
    DTYPE,
    HEADS,
    by_backend,
    by_pytorch,
    exact_rope,
    in_slices,
    instruction_like,
    judge,
    layout_of,
    name_of,
    random_case,
    rotation_of,
)

from packloop.kernels.attention import DocumentLayout
from packloop.kernels.document_attention import DocumentAttention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture(autouse=True)
def _poisoned_outputs():
    """New memory holds NaN, so an element that a kernel leaves out shows."""
    torch.set_float32_matmul_precision("highest")  # the exact expression must not run in TF32
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize(
    "lengths",
    [
        (1,),
        (2,),
        (63,),
        (64,),
        (65,),
        (100,),
        (127, 128, 129),
        (0, 31, 0, 33),
        (1000,),
        (1, 2048, 1),
        (300, 2048, 4095),
        (1,) * 256,
        tuple(1 + 7 * n % 100 for n in range(256)),
        instruction_like(16384),
    ],
    ids=name_of,
)
def test_documents(lengths: tuple[int, ...], heads: tuple[int, int, int]):
    judge(DocumentAttention(), lengths, heads, rotates=True)


@pytest.mark.parametrize("heads", [(8, 2, 128), (8, 1, 64)], ids=str)
@pytest.mark.parametrize("lengths", [(1,), (100, 65), instruction_like(4096, seed=1)], ids=name_of)
def test_documents_turned_already(lengths: tuple[int, ...], heads: tuple[int, int, int]):
    judge(DocumentAttention(), lengths, heads)


@pytest.mark.parametrize("heads", [(4, 4, 128), (8, 1, 64)], ids=str)
@pytest.mark.parametrize("lengths", [(8191,), (16384, 1000), (32768,)], ids=name_of)
def test_long_documents(lengths: tuple[int, ...], heads: tuple[int, int, int]):
    judge(DocumentAttention(), lengths, heads, rotates=True)


def test_fp32():
    lengths, heads = (100, 33, 1), (2, 1, 64)
    buffer, d_out = random_case(lengths, heads, torch.float32)
    rotation = rotation_of(lengths, 64)
    found = by_backend(DocumentAttention(), buffer, d_out, heads, layout_of(lengths), 0.1, rotation)
    exact = by_pytorch(in_slices(heads, buffer), d_out, lengths, 0.1, rotation, torch.float32, exact_rope)
    for value, target in zip(found, exact):
        torch.testing.assert_close(value, target, rtol=1e-4, atol=1e-4)


def test_results_repeat_and_documents_are_apart():
    lengths, heads = instruction_like(16384), (8, 2, 128)
    buffer, d_out = random_case(lengths, heads)
    layout, rotation = layout_of(lengths), rotation_of(lengths, 128)

    def results():
        return by_backend(DocumentAttention(), buffer, d_out, heads, layout, 0.1, rotation)

    first = results()
    for _ in range(3):
        assert all(torch.equal(again, before) for again, before in zip(results(), first))
    start = sum(lengths[:7])
    changed = slice(start, start + lengths[7])
    buffer[changed] += 1
    kept = torch.ones(16384, dtype=torch.bool, device=DEVICE)
    kept[changed] = False
    for found, before in zip(results(), first):
        assert torch.equal(found[kept], before[kept])
        assert not torch.equal(found[changed], before[changed])


def test_addresses_beyond_2_to_31_elements():
    # One document at the far end of a buffer of 2^31 + 2^28 elements; the bounds leave all before it out.
    num_slots, width = (2**31 + 2**28) // 12288, 12288
    free, _ = torch.cuda.mem_get_info()
    if free < 6 * num_slots * width:
        pytest.skip("needs 14 GiB of free memory")
    heads, lengths = (2, 1, 128), (150,)
    wide = torch.zeros(num_slots, width, dtype=DTYPE, device=DEVICE)
    buffer, d_out = random_case(lengths, heads)
    wide[-150:, -buffer.shape[1] :] = buffer
    far = DocumentLayout(
        torch.zeros(1, num_slots, dtype=torch.int32, device=DEVICE),
        torch.tensor([num_slots - 150, num_slots], dtype=torch.int32, device=DEVICE),
        150,
        is_packed=True,
    )
    inputs = in_slices(heads, wide[:, -buffer.shape[1] :])
    d_out_far = torch.zeros(num_slots, 2, 128, dtype=DTYPE, device=DEVICE)
    d_out_far[-150:] = d_out
    gradients = torch.zeros_like(wide)
    views = in_slices(heads, gradients[:, -buffer.shape[1] :])
    backend = DocumentAttention()
    out, saved = backend.forward(*inputs, far, 0.1)
    backend.backward(saved, d_out_far, *inputs, far, 0.1, *views)
    near = by_backend(backend, buffer, d_out, heads, layout_of(lengths), 0.1)
    for found, target in zip([out, *views], near):
        assert torch.equal(found[-150:], target)
    del wide, gradients, d_out_far
    torch.cuda.empty_cache()
