"""What the patch takes from Hugging Face's Llama and what it refuses: padding, positions, grouped heads, signatures."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaModel

from packloop.engine.optim import FlatParameters
from packloop.kernels import reference
from packloop.kernels.attention import DocumentLayout, load_backend
from packloop.kernels.llama_rope import rope_tables
from packloop.kernels.patch import FusedLayers, packed_loss_sum, patched

LENGTHS = (5, 11, 7)
WIDTH = 11


def make_llama(**settings) -> LlamaForCausalLM:
    values = {
        "vocab_size": 200,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "max_position_embeddings": 160,
        "initializer_range": 0.15,
        "attn_implementation": "eager",
    }
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**(values | settings))).requires_grad_(False)


def with_adapter(llama: LlamaForCausalLM):
    torch.manual_seed(1)
    model = get_peft_model(llama, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at the start, which would hide the gradient of A
            parameter.data.normal_(std=0.1)
    return model


def padded(side: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(input ids, attention mask, positions) of a document a row, padded to WIDTH on that side, or all of WIDTH."""
    ids = torch.randint(3, 200, (len(LENGTHS), WIDTH), generator=torch.Generator().manual_seed(2))
    columns = torch.arange(WIDTH).expand(len(LENGTHS), -1)
    lengths = torch.tensor(LENGTHS)[:, None]
    if side == "none":
        mask = torch.ones_like(ids)
    else:
        mask = (columns < lengths if side == "right" else columns >= WIDTH - lengths).long()
    return torch.where(mask.bool(), ids, 0), mask, (mask.cumsum(1) - 1).clamp(min=0)


def layout_of(mask: torch.Tensor, device: str = "cpu") -> DocumentLayout:
    """The same rows as documents: number 0 in each, -1 for padding, and the bounds of both."""
    ids = (mask - 1).to(torch.int32)
    bounds = [0]
    for number, row in enumerate(mask.tolist()):
        changes = [column for column in range(1, WIDTH) if row[column] != row[column - 1]]
        bounds += [number * WIDTH + column for column in [*changes, WIDTH]]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    is_packed = bool((mask[:, 0] == 0).any())
    return DocumentLayout(ids.to(device), cu_seqlens.to(device), WIDTH, is_packed=is_packed)


def packed(lengths: tuple[int, ...] = LENGTHS, device: str = "cpu"):
    """One row of documents as `packed_loss_sum` takes it; every next token counts."""
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    ids = torch.randint(3, 200, (1, sum(lengths)), generator=torch.Generator().manual_seed(4))
    targets = torch.cat([torch.arange(start, stop - 1) for start, stop in pairwise(bounds)])
    numbers = torch.arange(len(lengths), dtype=torch.int32).repeat_interleave(torch.tensor(lengths))[None]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    layout = DocumentLayout(numbers.to(device), bounds.to(device, torch.int32), max(lengths), is_packed=True)
    return (*(x.to(device) for x in (ids, positions)), layout, *(x.to(device) for x in (targets, ids[0, targets + 1])))


def stock_gradient(model, flat: FlatParameters, lengths: tuple[int, ...] = LENGTHS, device: str = "cpu"):
    """The flat gradient of the same loss by Hugging Face's and PEFT's code, a document at a time."""
    flat.zero_gradient()
    for ids in packed(lengths, device)[0].split(lengths, dim=1):
        logits = model(input_ids=ids).logits[0, :-1]
        F.cross_entropy(
            logits.to(torch.promote_types(logits.dtype, torch.float32)), ids[0, 1:], reduction="sum"
        ).backward()
    return flat.gradient.clone()


@pytest.mark.parametrize("fused", [False, True], ids=["stock", "fused"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["left", "right", "none"])
def test_row20_padding_is_not_attended_to(side: str, attention: str, fused: bool):
    llama = make_llama()
    ids, mask, positions = padded(side)
    expected = llama.model(input_ids=ids, attention_mask=mask, position_ids=positions).last_hidden_state
    with patched(llama, attention=attention, fused=fused), torch.no_grad():
        found = llama.model(input_ids=ids, position_ids=positions, layout=layout_of(mask)).last_hidden_state
        again = llama.model(input_ids=ids, attention_mask=mask, position_ids=positions).last_hidden_state
    real = mask.bool()
    torch.testing.assert_close(found[real], expected[real], rtol=1e-4, atol=1e-5)
    assert torch.equal(again, expected), "without a layout the stock code runs, mask and all"


def test_row20_a_mask_beside_a_layout_is_refused():
    llama = make_llama()
    ids, mask, positions = padded("left")
    with patched(llama, attention="sdpa"):
        for ignored in ({"attention_mask": mask}, {"inputs_embeds": torch.zeros(3, WIDTH, 64)}):
            with pytest.raises(ValueError, match=f"layout .* {next(iter(ignored))} would be ignored"):
                llama.model(input_ids=ids, position_ids=positions, layout=layout_of(mask), **ignored)


@pytest.mark.parametrize(
    "scaling", [None, {"rope_type": "linear", "factor": 4.0}, {"rope_type": "dynamic", "factor": 2.0}]
)
def test_row21_angles_hold_at_32k_in_a_bf16_model(scaling: dict | None, tmp_path):
    rope = {"rope_parameters": {"rope_theta": 10000.0, **scaling}} if scaling else {}
    make_llama(**rope).save_pretrained(tmp_path)
    llama = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).requires_grad_(False)
    assert llama.model.norm.weight.dtype == torch.bfloat16
    rotary = llama.model.rotary_emb
    assert rotary.inv_freq.dtype == torch.float32
    cos, sin = rope_tables(llama.model, torch.arange(32768)[None])
    assert torch.equal(rotary.inv_freq, rotary.original_inv_freq)
    rotary(torch.empty(()), torch.arange(32768)[None])  # sets Hugging Face's frequencies for that length
    exact_cos, exact_sin = (table.double() for table in reference.rope_tables(rotary.inv_freq, 32768))
    assert cos.dtype == sin.dtype == torch.float32
    assert (rotary.inv_freq == rotary.original_inv_freq).all() == (not scaling or scaling["rope_type"] != "dynamic")
    for found, exact in ((cos, exact_cos), (sin, exact_sin)):
        assert torch.equal(found[0, :, :4], found[0, :, 4:])
        assert (found[0, :, :4] - exact).abs().max() < 1e-7
    layers = FusedLayers(llama.model, load_backend("sdpa"), ["products"] * 2, 0)
    bounds = torch.tensor([0, 32768], dtype=torch.int32)
    layout = DocumentLayout(torch.zeros(1, 32768, dtype=torch.int32), bounds, 32768, is_packed=False)
    rotation = layers.batch(llama.model, torch.arange(32768)[None], layout).rotation
    assert torch.equal(rotation.cos_PD, cos[0, :, :4])
    assert torch.equal(rotation.sin_PD, sin[0, :, :4])


