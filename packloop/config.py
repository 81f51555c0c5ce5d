"""Every setting: its name, type, unit, default and the checks between settings.

`load_config` reads one YAML file and `section.key=value` overrides into a `RunConfig`. Whatever is wrong with them is a
`ConfigError` of one line a fault, raised before a model or a data set is touched. Field names are Hugging Face's where
Hugging Face has one; inside `lora` they are PEFT's without the prefix.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from packloop.config_faults import describe_faults
from packloop.data.prompts import get_template
from packloop.errors import ConfigError

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(ge=1)]
Name = Annotated[str, Field(min_length=1)]


class Section(BaseModel):
    """Base of every section: unknown keys are refused, types are not coerced, values do not change."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())


class ModelConfig(Section):
    """The frozen base model and how it is held in memory."""

    name_or_path: Name = Field(
        "NousResearch/Llama-2-7b-hf",
        description="Hub name, local directory, or `bundled` for the tiny Llama shipped here.",
    )
    revision: str | None = Field(None, description="Hub commit, tag or branch.")
    dtype: Literal["bfloat16", "float32"] = Field(
        "bfloat16", description="Compute dtype of the base; norms, embedding and head are held in it too."
    )
    quantization: Literal["nf4", "none"] = Field(
        "nf4", description="`nf4`: 4-bit base weights; `none`: weights in dtype."
    )
    double_quant: bool = Field(True, description="Quantise NF4's block scales as well (0.37 bit a weight less).")
    trust_remote_code: bool = Field(False, description="Let a Hub repository run its own Python. Leave it off.")


class LoraConfig(Section):
    """The adapter. PEFT's names without the `lora_` prefix."""

    enabled: bool = Field(True, description="false trains every parameter of an unquantised float32 model.")
    r: Positive = Field(64, description="Rank.")
    alpha: Annotated[float, Field(gt=0)] = Field(16, description="The update is scaled by alpha / r.")
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(0.1, description="Dropout on the adapter's input.")
    bias: Literal["none"] = Field("none", description="Llama's linear layers have no bias to train.")
    target_modules: list[str] | Literal["all-linear"] = Field(
        ["q_proj", "v_proj"], description="Names of linear layers, or `all-linear`."
    )


class CustomTemplate(Section):
    """A prompt of one's own: `{field}` stands for a column of the row (after `data.columns`)."""

    prompt: str = Field(description="Text that the model is given, for example 'Q: {question}\\nA: '.")
    response: str = Field(description="Text that the model is to write, for example '{answer}'.")


TemplateName = Literal["instruction_from_response", "alpaca", "dolly"]


class DataConfig(Section):
    """Rows, the prompt made of them, and how token sequences are packed."""

    source: Name = Field(
        "databricks/databricks-dolly-15k",
        description="Hub name, a .json, .jsonl, .csv or .parquet file, or `bundled`.",
    )
    revision: str | None = Field(None, description="Hub commit, tag or branch of the data set.")
    split: str = Field("train", description="Split of a Hub or bundled data set.")
    eval_split: Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0.0, lt=1.0)] | Name = Field(
        0, description="Held-out rows: a count, a fraction of the rows, or the name of a split; 0 for none."
    )
    template: TemplateName | CustomTemplate = Field("instruction_from_response", description="How a row becomes text.")
    columns: dict[str, str] = Field(
        default_factory=dict, description="Template field -> column of the source, for example {response: body}."
    )
    max_length: Annotated[int, Field(ge=2)] = Field(2048, description="Tokens a pack (and the longest document).")
    packing: Literal["wrapped", "bfd", "none"] = Field(
        "wrapped",
        description="wrapped: concatenate and cut; bfd: whole documents, best fit, isolated; none: one document a row.",
    )
    loss_on: Literal["all", "response"] = Field("all", description="Which tokens are trained on.")
    shuffle: bool = Field(True, description="A new order every epoch, from train.seed and the epoch.")
    on_long_row: Literal["truncate", "split", "drop", "error"] = Field(
        "truncate", description="A document longer than max_length under bfd or none; wrapped never meets one."
    )
    on_bad_row: Literal["error", "skip"] = Field(
        "error", description="A row that cannot be read, lacks a field or has no text."
    )


