"""Writes the checkpoint that the peers load: python -m benchmarks.peers.shapes SHAPE OUTPUT --tokenizer DIR"""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers import AutoTokenizer, LlamaConfig

from packloop.bench import synthetic

# Its vocabulary is its tokenizer's.
TINY = "tiny"
SHAPES = tuple(synthetic.SHAPES)


def shape_config(shape: str, tokenizer: str) -> LlamaConfig:
    """The configuration of a named shape; tokenizer: a directory."""
    vocab_size = len(AutoTokenizer.from_pretrained(tokenizer)) if shape == TINY else None
    return synthetic.shape_config(shape, vocab_size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("output", type=Path)
    parser.add_argument("--tokenizer", required=True, help="directory of the tokenizer to save beside the weights")
    arguments = parser.parse_args()
    config = shape_config(arguments.shape, arguments.tokenizer)
    synthetic.save_random_checkpoint(config, arguments.output, arguments.tokenizer)


if __name__ == "__main__":
    main()
