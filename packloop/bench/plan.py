"""`packloop plan`: memory, time and the best settings of a configuration on a GPU that need not be there."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cache, partial

import numpy as np
import torch
from numpy.typing import ArrayLike
from transformers import AutoConfig, LlamaConfig

from packloop.bench.synthetic import shape_config
from packloop.config import KernelsConfig, ModelConfig, RunConfig
from packloop.data.layout import as_packed, most_shared_slots, share_prefixes, without_padding
from packloop.data.loader import Batch, TrainingData, build_data, make_batch
from packloop.data.packing import Packs, epoch_packs
from packloop.data.prefix import CommonPrefix
from packloop.engine.budget import GIB, settle_budget
from packloop.engine.loop import set_numerics
from packloop.engine.model import load_tokenizer, resolve_name
from packloop.engine.plan import (
    count_layers,
    epochs_looked_through,
    knows_no_beginnings,
    may_drop_padding,
    needs_rows,
)
from packloop.engine.planner.policy import MemoryPlan
from packloop.engine.planner.rates import ATTENTION_RATES
from packloop.engine.planner.search import Candidate, Search
from packloop.engine.planner.shape import ModelShape
from packloop.engine.planner.time import Load
from packloop.errors import ConfigError, InputError, OutOfMemoryError
from packloop.gpus import Gpu, find_gpu, require_gpu
from packloop.kernels.attention import FLAT, SHARING
from packloop.kernels.flash_attention import NEEDED_CAPABILITY, why_not_heads
from packloop.kernels.gated import HOPPER, why_not_quack
from packloop.kernels.operations import Operations
from packloop.kernels.patch import NEEDED_OF_MODEL

_UNITS = {"": GIB, "gib": GIB, "gb": 10**9, "mib": 2**20, "mb": 10**6}
# Packs that averages are taken over; fewer where documents share beginnings, which takes longer to find out.
_MAX_PACKS, _MAX_SHARED_PACKS = 512, 64
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
    shape = replace(ModelShape.of_run(architecture, config), gated=_is_gated(config.kernels, chosen))
    if config.kernels.gated == "quack" and not shape.is_gated:
        raise ConfigError(f"kernels.gated=quack: {NEEDED_OF_MODEL}; use kernels.gated=none")
    tokenizer = load_tokenizer(config.model if synthetic is None else ModelConfig(name_or_path="bundled"))
    data = build_data(config.data, tokenizer, seed=config.train.seed)
    load_of, is_paged = loads(config, data, tokenizer.pad_token_id), config.train.optim == "paged_adamw_32bit"
    # One for each backend, as it decides where the documents of a micro-batch can lie.
    searches = [
        Search(shape, chosen, partial(load_of, attention=name), attentions=[name], is_paged=is_paged)
        for name in attentions(config, chosen, shape.head_dim)
    ]
    train = config.train
    best = _best(searches, budget_gib, train.per_device_train_batch_size * train.gradient_accumulation_steps)
    if not best:
        smallest = min((search.smallest() for search in searches), key=lambda one: one.memory.counted_gib)
        raise OutOfMemoryError(_does_not_fit(smallest, budget_gib))
    return Forecast(config, shape, chosen, budget_gib, _as_configured(config, searches, budget_gib), best, notes)


def _best(searches: list[Search], budget_gib: float, global_batch: int) -> list[Candidate]:
    """As `Search.best`, of the backend that is fastest at each size of micro-batch."""
    found: dict[int, Candidate] = {}
    for one in (candidate for search in searches for candidate in search.best(budget_gib, global_batch)):
        found[one.batch] = max((found.get(one.batch, one), one), key=_rate)
    return sorted(found.values(), key=lambda one: (one.global_batch != global_batch, -_rate(one)))


def _rate(candidate: Candidate) -> float:
    return candidate.time.tokens_per_s


def _is_gated(kernels: KernelsConfig, gpu: Gpu) -> bool:
    """Whether quack runs the gated products; for `auto` what is installed here counts where this is the GPU at hand.

    ConfigError where they are asked for and the GPU is none that quack has them for.
    """
    is_hopper, asked = gpu.capability[0] == HOPPER, kernels.gated
    if asked == "quack" and not is_hopper:
        raise ConfigError(
            f"kernels.gated=quack: the {gpu.key} has compute capability {_dotted(gpu.capability)}, "
            f"{HOPPER}.x is needed; use kernels.gated=auto"
        )
    if asked != "auto" or not is_hopper or "torch" in (kernels.swiglu, kernels.matmul, kernels.lora):
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
    """GiB of "22", "22GiB" or "24GB". ConfigError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    if not match or match[2] not in _UNITS or float(match[1]) <= 0:
        raise ConfigError(f"--budget {text!r}: an amount of memory is needed, for example 22, 22GiB or 24GB")
    return float(match[1]) * _UNITS[match[2]] / GIB


