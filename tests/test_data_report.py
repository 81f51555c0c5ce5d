"""`packloop data stats` and `packloop data preview`: what they say is what the loader does."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from packloop.config import CustomTemplate, DataConfig
from packloop.data.loader import PackLoader, build_data
from packloop.data.packing import epoch_packs
from packloop.data.report import count_labels, render_preview, render_stats
from packloop.errors import InputError

QUESTION = CustomTemplate(prompt="{q}:", response="{a}")
PACKINGS = ["wrapped", "bfd", "none"]


def shown(renderable, *, color=False):
    console = Console(
        file=io.StringIO(),
        width=110,
        force_terminal=color,
        color_system="standard" if color else None,
        legacy_windows=False,
    )
    console.print(renderable)
    return console.file.getvalue()


@pytest.fixture
def made(tmp_path, byte_tokenizer, write_rows):
    """made(rows, **settings) -> (data, config)."""

    def make(rows, **settings):
        source = write_rows(tmp_path / "rows.jsonl", rows)
        config = DataConfig(source=str(source), template=QUESTION, **{"packing": "bfd", "max_length": 16, **settings})
        return build_data(config, byte_tokenizer, seed=0), config

    return make


ROWS = [{"q": "q" * max(1, n % 5), "a": "a" * (1 + n % 3)} for n in range(40)]


def test_stats_literal(made):
    rows = [
        {"q": "qq", "a": "xyz"},
        {"q": "q", "a": "y"},
        {"q": "q" * 30, "a": "y"},
        {"q": 1, "a": "y"},
        {"q": "q" * 9, "a": "abcdefgh"},
    ]
    data, config = made(rows, loss_on="response", on_bad_row="skip")
    lines = [" ".join(line.split()) for line in shown(render_stats(data, config, seed=0)).splitlines()]
    assert "template custom, packing bfd, max_length 16, loss on the response" in " ".join(lines)
    begin = lines.index("4 rows")
    assert lines[begin : begin + 8] == [
        "4 rows",
        "1 row skipped field 'q' is a number (row 3)",
        "1 document dropped no label token in the part that max_length keeps (row 2)",
        "34 tokens dropped with those documents",
        "1 row truncated 3 tokens past max_length cut off",
        "3 documents 29 tokens",
        "11 label tokens 37.9% of the tokens",
        "2 packs 90.62% full",
    ]
    assert "Tokens a document" in lines
    assert lines[-1] == "mean 9.7, min 5, 10 % 5, 25 % 5, median 8, 75 % 8, 90 % 8, 99 % 8, max 16"


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("loss_on", ["all", "response"])
def test_label_tokens_announced_are_those_of_the_first_epoch(made, packing, loss_on):
    data, config = made(ROWS, packing=packing, loss_on=loss_on)
    loader = PackLoader(
        data.train, packing=packing, max_length=16, per_device_batch_size=3, gradient_accumulation_steps=2,
        rank=0, world_size=1, seed=0, shuffle=True, pad_token_id=2,
    )  # fmt: skip
    num_labels = sum(batch.num_label_tokens for _ in range(loader.steps_per_epoch) for batch in loader.next_window())
    packs, _ = epoch_packs(data.train.lengths, packing, 16, seed=0, epoch=0, shuffle=True)
    assert count_labels(data.train, packs, packing) == num_labels
    assert f"{num_labels} label tokens" in " ".join(shown(render_stats(data, config, seed=0)).split())
    assert f"{loader.num_packs} packs" in " ".join(shown(render_stats(data, config, seed=0)).split())


def test_histogram_counts_every_document(made):
    data, config = made(ROWS)
    text = shown(render_stats(data, config, seed=0))
    bars = re.findall(r"^ *[\d,]+ to +[\d,]+ +█* ([\d,]+)$", text, flags=re.MULTILINE)
    assert sum(map(int, bars)) == len(data.train)


def test_stats_of_split_and_dropped_rows(made):
    rows = [{"q": "q", "a": "a" * 40}, {"q": "q", "a": "a"}]
    data, config = made(rows, on_long_row="split")
    assert "1 row split 2 label tokens begin a later piece and are not predicted" in " ".join(
        shown(render_stats(data, config, seed=0)).split()
    )
    data, config = made(rows, on_long_row="drop")
    assert "1 document dropped longer than max_length (row 0)" in " ".join(
        shown(render_stats(data, config, seed=0)).split()
    )


def test_stats_of_held_out_rows(made):
    data, config = made(ROWS, eval_split=7)
    text = " ".join(shown(render_stats(data, config, seed=0)).split())
    assert "33 rows 33 documents" in text
    assert "Held out 7 rows 7 documents" in text


def test_preview_of_whole_documents(made, byte_tokenizer):
    data, config = made([{"q": "q", "a": "xyz"}, {"q": "r", "a": "y"}], loss_on="response", shuffle=False)
    assert shown(render_preview(data, config, byte_tokenizer, seed=0)).splitlines() == [
        "pack 0 of 1  16 slots, 12 tokens, 6 count; bfd: documents are kept apart",
        "⟦green⟧ counts in the loss, dim does not",
        "",
        "── document 0: row 0, 7 tokens, 4 count",
        "<s>q:⟦xyz</s>⟧",
        "── document 1: row 1, 5 tokens, 2 count",
        "<s>r:⟦y</s>⟧",
        "── padding: 4 slots, none counts",
    ]


def test_preview_of_a_wrapped_pack(made, byte_tokenizer):
    data, config = made([{"q": "q", "a": "xyz"}] * 3, packing="wrapped", max_length=8, shuffle=False)
    assert shown(render_preview(data, config, byte_tokenizer, seed=0, pack=1)).splitlines()[3:] == [
        "── document 0: row 1, tokens 1 to 6 of 7, 6 tokens, 5 count",
        "q⟦:xyz</s>⟧",
        "── document 1: row 2, tokens 0 to 1 of 7, 2 tokens, 2 count",
        "⟦<s>q⟧",
    ]


@pytest.mark.parametrize("packing", PACKINGS)
def test_preview_shows_the_loaders_own_packs(made, byte_tokenizer, packing):
    data, config = made(ROWS, packing=packing)
    loader = PackLoader(
        data.train, packing=packing, max_length=16, per_device_batch_size=1, gradient_accumulation_steps=1,
        rank=0, world_size=1, seed=0, shuffle=True, pad_token_id=2,
    )  # fmt: skip
    for pack in range(loader.num_packs):
        (batch,) = loader.next_window()
        text = shown(render_preview(data, config, byte_tokenizer, seed=0, pack=pack))
        assert f"{batch.num_slots} slots, {batch.num_real_tokens} tokens, {batch.num_label_tokens} count" in text
        assert list(dict.fromkeys(int(row) for row in re.findall(r"row (\d+)", text))) == batch.row_ids


def test_preview_in_colour(made, byte_tokenizer):
    data, config = made([{"q": "q", "a": "xyz"}], loss_on="response")
    text = shown(render_preview(data, config, byte_tokenizer, seed=0), color=True)
    assert "\x1b[32m⟦xyz</s>⟧\x1b[0m" in text
    assert "\x1b[2m<s>q:\x1b[0m" in text


def test_preview_past_the_last_pack(made, byte_tokenizer):
    data, config = made(ROWS)
    last = epoch_packs(data.train.lengths, "bfd", 16, seed=0, epoch=0, shuffle=True)[0].num_packs - 1
    with pytest.raises(InputError, match=rf"pack 900: the first epoch has {last + 1} packs; give .* from 0 to {last}"):
        render_preview(data, config, byte_tokenizer, seed=0, pack=900)


def test_text_of_rows_steers_neither_terminal_nor_markup(made, byte_tokenizer):
    data, config = made([{"q": "[red]x[/red]\x1b[31m", "a": "\x07\x9b\r"}], max_length=64)
    text = shown(render_preview(data, config, byte_tokenizer, seed=0))
    assert "[red]x[/red]␛[31m:␇�␍" in text
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", text)


def test_stats_and_preview_of_real_rows(shared_data, llama2_tokenizer):
    config = DataConfig(
        source=str(shared_data / "alpaca_800.json"), columns={"response": "output"}, packing="bfd", max_length=1024
    )
    data = build_data(config, llama2_tokenizer, seed=0)
    text = " ".join(shown(render_stats(data, config, seed=0)).split())
    assert "800 rows 800 documents 180,396 tokens" in text
    # 180,396 tokens need 177 packs of 1,024 at least; so few rows leave one more.
    assert "178 packs 98.97% full" in text
    shared = "35 tokens in common begin 800 documents; computed once a micro-batch on a GPU, 15.5% at most left out"
    assert shared in text
    config = config.model_copy(update={"packing": "wrapped"})
    assert "in common" not in shown(render_stats(build_data(config, llama2_tokenizer, seed=0), config, seed=0))
    assert "### Instruction:" in shown(render_preview(data, config, llama2_tokenizer, seed=0))
