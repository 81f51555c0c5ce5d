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
_QV, _ALL_LAYERS = ["q_proj", "v_proj"], ("all", _NUM_LAYERS)
# What it trains and how it does that: setting -> the values that are the tutorial's. Adapters of rank 64 with dropout
# on q and v, a base in NF4 and bf16, packs of 2,048 tokens; two micro-batches a step.
_OUR_JOB = {
    "model.quantization": ("nf4",),
    "model.dtype": ("bfloat16",),
    "lora.r": (64,),
    "lora.dropout": (0.1,),
    "lora.target_modules": (_QV,),
    "data.max_length": (2048,),
}
_OUR_WAY = {
    "kernels.layer": ("stock",),
    "data.packing": ("wrapped",),
    "train.gradient_accumulation_steps": (2,),
    "train.gradient_checkpointing": _ALL_LAYERS,
}
# The peers' checkpoint is always loaded in NF4 and bf16.
_PEERS_JOB = {"lora_r": (64,), "dropout": (0.1,), "targets": ("qv",), "length": (2048,)}
_TRL_WAY = {"packing": ("wrapped",), "accumulation": (2,), "checkpointing": (True,), "liger": (False,)}


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
    """Whether it does the tutorial's job as the tutorial does: stock layers all of which recompute, `wrapped` packs."""
    if other_job(cell) is not None:
        return False
    if cell.who == "packloop":
        return _differing(cell, _OUR_WAY) is None
    return cell.who == "TRL" and _differing(cell, _TRL_WAY) is None


def other_job(cell: Cell) -> str | None:
    """The first thing in which a cell trains something else than the tutorial, `lora.r=8`; None for the same job.

    Kernels, packing, recomputation and the size of a step are how it is done, not what. What a cell does not tell
    counts as something else.
    """
    if cell.shape != _SHAPE:
        return f"shape {cell.shape}"
    return _differing(cell, _OUR_JOB if cell.who == "packloop" else _PEERS_JOB)


def _differing(cell: Cell, wanted: dict[str, tuple]) -> str | None:
    for key, values in wanted.items():
        value = setting(cell, key)
        if value not in values:
            return f"{key} not told" if value is None else f"{key}={value}"
    return None
