"""`packloop plan`: memory, time and the best settings of a configuration on a GPU that need not be there."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cache

import numpy as np
import torch
from transformers import AutoConfig, LlamaConfig

from packloop.bench.synthetic import shape_config
from packloop.config import ModelConfig, RunConfig
from packloop.data.layout import without_padding
from packloop.data.loader import Batch, PackLoader, TrainingData, build_data
from packloop.engine.budget import GIB, settle_budget
from packloop.engine.loop import set_numerics
from packloop.engine.model import load_tokenizer, resolve_name
from packloop.engine.plan import count_layers, needs_rows
from packloop.engine.planner.policy import MemoryPlan
from packloop.engine.planner.rates import ATTENTION_RATES
from packloop.engine.planner.search import Candidate, Search
from packloop.engine.planner.shape import ModelShape
from packloop.engine.planner.time import Load
from packloop.errors import InputError, OutOfMemoryError
from packloop.gpus import Gpu, find_gpu, require_gpu
from packloop.kernels.attention import FLAT
from packloop.kernels.flash_attention import NEEDED_CAPABILITY
from packloop.kernels.gated import HOPPER, why_not_quack
from packloop.kernels.operations import Operations
from packloop.kernels.patch import NEEDED_OF_MODEL

_UNITS = {"": GIB, "gib": GIB, "gb": 10**9, "mib": 2**20, "mb": 10**6}
# Packs that averages are taken over.
_MAX_PACKS = 512
_SETTINGS = ("recompute_layers", "cached_layers", "keep_inputs_layers")


@dataclass(frozen=True)
class Forecast:
    """configured: the settings as given, each `auto` chosen. best: of every size of micro-batch, the fastest first.

    notes: what the figures rest on where that is not the configuration's own model and data.
    """

    config: RunConfig
    shape: ModelShape
    gpu: Gpu
    budget_gib: float
    configured: Candidate | None
    best: list[Candidate]
    notes: list[str]


def plan(
    config: RunConfig, *, gpu: str | None, budget: str | None, synthetic: str | None, at_hand: bool = False
) -> Forecast:
    """Reads the model's configuration and the data, no weights. gpu: a name, default the one at hand.

    at_hand: whether it must be the one at hand. synthetic: a shape of `bench.synthetic`, with the bundled tokenizer and
    rows: nothing is downloaded. InputError for what cannot be predicted, OutOfMemoryError with a table where not even
    one pack fits the budget.
    """
    if at_hand:
        if not torch.cuda.is_available():
            raise InputError("--probe takes steps on the GPU at hand, and there is none; leave --probe out")
        set_numerics(config)  # before a GPU is asked for: the prediction rests on the allocator's settings
    chosen = require_gpu(gpu) if gpu else gpu_at_hand()
    if at_hand and gpu and chosen != gpu_at_hand():
        raise InputError(f"--probe takes steps on the GPU at hand, {gpu_at_hand().key}: leave --gpu {gpu} out")
    asked_gib, setting = config.train.memory_budget_gib, f"train.memory_budget_gib={config.train.memory_budget_gib}"
    if budget is not None:
        asked_gib, setting = parse_budget(budget), f"--budget {budget.strip()}"
    budget_gib, warning = settle_budget(asked_gib, chosen.memory_gib, setting=setting, gpu=f"the {chosen.key}")
    if config.kernels.layer == "stock":
        raise InputError("kernels.layer=stock: predictions are for the fused layers; use kernels.layer=auto or fused")
    config, architecture, notes = _sources(config, synthetic)
    notes += [warning] if warning else []
    if switched := [one.name for one in fields(Operations) if getattr(config.kernels, one.name) == "torch"]:
        notes.append(f"kernels.{', '.join(switched)}=torch: predicted as if auto, which is faster and takes less")
    shape = replace(ModelShape.of_run(architecture, config), gated=_is_gated(config.kernels.gated, chosen))
    if config.kernels.gated == "quack" and not shape.is_gated:
        raise InputError(f"kernels.gated=quack: {NEEDED_OF_MODEL}; use kernels.gated=none")
    tokenizer = load_tokenizer(config.model if synthetic is None else ModelConfig(name_or_path="bundled"))
    data = build_data(config.data, tokenizer, seed=config.train.seed)
    search = Search(
        shape,
        chosen,
        loads(config, data, tokenizer.pad_token_id),
        attentions=attentions(config, chosen),
        is_paged=config.train.optim == "paged_adamw_32bit",
    )
    train = config.train
    best = search.best(budget_gib, train.per_device_train_batch_size * train.gradient_accumulation_steps)
    if not best:
        raise OutOfMemoryError(_does_not_fit(search.smallest(), budget_gib))
    return Forecast(config, shape, chosen, budget_gib, _as_configured(config, search, budget_gib), best, notes)


def _is_gated(asked: str, gpu: Gpu) -> bool:
    """Whether quack runs the gated products; for `auto` what is installed here counts where this is the GPU at hand.

    InputError where they are asked for and the GPU is none that quack has them for.
    """
    is_hopper = gpu.capability[0] == HOPPER
    if asked == "quack" and not is_hopper:
        raise InputError(
            f"kernels.gated=quack: the {gpu.key} has compute capability {_dotted(gpu.capability)}, "
            f"{HOPPER}.x is needed; use kernels.gated=auto"
        )
    if asked != "auto" or not is_hopper:
        return asked == "quack"
    is_at_hand = torch.cuda.is_available() and find_gpu(torch.cuda.get_device_name()) == gpu
    return is_at_hand and why_not_quack(torch.device("cuda")) is None


def gpu_at_hand() -> Gpu:
    """InputError where there is none, or none that the table of GPUs lists."""
    if not torch.cuda.is_available():
        raise InputError("no GPU at hand: name one with --gpu, for example --gpu a10g")
    name = torch.cuda.get_device_name()
    found = find_gpu(name)
    if found is None:
        raise InputError(f"the GPU at hand, {name!r}, is not in the table: name the most similar with --gpu")
    return found


def parse_budget(text: str) -> float:
    """GiB of "22", "22GiB" or "24GB". InputError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    if not match or match[2] not in _UNITS or float(match[1]) <= 0:
        raise InputError(f"--budget {text!r}: an amount of memory is needed, for example 22, 22GiB or 24GB")
    return float(match[1]) * _UNITS[match[2]] / GIB


