"""How many steps there are, at which rate, over which labels, and in which precision the trained weights are kept."""

from __future__ import annotations

import json
import logging
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from small_job import read_metrics, read_steps, small_config
from transformers import LlamaForCausalLM, get_scheduler

from packloop.data.loader import PackLoader, build_data
from packloop.engine import loop, metrics, run, schedule
from packloop.engine.loop import train
from packloop.engine.model import load_model, load_tokenizer
from packloop.engine.optim import AdamW, FlatParameters
from packloop.errors import ConfigError

NUM_PACKS = 17  # of the small rows under bfd
SCHEDULES = ("constant_with_warmup", "linear", "cosine")


def make_loader(config, *, world_size: int = 1, rank: int = 0) -> PackLoader:
    tokenizer = load_tokenizer(config.model)
    return PackLoader(
        build_data(config.data, tokenizer, seed=0).train,
        packing=config.data.packing,
        max_length=config.data.max_length,
        per_device_batch_size=config.train.per_device_train_batch_size,
        gradient_accumulation_steps=config.train.gradient_accumulation_steps,
        rank=rank,
        world_size=world_size,
        seed=0,
        shuffle=True,
        pad_token_id=tokenizer.pad_token_id,
    )


def test_row03_each_step_is_divided_by_its_own_labels(small_base, small_rows, tmp_path):
    """Two epochs of 17 packs in windows of 2: the ninth window has one, and the tenth starts the next epoch.

    The rate is next to nothing, so every loss is the base's, by stock code and document by document.
    """
    settings = {"num_train_epochs": 2, "learning_rate": 1e-30}
    config = small_config(small_base, small_rows, tmp_path / "run", train=settings)
    result = train(config)
    steps, loader = read_steps(tmp_path / "run"), make_loader(config)
    assert loader.num_packs == NUM_PACKS
    windows = [loader.next_window() for _ in range(18)]
    assert [len(window) for window in windows] == [*[2] * 8, 1, *[2] * 8, 1]
    assert [step["real_tokens"] for step in steps] == [sum(b.num_real_tokens for b in window) for window in windows]
    llama = LlamaForCausalLM.from_pretrained(small_base)
    for step, window in zip(steps, windows, strict=True):
        documents = [
            row[numbers == number]
            for batch in window
            for row, numbers in zip(batch.input_ids, batch.document_ids, strict=True)
            for number in range(int(numbers.max()) + 1)
        ]
        num_labels = sum(len(ids) - 1 for ids in documents)
        with torch.no_grad():
            logits = [llama(input_ids=ids[None]).logits[0, :-1] for ids in documents]
        sums = [F.cross_entropy(x, ids[1:], reduction="sum") for x, ids in zip(logits, documents, strict=True)]
        assert step["label_tokens"] == num_labels
        assert step["loss"] == pytest.approx(sum(sums).item() / num_labels, rel=1e-5)
    assert result.state.label_tokens == sum(step["label_tokens"] for step in steps)


def test_the_loss_on_held_out_rows_is_the_stock_models(small_base, small_rows, tmp_path):
    """Dropout is on in training and off in evaluation, which is on whole documents by stock code here."""
    config = small_config(
        small_base,
        small_rows,
        tmp_path / "run",
        lora={"dropout": 0.3},
        data={"eval_split": 7},
        train={"max_steps": 4, "eval_every": 2, "per_device_train_batch_size": 3, "learning_rate": 1e-30},
    )
    train(config)
    documents = build_data(config.data, load_tokenizer(config.model), seed=0).eval
    llama, total = LlamaForCausalLM.from_pretrained(small_base), 0.0
    for start, stop in zip(documents.offsets[:-1], documents.offsets[1:], strict=True):
        ids = torch.from_numpy(documents.token_ids[start:stop]).long()
        with torch.no_grad():
            total += F.cross_entropy(llama(input_ids=ids[None]).logits[0, :-1], ids[1:], reduction="sum").item()
    evaluations = [values for values in read_metrics(tmp_path / "run") if "eval_loss" in values]
    assert [values["step"] for values in evaluations] == [2, 4]
    for values in evaluations:
        assert values["eval_label_tokens"] == documents.offsets[-1] - len(documents)
        assert values["eval_loss"] == pytest.approx(total / values["eval_label_tokens"], rel=1e-5)


