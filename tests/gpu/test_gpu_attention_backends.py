"""Every other attention backend that this machine can run, in bf16, by the rule of attention_oracle.py."""

from __future__ import annotations

import pytest
import torch
from attention_oracle import DEVICE, DTYPE, HEADS, instruction_like, judge, name_of

from packloop.kernels.attention import load_backend, usable_backends

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture(autouse=True)
def _exact_products():
    torch.set_float32_matmul_precision("highest")  # the exact expression must not run in TF32


def backend_or_skip(name: str, *, is_packed: bool, head_dim: int = 128):
    device = torch.device(DEVICE)
    reason = usable_backends(is_packed=is_packed, dtype=DTYPE, device=device, head_dim=head_dim)[name]
    if reason is not None:
        pytest.skip(f"{name} {reason}")
    return load_backend(name)


@pytest.mark.parametrize("name", ["flash_attn", "varlen", "sdpa"])
@pytest.mark.parametrize("lengths", [(1, 2, 3, 63, 64, 65, 100), (1000,), (300, 2048, 4095)], ids=name_of)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_packed_documents(name: str, heads: tuple[int, int, int], lengths: tuple[int, ...]):
    judge(backend_or_skip(name, is_packed=True), lengths, heads)


@pytest.mark.parametrize("name", ["flash_attn", "varlen"])
@pytest.mark.parametrize(
    "lengths", [(1,) * 256, tuple(1 + 7 * n % 100 for n in range(256)), instruction_like(16384)], ids=name_of
)
@pytest.mark.parametrize("heads", [(4, 4, 128), (8, 1, 64)], ids=str)
def test_many_documents(name: str, heads: tuple[int, int, int], lengths: tuple[int, ...]):
    judge(backend_or_skip(name, is_packed=True), lengths, heads)


@pytest.mark.parametrize("name", ["flash_attn", "varlen"])
@pytest.mark.parametrize("lengths", [(16383, 1000), (32767,)], ids=name_of)
@pytest.mark.parametrize("heads", [(4, 4, 128), (8, 1, 64)], ids=str)
def test_long_documents(name: str, heads: tuple[int, int, int], lengths: tuple[int, ...]):
    judge(backend_or_skip(name, is_packed=True), lengths, heads)


@pytest.mark.parametrize("name", ["cudnn", "sdpa", "flash_attn"])
@pytest.mark.parametrize("length", [100, 1001, 2048, 4095])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_one_document_a_row(name: str, heads: tuple[int, int, int], length: int):
    judge(backend_or_skip(name, is_packed=False), (length, length), heads, num_rows=2)


@pytest.mark.parametrize("name", ["flash_attn", "varlen", "sdpa"])
@pytest.mark.parametrize("head_dim", [80, 96])
@pytest.mark.parametrize(("lengths", "num_rows"), [((300, 65, 100), 1), ((1001, 1001), 2)], ids=str)
def test_heads_that_document_attention_does_not_take(name: str, head_dim: int, lengths: tuple[int, ...], num_rows: int):
    backend = backend_or_skip(name, is_packed=num_rows == 1, head_dim=head_dim)
    judge(backend, lengths, (4, 2, head_dim), num_rows=num_rows)


@pytest.mark.parametrize("length", [1, 128])
@pytest.mark.parametrize("heads", [(4, 4, 128), (8, 1, 64)], ids=str)
def test_short_rows_of_one_document(heads: tuple[int, int, int], length: int):
    """Of one token flash-attn makes another shape inside, where heads share keys."""
    judge(backend_or_skip("flash_attn", is_packed=False), (length,) * 3, heads, num_rows=3)


@pytest.mark.parametrize("heads", [(4, 4, 128), (8, 1, 64)], ids=str)
def test_eager(heads: tuple[int, int, int]):
    judge(load_backend("eager"), (1, 2, 3, 63, 64, 65, 100), heads)
    judge(load_backend("eager"), (1001, 1001), heads, num_rows=2)


@pytest.mark.parametrize("heads", [(8, 2, 128), (8, 1, 64)], ids=str)
def test_flash_attn_4(heads: tuple[int, int, int]):
    """Two shapes only: its kernels are compiled at first use, which takes longer than all other backends' tests."""
    judge(backend_or_skip("flash_attn_4", is_packed=True), (300, 2048, 4095), heads)
