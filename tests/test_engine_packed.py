"""Packed documents do not see each other, whichever attention and layer runs them; the patch leaves nothing behind."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from packloop.data.loader import Batch, PackLoader
from packloop.data.tokenize import Documents
from packloop.engine.batch import to_device
from packloop.engine.optim import FlatParameters
from packloop.kernels.patch import packed_loss_sum, patched

CPU = torch.device("cpu")
LENGTHS = [24, 31, 9]


@pytest.fixture(params=["stock", "fused"])
def fused(request) -> bool:
    return request.param == "fused"


@pytest.fixture(params=["eager", "sdpa"])
def attention(request) -> str:
    return request.param


def load_model(base, dropout: float = 0.0):
    """A base with an adapter that does something."""
    torch.manual_seed(3)
    llama = LlamaForCausalLM.from_pretrained(base, attn_implementation="eager")
    lora = LoraConfig(r=4, target_modules="all-linear", lora_dropout=dropout, task_type="CAUSAL_LM")
    model = get_peft_model(llama, lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    return model


def make_documents(seed: int = 0) -> Documents:
    ids = np.random.default_rng(seed).integers(3, 300, sum(LENGTHS)).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(LENGTHS)])
    return Documents(token_ids=ids, counts=np.ones(len(ids), dtype=bool), offsets=offsets, row_ids=np.arange(3))


def one_batch(documents: Documents, packing: str) -> Batch:
    """All documents in one micro-batch: a row of 80 slots, 16 of them padding, or three padded rows."""
    loader = PackLoader(
        documents,
        packing=packing,
        max_length=80,
        per_device_batch_size=3,
        gradient_accumulation_steps=1,
        rank=0,
        world_size=1,
        seed=0,
        shuffle=False,
        pad_token_id=0,
    )
    (batch,) = loader.next_window()
    return batch


def slots_of(batch: Batch, documents: Documents, number: int) -> slice:
    """The flattened slots of a document, found by its tokens."""
    wanted = documents.token_ids[documents.offsets[number] : documents.offsets[number + 1]]
    flat = batch.input_ids.flatten().numpy()
    (start,) = [at for at in range(len(flat)) if np.array_equal(flat[at : at + len(wanted)], wanted)]
    return slice(start, start + len(wanted))


def hidden_and_gradient(model, batch: Batch, labels: torch.Tensor, *, attention: str, fused: bool):
    """([slots, H] last hidden states, flat gradient of the summed loss over `labels`, a mask of batch.label_index)."""
    flat = FlatParameters(model)
    ids, positions, layout, label_index, label_ids, _ = to_device(batch, CPU)
    with patched(model, attention=attention, fused=fused) as llama:
        packed_loss_sum(llama, ids, positions, layout, label_index[labels], label_ids[labels]).backward()
        with torch.no_grad():
            hidden = llama.model(input_ids=ids, position_ids=positions, layout=layout).last_hidden_state
    return hidden.flatten(0, 1), flat.gradient.clone()


@pytest.mark.parametrize("packing", ["bfd", "none"])
def test_row04_a_changed_document_changes_no_other(small_base, packing, attention, fused):
    before = make_documents()
    after = make_documents()
    after.token_ids[: LENGTHS[0]] = make_documents(seed=9).token_ids[: LENGTHS[0]]
    results = []
    for documents in (before, after):
        batch = one_batch(documents, packing)
        changed = slots_of(batch, documents, 0)
        labels = (batch.label_index < changed.start) | (batch.label_index >= changed.stop)
        assert 0 < labels.sum() == sum(LENGTHS[1:]) - 2
        hidden, gradient = hidden_and_gradient(load_model(small_base), batch, labels, attention=attention, fused=fused)
        others = [hidden[slots_of(batch, documents, number)] for number in (1, 2)]
        results.append((hidden[changed], others, gradient))
    assert not torch.allclose(results[0][0], results[1][0], atol=0.1)
    for ours, theirs in zip(results[0][1], results[1][1], strict=True):
        assert torch.equal(ours, theirs)
    assert results[0][2].abs().max() > 0
    assert torch.equal(results[0][2], results[1][2])


@pytest.mark.parametrize("packing", ["bfd", "none"])
def test_row04_packed_equals_one_by_one(small_base, packing, attention, fused):
    documents = make_documents()
    batch = one_batch(documents, packing)
    every_label = torch.ones_like(batch.label_index, dtype=torch.bool)
    _, packed = hidden_and_gradient(load_model(small_base), batch, every_label, attention=attention, fused=fused)

    model = load_model(small_base)
    flat = FlatParameters(model)
    for start, stop in zip(documents.offsets[:-1], documents.offsets[1:], strict=True):
        ids = torch.from_numpy(documents.token_ids[start:stop].astype(np.int64))
        logits = model(input_ids=ids[None]).logits[0, :-1]  # stock transformers and PEFT
        F.cross_entropy(logits, ids[1:], reduction="sum").backward()
    assert (packed - flat.gradient).norm() < 1e-5 * flat.gradient.norm()


def test_row22_the_stock_forward_is_back_after_the_context_and_after_an_error(small_base, fused):
    model = load_model(small_base)
    ids = torch.arange(3, 40)[None]
    expected = model(input_ids=ids).logits
    with patched(model, attention="sdpa", fused=fused) as llama:
        assert "forward" in vars(llama.model)
    assert_stock(model)
    with pytest.raises(KeyError, match="from inside"), patched(model, attention="sdpa", fused=fused):
        raise KeyError("from inside")
    assert_stock(model)
    with pytest.raises(KeyError, match="from inside"), patched(model, attention="sdpa", fused=fused) as llama:
        fail_without_replacements(llama)
    assert_stock(model)
    assert torch.equal(model(input_ids=ids).logits, expected)


def fail_without_replacements(llama) -> None:
    """As something that undoes a part of the patch before it ends in an error."""
    for module in (llama.model, llama.model.layers[0].self_attn):
        del module.forward
    raise KeyError("from inside")


def test_row22_a_second_model_is_untouched(small_base, fused):
    model, other = load_model(small_base), load_model(small_base)
    with patched(model, attention="sdpa", fused=fused):
        assert_stock(other)
        with pytest.raises(ValueError, match="inside `patched"):
            packed_loss_sum(other.base_model.model, *to_device(one_batch(make_documents(), "bfd"), CPU))


def test_row22_a_model_is_patched_once(small_base):
    model = load_model(small_base)
    with patched(model, attention="sdpa"), pytest.raises(ValueError, match="replaced already"):
        patched(model, attention="sdpa").__enter__()
    assert_stock(model)
    attention = model.base_model.model.model.layers[1].self_attn
    attention.forward = theirs = attention.forward  # another's, which would be lost on leaving
    with pytest.raises(ValueError, match=r"LlamaAttention\.forward is replaced already"):
        patched(model, attention="sdpa").__enter__()
    assert vars(attention)["forward"] is theirs


def assert_stock(model) -> None:
    replaced = [name for name, module in model.named_modules() if "forward" in vars(module)]
    assert replaced == []


def test_generation_inside_the_patch_uses_the_stock_path_and_its_cache(small_base, fused):
    model = load_model(small_base).eval()
    ids = torch.tensor([[1, 40, 77, 123], [1, 9, 250, 31]])
    settings = {"max_new_tokens": 12, "do_sample": False, "use_cache": True, "pad_token_id": 0}
    expected = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
    lengths = []
    with patched(model, attention="sdpa", fused=fused) as llama:
        handle = llama.model.embed_tokens.register_forward_hook(lambda *call: lengths.append(call[1][0].shape[1]))
        inside = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
        handle.remove()
    assert torch.equal(inside, expected)
    assert lengths == [4] + [1] * 11, "with a cache each step embeds one new token"
