"""Every edit of the Hugging Face Llama, as one context manager.

Inside `patched(model)` two methods of that one instance are ours: `LlamaModel.forward`, which passes the documents'
layout to the layers, builds fp32 RoPE tables and recomputes activations, and `LlamaAttention.forward`, which calls
the chosen attention. Both fall through to the stock method when called without a layout (generation, KV cache).
Nothing is edited on a class, so a second model is untouched, and leaving the context, also by an exception, restores
the instance.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaForCausalLM, LlamaModel

from packloop.kernels.attention import BACKENDS, AttentionFunction, DocumentLayout
from packloop.kernels.linear_cross_entropy import linear_cross_entropy

# The stock parameters that the replacements rely on. transformers 5.17 to 5.23 have them.
_EXPECTED_PARAMETERS = {
    LlamaModel: {"input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "use_cache"},
    LlamaAttention: {"hidden_states", "position_embeddings", "attention_mask", "past_key_values"},
}


def find_llama(model: nn.Module) -> LlamaForCausalLM:
    """The `LlamaForCausalLM` in `model` or in its PEFT wrapper. ValueError for another architecture."""
    for module in model.modules():
        if isinstance(module, LlamaForCausalLM):
            return module
    raise ValueError(f"a LlamaForCausalLM is needed, given {type(model).__name__}")


@contextmanager
def patched(model: nn.Module, *, attention: str, recompute_layers: int = 0) -> Iterator[LlamaForCausalLM]:
    """Replaces the forward methods of `model` for the duration of the context and yields the Llama inside it.

    attention: a key of `attention.BACKENDS`. recompute_layers: how many layers, from the first, keep only their input
    and recompute the rest in the backward pass (0: none). Raises ValueError where a stock signature is not the one
    expected.
    """
    llama = find_llama(model)
    attend = BACKENDS[attention]
    attentions = [module for module in llama.modules() if isinstance(module, LlamaAttention)]
    if not attentions:
        raise ValueError("no LlamaAttention found in the model, so there is nothing to replace")
    for module in (llama.model, attentions[0]):
        _check_signature(module)
    edited: list[nn.Module] = []
    try:
        _replace_forward(llama.model, _model_forward(llama.model.forward, recompute_layers))
        edited.append(llama.model)
        for module in attentions:
            _replace_forward(module, _attention_forward(module.forward, attend))
            edited.append(module)
        yield llama
    finally:
        for module in edited:
            del module.forward


def packed_loss_sum(
    llama: LlamaForCausalLM,
    input_ids_BT: Tensor,
    position_ids_BT: Tensor,
    layout: DocumentLayout,
    label_index_N: Tensor,
    label_ids_N: Tensor,
) -> Tensor:
    """Summed cross-entropy of one micro-batch, fp32 scalar. ValueError for a model outside `patched`."""
    if "forward" not in vars(llama.model):
        raise ValueError("packed_loss_sum needs the model inside `patched(model)`")
    output = llama.model(input_ids=input_ids_BT, position_ids=position_ids_BT, use_cache=False, layout=layout)
    hidden_TH = output.last_hidden_state.flatten(0, 1)
    return linear_cross_entropy(hidden_TH, llama.lm_head.weight, label_index_N, label_ids_N)


def rope_tables(llama_model: LlamaModel, position_ids_BT: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin, fp32 (fp64 for an fp64 model) [B, T, D], for the positions; the stock code rounds them to the
    model's dtype.
    """
    dtype = torch.promote_types(llama_model.norm.weight.dtype, torch.float32)
    return llama_model.rotary_emb(torch.empty((), dtype=dtype, device=position_ids_BT.device), position_ids_BT)


def apply_rope(x_BHTD: Tensor, cos_BTD: Tensor, sin_BTD: Tensor) -> Tensor:
    """Rotates the two halves of each head by its position's angle, computed in the tables' dtype, rounded once."""
    x1, x2 = x_BHTD.to(cos_BTD.dtype).chunk(2, dim=-1)
    rotated = torch.cat((-x2, x1), dim=-1)
    return (x_BHTD * cos_BTD[:, None] + rotated * sin_BTD[:, None]).to(x_BHTD.dtype)


def _check_signature(module: nn.Module) -> None:
    cls = LlamaModel if isinstance(module, LlamaModel) else LlamaAttention
    missing = _EXPECTED_PARAMETERS[cls] - set(inspect.signature(cls.forward).parameters)
    if missing or "forward" in vars(module):
        reason = f"lacks {', '.join(sorted(missing))}" if missing else "is replaced already"
        raise ValueError(
            f"{cls.__name__}.forward {reason}; packloop knows transformers 5.17 to 5.23 and patches a model once"
        )


def _replace_forward(module: nn.Module, forward) -> None:
    module.forward = MethodType(forward, module)


def _model_forward(stock_forward, recompute_layers: int):
    def forward(
        self: LlamaModel, input_ids=None, position_ids=None, *args, layout: DocumentLayout | None = None, **kwargs
    ):
        if layout is None:
            return stock_forward(input_ids, *args, position_ids=position_ids, **kwargs)
        hidden_BTH = self.embed_tokens(input_ids)
        tables = rope_tables(self, position_ids)
        for index, layer in enumerate(self.layers):
            arguments = {"position_embeddings": tables, "layout": layout}
            if index < recompute_layers and torch.is_grad_enabled():
                hidden_BTH = checkpoint(layer, hidden_BTH, use_reentrant=False, **arguments)
            else:
                hidden_BTH = layer(hidden_BTH, **arguments)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_BTH))

    return forward


def _attention_forward(stock_forward, attend: AttentionFunction):
    def forward(
        self: LlamaAttention,
        hidden_states: Tensor,
        position_embeddings=None,
        attention_mask=None,
        past_key_values=None,
        layout: DocumentLayout | None = None,
        **kwargs,
    ):
        if layout is None:
            return stock_forward(hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs)
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q_BHTD = self.q_proj(hidden_states).view(shape).transpose(1, 2)
        k_BKTD = self.k_proj(hidden_states).view(shape).transpose(1, 2)
        v_BKTD = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        q_BHTD, k_BKTD = apply_rope(q_BHTD, *position_embeddings), apply_rope(k_BKTD, *position_embeddings)
        out_BHTD = attend(q_BHTD, k_BKTD, v_BKTD, layout, self.scaling)
        return self.o_proj(out_BHTD.transpose(1, 2).flatten(-2)), None

    return forward
