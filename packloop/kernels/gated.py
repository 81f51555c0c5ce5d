"""SwiGLU in the epilogues of the products around it, so that neither of its passes over memory is left.

    forward   preact = x W'           hidden = silu(gate) * up              one product writes both
    backward  d_hidden = dy W         d_preact and hidden again             one product, d_hidden is never stored

gate and up lie interleaved in `preact`, gate in even columns and up in odd ones, since an epilogue has only its own
tile: the weight's rows are interleaved likewise. On a Hopper GPU the products are quack's (Tri Dao's quack-kernels,
GEMMs in CuTe-DSL); `torch` computes the same in separate steps, for tests without a GPU.

Numerics of quack: forward's hidden is made of gate and up before they are rounded to `preact`, backward's of `preact`.

Shapes: T tokens, K inner dimension, I features of the MLP; x [T, K], W [2I, K]; dy [T, K], W [K, I]; preact [T, 2I],
hidden [T, I]. All have adjacent columns; rows may be strided, by multiples of 16 bytes.
"""

from __future__ import annotations

import importlib.util
import logging
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from packloop.kernels import reference
from packloop.kernels.extended_weight import ExtendedWeight, new_rows
from packloop.kernels.lora_linear import Dropout, LoraGroup, lora_project

# `torch` is no setting: it stands for the same layout without quack.
GatedLibrary = Literal["auto", "quack", "torch", "none"]

logger = logging.getLogger(__name__)

HOPPER = 9
_DTYPE = torch.bfloat16
_INSTALL = "pip install 'quack-kernels[cu13]>=0.6.5,<0.7'"


def why_not_quack(device: torch.device) -> str | None:
    """None where quack can be imported for the device, otherwise why not. Compiles nothing."""
    if device.type != "cuda":
        return f"needs a CUDA GPU, the device is {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability[0] != HOPPER:
        return f"needs a GPU of compute capability 9.x, this one has {capability[0]}.{capability[1]}"
    return _why_not_installed() or _why_not_importable()


def why_not_gated(device: torch.device) -> str | None:
    """None where quack's gated products run on the device, otherwise why not: two small ones are tried.

    Both compile for some seconds, as the first step's would, and stay in quack's cache.
    """
    return why_not_quack(device) or _why_not_running(device)


@cache
def _why_not_installed() -> str | None:
    if importlib.util.find_spec("quack") is None:
        return f"needs quack-kernels, which is not installed: {_INSTALL}"
    return None


@cache
def _why_not_importable() -> str | None:
    try:
        from quack.epilogue.library import linear_act_mod

        _products()
        _config()
        linear_act_mod("swiglu", gated=True, has_c=False, has_rowvec=False, has_colvec=False)
    except Exception as error:  # what an import raises is the package's affair
        # Elsewhere it takes cutlass's functions for parts of its epilogues, which have no name for it to keep them by.
        place = "; it has to lie in a directory called site-packages" if isinstance(error, TypeError) else ""
        return f"cannot be used ({type(error).__name__}: {error}){place}; packloop is written for 0.6.5: {_INSTALL}"
    return None


@cache
def _why_not_running(device: torch.device) -> str | None:
    try:
        x, rows = (torch.ones(size, 64, device=device, dtype=_DTYPE) for size in (8, 256))
        preact, hidden = (torch.empty(8, size, device=device, dtype=_DTYPE) for size in (256, 128))
        gated_forward(x, rows, preact_out=preact, hidden_out=hidden, by="quack")
        gated_backward(x, rows[:128].T.contiguous(), preact, d_preact_out=preact, hidden_out=hidden, by="quack")
        torch.cuda.synchronize(device)
    except Exception as error:  # of a compiler, a driver or a cache, none of them ours
        reason = f"fails on this machine ({type(error).__name__}: {' '.join(str(error).split())[:300]})"
        logger.warning("kernels.gated: quack %s", reason)
        return reason
    return None


def library_for(weight_dtype: torch.dtype, device: torch.device, by: GatedLibrary) -> Literal["quack", "torch", "none"]:
    """Who runs the gated products of such weights; `none` leaves SwiGLU to its own passes.

    ValueError where `by="quack"` cannot.
    """
    if by in ("torch", "none"):
        return by
    if weight_dtype == _DTYPE:
        reason = why_not_gated(device)
    else:
        reason = f"needs model.dtype=bfloat16, the weights are {str(weight_dtype).removeprefix('torch.')}"
    if by == "quack" and reason:
        raise ValueError(f"quack {reason}")
    return "none" if reason else "quack"


def deinterleave(preact: Tensor) -> tuple[Tensor, Tensor]:
    """(gate, up) [T, I] in an interleaved [T, 2I]: every other column."""
    return preact[:, 0::2], preact[:, 1::2]


def gated_forward(
    x_TK: Tensor,
    w_OK: Tensor,
    *,
    preact_out: Tensor,
    hidden_out: Tensor,
    by: Literal["quack", "torch"],
) -> None:
    """Fills `preact_out` [T, 2I] with `x W^T` and `hidden_out` [T, I] with its SwiGLU, without autograd."""
    if by == "torch":
        torch.mm(x_TK, w_OK.T, out=preact_out)
        hidden_out.copy_(reference.swiglu(*deinterleave(preact_out)))
        return
    torch.ops.packloop.gated_forward(x_TK, w_OK.T, preact_out, hidden_out)


