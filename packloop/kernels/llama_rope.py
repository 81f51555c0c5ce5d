"""Hugging Face's RoPE without its roundings: tables for the stock layers, and what the fused layers' are made of.

Shapes: B rows, L slots of one row, H heads, D features of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaModel, LlamaRotaryEmbedding

# Kinds whose frequencies go by the longest position.
_SCALED_BY_LENGTH = ("dynamic", "longrope")


def scaled_length(rotary: LlamaRotaryEmbedding, num_positions: int) -> int | None:
    """The length that frequencies are made for, given a sequence of so many positions; None: they are the model's own.

    `dynamic` makes them for the sequence, `longrope` for one length, where it is longer than the original context. So
    does `dynamic_rope_update` of transformers in a freshly loaded model; but it decides on the device, and `dynamic`
    has a history there.
    """
    if rotary.rope_type == "dynamic":
        return num_positions if num_positions > rotary.original_max_seq_len else None
    if rotary.rope_type == "longrope":
        original = rotary.config.rope_parameters["original_max_position_embeddings"]
        return original + 1 if num_positions > original else None
    return None


def inverse_frequencies(rotary: LlamaRotaryEmbedding, length: int | None) -> Tensor:
    """[D/2] for that length (`scaled_length`), made in fp32 on the host. `rotary` is left as it is.

    Its `attention_scaling` is that of every length.
    """
    if length is None:
        # Stock code may have left other frequencies in inv_freq.
        return rotary.original_inv_freq if rotary.rope_type in _SCALED_BY_LENGTH else rotary.inv_freq
    # As in transformers, `dynamic` is given a tensor, by which it rounds, and `longrope` a number.
    seq_len = torch.tensor(length) if rotary.rope_type == "dynamic" else length
    frequencies, _ = ROPE_INIT_FUNCTIONS[rotary.rope_type](rotary.config, torch.device("cpu"), seq_len=seq_len)
    return frequencies


def rope_tables(
    llama_model: LlamaModel, position_ids_BL: Tensor, num_positions: int | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin [B, L, D] of the positions in fp32 (fp64 for an fp64 model), where stock code rounds to its dtype.

    num_positions: of the longest sequence, by which some kinds of RoPE go (`scaled_length`); None: L. Angles are
    products of numbers in fp64. Stock code's are a matrix product in fp32, which TF32 may round: that holds no odd
    position above 2048.
    """
    rotary = llama_model.rotary_emb
    dtype = torch.promote_types(llama_model.norm.weight.dtype, torch.float32)
    frequencies = inverse_frequencies(rotary, scaled_length(rotary, num_positions or position_ids_BL.shape[1]))
    device = position_ids_BL.device
    if device.type == "cuda" and frequencies.device.type == "cpu":
        frequencies = frequencies.pin_memory()  # a copy from pageable memory would make the host wait for the device
    angles = position_ids_BL[..., None].double() * frequencies.to(device, non_blocking=True).double()
    angles = torch.cat((angles, angles), dim=-1)
    return (angles.cos() * rotary.attention_scaling).to(dtype), (angles.sin() * rotary.attention_scaling).to(dtype)


def apply_rope(x_BHLD: Tensor, cos_BLD: Tensor, sin_BLD: Tensor) -> Tensor:
    """Rotates the two halves of each head by its position's angle, computed in the tables' dtype, rounded once."""
    x1, x2 = x_BHLD.chunk(2, dim=-1)
    cos, sin = (table[:, None, :, : x1.shape[-1]] for table in (cos_BLD, sin_BLD))  # the other half is the same
    turned = torch.addcmul(x1 * cos, x2, sin, value=-1), torch.addcmul(x2 * cos, x1, sin)
    return torch.cat(turned, dim=-1).to(x_BHLD.dtype)
