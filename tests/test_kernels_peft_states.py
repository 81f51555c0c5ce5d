"""What PEFT can do to a model's adapters: the fused layer computes what PEFT's modules do, or says why it does not."""

from __future__ import annotations

import re

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from test_kernels_patch import make_llama, packed, stock_gradient

from packloop.engine.optim import FlatParameters
from packloop.kernels.patch import packed_loss_sum, patched, why_not_fused

LAYER = r"layers\.0\.self_attn\.q_proj"


def adapted(*, targets="all-linear", seed: int = 1, **settings):
    torch.manual_seed(seed)
    model = get_peft_model(make_llama(), lora(targets, **settings))
    return filled(model)


def lora(targets, **settings) -> LoraConfig:
    return LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", **settings)


def filled(model):
    """With adapters that do something: B is zero at the start."""
    for name, parameter in model.named_parameters():
        if re.search(r"lora_(embedding_)?B", name):
            parameter.data.normal_(std=0.1)
    return model


def fused_loss(model, **options) -> float:
    with patched(model, attention="sdpa", fused=True, **options) as llama, torch.no_grad():
        return packed_loss_sum(llama, *packed()).item()


def stock_loss(model) -> float:
    with patched(model, attention="sdpa") as llama, torch.no_grad():
        return packed_loss_sum(llama, *packed()).item()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"use_dora": True}, rf"its adapters are plain LoRA, and {LAYER} has DoraLinearVariant"),
        ({"alora_invocation_tokens": [3, 4]}, rf"its adapters are plain LoRA, and {LAYER} has ALoraLinearVariant"),
        ({"lora_bias": True}, rf"its adapters have no bias, and {LAYER}'s has \(lora_bias=True\)"),
        ({"target_parameters": ["q_proj.weight"], "targets": []}, rf"its adapters are plain LoRA, and {LAYER} has"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
def test_other_kinds_of_lora_are_refused(settings, reason):
    model = adapted(**settings)
    assert re.match(reason, why_not_fused(model))
    with pytest.raises(ValueError, match=rf"kernels\.layer=fused: {reason}.*; use kernels\.layer=stock$") as caught:
        fused_loss(model)
    assert "\n" not in str(caught.value)
    assert stock_loss(model) > 0


@pytest.mark.parametrize("targets", [["q_proj"], ["input_layernorm"]], ids=["projection", "norm"])
def test_adapters_that_are_not_lora_are_refused_even_frozen(targets):
    if targets == ["q_proj"]:
        config = IA3Config(target_modules=targets, feedforward_modules=[], task_type="CAUSAL_LM")
    else:
        config = lora(["v_proj"], modules_to_save=targets)
    model = get_peft_model(make_llama(), config).requires_grad_(False)
    name = LAYER if targets == ["q_proj"] else r"layers\.0\.input_layernorm"
    assert re.match(rf"its adapters are LoRA on linear layers, and {name} is a peft\.", why_not_fused(model))


def test_two_active_adapters_are_refused():
    model = adapted()
    model.add_adapter("other", lora("all-linear"))
    model.base_model.set_adapter(["default", "other"])
    assert re.match(rf"it runs one adapter a layer, and {LAYER} has 2 active: default, other", why_not_fused(model))
    with pytest.raises(ValueError, match="one adapter a layer"):
        fused_loss(model)


def test_an_active_adapter_of_other_layers_leaves_the_base_as_it_is():
    """Of two active adapters each has layers of its own; with one of them active the other's layers have none."""
    model = adapted(targets=["q_proj", "up_proj"])
    model.add_adapter("other", lora(["v_proj"]))
    filled(model).base_model.set_adapter(["default", "other"])
    assert fused_loss(model) == pytest.approx(stock_loss(model), rel=1e-6)
    model.set_adapter("other")
    assert fused_loss(model) == pytest.approx(stock_loss(model), rel=1e-6)


def test_dropouts_that_differ_are_refused():
    model = adapted(targets=["q_proj"], lora_dropout=0.1)
    model.add_adapter("other", lora(["down_proj"], lora_dropout=0.2))
    model.base_model.set_adapter(["default", "other"])
    assert why_not_fused(model) == "all its adapters have one dropout, and this model's have 0.1, 0.2"


def test_merged_adapters_are_refused():
    model = adapted()
    model.merge_adapter()
    assert re.match(rf"it adds adapters itself, and {LAYER}'s is merged into the base already", why_not_fused(model))
    model.unmerge_adapter()
    assert why_not_fused(model) is None


def test_disabled_adapters_are_left_out():
    model = adapted()
    enabled = fused_loss(model)
    with model.disable_adapter():
        expected = stock_loss(model)
        assert fused_loss(model) == pytest.approx(expected, rel=1e-6)
        assert expected != pytest.approx(enabled, rel=1e-3)
    assert fused_loss(model) == enabled


@pytest.mark.parametrize("options", [{}, {"recompute_layers": 2}], ids=["kept", "recomputed"])
def test_the_base_can_be_asked_between_a_forward_and_its_backward(options):
    """As a loss with a reference model does: the adapters' gradients stay those of their own forward pass."""
    model = adapted(lora_dropout=0.1).train()
    flat = FlatParameters(model)
    with patched(model, attention="sdpa", fused=True, **options) as llama:
        torch.manual_seed(5)
        packed_loss_sum(llama, *packed()).backward()
        expected = flat.gradient.clone()
        flat.zero_gradient()
        torch.manual_seed(5)
        loss = packed_loss_sum(llama, *packed())
        drawn = torch.get_rng_state()
        with model.disable_adapter(), torch.no_grad():
            reference = packed_loss_sum(llama, *packed())
        assert torch.equal(torch.get_rng_state(), drawn), "no mask is drawn for adapters that are off"
        loss.backward()
    with model.disable_adapter():
        assert reference.item() == pytest.approx(stock_loss(model), rel=1e-6)
    assert expected.norm() > 0
    assert torch.equal(flat.gradient, expected)


def merge(model) -> None:
    model.merge_adapter()


def change_base(model) -> None:
    layer = model.base_model.model.model.layers[1].mlp.up_proj.base_layer
    layer.weight = torch.nn.Parameter(layer.weight.data.clone(), requires_grad=False)


def change_dropout(model) -> None:
    model.base_model.model.model.layers[1].mlp.up_proj.lora_dropout["default"] = torch.nn.Dropout(0.2)


def change_probability(model) -> None:
    model.base_model.model.model.layers[1].mlp.up_proj.lora_dropout["default"].p = 0.2


def replace_dropouts(model) -> None:
    up_proj = model.base_model.model.model.layers[1].mlp.up_proj
    up_proj.lora_dropout = torch.nn.ModuleDict({"default": torch.nn.Dropout(0.2)})


def replace_scaling(model) -> None:
    model.base_model.model.model.layers[1].mlp.up_proj.scaling = {"default": 3.0}


def change_scaling(model) -> None:
    model.base_model.model.model.layers[1].mlp.up_proj.scale_layer(2.0)


def change_adapter(model) -> None:
    model.add_adapter("other", lora("all-linear"))
    model.set_adapter("other")


def replace_adapter(model) -> None:
    """By another of the same name, scaling and dropout."""
    model.delete_adapter("default")
    model.add_adapter("default", lora("all-linear"))
    model.set_adapter("default")


def change_a(model) -> None:
    change_weight(model.base_model.model.model.layers[1].mlp.up_proj.lora_A["default"])


def change_b(model) -> None:
    change_weight(model.base_model.model.model.layers[1].mlp.up_proj.lora_B["default"])


def change_weight(linear) -> None:
    linear.weight = torch.nn.Parameter(linear.weight.data.clone())


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (merge, rf"{LAYER}'s is merged into the base"),
        (change_base, r"layers\.1\.mlp\.up_proj has another base weight"),
        (change_dropout, r"layers\.1\.mlp\.up_proj has another dropout"),
        (change_probability, r"layers\.1\.mlp\.up_proj has another dropout"),
        (replace_dropouts, r"layers\.1\.mlp\.up_proj has another dropout"),
        (replace_scaling, r"layers\.1\.mlp\.up_proj has another scaling"),
        (change_scaling, r"layers\.1\.mlp\.up_proj has another scaling"),
        (change_adapter, rf"{LAYER} has another active adapter"),
        (replace_adapter, rf"{LAYER} has another adapter weight"),
        (change_a, r"layers\.1\.mlp\.up_proj has another adapter weight"),
        (change_b, r"layers\.1\.mlp\.up_proj has another adapter weight"),
    ],
)
def test_a_change_inside_the_context_is_refused(change, what):
    model = adapted()
    with patched(model, attention="sdpa", fused=True) as llama:
        assert packed_loss_sum(llama, *packed()) > 0
        change(model)
        with pytest.raises(ValueError, match=rf"kernels\.layer=fused: .*{what}.* use kernels\.layer=stock") as caught:
            packed_loss_sum(llama, *packed())
    assert "\n" not in str(caught.value)


