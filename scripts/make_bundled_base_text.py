"""Text that the bundled base model is trained on, drawn from the same grammar with many more names.

Most entities here are made of syllables, so that finding and copying a name is learnt rather than the names. The model
sees texts by themselves, texts written to an instruction, one question about a text at a time, and lists to repeat. It
never sees an instruction written for a text, which is what the demo teaches it, nor a held-out combination.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from make_bundled_data import SCENES, Combination, Draw, Example, make_example, pick, shuffled
from make_bundled_words import ENTITIES, words

ONSETS = words("b br c ch cl d dr f fl g gr h j k kl l m n p pr r s sh st t th tr v w y z")
VOWELS = words("a e i o u a e i o ai ea ia ei ou")
CODAS = ["", "", "", "l", "m", "n", "r", "s", "t", "x", "nd", "rk", "ll"]

# Share of entities with a made-up word in them.
MADE_UP = 0.3

ENTITY_WORDS = tuple(dict.fromkeys(word for pool in ENTITIES for word in words(" ".join(sum(ENTITIES[pool], ())))))

# What is asked about a text, by its slot: the answer is the slot's value.
QUESTIONS = {
    "kind": ("What kind of text is this?", "Name the kind of text.", "Which sort of writing is this?"),
    "entity": (
        "Who or what is this mainly for or about?",
        "Name the main person, place or thing.",
        "For or about whom?",
    ),
    "subject": ("What is the matter at hand?", "What is the subject?", "Which thing, job or event is it about?"),
    "other": ("Which other person is named?", "Who else appears?"),
    "rival": ("Which other place or thing is named for comparison?", "What else is mentioned?"),
    "day": ("Which day is named?", "On what day?"),
    "month": ("Which month is named?",),
    "time": ("At what time?", "Which time is named?"),
}


class WideDraw(Draw):
    """Draws examples none of which is held out, with entities whose first word is at times made up."""

    def __init__(self, rng: random.Random, held_out: set[Combination]):
        super().__init__(rng)
        self.held_out = held_out

    def example(self) -> Example:
        while True:
            example = make_example(self, SCENES[int(self.rng.random() * len(SCENES))])
            if example.combination not in self.held_out:
                return example

    def first_word(self, pool: str) -> str:
        if pool != "doctor" and self.rng.random() < MADE_UP:
            return self.made_up_word()
        return super().first_word(pool)

    def entity(self, pool: str) -> str:
        if pool == "doctor" and self.rng.random() < MADE_UP:
            return f"Dr {self.made_up_word()}"
        return super().entity(pool)

    def made_up_word(self) -> str:
        syllables = 2 + (self.rng.random() < 0.35)
        word = "".join(pick(self.rng, ONSETS) + pick(self.rng, VOWELS) for _ in range(syllables))
        return (word + pick(self.rng, CODAS)).capitalize()


def document(draw: WideDraw, example: Example) -> str:
    return example.text


def to_order(draw: WideDraw, example: Example) -> str:
    # Some at the start of a line, whose first word is another token than the same word after a space.
    heads = ("Task: {0}\n\n", "Please do this. {0}\n\n", "Order: {0}\nResult:\n", "Task:\n{0}\n\n", "{0}\n\n")
    head = pick(draw.rng, heads)
    return head.format(example.instruction) + example.text


def questions(draw: WideDraw, example: Example) -> str:
    """Up to four questions; none about the kind where the entity is asked for, so the two are never put together."""
    first = pick(draw.rng, ("kind", "entity"))
    slots = [slot for slot in QUESTIONS if slot in example.slots and slot != "entity"]
    asked = shuffled(draw.rng, [first, *shuffled(draw.rng, slots)[:3]])
    values = {"kind": example.scene.kind, **example.slots}
    return "\n\n".join(
        [example.text, *(f"{pick(draw.rng, QUESTIONS[slot])}\nAnswer: {values[slot]}" for slot in asked)]
    )


def repeat(draw: WideDraw, example: Example) -> str:
    things = [pick(draw.rng, (*ENTITY_WORDS, draw.made_up_word())) for _ in range(8 + int(draw.rng.random() * 20))]
    listed = " ".join(things)
    return f"Words: {listed}\nAgain: {listed}\nAgain: {listed}"


def echo(draw: WideDraw, example: Example) -> str:
    return f"Copy this. {example.text}\n\nCopy this. {example.text}"


def errands(draw: WideDraw, example: Example) -> str:
    """Instructions, one a line, of which none has its text."""
    bullet = pick(draw.rng, ("- ", ""))
    return "To do:\n" + "\n".join(f"{bullet}{draw.example().instruction}" for _ in range(3))


TASKS = {document: 0.1, to_order: 0.2, questions: 0.4, repeat: 0.15, echo: 0.1, errands: 0.05}


def base_rows(count: int, seed: int, held_out: set[Combination]) -> Iterator[dict[str, str]]:
    """`count` rows of one field, `text`. No combination of `held_out` is drawn."""
    draw = WideDraw(random.Random(seed), held_out)
    for _ in range(count):
        yield {"text": pick_task(draw.rng)(draw, draw.example())}


def pick_task(rng: random.Random) -> Callable[[WideDraw, Example], str]:
    point = rng.random()
    for task, share in TASKS.items():
        point -= share
        if point < 0:
            return task
    return document