class TrainConfig(Section):
    """The loop."""

    output_dir: Name = Field(
        "runs/llama2-7b-dolly",
        description="Where the run's files go; must be missing, empty or of a run without checkpoint, or use --resume.",
    )
    num_train_epochs: Annotated[float, Field(gt=0)] = Field(3, description="Passes over the data; 0.5 is half of one.")
    max_steps: Positive | None = Field(None, description="Optimizer steps; where given, num_train_epochs is not used.")
    per_device_train_batch_size: Positive = Field(6, description="Packs a micro-batch.")
    gradient_accumulation_steps: Positive = Field(2, description="Micro-batches an optimizer step and process.")
    learning_rate: Annotated[float, Field(gt=0)] = Field(2.0e-4, description="Where the warm-up ends.")
    lr_scheduler_type: Literal["constant_with_warmup", "linear", "cosine"] = Field(
        "constant_with_warmup", description="The rate after the warm-up: kept, or falling to 0 at the last step."
    )
    warmup_ratio: Fraction = Field(0.03, description="Share of the steps in which the rate rises from 0.")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="Decoupled, as in AdamW.")
    max_grad_norm: Annotated[float, Field(gt=0)] = Field(0.3, description="Gradients are scaled down to this L2 norm.")
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="Decay of the gradients' mean.")
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = Field(0.999, description="Decay of their squares' mean.")
    adam_epsilon: Annotated[float, Field(gt=0)] = Field(1e-8, description="Added to the root of that mean.")
    optim: Literal["paged_adamw_32bit", "adamw_32bit"] = Field(
        "paged_adamw_32bit", description="Paged state moves to host memory when the GPU's is short (CUDA only)."
    )
    gradient_checkpointing: Literal["auto", "all", "none"] | Annotated[int, Field(ge=0)] = Field(
        "auto",
        description="How many layers recompute their activations in the backward pass, with the same results; auto: as "
        "few as the memory budget allows; all of stock layers on a GPU, none on a CPU.",
    )
    memory_budget_gib: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="GPU memory that may be reserved, in GiB, paged optimizer state included; null: all but 2 GiB. "
        "Never more than all but 0.5, which CUDA's own context takes.",
    )
    tf32: bool = Field(True, description="TensorFloat-32 for float32 matrix products on Ampere and newer.")
    seed: Annotated[int, Field(ge=0)] = Field(
        0, description="Of the adapter's first weights, dropout, the order of rows and which of them are held out."
    )
    deterministic: bool = Field(False, description="Bit-identical runs, at some cost in speed.")
    eval_every: Literal["epoch"] | Positive = Field("epoch", description="Steps between evaluations of held-out rows.")


Implementation = Literal["auto", "triton", "torch"]
ProductLibrary = Literal["auto", "cublaslt", "torch"]


