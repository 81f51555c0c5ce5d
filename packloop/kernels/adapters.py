"""Adapters' fp32 masters as copies in the compute dtype, all of them refreshed in one launch a micro-batch.

Shapes: r rank of a member, R ranks of a group, H input features, O output features of a group, N copies.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from packloop.kernels import reference
from packloop.kernels.extended_weight import ExtendedWeight
from packloop.kernels.lora_linear import Lora, LoraGroup, LoraProducts
from packloop.kernels.reference import member_slices

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:  # a CPU-only torch comes without Triton; PyTorch's copies serve it
    triton = None

_BLOCK = 4096

if triton is not None:

    @triton.jit
    def _cast_many_kernel(table_ptr, like_ptr, BLOCK: tl.constexpr):
        """One row of the table a copy: source, target, rows, columns, the target's row stride."""
        row = table_ptr + tl.program_id(1) * 5
        num_rows, num_columns = tl.load(row + 2), tl.load(row + 3)
        elements = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = elements < num_rows * num_columns
        if tl.program_id(0).to(tl.int64) * BLOCK < num_rows * num_columns:
            source = tl.load(row).to(tl.pointer_type(tl.float32))
            target = tl.load(row + 1).to(tl.pointer_type(like_ptr.dtype.element_ty))
            value = tl.load(source + elements, mask=inside, other=0.0)
            places = (elements // num_columns) * tl.load(row + 4) + elements % num_columns
            tl.store(target + places, value.to(like_ptr.dtype.element_ty), mask=inside)


class AdapterCopies:
    """Buffers for the groups' A (stacked) and B (block diagonal) in the compute dtype, and the masters they follow.

    A group made here stays valid: `refresh` writes the masters' current values into its buffers.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device, by: LoraProducts = "auto"):
        self._dtype, self._device, self._by = dtype, device, by
        self._copies: list[tuple[Tensor, Tensor]] = []
        self._table: Tensor | None = None
        self._addresses: list[int] = []

    def group(
        self, out_features: Sequence[int], loras: Sequence[Lora | None], *, interleaved: bool = False
    ) -> LoraGroup:
        """A group over these adapters (None: a member without). ValueError where their scalings or inputs differ."""
        all_columns = member_slices(out_features, interleaved)
        present = [lora for lora in loras if lora is not None]
        if not present:
            none = (None,) * len(out_features)
            return LoraGroup(tuple(out_features), None, none, 1.0, interleaved=interleaved, by=self._by)
        if len({(lora.scaling, lora.a_rH.shape[1]) for lora in present}) > 1:
            raise ValueError("adapters on layers that share an input need one scaling (lora.alpha / lora.r) for all")
        num_ranks = sum(lora.a_rH.shape[0] for lora in present)
        a_RH = torch.empty(num_ranks, present[0].a_rH.shape[1], dtype=self._dtype, device=self._device)
        b_OR = torch.zeros(sum(out_features), num_ranks, dtype=self._dtype, device=self._device)
        b_Or: list[Tensor | None] = []
        rank = 0
        for columns, lora in zip(all_columns, loras, strict=True):
            block = None
            if lora is not None:
                ranks = slice(rank, rank + lora.a_rH.shape[0])
                block = b_OR[columns, ranks]
                self._copies += [(a_RH[ranks], lora.a_rH), (block, lora.b_Or)]
                rank = ranks.stop
            b_Or.append(block)
        return LoraGroup(tuple(out_features), a_RH, tuple(b_Or), present[0].scaling, b_OR, interleaved, self._by)

    def follow(self, weight: ExtendedWeight, group: LoraGroup, loras: Sequence[Lora | None]) -> None:
        """Refreshes the adapters that lie in a kept weight's buffer as well."""
        num_outputs = sum(group.out_features)
        for (columns, ranks, b_Or), lora in zip(group.members(), loras, strict=True):
            if b_Or is not None:
                spare = slice(weight.num_features + ranks.start, weight.num_features + ranks.stop)
                below = slice(num_outputs + ranks.start, num_outputs + ranks.stop)
                self._copies.append((weight.buffer[below, : weight.num_features], lora.a_rH))
                self._copies.append((weight.buffer[columns, spare], lora.b_Or))

    @torch.no_grad()
    def refresh(self) -> None:
        """Copies every master into its buffers, rounding to the compute dtype."""
        if not self._copies:
            return
        by = "torch" if self._by == "torch" else "auto"
        if reference.serves(self._copies[0][0], by) or triton is None or self._dtype == torch.float64:
            for target, master in self._copies:
                target.copy_(master)
            return
        # Whoever replaces a parameter's storage moves it: the table is made anew when an address has changed.
        addresses = [master.data_ptr() for _, master in self._copies]
        if addresses != self._addresses:
            self._addresses = addresses
            rows = [
                (master.data_ptr(), target.data_ptr(), *target.shape, target.stride(0))
                for target, master in self._copies
            ]
            self._table = torch.tensor(rows, dtype=torch.int64).to(self._device)
        largest = max(master.numel() for _, master in self._copies)
        grid = (triton.cdiv(largest, _BLOCK), len(self._copies))
        _cast_many_kernel[grid](self._table, self._copies[0][0], BLOCK=_BLOCK, num_warps=8)