@pytest.mark.parametrize("epochs", [1, 2.5])
@pytest.mark.parametrize(("batch", "accumulation"), [(1, 1), (2, 2), (3, 4), (20, 1)])
def test_row10_steps_announced_are_steps_run_and_end_the_schedule(
    small_base, small_rows, tmp_path, capsys, epochs, batch, accumulation
):
    settings = {
        "num_train_epochs": epochs,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulation,
        "lr_scheduler_type": "linear",
    }
    train(small_config(small_base, small_rows, tmp_path / "run", train=settings))
    expected = math.ceil(epochs * math.ceil(NUM_PACKS / (batch * accumulation)))
    steps = read_steps(tmp_path / "run")
    assert [step["step"] for step in steps] == list(range(1, expected + 1))
    assert f" {expected} steps," in capsys.readouterr().out
    warmup = math.ceil(0.03 * expected)
    if expected > warmup:
        assert steps[-1]["learning_rate"] == pytest.approx(1e-2 / (expected - warmup), rel=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("num_steps", "ratio"), [(1, 0.03), (7, 0.0), (100, 0.03), (101, 0.5), (10, 1.0)])
def test_schedules_are_transformers_schedules_of_the_same_name(name, num_steps, ratio):
    warmup = schedule.num_warmup_steps(ratio, num_steps)
    assert warmup == math.ceil(ratio * num_steps)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=num_steps)
    for step in range(num_steps):
        ours = schedule.multiplier(name, step, num_steps=num_steps, num_warmup_steps=warmup)
        assert ours == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()


