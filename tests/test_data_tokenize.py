"""Rows to documents: literal ids and masks, the border between prompt and response, long rows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from packloop.config import CustomTemplate
from packloop.data.loader import PackLoader
from packloop.data.prompts import get_template
from packloop.data.sources import Rows, load_rows
from packloop.data.tokenize import (
    NO_LABEL_IN_PIECE,
    NO_LABEL_KEPT,
    TOO_LONG,
    decode_response,
    encode_prompt,
    tokenize_rows,
)
from packloop.errors import InputError

BOS, EOS, PAD = 0, 1, 2
QUESTION = CustomTemplate(prompt="{q}:", response="{a}")
ROW_OF_TEMPLATE = {
    "instruction_from_response": {"instruction": "Describe a cab.", "response": "A cab: a big car.\n\nab"},
    "alpaca": {"instruction": "Sum up.", "input": "abab", "output": "ab"},
    "dolly": {"instruction": "What is ab?", "context": "a:ab", "response": " two letters"},
    "custom": {"q": "Is it ab", "a": "ab, yes"},
}


def template_called(name):
    return get_template(QUESTION if name == "custom" else name)


def rows_of(*rows):
    return Rows(list(rows), list(range(len(rows))))


def tokenized(tokenizer, rows, template=QUESTION, *, loss_on="all", max_length=None, on_long_row="truncate"):
    return tokenize_rows(
        rows, get_template(template), tokenizer, loss_on=loss_on, max_length=max_length, on_long_row=on_long_row
    )


def ids(text):
    return [byte + 3 for byte in text.encode()]


def ids_of(documents, index):
    return documents.token_ids[documents.offsets[index] : documents.offsets[index + 1]].tolist()


def counts_of(documents, index):
    return documents.counts[documents.offsets[index] : documents.offsets[index + 1]].tolist()


def test_literal_ids_and_mask(byte_tokenizer):
    documents, report = tokenized(byte_tokenizer, rows_of({"q": "hab", "a": "cab"}), loss_on="response")
    assert ids_of(documents, 0) == [BOS, *ids("h"), 259, *ids(":"), *ids("c"), 259, EOS]
    assert counts_of(documents, 0) == [False] * 4 + [True] * 3
    assert documents.token_ids.dtype == np.int32
    assert documents.counts.dtype == bool
    assert documents.offsets.tolist() == [0, 7]
    assert documents.row_ids.tolist() == [0]
    assert (report.num_rows, report.num_documents, report.num_tokens_in, report.num_tokens) == (1, 1, 7, 7)


def test_loss_on_all_counts_every_token(byte_tokenizer):
    documents, _ = tokenized(byte_tokenizer, rows_of({"q": "h", "a": "c"}), loss_on="all")
    assert counts_of(documents, 0) == [True] * 5


def test_border_inside_a_merge_keeps_the_prompts_own_tokens(byte_tokenizer):
    documents, _ = tokenized(byte_tokenizer, rows_of({"q": "h", "a": "ax"}), loss_on="response")
    assert byte_tokenizer("h:ax", add_special_tokens=False)["input_ids"] == [*ids("h"), 260, *ids("x")]
    assert ids_of(documents, 0) == [BOS, *ids("h:"), *ids("ax"), EOS]


def test_joint_tokenisation_is_kept_where_the_border_is_clean(llama2_tokenizer):
    row = {"instruction": "Name a colour.", "response": "Blue."}
    template = get_template("instruction_from_response")
    documents, _ = tokenized(llama2_tokenizer, rows_of(row), "instruction_from_response")
    joint = llama2_tokenizer(template.render_prompt(row) + template.render_response(row))["input_ids"]
    assert joint[0] == llama2_tokenizer.bos_token_id
    assert ids_of(documents, 0) == [*joint, llama2_tokenizer.eos_token_id]


def test_sentencepiece_continuation_gets_no_space(llama2_tokenizer):
    # "a " + "b" jointly is ▁a ▁b; the prompt's own tokens end in a lone ▁, so "b" must follow without another one.
    documents, _ = tokenized(
        llama2_tokenizer, rows_of({"q": "a ", "a": "b"}), CustomTemplate(prompt="{q}", response="{a}")
    )
    prompt = encode_prompt(llama2_tokenizer, "a ")
    assert ids_of(documents, 0) == [*prompt, llama2_tokenizer.convert_tokens_to_ids("b"), llama2_tokenizer.eos_token_id]


@pytest.mark.parametrize("text", ["<s>", "</s>", "a</s>b", "<s><s>", "<pad>", "<unk></s>"])
def test_special_tokens_written_in_a_text_stay_text(any_tokenizer, text):
    row = {"q": f"x{text}", "a": f"y{text}z"}
    documents, _ = tokenized(any_tokenizer, rows_of(row))
    token_ids = ids_of(documents, 0)
    special = {any_tokenizer.bos_token_id, any_tokenizer.eos_token_id, any_tokenizer.pad_token_id} - {None}
    inside = token_ids[0 if any_tokenizer.bos_token_id is None else 1 : -1]
    assert special.isdisjoint(inside)
    assert any_tokenizer.unk_token_id is None or any_tokenizer.unk_token_id not in inside
    prompt = encode_prompt(any_tokenizer, f"x{text}:")
    assert token_ids[: len(prompt)] == prompt
    assert decode_response(any_tokenizer, prompt, token_ids[len(prompt) :]) == row["a"]


@pytest.mark.parametrize("template_name", ROW_OF_TEMPLATE)
def test_row07_bos_and_eos_exactly_once(any_tokenizer, template_name):
    template, row = template_called(template_name), ROW_OF_TEMPLATE[template_name]
    documents, _ = tokenize_rows(
        rows_of(row), template, any_tokenizer, loss_on="all", max_length=None, on_long_row="truncate"
    )
    token_ids = ids_of(documents, 0)
    assert token_ids.count(any_tokenizer.eos_token_id) == 1
    assert token_ids[-1] == any_tokenizer.eos_token_id
    assert counts_of(documents, 0)[-1]
    prompt = encode_prompt(any_tokenizer, template.render_prompt(row))
    assert any_tokenizer.eos_token_id not in prompt
    if any_tokenizer.bos_token_id is not None:
        assert token_ids.count(any_tokenizer.bos_token_id) == 1
        assert prompt.count(any_tokenizer.bos_token_id) == 1
        assert token_ids[0] == prompt[0] == any_tokenizer.bos_token_id
    assert token_ids[: len(prompt)] == prompt


@pytest.mark.parametrize("loss_on", ["all", "response"])
def test_row08_truncation_at_one_less_equal_and_one_more(byte_tokenizer, loss_on):
    """A document of exactly max_length keeps its EOS; one token more loses EOS only and no other is made up."""
    whole = [BOS, *ids("q:xyz"), EOS]
    for length_limit in (len(whole) - 1, len(whole), len(whole) + 1):
        documents, report = tokenized(
            byte_tokenizer, rows_of({"q": "q", "a": "xyz"}), loss_on=loss_on, max_length=length_limit
        )
        assert ids_of(documents, 0) == whole[:length_limit]
        assert counts_of(documents, 0)[3:] == [True] * (min(length_limit, len(whole)) - 3)
        assert report.num_truncated == (length_limit < len(whole))
        assert report.tokens_truncated == max(0, len(whole) - length_limit)
        assert not report.dropped
        loader = PackLoader(
            documents, packing="bfd", max_length=length_limit, per_device_batch_size=1, gradient_accumulation_steps=1,
            rank=0, world_size=1, seed=0, shuffle=False, pad_token_id=PAD,
        )  # fmt: skip
        labels = loader.next_window()[0].label_ids.tolist()
        assert (EOS in labels) == (length_limit >= len(whole))


@pytest.mark.parametrize("on_long_row", ["truncate", "split", "drop", "error"])
def test_row08_a_document_of_exactly_max_length_is_not_a_long_one(byte_tokenizer, on_long_row):
    documents, report = tokenized(
        byte_tokenizer, rows_of({"q": "q", "a": "xyz"}), max_length=7, on_long_row=on_long_row
    )
    assert ids_of(documents, 0) == [BOS, *ids("q:xyz"), EOS]
    assert (report.num_truncated, report.num_split, report.tokens_dropped) == (0, 0, 0)


def test_truncation_that_leaves_no_label_drops_the_row(byte_tokenizer):
    rows = rows_of({"q": "long question", "a": "x"}, {"q": "q", "a": "x"})
    documents, report = tokenized(byte_tokenizer, rows, loss_on="response", max_length=8)
    assert documents.row_ids.tolist() == [1]
    assert report.dropped == {NO_LABEL_KEPT: 1}
    assert report.dropped_row_ids == {NO_LABEL_KEPT: [0]}
    assert (report.num_truncated, report.tokens_truncated) == (0, 0)
    assert report.tokens_dropped == len("long question:x") + 2


def test_long_row_dropped(byte_tokenizer):
    documents, report = tokenized(
        byte_tokenizer, rows_of({"q": "q" * 20, "a": "x"}, {"q": "q", "a": "x"}), max_length=8, on_long_row="drop"
    )
    assert documents.row_ids.tolist() == [1]
    assert report.dropped == {TOO_LONG: 1}
    assert report.tokens_dropped == 24


def test_long_row_refused(byte_tokenizer):
    with pytest.raises(InputError, match=r"row 1 has 24 tokens and data\.max_length is 8; .*data\.on_long_row"):
        tokenized(
            byte_tokenizer, rows_of({"q": "q", "a": "x"}, {"q": "q" * 20, "a": "x"}), max_length=8, on_long_row="error"
        )


def test_long_row_split_keeps_every_token(byte_tokenizer):
    whole = [BOS, *ids("qqqq:xyzxyz"), EOS]
    documents, report = tokenized(
        byte_tokenizer, rows_of({"q": "qqqq", "a": "xyzxyz"}), max_length=5, on_long_row="split"
    )
    assert [ids_of(documents, index) for index in range(3)] == [whole[:4], whole[4:8], whole[8:]]
    assert documents.row_ids.tolist() == [0, 0, 0]
    assert report.num_split == 1
    assert report.label_tokens_lost_to_split == 2
    assert not report.dropped


def test_split_drops_and_counts_pieces_that_are_prompt_only(byte_tokenizer):
    documents, report = tokenized(
        byte_tokenizer, rows_of({"q": "qqqqqqqqqq", "a": "x"}), loss_on="response", max_length=5, on_long_row="split"
    )
    assert documents.row_ids.tolist() == [0]
    assert report.dropped == {NO_LABEL_IN_PIECE: 2}
    assert report.num_tokens + report.tokens_dropped == report.num_tokens_in == 14


def test_split_never_leaves_eos_alone(byte_tokenizer):
    for length in range(2, 40):
        documents, report = tokenized(
            byte_tokenizer, rows_of({"q": "q" * length, "a": "x"}), max_length=7, on_long_row="split"
        )
        assert documents.lengths.max() <= 7
        assert documents.lengths.min() >= 3
        assert report.num_tokens == report.num_tokens_in == length + 4


def test_wrapped_never_meets_a_long_row(byte_tokenizer):
    documents, report = tokenized(byte_tokenizer, rows_of({"q": "q" * 500, "a": "x"}), on_long_row="error")
    assert len(documents) == 1
    assert report.num_truncated == 0


row_texts = st.fixed_dictionaries({"q": st.text("ab: \n", max_size=30), "a": st.text("ab: \nxyé", max_size=30)})


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.lists(row_texts, min_size=1, max_size=8),
    st.sampled_from(["all", "response"]),
    st.sampled_from(["truncate", "split", "drop"]),
    st.integers(2, 40) | st.none(),
)
def test_tokens_in_are_tokens_out_and_reported_drops(byte_tokenizer, rows, loss_on, on_long_row, max_length):
    documents, report = tokenized(
        byte_tokenizer, rows_of(*rows), loss_on=loss_on, max_length=max_length, on_long_row=on_long_row
    )
    assert report.num_tokens == len(documents.token_ids) == documents.lengths.sum()
    assert report.num_tokens_in == report.num_tokens + report.tokens_truncated + report.tokens_dropped
    assert report.num_documents == len(documents)
    assert report.dropped == {reason: len(row_ids) for reason, row_ids in report.dropped_row_ids.items()}
    gone = {row_id for row_ids in report.dropped_row_ids.values() for row_id in row_ids}
    assert set(documents.row_ids.tolist()) | gone == set(range(len(rows)))
    assert max_length is None or not len(documents) or documents.lengths.max() <= max_length
    for index in range(len(documents)):
        assert any(counts_of(documents, index)[1:])


# Signs that merge with their neighbours in one tokenizer or another, and text of several bytes a character.
BORDER_SIGNS = [
    "a",
    "b",
    "ab",
    ":",
    "#",
    " ",
    "  ",
    "\n",
    "\n\n",
    "\t",
    ".",
    "é",
    "漢",
    "🙂",
    "<s>",
    "</s>",
    "0",
    "the",
]


def test_row11_no_token_spans_prompt_and_response(any_tokenizer):
    """The prompt part is what generation feeds; what counts decodes to the response, whatever meets at the border."""
    rng = np.random.default_rng(11)

    def text(least):
        return "".join(rng.choice(BORDER_SIGNS, size=rng.integers(least, 6)))

    # An empty prompt is left out: at the very start SentencePiece-like tokenizers do not tell " a" from "a".
    rows = rows_of(*({"q": text(1), "a": text(0)} for _ in range(1500)))
    template = CustomTemplate(prompt="{q}", response="{a}")
    documents, _ = tokenized(any_tokenizer, rows, template, loss_on="response")
    assert documents.row_ids.tolist() == rows.row_ids
    for index, row in enumerate(rows.rows):
        prompt_ids = encode_prompt(any_tokenizer, row["q"])
        token_ids, counts = ids_of(documents, index), counts_of(documents, index)
        assert token_ids[: len(prompt_ids)] == prompt_ids
        assert counts == [False] * len(prompt_ids) + [True] * (len(token_ids) - len(prompt_ids))
        unmasked = [token for token, count in zip(token_ids, counts) if count]
        assert unmasked[-1] == any_tokenizer.eos_token_id
        assert decode_response(any_tokenizer, prompt_ids, unmasked) == row["a"]


@pytest.mark.parametrize("template_name", ROW_OF_TEMPLATE)
def test_row11_templates_unmask_the_response_alone(any_tokenizer, template_name):
    template, row = template_called(template_name), ROW_OF_TEMPLATE[template_name]
    documents, _ = tokenize_rows(
        rows_of(row), template, any_tokenizer, loss_on="response", max_length=None, on_long_row="truncate"
    )
    prompt_ids = encode_prompt(any_tokenizer, template.render_prompt(row))
    unmasked = documents.token_ids[documents.counts].tolist()
    assert decode_response(any_tokenizer, prompt_ids, unmasked) == template.render_response(row)


def test_order_and_ids_do_not_depend_on_how_many_rows_are_tokenised_at_a_time(byte_tokenizer, monkeypatch):
    rows = rows_of(*({"q": "q" * (n % 7), "a": f"ab{n}"} for n in range(50)))
    documents, _ = tokenized(byte_tokenizer, rows)
    monkeypatch.setattr("packloop.data.tokenize.ROWS_AT_A_TIME", 7)
    again, _ = tokenized(byte_tokenizer, rows)
    assert np.array_equal(documents.token_ids, again.token_ids)
    assert np.array_equal(documents.offsets, again.offsets)
    assert again.row_ids.tolist() == list(range(50))


def test_tokenizer_without_eos_is_refused(byte_tokenizer):
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer.backend_tokenizer, bos_token="<s>")
    with pytest.raises(InputError, match=r"has no EOS token.*add eos_token to its tokenizer_config\.json"):
        tokenized(tokenizer, rows_of({"q": "q", "a": "a"}))


def test_eos_that_ordinary_text_turns_into_is_refused(byte_tokenizer):
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer.backend_tokenizer, eos_token="x")
    with pytest.raises(InputError, match="row 1: its text becomes the tokenizer's own BOS or EOS token"):
        tokenized(tokenizer, rows_of({"q": "q", "a": "a"}, {"q": "q", "a": "x"}))


@pytest.mark.parametrize(("file", "columns"), [("alpaca_800.json", {"response": "output"}), ("dolly_100.jsonl", {})])
def test_real_rows_are_the_tutorials_token_ids(shared_data, llama2_tokenizer, file, columns):
    """Under loss on all tokens a document is the text tokenised in one go, as the tutorial does it, and EOS."""
    template = get_template("instruction_from_response")
    rows = load_rows(str(shared_data / file), columns=columns, required=template.fields, on_bad_row="error")
    documents, report = tokenized(llama2_tokenizer, rows, "instruction_from_response")
    texts = [template.render_prompt(row) + template.render_response(row) for row in rows.rows]
    expected = llama2_tokenizer(texts, split_special_tokens=True)["input_ids"]
    for index, token_ids in enumerate(expected):
        assert ids_of(documents, index) == [*token_ids, llama2_tokenizer.eos_token_id]
    assert report.num_tokens == sum(map(len, expected)) + len(expected)
