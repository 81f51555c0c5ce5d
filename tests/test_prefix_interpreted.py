"""Whole layers over documents that share their beginning, by a GPU's attention, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from interpreter import interpreted
from test_engine_packed import load_model
from test_prefix import batch_of, templated
from tiny_run import save_base

from packloop.data.layout import share_prefixes
from packloop.engine.batch import Micro
from packloop.engine.optim import FlatParameters
from packloop.kernels.operations import Operations
from packloop.kernels.patch import packed_loss_sum, patched

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """One layer of two query heads and one key/value head of 16: the interpreter takes its time."""
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    return save_base(tmp_path_factory.mktemp("base"), hidden_size=32, **heads)


@interpreted
@pytest.mark.parametrize("options", [{"recompute_layers": 1}], ids=str)
def test_losses_and_gradients_are_those_of_whole_documents(base, options, short_beginnings):
    packed = batch_of(templated(num_documents=2))
    shared = share_prefixes(packed)
    assert shared.num_slots < packed.num_real_tokens
    results = []
    for batch, attention in ((packed, "eager"), (shared, "document")):
        model = load_model(base)
        flat = FlatParameters(model)
        # All but attention by PyTorch, which is not what this is about and takes less time.
        others = Operations(rms_norm="torch", swiglu="torch", cross_entropy="torch")
        with patched(model, attention=attention, fused=True, operations=others, **options) as llama:
            loss = packed_loss_sum(llama, *Micro.of(batch, CPU).inputs)
            loss.backward()
        results.append((loss.item(), flat.gradient.clone()))
    (expected, expected_gradient), (found, gradient) = results
    assert found == pytest.approx(expected, rel=1e-6)
    assert (gradient - expected_gradient).norm() < 1e-5 * expected_gradient.norm()
