"""By which implementation each operation of the fused layers and of the head runs, each chosen by itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import get_args, get_type_hints

import torch

from packloop.kernels.gated import GatedLibrary, why_not_gated
from packloop.kernels.lora_linear import LoraProducts
from packloop.kernels.matmul import ProductLibrary, why_not_cublaslt
from packloop.kernels.reference import Implementation, why_not_triton
from packloop.kernels.token_reuse import TokenReuse


@dataclass(frozen=True)
class Operations:
    """`triton`, `torch`, or `auto`: whichever fits the tensors that arrive. Field names are those of the settings.

    All but cross_entropy, which is the head's, are of the fused layers, which are handed this value. matmul has
    `cublaslt` in `triton`'s place. `torch` stands for bitsandbytes' own kernel in nf4. rope=torch keeps a backend that
    rotates by itself from doing so. gated: who runs the products with SwiGLU in their epilogues; `none` leaves it to
    swiglu. token_reuse: `first_layer` or `none`, not who runs it but whether. lora: whether the adapters' products are
    `fused` with the base's, each other's and the masking, or by `torch`, each by itself. ValueError for other values.
    """

    rms_norm: Implementation = "auto"
    rope: Implementation = "auto"
    swiglu: Implementation = "auto"
    nf4: Implementation = "auto"
    matmul: ProductLibrary = "auto"
    gated: GatedLibrary = "auto"
    token_reuse: TokenReuse = "auto"
    lora: LoraProducts = "auto"
    cross_entropy: Implementation = "auto"

    def __post_init__(self):
        for name, allowed in _ALLOWED.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"kernels.{name}={getattr(self, name)!r}: allowed: {', '.join(allowed)}")


_ALLOWED = {name: get_args(hint) for name, hint in get_type_hints(Operations).items()}
AUTO = Operations()

# Those that stock layers leave to Hugging Face, PEFT and bitsandbytes.
_OF_FUSED_LAYERS = ("rms_norm", "rope", "swiglu", "nf4", "matmul", "gated", "token_reuse", "lora")
# What is fastest, and what takes its place where that cannot run.
_CHOICES = {
    "matmul": ("cublaslt", "torch"),
    "gated": ("quack", "none"),
    "token_reuse": ("first_layer", "none"),
    "lora": ("fused", "torch"),
}


def choose_operations(
    requested: Operations,
    device: torch.device,
    *,
    fused: bool,
    unfit: Mapping[str, str | None] = MappingProxyType({}),
) -> Operations:
    """The operations with every `auto` replaced: Triton, cuBLASLt or quack where it runs on the device, else PyTorch.

    Stock layers run none of these, so their part is `torch`, or `none` for gated; so is matmul's under deterministic
    algorithms, where `cublaslt` may be asked for and runs torch's products, as it does in float32. gated=auto is `none`
    as well where torch is asked for in swiglu's, matmul's or lora's place. unfit: by operation, why its fastest does
    not suit the model. ValueError where one is asked for and cannot run, with the remedy.
    """
    why_not = {"triton": why_not_triton, "cublaslt": why_not_cublaslt, "quack": why_not_gated}
    why_not["first_layer"] = why_not["fused"] = lambda _: None
    if requested.lora == "torch":
        unfit = {**unfit, "gated": "has the adapters in its products, and kernels.lora=torch has them apart"}
    to_torch = {
        "matmul": torch.are_deterministic_algorithms_enabled(),
        "gated": "torch" in (requested.swiglu, requested.matmul, requested.lora),
    }
    chosen = {}
    for name, implementation in asdict(requested).items():
        fastest, otherwise = _CHOICES.get(name, ("triton", "torch"))
        if implementation not in ("auto", fastest):
            chosen[name] = implementation
            continue
        if implementation == "auto" and to_torch.get(name):
            chosen[name] = otherwise
            continue
        in_stock_code = not fused and name in _OF_FUSED_LAYERS
        reason = "kernels.layer=stock runs Hugging Face's own code" if in_stock_code else unfit.get(name)
        reason = reason or why_not[fastest](device)
        if implementation == fastest and reason:
            # A resumed run's `auto` is what its checkpoint has, which of gated may be another than this machine's.
            remedy = "none" if name == "gated" else "auto"
            raise ValueError(f"kernels.{name}={fastest}: {reason}; use kernels.{name}={remedy}")
        chosen[name] = otherwise if reason else fastest
    return Operations(**chosen)
