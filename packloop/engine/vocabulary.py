"""Tokens that a model has no embedding for. Looking one up is an IndexError, or an assertion that ends CUDA's context.

A tokenizer has such tokens where some were added to it and the model was not resized for them, padding above all.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from packloop.data.loader import TrainingData
from packloop.errors import InputError

logger = logging.getLogger(__name__)


def fit_padding(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> None:
    """Has it pad with EOS where it would pad with a token that the model lacks; results never depend on which it is.

    vocabulary: rows of the model's embedding.
    """
    if tokenizer.pad_token_id >= vocabulary:
        logger.warning(
            "the tokenizer pads with token %d (%r), and the model has %d: padding is by EOS",
            tokenizer.pad_token_id,
            tokenizer.pad_token,
            vocabulary,
        )
        tokenizer.pad_token = tokenizer.eos_token


def check_rows(data: TrainingData, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> None:
    """InputError for a document, held-out ones included, with a token that the model lacks; it names the row."""
    for what, documents in (("row", data.train), ("held-out row", data.eval)):
        if documents is None:
            continue
        found = np.flatnonzero(documents.token_ids >= vocabulary)
        if found.size:
            document = np.searchsorted(documents.offsets, found[0], side="right") - 1
            what = f"{what} {documents.row_ids[document]} (counting from 0)"
            raise InputError(_lacks(what, int(documents.token_ids[found[0]]), tokenizer, vocabulary))


def check_prompts(prompt_ids: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> None:
    """InputError for a prompt with a token that the model lacks; it names the prompt, counted from 1."""
    for number, ids in enumerate(prompt_ids, start=1):
        if ids and max(ids) >= vocabulary:
            raise InputError(_lacks(f"prompt {number} of {len(prompt_ids)}", max(ids), tokenizer, vocabulary))


def _lacks(what: str, token_id: int, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> str:
    return (
        f"{what} has token {token_id} ({tokenizer.convert_ids_to_tokens(token_id)!r}), and the model has {vocabulary} "
        f"tokens, 0 to {vocabulary - 1}; leave that text out, use the tokenizer that the model was trained with, or "
        "resize the model's embedding (resize_token_embeddings) and save it"
    )
