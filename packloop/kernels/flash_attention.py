"""Flash attention backends: exact attention in tiles, documents kept apart by `cu_seqlens`.

`flash_attn` is the package of that name (Ampere and newer), `varlen` the copy of FlashAttention-2 in PyTorch,
`flash_attn_4` the package flash-attn-4 (Hopper and newer). Source: Dao, FlashAttention-2, arXiv:2307.08691.
"""

from __future__ import annotations

import importlib.util
from functools import cache

import torch
from torch import Tensor

from packloop.kernels.attention import DocumentLayout


class _Differentiable(torch.autograd.Function):
    """A backend's forward and backward as autograd sees them; what the backend saves is a tuple."""

    @staticmethod
    def forward(ctx, q_THD, k_TKD, v_TKD, backend, layout, scale):
        out_THD, saved = backend.forward(q_THD, k_TKD, v_TKD, layout, scale)
        # The output is among what is saved: held by ctx itself it would hold its own graph, and be freed by no one.
        is_tensor = [isinstance(value, Tensor) for value in saved]
        ctx.save_for_backward(q_THD, k_TKD, v_TKD, *(value for value in saved if isinstance(value, Tensor)))
        ctx.others = [None if tensor else value for value, tensor in zip(saved, is_tensor)]
        ctx.is_tensor, ctx.backend, ctx.layout, ctx.scale = is_tensor, backend, layout, scale
        return out_THD

    @staticmethod
    def backward(ctx, d_out):
        q, k, v, *tensors = ctx.saved_tensors
        tensors = iter(tensors)
        saved = tuple(next(tensors) if tensor else other for tensor, other in zip(ctx.is_tensor, ctx.others))
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        ctx.backend.backward(saved, d_out.contiguous(), q, k, v, ctx.layout, ctx.scale, dq, dk, dv)
        return dq, dk, dv, None, None, None


class _FlashAttention:
    def __call__(self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, layout: DocumentLayout, scale: float) -> Tensor:
        return _Differentiable.apply(q_THD, k_TKD, v_TKD, self, layout, scale)


class FlashAttn2(_FlashAttention):
    """FlashAttention-2 from the flash-attn package."""

    def __init__(self):
        from flash_attn import flash_attn_interface

        self._package = flash_attn_interface

    def forward(self, q_THD, k_TKD, v_TKD, layout, scale):
        out_THD, log_sum_exp, _, rng_state = self._package._flash_attn_varlen_forward(
            q_THD,
            k_TKD,
            v_TKD,
            layout.cu_seqlens,
            layout.cu_seqlens,
            layout.max_seqlen,
            layout.max_seqlen,
            0.0,
            scale,
            causal=True,
        )
        return out_THD, (out_THD, log_sum_exp, rng_state)

    def backward(self, saved, d_out, q, k, v, layout, scale, dq, dk, dv):
        out_THD, log_sum_exp, rng_state = saved
        self._package._flash_attn_varlen_backward(
            d_out,
            q,
            k,
            v,
            out_THD,
            log_sum_exp,
            dq,
            dk,
            dv,
            layout.cu_seqlens,
            layout.cu_seqlens,
            layout.max_seqlen,
            layout.max_seqlen,
            0.0,
            scale,
            True,
            -1,
            -1,
            0.0,
            None,
            torch.are_deterministic_algorithms_enabled(),
            rng_state=rng_state,
        )


class TorchVarlen(_FlashAttention):
    """FlashAttention-2 as PyTorch carries it: no package to install."""

    def forward(self, q_THD, k_TKD, v_TKD, layout, scale):
        out_THD, log_sum_exp, rng_state, unused, _ = torch.ops.aten._flash_attention_forward(
            q_THD,
            k_TKD,
            v_TKD,
            layout.cu_seqlens,
            layout.cu_seqlens,
            layout.max_seqlen,
            layout.max_seqlen,
            0.0,
            True,
            False,
            scale=scale,
        )
        return out_THD, (out_THD, log_sum_exp, rng_state, unused)

    def backward(self, saved, d_out, q, k, v, layout, scale, dq, dk, dv):
        out_THD, log_sum_exp, rng_state, unused = saved
        gradients = torch.ops.aten._flash_attention_backward(
            d_out,
            q,
            k,
            v,
            out_THD,
            log_sum_exp,
            layout.cu_seqlens,
            layout.cu_seqlens,
            layout.max_seqlen,
            layout.max_seqlen,
            0.0,
            True,
            rng_state,
            unused,
            scale=scale,
        )
        for target, gradient in zip((dq, dk, dv), gradients, strict=True):
            target.copy_(gradient)


