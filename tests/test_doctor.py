"""What is written about the machine: complete, true, and nothing that names a person or a secret."""

from __future__ import annotations

import getpass
import io
import json
import os
import platform
import socket
from importlib import metadata

import pytest
import torch
import yaml
from rich.console import Console
from tiny_run import run_config

from packloop.engine.doctor import _packages, doctor_report
from packloop.engine.environment import PACKAGES, describe_environment, package_versions
from packloop.engine.model_card import model_card, public_name


def test_the_environment_names_versions_and_nothing_private(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "a1B2" * 8)
    environment = describe_environment()
    text = json.dumps(environment)
    assert environment["python"] == platform.python_version()
    assert environment["torch"] == torch.__version__
    assert environment["packages"]["transformers"] == metadata.version("transformers")
    assert set(environment["packages"]) == set(PACKAGES)
    assert len(environment["gpus"]) == torch.cuda.device_count()
    assert "hf_" not in text
    assert os.getcwd() not in text
    for private in (getpass.getuser(), socket.gethostname()):
        assert f'"{private}"' not in text


def test_a_missing_package_is_none():
    from packloop.engine.environment import package_version

    assert package_version("no-such-package-anywhere") is None
    assert package_versions()["packloop"]


def plain(width: int = 160) -> str:
    out = io.StringIO()
    Console(file=out, width=width).print(doctor_report())
    return out.getvalue()


def test_the_report_says_what_there_is_and_what_will_be_used():
    report = plain()
    for name in PACKAGES:
        assert name in report
    assert metadata.version("peft") in report
    assert platform.python_version() in report
    assert "data.packing=wrapped" in report
    assert "optimizer" in report
    assert "for better" in report


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU gets")
def test_without_a_gpu_it_says_what_that_means():
    report = plain()
    assert "sdpa: " in report
    assert "AdamW of PyTorch" in report
    assert "NF4 weights" in report
    assert "work on cpu" in report
    assert "needs CUDA" in report


def test_a_missing_needed_package_and_a_missing_optional_one_are_told_apart():
    rows = dict(_packages(dict.fromkeys(PACKAGES)))
    assert rows["peft"] == "missing (needed)"
    assert rows["flash-attn"].startswith("missing (optional")


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("NousResearch/Llama-2-7b-hf", ("NousResearch/Llama-2-7b-hf", True)),
        ("gpt2", ("gpt2", True)),
        ("/home/someone/models/llama", ("llama", False)),
        ("./models/llama", ("llama", False)),
        ("~/private/mails.jsonl", ("mails.jsonl", False)),
        ("bundled", ("packloop's bundled model", False)),
    ],
)
def test_cards_name_hub_models_in_full_and_paths_by_their_last_part(source, shown):
    assert public_name(source) == shown


def test_a_card_has_front_matter_a_snippet_that_parses_and_the_results():
    config = run_config("someone/tiny-llama", "run", data={"source": "someone/notes"})
    metrics = [{"step": n, "loss": 4.0 / n, "real_tokens": 50, "label_tokens": 20} for n in (1, 2)]
    card = model_card(config, kind="adapter", metrics=[*metrics, {"step": 2, "eval_loss": 1.25}])
    _, front_matter, body = card.split("---\n", 2)
    values = yaml.safe_load(front_matter)
    assert values["base_model"] == "someone/tiny-llama"
    assert values["library_name"] == "peft"
    assert values["datasets"] == ["someone/notes"]
    assert {"lora", "qlora"} <= set(values["tags"])
    compile(body.split("```python\n")[1].split("```")[0], "snippet", "exec")
    results = ("| loss of the last step | 2.0000 |", "| loss on held-out rows | 1.2500 |", "| tokens seen | 100 |")
    for row in ("| `lora.r` | 4 |", *results):
        assert row in body


def test_a_card_without_results_or_hub_names_leaves_them_out():
    config = run_config("/home/someone/llama", "run", data={"source": "/home/someone/mails.jsonl"})
    for kind in ("adapter", "full", "merged"):
        card = model_card(config, kind=kind)
        assert "someone" not in card
        assert "base_model" not in card
        assert "datasets:" not in card
        assert "## Results" not in card
        compile(card.split("```python\n")[1].split("```")[0], "snippet", "exec")