def test_other_objects_that_amount_to_the_same_are_no_change():
    model = adapted()
    with patched(model, attention="sdpa", fused=True) as llama:
        before = packed_loss_sum(llama, *packed())
        up_proj = model.base_model.model.model.layers[1].mlp.up_proj
        up_proj.scaling = {"default": float(str(up_proj.scaling["default"]))}
        up_proj.lora_dropout["default"] = torch.nn.Identity()
        model.base_model.set_adapter(["default"])
        assert packed_loss_sum(llama, *packed()) == before


def test_new_values_in_the_same_parameters_are_followed():
    """As optimizers write them, and as views of one buffer take their places."""
    model = adapted()
    with patched(model, attention="sdpa", fused=True) as llama, torch.no_grad():
        before = packed_loss_sum(llama, *packed())
        FlatParameters(model)
        assert packed_loss_sum(llama, *packed()) == before
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)
        after = packed_loss_sum(llama, *packed()).item()
    assert after != pytest.approx(before.item(), rel=1e-3)
    assert after == pytest.approx(stock_loss(model), rel=1e-6)


def test_adapters_disabled_in_some_layers_are_refused():
    model = adapted()
    up_proj = model.base_model.model.model.layers[1].mlp.up_proj
    with patched(model, attention="sdpa", fused=True) as llama:
        up_proj.enable_adapters(False)
        with pytest.raises(ValueError, match=r"fused: it runs with all adapters or none, and those of 1 of 14 layers"):
            packed_loss_sum(llama, *packed())
    assert "1 of 14 layers are disabled" in why_not_fused(model)


