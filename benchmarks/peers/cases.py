"""The comparisons: whose settings, at which batch, against which bound."""

from __future__ import annotations

from dataclasses import dataclass

OURS = "benchmarks.peers.ours"
PEERS = {"trl": "benchmarks.peers.trl_sft", "unsloth": "benchmarks.peers.unsloth_sft"}
_QV = "--targets qv --dropout 0.1"
_ALL = "--targets all-linear --dropout 0"
_LIGER = "--liger --attention flash_attention_2"


@dataclass(frozen=True)
class Check:
    """The mean rate of the turns named `over` against that of the turns named `under`; bound: at least so much."""

    over: str
    under: str
    bound: float | None = None


@dataclass(frozen=True)
class Case:
    """One comparison: turns A are ours, turns B the peer's.

    peers: name -> options, the default first. bound: of A over B; or_of_floor: or this fraction of the floor. extras:
    further turns of ours in order, name -> options after those of A. checks: beside A over B.
    """

    ours: str
    peers: dict[str, str]
    bound: float
    or_of_floor: float | None = None
    extras: tuple[tuple[str, str], ...] = ()
    checks: tuple[Check, ...] = ()


# The floor's own buffers find no room beside the largest batch; it counts for no verdict on that one.
SMALLER = "ours at batch 6, floor"
# What the kernels give by themselves, beside what not computing a shared prompt again gives.
EVERY_PROMPT = "ours, every prompt computed"
SAME_BATCH, EAGER = "ours at the peer's batch", "ours, eager"
# Named apart from A, so that both come from the same stretch of time.
DROPOUT, NO_DROPOUT = "ours, dropout 0.1", "ours, dropout 0"
_CAP_EXTRAS = ((EVERY_PROMPT, "--batch 2 --prefix-reuse none"),)
_CAP_CHECKS = (Check(EVERY_PROMPT, "B"), Check("A", EVERY_PROMPT))
CASES = {
    "tutorial-eager": Case(
        ours=f"{_QV} --batch 6",
        peers={"trl": f"{_QV} --batch 4 --packing wrapped --attention eager --checkpointing"},
        bound=3.7,
        extras=(
            (SAME_BATCH, "--batch 4"),
            (EAGER, "--batch 4 --packing wrapped --attention eager --stock --recompute-layers all"),
        ),
        checks=(Check(SAME_BATCH, "B"), Check(EAGER, "B", 0.97)),
    ),
    "qv-liger": Case(
        ours=f"{_QV} --batch 12",
        peers={
            "trl": f"{_QV} --batch 16 {_LIGER} --no-checkpointing",
            "unsloth": f"{_QV} --batch 8 --no-checkpointing",
        },
        bound=1.2,
        or_of_floor=0.90,
        extras=(
            (DROPOUT, ""),
            (NO_DROPOUT, "--dropout 0"),
            (NO_DROPOUT, "--dropout 0"),
            (DROPOUT, ""),
            (EVERY_PROMPT, "--prefix-reuse none"),
        ),
        # A step that is 3 % slower.
        checks=(Check(DROPOUT, NO_DROPOUT, 1 / 1.03), Check(EVERY_PROMPT, "B"), Check("A", EVERY_PROMPT)),
    ),
    "all-linear-unsloth": Case(
        # For a GPU of 139 GiB, on which the peer's weights wait too.
        ours=f"{_ALL} --batch 18 --recompute-layers none --cached-layers all --keep-inputs-layers all",
        peers={
            "unsloth": f"{_ALL} --batch 16 --no-checkpointing",
            "trl": f"{_ALL} --batch 8 {_LIGER} --no-checkpointing",
        },
        bound=1.2,
        or_of_floor=0.90,
        extras=(
            (EVERY_PROMPT, "--batch 17 --prefix-reuse none --keep-inputs-layers 22"),
            (SMALLER, "--batch 6 --floor --cached-layers auto --keep-inputs-layers auto"),
        ),
        checks=(Check(EVERY_PROMPT, "B"), Check("A", EVERY_PROMPT)),
    ),
    "cap22-qv": Case(
        ours=f"{_QV} --batch 2 --memory-cap-gib 22",
        peers={
            "trl": f"{_QV} --batch 16 {_LIGER} --checkpointing --memory-cap-gib 22",
            "unsloth": f"{_QV} --batch 16 --checkpointing --memory-cap-gib 22",
        },
        bound=1.15,
        extras=_CAP_EXTRAS,
        checks=_CAP_CHECKS,
    ),
    "cap22-all-linear": Case(
        ours=f"{_ALL} --batch 4 --memory-cap-gib 22",
        peers={
            "unsloth": f"{_ALL} --batch 2 --no-checkpointing --memory-cap-gib 22",
            "trl": f"{_ALL} --batch 6 {_LIGER} --checkpointing --memory-cap-gib 22",
        },
        bound=1.15,
        extras=_CAP_EXTRAS,
        checks=_CAP_CHECKS,
    ),
}