def test_an_unknown_schedule_names_those_there_are():
    with pytest.raises(ValueError, match="constant_with_warmup, linear, cosine"):
        schedule.multiplier("polynomial", 0, num_steps=1, num_warmup_steps=0)


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_row18_the_rate_advances_once_an_optimizer_step(small_base, small_rows, world_size, accumulation):
    """The steps of an epoch and the rate of each, for every rank's own loader; two real ranks: test_ranks.py."""
    settings = {"gradient_accumulation_steps": accumulation}
    config = small_config(small_base, small_rows, small_base, train=settings)
    num_steps = -(-NUM_PACKS // (world_size * accumulation))
    for rank in range(world_size):
        loader = make_loader(config, world_size=world_size, rank=rank)
        assert loader.steps_per_epoch == num_steps
        for _ in range(num_steps):
            assert loader.state()["epoch"] == 0
            loader.next_window()
        assert loader.state() == {"seed": 0, "epoch": 1, "cursor": 0}


@pytest.mark.parametrize("accumulation", [1, 4])
def test_row18_rates_of_one_process(small_base, small_rows, tmp_path, accumulation):
    settings = {"gradient_accumulation_steps": accumulation, "num_train_epochs": 2, "lr_scheduler_type": "cosine"}
    train(small_config(small_base, small_rows, tmp_path / "run", train=settings | {"warmup_ratio": 0.25}))
    num_steps = 2 * -(-NUM_PACKS // accumulation)
    warmup = -(-num_steps // 4)
    for step, values in enumerate(read_steps(tmp_path / "run")):
        done = (step - warmup) / (num_steps - warmup)
        expected = 1e-2 * (step / warmup if step < warmup else (1 + math.cos(math.pi * done)) / 2)
        assert values["learning_rate"] == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_row19_weights_and_moments_are_float32_over_a_bfloat16_base(small_base, small_rows, tmp_path, quantization):
    config = small_config(small_base, small_rows, tmp_path, model={"dtype": "bfloat16", "quantization": quantization})
    model = load_model(config.model, config.lora, torch.device("cpu"))
    assert model.base_model.model.model.norm.weight.dtype == torch.bfloat16
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    flat = FlatParameters(model)
    optimizer = AdamW(flat, name="adamw_32bit", betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    assert {tensor.dtype for tensor in optimizer.state_tensors().values()} == {torch.float32}
    # 1000 updates of 1e-4 of the weight: each alone is below half a unit in the last place of bfloat16.
    flat.weight.data.fill_(1.0)
    flat.gradient.fill_(1.0)
    for _ in range(1000):
        optimizer.step(1e-4)
    flat.check_linked()
    for name, parameter in trained.items():
        assert parameter.data.mean().item() == pytest.approx(0.9, abs=1e-3), name


def test_row19_trained_weights_in_bfloat16_are_refused():
    model = torch.nn.Linear(4, 4).bfloat16()
    with pytest.raises(ValueError, match=r"kept in float32; weight is torch\.bfloat16"):
        FlatParameters(model)


def test_row16_training_keeps_no_cache_and_exports_it_on(small_base, small_rows, tmp_path):
    """A base trained whole is exported with its configuration; in training the cache is off."""
    config = small_config(small_base, small_rows, tmp_path / "run", lora={"enabled": False}, train={"max_steps": 1})
    model = load_model(config.model, config.lora, torch.device("cpu"))
    assert model.config.use_cache is False
    train(config)
    for directory in (tmp_path / "run", tmp_path / "run/checkpoints/step-000001"):
        assert json.loads((directory / "config.json").read_text())["use_cache"] is True


def test_tensorboard_gets_every_step(small_base, small_rows, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    sections = {"train": {"max_steps": 3}, "data": {"eval_split": 2}, "log": {"trackers": ["tensorboard"]}}
    train(small_config(small_base, small_rows, tmp_path / "run", **sections))
    (events,) = (tmp_path / "run/packloop").glob("events.out.tfevents*")
    logged = accumulator.EventAccumulator(str(events))
    logged.Reload()
    losses = [(event.step, event.value) for event in logged.Scalars("loss")]
    expected = [(step["step"], pytest.approx(step["loss"], rel=1e-6)) for step in read_steps(tmp_path / "run")]
    assert losses == expected
    assert [event.step for event in logged.Scalars("eval_loss")] == [3]


def test_the_peak_is_of_the_steps_alone(small_base, small_rows, tmp_path, monkeypatch):
    """Planning for memory runs passes of its own, whose peak is not theirs; a CPU has no such figure."""
    called = []

    def trace(original, *arguments, **options):
        called.append(original.__name__)
        return original(*arguments, **options)

    for module, name in ((run, "resolve_auto"), (loop, "reset_peak"), (loop, "train_step")):
        monkeypatch.setattr(module, name, partial(trace, getattr(module, name)))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", called.append)
    train(small_config(small_base, small_rows, tmp_path / "run", train={"max_steps": 2}))
    assert called == ["resolve_auto", "reset_peak", "train_step", "train_step"]
    assert [values["peak_gib"] for values in read_metrics(tmp_path / "run", timing=True)] == [None] * 2
    metrics.reset_peak(torch.device("cuda"))
    assert called[4:] == [torch.device("cuda")]


def test_what_only_fused_layers_keep_is_refused_where_auto_finds_that_they_cannot_run(small_base, small_rows, tmp_path):
    config = small_config(
        small_base,
        small_rows,
        tmp_path / "run",
        lora={"enabled": False},
        kernels={"keep_inputs": 2},
        train={"max_steps": 1},
    )
    with pytest.raises(ConfigError, match=r"^kernels\.keep_inputs=2: only fused .*; use kernels\.keep_inputs=auto$"):
        train(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("packing", "max_length", "used"), [("wrapped", 200, 200), ("bfd", 96, None)])
def test_positions_beyond_the_models_are_said(small_base, small_rows, tmp_path, caplog, packing, max_length, used):
    """The tiny model has 160; packs of `wrapped` go on counting, documents of `bfd` do not reach them."""
    data = {"packing": packing, "max_length": max_length}
    with caplog.at_level(logging.WARNING):
        train(small_config(small_base, small_rows, tmp_path / "run", data=data, train={"max_steps": 1}))
    assert (f"positions up to {used} are trained on, and the model's config.json has 160" in caplog.text) == bool(used)


def test_more_layers_than_there_are_is_all_and_said(small_base, small_rows, tmp_path, caplog):
    settings = {"max_steps": 1, "gradient_checkpointing": 9}
    with caplog.at_level(logging.WARNING):
        train(small_config(small_base, small_rows, tmp_path / "run", train=settings))
    assert "train.gradient_checkpointing=9: the model has 2 layers, so it is all of them" in caplog.text