def test_row21_frequencies_in_bf16_are_refused():
    llama = make_llama().to(torch.bfloat16)  # casts them with the weights
    with (
        pytest.raises(ValueError, match=r"frequencies are torch\.bfloat16.*float32 is needed"),
        patched(llama, attention="sdpa"),
    ):
        pass


@pytest.mark.parametrize("fused", [False, True], ids=["stock", "fused"])
def test_attention_dropout_is_refused_in_training_and_only_there(fused: bool):
    model = with_adapter(make_llama(attention_dropout=0.1)).eval()
    with patched(model, attention="sdpa", fused=fused) as llama, torch.no_grad():
        expected = packed_loss_sum(llama, *packed())
        model.train()
        with pytest.raises(ValueError, match=r"attention_dropout=0\.1 .* set it to 0 in the model's config\.json"):
            packed_loss_sum(llama, *packed())
        for layer in llama.model.layers:
            layer.self_attn.attention_dropout = 0.0
        assert torch.equal(packed_loss_sum(llama, *packed()), expected)


@pytest.mark.parametrize("fused", [False, True], ids=["stock", "fused"])
@pytest.mark.parametrize("num_kv_heads", [8, 2, 1])
def test_row23_grouped_heads_give_the_stock_gradients(num_kv_heads: int, fused: bool):
    """KV groups of 1, 4 and 8: packed by the patch, one by one by Hugging Face and PEFT."""
    model = with_adapter(make_llama(num_key_value_heads=num_kv_heads))
    flat = FlatParameters(model)
    expected = stock_gradient(model, flat)
    flat.zero_gradient()
    with patched(model, attention="sdpa", fused=fused) as llama:
        packed_loss_sum(llama, *packed()).backward()
    assert expected.norm() > 0
    assert (flat.gradient - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("cls", [LlamaModel, LlamaAttention])
def test_row23_another_signature_is_refused(cls, monkeypatch):
    llama = make_llama()
    monkeypatch.setattr(cls, "forward", lambda self, input_ids, hidden_states, attention_mask, position_ids: None)
    with (
        pytest.raises(ValueError, match=f"{cls.__name__}.forward lacks .*past_key_values"),
        patched(llama, attention="sdpa"),
    ):
        pass
    assert not any("forward" in vars(module) for module in llama.modules())


def test_row23_a_model_without_its_attention_is_refused():
    llama = make_llama()
    for layer in llama.model.layers:
        layer.self_attn = torch.nn.Identity()
    with pytest.raises(ValueError, match="no LlamaAttention found"), patched(llama, attention="sdpa"):
        pass
    with (
        pytest.raises(ValueError, match="LlamaForCausalLM is needed, given Linear"),
        patched(torch.nn.Linear(2, 2), attention="sdpa"),
    ):
        pass


@pytest.mark.parametrize(("rope", "num_tables"), [("default", 2), ("linear", 2), ("dynamic", 5)])
def test_rows_of_many_lengths_share_tables_where_frequencies_are_the_same(rope, num_tables):
    parameters = {"rope_type": rope, "rope_theta": 10000.0, "factor": 2.0}
    llama = make_llama(rope_parameters=parameters, max_position_embeddings=100).eval()
    layers = FusedLayers(llama.model, load_backend("sdpa"), ["all"] * 2, 0)
    tables = []
    for length in (9, 17, 120, 130, 120, 9):  # dynamic: the original context's, three longer ones' and again the first
        ids = torch.arange(3, 3 + length)[None]
        bounds = torch.tensor([0, length], dtype=torch.int32)
        layout = DocumentLayout(torch.zeros_like(ids, dtype=torch.int32), bounds, length, is_packed=False)
        positions = torch.arange(length)[None]
        rotation = layers.batch(llama.model, positions, layout).rotation
        expected_cos, expected_sin = (
            table[0, :, : rotation.cos_PD.shape[1]] for table in rope_tables(llama.model, positions)
        )
        assert torch.equal(rotation.cos_PD[:length], expected_cos)
        assert torch.equal(rotation.sin_PD[:length], expected_sin)
        tables.append(rotation.cos_PD)
    assert len(set(map(id, tables))) == num_tables
