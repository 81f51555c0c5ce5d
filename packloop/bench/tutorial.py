"""What the tutorial published, and which cells train as it did.

Source: the notebook of "Extended guide: instruction-tune Llama 2", at the commit that prices.yaml names for g5.2xlarge.
"""

from __future__ import annotations

from dataclasses import dataclass

from packloop.bench.groups import attention_of, batch_of, setting
from packloop.bench.results import Cell

INSTANCE = "g5.2xlarge"
DOLLARS_PER_HOUR = 1.212
_SHAPE, _NUM_LAYERS = "llama2-7b", 32


@dataclass(frozen=True)
class PublishedRun:
    """dollars: as printed. batch: packs a micro-batch, twice a step. attentions: its attention, as trainers call it."""

    name: str
    attention: str
    attentions: tuple[str, ...]
    batch: int
    seconds: int
    dollars: float

    @property
    def dollars_at_its_price(self) -> float:
        return self.seconds / 3600 * DOLLARS_PER_HOUR


PUBLISHED = (
    PublishedRun("tutorial, without flash attention", "eager", ("eager",), 4, (3 * 60 + 8) * 60, 3.7),
    PublishedRun(
        "tutorial, with flash attention",
        "flash-attn 2",
        ("flash_attn", "flash_attention_2"),
        6,
        (2 * 60 + 8) * 60,
        2.6,
    ),
)


def trains_like(cell: Cell, run: PublishedRun) -> bool:
    """Whether it has the tutorial's settings, with this run's attention and batch."""
    return is_stock(cell) and attention_of(cell) in run.attentions and batch_of(cell) == run.batch


def is_stock(cell: Cell) -> bool:
    """Stock layers of Llama-2-7B's shape in NF4, adapters on q and v, `wrapped` packs, every layer recomputed."""
    if cell.shape != _SHAPE:
        return False
    if cell.who == "packloop":
        wanted = {
            "kernels.layer": ("stock",),
            "data.packing": ("wrapped",),
            "train.gradient_checkpointing": ("all", _NUM_LAYERS),
            "model.quantization": ("nf4",),
            "lora.target_modules": (["q_proj", "v_proj"],),
        }
        return all(setting(cell, key) in values for key, values in wanted.items())
    wanted = {"packing": "wrapped", "checkpointing": True, "targets": "qv"}
    return cell.who == "trl" and not setting(cell, "liger") and all(setting(cell, k) == v for k, v in wanted.items())
