"""SwiGLU in the products around it, gate and up interleaved: the layer against the one with passes of its own."""

from __future__ import annotations

import pytest
import torch
from small_job import small_config, write_rows
from test_fused_layer import TARGETS, loss_and_gradient, make_model
from tiny_run import save_base

from packloop.config import LoraConfig, ModelConfig, load_config
from packloop.engine.loop import train
from packloop.engine.model import load_model
from packloop.errors import ConfigError
from packloop.kernels import operations, reference
from packloop.kernels.activation_bytes import activation_bytes
from packloop.kernels.adapters import AdapterCopies
from packloop.kernels.base_weights import GroupWeights
from packloop.kernels.gated import deinterleave, gated_backward, gated_forward
from packloop.kernels.lora_linear import Lora, lora_b_gradients
from packloop.kernels.operations import Operations
from packloop.kernels.patch import find_llama, patched, why_not_interleaved

CPU = torch.device("cpu")
MIXED = {"gate": ["gate_proj", "q_proj"], "up": ["up_proj", "down_proj"], "down": ["down_proj"], **TARGETS}
MEMORY = [{"recompute_layers": 2}, {"keep_inputs_layers": 2}, {"cached_layers": 2}]
GATED, PLAIN = Operations(gated="torch"), Operations(gated="none")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"), intermediate_size=128)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layers_of(model, operations: Operations):
    with patched(model, attention="sdpa", fused=True, operations=operations):
        return find_llama(model).model.forward.run_layers.layers


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("targets", MIXED)
def test_the_gated_layer_gives_the_plain_layers_loss_and_gradients(base, targets: str, dropout: float):
    model, flat = make_model(base, quantization="nf4", targets=MIXED[targets], dropout=dropout)
    assert [layer.is_gated for layer in layers_of(model, GATED)] == [True, True]
    expected_loss, expected = loss_and_gradient(model, flat, fused=True, operations=PLAIN)
    loss, gradient = loss_and_gradient(model, flat, fused=True, operations=GATED)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert (gradient - expected).norm() <= 2e-6 * expected.norm()
    for options in MEMORY:  # and no choice of memory changes a bit
        other_loss, other = loss_and_gradient(model, flat, fused=True, operations=GATED, **options)
        assert other_loss == loss
        assert torch.equal(other, gradient)


@pytest.mark.parametrize(
    ("options", "operations"),
    [
        ({"quantization": "none", "targets": "all-linear"}, GATED),
        ({"quantization": "nf4", "targets": "all-linear", "r": 3}, GATED),
        ({"quantization": "nf4", "targets": "all-linear"}, Operations()),
    ],
    ids=["dense base", "rank that does not align", "auto without quack"],
)
def test_what_cannot_interleave_keeps_its_own_passes(base, options: dict, operations: Operations):
    model, flat = make_model(base, **options)
    assert not any(layer.is_gated for layer in layers_of(model, operations))
    expected_loss, expected = loss_and_gradient(model, flat, fused=True, operations=PLAIN)
    loss, gradient = loss_and_gradient(model, flat, fused=True, operations=operations)
    assert loss == expected_loss
    assert torch.equal(gradient, expected)


def test_auto_asks_the_model_before_it_takes_quack(base, monkeypatch):
    monkeypatch.setattr(operations, "why_not_gated", lambda device: None)  # as on a Hopper GPU with quack

    def chosen(dtype: str = "bfloat16", quantization: str = "nf4", r: int = 8) -> tuple[str, str | None]:
        described = ModelConfig(name_or_path=str(base), dtype=dtype, quantization=quantization)
        model = load_model(described, LoraConfig(r=r, target_modules="all-linear"), CPU)
        reason = why_not_interleaved(model)
        return operations.choose_operations(Operations(), CPU, fused=True, unfit={"gated": reason}).gated, reason

    assert chosen() == ("quack", None)
    assert chosen(dtype="float32") == ("none", "needs model.dtype=bfloat16, given float32")
    for options in ({"quantization": "none"}, {"r": 3}):
        found, reason = chosen(**options)
        assert found == "none"
        assert "needs bfloat16, an NF4 base" in reason


