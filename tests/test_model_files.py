"""A model that cannot be loaded: what is missing, and what provides it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from packloop.config import LoraConfig, ModelConfig
from packloop.engine.model import load_base, load_model, load_tokenizer, resolve_name
from packloop.errors import ConfigError, InputError

BUNDLED = Path(resolve_name("bundled"))
INDEX = "model.safetensors.index.json"


def load(name: str) -> None:
    config = ModelConfig(name_or_path=name, quantization="none", dtype="float32")
    load_tokenizer(config)
    load_base(config, torch.device("cpu"))


@pytest.mark.parametrize(
    ("missing", "added", "message"),
    [
        (["tokenizer.json"], {}, "no tokenizer.json in it; copy that of the base model"),
        (["config.json"], {}, "no config.json in it; model.save_pretrained writes that"),
        (["model.safetensors"], {}, f"neither model.safetensors nor {INDEX} in it; model.save_pretrained writes"),
        (["model.safetensors"], {"pytorch_model.bin": ""}, f"nor {INDEX} in it (it has pytorch_model.bin); "),
        (
            ["model.safetensors"],
            {INDEX: '{"weight_map": {"a": "b.safetensors"}}'},
            f"b.safetensors, which {INDEX} names",
        ),
        (["model.safetensors"], {INDEX: "[]"}, f"{INDEX} cannot be read"),
        ([], {"tokenizer.json": "{"}, "its tokenizer cannot be loaded ("),
    ],
)
def test_what_a_directory_lacks(tmp_path, missing, added, message):
    directory = tmp_path / "model"
    shutil.copytree(BUNDLED, directory)
    for name in missing:
        (directory / name).unlink()
    for name, content in added.items():
        (directory / name).write_text(content)
    with pytest.raises(InputError) as caught:
        load(str(directory))
    assert str(caught.value).startswith(f"model.name_or_path={str(directory)!r}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 1


def test_a_model_with_attention_dropout_is_not_trained_without_it(tmp_path):
    directory = tmp_path / "model"
    shutil.copytree(BUNDLED, directory)
    settings = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(settings | {"attention_dropout": 0.1}))
    load(str(directory))  # for generation
    config = ModelConfig(name_or_path=str(directory), quantization="none", dtype="float32")
    for lora in (LoraConfig(), LoraConfig(enabled=False)):
        with pytest.raises(
            InputError, match=r"^model\.name_or_path=.*attention_dropout=0\.1, .* set it to 0"
        ) as caught:
            load_model(config, lora, torch.device("cpu"))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["/none", "./none", "../none", "~/none", "a/b/c"])
def test_a_path_that_is_not_there_is_never_looked_up_on_the_hub(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ConfigError, match=r"^model\.name_or_path=.*none' does not exist; |^.*'a/b/c' does not exist; "):
        load(name)


def test_a_file_is_no_model(tmp_path):
    (tmp_path / "file").write_text(json.dumps({}))
    with pytest.raises(ConfigError, match="is a file; give a directory"):
        load(str(tmp_path / "file"))


def test_the_home_directory_may_be_written_as_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(BUNDLED, tmp_path / "model")
    load("~/model")
