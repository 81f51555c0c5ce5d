"""packloop's own documents for the peers, so that everybody trains on the same tokens, and the check that they do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from benchmarks.peers.settings import COLUMNS
from packloop.config import DataConfig
from packloop.data.loader import build_data


def load_tokenizer(directory: str) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def data_config(source: str, packing: str, length: int) -> DataConfig:
    """The tutorial's template, which asks for the instruction that a response answers."""
    return DataConfig(source=source, columns=COLUMNS, max_length=length, packing=packing, eval_split=0)


def documents(source: str, tokenizer: PreTrainedTokenizerBase, packing: str, length: int) -> list[list[int]]:
    """Token ids of every document, BOS and EOS included."""
    train = build_data(data_config(source, packing, length), tokenizer, seed=0).train
    return [part.tolist() for part in np.split(train.token_ids, train.offsets[1:-1])]


def enough_documents(once: list[list[int]], *, num_packs: int, length: int, seed: int) -> list[list[int]]:
    """The documents as often as `num_packs` packs need, each round in an order of its own.

    A trainer then meets no end of an epoch, where its windows would be short. One round more than needed: packs may
    be less than full, and packers leave one partial pack each thousand documents.
    """
    tokens = sum(map(len, once))
    rounds = -(-num_packs * length // tokens) + 1
    orders = (np.random.default_rng([seed, number]).permutation(len(once)) for number in range(rounds))
    return [once[index] for order in orders for index in order]


def check_same_tokens(packed: Iterable[dict], given: list[list[int]], packing: str) -> None:
    """ValueError unless the packs of a peer hold exactly the documents given to it.

    packed: its rows, `input_ids` and for bfd `seq_lengths`, the documents' lengths within the row.
    """
    if packing == "wrapped":
        stream = [token for row in packed for token in row["input_ids"]]
        same = stream == [token for document in given for token in document]
    else:
        found = Counter()
        for row in packed:
            parts = np.split(np.asarray(row["input_ids"]), np.cumsum(row["seq_lengths"])[:-1])
            found.update(tuple(part.tolist()) for part in parts)
        same = found == Counter(map(tuple, given))
    if not same:
        raise ValueError("the peer's packs do not hold the documents it was given; the figures would not compare")
