"""The configurations that the planner is calibrated on, and those, all others, that it is checked on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from packloop.config import RunConfig, parse_config

_TARGETS = {"qv": ["q_proj", "v_proj"], "all": "all-linear"}
# A dry run's packs are this many times shorter.
_DRY_DIVISOR = 32


@dataclass(frozen=True)
class Case:
    """One configuration. budget_gib: a cap, under which the three policies are `auto`."""

    shape: str
    targets: str
    dropout: float
    batch: int
    recompute: int | str = "none"
    cache: int | str = "none"
    keep_inputs: int | str = "none"
    length: int = 2048
    packing: str = "bfd"
    attention: str = "document"
    accumulation: int = 2
    layer: str = "fused"
    budget_gib: float | None = None

    @property
    def name(self) -> str:
        policy = f"recompute {self.recompute}, cache {self.cache}, inputs {self.keep_inputs}"
        if self.budget_gib:
            policy = f"auto in {self.budget_gib:g} GiB"
        kernels = f"{self.attention}{', stock' if self.layer == 'stock' else ''}"
        work = f"{self.batch}x{self.length} {self.packing}"
        return f"{self.shape} {self.targets} dropout {self.dropout:g}, {work}, {policy}, {kernels}"

    def dry(self) -> Case:
        """The same motions on a CPU: a tiny model, short packs and the attention that runs there."""
        return replace(
            self, shape="tiny", length=self.length // _DRY_DIVISOR, batch=min(self.batch, 2), attention="sdpa"
        )

    def config(self, data: dict[str, Any]) -> RunConfig:
        """data: further keys of the section `data`."""
        policies = [self.recompute, self.cache, self.keep_inputs] if self.budget_gib is None else ["auto"] * 3
        return parse_config(
            {
                "lora": {"dropout": self.dropout, "target_modules": _TARGETS[self.targets]},
                "data": {**data, "max_length": self.length, "packing": self.packing},
                "train": {
                    "per_device_train_batch_size": self.batch,
                    "gradient_accumulation_steps": self.accumulation,
                    "gradient_checkpointing": policies[0],
                    "memory_budget_gib": self.budget_gib,
                },
                "kernels": {
                    "attention": self.attention,
                    "layer": self.layer,
                    "dequant_cache": policies[1],
                    "keep_inputs": policies[2],
                },
            }
        )


_7B, _8B, _1B = "llama2-7b", "llama3-8b", "tinyllama-1.1b"

CALIBRATION = (
    Case(_7B, "qv", 0.1, 8, cache="all"),
    Case(_7B, "all", 0.0, 4),
    Case(_7B, "qv", 0.1, 2, recompute="all", packing="wrapped", attention="sdpa"),
    Case(_7B, "all", 0.1, 1),
    Case(_7B, "qv", 0.0, 4, keep_inputs="all", attention="flash_attn"),
    Case(_7B, "qv", 0.1, 4, recompute="all", packing="wrapped", attention="flash_attn", layer="stock"),
    Case(
        _1B, "all", 0.0, 4, recompute="all", length=1024, packing="wrapped", attention="flash_attn"
    ),  # its host is what it waits for
)

HELD_OUT = (
    Case(_7B, "qv", 0.1, 1),
    Case(_7B, "qv", 0.1, 4, cache="all"),
    Case(_7B, "qv", 0.1, 16, recompute="all", cache="all", accumulation=1),
    Case(_7B, "qv", 0.1, 6, recompute="all", packing="wrapped", attention="flash_attn"),
    Case(_7B, "qv", 0.0, 8, recompute=16, length=1024),
    Case(_7B, "qv", 0.1, 2, cache=16, keep_inputs="all", length=4096, packing="wrapped", attention="sdpa"),
    Case(_7B, "all", 0.0, 8, cache="all", keep_inputs="all"),
    Case(_7B, "all", 0.0, 2),
    Case(_7B, "all", 0.1, 4, recompute=16, cache=8, keep_inputs=8, packing="wrapped", attention="auto"),
    Case(_7B, "all", 0.0, 16, recompute="all", length=1024),
    Case(_7B, "all", 0.0, 2, cache="all", length=4096, attention="flash_attn"),
    Case(_7B, "qv", 0.1, 2, budget_gib=22.0, attention="auto"),
    Case(_7B, "all", 0.0, 2, budget_gib=22.0),
    Case(_7B, "qv", 0.1, 4, budget_gib=38.0),
    Case(_7B, "all", 0.1, 4, budget_gib=38.0, packing="wrapped", attention="flash_attn"),
    Case(_7B, "qv", 0.1, 8, budget_gib=76.0),
    Case(_7B, "all", 0.0, 8, budget_gib=76.0),
    Case(_8B, "qv", 0.1, 4, cache="all"),
    Case(_8B, "all", 0.0, 4, recompute="all", packing="wrapped", attention="flash_attn"),
    Case(_8B, "all", 0.0, 2, budget_gib=38.0),
    Case(_1B, "qv", 0.1, 8, cache="all"),
)
