"""A loss or gradient that is not finite: whose it is, and what can be done then."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from packloop.engine.batch import Micro
from packloop.engine.checkpoint import num_checkpoints
from packloop.engine.optim import FlatParameters
from packloop.errors import InputError
from packloop.kernels.patch import packed_loss_sum


class NonFiniteError(InputError):
    """A loss or gradient was NaN or infinite; the optimizer did not step."""


def non_finite(
    llama: nn.Module, flat: FlatParameters, losses: list[torch.Tensor], micros: list[Micro], accelerator: Accelerator
) -> NonFiniteError:
    """The error that names the rows of the micro-batches at fault, on whichever rank they are."""
    finite = torch.stack(losses).isfinite().tolist()
    if all(finite):  # then it is a gradient: each micro-batch's alone tells whose
        for index, micro in enumerate(micros):
            flat.zero_gradient()
            packed_loss_sum(llama, *micro.inputs).backward()
            micro.layout.drop_masks()
            finite[index] = math.isfinite(flat.gradient.norm().item())
    rows = {row for ok, micro in zip(finite, micros, strict=True) if not ok for row in micro.batch.row_ids}
    where = gather_object([(accelerator.process_index, sorted(rows))])
    named = "; ".join(f"rank {rank}: rows {ids}" for rank, ids in where if ids)
    return NonFiniteError(
        f"the loss or its gradient is not finite ({named or 'only in the sum over the micro-batches'}); "
        "the optimizer did not step; look at those rows"
    )


def after_divergence(run_dir: Path, resume: str | None) -> str:
    """What can be done in a run that was begun with this `resume`, by its checkpoints, and what needs a new one."""
    saved = num_checkpoints(run_dir)
    again = "start again" if resume is None else f"continue with --resume {resume} again"
    if saved:
        again = "continue with --resume latest"
    if saved > 1:
        again += ", or with --resume and the path of an older checkpoint if that one has diverged too"
    return (
        f"if the run has diverged, lower train.learning_rate or train.max_grad_norm and {again}; "
        "if the rows are at fault, mend them and start a new run in another train.output_dir"
    )
