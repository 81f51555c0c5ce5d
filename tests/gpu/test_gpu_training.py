"""Training a small Llama on a GPU in bf16: stock modules against the patched model, and what may not change a bit."""

from __future__ import annotations

import dataclasses
from functools import lru_cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from packloop.config import LoraConfig, ModelConfig
from packloop.data.layout import share_prefixes
from packloop.data.loader import Batch, PackLoader
from packloop.data.tokenize import Documents
from packloop.engine.batch import to_device
from packloop.engine.model import load_model
from packloop.engine.optim import AdamW, FlatParameters
from packloop.kernels.attention import usable_backends
from packloop.kernels.operations import Operations
from packloop.kernels.patch import packed_loss_sum, patched

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

DEVICE = torch.device("cuda")
VOCABULARY = 2000
NUM_STEPS, LEARNING_RATE, CLIP = 20, 2e-3, 1.0
SLOTS = 1024
ORIGINAL = 64  # positions of a model before scaling
ROPE = {
    "default": {},
    "dynamic": {"factor": 2.0},
    "longrope": {
        "factor": 2.0,
        "short_factor": [1.0] * 32,
        "long_factor": [1.5] * 32,
        "original_max_position_embeddings": ORIGINAL,
    },
}


def save_base(directory, **settings):
    """A random Llama of 3 layers, 8 query and 2 key/value heads of 64, in bf16; scores have a spread of about 1."""
    torch.manual_seed(0)
    values = {
        "vocab_size": VOCABULARY,
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "max_position_embeddings": SLOTS,
        "initializer_range": 0.05,
        "tie_word_embeddings": False,
    }
    LlamaForCausalLM(LlamaConfig(**(values | settings))).to(torch.bfloat16).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"))


def make_model(base, *, quantization: str, dropout: float = 0.0):
    torch.manual_seed(1)
    model = load_model(
        ModelConfig(name_or_path=str(base), dtype="bfloat16", quantization=quantization),
        LoraConfig(r=16, alpha=16, dropout=dropout, target_modules="all-linear"),
        DEVICE,
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at the start, which would hide the gradient of A
            parameter.data.normal_(std=0.02)
    return model.train(), FlatParameters(model)


@lru_cache(maxsize=2)
def batches(begin_alike: bool = False) -> tuple[Batch, ...]:
    """Micro-batches of two packs of whole documents; of few kinds of tokens, so that they are learnt.

    begin_alike: all documents but the shortest begin with the same 40 tokens.
    """
    rng = np.random.default_rng(0)
    lengths = np.array([2, 63, 64, 65, 100, 800, 411, 129, 300, 7])
    tokens = rng.integers(0, 50, lengths.sum()) ** 2 % VOCABULARY
    offsets = np.concatenate([[0], lengths.cumsum()])
    if begin_alike:
        for start, length in zip(offsets, lengths):
            tokens[start : start + min(40, length)] = tokens[offsets[5] : offsets[5] + min(40, length)]
    documents = Documents(
        token_ids=tokens.astype(np.int32),
        counts=np.ones(lengths.sum(), dtype=bool),
        offsets=offsets,
        row_ids=np.arange(len(lengths)),
    )
    loader = PackLoader(
        documents,
        packing="bfd",
        max_length=SLOTS,
        per_device_batch_size=2,
        gradient_accumulation_steps=8,
        rank=0,
        world_size=1,
        seed=0,
        shuffle=False,
        pad_token_id=0,
    )
    return tuple(loader.next_window())


def train(flat: FlatParameters, loss_sum_of, micro_batches: tuple[Batch, ...]) -> list[float]:
    """Mean loss of each of 20 steps over all micro-batches; `loss_sum_of(batch)` is summed over labels."""
    optimizer = AdamW(flat, name="adamw_32bit", betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    num_labels = sum(batch.num_label_tokens for batch in micro_batches)
    losses = []
    for _ in range(NUM_STEPS):
        flat.zero_gradient()
        total = 0.0
        for batch in micro_batches:
            loss_sum = loss_sum_of(batch)
            loss_sum.backward()
            total += loss_sum.item()
        norm = flat.gradient.norm().item() / num_labels
        flat.gradient.mul_(min(1.0, CLIP / norm) / num_labels)
        optimizer.step(LEARNING_RATE)
        losses.append(total / num_labels)
    return losses


@lru_cache(maxsize=4)
def stock_losses(base, quantization: str, begin_alike: bool = False) -> list[float]:
    """Hugging Face's and PEFT's code, one document at a time."""
    model, flat = make_model(base, quantization=quantization)

    def loss_sum_of(batch: Batch) -> torch.Tensor:
        losses = []
        for row, numbers in zip(batch.input_ids, batch.document_ids, strict=True):
            for number in range(int(numbers.max()) + 1):
                ids = row[numbers == number].to(DEVICE)
                logits = model(input_ids=ids[None]).logits[0, :-1].float()
                losses.append(F.cross_entropy(logits, ids[1:], reduction="sum"))
        return torch.stack(losses).sum()

    return train(flat, loss_sum_of, batches(begin_alike))


@pytest.mark.parametrize(
    ("quantization", "layer", "attention"),
    [
        ("none", "fused", "document"),
        ("none", "fused", "flash_attn"),
        ("none", "fused", "varlen"),
        ("none", "stock", "document"),
        ("none", "stock", "sdpa"),
        ("nf4", "fused", "document"),
        ("nf4", "fused", "sdpa"),
        ("nf4", "stock", "flash_attn"),
    ],
)
def test_20_steps_are_the_stock_models(base, quantization: str, layer: str, attention: str):
    skip_unless_usable(attention)
    model, flat = make_model(base, quantization=quantization)
    with patched(model, attention=attention, fused=layer == "fused", recompute_layers=1) as llama:
        ours = train(flat, lambda batch: packed_loss_sum(llama, *to_device(batch, DEVICE)), batches())
    assert_close(ours, stock_losses(base, quantization), f"{quantization}, {layer}, {attention}")


@pytest.mark.parametrize("layer", ["fused", "stock"])
def test_20_steps_with_beginnings_computed_once_are_the_stock_models(base, layer: str):
    model, flat = make_model(base, quantization="nf4")
    shared = tuple(share_prefixes(batch) for batch in batches(begin_alike=True))
    assert all(batch.prefix_of is not None for batch in shared)
    with patched(model, attention="document", fused=layer == "fused", recompute_layers=1) as llama:
        ours = train(flat, lambda batch: packed_loss_sum(llama, *to_device(batch, DEVICE)), shared)
    assert_close(ours, stock_losses(base, "nf4", begin_alike=True), f"{layer}, shared")


def assert_close(ours: list[float], stock: list[float], case: str) -> None:
    difference = np.abs(np.array(ours) - np.array(stock))
    print(f"{case}: {difference.max():.1e} at most, {difference.mean():.1e} in the mean")
    assert stock[-1] < stock[0] - 0.5, "nothing was learnt, so the comparison shows nothing"
    assert difference.max() < 5e-3


def skip_unless_usable(attention: str) -> None:
    reason = usable_backends(is_packed=True, dtype=torch.bfloat16, device=DEVICE, head_dim=64)[attention]
    if reason is not None:
        pytest.skip(f"{attention} {reason}")


def loss_and_gradient(model, flat, **options) -> tuple[float, torch.Tensor]:
    torch.manual_seed(7)  # dropout masks
    flat.zero_gradient()
    with patched(model, fused=True, **{"attention": "document", **options}) as llama:
        loss = packed_loss_sum(llama, *to_device(batches()[0], DEVICE))
        loss.backward()
    return loss.item(), flat.gradient.clone()


@pytest.mark.parametrize(
    "options",
    [
        {"recompute_layers": 3},
        {"recompute_layers": 1},
        {"cached_layers": 3},
        {"recompute_layers": 2, "cached_layers": 2},
    ],
    ids=str,
)
def test_row15_recomputation_and_cached_weights_change_no_bit_at_dropout(base, options: dict):
    model, flat = make_model(base, quantization="nf4", dropout=0.1)
    loss, gradient = loss_and_gradient(model, flat)
    assert gradient.abs().max() > 0
    other_loss, other = loss_and_gradient(model, flat, **options)
    assert other_loss == loss
    assert torch.equal(other, gradient)


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Operations)])
def test_each_kernel_can_be_left_to_pytorch_alone(base, name: str):
    model, flat = make_model(base, quantization="nf4")
    loss, gradient = loss_and_gradient(model, flat)
    off = {"gated": "none", "token_reuse": "none"}.get(name, "torch")
    other_loss, other = loss_and_gradient(model, flat, operations=Operations(**{name: off}))
    if name == "nf4":  # the same weights to the last bit
        assert other_loss == loss
        assert torch.equal(other, gradient)
    else:
        assert other_loss == pytest.approx(loss, rel=1e-3)
        assert F.cosine_similarity(other, gradient, dim=0) > 0.999


