"""RMSNorm, alone and fused with the residual addition before it: one pass over each operand, forward and backward.

Shapes: T tokens, H features. Statistics and gradients are formed in float32. Rounding is Hugging Face's Llama's: the
residual sum is rounded to the inputs' dtype and so is the normalised value before it meets the weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from packloop.kernels import reference
from packloop.kernels.reference import Implementation

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:  # a CPU-only torch comes without Triton; reference.py serves it
    triton = None

# A row is one block of registers.
MAX_FEATURES = 65536
# Programs a streaming multiprocessor, each with a partial weight gradient to be summed afterwards.
_WEIGHT_GRADIENT_PROGRAMS_PER_SM = 4

if triton is not None:

    @triton.jit
    def _rms_norm_forward_kernel(
        residual_ptr,
        update_ptr,
        weight_ptr,
        residual_out_ptr,
        normed_ptr,
        rstd_ptr,
        residual_stride,
        update_stride,
        residual_out_stride,
        normed_stride,
        num_features,
        eps,
        HAS_UPDATE: tl.constexpr,
        BLOCK_H: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        columns = tl.arange(0, BLOCK_H)
        inside = columns < num_features
        x = tl.load(residual_ptr + row * residual_stride + columns, mask=inside, other=0.0)
        if HAS_UPDATE:
            update = tl.load(update_ptr + row * update_stride + columns, mask=inside, other=0.0)
            x = (x.to(tl.float32) + update.to(tl.float32)).to(residual_out_ptr.dtype.element_ty)
            tl.store(residual_out_ptr + row * residual_out_stride + columns, x, mask=inside)
        wide = x.to(tl.float32)
        rstd = tl.rsqrt(tl.sum(wide * wide, axis=0) / num_features + eps)
        tl.store(rstd_ptr + row, rstd)
        weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        normed = (wide * rstd).to(residual_ptr.dtype.element_ty).to(tl.float32) * weight
        tl.store(normed_ptr + row * normed_stride + columns, normed, mask=inside)

    @triton.jit
    def _rms_norm_backward_kernel(
        d_normed_ptr,
        d_residual_out_ptr,
        x_ptr,
        weight_ptr,
        rstd_ptr,
        dx_ptr,
        d_weight_partial_ptr,
        d_normed_stride,
        d_residual_out_stride,
        x_stride,
        dx_stride,
        num_rows,
        num_features,
        rows_per_program,
        HAS_D_RESIDUAL_OUT: tl.constexpr,
        NEEDS_D_WEIGHT: tl.constexpr,
        BLOCK_H: tl.constexpr,
    ):
        program = tl.program_id(0).to(tl.int64)
        columns = tl.arange(0, BLOCK_H)
        inside = columns < num_features
        weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        if NEEDS_D_WEIGHT:
            d_weight = tl.zeros([BLOCK_H], dtype=tl.float32)
        first = program * rows_per_program
        last = tl.minimum(first + rows_per_program, num_rows)
        for row in range(first, last):
            x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0)
            d_normed = tl.load(d_normed_ptr + row * d_normed_stride + columns, mask=inside, other=0.0).to(tl.float32)
            rstd = tl.load(rstd_ptr + row)
            xhat = x.to(tl.float32) * rstd
            scaled = d_normed * weight
            projection = tl.sum(scaled * xhat, axis=0) / num_features
            dx = rstd * (scaled - xhat * projection)
            if HAS_D_RESIDUAL_OUT:
                through = tl.load(d_residual_out_ptr + row * d_residual_out_stride + columns, mask=inside, other=0.0)
                dx += through.to(tl.float32)
            tl.store(dx_ptr + row * dx_stride + columns, dx, mask=inside)
            if NEEDS_D_WEIGHT:
                d_weight += d_normed * xhat.to(x_ptr.dtype.element_ty).to(tl.float32)
        if NEEDS_D_WEIGHT:
            tl.store(d_weight_partial_ptr + program * num_features + columns, d_weight, mask=inside)


def _row_blocks(num_features: int) -> dict[str, int]:
    """Block and warps for a row: 16 elements a thread, so two 16-byte bf16 loads of each operand are in flight."""
    if num_features > MAX_FEATURES:
        raise ValueError(f"RMSNorm over {num_features} features: at most {MAX_FEATURES} fit one block")
    block = triton.next_power_of_2(num_features)
    return {"BLOCK_H": block, "num_warps": min(max(block // 512, 1), 16)}


def _require_rows(**tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and (tensor.dim() != 2 or tensor.stride(1) != 1):
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} and strides {tensor.stride()}; "
                "a [tokens, features] tensor with adjacent features is needed"
            )


def add_rms_norm_forward(
    residual_TH: Tensor,
    update_TH: Tensor | None,
    weight_H: Tensor,
    eps: float,
    *,
    residual_out: Tensor | None = None,
    normed_out: Tensor | None = None,
    by: Implementation = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """`(residual_out, normed, rstd)`, without autograd: what `add_rms_norm` and a fused layer are made of.

    Without `update` the residual itself is normalised and returned. The outputs may be given, and `residual_out` may be
    either input (it is then overwritten). rstd is float32 [T] (float64 for float64 inputs). Rows may be strided.
    """
    if reference.serves(residual_TH, by):
        return _forward_in_torch(residual_TH, update_TH, weight_H, eps, residual_out, normed_out)
    num_rows, num_features = residual_TH.shape
    if update_TH is None:
        residual_out = residual_TH
    elif residual_out is None:
        residual_out = torch.empty_like(residual_TH, memory_format=torch.contiguous_format)
    if normed_out is None:
        dtype = torch.promote_types(residual_TH.dtype, weight_H.dtype)
        normed_out = torch.empty(num_rows, num_features, dtype=dtype, device=residual_TH.device)
    _require_rows(residual=residual_TH, update=update_TH, residual_out=residual_out, normed_out=normed_out)
    rstd_T = torch.empty(num_rows, dtype=torch.float32, device=residual_TH.device)
    if num_rows > 0:
        update = residual_TH if update_TH is None else update_TH
        _rms_norm_forward_kernel[(num_rows,)](
            residual_TH,
            update,
            weight_H,
            residual_out,
            normed_out,
            rstd_T,
            residual_TH.stride(0),
            update.stride(0),
            residual_out.stride(0),
            normed_out.stride(0),
            num_features,
            eps,
            HAS_UPDATE=update_TH is not None,
            **_row_blocks(num_features),
        )
    return residual_out, normed_out, rstd_T


def _forward_in_torch(residual_TH, update_TH, weight_H, eps, residual_out, normed_out) -> tuple[Tensor, Tensor, Tensor]:
    total = residual_TH if update_TH is None else residual_TH + update_TH
    wide = total.to(torch.promote_types(total.dtype, torch.float32))
    rstd_T = torch.rsqrt(wide.square().mean(-1) + eps)
    normed = weight_H * (wide * rstd_T[:, None]).to(total.dtype)
    if residual_out is not None and update_TH is not None:
        total = residual_out.copy_(total)
    return total, normed if normed_out is None else normed_out.copy_(normed), rstd_T


def add_rms_norm_backward(
    d_normed_TH: Tensor,
    d_residual_out_TH: Tensor | None,
    residual_out_TH: Tensor,
    weight_H: Tensor,
    rstd_T: Tensor,
    *,
    needs_weight_grad: bool = False,
    d_residual: Tensor | None = None,
    by: Implementation = "auto",
) -> tuple[Tensor, Tensor | None]:
    """`(d_residual, d_weight)` without autograd; the gradient of the update is that of the residual.

    `d_residual_out` is the gradient that reaches the sum by the residual stream (None: none does). `d_residual` may be
    a buffer to fill, also `d_normed` or `d_residual_out` themselves. d_weight is float32 [H], None unless asked for.
    """
    if reference.serves(residual_out_TH, by):
        dx, d_weight = reference.rms_norm_backward(d_normed_TH, residual_out_TH, weight_H, rstd_T)
        dx = (dx if d_residual_out_TH is None else dx + d_residual_out_TH).to(residual_out_TH.dtype)
        dx = dx if d_residual is None else d_residual.copy_(dx)
        return dx, d_weight if needs_weight_grad else None
    num_rows, num_features = residual_out_TH.shape
    if d_residual is None:
        d_residual = torch.empty_like(residual_out_TH, memory_format=torch.contiguous_format)
    through = d_normed_TH if d_residual_out_TH is None else d_residual_out_TH
    _require_rows(d_normed=d_normed_TH, d_residual_out=through, residual_out=residual_out_TH, d_residual=d_residual)
    rows_per_program, partial = 1, rstd_T
    if needs_weight_grad:
        num_programs = min(max(num_rows, 1), _WEIGHT_GRADIENT_PROGRAMS_PER_SM * _num_multiprocessors(rstd_T.device))
        rows_per_program = max(triton.cdiv(num_rows, num_programs), 1)
        partial = torch.zeros(num_programs, num_features, dtype=torch.float32, device=rstd_T.device)
    if num_rows > 0:
        _rms_norm_backward_kernel[(triton.cdiv(num_rows, rows_per_program),)](
            d_normed_TH,
            through,
            residual_out_TH,
            weight_H,
            rstd_T,
            d_residual,
            partial,
            d_normed_TH.stride(0),
            through.stride(0),
            residual_out_TH.stride(0),
            d_residual.stride(0),
            num_rows,
            num_features,
            rows_per_program,
            HAS_D_RESIDUAL_OUT=d_residual_out_TH is not None,
            NEEDS_D_WEIGHT=needs_weight_grad,
            **_row_blocks(num_features),
        )
    return d_residual, partial.sum(0) if needs_weight_grad else None


def _num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


class _AddRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, residual_TH, update_TH, weight_H, eps, by):
        residual_out_TH, normed_TH, rstd_T = add_rms_norm_forward(residual_TH, update_TH, weight_H, eps, by=by)
        ctx.by = by
        ctx.save_for_backward(residual_out_TH, weight_H, rstd_T)
        ctx.set_materialize_grads(False)
        return residual_out_TH, normed_TH

    @staticmethod
    def backward(ctx, d_residual_out_TH, d_normed_TH):
        residual_out_TH, weight_H, rstd_T = ctx.saved_tensors
        if d_normed_TH is None:
            return d_residual_out_TH, d_residual_out_TH, None, None, None
        d_residual_TH, d_weight_H = add_rms_norm_backward(
            d_normed_TH.contiguous(),
            None if d_residual_out_TH is None else d_residual_out_TH.contiguous(),
            residual_out_TH,
            weight_H,
            rstd_T,
            needs_weight_grad=ctx.needs_input_grad[2],
            by=ctx.by,
        )
        return d_residual_TH, d_residual_TH, None if d_weight_H is None else d_weight_H.to(weight_H.dtype), None, None


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TH, weight_H, eps):
        _, normed_TH, rstd_T = add_rms_norm_forward(x_TH, None, weight_H, eps)
        ctx.save_for_backward(x_TH, weight_H, rstd_T)
        return normed_TH

    @staticmethod
    def backward(ctx, d_normed_TH):
        x_TH, weight_H, rstd_T = ctx.saved_tensors
        dx_TH, d_weight_H = add_rms_norm_backward(
            d_normed_TH.contiguous(), None, x_TH, weight_H, rstd_T, needs_weight_grad=ctx.needs_input_grad[1]
        )
        return dx_TH, None if d_weight_H is None else d_weight_H.to(weight_H.dtype), None


def rms_norm(x_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """`weight * (x / sqrt(mean(x^2) + eps))` over the last of two dimensions.

    Keeps x and one float32 a token for backward; the weight's gradient is formed only when it requires one.
    Source: Zhang and Sennrich, arXiv:1910.07467.
    """
    return _RmsNorm.apply(x_TH, weight_H, eps)


def add_rms_norm(
    residual_TH: Tensor, update_TH: Tensor, weight_H: Tensor, eps: float, *, by: Implementation = "auto"
) -> tuple[Tensor, Tensor]:
    """`(s, rms_norm(s, weight, eps))` of `s = residual + update`, in one kernel each way.

    Keeps s and one float32 a token for backward, which adds the residual stream's gradient in the same pass.
    """
    return _AddRmsNorm.apply(residual_TH, update_TH, weight_H, eps, by)
