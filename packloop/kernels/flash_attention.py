"""Flash attention backends: exact attention in tiles, documents kept apart by `cu_seqlens`.

`flash_attn` is the package of that name (Ampere and newer), `varlen` the copy of FlashAttention-2 in PyTorch,
`flash_attn_4` the package flash-attn-4 (Hopper and newer). Source: Dao, FlashAttention-2, arXiv:2307.08691.

The packages' own functions are called, not those that autograd sees: what they save and where gradients go is ours to
say. They are private, so arguments go by name, and `why_not` compares the names with what is installed.
"""

from __future__ import annotations

import importlib.util
import inspect
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


class FlashAttention:
    """What the backends here share: autograd sees their `forward` and `backward` as one function."""

    def __call__(self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, layout: DocumentLayout, scale: float) -> Tensor:
        return _Differentiable.apply(q_THD, k_TKD, v_TKD, self, layout, scale)


# Features of a head whose rows go by flash-attn's functions for rows: those that the GPU tests cover. A build of the
# package for these alone runs heads of 80 and 96 all the same, and where few heads make the forward for rows split the
# keys among programs, its outputs were wrong; those for bounds of documents were right.
_ROW_HEAD_DIMS = (64, 128)


class FlashAttn2(FlashAttention):
    """FlashAttention-2 from the flash-attn package.

    Where each row is one document and full, by the functions behind `flash_attn_func`, which know every length
    beforehand; else by those behind `flash_attn_varlen_func`. So are rows that end in padding: it is a document of its
    own in `cu_seqlens`, whose scores with the tokens before it would be work for nothing; and heads of other sizes than
    `_ROW_HEAD_DIMS`.
    """

    def __init__(self):
        from flash_attn import flash_attn_interface

        self._package = flash_attn_interface

    def forward(self, q_THD, k_TKD, v_TKD, layout, scale):
        shared = {**self._options(scale), "return_softmax": False}
        if num_rows := _full_rows(layout, q_THD.shape[-1]):
            q, k, v = (x.unflatten(0, (num_rows, -1)) for x in (q_THD, k_TKD, v_TKD))
            out_BLHD, *others = self._package._flash_attn_forward(q=q, k=k, v=v, **shared)
            out_THD = out_BLHD.flatten(0, 1)
        else:
            out_THD, *others = self._package._flash_attn_varlen_forward(
                q=q_THD, k=k_TKD, v=v_TKD, **self._bounds(layout), **shared
            )
        log_sum_exp, _, rng_state = others
        return out_THD, (out_THD, log_sum_exp, rng_state)

    def backward(self, saved, d_out, q, k, v, layout, scale, dq, dk, dv):
        out_THD, log_sum_exp, rng_state = saved
        tensors = {"dout": d_out, "q": q, "k": k, "v": v, "out": out_THD, "dq": dq, "dk": dk, "dv": dv}
        shared = {
            **self._options(scale),
            "softmax_lse": log_sum_exp,
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "rng_state": rng_state,
        }
        if num_rows := _full_rows(layout, q.shape[-1]):
            rows = {name: tensor.unflatten(0, (num_rows, -1)) for name, tensor in tensors.items()}
            self._package._flash_attn_backward(**rows, **shared)
        else:
            self._package._flash_attn_varlen_backward(**tensors, **self._bounds(layout), **shared)

    @staticmethod
    def _options(scale: float) -> dict:
        off = {"dropout_p": 0.0, "window_size_left": -1, "window_size_right": -1, "softcap": 0.0, "alibi_slopes": None}
        return {"softmax_scale": scale, "causal": True, **off}

    @staticmethod
    def _bounds(layout: DocumentLayout) -> dict:
        return {
            "cu_seqlens_q": layout.cu_seqlens,
            "cu_seqlens_k": layout.cu_seqlens,
            "max_seqlen_q": layout.max_seqlen,
            "max_seqlen_k": layout.max_seqlen,
        }


def _full_rows(layout: DocumentLayout, head_dim: int) -> int:
    """Number of rows where each is one document that fills it, otherwise 0; told by what the host knows."""
    num_rows, num_slots = layout.document_ids_BL.shape
    is_full = layout.cu_seqlens.numel() - 1 == num_rows and layout.max_seqlen == num_slots
    return num_rows if is_full and not layout.is_packed and head_dim in _ROW_HEAD_DIMS else 0


class TorchVarlen(FlashAttention):
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


