"""What the package carries: data that is the grammar's, held-out rows that are new, a small model, a strict score."""

from __future__ import annotations

import json
import random
import re
import sys
from importlib.resources import files
from pathlib import Path

import pytest

from packloop.bundled.score import KINDS, is_right, score
from packloop.config import load_config

ROOT = Path(__file__).parents[1]
DATA = files("packloop.bundled") / "data"
MODEL = Path(str(files("packloop.bundled") / "model"))
KIND_WORD = re.compile(rf"\b({'|'.join(KINDS)})s?\b", re.IGNORECASE)


@pytest.fixture(scope="module")
def grammar():
    """The data script as a module; its neighbours are found beside it, as when it is run."""
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import make_bundled_data

        yield make_bundled_data
    finally:
        sys.path.remove(str(ROOT / "scripts"))


@pytest.fixture(scope="module")
def examples(grammar):
    return dict(zip(("train", "heldout"), grammar.bundled_examples(), strict=True))


def rows_of(split: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (DATA / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


class TestData:
    def test_the_script_writes_the_same_bytes(self, grammar, tmp_path):
        grammar.main(tmp_path)
        for name in ("train.jsonl", "heldout.jsonl"):
            assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes()

    def test_counts_and_size(self):
        assert len(rows_of("train")) >= 2000
        assert len(rows_of("heldout")) >= 200
        assert sum(len((DATA / name).read_bytes()) for name in ("train.jsonl", "heldout.jsonl")) < 1.5e6

    def test_no_combination_of_slots_is_held_out_and_trained_on(self, examples):
        def every_slot(example):
            return example.scene.kind, tuple(example.slots.items())

        def pair(example):
            return example.combination

        for key in (every_slot, pair):
            trained = {key(example) for example in examples["train"]}
            held_out = [key(example) for example in examples["heldout"]]
            assert trained.isdisjoint(held_out)
            assert len(set(held_out)) == len(held_out)

    def test_the_slots_are_those_of_the_rows(self, examples):
        for split, made in examples.items():
            assert [example.row() for example in made] == rows_of(split)
            for example in made:
                assert example.slots["entity"] in example.text
                assert example.slots["subject"] in example.text + example.instruction

    @pytest.mark.parametrize("split", ["train", "heldout"])
    def test_a_row_can_be_scored_and_its_text_alone_earns_nothing(self, split):
        for row in rows_of(split):
            assert row.keys() == {"instruction", "response", "kind", "entity"}
            assert 20 <= len(row["response"].split()) <= 80
            assert is_right(row, row["instruction"])
            assert not KIND_WORD.search(row["response"])

    def test_an_entity_cannot_be_guessed(self):
        """The commonest entity of a kind is right for few of its held-out rows."""
        train, held_out = rows_of("train"), rows_of("heldout")
        right = 0
        for kind in KINDS:
            entities = [row["entity"] for row in train if row["kind"] == kind]
            guess = max(set(entities), key=entities.count)
            right += sum(row["kind"] == kind and row["entity"] == guess for row in held_out)
        assert right <= 0.03 * len(held_out)

    def test_every_kind_is_in_both_splits(self, grammar):
        assert set(KINDS) == set(grammar.KINDS)
        for split in ("train", "heldout"):
            assert {row["kind"] for row in rows_of(split)} == set(KINDS)


class TestBaseText:
    def test_no_held_out_combination_is_drawn(self, grammar, examples):
        from make_bundled_base_text import WideDraw

        # Forbidding what a draw has just made would be met again at once, were it not refused.
        seen = [WideDraw(random.Random(1), set()).example().combination]
        for _ in range(50):
            seen.append(WideDraw(random.Random(1), set(seen)).example().combination)
        assert len(set(seen)) == len(seen)

    def test_nothing_held_out_and_no_reversed_prompt(self, examples):
        from make_bundled_base_text import base_rows

        held_out = {example.combination for example in examples["heldout"]}
        texts = [row["text"] for row in base_rows(5000, seed=1, held_out=held_out)]
        assert len(set(texts)) == len(texts)
        whole = "\n".join(texts)
        assert "### Input" not in whole
        assert "create an instruction" not in whole
        for example in examples["heldout"]:
            assert example.text not in whole
            assert example.instruction not in whole


class TestModel:
    def test_size(self):
        assert sum(path.stat().st_size for path in MODEL.rglob("*") if path.is_file()) <= 8_000_000

    def test_card_is_the_scripts(self, grammar):
        from make_bundled_model import CARD

        assert (MODEL / "README.md").read_text(encoding="utf-8") == CARD

    def test_parameters(self):
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(MODEL)
        assert model.config.model_type == "llama"
        assert 1_000_000 <= sum(parameter.numel() for parameter in model.parameters()) <= 3_000_000
        # NF4 rounds 64 weights at a time: no block may reach into the next row.
        for name, parameter in model.model.layers.named_parameters():
            if parameter.ndim == 2:
                assert parameter.shape[1] % 64 == 0, name

    @pytest.mark.parametrize(
        "text", ["Hi Zoë,\n\n  two  spaces\tand a tab \n", "don't , stop .", "日本 \U0001f600", "<s> is text", ""]
    )
    def test_tokenizer_returns_any_text_exactly(self, text):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(MODEL)
        assert tokenizer.is_fast
        assert (tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token) == ("<pad>", "<s>", "</s>")
        token_ids = tokenizer(text, split_special_tokens=True)["input_ids"]
        assert token_ids[0] == tokenizer.bos_token_id
        assert tokenizer.bos_token_id not in token_ids[1:]
        assert tokenizer.decode(token_ids[1:]) == text

    def test_tokenizer_returns_every_row_exactly(self):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(MODEL)
        texts = [row["response"] for row in rows_of("heldout")]
        token_ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
        assert tokenizer.batch_decode(token_ids) == texts


ROW = {"kind": "note", "entity": "Alder Lake"}


class TestScore:
    @pytest.mark.parametrize(
        "instruction",
        [
            "Write a note about Alder Lake.",
            "Draft NOTES, for (Alder Lake)!",
            "A note that has Alder Lake's map",
        ],
    )
    def test_right(self, instruction):
        assert is_right(ROW, instruction)

    @pytest.mark.parametrize(
        "instruction",
        [
            "",
            "Write a notice about Alder Lake.",  # wrong kind, of which the right one is no whole word
            "Write a note or a post about Alder Lake.",  # two kinds
            "Write about Alder Lake.",  # no kind
            "Write a note about Elm Lake.",  # wrong entity
            "Write a note about Alder Lakeside.",  # more than the entity
            "Write a note about Walder Lake.",
            "Write a note about alder lake.",  # not letter for letter
            "Write a note about Lake Alder.",
        ],
    )
    def test_wrong(self, instruction):
        assert not is_right(ROW, instruction)

    def test_counts(self):
        rows = [ROW, {"kind": "email", "entity": "Priya"}, {"kind": "post", "entity": "A+ (x)"}]
        assert score(rows, ["a note, Alder Lake", "a note to Priya", "a post on A+ (x)"]) == (2, 3)
        assert score([], []) == (0, 0)

    def test_lengths_must_agree(self):
        with pytest.raises(ValueError, match="1 generated texts for 0 rows"):
            score([], ["a note"])


@pytest.mark.parametrize("recipe", ["demo", "bundled-base"])
def test_recipes_are_valid(recipe):
    load_config(ROOT / "recipes" / f"{recipe}.yaml")
