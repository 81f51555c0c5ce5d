"""What the fused decoder layer keeps for backward, in bytes."""

from __future__ import annotations

from packloop.kernels.decoder_layer import FusedLayer


def activation_bytes(layer: FusedLayer, num_slots: int) -> dict[str, int]:
    """Bytes that `products` keeps beside x1, and that `all` keeps beside `products`, of one layer."""
    features, itemsize = layer.norm1_H.numel(), layer.norm1_H.element_size()
    outputs = {group: sum(adapters.out_features) for group, adapters in layer.groups.items()}
    ranks = sum(adapters.a_RH.shape[0] for adapters in layer.groups.values() if adapters.a_RH is not None)
    attended = layer.num_heads * layer.head_dim
    gate_up = outputs["gate_up"] + layer.spare_columns("gate_up")
    columns = outputs["qkv"] + attended + features + gate_up + ranks
    statistics = (2 + layer.num_heads) * 4  # two 1 / rms and a log-sum-exp a head, fp32
    inputs = {"qkv": features, "gate_up": features, "down": outputs["gate_up"] // 2}
    if layer.is_gated:
        inputs.pop("down")
    kept = sum(width + layer.spare_columns(group) for group, width in inputs.items() if layer.has_adapter(group))
    return {"products": num_slots * (columns * itemsize + statistics), "inputs": num_slots * kept * itemsize}