def test_a_float32_run_goes_without_quack_where_it_could_run(small_base, tmp_path, monkeypatch):
    monkeypatch.setattr(operations, "why_not_gated", lambda device: None)
    rows = write_rows(tmp_path / "rows.jsonl", 8)
    train(small_config(small_base, rows, tmp_path / "run", train={"max_steps": 1}, kernels={"layer": "fused"}))
    assert load_config(tmp_path / "run" / "config.resolved.yaml").kernels.gated == "none"
    asked = small_config(small_base, rows, tmp_path / "asked", train={"max_steps": 1}, kernels={"gated": "quack"})
    with pytest.raises(ConfigError, match=r"kernels\.gated=quack: needs model\.dtype=bfloat16, given"):
        train(asked)


def test_down_with_a_rank_that_does_not_align_takes_the_strided_pass_back(base):
    model, flat = make_model(base, quantization="nf4", targets=["down_proj", "q_proj"], r=3)
    assert all(layer.is_gated for layer in layers_of(model, GATED))
    _, expected = loss_and_gradient(model, flat, fused=True, operations=PLAIN)
    _, gradient = loss_and_gradient(model, flat, fused=True, operations=GATED)
    assert (gradient - expected).norm() <= 2e-6 * expected.norm()


def test_the_product_is_never_kept(base):
    model, _ = make_model(base, quantization="nf4", targets="all-linear")
    (gated, *_), (plain, *_) = layers_of(model, GATED), layers_of(model, PLAIN)
    saved = activation_bytes(plain, 100)["inputs"] - activation_bytes(gated, 100)["inputs"]
    assert saved == 100 * (128 + plain.spare_columns("down")) * 4
    assert activation_bytes(gated, 100)["products"] == activation_bytes(plain, 100)["products"]


def test_a_gated_product_is_the_product_and_its_swiglu_and_back():
    x, weight, down, dy = random(7, 12), random(20, 12, seed=1), random(12, 10, seed=2), random(7, 12, seed=3)
    wide, hidden = torch.full((7, 24), torch.nan, dtype=torch.float64), torch.empty(7, 13, dtype=torch.float64)
    preact, product = wide[:, :20], hidden[:, :10]
    gated_forward(x, weight, preact_out=preact, hidden_out=product, by="torch")
    gate, up = ((x @ rows.T).requires_grad_() for rows in (weight[0::2], weight[1::2]))
    torch.testing.assert_close(deinterleave(preact), (gate, up))
    torch.testing.assert_close(product, reference.swiglu(gate, up))
    expected = torch.autograd.grad(reference.swiglu(gate, up), (gate, up), dy @ down)
    again = torch.empty(7, 10, dtype=torch.float64)
    gated_backward(dy, down, preact, d_preact_out=preact, hidden_out=again, by="torch")
    torch.testing.assert_close(deinterleave(preact), expected)
    torch.testing.assert_close(again, product)
    assert wide[:, 20:].isnan().all()


@pytest.mark.parametrize("present", [(True, True), (True, False), (False, True), (False, False)])
def test_interleaved_b_gradients_are_those_of_the_members(present: tuple[bool, bool]):
    pair = [Lora(random(4, 6, seed=seed), random(5, 4, seed=9 + seed), 0.5) for seed in (0, 1)]
    loras = [lora if is_in else None for lora, is_in in zip(pair, present)]
    copies = AdapterCopies(torch.float64, torch.device("cpu"))
    plain, turns = (copies.group((5, 5), loras, interleaved=interleaved) for interleaved in (False, True))
    copies.refresh()
    dy, ranks = random(8, 10, seed=20), 4 * sum(present)
    projected = random(8, ranks, seed=21) if ranks else None
    mixed = torch.stack(dy.chunk(2, dim=1), dim=2).flatten(1)
    expected = lora_b_gradients(dy, projected, plain, None)
    into = [torch.ones(5, 4, dtype=torch.float64) if is_in else None for is_in in present]
    found = lora_b_gradients(mixed, projected, turns, None)
    torch.testing.assert_close(found, expected)
    added = lora_b_gradients(mixed, projected, turns, None, into=into)[1]
    for total, gradient in zip(added, expected[1]):
        assert (total is None) == (gradient is None)
        if total is not None:
            torch.testing.assert_close(total, gradient + 1)


def test_dense_weights_and_members_of_two_sizes_do_not_interleave():
    copies = AdapterCopies(torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match="one size is needed"):
        copies.group((4, 5), (None, None), interleaved=True)
    group = copies.group((4, 4), (None, None), interleaved=True)
    with pytest.raises(ValueError, match="only NF4 weights interleave"):
        GroupWeights([torch.ones(4, 8), torch.ones(4, 8)], group, torch.float32)
