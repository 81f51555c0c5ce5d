"""Hugging Face's RoPE without its roundings: tables for the stock layers, and what the fused layers' are made of.

Shapes: B rows, L slots of one row, H heads, D features of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaModel


def rope_tables(llama_model: LlamaModel, position_ids_BL: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [B, L, D] of the positions in fp32 (fp64 for an fp64 model), where stock code rounds to its dtype.

    Angles are products of numbers in fp64. Stock code's are a matrix product in fp32, which TF32 may round: that holds
    no odd position above 2048.
    """
    rotary = llama_model.rotary_emb
    dtype = torch.promote_types(llama_model.norm.weight.dtype, torch.float32)
    if rotary.rope_type != "default":  # its frequencies may depend on the longest position, and are set by a call
        rotary(torch.empty((), dtype=dtype, device=position_ids_BL.device), position_ids_BL)
    angles = position_ids_BL[..., None].double() * rotary.inv_freq.to(position_ids_BL.device).double()
    angles = torch.cat((angles, angles), dim=-1)
    return (angles.cos() * rotary.attention_scaling).to(dtype), (angles.sin() * rotary.attention_scaling).to(dtype)


def apply_rope(x_BHLD: Tensor, cos_BLD: Tensor, sin_BLD: Tensor) -> Tensor:
    """Rotates the two halves of each head by its position's angle, computed in the tables' dtype, rounded once."""
    x1, x2 = x_BHLD.chunk(2, dim=-1)
    cos, sin = (table[:, None, :, : x1.shape[-1]] for table in (cos_BLD, sin_BLD))  # the other half is the same
    turned = torch.addcmul(x1 * cos, x2, sin, value=-1), torch.addcmul(x2 * cos, x1, sin)
    return torch.cat(turned, dim=-1).to(x_BHLD.dtype)