def attentions(config: RunConfig, gpu: Gpu, head_dim: int) -> list[str]:
    """What `kernels.attention` may become: itself, or for `auto` the backends that need no package of their own.

    ConfigError where what is asked for cannot run on this GPU, or for heads of this many features.
    """
    asked = config.kernels.attention
    reasons = {name: why_not_heads(name, head_dim, gpu.capability) for name in ATTENTION_RATES}
    if asked != "auto":
        if asked not in ATTENTION_RATES:
            raise InputError(f"kernels.attention={asked}: predictions know {', '.join(ATTENTION_RATES)} and auto")
        needed = NEEDED_CAPABILITY.get(asked, (0, 0))
        if gpu.capability < needed:
            raise ConfigError(
                f"kernels.attention={asked}: the {gpu.key} has compute capability {_dotted(gpu.capability)}, "
                f"{_dotted(needed)} is needed; use kernels.attention=auto"
            )
        if reasons[asked] is not None:
            raise ConfigError(f"kernels.attention={asked}: {reasons[asked]}; use kernels.attention=auto")
        possible = [asked]
    elif config.model.dtype != "bfloat16":
        possible = ["sdpa"]
    else:
        possible = [name for name in ("document", "varlen") if reasons[name] is None]
        if config.data.packing != "bfd" or not possible:
            possible.append("sdpa")
    if config.kernels.prefix_reuse == "micro_batch":
        if not set(possible) & set(SHARING):
            raise ConfigError(knows_no_beginnings(possible[0], reasons))
        return [name for name in possible if name in SHARING]
    if config.kernels.padding != "drop":
        return possible
    if not set(possible) & set(FLAT):
        raise ConfigError(needs_rows(possible[0], reasons))
    return [name for name in possible if name in FLAT]


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def loads(config: RunConfig, data: TrainingData, pad_token_id: int) -> Callable[[int, str], Load]:
    """The average micro-batch of that many packs under that attention, of an epoch's first packs."""
    documents, packing, max_length = data.train, config.data.packing, config.data.max_length

    @cache
    def packs_of(epoch: int) -> tuple[Packs, np.ndarray]:
        seed, shuffle = config.train.seed, config.data.shuffle
        return epoch_packs(documents.lengths, packing, max_length, seed=seed, epoch=epoch, shuffle=shuffle)

    packs, order = packs_of(0)
    common_prefix = cache(lambda: CommonPrefix.of(documents))

    def most_slots_of(batch: int) -> int | None:
        """Of the largest micro-batch that shares beginnings, as `train` looks it up."""
        steps_per_epoch = -(-packs.num_packs // (batch * config.train.gradient_accumulation_steps))
        num_epochs = epochs_looked_through(config, packs.num_packs, steps_per_epoch)
        if num_epochs is None:
            return None
        epochs = map(packs_of, range(num_epochs))
        split = ((made, np.split(order, range(batch, len(order), batch))) for made, order in epochs)
        return most_shared_slots(common_prefix(), split)

    @cache
    def load_of(batch: int, arrange: Callable[[Batch], Batch]) -> Load:
        most_packs = _MAX_SHARED_PACKS if arrange is share_prefixes else _MAX_PACKS
        count = min(max(1, packs.num_packs // batch), -(-most_packs // batch))
        micros = [
            make_batch(documents, packs, chosen, packing=packing, max_length=max_length, pad_token_id=pad_token_id)
            for chosen in (order[number * batch : (number + 1) * batch] for number in range(count))
        ]
        # Memory is planned for as `train` does it: with padding, or for what beginnings leave at most.
        most_slots, prefix_tokens = max(micro.num_slots for micro in micros), 0
        if arrange is share_prefixes:
            most_slots, prefix_tokens = most_slots_of(batch) or most_slots, common_prefix().length
        found = load_from([arrange(micro) for micro in micros])
        return replace(found, most_slots=most_slots, prefix_tokens=prefix_tokens)

    def load(batch: int, attention: str) -> Load:
        arrange = _arrangement(config, attention)
        # Of its longest document or of what its packs share, else a micro-batch is made of packs like any other's.
        if packing == "none" or arrange is share_prefixes:
            return replace(load_of(batch, arrange), attention=attention)
        one = load_of(1, arrange)
        return Load(
            (one.slots if arrange is as_packed else one.real_tokens) * batch,
            one.real_tokens * batch,
            one.labels * batch,
            one.squared_lengths * batch,
            one.most_slots * batch,
            attention,
        )

    return load


def _arrangement(config: RunConfig, attention: str) -> Callable[[Batch], Batch]:
    """How a run under that attention lays the documents of a micro-batch out on a GPU."""
    if attention not in FLAT or not may_drop_padding(config, on_gpu=True):
        return as_packed
    is_wrapped = config.data.packing == "wrapped"
    shares = attention in SHARING and config.kernels.prefix_reuse != "none" and not is_wrapped
    return share_prefixes if shares else without_padding


def load_from(micros: list[Batch]) -> Load:
    """The average of these micro-batches."""
    squares = [attended_squares(micro.cu_seqlens.diff(), micro.prefix_of) for micro in micros]
    return Load(
        slots=float(np.mean([micro.num_slots for micro in micros])),
        real_tokens=float(np.mean([micro.num_real_tokens for micro in micros])),
        labels=float(np.mean([micro.label_index.numel() for micro in micros])),
        squared_lengths=float(np.mean(squares)),
        most_slots=max(micro.num_slots for micro in micros),
        attention="",
    )


def attended_squares(lengths: ArrayLike, prefix_of: ArrayLike | None) -> int:
    """n^2 of every n tokens and 2 n p where p that lie elsewhere come first: twice the pairs that attention multiplies.

    lengths, prefix_of: of each document of a micro-batch, as in `Batch`.
    """
    own = np.asarray(lengths, dtype=np.int64)
    if prefix_of is None:
        return int(np.square(own).sum())
    prefix = np.asarray(prefix_of, dtype=np.int64)
    before = np.where(prefix >= 0, own[np.maximum(prefix, 0)], 0)
    return int((own * (own + 2 * before)).sum())


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


def _as_configured(config: RunConfig, searches: list[Search], budget_gib: float) -> Candidate | None:
    """The configuration's own settings, whether they fit or not; None where an `auto` of it cannot be made to fit."""
    values = (config.train.gradient_checkpointing, config.kernels.dequant_cache, config.kernels.keep_inputs)
    num_layers = searches[0].shape.num_layers
    named = zip(_SETTINGS, values, strict=True)
    fixed = {name: count_layers(value, num_layers) for name, value in named if value != "auto"}
    batch, accumulation = config.train.per_device_train_batch_size, config.train.gradient_accumulation_steps
    if len(fixed) < len(_SETTINGS):
        found = [search.within(budget_gib, batch, accumulation, fixed) for search in searches]
    else:
        found = [search.predict(batch, accumulation, MemoryPlan(**fixed)) for search in searches]
    return max((one for one in found if one is not None), key=_rate, default=None)


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