@pytest.mark.parametrize("fused", [False, True], ids=["stock", "fused"])
def test_an_adapter_on_the_head_is_refused_where_the_loss_would_ignore_it(fused):
    model = adapted(targets=["q_proj", "lm_head"])
    with patched(model, attention="sdpa", fused=fused) as llama:
        ids, positions, layout, *_ = packed()
        assert llama.model(input_ids=ids, position_ids=positions, layout=layout).last_hidden_state.shape[-1] == 64
        with pytest.raises(ValueError, match=r"lm_head, which is a peft\..*Linear; leave lm_head out of .*_modules"):
            packed_loss_sum(llama, *packed())


@pytest.mark.parametrize("fused", [False, True], ids=["stock", "fused"])
def test_an_adapter_on_the_embedding_is_no_layers_and_trains(fused):
    model = adapted(targets=["q_proj", "embed_tokens"])
    flat = FlatParameters(model)
    expected = stock_gradient(model, flat)
    flat.zero_gradient()
    with patched(model, attention="sdpa", fused=fused) as llama:
        packed_loss_sum(llama, *packed()).backward()
    assert (flat.gradient - expected).norm() < 1e-5 * expected.norm()


def test_a_head_that_is_trained_whole_is_the_heads_own_copy():
    model = adapted(targets=["q_proj"], modules_to_save=["lm_head"])
    flat = FlatParameters(model)
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(1.5)
    expected = stock_gradient(model, flat)
    flat.zero_gradient()
    with patched(model, attention="sdpa") as llama:
        packed_loss_sum(llama, *packed()).backward()
    assert (flat.gradient - expected).norm() < 1e-5 * expected.norm()
