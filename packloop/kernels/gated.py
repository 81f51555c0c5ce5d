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

from functools import cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from packloop.kernels import reference

# `torch` is no setting: it stands for the same layout without quack.
GatedLibrary = Literal["auto", "quack", "torch", "none"]

_DTYPES = (torch.bfloat16, torch.float16)
_HOPPER = 9


class Tile(NamedTuple):
    """What of quack's GemmConfig differs: the tile of a block, and whether two tiles take turns in it."""

    m: int
    n: int
    pingpong: bool


# Of those that quack's own tuner tries for gated products on Hopper; each new one compiles for some seconds.
FORWARD_TILE = Tile(128, 256, pingpong=False)
BACKWARD_TILE = Tile(128, 192, pingpong=True)


def why_not_quack(device: torch.device) -> str | None:
    """None where quack's products can run on the device, otherwise why not."""
    if device.type != "cuda":
        return f"needs a CUDA GPU, the device is {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability[0] != _HOPPER:
        return f"needs a GPU of compute capability 9.x, this one has {capability[0]}.{capability[1]}"
    return _why_not_installed()


@cache
def _why_not_installed() -> str | None:
    try:
        from quack.epilogue.library import linear_act_mod
    except ModuleNotFoundError:
        return "needs quack-kernels, which is not installed: pip install 'quack-kernels[cu13]'"
    except (ImportError, RuntimeError) as error:  # cutlass finds no build for its CUDA
        return f"cannot import quack-kernels ({error})"
    try:
        linear_act_mod("swiglu", gated=True, has_c=False, has_rowvec=False, has_colvec=False)
    except TypeError:
        # Elsewhere it takes cutlass's functions for parts of the epilogue, and cannot name its kernels.
        return "needs quack-kernels and nvidia-cutlass-dsl in a directory called site-packages"
    return None


def library_for(weight_dtype: torch.dtype, device: torch.device, by: GatedLibrary) -> Literal["quack", "torch", "none"]:
    """Who runs the gated products of such weights; `none` leaves SwiGLU to its own passes.

    ValueError where `by="quack"` cannot.
    """
    if by in ("torch", "none"):
        return by
    reason = why_not_quack(device)
    if reason is None and weight_dtype not in _DTYPES:
        reason = f"needs bfloat16 or float16, the weights are {weight_dtype}"
    if by == "quack" and reason:
        raise ValueError(f"quack {reason}")
    return "none" if reason else "quack"


def halves(preact: Tensor) -> tuple[Tensor, Tensor]:
    """(gate, up) [T, I] in an interleaved [T, 2I]: every other column."""
    return preact[:, 0::2], preact[:, 1::2]


def gated_forward(
    x_TK: Tensor,
    w_OK: Tensor,
    *,
    preact_out: Tensor,
    hidden_out: Tensor,
    by: Literal["quack", "torch"],
    tile: Tile = FORWARD_TILE,
) -> None:
    """Fills `preact_out` [T, 2I] with `x W^T` and `hidden_out` [T, I] with its SwiGLU, without autograd."""
    if by == "torch":
        torch.mm(x_TK, w_OK.T, out=preact_out)
        hidden_out.copy_(reference.swiglu(*halves(preact_out)))
        return
    from quack.gemm_interface import gemm_act

    buffers = {"preact_out": preact_out, "postact_out": hidden_out}
    gemm_act(x_TK, w_OK.T, activation="swiglu", config=_config(tile), tuned=False, **buffers)


def gated_backward(
    dy_TK: Tensor,
    w_KI: Tensor,
    preact: Tensor,
    *,
    d_preact_out: Tensor,
    hidden_out: Tensor,
    by: Literal["quack", "torch"],
    tile: Tile = BACKWARD_TILE,
) -> None:
    """Fills `d_preact_out` [T, 2I] with the gradient of `preact` for `dy W` as hidden's, and `hidden_out` with hidden.

    `d_preact_out` may be `preact` itself: a block has loaded what it overwrites, and no other block's tile holds it.
    """
    if by == "torch":
        gate, up = halves(preact)
        hidden = reference.swiglu(gate, up)
        gradients = reference.swiglu_backward(dy_TK @ w_KI, gate, up)
        for target, gradient in zip(halves(d_preact_out), gradients):
            target.copy_(gradient)
        hidden_out.copy_(hidden)
        return
    from quack.gemm_interface import gemm_dact

    buffers = {"dx_out": d_preact_out, "postact_out": hidden_out}
    options = {"config": _config(tile), "tuned": False, "dynamic_scheduler": False}
    gemm_dact(dy_TK, w_KI, preact, activation="swiglu", **options, **buffers)


@cache
def _config(tile: Tile):
    from quack.gemm_config import GemmConfig

    return GemmConfig(
        tile_m=tile.m,
        tile_n=tile.n,
        pingpong=tile.pingpong,
        cluster_m=2,
        cluster_n=1,
        swap_ab=False,
        device_capacity=_HOPPER,
        is_dynamic_persistent=False,
        use_tma_gather=False,
    )
