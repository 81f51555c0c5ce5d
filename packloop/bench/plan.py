"""`packloop plan`: memory, time and the best settings of a configuration on a GPU that need not be there."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace
from functools import partial

import torch
from transformers import AutoConfig, LlamaConfig

from packloop.bench.plan_loads import Loads
from packloop.bench.synthetic import shape_config
from packloop.config import KernelsConfig, ModelConfig, RunConfig
from packloop.data.loader import build_data
from packloop.engine.budget import GIB, settle_budget
from packloop.engine.model import check_architecture, load_tokenizer, resolve_name
from packloop.engine.planner.layout import why_not_as_asked
from packloop.engine.planner.policy import MemoryPlan, count_layers
from packloop.engine.planner.rates import ATTENTION_RATES
from packloop.engine.planner.search import Candidate, Search
from packloop.engine.planner.shape import ModelShape
from packloop.engine.run import set_numerics
from packloop.errors import ConfigError, InputError, OutOfMemoryError
from packloop.gpus import Gpu, find_gpu, require_gpu
from packloop.kernels.flash_attention import NEEDED_CAPABILITY, why_not_heads, why_not_numerics
from packloop.kernels.gated import HOPPER, why_not_quack
from packloop.kernels.operations import Operations
from packloop.kernels.patch import NEEDED_OF_MODEL

_UNITS = {"": GIB, "gib": GIB, "gb": 10**9, "mib": 2**20, "mb": 10**6}
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
    loads, is_paged = Loads(config, data, tokenizer.pad_token_id), config.train.optim == "paged_adamw_32bit"
    names = attentions(config, chosen, shape.head_dim)

    def search(name: str, usable: list[str]) -> Search:
        """Of one backend, as it decides where the documents of a micro-batch can lie."""
        load_of = partial(loads.of, attention=name, usable=usable)
        return Search(shape, chosen, load_of, attentions=[name], is_paged=is_paged)

    train = config.train
    searches = [search(name, [name]) for name in names]  # the settings that are found name theirs
    best = _best(searches, budget_gib, train.per_device_train_batch_size * train.gradient_accumulation_steps)
    if not best:
        smallest = min((one.smallest() for one in searches), key=lambda one: one.memory.counted_gib)
        raise OutOfMemoryError(_does_not_fit(smallest, budget_gib))
    among = loads.layout(train.per_device_train_batch_size, names).among
    possible = [search(name, names) for name in names if among is None or name in among]
    return Forecast(config, shape, chosen, budget_gib, _as_configured(config, possible, budget_gib), best, notes)


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

    ConfigError where what is asked for cannot run on this GPU, in this dtype, or for heads of this many features.
    """
    asked, dtype = config.kernels.attention, getattr(torch, config.model.dtype)
    reasons = {
        name: why_not_numerics(name, dtype, deterministic=config.train.deterministic)
        or why_not_heads(name, head_dim, gpu.capability)
        for name in ATTENTION_RATES
    }
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
    else:
        possible = [name for name in ("document", "varlen") if reasons[name] is None]
        if config.data.packing != "bfd" or not possible:
            possible.append("sdpa")
    refusals = {name: why_not_as_asked(config.kernels, name, reasons) for name in possible}
    able = [name for name, refusal in refusals.items() if refusal is None]
    if not able:
        raise ConfigError(refusals[possible[0]])
    return able


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


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
    check_architecture(architecture, config.model, trains=True)
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
