"""Which files a model's directory must hold, so that one that is missing is named rather than what fails without it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Literal

from packloop.errors import ConfigError, InputError

INDEX = "model.safetensors.index.json"


def is_path(name: str) -> bool:
    """Whether a model's name means a directory: such a name is never looked up on the Hub."""
    return os.path.exists(name) or name.startswith(("/", "./", "../", "~")) or name.count(os.sep) > 1


def check_model_files(name: str, part: Literal["config", "tokenizer", "weights"], *, named: str) -> None:
    """Raises unless the directory `name` holds the files of that part of a model, or `name` is one of the Hub.

    named: the setting or option that said which, for messages. ConfigError where there is no such directory,
    InputError for a file that it lacks.
    """
    if not is_path(name):
        return
    directory, where = Path(name), f"{named}={name!r}"
    if not directory.is_dir():
        what = "is a file" if directory.exists() else "does not exist"
        raise ConfigError(f"{where} {what}; give a directory that save_pretrained wrote, or a name of the Hub")
    held = {path.name for path in directory.iterdir()}
    if part == "config" and "config.json" not in held:
        raise InputError(f"{where}: no config.json in it; model.save_pretrained writes that beside the weights")
    # transformers makes a fast tokenizer of a tokenizer.model, given the packages that it needs for that.
    if part == "tokenizer" and not held & {"tokenizer.json", "tokenizer.model"}:
        raise InputError(
            f"{where}: no tokenizer.json in it; copy that of the base model, or write it with "
            "AutoTokenizer.from_pretrained(...).save_pretrained"
        )
    if part == "weights":
        _check_weights(directory, held, where)


def _check_weights(directory: Path, held: set[str], where: str) -> None:
    if "model.safetensors" in held:
        return
    if INDEX not in held:
        others = sorted(name for name in held if name.endswith((".bin", ".safetensors", ".pt", ".pth", ".gguf")))
        has = f" (it has {others[0]})" if others else ""
        raise InputError(
            f"{where}: neither model.safetensors nor {INDEX} in it{has}; "
            "model.save_pretrained writes the weights, or download them whole"
        )
    try:
        shards = set(json.loads((directory / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{where}: {INDEX} cannot be read ({error}); download it again") from None
    if missing := sorted(shards - held):
        raise InputError(f"{where}: {missing[0]}, which {INDEX} names, is not in it; download the weights whole")
