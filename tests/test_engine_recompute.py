"""Activation checkpointing: the same gradients to the last bit, and the layers really run again."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from small_job import small_config
from torch.utils._python_dispatch import TorchDispatchMode

from packloop.data.loader import PackLoader, build_data
from packloop.engine.batch import to_device
from packloop.engine.loop import train
from packloop.engine.model import load_model, load_tokenizer
from packloop.engine.optim import FlatParameters
from packloop.kernels.patch import packed_loss_sum, patched

NUM_LAYERS = 3


class SoftmaxCount(TorchDispatchMode):
    """Counts softmax calls: eager attention makes one a layer and forward pass, and nothing else makes any."""

    calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += function is torch.ops.aten._softmax.default
        return function(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    from tiny_run import save_base

    return save_base(tmp_path_factory.mktemp("deep"), num_hidden_layers=NUM_LAYERS)


def gradient(base, rows, *, fused: bool, dropout: float = 0.1, quantization: str = "none", **kept: int):
    """(flat gradient, softmax calls in forward, in backward) of one micro-batch; every call draws the same dropout."""
    config = small_config(base, rows, base, model={"quantization": quantization}, lora={"dropout": dropout, "r": 4})
    tokenizer = load_tokenizer(config.model)
    loader = PackLoader(
        build_data(config.data, tokenizer, seed=0).train,
        packing="bfd",
        max_length=96,
        per_device_batch_size=2,
        gradient_accumulation_steps=1,
        rank=0,
        world_size=1,
        seed=0,
        shuffle=True,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(5)
    model = load_model(config.model, config.lora, torch.device("cpu")).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    flat = FlatParameters(model)
    with patched(model, attention="eager", fused=fused, **kept) as llama:
        with SoftmaxCount() as forward:
            loss_sum = packed_loss_sum(llama, *to_device(loader.next_window()[0], torch.device("cpu")))
        with SoftmaxCount() as backward:
            loss_sum.backward()
    flat.check_linked()
    return flat.gradient.clone(), forward.calls, backward.calls


@pytest.mark.parametrize("fused", [False, True], ids=["stock", "fused"])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_row15_gradients_are_bit_equal_at_dropout_and_layers_run_again(base, small_rows, fused, quantization):
    expected, in_forward, in_backward = gradient(
        base, small_rows, recompute_layers=0, fused=fused, quantization=quantization
    )
    assert (in_forward, in_backward) == (NUM_LAYERS, 0)
    for recompute_layers in (1, NUM_LAYERS):
        again, in_forward, in_backward = gradient(
            base, small_rows, recompute_layers=recompute_layers, fused=fused, quantization=quantization
        )
        assert (in_forward, in_backward) == (NUM_LAYERS, recompute_layers)
        assert torch.equal(again, expected)
    without, _, _ = gradient(base, small_rows, recompute_layers=0, fused=fused, quantization=quantization, dropout=0.0)
    assert (without - expected).norm() > 0.05 * expected.norm(), "dropout did nothing"


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_what_a_fused_layer_keeps_for_backward_does_not_change_the_gradient(base, small_rows, quantization):
    options = {"fused": True, "quantization": quantization}
    expected, _, _ = gradient(base, small_rows, **options)
    for kept in (
        {"keep_inputs_layers": 1},
        {"keep_inputs_layers": NUM_LAYERS},
        {"keep_inputs_layers": 1, "recompute_layers": 1},
        {"cached_layers": NUM_LAYERS, "recompute_layers": NUM_LAYERS},
    ):
        again, _, _ = gradient(base, small_rows, **options, **kept)
        assert torch.equal(again, expected), kept


@pytest.mark.parametrize("layer", ["stock", "fused"])
@pytest.mark.parametrize("checkpointing", ["none", "all", 1])
def test_row13_every_adapter_has_moved_after_one_step_on_a_frozen_base(
    base, small_rows, tmp_path, layer, checkpointing
):
    """The embedding's output needs no gradient; a layer that is recomputed from it still must give one."""
    config = small_config(
        base,
        small_rows,
        tmp_path / "run",
        model={"quantization": "nf4"},
        lora={"target_modules": "all-linear"},
        train={"max_steps": 1, "warmup_ratio": 0.0, "gradient_checkpointing": checkpointing},
        kernels={"layer": layer},
    )
    train(config)
    adapter = load_file(tmp_path / "run" / "adapter_model.safetensors")
    moved = {name for name, tensor in adapter.items() if "lora_B" in name and tensor.abs().max() > 0}
    assert len(moved) == NUM_LAYERS * 7