def attentions(config: RunConfig, gpu: Gpu) -> list[str]:
    """What `kernels.attention` may become: itself, or for `auto` the backends that need no package of their own."""
    asked = config.kernels.attention
    if asked != "auto":
        if asked not in ATTENTION_RATES:
            raise InputError(f"kernels.attention={asked}: predictions know {', '.join(ATTENTION_RATES)} and auto")
        needed = NEEDED_CAPABILITY.get(asked, (0, 0))
        if gpu.capability < needed:
            raise InputError(
                f"kernels.attention={asked}: the {gpu.key} has compute capability {_dotted(gpu.capability)}, "
                f"{_dotted(needed)} is needed; use kernels.attention=auto"
            )
        possible = [asked]
    elif config.model.dtype != "bfloat16":
        possible = ["sdpa"]
    else:
        possible = ["document", "varlen", *(["sdpa"] if config.data.packing != "bfd" else [])]
    if config.kernels.padding != "drop":
        return possible
    if not set(possible) & set(FLAT):
        raise InputError(needs_rows(possible[0]))
    return [name for name in possible if name in FLAT]


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def loads(config: RunConfig, data: TrainingData, pad_token_id: int) -> Callable[[int], Load]:
    """The average micro-batch of that many packs, of an epoch's first packs; attention is left open."""

    drops = config.kernels.padding == "drop"

    @cache
    def load_of(batch: int) -> Load:
        loader = PackLoader(
            data.train,
            packing=config.data.packing,
            max_length=config.data.max_length,
            per_device_batch_size=batch,
            gradient_accumulation_steps=1,
            rank=0,
            world_size=1,
            seed=config.train.seed,
            shuffle=config.data.shuffle,
            pad_token_id=pad_token_id,
        )
        count = min(max(1, loader.num_packs // batch), -(-_MAX_PACKS // batch))
        micros = [loader.next_window()[0] for _ in range(count)]
        # Memory is planned for with padding, as `train` does.
        most_slots = max(micro.num_slots for micro in micros)
        return replace(
            load_from([without_padding(micro) for micro in micros] if drops else micros), most_slots=most_slots
        )

    if config.data.packing == "none":  # a micro-batch is as long as its longest document
        return load_of

    def scaled(batch: int) -> Load:
        one = load_of(1)
        return Load(
            (one.real_tokens if drops else one.slots) * batch,
            one.real_tokens * batch,
            one.labels * batch,
            one.squared_lengths * batch,
            one.most_slots * batch,
            "",
        )

    return scaled


def load_from(micros: list[Batch]) -> Load:
    """The average of these micro-batches."""
    squares = [float(np.square(micro.cu_seqlens.diff().numpy().astype(np.int64)).sum()) for micro in micros]
    return Load(
        slots=float(np.mean([micro.num_slots for micro in micros])),
        real_tokens=float(np.mean([micro.num_real_tokens for micro in micros])),
        labels=float(np.mean([micro.num_label_tokens for micro in micros])),
        squared_lengths=float(np.mean(squares)),
        most_slots=max(micro.num_slots for micro in micros),
        attention="",
    )


def _sources(config: RunConfig, synthetic: str | None) -> tuple[RunConfig, LlamaConfig, list[str]]:
    """(configuration whose data can be read, the model's own, what was put in place of what was asked for)."""
    if synthetic is not None:
        data = config.data.model_copy(update={"source": "bundled", "revision": None, "split": "train", "eval_split": 0})
        data = data.model_copy(update={"template": "instruction_from_response", "columns": {}})
        notes = [f"model: the shape {synthetic}; documents: the bundled rows under the bundled tokenizer"]
        return config.model_copy(update={"data": data}), shape_config(synthetic), notes
    name = resolve_name(config.model.name_or_path)
    try:
        architecture = AutoConfig.from_pretrained(name, revision=config.model.revision or "main")
    except (OSError, ValueError) as error:
        reason = re.split(r"(?<=\.) ", " ".join(str(error).split()))[0].rstrip(".")[:200]
        raise InputError(
            f"model.name_or_path={config.model.name_or_path!r}: its configuration cannot be read ({reason}); "
            "give a local directory, a Hub name that this machine can reach, or a shape with --synthetic"
        ) from error
    if not isinstance(architecture, LlamaConfig):
        raise InputError(
            f"model.name_or_path={config.model.name_or_path!r} is of type {architecture.model_type!r}; "
            "a Llama model is needed"
        )
    return config, architecture, []


def _as_configured(config: RunConfig, search: Search, budget_gib: float) -> Candidate | None:
    """The configuration's own settings, whether they fit or not; None where an `auto` of it cannot be made to fit."""
    values = (config.train.gradient_checkpointing, config.kernels.dequant_cache, config.kernels.keep_inputs)
    num_layers = search.shape.num_layers
    named = zip(_SETTINGS, values, strict=True)
    fixed = {name: count_layers(value, num_layers) for name, value in named if value != "auto"}
    batch, accumulation = config.train.per_device_train_batch_size, config.train.gradient_accumulation_steps
    if len(fixed) < len(_SETTINGS):
        return search.within(budget_gib, batch, accumulation, fixed)
    return search.predict(batch, accumulation, MemoryPlan(**fixed))


def _does_not_fit(smallest: Candidate, budget_gib: float) -> str:
    rows = {**smallest.memory.parts_gib, "reserved in all": smallest.memory.reserved_gib}
    if smallest.memory.managed_gib:
        rows["paged optimizer state"] = smallest.memory.managed_gib
    rows["allowed"] = budget_gib
    listed = "\n".join(f"  {name:<44}{size:>8.2f} GiB" for name, size in rows.items())
    return (
        f"not even one pack a micro-batch with every layer recomputed fits:\n{listed}\n"
        "lower data.max_length or lora.r, or take a larger --budget or --gpu"
    )
