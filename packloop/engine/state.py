"""What the loop knows beside tensors: how far it is. Saved as `state.json` in every checkpoint."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from packloop.errors import InputError

if TYPE_CHECKING:
    from packloop.data.tokenize import Documents


@dataclass
class TrainState:
    """Progress in optimizer steps and tokens. `epoch` and `cursor` are the loader's position.

    num_documents, data_digest: of the documents trained on; None in checkpoints from before they were kept.
    """

    step: int = 0
    epoch: int = 0
    cursor: int = 0
    slot_tokens: int = 0
    real_tokens: int = 0
    label_tokens: int = 0
    num_documents: int | None = None
    data_digest: str | None = None

    def advance(self, *, position: dict[str, int], slots: int, real: int, labels: int) -> None:
        """Counts one optimizer step over all ranks and takes over the loader's position after it."""
        self.step += 1
        self.epoch, self.cursor = position["epoch"], position["cursor"]
        self.slot_tokens += slots
        self.real_tokens += real
        self.label_tokens += labels

    def bind(self, documents: Documents) -> None:
        """Takes these documents for the run's own. InputError where it has had others: its order is that of those."""
        digest = documents.digest()
        if self.data_digest not in (None, digest):
            raise InputError(
                f"cannot resume on other data: {self.num_documents:,} documents in the checkpoint, {len(documents):,} "
                "now, and their tokens differ; put back the rows and the tokenizer that the run began with, "
                "or start a new run in another train.output_dir"
            )
        self.num_documents, self.data_digest = len(documents), digest

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> TrainState:
        return cls(**json.loads(text))
