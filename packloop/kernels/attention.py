"""Causal attention over packed documents: one interface, several backends, and the choice among them.

Shapes: B rows, T slots of all rows together, L slots of one row (T = B * L), H query heads, K key/value heads (H a
multiple of K), D features of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from packloop.kernels.token_reuse import DistinctTokens


@dataclass(frozen=True)
class DocumentLayout:
    """Which slots of a micro-batch belong to one document. Made once a micro-batch, shared by every layer.

    document_ids_BL: int32, number of the document within its row, -1 for padding.
    cu_seqlens: int32 [documents + 1], their bounds in the T slots, on the device.
    max_seqlen: tokens of the longest document, on the host, so that no layer reads it back.
    is_packed: False where every row is one document from its first slot on; plain causal attention is then right, and
        whatever padding sees comes after every real token.
    """

    document_ids_BL: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    is_packed: bool
    cu_seqlens_cpu: Tensor | None = None  # the same bounds on the host, where the loader made them
    num_positions: int | None = None  # positions lie below it; None: below L
    # Tokens of the longest real document, those that it has in common included; None: max_seqlen.
    longest_document: int | None = None
    # int32 on the host: of each document the one that holds its first tokens, too, or -1. None: all -1.
    prefix_of: Tensor | None = None
    distinct: DistinctTokens | None = None  # of the tokens in these slots, where their embeddings are what enters
    # What backends have made of it, each under keys of its own, for the layers that follow.
    made: dict[tuple, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def num_real_positions(self) -> int:
        """Positions of real tokens lie below it."""
        return self.longest_document or self.max_seqlen

    @property
    def mask_B1LL(self) -> Tensor:
        """bool [B, 1, L, L], True where a query (row) may see a key (column).

        That is one of the same document, not later, or of the one that holds the query's document's first tokens.
        """
        if ("mask",) not in self.made:
            self.made[("mask",)] = self._mask_B1LL()
        return self.made[("mask",)]

    def _mask_B1LL(self) -> Tensor:
        ids = self.document_ids_BL
        same = ids[:, None, :, None] == ids[:, None, None, :]
        seen = same & torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril()
        if self.prefix_of is None:
            return seen
        # Documents are numbered as in cu_seqlens, there being one row; a last entry serves slots of no document.
        prefix_of = torch.cat([self.prefix_of, torch.tensor([-1], dtype=torch.int32)]).to(ids.device)
        prefixes = prefix_of[ids.long()]
        return seen | ((prefixes >= 0)[:, None, :, None] & (prefixes[:, None, :, None] == ids[:, None, None, :]))

    def bias_B1LL(self, dtype: torch.dtype) -> Tensor:
        """What is added to scores: 0 where a query may see a key, elsewhere the lowest number of dtype."""
        if ("bias", dtype) not in self.made:
            hidden = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=self.document_ids_BL.device)
            self.made["bias", dtype] = torch.zeros_like(hidden).where(self.mask_B1LL, hidden)
        return self.made["bias", dtype]

    def drop_masks(self) -> None:
        """Frees what grows with the square of a row; whoever asks for it has it made anew."""
        for key in [key for key in self.made if key[0] in ("mask", "bias")]:
            del self.made[key]


class Attention(Protocol):
    """A backend. q is [T, H, D], k and v are [T, K, D]; features are adjacent, rows may be strided."""

    def __call__(self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, layout: DocumentLayout, scale: float) -> Tensor:
        """softmax(scale * q k^T + mask) v as [T, H, D] in q's dtype, seen by autograd."""

    def forward(self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, layout, scale: float) -> tuple[Tensor, Any]:
        """The same outside autograd: (out, what backward needs beside q, k and v)."""

    def backward(self, saved: Any, d_out: Tensor, q, k, v, layout, scale: float, dq, dk, dv) -> None:
        """Fills dq, dk and dv, which are shaped like q, k and v and may be column slices of one buffer."""


