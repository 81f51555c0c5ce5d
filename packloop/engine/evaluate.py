"""Loss on held-out documents."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from accelerate import Accelerator

from packloop.data.loader import Batch
from packloop.engine.batch import to_device
from packloop.kernels.patch import packed_loss_sum


@torch.no_grad()
def evaluate(model: torch.nn.Module, llama, batches: Iterable[Batch], accelerator: Accelerator) -> tuple[float, int]:
    """(mean loss in nats per label token, label tokens) over all ranks; dropout off, the model's mode restored after.

    `llama` is the patched Llama inside `model`. Every rank must be given its own share of the batches.
    """
    was_training = model.training
    model.eval()
    totals = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    for batch in batches:
        totals[0] += packed_loss_sum(llama, *to_device(batch, accelerator.device))
        totals[1] += batch.num_label_tokens
    loss_sum, num_labels = accelerator.reduce(totals, "sum").tolist()
    model.train(was_training)
    return loss_sum / max(1.0, num_labels), int(num_labels)