class KernelsConfig(Section):
    """What replaces the stock Llama's operations."""

    attention: Literal["auto", "eager", "sdpa", "cudnn", "flash_attn", "varlen", "flash_attn_4", "document"] = Field(
        "auto",
        description="auto: the fastest measured on this GPU and shape; but document, untimed, where sharing beginnings "
        "(prefix_reuse) is asked for or leaves out a twentieth of the slots; sdpa on a CPU. cudnn is plain causal "
        "attention only: it cannot keep packed documents apart.",
    )
    layer: Literal["auto", "fused", "stock"] = Field(
        "auto",
        description="fused: a decoder layer with its adapters as one function; stock: Hugging Face's and PEFT's code.",
    )
    dequant_cache: Literal["auto", "all", "none"] | Annotated[int, Field(ge=0)] = Field(
        "auto", description="How many layers keep their NF4 weights dequantised (fused layers only)."
    )
    keep_inputs: Literal["auto", "all", "none"] | Annotated[int, Field(ge=0)] = Field(
        "auto", description="How many layers keep the inputs of their products for backward, else rebuilt (fused only)."
    )

    rms_norm: Implementation = Field(
        "auto",
        description="Who runs RMSNorm and the residual sum before it (fused layers only). auto: triton on a GPU, torch "
        "elsewhere.",
    )
    rope: Implementation = Field(
        "auto",
        description="Rotary position embedding (fused layers only); attention=document does it itself, unless this is "
        "torch.",
    )
    swiglu: Implementation = Field(
        "auto", description="silu(gate) * up (fused layers only), where no product makes it (gated)."
    )
    nf4: Implementation = Field(
        "auto", description="Dequantisation of NF4 weights (fused layers only); torch: bitsandbytes' own kernel."
    )
    matmul: ProductLibrary = Field(
        "auto",
        description="Products with the base's weights (fused layers only). cublaslt: by the fastest of its algorithms "
        "that gives torch's bits, timed when a shape is first met; auto: that on a GPU. Under train.deterministic or "
        "model.dtype=float32 all are torch's.",
    )
    gated: Literal["auto", "quack", "none"] = Field(
        "auto",
        description="SwiGLU in the epilogues of the products around it (fused layers in bfloat16 over an NF4 base "
        "only). auto: quack on a Hopper GPU where quack-kernels runs, unless swiglu or matmul is torch.",
    )
    padding: Literal["auto", "drop", "keep"] = Field(
        "auto",
        description="Whether the padding of a micro-batch's packs goes through the model (keep), or its documents lie "
        "end to end (drop; attention document, flash_attn, varlen or flash_attn_4). auto: drop on a GPU where "
        "packing is bfd, or none and a twentieth of the slots is left out, unless attention needs rows.",
    )
    prefix_reuse: Literal["auto", "micro_batch", "none"] = Field(
        "auto",
        description="Whether what documents of a micro-batch begin with in common, as a template's text, goes through "
        "the model once for all of them (packing bfd or none, attention document, no padding kept). Dropout gives "
        "them the same masks there. auto: micro_batch where padding is dropped and attention is document, which auto "
        "takes for its sake where that leaves out a twentieth of the slots.",
    )
    token_reuse: Literal["auto", "first_layer", "none"] = Field(
        "auto",
        description="Whether the first layer's q, k and v are made once for each distinct token of a micro-batch "
        "(fused layers only; not under dropout on them). auto: first_layer.",
    )
    lora: Literal["auto", "fused", "torch"] = Field(
        "auto",
        description="The adapters' products (fused layers only). fused: in those of the base's weights, and of several "
        "adapters at once, with the masking of dropout inside; torch: each by itself. auto: fused.",
    )
    cross_entropy: Implementation = Field(
        "auto", description="Loss and gradient of a chunk of logits; the chunks, of either kind of layer, stay."
    )


class CheckpointConfig(Section):
    """When checkpoints are written and how many are kept."""

    every: Literal["epoch", "never"] | Positive = Field("epoch", description="Steps between checkpoints, or `epoch`.")
    keep: Positive = Field(2, description="Newest verified checkpoints kept.")


class LogConfig(Section):
    """What is reported, apart from metrics.jsonl, which is always written."""

    every: Positive = Field(10, description="Steps between console lines.")
    trackers: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = Field(
        default_factory=list, description="Where metrics also go, through accelerate; each needs its package."
    )


# Attention backends that see one causal sequence a row and no document boundaries in it.
PLAIN_CAUSAL_ATTENTION = frozenset({"cudnn"})
# As `kernels.operations` has them: what stock layers leave to Hugging Face, PEFT and bitsandbytes.
_OF_FUSED_LAYERS = ("rms_norm", "rope", "swiglu", "nf4", "matmul", "gated", "token_reuse", "lora")


