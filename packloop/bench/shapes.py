"""Model shapes that have a name, for benchmarks on random weights."""

from __future__ import annotations

import json
from pathlib import Path

from packloop.errors import ConfigError, InputError

SHAPES = {
    "llama2-7b": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    },
    "llama3-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
    },
    "tinyllama-1.1b": {
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
    },
    # For trying a benchmark on a CPU, never for measuring.
    "tiny": {
        "vocab_size": 32000,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    },
}


def check_shape(shape: str) -> None:
    """ConfigError unless `shape` is named here or is a model's directory, InputError unless that is a Llama's."""
    if shape in SHAPES:
        return
    path = Path(shape) / "config.json"
    if not path.is_file():
        raise ConfigError(
            f"model shape {shape!r} is neither {', '.join(SHAPES)} nor a directory with a model's config.json"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"model shape {shape!r}: its config.json cannot be read: {error}") from None
    kind = values.get("model_type") if isinstance(values, dict) else None
    if kind != "llama":
        raise InputError(f"model shape {shape!r} is of model_type {kind!r}; 'llama' is needed")
