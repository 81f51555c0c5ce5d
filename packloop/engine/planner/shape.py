"""A model with its adapter as numbers alone: what predictions need, read from configurations without any weight."""

from __future__ import annotations

from dataclasses import dataclass, replace

from transformers import LlamaConfig

from packloop.config import LoraConfig, ModelConfig, RunConfig
from packloop.errors import ConfigError

# Of bitsandbytes: weights that share a scale, scales that share one of their own, entries of the scales' code.
_BLOCK_WEIGHTS, _BLOCK_SCALES, _SCALE_CODE = 64, 256, 256
# As `kernels.base_weights`: adapters lie beside the weight where their columns keep its rows aligned.
_RANK_ALIGNMENT = 8
_FP32_BYTES = 4


@dataclass(frozen=True)
class GroupShape:
    """Linear layers that share an input. ranks: of each member's adapter, 0 without.

    extends: whether the adapters lie beside the dequantised weight, in the columns that are `spare`.
    """

    name: str
    in_features: int
    out_features: tuple[int, ...]
    ranks: tuple[int, ...]
    extends: bool

    @property
    def num_outputs(self) -> int:
        return sum(self.out_features)

    @property
    def num_ranks(self) -> int:
        return sum(self.ranks)

    @property
    def spare(self) -> int:
        return self.num_ranks if self.extends else 0

    @property
    def weights(self) -> int:
        return self.num_outputs * self.in_features

    @property
    def buffer_elements(self) -> int:
        """Of the dequantised weight with room for the adapters beside it."""
        return (self.num_outputs + self.spare) * (self.in_features + self.spare)

    @property
    def adapter_elements(self) -> int:
        pairs = zip(self.out_features, self.ranks, strict=True)
        return sum(rank * (self.in_features + outputs) for outputs, rank in pairs)


@dataclass(frozen=True)
class ModelShape:
    """A Llama, how its base is held, and its adapters. groups: of one layer, in the order of the forward pass.

    gated: whether `kernels.gated` asks for SwiGLU in the products around it, which not every shape allows.
    """

    num_layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    is_tied: bool
    itemsize: int
    is_nf4: bool
    double_quant: bool
    dropout: float
    groups: tuple[GroupShape, ...]
    gated: bool = False

    @classmethod
    def of(cls, architecture: LlamaConfig, model: ModelConfig, lora: LoraConfig) -> ModelShape:
        """ConfigError for a target that names no linear layer, or a model without frozen base and adapters."""
        if not lora.enabled:
            raise ConfigError(
                "lora.enabled=false: predictions are for adapters on a frozen base; use lora.enabled=true"
            )
        hidden, intermediate = architecture.hidden_size, architecture.intermediate_size
        heads, kv_heads, head_dim = heads_of(architecture)
        members = {
            "qkv": (hidden, {"q_proj": heads * head_dim, "k_proj": kv_heads * head_dim, "v_proj": kv_heads * head_dim}),
            "o": (heads * head_dim, {"o_proj": hidden}),
            "gate_up": (hidden, {"gate_proj": intermediate, "up_proj": intermediate}),
            "down": (intermediate, {"down_proj": hidden}),
        }
        names = [name for _, outputs in members.values() for name in outputs]
        targets = names if lora.target_modules == "all-linear" else lora.target_modules
        if unknown := set(targets) - set(names):
            raise ConfigError(
                f"lora.target_modules={sorted(unknown)} match no layer of the model; it has {', '.join(sorted(names))}"
            )
        is_nf4 = model.quantization == "nf4"
        groups = []
        for name, (in_features, outputs) in members.items():
            ranks = tuple(lora.r if member in targets else 0 for member in outputs)
            extends = is_nf4 and sum(ranks) > 0 and sum(ranks) % _RANK_ALIGNMENT == 0
            groups.append(GroupShape(name, in_features, tuple(outputs.values()), ranks, extends))
        return cls(
            num_layers=architecture.num_hidden_layers,
            hidden=hidden,
            intermediate=intermediate,
            vocabulary=architecture.vocab_size,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            is_tied=bool(architecture.tie_word_embeddings),
            itemsize=2 if model.dtype == "bfloat16" else 4,
            is_nf4=is_nf4,
            double_quant=model.double_quant,
            dropout=lora.dropout,
            groups=tuple(groups),
        )

    @classmethod
    def of_run(cls, architecture: LlamaConfig, config: RunConfig) -> ModelShape:
        return replace(cls.of(architecture, config.model, config.lora), gated=config.kernels.gated == "quack")

    def group(self, name: str) -> GroupShape:
        return next(group for group in self.groups if group.name == name)

    @property
    def is_gated(self) -> bool:
        """Whether gate and up are interleaved, as `kernels.patch` decides."""
        gate_up = self.group("gate_up")
        aligned = self.hidden % 8 == 0 and self.intermediate % 8 == 0 and gate_up.num_ranks % _RANK_ALIGNMENT == 0
        return self.gated and self.is_nf4 and self.itemsize == 2 and aligned

    @property
    def gates_backward(self) -> bool:
        """As `FusedLayer.gates_backward`."""
        down = self.group("down")
        return self.is_gated and (down.num_ranks == 0 or (down.extends and not self.dropout))

    @property
    def attended(self) -> int:
        """Features of the attention's output."""
        return self.num_heads * self.head_dim

    @property
    def layer_weights(self) -> int:
        """Elements of a layer's linear weights."""
        return sum(group.weights for group in self.groups)

    @property
    def layer_weight_bytes(self) -> int:
        """Of a layer's linear weights as they are held: NF4 with its scales, or dense."""
        if not self.is_nf4:
            return self.layer_weights * self.itemsize
        return sum(self._nf4_bytes(outputs * g.in_features) for g in self.groups for outputs in g.out_features)

    def _nf4_bytes(self, elements: int) -> int:
        scales = -(-elements // _BLOCK_WEIGHTS)
        packed = elements // 2
        if not self.double_quant:
            return packed + scales * _FP32_BYTES
        return packed + scales + (-(-scales // _BLOCK_SCALES) + _SCALE_CODE) * _FP32_BYTES

    @property
    def cache_bytes(self) -> int:
        """Of one layer's dequantised weights; 0 for a dense base, which needs none."""
        return sum(group.buffer_elements for group in self.groups) * self.itemsize if self.is_nf4 else 0

    @property
    def adapter_elements(self) -> int:
        """Trained parameters."""
        return self.num_layers * sum(group.adapter_elements for group in self.groups)

    @property
    def adapter_copy_bytes(self) -> int:
        """Of the adapters' copies in the compute dtype: A stacked, B block diagonal with its zeros."""
        elements = sum(g.num_ranks * (g.in_features + g.num_outputs) for g in self.groups)
        return self.num_layers * elements * self.itemsize

    @property
    def end_bytes(self) -> int:
        """Of the embedding, the head and the norms."""
        matrices = (1 if self.is_tied else 2) * self.vocabulary * self.hidden
        return (matrices + (2 * self.num_layers + 1) * self.hidden) * self.itemsize


def heads_of(architecture: LlamaConfig) -> tuple[int, int, int]:
    """(query heads, key/value heads, features of a head)."""
    heads = architecture.num_attention_heads
    head_dim = getattr(architecture, "head_dim", None) or architecture.hidden_size // heads
    return heads, architecture.num_key_value_heads, head_dim
