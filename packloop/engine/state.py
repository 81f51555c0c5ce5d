"""What the loop knows beside tensors: how far it is. Saved as `state.json` in every checkpoint."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass


@dataclass
class TrainState:
    """Progress in optimizer steps and tokens. `epoch` and `cursor` are the loader's position."""

    step: int = 0
    epoch: int = 0
    cursor: int = 0
    slot_tokens: int = 0
    real_tokens: int = 0
    label_tokens: int = 0

    def advance(self, *, position: dict[str, int], slots: int, real: int, labels: int) -> None:
        """Counts one optimizer step over all ranks and takes over the loader's position after it."""
        self.step += 1
        self.epoch, self.cursor = position["epoch"], position["cursor"]
        self.slot_tokens += slots
        self.real_tokens += real
        self.label_tokens += labels

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> TrainState:
        return cls(**json.loads(text))