class FlashAttn4(FlashAttention):
    """FlashAttention-4 from the flash-attn-4 package, whose kernels are compiled at first use."""

    def __init__(self):
        from flash_attn.cute import interface

        self._package = interface

    def forward(self, q_THD, k_TKD, v_TKD, layout, scale):
        out_THD, log_sum_exp, *_ = self._package._flash_attn_fwd(
            q=q_THD,
            k=k_TKD,
            v=v_TKD,
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
            q=q,
            k=k,
            v=v,
            out=out_THD,
            dout=d_out,
            lse=log_sum_exp,
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

_BOUNDS = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
_SHARED = ("q", "k", "v", "softmax_scale", "causal")
_SHARED_2 = (*_SHARED, "dropout_p", "window_size_left", "window_size_right", "softcap", "alibi_slopes")
_FORWARD_2 = (*_SHARED_2, "return_softmax")
_BACKWARD_2 = (*_SHARED_2, "dout", "out", "softmax_lse", "dq", "dk", "dv", "deterministic", "rng_state")
# Of each package, the functions that are called, and every argument that they are given.
CALLS = {
    "flash_attn": {
        "_flash_attn_forward": _FORWARD_2,
        "_flash_attn_backward": _BACKWARD_2,
        "_flash_attn_varlen_forward": (*_FORWARD_2, *_BOUNDS),
        "_flash_attn_varlen_backward": (*_BACKWARD_2, *_BOUNDS),
    },
    "flash_attn_4": {
        "_flash_attn_fwd": (*_SHARED, *_BOUNDS, "return_lse"),
        "_flash_attn_bwd": (*_SHARED, *_BOUNDS, "out", "dout", "lse", "deterministic", "dq", "dk", "dv"),
    },
}

_INSTALL = {
    "flash_attn": (("flash_attn.flash_attn_interface",), "pip install flash-attn --no-build-isolation"),
    # flash-attn 2 carries a copy of the sources that cannot run without CUTLASS's Python package.
    "flash_attn_4": (("flash_attn.cute", "cutlass"), "pip install --pre flash-attn-4"),
    "document": (("triton",), "pip install triton"),
}
# Where what is installed is another version than the calls above are for.
_REINSTALL = {
    "flash_attn": "pip install 'flash-attn>=2.8,<2.9' --no-build-isolation",
    "flash_attn_4": "pip install flash-attn-4==4.0.0b36",
}
NEEDED_CAPABILITY = {"flash_attn": (8, 0), "varlen": (8, 0), "flash_attn_4": (9, 0), "document": (8, 0)}
# Features of a head. The functions called here take multiples of 8 as they are; it is flash-attn's and PyTorch's public
# ones that pad others.
DOCUMENT_HEAD_DIMS = (16, 32, 64, 128)
_HEAD_MULTIPLE = 8
_MOST_FEATURES = {"flash_attn": 256, "varlen": 256, "flash_attn_4": 128, "cudnn": 128}
_MOST_FEATURES_HOPPER = {"flash_attn_4": 256, "cudnn": 256}


def why_not(name: str, *, dtype: torch.dtype, device: torch.device, head_dim: int) -> str | None:
    """None where the backend can run on the device for this dtype and head dim, otherwise the reason and the remedy."""
    if device.type != "cuda":
        return f"needs a CUDA GPU, the device is {device.type}"
    if reason := why_not_numerics(name, dtype, deterministic=torch.are_deterministic_algorithms_enabled()):
        return reason
    needed, found = NEEDED_CAPABILITY[name], torch.cuda.get_device_capability(device)
    if found < needed:
        return f"needs compute capability {needed[0]}.{needed[1]}, this GPU has {found[0]}.{found[1]}"
    if reason := why_not_heads(name, head_dim, found):
        return reason
    return why_not_loaded(name)


def why_not_numerics(name: str, dtype: torch.dtype, *, deterministic: bool) -> str | None:
    """None where the backend takes this dtype and is as deterministic as asked for, otherwise the reason."""
    if name in ("sdpa", "eager"):
        return None
    if dtype not in (torch.bfloat16, torch.float16):
        return f"needs model.dtype=bfloat16, given {str(dtype).removeprefix('torch.')}"
    if name == "varlen" and deterministic:
        return "PyTorch's copy has no deterministic backward for packed documents"
    return None


def why_not_heads(name: str, head_dim: int, capability: tuple[int, int]) -> str | None:
    """None where the backend takes heads of this many features on a GPU of this capability, otherwise the reason."""
    if name == "document":
        *first, last = DOCUMENT_HEAD_DIMS
        is_taken, taken = head_dim in DOCUMENT_HEAD_DIMS, f"{', '.join(map(str, first))} or {last}"
    elif name in _MOST_FEATURES:
        most = _MOST_FEATURES[name]
        if capability[0] == 9:
            most = _MOST_FEATURES_HOPPER.get(name, most)
        is_taken, taken = head_dim % _HEAD_MULTIPLE == 0 and head_dim <= most, f"a multiple of 8 up to {most}"
    else:
        return None
    return None if is_taken else f"takes heads of {taken} features, this model's have {head_dim}"


def why_not_loaded(name: str) -> str | None:
    """None where the backend needs no package or has it, otherwise the reason and the command that installs it."""
    if name not in _INSTALL:
        return None
    modules, command = _INSTALL[name]
    if not all(_is_installed(module) for module in modules):
        return f"its package is not installed: {command}"
    return _why_not_made(name) if name in BACKENDS else None


@cache
def _why_not_made(name: str) -> str | None:
    """None where the backend's package can be imported and is one we can call, otherwise why not and the remedy.

    A package may be there and fail: flash-attn 2 carries sources of flash_attn_4 for other versions of CUTLASS than may
    be installed. What such an import raises is the package's affair, and may be anything.
    """
    try:
        backend = BACKENDS[name]()
    except Exception as error:
        raised = ": ".join(filter(None, (type(error).__name__, str(error))))
        return f"its package cannot be imported ({raised}): {_INSTALL[name][1]}"
    return _why_not_called(name, backend)


def _why_not_called(name: str, backend: FlashAttn2 | FlashAttn4) -> str | None:
    """None where the package has the functions that the backend calls, with parameters of those names."""
    for called, arguments in CALLS.get(name, {}).items():
        function = getattr(backend._package, called, None)
        if function is None:
            return f"its package has no {called}: {_REINSTALL[name]}"
        try:
            # An operator that is registered with torch shows no parameters; the function that it was made of does.
            inspect.signature(getattr(function, "_init_fn", function)).bind(**dict.fromkeys(arguments))
        except TypeError as error:
            return f"its package's {called} takes other arguments ({error}): {_REINSTALL[name]}"
    return None


def _is_installed(module: str) -> bool:
    """Whether the module is there. To look imports the package around it, which is there though it raise something."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError as error:
        return not f"{module}.".startswith(f"{error.name}.")  # of another's absence it is the package that complains
    except Exception:  # `_why_not_made` says what
        return True
