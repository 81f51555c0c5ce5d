"""What an attention backend on a GPU is judged by: the same-dtype PyTorch expression, and that expression in fp32.

The rule, for each element: |ours - exact| may be at most `factor` times the greatest error of the PyTorch expression in
bf16 anywhere in the tensor, plus 2 eps = 2^-6 of |exact|, plus 2e-5; factor is 2 for the output and 3 for gradients. An
ulp is between eps / 2 and eps of a value, so the second term is 2 ulp at a power of two and up to 4 above it. The third
is for documents of one token, whose gradients of q and k are 0: PyTorch finds 0 and allows no error, while fp32 sums of
a head's products in another order leave their rounding. It is added everywhere, and is nothing beside the first where a
document is longer: PyTorch's greatest error is then 2e-3 or more. Queries are taken in blocks, so that the longest
documents fit, and short documents several at a time under a mask; what blocks add to dk and dv is summed in fp32.

Shapes: T slots, L slots of one stretch of documents, H query heads, K key/value heads, D features of a head.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from packloop.kernels import reference
from packloop.kernels.attention import DocumentLayout
from packloop.kernels.rope import Rotation

DEVICE = "cuda"
DTYPE = torch.bfloat16
QUERY_BLOCK = 1024
# Query heads, key/value heads, features: groups of 1, 4 and 8 for both sizes of a head.
HEADS = [(4, 4, 128), (8, 2, 128), (8, 1, 128), (4, 4, 64), (8, 2, 64), (8, 1, 64)]


def instruction_like(num_slots: int, seed: int = 0) -> tuple[int, ...]:
    """Lengths of mean 235 or so, most of them 100 to 400, that sum to num_slots."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.exp(torch.randn(num_slots, generator=generator) * 0.6 + 5.28).clamp(20, 800).long()
    lengths = lengths[lengths.cumsum(0) <= num_slots].tolist()
    return (*lengths, num_slots - sum(lengths))


def name_of(lengths: tuple[int, ...]) -> str:
    return f"{len(lengths)}x{max(lengths)}"


def layout_of(lengths: tuple[int, ...], *, num_rows: int = 1) -> DocumentLayout:
    """One row of documents, or `num_rows` rows of one document each."""
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    ids = torch.arange(len(lengths), dtype=torch.int32).repeat_interleave(torch.tensor(lengths))
    if num_rows > 1:
        assert set(lengths) == {lengths[0]}
        assert len(lengths) == num_rows
        ids = torch.zeros_like(ids)
    is_packed = num_rows == 1 and len(lengths) > 1
    return DocumentLayout(ids.view(num_rows, -1).to(DEVICE), bounds.to(DEVICE), max(lengths), is_packed=is_packed)


def rotation_of(lengths: tuple[int, ...], head_dim: int) -> Rotation:
    inv_freq = 1.0 / 10000 ** (torch.arange(0, head_dim, 2, device=DEVICE) / head_dim)
    positions_T = torch.cat([torch.arange(n) for n in lengths]).to(DEVICE)
    return Rotation(*reference.rope_tables(inv_freq, max(lengths)), positions_T)


def random_case(lengths: tuple[int, ...], heads: tuple[int, int, int], dtype=DTYPE) -> tuple[Tensor, Tensor]:
    """(q, k and v side by side with 64 more columns, d_out)."""
    num_heads, num_kv_heads, head_dim = heads
    generator = torch.Generator(DEVICE).manual_seed(sum(lengths))
    width = (num_heads + 2 * num_kv_heads) * head_dim + 64
    buffer = torch.randn(sum(lengths), width, device=DEVICE, generator=generator).to(dtype)
    d_out = torch.randn(sum(lengths), num_heads, head_dim, device=DEVICE, generator=generator).to(dtype)
    return buffer, d_out


def in_slices(heads: tuple[int, int, int], buffer: Tensor) -> list[Tensor]:
    """Views of q, k and v in the buffer of `random_case`."""
    num_heads, num_kv_heads, head_dim = heads
    sizes = [num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim, 64]
    return [part.unflatten(1, (-1, head_dim)) for part in buffer.split(sizes, dim=1)[:3]]


def stock_rope(x_THD: Tensor, rotation: Rotation) -> Tensor:
    """Hugging Face's expression: tables rounded to the dtype, products and sum rounded one by one."""
    cos, sin = (
        torch.cat((t, t), -1)[rotation.position_ids_T][:, None].to(x_THD.dtype)
        for t in (rotation.cos_PD, rotation.sin_PD)
    )
    first, second = x_THD.chunk(2, dim=-1)
    return x_THD * cos + torch.cat((-second, first), dim=-1) * sin


def exact_rope(x_THD: Tensor, rotation: Rotation) -> Tensor:
    return reference.rope(x_THD, rotation.cos_PD, rotation.sin_PD, rotation.position_ids_T)


def stretches_of(lengths: tuple[int, ...]) -> list[list[int]]:
    """Neighbouring documents, so many at a time as fit a block of queries; a longer one by itself."""
    stretches: list[list[int]] = []
    for length in lengths:
        if not stretches or sum(stretches[-1]) + length > QUERY_BLOCK:
            stretches.append([])
        stretches[-1].append(length)
    return stretches


