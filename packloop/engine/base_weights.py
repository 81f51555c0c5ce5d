"""The base model's checkpoint as it is on disk, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.utils import cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from packloop.config import ModelConfig
from packloop.engine.model import resolve_name
from packloop.errors import InputError


@dataclass(frozen=True)
class BaseWeights:
    """The safetensors files of a Llama and its configurations. `name` is the one that error messages give."""

    name: str
    config: LlamaConfig
    generation_config: GenerationConfig | None
    files: tuple[Path, ...]

    def reader(self, open_files: ExitStack) -> Callable[[str], Tensor]:
        """A function from a weight's name to its tensor, read from disk at each call. Files close with `open_files`.

        Raises InputError for a checkpoint that was quantised before and, when called, for a weight that is missing.
        """
        where = {}
        for file in self.files:
            handle = open_files.enter_context(safe_open(file, framework="pt"))
            where.update(dict.fromkeys(handle.keys(), handle))
        if any(".absmax" in key or ".quant_state" in key for key in where):
            raise InputError(
                f"model.name_or_path={self.name!r} holds weights that are quantised already; "
                "merging needs the full-precision checkpoint"
            )

        def read(weight: str) -> Tensor:
            # A bare `LlamaModel` was saved without the prefix; a tied model may have been saved by its head alone.
            candidates = [weight, weight.removeprefix("model.")]
            if weight == "model.embed_tokens.weight" and self.config.tie_word_embeddings:
                candidates.append("lm_head.weight")
            for candidate in candidates:
                if candidate in where:
                    return where[candidate].get_tensor(candidate)
            raise InputError(f"model.name_or_path={self.name!r} lacks the weight {weight}; is the download whole?")

        return read

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every weight the model has of its own; a head tied to the embedding is not one."""
        shapes = {name: tuple(tensor.shape) for name, tensor in self._empty_model().state_dict().items()}
        if self.config.tie_word_embeddings:
            shapes.pop("lm_head.weight", None)
        return shapes

    def linear_weights(self) -> frozenset[str]:
        """The weights that NF4 loading quantises: every linear layer's but the head's."""
        modules = self._empty_model().named_modules()
        return frozenset(f"{n}.weight" for n, module in modules if isinstance(module, nn.Linear) and n != "lm_head")

    def _empty_model(self) -> LlamaForCausalLM:
        with torch.device("meta"):
            return LlamaForCausalLM(self.config)


def find_base_weights(model: ModelConfig) -> BaseWeights:
    """The base's files, found (and fetched, where they are not cached) as `from_pretrained` finds them."""
    name, revision = resolve_name(model.name_or_path), model.revision or "main"
    optional = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
    try:
        config = AutoConfig.from_pretrained(name, revision=revision)
        single = cached_file(name, "model.safetensors", **optional)
        index = None if single else cached_file(name, "model.safetensors.index.json", **optional)
        files = [single] if single else []
        if index:
            files, _ = get_checkpoint_shard_files(name, index, revision=revision)
        has_generation_config = cached_file(name, "generation_config.json", **optional) is not None
        generation_config = GenerationConfig.from_pretrained(name, revision=revision) if has_generation_config else None
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"model.name_or_path={model.name_or_path!r} cannot be read ({reason}); "
            "merging needs the base model's files: run it where they are or where the Hub can be reached"
        ) from error
    if not files:
        raise InputError(
            f"model.name_or_path={model.name_or_path!r} has no safetensors weights, the only kind that is read; "
            "convert it first"
        )
    return BaseWeights(
        name=model.name_or_path, config=config, generation_config=generation_config, files=tuple(map(Path, files))
    )
