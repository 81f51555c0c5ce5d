"""Text to token ids, and which of them count in the loss.

A document is BOS once, the prompt, the response, EOS once. Its prompt part is exactly what `encode_prompt` gives, and
that is what generation feeds the model.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from packloop.data.prompts import Template
from packloop.data.sources import Rows
from packloop.errors import InputError

TOO_LONG = "longer than max_length"
NO_LABEL = "no label token"
NO_LABEL_KEPT = "no label token in the part that max_length keeps"
NO_LABEL_IN_PIECE = "no label token in this piece of a long row"

# Rows tokenised at a time: enough to keep the tokenizer's threads busy, few enough that their lists stay small.
ROWS_AT_A_TIME = 4096


@dataclass(frozen=True)
class Documents:
    """Token sequences, end to end. Document d is tokens `offsets[d]:offsets[d + 1]`."""

    token_ids: np.ndarray  # int32 [num_tokens]
    counts: np.ndarray  # bool [num_tokens]: the token counts in the loss wherever it is a target
    offsets: np.ndarray  # int64 [num_documents + 1]
    row_ids: np.ndarray  # int64 [num_documents]: the source row it was made of

    @property
    def lengths(self) -> np.ndarray:
        """int64 [num_documents], tokens in each."""
        return np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.row_ids)

    def digest(self) -> str:
        """Hexadecimal, of what is trained on: equal for equal tokens, counts and lengths in the same order."""
        found = hashlib.blake2b(digest_size=16)
        for array in (self.offsets, self.token_ids, self.counts):  # the first says how long the others are
            found.update(np.ascontiguousarray(array))
        return found.hexdigest()


@dataclass
class TokenizeReport:
    """What became of the rows: `num_tokens_in == num_tokens + tokens_truncated + tokens_dropped`."""

    num_rows: int = 0
    num_documents: int = 0
    num_tokens_in: int = 0  # of all rows, as rendered
    num_tokens: int = 0  # of the documents
    num_truncated: int = 0  # rows cut at max_length and kept
    tokens_truncated: int = 0
    num_split: int = 0  # rows cut into several documents
    label_tokens_lost_to_split: int = 0  # first tokens of later pieces: they count, but nothing is left to predict them
    dropped_row_ids: dict[str, list[int]] = field(default_factory=dict)  # reason -> row of each document dropped
    tokens_dropped: int = 0

    @property
    def dropped(self) -> dict[str, int]:
        """Reason -> number of documents dropped for it."""
        return {reason: len(row_ids) for reason, row_ids in self.dropped_row_ids.items()}


def tokenize_rows(
    rows: Rows,
    template: Template,
    tokenizer: Any,
    *,
    loss_on: Literal["all", "response"],
    max_length: int | None,
    on_long_row: Literal["truncate", "split", "drop", "error"],
) -> tuple[Documents, TokenizeReport]:
    """One document a row, in order; several where a long row is split, none where it is dropped.

    `max_length` None means that no document is too long. `truncate` keeps the first `max_length` tokens and invents no
    EOS for what it cuts short; `split` cuts into the fewest pieces, as equal as can be, of which the last ends in EOS.
    A document in which no token but the first counts is dropped: nothing would be learnt from it.

    Raises `InputError` for a tokenizer that lacks EOS or is not a fast one, for a long row under `error`, and for text
    that the tokenizer turns into its own BOS or EOS.
    """
    require_usable(tokenizer)
    pieces: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    row_ids: list[int] = []
    report = TokenizeReport(num_rows=len(rows.rows))

    def drop(row_id: int, reason: str, num_tokens: int) -> None:
        report.dropped_row_ids.setdefault(reason, []).append(row_id)
        report.tokens_dropped += num_tokens

    for row_id, token_ids, num_prompt_tokens in _encode(rows, template, tokenizer):
        counts = np.ones(len(token_ids), dtype=bool)
        if loss_on == "response":
            counts[:num_prompt_tokens] = False
        report.num_tokens_in += len(token_ids)
        length, reason = len(token_ids), NO_LABEL
        cuts = [0, length]
        if max_length is not None and length > max_length:
            if on_long_row == "error":
                raise InputError(
                    f"row {row_id} has {length} tokens and data.max_length is {max_length}; raise it, "
                    "or set data.on_long_row to truncate, split or drop"
                )
            if on_long_row == "drop":
                drop(row_id, TOO_LONG, length)
                continue
            if on_long_row == "truncate":
                cuts, reason = [0, max_length], NO_LABEL_KEPT
            else:
                cuts, reason = _even_cuts(length, max_length), NO_LABEL_IN_PIECE
                report.num_split += 1
        for begin, end in itertools.pairwise(cuts):
            truncated = length - end if reason == NO_LABEL_KEPT else 0
            if not counts[begin + 1 : end].any():
                drop(row_id, reason, end - begin + truncated)
                continue
            if begin > 0:
                report.label_tokens_lost_to_split += int(counts[begin])
            if truncated:
                report.num_truncated += 1
                report.tokens_truncated += truncated
            pieces.append(token_ids[begin:end])
            masks.append(counts[begin:end])
            row_ids.append(row_id)

    offsets = np.concatenate([[0], np.cumsum([len(piece) for piece in pieces])]).astype(np.int64)
    documents = Documents(
        token_ids=np.concatenate([*pieces, np.empty(0, dtype=np.int32)]),
        counts=np.concatenate([*masks, np.empty(0, dtype=bool)]),
        offsets=offsets,
        row_ids=np.array(row_ids, dtype=np.int64),
    )
    report.num_documents = len(row_ids)
    report.num_tokens = int(offsets[-1])
    return documents, report


def require_usable(tokenizer: Any) -> None:
    """Raise `InputError` unless `tokenizer` is a fast one with an EOS token."""
    name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"tokenizer {name!r} is not a fast one; packloop needs a tokenizer.json: load the tokenizer with "
            "AutoTokenizer, call save_pretrained, and use that directory"
        )
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"tokenizer {name!r} has no EOS token, so a model could not learn to stop; add eos_token to its "
            "tokenizer_config.json"
        )


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """The prompt part of a document, which is also what generation starts from: BOS once, then the text's ids."""
    return [*_bos(tokenizer), *_text_ids(tokenizer, [prompt])[0]]


