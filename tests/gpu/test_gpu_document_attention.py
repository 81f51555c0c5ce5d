"""Attention of packed documents on a GPU in bf16, judged beside the same-dtype PyTorch expression.

The rule of test_gpu_kernels.py: |ours - exact| may be at most `factor` times the greatest error of that expression
plus 2 ulp of the exact value; factor is 2 for the output and 3 for gradients. Exact is the expression in fp32.
Both take a document in blocks of queries, so that the longest ones fit; what blocks add to dk and dv is summed in fp32.
"""

from __future__ import annotations

import pytest
import torch

from packloop.kernels import reference
from packloop.kernels.attention import DocumentLayout
from packloop.kernels.document_attention import BackwardTiles, DocumentAttention, Rotation, Tiles

DEVICE = "cuda"
DTYPE = torch.bfloat16
QUERY_BLOCK = 2048

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture(autouse=True)
def _poisoned_outputs():
    """New memory holds NaN, so an element that a kernel leaves out shows."""
    torch.set_float32_matmul_precision("highest")  # the exact expression must not run in TF32
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.cuda.empty_cache()


def instruction_like(num_slots: int, seed: int = 0) -> list[int]:
    """Lengths of mean 235 or so, most of them 100 to 400, that sum to num_slots."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.exp(torch.randn(num_slots, generator=generator) * 0.6 + 5.28).clamp(20, 800).long()
    lengths = lengths[lengths.cumsum(0) <= num_slots].tolist()
    return [*lengths, num_slots - sum(lengths)]


def layout_of(lengths: list[int]) -> DocumentLayout:
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    ids = torch.arange(len(lengths), dtype=torch.int32).repeat_interleave(torch.tensor(lengths))
    return DocumentLayout(ids[None].to(DEVICE), bounds.to(DEVICE), max(lengths), is_packed=True)


def rotation_of(lengths: list[int], head_dim: int) -> Rotation:
    inv_freq = 1.0 / 10000 ** (torch.arange(0, head_dim, 2, device=DEVICE) / head_dim)
    positions_T = torch.cat([torch.arange(n) for n in lengths]).to(DEVICE)
    return Rotation(*reference.rope_tables(inv_freq, max(lengths)), positions_T)


def stock_rope(x_THD: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """Hugging Face's expression: tables rounded to the dtype, products and sum rounded one by one."""
    cos, sin = (
        torch.cat((t, t), -1)[rotation.position_ids_T][:, None].to(x_THD.dtype)
        for t in (rotation.cos_PD, rotation.sin_PD)
    )
    first, second = x_THD.chunk(2, dim=-1)
    return x_THD * cos + torch.cat((-second, first), dim=-1) * sin


def attend(q_LHD: torch.Tensor, k_LKD: torch.Tensor, v_LKD: torch.Tensor, first_row: int, scale: float):
    """Causal attention of the queries from first_row on, each step rounded to the inputs' dtype but the softmax."""
    group = q_LHD.shape[1] // k_LKD.shape[1]
    q, k, v = q_LHD.transpose(0, 1), *(x.transpose(0, 1).repeat_interleave(group, 0) for x in (k_LKD, v_LKD))
    rows = torch.arange(first_row, first_row + q.shape[1], device=q.device)
    hidden = torch.arange(k.shape[1], device=q.device)[None, :] > rows[:, None]
    scores = (q @ k.transpose(1, 2) * scale).masked_fill(hidden, float("-inf"))
    return (scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v).transpose(0, 1)


