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

from packloop.config import RunConfig, load_config
from packloop.data.loader import PackLoader, build_data
from packloop.engine.batch import Windows
from packloop.engine.loop import train, train_step
from packloop.engine.model import load_model, load_tokenizer
from packloop.engine.nonfinite import NonFiniteError
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


IF_DIVERGED = "if the run has diverged, lower train.learning_rate or train.max_grad_norm and "
DIVERGES = {"max_steps": 6, "learning_rate": 1e38, "warmup_ratio": 0.4}  # at rate 0, then half of it, then all


def test_a_run_that_diverged_goes_on_at_another_rate_as_its_message_says(small_base, small_rows, tmp_path, caplog):
    checkpoint = {"every": 1, "keep": 9}
    config = small_config(small_base, small_rows, tmp_path / "run", train=DIVERGES, checkpoint=checkpoint)
    older = ", or with --resume and the path of an older checkpoint if that one has diverged too; "
    with pytest.raises(NonFiniteError) as caught:
        train(config)
    assert f"{IF_DIVERGED}continue with --resume latest{older}" in str(caught.value)
    lower = DIVERGES | {"learning_rate": 1e-3, "max_grad_norm": 0.5}
    config = small_config(small_base, small_rows, tmp_path / "run", train=lower, checkpoint=checkpoint)
    with pytest.raises(NonFiniteError, match=older):  # the newest was saved after the step that was too large
        train(config, resume="latest")
    caplog.clear()
    result = train(config, resume=str(tmp_path / "run/checkpoints/step-000001"))
    assert result.state.step == 6
    assert "train.learning_rate: 1e+38 in the checkpoint, 0.001 from here on" in caplog.messages
    assert "train.max_grad_norm: 1.0 in the checkpoint, 0.5 from here on" in caplog.messages
    steps = read_steps(tmp_path / "run")
    assert [step["learning_rate"] for step in steps] == pytest.approx([0.0, *[1e-3 / 3, 2e-3 / 3], *[1e-3] * 3])
    for directory in (tmp_path / "run", tmp_path / "run/checkpoints/step-000006"):
        resolved = load_config(directory / "config.resolved.yaml").train
        assert (resolved.learning_rate, resolved.max_grad_norm) == (1e-3, 0.5)
    # It is the run's own from there on: nothing is said of it.
    caplog.clear()
    train(config, resume="latest")
    assert not [message for message in caplog.messages if "from here on" in message]


def test_a_run_that_diverged_before_its_first_checkpoint_starts_again_as_its_message_says(
    small_base, small_rows, tmp_path
):
    with pytest.raises(NonFiniteError) as caught:
        train(small_config(small_base, small_rows, tmp_path / "run", train=DIVERGES))
    assert f"{IF_DIVERGED}start again; " in str(caught.value)
    assert "--resume" not in str(caught.value)
    lower = DIVERGES | {"learning_rate": 1e-3}
    assert train(small_config(small_base, small_rows, tmp_path / "run", train=lower)).state.step == 6


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
