"""Hugging Face's RoPE without its roundings: tables for the stock layers, and what the fused layers' are made of.

Shapes: B rows, L slots of one row, H heads, D features of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaModel, LlamaRotaryEmbedding


def follow_longest(rotary: LlamaRotaryEmbedding, num_positions: int) -> int | None:
    """What the frequencies for a sequence of so many positions depend on; None: on nothing. Those of `dynamic` are set.

    As `dynamic_rope_update` of transformers, which reads the longest position back from the device: `dynamic` has the
    frequencies of the longest sequence since one within the original context, `longrope` one set for sequences that
    are longer than that and one for others.
    """
    if rotary.rope_type == "longrope":
        return int(num_positions > rotary.config.rope_parameters["original_max_position_embeddings"])
    if rotary.rope_type != "dynamic":
        return None
    # A tensor where Hugging Face's code has set it; an int from here on.
    longest, original = int(rotary.max_seq_len_cached), rotary.original_max_seq_len
    device = rotary.inv_freq.device
    if num_positions > longest:
        longest = num_positions
        # A tensor as there, so that it rounds alike.
        frequencies, rotary.attention_scaling = ROPE_INIT_FUNCTIONS["dynamic"](
            rotary.config, torch.device("cpu"), seq_len=torch.tensor(longest)
        )
        if device.type == "cuda":  # a copy from pageable memory would make the host wait for the device
            frequencies = frequencies.pin_memory()
        rotary.inv_freq = frequencies.to(device, non_blocking=True)
    elif num_positions < original < longest:
        longest = original
        rotary.inv_freq = rotary.original_inv_freq = rotary.original_inv_freq.to(device)
    rotary.max_seq_len_cached = longest
    return longest


def rope_tables(
    llama_model: LlamaModel, position_ids_BL: Tensor, num_positions: int | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin [B, L, D] of the positions in fp32 (fp64 for an fp64 model), where stock code rounds to its dtype.

    num_positions: of the longest sequence, by which some kinds of RoPE go (`follow_longest`); None: L. Angles are
    products of numbers in fp64. Stock code's are a matrix product in fp32, which TF32 may round: that holds no odd
    position above 2048.
    """
    rotary = llama_model.rotary_emb
    dtype = torch.promote_types(llama_model.norm.weight.dtype, torch.float32)
    num_positions = num_positions or position_ids_BL.shape[1]
    follow_longest(rotary, num_positions)
    if rotary.rope_type == "longrope":  # its own code chooses on the device
        device = position_ids_BL.device
        rotary(torch.empty((), device=device), torch.full((1, 1), num_positions - 1, device=device))
    angles = position_ids_BL[..., None].double() * rotary.inv_freq.to(position_ids_BL.device).double()
    angles = torch.cat((angles, angles), dim=-1)
    return (angles.cos() * rotary.attention_scaling).to(dtype), (angles.sin() * rotary.attention_scaling).to(dtype)


def apply_rope(x_BHLD: Tensor, cos_BLD: Tensor, sin_BLD: Tensor) -> Tensor:
    """Rotates the two halves of each head by its position's angle, computed in the tables' dtype, rounded once."""
    x1, x2 = x_BHLD.chunk(2, dim=-1)
    cos, sin = (table[:, None, :, : x1.shape[-1]] for table in (cos_BLD, sin_BLD))  # the other half is the same
    turned = torch.addcmul(x1 * cos, x2, sin, value=-1), torch.addcmul(x2 * cos, x1, sin)
    return torch.cat(turned, dim=-1).to(x_BHLD.dtype)