class FlashAttn4(_FlashAttention):
    """FlashAttention-4 from the flash-attn-4 package, whose kernels are compiled at first use."""

    def __init__(self):
        from flash_attn.cute import interface

        self._package = interface

    def forward(self, q_THD, k_TKD, v_TKD, layout, scale):
        out_THD, log_sum_exp, *_ = self._package._flash_attn_fwd(
            q_THD,
            k_TKD,
            v_TKD,
            cu_seqlens_q=layout.cu_seqlens,
            cu_seqlens_k=layout.cu_seqlens,
            max_seqlen_q=layout.max_seqlen,
            max_seqlen_k=layout.max_seqlen,
            softmax_scale=scale,
            causal=True,
            return_lse=True,
        )
        return out_THD, (out_THD, log_sum_exp)

    def backward(self, saved, d_out, q, k, v, layout, scale, dq, dk, dv):
        out_THD, log_sum_exp = saved
        self._package._flash_attn_bwd(
            q,
            k,
            v,
            out_THD,
            d_out,
            log_sum_exp,
            softmax_scale=scale,
            causal=True,
            cu_seqlens_q=layout.cu_seqlens,
            cu_seqlens_k=layout.cu_seqlens,
            max_seqlen_q=layout.max_seqlen,
            max_seqlen_k=layout.max_seqlen,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            dq=dq,
            dk=dk,
            dv=dv,
        )


BACKENDS = {"flash_attn": FlashAttn2, "varlen": TorchVarlen, "flash_attn_4": FlashAttn4}

_INSTALL = {
    "flash_attn": (("flash_attn.flash_attn_interface",), "pip install flash-attn --no-build-isolation"),
    # flash-attn 2 carries a copy of the sources that cannot run without CUTLASS's Python package.
    "flash_attn_4": (("flash_attn.cute", "cutlass"), "pip install flash-attn-4"),
    "document": (("triton",), "pip install triton"),
}
NEEDED_CAPABILITY = {"flash_attn": (8, 0), "varlen": (8, 0), "flash_attn_4": (9, 0), "document": (8, 0)}


def why_not(name: str, *, dtype: torch.dtype, device: torch.device) -> str | None:
    """None where the backend can run on the device for this dtype, otherwise the reason and the remedy."""
    if device.type != "cuda":
        return f"needs a CUDA GPU, the device is {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"needs model.dtype=bfloat16, given {str(dtype).removeprefix('torch.')}"
    needed, found = NEEDED_CAPABILITY[name], torch.cuda.get_device_capability(device)
    if found < needed:
        return f"needs compute capability {needed[0]}.{needed[1]}, this GPU has {found[0]}.{found[1]}"
    if name == "varlen" and torch.are_deterministic_algorithms_enabled():
        return "PyTorch's copy has no deterministic backward for packed documents"
    if name in _INSTALL:
        modules, command = _INSTALL[name]
        if not all(_is_installed(module) for module in modules):
            return f"its package is not installed: {command}"
        if name in BACKENDS:
            return _why_not_loaded(BACKENDS[name], command)
    return None


@cache
def _why_not_loaded(backend: type, command: str) -> str | None:
    """None where the backend's package can be imported, otherwise what that raises and the remedy.

    A package may be there and fail: flash-attn 2 carries sources of flash_attn_4 for other versions of CUTLASS than may
    be installed. What such an import raises is the package's affair, and may be anything.
    """
    try:
        backend()
    except Exception as error:
        raised = ": ".join(filter(None, (type(error).__name__, str(error))))
        return f"its package cannot be imported ({raised}): {command}"
    return None


def _is_installed(module: str) -> bool:
    """Whether the module is there. To look imports the package around it, which is there though it raise something."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError as error:
        return not f"{module}.".startswith(f"{error.name}.")  # of another's absence it is the package that complains
    except Exception:  # `_why_not_loaded` says what
        return True