class DifferentiatedAttention:
    """A backend made of a function on [B, H, L, D] that autograd differentiates."""

    shares_prefixes = True  # by the layout's mask

    def __init__(self, function: Callable[[Tensor, Tensor, Tensor, DocumentLayout, float], Tensor]):
        self._function = function

    def __call__(self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, layout: DocumentLayout, scale: float) -> Tensor:
        num_rows = layout.document_ids_BL.shape[0]
        q_BHLD, k_BKLD, v_BKLD = (x.unflatten(0, (num_rows, -1)).transpose(1, 2) for x in (q_THD, k_TKD, v_TKD))
        repeats = q_BHLD.shape[1] // k_BKLD.shape[1]
        if repeats > 1:
            k_BKLD, v_BKLD = k_BKLD.repeat_interleave(repeats, dim=1), v_BKLD.repeat_interleave(repeats, dim=1)
        return self._function(q_BHLD, k_BKLD, v_BKLD, layout, scale).transpose(1, 2).flatten(0, 1)

    def forward(self, q_THD, k_TKD, v_TKD, layout, scale):
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in (q_THD, k_TKD, v_TKD)]
            out_THD = self(*inputs, layout, scale)
        return out_THD.detach(), (out_THD, inputs)

    def backward(self, saved, d_out, q, k, v, layout, scale, dq, dk, dv):
        out_THD, inputs = saved
        for target, gradient in zip((dq, dk, dv), torch.autograd.grad(out_THD, inputs, d_out), strict=True):
            target.copy_(gradient)


def _eager(q_BHLD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor, layout: DocumentLayout, scale: float) -> Tensor:
    """The whole score matrix in memory, softmax summed in at least fp32: the baseline that others are held to."""
    scores = (q_BHLD * scale) @ k_BHLD.transpose(-1, -2)
    return scores.add_(layout.bias_B1LL(scores.dtype)).softmax(-1) @ v_BHLD


def _sdpa(q_BHLD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor, layout: DocumentLayout, scale: float) -> Tensor:
    """PyTorch's fused attention: its causal path for one document a row, a boolean mask for packed documents."""
    if layout.is_packed:
        return F.scaled_dot_product_attention(q_BHLD, k_BHLD, v_BHLD, attn_mask=layout.mask_B1LL, scale=scale)
    return F.scaled_dot_product_attention(q_BHLD, k_BHLD, v_BHLD, is_causal=True, scale=scale)


def _cudnn(q_BHLD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor, layout: DocumentLayout, scale: float) -> Tensor:
    """cuDNN's fused causal attention, pinned: one document a row only."""
    if layout.is_packed:
        raise ValueError("attention 'cudnn' sees one causal sequence a row; packed documents need auto, varlen or sdpa")
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(q_BHLD, k_BHLD, v_BHLD, is_causal=True, scale=scale)


# Backends that go by `cu_seqlens` alone, so that documents may lie anywhere in the rows.
FLAT = ("document", "flash_attn", "varlen", "flash_attn_4")
# Of them, those that know beginnings that documents share.
SHARING = ("document",)
_LONGEST_REASON = 200  # characters of what a backend raises


def rotates(backend: Attention) -> bool:
    """Whether forward and backward take a `rotation` and apply RoPE themselves."""
    return getattr(backend, "rotates", False)


def prepare_layout(backend: Attention, layout: DocumentLayout, dtype: torch.dtype) -> None:
    """What the backend can do for a micro-batch before its first layer runs, host work above all."""
    if prepare := getattr(backend, "prepare", None):
        prepare(layout, dtype)


