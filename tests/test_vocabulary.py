"""Tokens that the tokenizer has and the model lacks: as padding they do no harm, in a text they are refused by name."""

import json
import logging

import pytest
import torch
from small_job import read_steps, rows, small_config, write_rows
from tiny_run import save_base
from transformers import AutoTokenizer

from packloop.bench.cell import load_subject
from packloop.engine.generate import generate_texts, load_run
from packloop.engine.loop import train
from packloop.errors import InputError

VOCABULARY = 300
STRANGER, ADDED = "<stranger>", "<added>"
SAMPLING = {"max_new_tokens": 6, "do_sample": False, "temperature": 1.0, "top_p": 1.0, "seed": 0}


def add_strangers(base) -> None:
    """Gives the base's tokenizer two tokens that the model has no embedding for: for padding, and one in texts."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([f"<filler {n}>" for n in range(VOCABULARY - len(tokenizer))])
    tokenizer.add_special_tokens({"pad_token": STRANGER})
    tokenizer.add_tokens([ADDED])
    assert tokenizer.pad_token_id == VOCABULARY
    tokenizer.save_pretrained(base)


@pytest.fixture
def base(tmp_path):
    return save_base(tmp_path / "base", vocab_size=VOCABULARY)


def job(base, tmp_path, name, source=None, **data):
    data = {"packing": "wrapped", "max_length": 64} | data
    source = source or write_rows(tmp_path / "rows.jsonl")
    train_settings = {"per_device_train_batch_size": 2, "num_train_epochs": 1}
    return small_config(base, source, tmp_path / name, data=data, train=train_settings)


@pytest.mark.parametrize("packing", ["wrapped", "bfd", "none"])
def test_padding_with_a_token_that_the_model_lacks_changes_nothing(base, tmp_path, caplog, packing):
    train(job(base, tmp_path, "known", packing=packing, eval_split=0.2))
    add_strangers(base)
    with caplog.at_level(logging.WARNING):
        train(job(base, tmp_path, "stranger", packing=packing, eval_split=0.2))
    assert f"pads with token {VOCABULARY} ('{STRANGER}'), and the model has {VOCABULARY}: padding is by" in caplog.text
    steps = read_steps(tmp_path / "stranger")
    assert steps
    assert steps == read_steps(tmp_path / "known")
    saved = AutoTokenizer.from_pretrained(tmp_path / "stranger")
    assert saved.pad_token_id == saved.eos_token_id < VOCABULARY


@pytest.mark.parametrize("what", ["row", "held-out row"])
def test_a_row_with_such_a_token_is_named_before_anything_is_written(base, tmp_path, what):
    add_strangers(base)
    made = rows(10)
    made[7]["response"] += f" {ADDED} and more"
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in made))
    config = job(base, tmp_path, "run", source, eval_split=5 if what == "held-out row" else 0)
    with pytest.raises(InputError) as caught:
        train(config)
    message = str(caught.value)
    assert message.startswith(f"{what} 7 (counting from 0) has token 301 ('{ADDED}'), and the model has 300 tokens")
    assert "\n" not in message
    assert "resize_token_embeddings" in message
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match=rf"^{what} 7 \(counting from 0\) has token 301"):
        load_subject(config, None, None).data(config)


def test_prompts_of_different_lengths_are_padded_with_a_token_that_the_model_has(base, tmp_path):
    add_strangers(base)
    train(job(base, tmp_path, "run"))
    _, model, tokenizer = load_run(tmp_path / "run", torch.device("cpu"))
    tokenizer.pad_token = STRANGER  # as with a tokenizer that is not the run's
    prompts = ["a", "Write a note to the landlord about the tap"]
    batched = generate_texts(model, tokenizer, prompts, batch_size=2, **SAMPLING)
    assert batched == [generate_texts(model, tokenizer, [prompt], batch_size=1, **SAMPLING)[0] for prompt in prompts]
    with pytest.raises(InputError, match=rf"prompt 2 of 2 has token 301 \('{ADDED}'\)"):
        generate_texts(model, tokenizer, ["a", f"b {ADDED}"], batch_size=2, **SAMPLING)