def gated_backward(
    dy_TK: Tensor,
    w_KI: Tensor,
    preact: Tensor,
    *,
    d_preact_out: Tensor,
    hidden_out: Tensor,
    by: Literal["quack", "torch"],
) -> None:
    """Fills `d_preact_out` [T, 2I] with the gradient of `preact` for `dy W` as hidden's, and `hidden_out` with hidden.

    `d_preact_out` may be `preact` itself: a block has loaded what it overwrites, and no other block's tile holds it.
    """
    if by == "torch":
        gate, up = deinterleave(preact)
        hidden = reference.swiglu(gate, up)
        gradients = reference.swiglu_backward(dy_TK @ w_KI, gate, up)
        for target, gradient in zip(deinterleave(d_preact_out), gradients):
            target.copy_(gradient)
        hidden_out.copy_(hidden)
        return
    torch.ops.packloop.gated_backward(dy_TK, w_KI, preact, d_preact_out, hidden_out)


@torch.no_grad()
def gated_group_forward(
    x_wide: Tensor,
    weight: list[Tensor] | ExtendedWeight,
    adapters: LoraGroup,
    dropout: Dropout | None,
    beside: tuple[int, int],
    *,
    by: Literal["quack", "torch"],
) -> tuple[Tensor, Tensor]:
    """(preact, hidden) of interleaved gate and up, each in a buffer with so many columns `beside` it.

    The input of an extended weight has spare columns, which receive the adapters' projections.
    """
    num_outputs = sum(adapters.out_features)
    if isinstance(weight, ExtendedWeight):
        x_TH, projected_TR = x_wide.split([weight.num_features, adapters.a_RH.shape[0]], dim=1)
        lora_project(x_TH, adapters, dropout, out=projected_TR)
        rows = weight.buffer[:num_outputs]
    else:
        (rows,) = weight
    widths = num_outputs, num_outputs // 2
    preact, hidden = (new_rows(x_wide, width + more) for width, more in zip(widths, beside))
    gated_forward(x_wide, rows, preact_out=preact[:, : widths[0]], hidden_out=hidden[:, : widths[1]], by=by)
    return preact, hidden


@torch.no_grad()
def gated_group_gradient_(
    dy_wide: Tensor, weight: list[Tensor] | ExtendedWeight, preact: Tensor, *, by: Literal["quack", "torch"]
) -> Tensor:
    """hidden [T, I], and over `preact` its gradient, for dy beside the next group's d_projected."""
    num_features = preact.shape[1] // 2
    columns = weight.buffer[:, :num_features] if isinstance(weight, ExtendedWeight) else weight[0]
    hidden = new_rows(preact, num_features)
    gated_backward(dy_wide, columns, preact, d_preact_out=preact, hidden_out=hidden, by=by)
    return hidden


def _run_forward(x_TK: Tensor, w_KO: Tensor, preact: Tensor, hidden: Tensor) -> None:
    gemm_act, _ = _products()
    gemm_act(x_TK, w_KO, activation="swiglu", preact_out=preact, postact_out=hidden, config=_config(), tuned=False)


def _run_backward(dy_TK: Tensor, w_KI: Tensor, preact: Tensor, d_preact: Tensor, hidden: Tensor) -> None:
    _, gemm_dact = _products()
    gemm_dact(
        dy_TK,
        w_KI,
        preact,
        activation="swiglu",
        dx_out=d_preact,
        postact_out=hidden,
        config=_config(),
        tuned=False,
        dynamic_scheduler=False,
    )


# Operators, so that profiles show whose products these are and of which shapes.
_LIBRARY = torch.library.Library("packloop", "FRAGMENT")
_LIBRARY.define("gated_forward(Tensor x, Tensor w, Tensor(a!) preact, Tensor(b!) hidden) -> ()")
_LIBRARY.define("gated_backward(Tensor dy, Tensor w, Tensor preact, Tensor(a!) d_preact, Tensor(b!) hidden) -> ()")
_LIBRARY.impl("gated_forward", _run_forward, "CUDA")
_LIBRARY.impl("gated_backward", _run_backward, "CUDA")


@cache
def _products():
    """quack's (gemm_act, gemm_dact)."""
    from quack.gemm_interface import gemm_act, gemm_dact

    return gemm_act, gemm_dact


@cache
def _config():
    """Tiles of 128 x 192, two of them in turns in a block: of those that quack's tuner tries on Hopper, which make no
    difference to a step's time, one that is fast in both directions.
    """
    from quack.gemm_config import GemmConfig

    return GemmConfig(
        tile_m=128,
        tile_n=192,
        pingpong=True,
        cluster_m=2,
        cluster_n=1,
        swap_ab=False,
        device_capacity=HOPPER,
        is_dynamic_persistent=False,
        use_tma_gather=False,
    )