class CountedAttention:
    """A backend under its name, which counts how often it attends: `forward_check` reads it. Else as the backend.

    ValueError for a layout with shared beginnings where the backend knows nothing of them.
    """

    def __init__(self, name: str, backend: Attention):
        self.name, self.calls, self.rotates = name, 0, rotates(backend)
        self._backend, self._shares_prefixes = backend, getattr(backend, "shares_prefixes", False)

    def __call__(self, q_THD, k_TKD, v_TKD, layout: DocumentLayout, scale: float) -> Tensor:
        self._attends(layout)
        return self._backend(q_THD, k_TKD, v_TKD, layout, scale)

    def forward(self, q_THD, k_TKD, v_TKD, layout: DocumentLayout, scale: float, **options) -> tuple[Tensor, Any]:
        self._attends(layout)
        return self._backend.forward(q_THD, k_TKD, v_TKD, layout, scale, **options)

    def _attends(self, layout: DocumentLayout) -> None:
        if layout.prefix_of is not None and not self._shares_prefixes:
            raise ValueError(f"attention {self.name!r} knows no beginnings that documents share; use document")
        self.calls += 1

    def backward(self, *args, **kwargs) -> None:
        self._backend.backward(*args, **kwargs)


def load_backend(name: str) -> Attention:
    """The backend of that name. ValueError where there is none, and with the remedy where its package is of no use."""
    if name in _DIFFERENTIATED:
        return DifferentiatedAttention(_DIFFERENTIATED[name])
    from packloop.kernels import document_attention, flash_attention

    others = {**flash_attention.BACKENDS, "document": document_attention.DocumentAttention}
    if name not in others:
        raise ValueError(f"attention {name!r}; known: {', '.join([*_DIFFERENTIATED, *others])}")
    if reason := flash_attention.why_not_loaded(name):
        raise ValueError(f"attention {name!r}: {reason}")
    return others[name]()


_DIFFERENTIATED = {"eager": _eager, "sdpa": _sdpa, "cudnn": _cudnn}


def usable_backends(
    *, is_packed: bool, dtype: torch.dtype, device: torch.device, head_dim: int
) -> dict[str, str | None]:
    """Every backend -> None where it can run for these inputs, otherwise why not. head_dim: features of a head."""
    from packloop.kernels import flash_attention

    on_gpu = device.type == "cuda"
    reasons: dict[str, str | None] = {"eager": None, "sdpa": None, "cudnn": None}
    if not on_gpu:
        reasons["cudnn"] = f"needs CUDA, the device is {device.type}"
    elif is_packed:
        reasons["cudnn"] = "cannot keep packed documents apart"
    elif dtype not in (torch.bfloat16, torch.float16):
        reasons["cudnn"] = f"needs bfloat16, the model is {dtype}"
    else:
        reasons["cudnn"] = flash_attention.why_not_heads("cudnn", head_dim, torch.cuda.get_device_capability(device))
    for name in (*flash_attention.BACKENDS, "document"):
        reasons[name] = flash_attention.why_not(name, dtype=dtype, device=device, head_dim=head_dim)
    return reasons


