"""A loss or gradient that is not finite is never stepped, and the rows at fault are named. Ranks: test_ranks.py."""

from __future__ import annotations

import json

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from small_job import read_steps, rows, small_config
from tiny_run import save_base
from transformers import AutoTokenizer, LlamaForCausalLM

from packloop.config import RunConfig
from packloop.data.loader import PackLoader, build_data
from packloop.engine.batch import Windows
from packloop.engine.loop import NonFiniteError, train, train_step
from packloop.engine.model import load_model, load_tokenizer
from packloop.engine.optim import AdamW, FlatParameters
from packloop.kernels.patch import patched

POISON = "§"  # in row 5 alone
POISONED_ROW = 5
FEATURE = 7


@pytest.fixture(scope="module")
def poisoned_rows(tmp_path_factory):
    made = rows(8)
    made[POISONED_ROW]["response"] = f"Hello {POISON}."
    path = tmp_path_factory.mktemp("poisoned") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    return path


def save_edited_base(directory, edit):
    """A base whose embedding `edit(weight, token)` has changed; token is the first of POISON's."""
    save_base(directory)
    llama = LlamaForCausalLM.from_pretrained(directory)
    token = AutoTokenizer.from_pretrained(directory)(POISON, add_special_tokens=False)["input_ids"][0]
    edit(llama.model.embed_tokens.weight.data, token)
    llama.save_pretrained(directory)
    return directory


def one_row_a_micro_batch(base, source, run_dir) -> RunConfig:
    """Windows of rows (0, 1), (2, 3), (4, 5), (6, 7)."""
    data = {"packing": "none", "shuffle": False}
    return small_config(base, source, run_dir, data=data, checkpoint={"every": 1, "keep": 9})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_row27_a_loss_that_is_not_finite_is_not_stepped(poisoned_rows, tmp_path, value):
    def poison(weight, token):
        weight[token] = value

    base = save_edited_base(tmp_path / "base", poison)
    with pytest.raises(NonFiniteError) as caught:
        train(one_row_a_micro_batch(base, poisoned_rows, tmp_path / "run"))
    assert f"rows [{POISONED_ROW}]" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "--resume latest" in str(caught.value)
    assert [step["step"] for step in read_steps(tmp_path / "run")] == [1, 2]
    checkpoints = sorted((tmp_path / "run/checkpoints").glob("step-*"))
    assert [path.name for path in checkpoints] == ["step-000001", "step-000002"]
    for checkpoint in checkpoints:
        for file in ("adapter_model.safetensors", "optimizer.safetensors"):
            assert all(tensor.isfinite().all() for tensor in load_file(checkpoint / file).values())
    assert not (tmp_path / "run/adapter_model.safetensors").exists()


def test_row27_a_gradient_that_is_not_finite_is_not_stepped(poisoned_rows, tmp_path):
    """Every loss is finite. One feature is zero in all tokens but one, and lora_A blows that feature up."""

    def single_out(weight, token):
        weight[:, FEATURE] = 0.0
        weight[token, FEATURE] = 1.0

    base = save_edited_base(tmp_path / "base", single_out)
    config = one_row_a_micro_batch(base, poisoned_rows, tmp_path / "run")
    tokenizer = load_tokenizer(config.model)
    model = load_model(config.model, config.lora, torch.device("cpu")).train()
    model.base_model.model.model.layers[0].self_attn.v_proj.lora_A["default"].weight.data[:, FEATURE] = 1e37
    flat = FlatParameters(model)
    optimizer = AdamW(flat, name="adamw_32bit", betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    loader = PackLoader(
        build_data(config.data, tokenizer, seed=0).train,
        packing="none",
        max_length=96,
        per_device_batch_size=1,
        gradient_accumulation_steps=2,
        rank=0,
        world_size=1,
        seed=0,
        shuffle=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    accelerator, windows = Accelerator(cpu=True), Windows(loader, torch.device("cpu"))
    with patched(model, attention="sdpa") as llama:
        for _ in range(2):
            train_step(
                llama,
                flat,
                optimizer,
                windows.take(),
                accelerator=accelerator,
                learning_rate=0.0,  # or lora_B would move, and with this lora_A the loss would overflow too
                max_grad_norm=1.0,
            )
        weight, moments = flat.weight.detach().clone(), optimizer.state_tensors()
        with pytest.raises(NonFiniteError, match=rf"rows \[{POISONED_ROW}\]"):
            train_step(
                llama,
                flat,
                optimizer,
                windows.take(),
                accelerator=accelerator,
                learning_rate=1.0,
                max_grad_norm=1.0,
            )
    assert torch.equal(flat.weight, weight)
    after = optimizer.state_tensors()
    assert any(tensor.abs().max() > 0 for tensor in moments.values())
    assert all(torch.equal(after[name], tensor) for name, tensor in moments.items())
