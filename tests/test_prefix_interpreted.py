"""Whole layers over documents that share their beginning, by the attention that runs on a GPU, in Triton's interpreter.

As test_kernels_document_attention.py: an ordinary pytest run starts a second one on this file.
"""

from __future__ import annotations

import pytest
import torch
from interpreter import interpreted, needs_triton, ordinary, run_in_interpreter
from test_engine_packed import load_model
from test_prefix import batch_of, templated

from packloop.data import layout as layout_module
from packloop.data import prefix
from packloop.data.layout import share_prefixes
from packloop.engine.batch import Micro
from packloop.engine.optim import FlatParameters
from packloop.kernels.operations import Operations
from packloop.kernels.patch import packed_loss_sum, patched

CPU = torch.device("cpu")


@ordinary
@needs_triton
def test_in_the_interpreter():
    run_in_interpreter(__file__)


@interpreted
@pytest.mark.parametrize("options", [{"recompute_layers": 1, "keep_inputs_layers": 1}], ids=str)
def test_losses_and_gradients_are_those_of_whole_documents(small_base, options, monkeypatch):
    monkeypatch.setattr(layout_module, "SLOT_MULTIPLE", 8)
    monkeypatch.setattr(prefix, "LEAST_PREFIX", 3)
    packed = batch_of(templated(num_documents=2))
    shared = share_prefixes(packed)
    assert shared.num_slots < packed.num_real_tokens
    results = []
    for batch, attention in ((packed, "eager"), (shared, "document")):
        model = load_model(small_base)
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
