"""The fused decoder layer against Hugging Face's and PEFT's modules: loss, every gradient, and what changes neither."""

from __future__ import annotations

import itertools

import pytest
import torch

from packloop.config import LoraConfig, ModelConfig
from packloop.engine.model import load_model
from packloop.engine.optim import FlatParameters
from packloop.kernels import decoder_layer, lora_linear
from packloop.kernels import linear_cross_entropy as linear_cross_entropy_module
from packloop.kernels.attention import DocumentLayout
from packloop.kernels.linear_cross_entropy import linear_cross_entropy
from packloop.kernels.lora_linear import _stacked
from packloop.kernels.operations import Operations
from packloop.kernels.patch import packed_loss_sum, patched, why_not_fused

LENGTHS = (5, 19, 8)  # documents of a row, of which the last is padding
TARGETS = {
    "attention": ["q_proj", "v_proj"],
    "output": ["o_proj", "down_proj"],
    "uneven": ["k_proj", "gate_proj"],
    "all": "all-linear",
}


def make_model(base, *, quantization: str, targets, dropout: float = 0.0, r: int = 8):
    torch.manual_seed(0)
    model = load_model(
        ModelConfig(name_or_path=str(base), dtype="float32", quantization=quantization),
        LoraConfig(r=r, alpha=16, dropout=dropout, target_modules=targets),
        torch.device("cpu"),
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at the start, which would hide the gradient of A
            parameter.data.normal_(std=0.05)
    model.train()
    return model, FlatParameters(model)


def micro_batch(vocabulary: int = 300, rows: int = 2):
    generator = torch.Generator().manual_seed(1)
    width = sum(LENGTHS)
    input_ids = torch.randint(3, vocabulary, (rows, width), generator=generator)
    numbers = torch.cat([torch.full((n,), i, dtype=torch.int32) for i, n in enumerate(LENGTHS[:-1])])
    document_ids = torch.cat([numbers, torch.full((LENGTHS[-1],), -1, dtype=torch.int32)]).repeat(rows, 1)
    positions = torch.cat([torch.arange(n) for n in LENGTHS]).repeat(rows, 1)
    bounds = torch.tensor([0, *itertools.accumulate(LENGTHS * rows)], dtype=torch.int32)
    layout = DocumentLayout(document_ids, bounds, max(LENGTHS), is_packed=True)
    label_index = torch.cat([row * width + torch.arange(1, 20) for row in range(rows)])
    label_ids = torch.randint(3, vocabulary, label_index.shape, generator=generator)
    return input_ids, positions, layout, label_index, label_ids


def loss_and_gradient(model, flat, *, seed: int = 7, attention: str = "sdpa", **options):
    torch.manual_seed(seed)  # dropout masks
    flat.zero_gradient()
    with patched(model, attention=attention, **options) as llama:
        loss = packed_loss_sum(llama, *micro_batch())
        loss.backward()
    flat.check_linked()
    return loss.item(), flat.gradient.clone()


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("targets", TARGETS)
def test_same_loss_and_gradients_as_stock_modules(small_base, quantization, targets):
    model, flat = make_model(small_base, quantization=quantization, targets=TARGETS[targets])
    stock_loss, stock = loss_and_gradient(model, flat, fused=False)
    loss, gradient = loss_and_gradient(model, flat, fused=True)
    assert loss == pytest.approx(stock_loss, rel=1e-6)
    assert (gradient - stock).norm() <= 2e-6 * stock.norm()


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("targets", ["attention", "all"])
def test_adapters_products_one_by_one_are_the_same_step(small_base, quantization, dropout, targets, monkeypatch):
    """`kernels.lora=torch`: no adapter lies in a base's product, none shares one, and the masks are the same."""
    model, flat = make_model(small_base, quantization=quantization, targets=TARGETS[targets], dropout=dropout)
    options = {"fused": True, "recompute_layers": 1, "cached_layers": 1}
    loss, gradient = loss_and_gradient(model, flat, **options)

    def refuse(*_, **__):
        raise AssertionError("a product of several")

    for name in ("dropout_project", "dropout_add_input_gradient_", "dropout_weight_gradient"):
        monkeypatch.setattr(lora_linear, name, refuse)
    for name in ("extended_group_forward", "extended_input_gradient"):
        monkeypatch.setattr(decoder_layer, name, refuse)
    monkeypatch.setattr(torch.Tensor, "baddbmm_", refuse)
    other_loss, other = loss_and_gradient(model, flat, operations=Operations(lora="torch"), **options)
    assert other_loss == pytest.approx(loss, rel=1e-6)
    assert (other - gradient).norm() < 1e-5 * gradient.norm()
    if quantization == "nf4" and dropout == 0.0:
        with pytest.raises(AssertionError, match="a product of several"):
            loss_and_gradient(model, flat, **options)


@pytest.mark.parametrize("rank", [3, 12])
def test_ranks_that_do_not_align_take_the_plain_products(small_base, rank):
    model, flat = make_model(small_base, quantization="nf4", targets="all-linear", r=rank)
    stock_loss, stock = loss_and_gradient(model, flat, fused=False)
    loss, gradient = loss_and_gradient(model, flat, fused=True)
    assert loss == pytest.approx(stock_loss, rel=1e-6)
    assert (gradient - stock).norm() <= 2e-6 * stock.norm()


@pytest.mark.parametrize(
    "options",
    [
        {"recompute_layers": 2},
        {"recompute_layers": 1},
        {"cached_layers": 2},
        {"recompute_layers": 1, "cached_layers": 1},
        {"keep_inputs_layers": 2},
        {"recompute_layers": 1, "keep_inputs_layers": 1, "cached_layers": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_row15_memory_choices_change_no_bit(small_base, options, dropout):
    model, flat = make_model(small_base, quantization="nf4", targets="all-linear", dropout=dropout)
    loss, gradient = loss_and_gradient(model, flat, fused=True)
    other_loss, other = loss_and_gradient(model, flat, fused=True, **options)
    assert other_loss == loss
    assert torch.equal(other, gradient)


def test_dropout_draws_another_mask_for_another_seed_and_none_in_evaluation(small_base):
    model, flat = make_model(small_base, quantization="none", targets=["q_proj"], dropout=0.5)
    losses = {seed: loss_and_gradient(model, flat, fused=True, seed=seed)[0] for seed in (1, 2)}
    assert losses[1] != losses[2]
    assert loss_and_gradient(model, flat, fused=True, seed=1)[0] == losses[1]
    model.eval()
    dry = [loss_and_gradient(model, flat, fused=True, seed=seed)[0] for seed in (1, 2)]
    assert dry[0] == dry[1] not in losses.values()


def test_cached_weights_follow_the_adapter(small_base):
    """The adapters lie beside a cached weight in one buffer: a step must reach them there."""
    model, flat = make_model(small_base, quantization="nf4", targets="all-linear")
    batch = micro_batch()
    with patched(model, attention="sdpa", fused=True, cached_layers=2) as llama, torch.no_grad():
        before = packed_loss_sum(llama, *batch).item()
        flat.weight.data.mul_(1.5)
        after = packed_loss_sum(llama, *batch).item()
    with patched(model, attention="sdpa", fused=True) as llama, torch.no_grad():
        assert packed_loss_sum(llama, *batch).item() == after != before


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_row04_documents_do_not_see_each_other(small_base, attention):
    model, _ = make_model(small_base, quantization="nf4", targets="all-linear")
    input_ids, positions, layout, _, _ = micro_batch()
    with patched(model, attention=attention, fused=True) as llama, torch.no_grad():

        def hidden(ids):
            return llama.model(input_ids=ids, position_ids=positions, layout=layout).last_hidden_state

        first = hidden(input_ids)
        input_ids[:, :5] += 1
        second = hidden(input_ids)
    assert torch.equal(first[:, 5:], second[:, 5:])
    assert not torch.equal(first[:, :5], second[:, :5])


def test_it_refuses_what_it_does_not_compute(small_base):
    model, _ = make_model(small_base, quantization="none", targets=["q_proj"])
    model.config.mlp_bias = True
    assert "bias" in why_not_fused(model)
    with (
        pytest.raises(ValueError, match=r"kernels\.layer=fused: .*bias.*kernels\.layer=stock"),
        patched(model, attention="sdpa", fused=True),
    ):
        pass


def test_it_refuses_adapters_in_half_precision(small_base):
    model, _ = make_model(small_base, quantization="none", targets="all-linear")
    assert why_not_fused(model) is None
    model.base_model.model.model.layers[1].mlp.up_proj.lora_A["default"].bfloat16()
    assert why_not_fused(model) == "adapters are contiguous and float32, and this model's are not"


def test_a_residual_without_update_has_its_gradient(small_base):
    """As where the embedding is trained, or another layer comes before the first."""
    model, _ = make_model(small_base, quantization="none", targets="all-linear")
    ids, positions, layout, *_ = micro_batch()
    found = []
    with patched(model, attention="sdpa", fused=True) as llama, torch.enable_grad():
        layers = llama.model.forward.run_layers
        layers._adapters.refresh()
        batch = layers.batch(llama.model, positions, layout)
        hidden = llama.model.embed_tokens(ids).detach().flatten(0, 1)
        for update in (None, torch.zeros_like(hidden)):
            residual = hidden.clone().requires_grad_()
            x2, out = decoder_layer.decoder_layer(residual, update, layers.layers[0], batch)
            (x2 + out).square().sum().backward()
            found.append(residual.grad)
    assert found[0].abs().max() > 0
    assert torch.equal(*found)


def test_a_trained_head_has_no_gradient_where_none_is_wanted(monkeypatch):
    asked = []
    plain = linear_cross_entropy_module.cross_entropy_

    def spy(*arguments, needs_gradient, **options):
        asked.append(needs_gradient)
        return plain(*arguments, needs_gradient=needs_gradient, **options)

    monkeypatch.setattr(linear_cross_entropy_module, "cross_entropy_", spy)
    hidden, head = torch.randn(6, 8), torch.randn(40, 8, requires_grad=True)
    index = torch.arange(5)
    trained = linear_cross_entropy(hidden, head, index, index)
    with torch.no_grad():
        evaluated = linear_cross_entropy(hidden, head, index, index)
    assert asked == [True, False]
    assert torch.equal(trained, evaluated)
    assert not evaluated.requires_grad


def test_head_in_chunks_equals_the_whole(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(150, 32, generator=generator).requires_grad_()
    weight = torch.randn(300, 32, generator=generator).requires_grad_()
    index, ids = torch.randperm(150, generator=generator)[:131], torch.randint(0, 300, (131,), generator=generator)
    whole = torch.nn.functional.cross_entropy(hidden[index] @ weight.T, ids, reduction="sum")
    wanted = torch.autograd.grad(whole * 2, (hidden, weight))
    monkeypatch.setattr("packloop.kernels.linear_cross_entropy.CHUNK_BYTES", 64 * 300 * 4)
    loss = linear_cross_entropy(hidden, weight, index, ids)
    found = torch.autograd.grad(loss * 2, (hidden, weight))
    assert loss.item() == pytest.approx(whole.item(), rel=1e-6)
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_gradients_added_in_place_are_those_that_autograd_gets(small_base, dropout):
    model, flat = make_model(small_base, quantization="nf4", targets="all-linear", dropout=dropout)
    _, once = loss_and_gradient(model, flat, fused=True)
    torch.manual_seed(7)
    with patched(model, attention="sdpa", fused=True) as llama:
        packed_loss_sum(llama, *micro_batch()).backward()
        assert torch.equal(flat.gradient, once + once)  # a second micro-batch adds to the first
        for parameter in flat.named.values():
            parameter.grad = None
        torch.manual_seed(7)
        found = torch.autograd.grad(packed_loss_sum(llama, *micro_batch()), list(flat.named.values()))
    for name, gradient in zip(flat.named, found):
        torch.testing.assert_close(gradient, flat.view(once, name), rtol=1e-5, atol=1e-7)


def test_adapters_on_one_input_have_their_gradients_in_one_piece(small_base):
    model, _ = make_model(small_base, quantization="none", targets="all-linear")
    attention = model.base_model.model.model.layers[1].self_attn
    gradients = [getattr(attention, name).lora_A["default"].weight.grad for name in ("q_proj", "k_proj", "v_proj")]
    stacked = _stacked(gradients)
    assert stacked.shape == (3, 8, 64)
    assert stacked.is_contiguous()
    stacked.fill_(3.0)
    assert all((gradient == 3.0).all() for gradient in gradients)
    apart = _stacked([gradients[0], gradients[2]])
    assert (apart.shape, apart.stride()) == ((2, 8, 64), (2 * 8 * 64, 64, 1))
    assert _stacked([gradients[0], gradients[1], gradients[2][:, ::2]]) is None  # of another shape
    assert _stacked([gradients[0], gradients[2], gradients[1]]) is None  # not at equal distances
    assert _stacked([gradients[2], gradients[0]]) is None
    assert _stacked([torch.zeros(2, 4), torch.zeros(2, 4)]) is None


def test_the_first_layer_makes_no_gradient_for_its_frozen_input(small_base):
    model, flat = make_model(small_base, quantization="nf4", targets="all-linear")
    calls: list[tuple[int, bool]] = []
    with patched(model, attention="sdpa", fused=True) as llama:
        for layer in llama.model.forward.run_layers.layers:
            weights = layer.weights["qkv"]

            def counted(*, for_backward: bool = False, index=layer.index, weights=weights):
                calls.append((index, for_backward))
                return weights(for_backward=for_backward)

            counted.extends = weights.extends
            layer.weights["qkv"] = counted
        packed_loss_sum(llama, *micro_batch()).backward()
    assert calls == [(0, False), (1, False), (1, True)]
    assert flat.gradient.abs().max() > 0


@pytest.mark.parametrize("recompute_layers", [0, 2])
def test_a_layer_finds_the_spare_columns_that_the_next_one_left_for_it(small_base, monkeypatch, recompute_layers):
    """Else its gradient would be copied, and no result would tell: only the last layer's comes from the norm."""
    model, flat = make_model(small_base, quantization="nf4", targets="all-linear")
    find, found = decoder_layer.with_spare_columns, []

    def look(gradient: torch.Tensor, num_spare: int) -> torch.Tensor:
        wide = find(gradient, num_spare)
        found.append(wide.shape[1] - gradient.shape[1])
        return wide

    monkeypatch.setattr(decoder_layer, "with_spare_columns", look)
    loss_and_gradient(model, flat, fused=True, recompute_layers=recompute_layers)
    rank, num_layers = 8, model.config.num_hidden_layers
    assert found == [0] + [rank] * (num_layers - 1)