def choose_backend(
    requested: str,
    *,
    is_packed: bool,
    dtype: torch.dtype,
    device: torch.device,
    heads: tuple[int, int, int],
    layout: DocumentLayout | None = None,
    among: tuple[str, ...] | None = None,
) -> tuple[str, str]:
    """(backend, why) for a requested name or `auto`. ValueError with the remedy where what is requested cannot run.

    heads: (H, K, D). `auto` on a GPU times forward and backward of every usable backend (`among` those, if given) on
    `layout` and takes the fastest; one that raises is left out, and `why` says so. Without a layout, or on the CPU, it
    takes `sdpa`, or torch's varlen attention for packed documents on a GPU.
    """
    reasons = usable_backends(is_packed=is_packed, dtype=dtype, device=device, head_dim=heads[2])
    if requested != "auto":
        if reasons.get(requested) is not None:
            raise ValueError(f"kernels.attention={requested}: {reasons[requested]}; or use kernels.attention=auto")
        return requested, "as set"
    if device.type != "cuda":
        return "sdpa", "PyTorch's fused attention, with a document mask where documents are packed"
    usable = [name for name, reason in reasons.items() if reason is None and name != "eager"]
    # Without one of `among` the caller has to refuse what is chosen.
    usable = [name for name in usable if among is None or name in among] or usable
    if is_packed and len(usable) > 1 and "sdpa" in usable:
        # Its document mask is quadratic in memory, and its fused kernels do not skip what the mask hides.
        usable.remove("sdpa")
    if layout is None or len(usable) == 1:
        preferred = [name for name in ("document", "flash_attn", "varlen", "cudnn", "sdpa") if name in usable]
        return (preferred or ["sdpa"])[0], "not timed"
    times_ms, raised = _time_backends(usable, heads, layout, dtype)
    left_out = "; ".join(f"{name} raises {what}" for name, what in raised.items())
    if not times_ms and "sdpa" in raised:
        raise ValueError(f"kernels.attention=auto: none of them runs: {left_out}; use kernels.attention=eager")
    if not times_ms:
        return "sdpa", f"no other runs: {left_out}"
    best = min(times_ms, key=times_ms.get)
    listed = ", ".join(f"{name} {ms:.2f} ms" for name, ms in sorted(times_ms.items(), key=lambda item: item[1]))
    return best, f"fastest forward + backward of one layer: {listed}" + (f"; {left_out}" if raised else "")


def _time_backends(
    names: list[str], heads: tuple[int, int, int], layout: DocumentLayout, dtype: torch.dtype
) -> tuple[dict[str, float], dict[str, str]]:
    """(milliseconds of those that run, what the others raise). OutOfMemoryError where there is memory for none."""
    times_ms, raised = {}, {}
    for name in names:
        try:
            times_ms[name] = time_backend(name, heads, layout, dtype)
        except Exception as error:  # a package's code, on shapes that it may not know: what it raises may be anything
            if isinstance(error, torch.OutOfMemoryError) and not times_ms and name == names[-1]:
                raise
            said = " ".join(str(error).split())[:_LONGEST_REASON]
            raised[name] = ": ".join(filter(None, (type(error).__name__, said)))
    return times_ms, raised


def time_backend(
    name: str, heads: tuple[int, int, int], layout: DocumentLayout, dtype: torch.dtype, repeats: int = 5
) -> float:
    """Milliseconds of one forward and backward, RoPE included, on random inputs of this layout: median after two."""
    from packloop.kernels.rope import Rotation, rope_

    num_heads, num_kv_heads, head_dim = heads
    num_slots, device = layout.document_ids_BL.numel(), layout.document_ids_BL.device
    backend, scale = load_backend(name), head_dim**-0.5
    shapes = [(num_slots, count, head_dim) for count in (num_heads, num_kv_heads, num_kv_heads)]
    q, k, v = (torch.randn(shape, dtype=dtype, device=device) for shape in shapes)
    d_out, gradients = torch.randn_like(q), [torch.empty_like(x) for x in (q, k, v)]
    tables = torch.randn(2, layout.document_ids_BL.shape[1], head_dim // 2, device=device)
    positions_T = torch.arange(layout.document_ids_BL.shape[1], device=device).repeat(layout.document_ids_BL.shape[0])
    rotation = Rotation(*tables, positions_T)
    laps = []
    for _ in range(repeats + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        if rotates(backend):
            _, saved = backend.forward(q, k, v, layout, scale, rotation=rotation)
            backend.backward(saved, d_out, q, k, v, layout, scale, *gradients, rotation=rotation)
        else:
            rope_(q.flatten(1), k.flatten(1), *tables, positions_T)
            _, saved = backend.forward(q, k, v, layout, scale)
            backend.backward(saved, d_out, q, k, v, layout, scale, *gradients)
            rope_(gradients[0].flatten(1), gradients[1].flatten(1), *tables, positions_T, inverse=True)
        end.record()
        end.synchronize()
        laps.append(start.elapsed_time(end))
    return sorted(laps[2:])[repeats // 2]