@pytest.mark.parametrize("attention", ["document", "flash_attn", "varlen", "sdpa"])
@pytest.mark.parametrize("fused", [False, True], ids=["stock", "fused"])
def test_row04_a_changed_document_changes_no_other(base, attention: str, fused: bool):
    skip_unless_usable(attention)
    model, _ = make_model(base, quantization="nf4")
    batch = batches()[0]
    changed = batch.document_ids == 0
    other_ids = torch.where(changed, (batch.input_ids + 1) % VOCABULARY, batch.input_ids)
    hidden = []
    with patched(model, attention=attention, fused=fused) as llama, torch.no_grad():
        for ids in (batch.input_ids, other_ids):
            inputs = to_device(dataclasses.replace(batch, input_ids=ids), DEVICE)
            hidden.append(llama.model(input_ids=inputs[0], position_ids=inputs[1], layout=inputs[2])[0])
    changed = changed.to(DEVICE)
    assert bool((~changed).any())
    assert torch.equal(hidden[0][~changed], hidden[1][~changed])
    assert not torch.equal(hidden[0][changed], hidden[1][changed])


@pytest.mark.parametrize("rope_type", ROPE)
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_step_does_not_stop_the_gpu(tmp_path, quantization: str, rope_type: str):
    """Forward and backward of a new micro-batch, from its copy to the device on, and of RoPE's tables for it."""
    rope = {"rope_type": rope_type, "rope_theta": 10000.0, **ROPE[rope_type]}
    base = save_base(tmp_path, max_position_embeddings=ORIGINAL, rope_parameters=rope)
    model, flat = make_model(base, quantization=quantization, dropout=0.1)
    with patched(model, attention="document", fused=True, recompute_layers=1, cached_layers=1) as llama:

        def step(longest: int) -> None:
            ids_BL, positions_BL, layout, *labels = to_device(batches()[0], DEVICE)
            layout = dataclasses.replace(layout, longest_document=longest)  # what frequencies go by, if by anything
            packed_loss_sum(llama, ids_BL, positions_BL, layout, *labels).backward()

        lengths = (ORIGINAL // 2, 2 * ORIGINAL)
        for longest in lengths:  # compiles, and makes the first tables
            step(longest)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for longest in lengths:
                step(longest)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert flat.gradient.isfinite().all()
