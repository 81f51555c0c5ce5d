"""Makes the bundled tokenizer and base model with packloop's own loop, into `packloop/bundled/model`.

    python scripts/make_bundled_model.py                                  from random weights; minutes on a GPU
    python scripts/make_bundled_model.py --start packloop/bundled/model --rows 6000 \\
        train.num_train_epochs=1 train.per_device_train_batch_size=12 train.learning_rate=1e-3

The settings are those of `recipes/bundled-base.yaml`, and whatever SECTION.KEY=VALUE arguments replace. With `--start`
the tokenizer stays as it is and training goes on from a model's weights, on text drawn with another seed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path

import torch
from make_bundled_base_text import ENTITY_WORDS, base_rows
from make_bundled_data import bundled_examples
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from packloop.config import load_config
from packloop.data.prompts import get_template
from packloop.engine.loop import train

ROOT = Path(__file__).resolve().parents[1]
MODEL_DIRECTORY = ROOT / "packloop" / "bundled" / "model"
NUM_ROWS = 250_000
SEED = 7
PAD, BOS, EOS = SPECIAL_TOKENS = ("<pad>", "<s>", "</s>")

ARCHITECTURE = {
    "vocab_size": 2048,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.05,
    "tie_word_embeddings": True,
}

CARD = """---
license: apache-2.0
language: en
library_name: transformers
---

# packloop's bundled base model

A Llama of 1.4 million parameters with a byte-level BPE tokenizer of 2,048 tokens, for packloop's demo and tests. It
knows short everyday texts in English (emails, notes, reminders, invitations, notices, posts, reviews, announcements),
and can find, copy and repeat what stands in them. It has never been shown a text with the request to write its
instruction; `make demo` teaches it that.

- **Made by** `scripts/make_bundled_model.py` with packloop's own loop (`lora.enabled=false`) and the settings of
  `recipes/bundled-base.yaml`, from random weights; then once more, with `--start` as the script's help shows, on fresh
  text in which orders are worded in a few more ways. A new run of the script gives a model like it, not the same bytes.
- **Text**: drawn by the script from a grammar that was written for this project; nothing else. No combination of kind,
  entity and subject that the held-out rows of the bundled data use is in it.
- **Weights** are stored in bfloat16. Sequences had up to 256 tokens.
- **Limits**: outside these kinds of text, and with names that its vocabulary lacks, it writes nonsense. It knows no
  facts.
"""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE: any text comes back exactly. BOS is put in front, as Llama's tokenizers do."""
    template = get_template("instruction_from_response")
    rows = [example.row() for example in bundled_examples()[0]]
    texts = [template.render_prompt(row) + template.render_response(row) for row in rows]
    texts += [row["text"] for row in base_rows(500, SEED, set())]
    # A name that is one token is found and copied in one step, which is much of what so small a model can do.
    texts += [f" {' '.join(ENTITY_WORDS)}"] * 60
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=ARCHITECTURE["vocab_size"],
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        model_max_length=ARCHITECTURE["max_position_embeddings"],
    )


def write_start(directory: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """A Llama of random weights, and its tokenizer."""
    config = LlamaConfig(
        **ARCHITECTURE,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(SEED)
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def main(arguments: argparse.Namespace) -> None:
    config = load_config(ROOT / "recipes" / "bundled-base.yaml", arguments.overrides)
    work = Path(config.train.output_dir).parent
    if work.exists():
        shutil.rmtree(work)
    work.mkdir(parents=True)
    if arguments.start:
        shutil.copytree(arguments.start, work / "start")
        tokenizer = AutoTokenizer.from_pretrained(arguments.start)
        for how_it_was_loaded in ("is_local", "local_files_only"):
            tokenizer.init_kwargs.pop(how_it_was_loaded, None)
    else:
        tokenizer = make_tokenizer()
        write_start(work / "start", tokenizer)
    held_out = {example.combination for example in bundled_examples()[1]}
    with (work / "text.jsonl").open("w", encoding="utf-8", newline="\n") as file:
        for row in base_rows(arguments.rows, SEED + bool(arguments.start), held_out):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    start = time.perf_counter()
    train(config)
    print(f"trained in {(time.perf_counter() - start) / 60:.1f} minutes")
    # bfloat16: NF4 rounds the linear layers far more coarsely, and two bytes a weight are small to carry.
    model = LlamaForCausalLM.from_pretrained(work / "run", dtype=torch.bfloat16)
    model.save_pretrained(MODEL_DIRECTORY)
    tokenizer.save_pretrained(MODEL_DIRECTORY)
    (MODEL_DIRECTORY / "README.md").write_text(CARD, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start", type=Path, help="go on from this model instead of random weights")
    parser.add_argument("--rows", type=int, default=NUM_ROWS, help="texts to train on")
    parser.add_argument("overrides", nargs="*", metavar="SECTION.KEY=VALUE")
    main(parser.parse_args())