def decode_response(tokenizer: Any, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> str:
    """The text that `response_ids` add to `prompt_ids`, special tokens left out.

    Decoded together, since tokenizers with a leading-space mark drop a sequence's first space.
    """
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    whole = tokenizer.decode([*prompt_ids, *response_ids], **options)
    return whole[len(tokenizer.decode(list(prompt_ids), **options)) :]


def _encode(rows: Rows, template: Template, tokenizer: Any) -> Iterator[tuple[int, np.ndarray, int]]:
    """Yield (row id, int32 token ids of the whole document, number of its tokens that are prompt, BOS included)."""
    bos, eos = _bos(tokenizer), [tokenizer.eos_token_id]
    continuation = _Continuation(tokenizer)
    for begin in range(0, len(rows.rows), ROWS_AT_A_TIME):
        chunk = rows.rows[begin : begin + ROWS_AT_A_TIME]
        prompts = [template.render_prompt(row) for row in chunk]
        responses = [template.render_response(row) for row in chunk]
        prompt_ids = _text_ids(tokenizer, prompts)
        joint_ids = _text_ids(tokenizer, [prompt + response for prompt, response in zip(prompts, responses)])
        for index, row_id in enumerate(rows.row_ids[begin : begin + ROWS_AT_A_TIME]):
            prompt, text = prompt_ids[index], joint_ids[index]
            if text[: len(prompt)] != prompt:
                # The border falls inside a token of the joint text. Generation starts from the prompt's own tokens.
                text = prompt + continuation.ids(responses[index])
            if not {*bos, *eos}.isdisjoint(text):
                raise InputError(
                    f"row {row_id}: its text becomes the tokenizer's own BOS or EOS token; mark those tokens as "
                    "special in tokenizer.json (added_tokens), or change the text"
                )
            yield row_id, np.array([*bos, *text, *eos], dtype=np.int32), len(bos) + len(prompt)


def _text_ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Ids of each text alone: no BOS or EOS is added, and `<s>` in a text is four characters, not BOS."""
    encoded = tokenizer(
        texts, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False
    )
    return encoded["input_ids"]


def _bos(tokenizer: Any) -> list[int]:
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


class _Continuation:
    """Tokenises text as it stands in the middle of a sequence, without the space that some tokenizers put in front."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._backend = None

    def ids(self, text: str) -> list[int]:
        if self._backend is None:
            self._backend = _without_leading_space(self._tokenizer.backend_tokenizer)
        return self._backend.encode(text, add_special_tokens=False).ids


def _without_leading_space(backend: Any) -> Any:
    """A copy of a `tokenizers.Tokenizer` whose normalizer and pre-tokenizer put nothing in front of a text."""
    from tokenizers import Tokenizer

    description = json.loads(backend.to_str())
    description["normalizer"] = _strip_prefix(description["normalizer"])
    description["pre_tokenizer"] = _strip_prefix(description["pre_tokenizer"])
    copy = Tokenizer.from_str(json.dumps(description))
    copy.encode_special_tokens = True
    copy.no_truncation()
    copy.no_padding()
    return copy


def _strip_prefix(component: dict | None) -> dict | None:
    if component is None or component["type"] == "Prepend":
        return None
    component = dict(component)
    if component["type"] == "Metaspace":
        component["prepend_scheme"] = "never"
    elif component["type"] == "ByteLevel":
        component["add_prefix_space"] = False
    for parts in ("normalizers", "pretokenizers"):
        if parts in component:
            component[parts] = [kept for part in component[parts] if (kept := _strip_prefix(part)) is not None]
    return component


def _even_cuts(length: int, max_length: int) -> list[int]:
    """0, ..., length: borders of the fewest pieces of at most `max_length`, their lengths differing by at most one."""
    num_pieces = -(-length // max_length)
    return [length * piece // num_pieces for piece in range(num_pieces + 1)]