def attend(q_LHD: Tensor, k_LKD: Tensor, v_LKD: Tensor, ids_L: Tensor, first_row: int, scale: float) -> Tensor:
    """Causal attention within documents of the queries from first_row on, rounded at each step but in the softmax."""
    group = q_LHD.shape[1] // k_LKD.shape[1]
    q, k, v = q_LHD.transpose(0, 1), *(x.transpose(0, 1).repeat_interleave(group, 0) for x in (k_LKD, v_LKD))
    rows = torch.arange(first_row, first_row + q.shape[1], device=q.device)
    slots = torch.arange(k.shape[1], device=q.device)
    hidden = (slots[None, :] > rows[:, None]) | (ids_L[: k.shape[1]][None, :] != ids_L[rows][:, None])
    scores = (q @ k.transpose(1, 2) * scale).masked_fill(hidden, float("-inf"))
    return (scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v).transpose(0, 1)


def by_pytorch(inputs, d_out: Tensor, lengths: tuple[int, ...], scale: float, rotation: Rotation | None, dtype, rope):
    """(out, dq, dk, dv) in dtype."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    q, k, v = leaves
    if rotation is not None:
        q, k = rope(q, rotation), rope(k, rotation)
    turned = [x.detach() for x in (q, k, v)]
    out, dq = torch.empty_like(turned[0]), torch.empty_like(turned[0])
    dk, dv = (torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in turned[1:])
    start = 0
    for documents in stretches_of(lengths):
        num_slots = sum(documents)
        ids = torch.arange(len(documents)).repeat_interleave(torch.tensor(documents)).to(dq.device)
        for first_row in range(0, num_slots, QUERY_BLOCK):
            stop = start + min(first_row + QUERY_BLOCK, num_slots)
            rows, keys = slice(start + first_row, stop), slice(start, stop)
            parts = [turned[0][rows], turned[1][keys], turned[2][keys]]
            parts = [x.clone().requires_grad_() for x in parts]
            block = attend(*parts, ids, first_row, scale)
            out[rows] = block.detach()
            dq[rows], d_keys, d_values = torch.autograd.grad(block, parts, d_out[rows].to(dtype))
            dk[keys] += d_keys
            dv[keys] += d_values
        start += num_slots
    gradients = [dq, dk.to(dtype), dv.to(dtype)]
    if rotation is not None:
        gradients[:2] = torch.autograd.grad((q, k), leaves[:2], gradients[:2])
    return [out, *gradients]


@lru_cache(maxsize=1)
def oracles(lengths: tuple[int, ...], heads: tuple[int, int, int], rotates: bool) -> tuple[list[Tensor], list[Tensor]]:
    """(stock, exact) of `random_case`, each (out, dq, dk, dv); kept for the next backend that is asked the same."""
    rotation = rotation_of(lengths, heads[2]) if rotates else None
    buffer, d_out = random_case(lengths, heads)
    inputs, scale = in_slices(heads, buffer), heads[2] ** -0.5
    stock = by_pytorch(inputs, d_out, lengths, scale, rotation, DTYPE, stock_rope)
    return stock, by_pytorch(inputs, d_out, lengths, scale, rotation, torch.float32, exact_rope)


def by_backend(backend, buffer: Tensor, d_out: Tensor, heads, layout, scale: float, rotation: Rotation | None = None):
    """(out, dq, dk, dv); q, k and v lie in a copy of the buffer and their gradients in another like it."""
    buffer, gradients = buffer.clone(), torch.full_like(buffer, float("nan"))
    inputs, views = in_slices(heads, buffer), in_slices(heads, gradients)
    rotated = {} if rotation is None else {"rotation": rotation}
    with torch.no_grad():  # as in the autograd function that calls it
        out, saved = backend.forward(*inputs, layout, scale, **rotated)
        backend.backward(saved, d_out, *inputs, layout, scale, *views, **rotated)
    assert bool(gradients[:, -64:].isnan().all())
    return [out, *views]


def assert_no_worse(found: Tensor, stock: Tensor, exact: Tensor, factor: float) -> None:
    found, stock, exact = found.float(), stock.float(), exact.float()
    assert bool(found.isfinite().all())
    # Of every element; 2e-5 is for documents of one token, as said above.
    allowed = factor * (stock - exact).abs().max() + 2 * torch.finfo(DTYPE).eps * exact.abs() + 2e-5
    excess = ((found - exact).abs() - allowed).max()
    assert excess <= 0, (
        f"error exceeds the allowance by {excess:.3e}; PyTorch's own is {(stock - exact).abs().max():.3e}"
    )


def judge(backend, lengths: tuple[int, ...], heads, *, rotates: bool = False, num_rows: int = 1) -> None:
    """AssertionError where the backend's output or a gradient breaks the rule."""
    rotation = rotation_of(lengths, heads[2]) if rotates else None
    buffer, d_out = random_case(lengths, heads)
    layout = layout_of(lengths, num_rows=num_rows)
    found = by_backend(backend, buffer, d_out, heads, layout, heads[2] ** -0.5, rotation)
    for triple, factor in zip(zip(found, *oracles(lengths, heads, rotates)), (2, 3, 3, 3)):
        assert_no_worse(*triple, factor)
