"""The gated products on a Hopper GPU in bf16, by the rule of kernel_oracle.py, and a layer's training with them."""

from __future__ import annotations

import pytest
import torch
from kernel_oracle import DEVICE, assert_no_worse, poisoned_memory, random

from packloop.config import LoraConfig, ModelConfig
from packloop.engine.model import load_model
from packloop.engine.optim import FlatParameters
from packloop.kernels import gated, reference
from packloop.kernels.gated import deinterleave, gated_backward, gated_forward
from packloop.kernels.operations import Operations
from packloop.kernels.patch import packed_loss_sum, patched

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

SHAPES = [(1, 64, 128, 0), (63, 512, 1408, 8), (1000, 512, 1408, 16), (8191, 4096, 11008, 64), (4096, 2048, 5632, 0)]


@pytest.fixture(autouse=True)
def _poisoned_outputs():
    if reason := gated.why_not_quack(torch.device(DEVICE, 0)):
        pytest.skip(f"quack {reason}")
    with poisoned_memory():
        yield


def columns(num_rows: int, num_columns: int, num_spare: int) -> tuple[torch.Tensor, torch.Tensor]:
    buffer = torch.full((num_rows, num_columns + num_spare), torch.nan, device=DEVICE, dtype=torch.bfloat16)
    return buffer, buffer[:, :num_columns]


@pytest.mark.parametrize(("num_tokens", "num_hidden", "num_features", "num_spare"), SHAPES)
def test_forward(num_tokens: int, num_hidden: int, num_features: int, num_spare: int):
    x = random(num_tokens, num_hidden + num_spare)
    weight = random(2 * num_features + num_spare, num_hidden + num_spare, scale=num_hidden**-0.5, seed=1)
    rows = weight[: 2 * num_features]
    wide, preact = columns(num_tokens, 2 * num_features, num_spare)
    beside, hidden = columns(num_tokens, num_features, num_spare)
    gated_forward(x, rows, preact_out=preact, hidden_out=hidden, by="quack")
    exact, stock = x.double() @ rows.double().T, x @ rows.T
    assert_no_worse(preact, stock, exact, 2)
    assert_no_worse(hidden, reference.swiglu(*deinterleave(stock)), reference.swiglu(*deinterleave(exact)), 2)
    assert wide[:, 2 * num_features :].isnan().all()
    assert beside[:, num_features:].isnan().all()
    again = torch.empty_like(preact), torch.empty_like(hidden)
    gated_forward(x, rows, preact_out=again[0], hidden_out=again[1], by="quack")
    assert torch.equal(again[0], preact)
    assert torch.equal(again[1], hidden)


@pytest.mark.parametrize(("num_tokens", "num_hidden", "num_features", "num_spare"), SHAPES)
def test_backward_over_its_input(num_tokens: int, num_hidden: int, num_features: int, num_spare: int):
    dy = random(num_tokens, num_hidden + num_spare)
    weight = random(num_hidden + num_spare, num_features + num_spare, scale=num_hidden**-0.5, seed=1)
    weight = weight[:, :num_features]
    given = random(num_tokens, 2 * num_features, seed=2)
    wide, preact = columns(num_tokens, 2 * num_features, num_spare)
    preact.copy_(given)
    hidden, apart = torch.empty(num_tokens, num_features, device=DEVICE, dtype=torch.bfloat16), torch.empty_like(given)
    gated_backward(dy, weight, preact, d_preact_out=apart, hidden_out=hidden, by="quack")
    exact = reference.swiglu_backward(dy.double() @ weight.double(), *deinterleave(given.double()))
    stock = reference.swiglu_backward(dy @ weight, *deinterleave(given))
    for found, other, value in zip(deinterleave(apart), stock, exact):
        assert_no_worse(found, other, value, 3)
    assert_no_worse(hidden, reference.swiglu(*deinterleave(given)), reference.swiglu(*deinterleave(given.double())), 2)
    for _ in range(10):  # no block reads what another has overwritten
        preact.copy_(given)
        gated_backward(dy, weight, preact, d_preact_out=preact, hidden_out=hidden, by="quack")
        assert torch.equal(preact, apart)
    assert wide[:, 2 * num_features :].isnan().all()


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"], ids=["q,v", "all-linear"])
def test_twenty_steps_beside_the_plain_layer(small_base, targets, dropout: float):
    from test_fused_layer import micro_batch

    losses = {}
    for by in ("none", "quack", "quack recomputed"):
        torch.manual_seed(0)
        model = load_model(
            ModelConfig(name_or_path=str(small_base), dtype="bfloat16", quantization="nf4"),
            LoraConfig(r=8, alpha=16, dropout=dropout, target_modules=targets),
            torch.device(DEVICE),
        ).train()
        flat = FlatParameters(model)
        ids, positions, layout, index, labels = micro_batch()
        layout = type(layout)(layout.document_ids_BL.to(DEVICE), layout.cu_seqlens.to(DEVICE), layout.max_seqlen, True)
        given = ids.to(DEVICE), positions.to(DEVICE), layout, index.to(DEVICE), labels.to(DEVICE)
        optimizer = torch.optim.AdamW(flat.named.values(), lr=3e-3)
        options = {"recompute_layers": 2} if "recomputed" in by else {"keep_inputs_layers": 2}
        operations = Operations(gated=by.split()[0])
        losses[by] = []
        with patched(model, attention="document", fused=True, operations=operations, **options) as llama:
            gates = [layer.is_gated for layer in llama.model.forward.run_layers.layers]
            assert gates == [by != "none"] * len(gates)
            for step in range(20):
                torch.manual_seed(step)
                flat.zero_gradient()
                loss = packed_loss_sum(llama, *given)
                (loss / len(labels)).backward()
                optimizer.step()
                losses[by].append(loss.item())
    assert losses["quack"][-1] < losses["quack"][0]
    assert losses["quack"] == pytest.approx(losses["none"], rel=0.01)
    assert losses["quack recomputed"] == losses["quack"]
