"""Writes the checkpoint that the peers load: python -m benchmarks.peers.shapes SHAPE OUTPUT --tokenizer DIR"""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers import AutoTokenizer, LlamaConfig

from benchmarks import synthetic

# Small enough for a CPU: to try the chain of processes, never to measure. Its vocabulary is its tokenizer's.
TINY = "tiny"
_TINY_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}
SHAPES = (*synthetic.SHAPES, TINY)


def shape_config(shape: str, tokenizer: str) -> LlamaConfig:
    """The configuration of a named shape; tokenizer: a directory."""
    if shape == TINY:
        synthetic.SHAPES[TINY] = {"vocab_size": len(AutoTokenizer.from_pretrained(tokenizer)), **_TINY_SIZES}
    return synthetic.shape_config(shape)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("output", type=Path)
    parser.add_argument("--tokenizer", required=True, help="directory of the tokenizer to save beside the weights")
    arguments = parser.parse_args()
    shape_config(arguments.shape, arguments.tokenizer)
    synthetic.save_random_checkpoint(arguments.shape, arguments.output, arguments.tokenizer)


if __name__ == "__main__":
    main()
