"""Writes the bundled instruction data: `python scripts/make_bundled_data.py [DIRECTORY]`.

A row is a text drawn from the grammar (scenes in `make_bundled_letters.py` and `make_bundled_public_texts.py`, words in
`make_bundled_words.py`), the instruction that would have produced it, and the kind and entity that the score looks for.
The held-out rows are drawn first; a training row whose (kind, entity, subject) is one of theirs is thrown away, so whom
a held-out text is for, or what it is about, is never paired in training with what it says of them. The same seed gives
the same bytes on every supported Python.
"""

from __future__ import annotations

import json
import random
import string
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from make_bundled_letters import EMAILS, INVITATIONS, NOTES, REMINDERS, Scene
from make_bundled_public_texts import ANNOUNCEMENTS, NOTICES, POSTS, REVIEWS
from make_bundled_words import ENTITIES, SLOTS

SCENES: tuple[Scene, ...] = (
    *EMAILS, *NOTES, *NOTICES, *REMINDERS, *POSTS, *REVIEWS, *ANNOUNCEMENTS, *INVITATIONS
)  # fmt: skip
KINDS: tuple[str, ...] = tuple(dict.fromkeys(scene.kind for scene in SCENES))

SEED = 20
TRAIN_ROWS_PER_KIND = 280
HELD_OUT_ROWS_PER_KIND = 30
DATA_DIRECTORY = Path(__file__).resolve().parents[1] / "packloop" / "bundled" / "data"

Combination = tuple[str, str, str]


@dataclass(frozen=True)
class Example:
    """A text, its instruction, and the value of every slot that either of them uses."""

    scene: Scene
    slots: dict[str, str]
    instruction: str
    text: str

    @property
    def combination(self) -> Combination:
        return self.scene.kind, self.slots["entity"], self.slots["subject"]

    def row(self) -> dict[str, str]:
        return {
            "instruction": self.instruction,
            "response": self.text,
            "kind": self.scene.kind,
            "entity": self.slots["entity"],
        }


def pick(rng: random.Random, items: Sequence[str]) -> str:
    # `random()` is the one method whose sequence Python promises to keep between versions.
    return items[int(rng.random() * len(items))]


class Draw:
    """Draws values for slots. A subclass may widen what an entity can be called."""

    def __init__(self, rng: random.Random):
        self.rng = rng

    def first_word(self, pool: str) -> str:
        return pick(self.rng, ENTITIES[pool][0])

    def entity(self, pool: str) -> str:
        second_words = ENTITIES[pool][1]
        return " ".join([self.first_word(pool), *([pick(self.rng, second_words)] if second_words else [])])

    def distinct(self, pool: str, count: int) -> list[str]:
        found: list[str] = []
        while len(found) < count:
            entity = self.entity(pool)
            if entity not in found:
                found.append(entity)
        return found

    def slots(self, scene: Scene) -> dict[str, str]:
        entity, rival = self.distinct(scene.entity, 2)
        if scene.entity == "product":
            # A kettle is compared with another make of kettle.
            make, product = entity.split(" ", 1)
            while (other_make := self.first_word("product")) == make:
                pass
            rival = f"{other_make} {product}"
        people = [person for person in self.distinct("person", 3) if person != entity]
        slots = {"entity": entity, "rival": rival, "other": people[0], "friend": people[1]}
        slots["subject"] = pick(self.rng, SLOTS[scene.subject])
        # Every list, used or not: then one scene's wording never shifts what a later example draws.
        for slot, words in SLOTS.items():
            slots[slot] = pick(self.rng, words)
        return slots


def make_example(draw: Draw, scene: Scene) -> Example:
    values = draw.slots(scene)
    pieces = [pick(draw.rng, alternatives) for alternatives in scene.parts]
    text = ""
    for piece in pieces:
        apart = text and piece and not text.endswith("\n") and not piece.startswith("\n")
        text += f" {piece}" if apart else piece
    kind = f"{'an' if scene.kind[0] in 'aeiou' else 'a'} {scene.kind}"
    lead = pick(draw.rng, (f"Write {kind}", f"Write a short {scene.kind}", f"Draft {kind}"))
    ask = pick(draw.rng, scene.asks)
    used = sorted({name for _, name, _, _ in string.Formatter().parse(text + ask) if name})
    slots = {name: values[name] for name in used}
    return Example(scene, slots, f"{lead} {ask.format(**slots)}.", text.format(**slots))


def draw_examples(
    rng: random.Random, per_kind: int, taken: set[str], forbidden: set[Combination], *, once_each: bool
) -> list[Example]:
    """`per_kind` examples of each kind whose text is not in `taken` and whose combination is not in `forbidden`.

    Texts drawn are added to `taken`. `once_each` also forbids each combination from then on.
    """
    draw = Draw(rng)
    examples: list[Example] = []
    for kind in KINDS:
        scenes = [scene for scene in SCENES if scene.kind == kind]
        made = 0
        while made < per_kind:
            example = make_example(draw, scenes[made % len(scenes)])
            if example.text in taken or example.combination in forbidden:
                continue
            taken.add(example.text)
            if once_each:
                forbidden.add(example.combination)
            examples.append(example)
            made += 1
    return shuffled(rng, examples)


def shuffled(rng: random.Random, items: list) -> list:
    keys = [rng.random() for _ in items]
    return [items[index] for index in sorted(range(len(items)), key=keys.__getitem__)]


def bundled_examples() -> tuple[list[Example], list[Example]]:
    """The training and the held-out examples that the package ships."""
    rng = random.Random(SEED)
    taken: set[str] = set()
    held_out_combinations: set[Combination] = set()
    held_out = draw_examples(rng, HELD_OUT_ROWS_PER_KIND, taken, held_out_combinations, once_each=True)
    train = draw_examples(rng, TRAIN_ROWS_PER_KIND, taken, held_out_combinations, once_each=False)
    return train, held_out


def jsonl(examples: Sequence[Example]) -> str:
    return "".join(json.dumps(example.row(), ensure_ascii=False) + "\n" for example in examples)


def main(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, examples in zip(("train", "heldout"), bundled_examples(), strict=True):
        path = directory / f"{name}.jsonl"
        path.write_text(jsonl(examples), encoding="utf-8", newline="\n")
        print(f"{path}: {len(examples)} rows, {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else DATA_DIRECTORY)
