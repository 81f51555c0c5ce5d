"""The patched model on a GPU in bf16: padding, far positions, grouped heads, by errors beside those of the stock model.

|ours - exact| may be at most twice (gradients: three times) |stock - exact| in the L2 norm; exact is the stock model in
fp32 with the same, rounded weights.
"""

from __future__ import annotations

import copy

import pytest
import torch
from test_kernels_patch import layout_of, make_llama, packed, padded, stock_gradient, with_adapter

from packloop.engine.optim import FlatParameters
from packloop.kernels import reference
from packloop.kernels.attention import usable_backends
from packloop.kernels.forward_check import check_forward
from packloop.kernels.llama_rope import rope_tables
from packloop.kernels.patch import packed_loss_sum, patched

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

DEVICE = "cuda"
LENGTHS = (63, 1, 100, 257, 2)


@pytest.fixture(autouse=True)
def _exact_products():
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision("highest")


def bf16_and_fp32(llama):
    """The model on the device in bf16, as from_pretrained would load it, and an fp32 copy of it."""
    frequencies = llama.model.rotary_emb.inv_freq.clone()
    llama = llama.to(DEVICE, torch.bfloat16)
    llama.model.rotary_emb.inv_freq = frequencies.to(DEVICE)
    return llama, copy.deepcopy(llama).float()


def skip_unless_usable(attention: str) -> None:
    reason = usable_backends(is_packed=True, dtype=torch.bfloat16, device=torch.device(DEVICE), head_dim=64)[attention]
    if reason is not None:
        pytest.skip(f"{attention} {reason}")


def assert_no_worse(found: torch.Tensor, stock: torch.Tensor, exact: torch.Tensor, factor: float) -> None:
    found_error, stock_error = ((x.float() - exact).norm().item() for x in (found, stock))
    assert stock_error < 0.1 * exact.norm().item()
    assert found_error <= factor * stock_error, f"an error of {found_error:.3e}, PyTorch's own is {stock_error:.3e}"


@pytest.mark.parametrize("attention", ["document", "flash_attn", "varlen", "sdpa"])
@pytest.mark.parametrize("side", ["left", "right", "none"])
def test_row20_padding_is_not_attended_to(side: str, attention: str):
    skip_unless_usable(attention)
    llama, wide = bf16_and_fp32(make_llama(hidden_size=512, initializer_range=0.05))
    ids, mask, positions = (x.to(DEVICE) for x in padded(side))
    layout = layout_of(mask.cpu(), device=DEVICE)
    given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    stock, exact = llama.model(**given).last_hidden_state, wide.model(**given).last_hidden_state
    for fused in (False, True):
        with patched(llama, attention=attention, fused=fused), torch.no_grad():
            found = llama.model(input_ids=ids, position_ids=positions, layout=layout).last_hidden_state
        assert_no_worse(*(hidden[mask.bool()] for hidden in (found, stock, exact)), 2)


def test_row21_angles_hold_at_32k_also_where_fp32_products_are_tf32():
    llama, _ = bf16_and_fp32(make_llama(hidden_size=1024))
    torch.set_float32_matmul_precision("high")
    positions = torch.arange(32768, device=DEVICE).expand(2, -1)
    exact = reference.rope_tables(llama.model.rotary_emb.inv_freq, 32768)
    for found, table in zip(rope_tables(llama.model, positions), exact):
        assert found.dtype == torch.float32
        assert (found[1, :, :64].double() - table.double()).abs().max() < 1e-7
        assert torch.equal(found[0], found[1])


@pytest.mark.parametrize("fused", [False, True], ids=["stock", "fused"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("num_kv_heads", [8, 2, 1])
def test_row23_grouped_heads(num_kv_heads: int, head_dim: int, fused: bool):
    """KV groups of 1, 4 and 8: gradients of packed documents beside the stock modules', a document at a time."""
    attention = "flash_attn"
    skip_unless_usable(attention)
    hidden = 8 * head_dim
    llama, wide = bf16_and_fp32(
        make_llama(hidden_size=hidden, num_key_value_heads=num_kv_heads, initializer_range=hidden**-0.5)
    )
    model, wide_model = with_adapter(llama), with_adapter(wide)
    flat, wide_flat = FlatParameters(model), FlatParameters(wide_model)
    wide_flat.weight.data.copy_(flat.weight.data)
    exact = stock_gradient(wide_model, wide_flat, LENGTHS, DEVICE)
    stock = stock_gradient(model, flat, LENGTHS, DEVICE)
    flat.zero_gradient()
    with patched(model, attention=attention, fused=fused) as inside:
        packed_loss_sum(inside, *packed(LENGTHS, DEVICE)).backward()
    assert_no_worse(flat.gradient, stock, exact, 3)
    assert torch.nn.functional.cosine_similarity(flat.gradient.float(), exact, dim=0) > 0.999


@pytest.mark.parametrize("attention", ["document", "flash_attn", "varlen", "cudnn", "sdpa", "eager"])
def test_the_check_before_training_passes_and_leaves_the_generators(attention: str):
    reason = usable_backends(is_packed=False, dtype=torch.bfloat16, device=torch.device(DEVICE), head_dim=64)[attention]
    if reason is not None:
        pytest.skip(f"{attention} {reason}")
    llama, _ = bf16_and_fp32(make_llama(hidden_size=512))
    model = with_adapter(llama).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
    states = torch.get_rng_state(), torch.cuda.get_rng_state()
    for fused in (False, True):
        with patched(model, attention=attention, fused=fused) as inside:
            check_forward(inside, attention)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert torch.equal(torch.cuda.get_rng_state(), states[1])
