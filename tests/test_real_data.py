"""Real rows and the Llama 2 tokenizer through stats, preview and training, by the tutorial's recipe and overrides."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from packloop.bench.cost import TUTORIAL_DATA, TUTORIAL_TOKENS_PER_ROW
from packloop.cli import app
from packloop.data.prompts import get_template

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "llama2-7b-dolly.yaml"
# File, columns that the template's fields are read from, number of rows.
SOURCES = {
    "alpaca": ("alpaca_800.json", {"response": "output"}, 800),
    "dolly": ("dolly_100.jsonl", {}, 100),
}


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory, llama2_tokenizer) -> Path:
    """A random Llama of one layer with Llama 2's vocabulary and tokenizer."""
    directory = tmp_path_factory.mktemp("tiny-llama")
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    llama2_tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(params=list(SOURCES))
def real(request, shared_data, llama2_tokenizer):
    """(path, columns, tokens of each row): the tokens as the tokenizer alone makes them of prompt and response."""
    file, columns, num_rows = SOURCES[request.param]
    path = shared_data / file
    text = path.read_text(encoding="utf-8")
    rows = json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]
    assert len(rows) == num_rows
    template = get_template("instruction_from_response")
    row_tokens = []
    for row in rows:
        fields = {name: row[columns.get(name, name)] for name in template.fields}
        document = template.render_prompt(fields) + template.render_response(fields)
        row_tokens.append(len(llama2_tokenizer(document)["input_ids"]) + 1)  # it adds BOS, and EOS follows
    return path, columns, row_tokens


def command(*arguments: object, base: Path, source: Path, columns: dict[str, str], **options: object) -> str:
    """Standard output of `packloop ARGUMENTS RECIPE` with the base, the rows and further settings as overrides."""
    settings = {"model.name_or_path": base, "data.source": source, "data.columns": json.dumps(columns)}
    overrides = [f"{key}={value}" for key, value in {**settings, **options}.items()]
    result = CliRunner(env={"COLUMNS": "120"}).invoke(app, [*map(str, arguments), str(RECIPE), *overrides])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def test_stats_count_every_token(real, tiny_llama):
    path, columns, row_tokens = real
    shown = command("data", "stats", base=tiny_llama, source=path, columns=columns)
    num_tokens, num_packs = sum(row_tokens), math.ceil(sum(row_tokens) / 2048)
    words = " ".join(shown.split())
    assert f"{len(row_tokens)} rows {len(row_tokens)} documents {num_tokens:,} tokens" in words
    # Each pack but its first token, which nothing precedes.
    assert f"{num_tokens - num_packs:,} label tokens" in words
    assert f"{num_packs} packs" in words
    assert f"min {min(row_tokens)}" in words
    assert f"max {max(row_tokens):,}" in words


def test_preview_shows_the_prompt_and_what_counts(real, tiny_llama):
    path, columns, _ = real
    options = {"base": tiny_llama, "source": path, "columns": columns, "data.packing": "bfd"}
    shown = command("data", "preview", "--pack=1", **options, **{"data.loss_on": "response", "data.max_length": 1024})
    prompt, _, response = shown.partition("document 0: row")[2].partition("### Response:")
    assert "<s> ### Instruction:" in " ".join(prompt.split())
    assert "⟦" not in prompt
    assert response.lstrip().startswith("⟦")
    assert response.partition("⟧")[0].rstrip().endswith("</s>")


@pytest.mark.parametrize("packing", ["wrapped", "bfd", "none"])
def test_trains(real, tiny_llama, tmp_path, packing):
    path, columns, _ = real
    settings = {
        "data.packing": packing,
        "data.max_length": 256,
        "train.output_dir": tmp_path / "run",
        "train.per_device_train_batch_size": 2,
        "train.gradient_accumulation_steps": 1,  # of 32,000 logits in bf16 a CPU makes a few hundred rows a second
        "train.max_steps": 2,
        "checkpoint.every": "never",
    }
    command("train", base=tiny_llama, source=path, columns=columns, **settings)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [json.loads(line) for line in lines]
    assert [step["step"] for step in steps] == [1, 2]
    for step in steps:
        # A random model is about as good as a guess among 32,000 tokens.
        assert step["loss"] == pytest.approx(math.log(32000), rel=0.1)
        assert 0 < step["label_tokens"] < step["real_tokens"] <= step["slot_tokens"] <= 2 * 256
        assert step["grad_norm"] > 0
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()


def test_the_tutorials_tokens_per_row_are_what_the_sample_has(shared_data, llama2_tokenizer):
    lines = (shared_data / "dolly_100.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    prompt = (
        "### Instruction:\nUse the Input below to create an instruction, which could have been used to generate the "
        "input using an LLM. \n\n### Input:\n{response}\n\n### Response:\n{instruction}\n"
    )
    num_tokens = [
        len(llama2_tokenizer(prompt.format(**row))["input_ids"]) + 1 for row in rows
    ]  # BOS is added, EOS is not
    error = statistics.stdev(num_tokens) / math.sqrt(len(rows))
    assert round(statistics.mean(num_tokens)) == TUTORIAL_DATA.tokens_per_row
    assert f"sample of {len(rows)} rows" in TUTORIAL_TOKENS_PER_ROW
    assert f"standard error is {error:.0f}" in TUTORIAL_TOKENS_PER_ROW
