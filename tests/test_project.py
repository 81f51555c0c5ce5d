"""What the repository says of itself: documents, pins, the tutorial's recipe, and nothing about where it was made."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from packloop.config import RunConfig, load_config

ROOT = Path(__file__).resolve().parents[1]


def tracked_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git repository")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_configuration_page_is_what_the_script_writes():
    spec = importlib.util.spec_from_file_location("make_config_doc", ROOT / "scripts" / "make_config_doc.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.PATH.read_text(encoding="utf-8") == script.render(), "run python scripts/make_config_doc.py"


def test_every_setting_is_described():
    for name, section in RunConfig.model_fields.items():
        for key, setting in section.annotation.model_fields.items():
            assert setting.description, f"{name}.{key}"


def test_tutorial_recipe():
    """Each value of the tutorial, written out in the recipe rather than left to a default."""
    path = ROOT / "recipes" / "llama2-7b-dolly.yaml"
    config = load_config(path).model_dump()
    expected = {
        "model": {
            "name_or_path": "NousResearch/Llama-2-7b-hf",
            "dtype": "bfloat16",
            "quantization": "nf4",
            "double_quant": True,
            "trust_remote_code": False,
        },
        "lora": {
            "enabled": True,
            "r": 64,
            "alpha": 16,
            "dropout": 0.1,
            "bias": "none",
            "target_modules": ["q_proj", "v_proj"],
        },
        "data": {
            "source": "databricks/databricks-dolly-15k",
            "split": "train",
            "eval_split": 0,
            "template": "instruction_from_response",
            "columns": {},
            "max_length": 2048,
            "packing": "wrapped",
            "loss_on": "all",
        },
        "train": {
            "num_train_epochs": 3,
            "max_steps": None,
            "per_device_train_batch_size": 6,
            "gradient_accumulation_steps": 2,
            "learning_rate": 2e-4,
            "lr_scheduler_type": "constant_with_warmup",
            "warmup_ratio": 0.03,
            "weight_decay": 0.0,
            "max_grad_norm": 0.3,
            "adam_beta1": 0.9,
            "adam_beta2": 0.999,
            "adam_epsilon": 1e-8,
            "optim": "paged_adamw_32bit",
            "gradient_checkpointing": "all",
            "tf32": True,
        },
        "checkpoint": {"every": "epoch", "keep": 2},
        "log": {"every": 10, "trackers": []},
    }
    text = path.read_text(encoding="utf-8")
    for section, settings in expected.items():
        for key, value in settings.items():
            assert config[section][key] == value, f"{section}.{key}"
            assert re.search(rf"^  {key}: .*  # .+$", text, re.MULTILINE), f"{section}.{key} has no line with a comment"


def test_pins_lie_in_the_package_s_ranges():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {pin.name.lower(): pin.specifier for pin in (Requirement(line) for line in lines if line[0] != "#")}
    assert str(pins["torch"]) == "==2.13.0"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for line in [*project["dependencies"], *project["optional-dependencies"]["test"]]:
        wanted = Requirement(line)
        (pin,) = pins[wanted.name.lower()]
        assert wanted.specifier.contains(pin.version), f"{wanted}, pinned {pin}"


def test_paths_named_in_the_documents_exist():
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
    tree = (ROOT / "README.md").read_text(encoding="utf-8").partition("## What is where")[2].partition("```text")[2]
    folders: list[str] = []
    for line in tree.partition("```")[0].strip("\n").splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        names = re.findall(r"(?<![\w/])[\w/]+(?:\.py|/)(?= |$)", line.split("  ")[depth] if depth else line)
        for name in names:
            assert (ROOT / "/".join(folders[:depth]) / name).exists(), f"README's tree: {name}"
            if name.endswith("/"):
                folders[depth:] = [name.rstrip("/")]


def test_no_private_key_is_tracked():
    own = Path(__file__).name
    signs = re.compile(rb"BEGIN [A-Z ]*PRIVATE KEY")
    for path in tracked_files():
        if path.name != own and path.suffix != ".safetensors":
            found = signs.search(path.read_bytes())
            assert not found, f"{path.relative_to(ROOT)}: {found[0]}"
