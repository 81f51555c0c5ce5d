"""Every edit of the Hugging Face Llama, as one context manager.

Inside `patched(model)` two kinds of methods of that one instance are ours: `LlamaModel.forward`, which passes the
documents' layout to the layers, builds fp32 RoPE tables, recomputes activations and, with `fused`, runs whole decoder
layers as one autograd function each; and `LlamaAttention.forward`, which calls the chosen attention. Both fall
through to the stock method when called without a layout (generation, KV cache). Nothing is edited on a class, so a
second model is untouched, and leaving the context, also by an exception, restores the instance.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import MethodType

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaForCausalLM, LlamaModel

from packloop.kernels.adapters import AdapterCopies
from packloop.kernels.attention import Attention, CountedAttention, DocumentLayout, load_backend
from packloop.kernels.base_weights import GroupWeights, can_interleave
from packloop.kernels.decoder_layer import GROUPS, Batch, FusedLayer, decoder_layer
from packloop.kernels.extended_weight import ExtendedWeight
from packloop.kernels.gated import library_for
from packloop.kernels.linear_cross_entropy import linear_cross_entropy
from packloop.kernels.llama_rope import apply_rope, inverse_frequencies, rope_tables, scaled_length
from packloop.kernels.lora_linear import Dropout, Lora
from packloop.kernels.operations import AUTO, Operations
from packloop.kernels.peft_layers import AdapterWatch, adapter_of, class_path, dropout_of, why_not_plain
from packloop.kernels.rms_norm import add_rms_norm
from packloop.kernels.rope import Rotation

# Of a model, for `kernels.gated=quack`.
NEEDED_OF_MODEL = "needs bfloat16, an NF4 base and, of gate and up, sizes and a sum of adapters' ranks divisible by 8"
# The stock parameters that the replacements rely on. transformers 5.17 to 5.23 have them.
_EXPECTED_PARAMETERS = {
    LlamaModel: {"input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "use_cache"},
    LlamaAttention: {"hidden_states", "position_embeddings", "attention_mask", "past_key_values"},
}
_GROUP_MEMBERS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}


def find_llama(model: nn.Module) -> LlamaForCausalLM:
    """The `LlamaForCausalLM` in `model` or in its PEFT wrapper. ValueError for another architecture."""
    for module in model.modules():
        if isinstance(module, LlamaForCausalLM):
            return module
    raise ValueError(f"a LlamaForCausalLM is needed, given {type(model).__name__}")


@contextmanager
def patched(
    model: nn.Module,
    *,
    attention: str,
    recompute_layers: int = 0,
    fused: bool = False,
    cached_layers: int = 0,
    keep_inputs_layers: int = 0,
    operations: Operations = AUTO,
) -> Iterator[LlamaForCausalLM]:
    """Replaces the forward methods of `model` for the duration of the context and yields the Llama inside it.

    attention: a name that `attention.load_backend` knows. recompute_layers: how many layers, from the first, keep
    only their input and recompute the rest in the backward pass. fused: whole layers as one function; ValueError
    where `why_not_fused` gives a reason. Fused only: cached_layers: how many layers, from the first, keep their NF4
    weights dequantised; keep_inputs_layers: how many, from the last, keep the products' inputs that backward else
    rebuilds. operations: by which implementation each of them runs; of stock layers only the head's. Raises ValueError
    where a stock signature is not the one expected, or where RoPE's frequencies were cast to fewer than 32 bits.
    """
    llama = find_llama(model)
    backend = load_backend(attention)
    attentions = [module for module in llama.modules() if isinstance(module, LlamaAttention)]
    if not attentions:
        raise ValueError("no LlamaAttention found in the model, so there is nothing to replace")
    for module in (llama.model, *attentions):
        _check_signature(module)
    frequencies = inverse_frequencies(llama.model.rotary_emb, None).dtype
    if frequencies not in (torch.float32, torch.float64):
        raise ValueError(
            f"RoPE's frequencies are {frequencies}, which loses the angles of far positions; float32 is needed: give "
            "from_pretrained the dtype instead of casting the loaded model"
        )
    if fused:
        if reason := why_not_fused(model):
            raise ValueError(f"kernels.layer=fused: {reason}; use kernels.layer=stock")
        keeps = _kept_of_layers(len(llama.model.layers), recompute_layers, keep_inputs_layers)
        counted = [CountedAttention(attention, backend) for _ in llama.model.layers]
        run_layers = FusedLayers(llama.model, counted, keeps, cached_layers, operations)
    else:
        run_layers = _StockLayers(recompute_layers)
    try:
        _replace_forward(llama.model, _model_forward(llama.model.forward, run_layers, operations))
        for module in attentions:
            _replace_forward(module, _attention_forward(module.forward, CountedAttention(attention, backend)))
        yield llama
    finally:
        for module in (llama.model, *attentions):
            vars(module).pop("forward", None)  # something else may have removed it


def _kept_of_layers(num_layers: int, recompute_layers: int, keep_inputs_layers: int) -> list[str]:
    return [
        "input" if index < recompute_layers else "all" if index >= num_layers - keep_inputs_layers else "products"
        for index in range(num_layers)
    ]


def why_not_fused(model: nn.Module) -> str | None:
    """None where the fused layer computes what the model does, otherwise what it has that the fused layer lacks."""
    llama = find_llama(model)
    config = llama.config
    if any(p.requires_grad for name, p in model.named_parameters() if "lora_" not in name):
        return "it trains adapters only, and this model trains base weights"
    if config.attention_bias or config.mlp_bias:
        return "its linear layers have no bias, and this model's have"
    if config.hidden_act != "silu":
        return f"its activation is silu, and this model's is {config.hidden_act}"
    # The embedding is called as it is.
    edited = {name: module for name, module in llama.model.named_modules() if not name.startswith("embed_tokens")}
    if reason := why_not_plain(edited, _linears_of(llama.model)):
        return reason
    dropouts = {dropout_of(module) for module in _linears_of(llama.model).values()} - {None}
    if len(dropouts) > 1:
        return f"all its adapters have one dropout, and this model's have {', '.join(map(str, sorted(dropouts)))}"
    wide = torch.promote_types(llama.model.norm.weight.dtype, torch.float32)
    for layer in llama.model.layers:
        for members in _GROUP_MEMBERS.values():
            adapters = [adapter_of(layer.get_submodule(name)) for name in members]
            masters = [weight for lora in adapters if lora for weight in (lora.a_rH, lora.b_Or)]
            if any(weight.dtype != wide or not weight.is_contiguous() for weight in masters):
                return f"adapters are contiguous and {str(wide).removeprefix('torch.')}, and this model's are not"
            if len({lora.scaling for lora in adapters if lora}) > 1:
                return "adapters on one input share a scaling, and this model's differ"
    return None


def why_not_interleaved(model: nn.Module) -> str | None:
    """None where gate and up can lie in turns as `kernels.gated=quack` needs them, otherwise what stands against it."""
    llama = find_llama(model)
    dtype = llama.model.norm.weight.dtype
    if dtype != torch.bfloat16:
        return f"needs model.dtype=bfloat16, given {str(dtype).removeprefix('torch.')}"
    if not any(_interleaves(*_linears(layer, "gate_up")) for layer in llama.model.layers):
        return NEEDED_OF_MODEL
    return None


def packed_loss_sum(
    llama: LlamaForCausalLM,
    input_ids_BL: Tensor,
    position_ids_BL: Tensor,
    layout: DocumentLayout,
    label_index_N: Tensor,
    label_ids_N: Tensor,
    label_weights_N: Tensor | None = None,
) -> Tensor:
    """Summed cross-entropy of one micro-batch, fp32 scalar.

    ValueError for a model outside `patched`, and for one with an adapter on its head.

    label_weights_N: for how many documents each target counts; None: one.
    """
    operations = getattr(llama.model.forward, "operations", None)
    if operations is None:
        raise ValueError("packed_loss_sum needs the model inside `patched(model)`")
    if hasattr(llama.lm_head, "base_layer"):
        raise ValueError(
            f"packed_loss_sum takes the head's weight alone and would ignore the adapter on lm_head, which is a "
            f"{class_path(llama.lm_head)}; leave lm_head out of the adapter's target_modules"
        )
    output = llama.model(input_ids=input_ids_BL, position_ids=position_ids_BL, use_cache=False, layout=layout)
    hidden_TH = output.last_hidden_state.flatten(0, 1)
    by = operations.cross_entropy
    return linear_cross_entropy(hidden_TH, llama.lm_head.weight, label_index_N, label_ids_N, label_weights_N, by=by)


class _StockLayers:
    """The stock decoder layers, one after the other, some of them under activation checkpointing."""

    calls_attention_modules = True

    def __init__(self, recompute_layers: int):
        self._recompute_layers = recompute_layers

    def attentions(self, llama_model: LlamaModel) -> list[Attention | None]:
        """What attends in each layer; None where its forward is not the replacement."""
        return [getattr(layer.self_attn.forward, "attend", None) for layer in llama_model.layers]

    def __call__(self, llama_model: LlamaModel, hidden_BLH: Tensor, position_ids_BL: Tensor, layout: DocumentLayout):
        tables = rope_tables(llama_model, position_ids_BL, layout.num_real_positions)
        arguments = {"position_embeddings": tables, "layout": layout}
        for index, layer in enumerate(llama_model.layers):
            if index < self._recompute_layers and torch.is_grad_enabled():
                hidden_BLH = checkpoint(layer, hidden_BLH, use_reentrant=False, **arguments)
            else:
                hidden_BLH = layer(hidden_BLH, **arguments)
        return llama_model.norm(hidden_BLH)


class FusedLayers:
    """The same layers as `decoder_layer` runs them, with the last residual sum fused into the final norm.

    Where PEFT has disabled the adapters, the layers run without. attention: one for all layers, or one for each.
    """

    calls_attention_modules = False

    def __init__(
        self,
        llama_model: LlamaModel,
        attention: Attention | list[Attention],
        keeps: list[str],
        cached_layers: int,
        operations: Operations = AUTO,
    ):
        self._operations = operations
        self._watch = AdapterWatch(_linears_of(llama_model))
        self._bare_layers: list[FusedLayer] | None = None
        self._tables: tuple[Tensor, Tensor] | None = None
        self._scaled_length: int | None = None  # of RoPE in the tables
        norm = llama_model.norm.weight
        self._adapters = AdapterCopies(norm.dtype, norm.device, operations.lora)
        dropouts = (dropout_of(module) for module in _linears_of(llama_model).values())
        self._dropout_p = next((p for p in dropouts if p is not None), 0.0)
        self.layers = []
        attentions = attention if isinstance(attention, list) else [attention] * len(llama_model.layers)
        for index, layer in enumerate(llama_model.layers):
            fused = _fuse(layer, index, attentions[index], self._adapters, keeps[index], operations)
            if index < cached_layers:
                self._cache(layer, fused)
            self.layers.append(fused)

    def __call__(self, llama_model: LlamaModel, hidden_BLH: Tensor, position_ids_BL: Tensor, layout: DocumentLayout):
        try:
            adapted = self._watch.are_enabled()
        except ValueError as error:
            remedy = "undo that or enter `patched` anew, or use kernels.layer=stock"
            raise ValueError(f"kernels.layer=fused: {error}; {remedy}") from None
        if adapted:
            self._adapters.refresh()
        batch = self.batch(llama_model, position_ids_BL, layout, adapted=adapted)
        residual_TH, update_TH = hidden_BLH.flatten(0, 1), None
        for layer in self.layers if adapted else self._without_adapters(llama_model):
            residual_TH, update_TH = decoder_layer(residual_TH, update_TH, layer, batch)
        norm = llama_model.norm
        by = self._operations.rms_norm
        _, normed_TH = add_rms_norm(residual_TH, update_TH, norm.weight, norm.variance_epsilon, by=by)
        return normed_TH.view(hidden_BLH.shape)

    def attentions(self, llama_model: LlamaModel) -> list[Attention | None]:
        """What attends in each layer."""
        return [layer.attention for layer in self.layers]

    def _without_adapters(self, llama_model: LlamaModel) -> list[FusedLayer]:
        """Layers of their own, since a backward pass that is yet to come may need what the others hold."""
        if self._bare_layers is None:
            self._bare_layers = [
                _fuse(layer, index, fused.attention, self._adapters, fused.keeps, self._operations, adapted=False)
                for index, (layer, fused) in enumerate(zip(llama_model.layers, self.layers, strict=True))
            ]
        return self._bare_layers

    def _cache(self, layer: nn.Module, fused: FusedLayer) -> None:
        for name, weights in fused.weights.items():
            kept = weights.keep()
            if isinstance(kept, ExtendedWeight):
                loras = [adapter_of(layer.get_submodule(member)) for member in _GROUP_MEMBERS[name]]
                self._adapters.follow(kept, fused.groups[name], loras)

    def batch(
        self, llama_model: LlamaModel, position_ids_BL: Tensor, layout: DocumentLayout, *, adapted: bool = True
    ) -> Batch:
        """What the layers share in one micro-batch; in training mode it draws a seed for dropout masks."""
        dropout = None
        if adapted and llama_model.training and self._dropout_p > 0.0:
            # From torch's CPU generator, which checkpoints carry: the mask of a resumed step is the same one.
            dropout = Dropout(self._dropout_p, int(torch.randint(2**62, ()).item()))
        cos_PD, sin_PD = self._rope_tables(llama_model, layout, position_ids_BL.shape[1])
        distinct = None if self._operations.token_reuse == "none" else layout.distinct
        return Batch(layout, Rotation(cos_PD, sin_PD, position_ids_BL.flatten()), dropout, distinct)

    def _rope_tables(self, llama_model: LlamaModel, layout: DocumentLayout, row: int) -> tuple[Tensor, Tensor]:
        """cos and sin [P, D/2] for positions 0 to P - 1, P a multiple of 128; the last call's where these serve."""
        num_positions = layout.num_positions or row
        length = scaled_length(llama_model.rotary_emb, layout.num_real_positions)
        if self._tables is None or length != self._scaled_length or len(self._tables[0]) < num_positions:
            positions = torch.arange(-(-num_positions // 128) * 128, device=llama_model.norm.weight.device)[None]
            half = slice(None, llama_model.layers[0].self_attn.head_dim // 2)
            cos, sin = rope_tables(llama_model, positions, layout.num_real_positions)
            self._tables = cos[0, :, half].contiguous(), sin[0, :, half].contiguous()
            self._scaled_length = length
        return self._tables


def _fuse(
    layer: nn.Module,
    index: int,
    attention: Attention,
    adapters: AdapterCopies,
    keeps: str,
    operations: Operations,
    *,
    adapted: bool = True,
) -> FusedLayer:
    groups, weights, masters = {}, {}, []
    norm = layer.input_layernorm.weight
    operations = replace(operations, gated=library_for(norm.dtype, norm.device, operations.gated))
    for name in GROUPS:
        bases, loras = _linears(layer, name)
        if not adapted:
            loras = [None] * len(loras)
        members = [base.weight for base in bases]
        gates = operations.gated != "none" and operations.lora != "torch"
        interleaved = name == "gate_up" and gates and _interleaves(bases, loras)
        groups[name] = adapters.group([base.out_features for base in bases], loras, interleaved=interleaved)
        weights[name] = GroupWeights(members, groups[name], norm.dtype, nf4=operations.nf4)
        masters += [master for lora in loras if lora is not None for master in (lora.a_rH, lora.b_Or)]
    attn = layer.self_attn
    return FusedLayer(
        index=index,
        num_heads=attn.config.num_attention_heads,
        num_kv_heads=attn.config.num_key_value_heads,
        head_dim=attn.head_dim,
        eps=layer.input_layernorm.variance_epsilon,
        norm1_H=layer.input_layernorm.weight,
        norm2_H=layer.post_attention_layernorm.weight,
        weights=weights,
        groups=groups,
        masters=tuple(masters),
        attention=attention,
        keeps=keeps,
        operations=operations,
    )


def _linears_of(llama_model: LlamaModel) -> dict[str, nn.Module]:
    """The linear layers that the fused layers run, by their names in the model."""
    members = [member for group in _GROUP_MEMBERS.values() for member in group]
    return {
        f"layers.{index}.{member}": layer.get_submodule(member)
        for index, layer in enumerate(llama_model.layers)
        for member in members
    }


def _linears(layer: nn.Module, group: str) -> tuple[list[nn.Module], list[Lora | None]]:
    """The group's linear layers of the base, and the adapter of each."""
    modules = [layer.get_submodule(member) for member in _GROUP_MEMBERS[group]]
    return [getattr(module, "base_layer", module) for module in modules], [adapter_of(module) for module in modules]


def _interleaves(bases: list[nn.Module], loras: list[Lora | None]) -> bool:
    """Whether gate and up can lie in turns: in one dequantised buffer, of sizes whose rows align to 16 bytes."""
    num_ranks = sum(lora.a_rH.shape[0] for lora in loras if lora is not None)
    aligned = all(size % 8 == 0 for base in bases for size in (base.in_features, base.out_features))
    return aligned and can_interleave([base.weight for base in bases], num_ranks)


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


def _attention_dropouts(llama_model: LlamaModel) -> list[float]:
    """Those that are not 0."""
    found = (getattr(layer.self_attn, "attention_dropout", None) for layer in llama_model.layers)
    return [p for p in found if p]


def _model_forward(stock_forward, run_layers, operations: Operations):
    def forward(
        self: LlamaModel,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        *args,
        layout: DocumentLayout | None = None,
        **kwargs,
    ):
        if layout is None:
            return stock_forward(input_ids, attention_mask, position_ids, *args, **kwargs)
        given = {"attention_mask": attention_mask, **kwargs}
        ignored = [name for name, value in given.items() if value is not None and name != "use_cache"]
        if args or ignored:
            raise ValueError(
                f"layout says which slots see each other; {', '.join(ignored) or 'what else is given'} would be ignored"
            )
        if self.training and (dropouts := _attention_dropouts(self)):
            raise ValueError(
                f"the model's attention_dropout={max(dropouts)} would be ignored, since no attention here has dropout; "
                "to train without, set it to 0 in the model's config.json or in each LlamaAttention"
            )
        hidden_BLH = run_layers(self, self.embed_tokens(input_ids), position_ids, layout)
        return BaseModelOutputWithPast(last_hidden_state=hidden_BLH)

    forward.run_layers, forward.operations = run_layers, operations
    return forward


def _attention_forward(stock_forward, attend: Attention):
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
        q_BHLD = self.q_proj(hidden_states).view(shape).transpose(1, 2)
        k_BKLD = self.k_proj(hidden_states).view(shape).transpose(1, 2)
        v_TKD = self.v_proj(hidden_states).view(shape).flatten(0, 1)
        q_THD = apply_rope(q_BHLD, *position_embeddings).transpose(1, 2).flatten(0, 1)
        k_TKD = apply_rope(k_BKLD, *position_embeddings).transpose(1, 2).flatten(0, 1)
        out_THD = attend(q_THD, k_TKD, v_TKD, layout, self.scaling)
        return self.o_proj(out_THD.flatten(1).view(*hidden_states.shape[:-1], -1)), None

    forward.attend = attend
    return forward
