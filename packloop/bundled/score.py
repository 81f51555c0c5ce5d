"""Whether a generated instruction names what a bundled row's text is and whom or what it is for or about."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

KINDS = ("email", "note", "reminder", "invitation", "notice", "post", "review", "announcement")

_KIND_WORD = re.compile(rf"\b({'|'.join(KINDS)})s?\b", re.IGNORECASE)


def is_right(row: Mapping[str, str], instruction: str) -> bool:
    """True where `instruction` holds `row["kind"]`, no other kind, and `row["entity"]` letter for letter.

    Kinds are whole words, singular or plural, in any case. The entity's case and spacing must match, and no letter or
    digit may touch either of its ends.
    """
    kinds = {word.lower() for word in _KIND_WORD.findall(instruction)}
    entity = rf"(?<!\w){re.escape(row['entity'])}(?!\w)"
    return kinds == {row["kind"]} and re.search(entity, instruction) is not None


def score(rows: Sequence[Mapping[str, str]], generated: Sequence[str]) -> tuple[int, int]:
    """(number of right instructions, number of rows); `generated[i]` was written for `rows[i]`.

    rows: bundled rows, with their `kind` and `entity`. Raises ValueError where the two differ in length.
    """
    if len(rows) != len(generated):
        raise ValueError(f"{len(generated)} generated texts for {len(rows)} rows; one for each row is needed")
    return sum(is_right(row, text) for row, text in zip(rows, generated)), len(rows)