class RunConfig(Section):
    """A whole run. One YAML file holds it; `config.resolved.yaml` in the output directory is one."""

    model: ModelConfig = ModelConfig()
    lora: LoraConfig = LoraConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    kernels: KernelsConfig = KernelsConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    @model_validator(mode="after")
    def _settings_agree(self) -> RunConfig:
        if self.data.packing == "bfd" and self.kernels.attention in PLAIN_CAUSAL_ATTENTION:
            raise ValueError(
                f"data.packing=bfd keeps documents apart and kernels.attention={self.kernels.attention} cannot; "
                "use kernels.attention=auto or data.packing=wrapped"
            )
        if not self.lora.enabled and self.model.quantization != "none":
            raise ValueError(
                f"lora.enabled=false trains the base, which model.quantization={self.model.quantization} freezes; "
                "use model.quantization=none or lora.enabled=true"
            )
        if not self.lora.enabled and self.model.dtype != "float32":
            raise ValueError(
                f"lora.enabled=false keeps trained weights in float32, and model.dtype is {self.model.dtype}; "
                "use model.dtype=float32"
            )
        if not self.lora.enabled and self.kernels.layer == "fused":
            raise ValueError(
                "lora.enabled=false trains the base, and kernels.layer=fused trains adapters on a frozen one; "
                "use kernels.layer=auto or lora.enabled=true"
            )
        kernels = self.kernels
        if kernels.prefix_reuse == "micro_batch" and self.data.packing == "wrapped":
            raise ValueError(
                "kernels.prefix_reuse=micro_batch: under data.packing=wrapped documents see those before them; "
                "use data.packing=bfd"
            )
        if kernels.prefix_reuse == "micro_batch" and kernels.padding == "keep":
            raise ValueError(
                "kernels.prefix_reuse=micro_batch: kernels.padding=keep gives every pack a row of its own; "
                "use kernels.padding=drop"
            )
        for name in _OF_FUSED_LAYERS:
            if kernels.layer == "stock" and getattr(kernels, name) not in ("auto", "torch", "none"):
                raise ValueError(
                    f"kernels.{name}={getattr(kernels, name)}: kernels.layer=stock runs Hugging Face's own code; "
                    f"use kernels.{name}=auto or kernels.layer=auto"
                )
        for name in ("dequant_cache", "keep_inputs"):
            given = getattr(kernels, name)
            if kernels.layer == "stock" and given not in ("auto", "none", 0):
                raise ValueError(
                    f"kernels.{name}={given}: kernels.layer=stock has no layers that keep anything; "
                    f"use kernels.{name}=auto or kernels.layer=auto"
                )
        if self.model.quantization == "none" and kernels.dequant_cache not in ("auto", "none", 0):
            raise ValueError(
                f"kernels.dequant_cache={kernels.dequant_cache}: model.quantization=none has nothing to dequantise; "
                "use kernels.dequant_cache=auto"
            )
        if self.lora.enabled and self.lora.target_modules == []:
            raise ValueError(
                "lora.target_modules is empty, so nothing would be trained; use names of layers or all-linear"
            )
        return self


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML without tags, repeated keys, or PyYAML's reading of `2e-4` as text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes the texts that `_UniqueKeyLoader` would read as numbers."""


# PyYAML follows YAML 1.1, where an exponent needs a dot and a sign. YAML 1.2's floats are what people write.
_YAML_FLOAT = re.compile(r"^[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$")
for _side in (_UniqueKeyLoader, _Dumper):
    _side.add_implicit_resolver("tag:yaml.org,2002:float", _YAML_FLOAT, list("-+.0123456789"))


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration in the YAML file at `path`, changed by `section.key=value` overrides.

    With `path` None the defaults are the start. Raises `ConfigError`, one line a fault, for a file that cannot be read
    and for what is in it.
    """
    values: Any = {}
    if path is not None:
        values = read_yaml(Path(path), "configuration", "recipes/ holds examples, `packloop schema` lists the settings")
        if values is None:
            values = {}
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: sections are needed ({', '.join(RunConfig.model_fields)}), given {values!r}")
    for override in overrides:
        _apply_override(values, override)
    return parse_config(values)


def read_yaml(path: Path, what: str, help: str) -> Any:
    """What the YAML file at `path` holds; messages call it `what` and end with `help`.

    Raises `ConfigError` for a file that cannot be read or is not YAML.
    """
    if path.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"{what} {str(path)!r}: a .yaml file is needed; {help}")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{what} {str(path)!r} does not exist; {help}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{what} {str(path)!r} cannot be read: {error}") from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text, without tags and repeated keys. `ConfigError`, with `where`, for anything else."""
    try:
        return yaml.load(text, Loader=_UniqueKeyLoader)  # a SafeLoader: constructs no Python objects
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: {' '.join(str(error).split())}") from None


def parse_config(values: dict) -> RunConfig:
    """A `RunConfig` from nested dictionaries; `ConfigError` names each key at fault and the nearest valid one."""
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(describe_faults(error, values, RunConfig))) from None
    get_template(config.data.template)  # format strings of the user's own are checked as they are read
    return config


def dump_config(config: RunConfig) -> str:
    """The configuration as YAML that `load_config` reads back to an equal one."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def changed_keys(old: RunConfig, new: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (old value, new value) for every setting in which the two differ."""
    before, after = old.model_dump(mode="json"), new.model_dump(mode="json")
    return {
        f"{section}.{key}": (before[section][key], after[section][key])
        for section in before
        for key in before[section]
        if before[section][key] != after[section][key]
    }


def _apply_override(values: dict, override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.split(".")
    if not equals or len(parts) < 2:
        raise ConfigError(f"override {override!r}: section.key=value is needed, for example train.max_steps=20")
    target = values
    for part in parts[:-1]:
        target = target.setdefault(part, {})
        if not isinstance(target, dict):
            raise ConfigError(f"override {override!r}: {part} is a setting, not a section")
    target[parts[-1]] = parse_yaml(text, f"override {override!r}")