def by_pytorch(inputs, d_out, lengths: list[int], scale: float, rotation: Rotation | None, dtype, rope):
    """(out, dq, dk, dv) in dtype."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    q, k, v = leaves
    if rotation is not None:
        q, k = rope(q, rotation), rope(k, rotation)
    turned = [x.detach() for x in (q, k, v)]
    out, dq = torch.empty_like(turned[0]), torch.empty_like(turned[0])
    dk, dv = (torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in turned[1:])
    start = 0
    for length in lengths:
        for first_row in range(0, length, QUERY_BLOCK):
            stop = start + min(first_row + QUERY_BLOCK, length)
            rows, keys = slice(start + first_row, stop), slice(start, stop)
            parts = [turned[0][rows], turned[1][keys], turned[2][keys]]
            parts = [x.clone().requires_grad_() for x in parts]
            block = attend(*parts, first_row, scale)
            out[rows] = block.detach()
            dq[rows], d_keys, d_values = torch.autograd.grad(block, parts, d_out[rows].to(dtype))
            dk[keys] += d_keys
            dv[keys] += d_values
        start += length
    gradients = [dq, dk.to(dtype), dv.to(dtype)]
    if rotation is not None:
        gradients[:2] = torch.autograd.grad((q, k), leaves[:2], gradients[:2])
    return [out, *gradients]


def exact_rope(x_THD: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    return reference.rope(x_THD, rotation.cos_PD, rotation.sin_PD, rotation.position_ids_T)


def in_slices(heads: tuple[int, int, int], buffer: torch.Tensor) -> list[torch.Tensor]:
    num_heads, num_kv_heads, head_dim = heads
    sizes = [num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim, 64]
    return [part.unflatten(1, (-1, head_dim)) for part in buffer.split(sizes, dim=1)[:3]]


def random_case(lengths: list[int], heads: tuple[int, int, int], dtype=DTYPE) -> tuple[torch.Tensor, torch.Tensor]:
    num_heads, num_kv_heads, head_dim = heads
    generator = torch.Generator(DEVICE).manual_seed(sum(lengths))
    width = (num_heads + 2 * num_kv_heads) * head_dim + 64
    buffer = torch.randn(sum(lengths), width, device=DEVICE, generator=generator).to(dtype)
    d_out = torch.randn(sum(lengths), num_heads, head_dim, device=DEVICE, generator=generator).to(dtype)
    return buffer, d_out


def by_kernels(buffer, d_out, heads, layout, scale: float, rotation: Rotation | None, backend) -> list[torch.Tensor]:
    """(out, dq, dk, dv); q, k and v lie in a copy of the buffer and their gradients in another like it."""
    buffer, gradients = buffer.clone(), torch.full_like(buffer, float("nan"))
    inputs, views = in_slices(heads, buffer), in_slices(heads, gradients)
    out, saved = backend.forward(*inputs, layout, scale, rotation=rotation)
    backend.backward(saved, d_out, *inputs, layout, scale, *views, rotation=rotation)
    assert bool(gradients[:, -64:].isnan().all())
    return [out, *views]


def assert_no_worse(found: torch.Tensor, stock: torch.Tensor, exact: torch.Tensor, factor: float) -> None:
    found, stock, exact = found.float(), stock.float(), exact.float()
    assert bool(found.isfinite().all())
    # A document of one token has gradients of 0 for q and k: there fp32 sums of 128 products leave their rounding.
    allowed = factor * (stock - exact).abs().max() + 2 * torch.finfo(DTYPE).eps * exact.abs() + 2e-5
    excess = ((found - exact).abs() - allowed).max()
    assert excess <= 0, (
        f"error exceeds the allowance by {excess:.3e}; PyTorch's own is {(stock - exact).abs().max():.3e}"
    )


def judge(lengths: list[int], heads: tuple[int, int, int], rotates: bool, backend: DocumentAttention | None = None):
    scale = heads[2] ** -0.5
    rotation = rotation_of(lengths, heads[2]) if rotates else None
    buffer, d_out = random_case(lengths, heads)
    found = by_kernels(buffer, d_out, heads, layout_of(lengths), scale, rotation, backend or DocumentAttention())
    inputs = in_slices(heads, buffer)
    stock = by_pytorch(inputs, d_out, lengths, scale, rotation, DTYPE, stock_rope)
    exact = by_pytorch(inputs, d_out, lengths, scale, rotation, torch.float32, exact_rope)
    for triple, factor in zip(zip(found, stock, exact), (2, 3, 3, 3)):
        assert_no_worse(*triple, factor)


HEADS = [(4, 4, 128), (8, 2, 128), (8, 1, 64)]  # query heads, key heads, features: groups of 1, 4 and 8


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(
    "lengths",
    [
        [1],
        [2],
        [63],
        [64],
        [65],
        [100],
        [127, 128, 129],
        [0, 31, 0, 33],
        [1000],
        [1, 2048, 1],
        [300, 2048, 4095],
        [1] * 256,
        [1 + 7 * n % 100 for n in range(256)],
        instruction_like(16384),
    ],
    ids=lambda lengths: f"{len(lengths)}x{max(lengths)}",
)
def test_documents(lengths: list[int], heads: tuple[int, int, int]):
    judge(lengths, heads, rotates=True)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("lengths", [[1], [100, 65], instruction_like(4096, seed=1)], ids=len)
def test_documents_turned_already(lengths: list[int], heads: tuple[int, int, int]):
    judge(lengths, heads, rotates=False)


@pytest.mark.parametrize("lengths", [[8192], [16384, 1000], [32768]], ids=max)
def test_long_documents(lengths: list[int]):
    judge(lengths, (2, 2, 128), rotates=True)
    judge(lengths, (2, 1, 64), rotates=True)


def test_dq_and_dk_in_one_launch():
    tiles = Tiles(owned=64, streamed=32, num_warps=4, num_stages=2)
    judge(
        instruction_like(4096, seed=2), (8, 2, 128), True, DocumentAttention(tiles, BackwardTiles(tiles, tiles, True))
    )


def test_fp32():
    lengths, heads = [100, 33, 1], (2, 1, 64)
    buffer, d_out = random_case(lengths, heads, torch.float32)
    rotation = rotation_of(lengths, 64)
    found = by_kernels(buffer, d_out, heads, layout_of(lengths), 0.1, rotation, DocumentAttention())
    exact = by_pytorch(in_slices(heads, buffer), d_out, lengths, 0.1, rotation, torch.float32, exact_rope)
    for value, target in zip(found, exact):
        torch.testing.assert_close(value, target, rtol=1e-4, atol=1e-4)


def test_results_repeat_and_documents_are_apart():
    lengths, heads = instruction_like(16384), (8, 2, 128)
    buffer, d_out = random_case(lengths, heads)
    layout, rotation = layout_of(lengths), rotation_of(lengths, 128)

    def results():
        return by_kernels(buffer, d_out, heads, layout, 0.1, rotation, DocumentAttention())

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
    heads, lengths = (2, 1, 128), [150]
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
    near = by_kernels(buffer, d_out, heads, layout_of(lengths), 0.1, None, backend)
    for found, target in zip([out, *views], near):
        assert torch.equal(found[-150:], target)
