"""A text learnt by heart is written to its end and no further."""

from __future__ import annotations

import json

from small_job import small_config

from packloop.engine.generate import generate_texts, load_run
from packloop.engine.loop import train

TEXT = "The red bicycle leans on our lamp."


def test_row06_a_memorised_text_stops(small_base, tmp_path):
    """The tokenizer pads with EOS, and the batch of two documents of different length has padding in it."""
    made = [{"instruction": "Say it", "response": TEXT}, {"instruction": "Say it twice", "response": f"{TEXT} {TEXT}"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    config = small_config(
        small_base,
        tmp_path / "rows.jsonl",
        tmp_path / "run",
        data={"packing": "none", "loss_on": "response"},
        lora={"r": 8, "target_modules": "all-linear"},
        train={
            "max_steps": 35,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 1,
            "learning_rate": 2e-2,
        },
    )
    train(config)
    _, model, tokenizer = load_run(tmp_path / "run")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    texts = generate_texts(
        model,
        tokenizer,
        ["Say it\n", "Say it twice\n"],
        max_new_tokens=90,
        do_sample=False,
        temperature=1.0,
        top_p=1.0,
        batch_size=2,
        seed=0,
    )
    assert texts == [TEXT, f"{TEXT} {TEXT}"]
