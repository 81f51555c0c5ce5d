"""What PEFT has put around linear layers: plain LoRA, y = W x + scaling * B A dropout(x), or something else.

PEFT's layers are known by their attributes; reading these costs the host microseconds and waits for no device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import nn

from packloop.kernels.lora_linear import Lora


class _State(NamedTuple):
    """What decides which function a LoRA layer is, beside the values of its weights.

    Weights go by `id`, which no other parameter gets while what was made of them holds them.
    """

    active_adapter: tuple[str, ...]
    merged_adapter: bool
    base_weight: int
    adapter_weight: tuple[int, ...]  # of A, then of B
    scaling: tuple[float, ...]
    dropout: tuple[float, ...]

    @classmethod
    def of(cls, module: nn.Module) -> _State:
        # Through torch's dictionaries: a submodule as an attribute takes a microsecond, and there are hundreds.
        parts = module._modules
        a, b, dropouts = (parts[name]._modules for name in ("lora_A", "lora_B", "lora_dropout"))
        names = tuple([name for name in module.active_adapters if name in a])
        return cls(
            names,
            bool(module.merged_adapters),
            id(parts["base_layer"]._parameters["weight"]),
            tuple([id(linears[name]._parameters.get("weight")) for linears in (a, b) for name in names]),
            tuple([module.scaling[name] for name in names]),
            tuple([vars(dropouts[name]).get("p", 0.0) for name in names]),
        )


class AdapterWatch:
    """Tells whether LoRA layers are still what they were when this was made, and whether PEFT has disabled them."""

    def __init__(self, linears: Mapping[str, nn.Module]):
        """linears: by name; those without an adapter do not matter."""
        adapted = {name: module for name, module in linears.items() if _has_lora(module)}
        self._seen = [(name, module, _State.of(module)) for name, module in adapted.items()]
        self._active = [(module, list(module.active_adapters)) for module in adapted.values()]
        self._links = [link for module in adapted.values() for link in _links(module)]

    def are_enabled(self) -> bool:
        """False inside PEFT's `disable_adapter()`. ValueError where a layer is another function than it was."""
        if not self._is_untouched():
            self._check_states()
        disabled = [module.disable_adapters for _, module, _ in self._seen]
        if reason := _why_not_alike(disabled):
            raise ValueError(reason)
        return not any(disabled)

    def _is_untouched(self) -> bool:
        """Whether all is the same objects still, which is told in a fraction of the time that a state takes to read."""
        for module, active in self._active:
            if module.merged_adapters or module.active_adapters != active:
                return False
        return all(owner.get(key) is value for owner, key, value in self._links)

    def _check_states(self) -> None:
        for name, module, before in self._seen:
            if (now := _State.of(module)) != before:
                differs = next(key for key in _State._fields if getattr(now, key) != getattr(before, key))
                what = f"{name} has another {differs.replace('_', ' ')} than when `patched` was entered"
                raise ValueError(_why_not_plain_lora(name, module) or what)


def _links(module: nn.Module) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """Owner, key and value of every step on the ways by which `_State.of` reads a layer; None: nothing there."""
    parts = module._modules
    yield vars(module), "scaling", module.scaling
    for key in ("base_layer", "lora_A", "lora_B", "lora_dropout"):
        yield parts, key, parts[key]
    yield parts["base_layer"]._parameters, "weight", parts["base_layer"]._parameters["weight"]
    for name in module.active_adapters:
        yield module.scaling, name, module.scaling.get(name)
        a, b, dropout = (parts[key]._modules.get(name) for key in ("lora_A", "lora_B", "lora_dropout"))
        for key, part in zip(("lora_A", "lora_B", "lora_dropout"), (a, b, dropout), strict=True):
            yield parts[key]._modules, name, part
        for linear in (a, b):
            if linear is not None:
                yield linear._parameters, "weight", linear._parameters.get("weight")
        if dropout is not None:
            yield vars(dropout), "p", vars(dropout).get("p")


def adapter_of(module: nn.Module) -> Lora | None:
    """The active LoRA adapter of a linear layer; None for a layer without one."""
    names = _active_names(module)
    if not names:
        return None
    (name,) = names
    return Lora(module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name])


def dropout_of(module: nn.Module) -> float | None:
    """The probability of the active adapter's dropout; None for a layer without one."""
    names = _active_names(module)
    return _probability(module, names[0]) if names else None


def why_not_plain(modules: Mapping[str, nn.Module], linears: Mapping[str, nn.Module]) -> str | None:
    """None where PEFT changes nothing in `modules` but the linear layers among them, by plain LoRA; else what it does.

    Both go by their names in the model. A disabled adapter is plain, too.
    """
    for name, module in modules.items():
        if name in linears and _has_lora(module):
            if reason := _why_not_plain_lora(name, module):
                return reason
        elif hasattr(module, "base_layer") or hasattr(module, "original_module"):  # another tuner's, or a trained copy
            return f"its adapters are LoRA on linear layers, and {name} is a {class_path(module)}"
    return _why_not_alike([module.disable_adapters for module in linears.values() if _has_lora(module)])


def class_path(module: nn.Module) -> str:
    """`peft.tuners.lora.layer.Linear`."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _why_not_alike(disabled: list[bool]) -> str | None:
    if len(set(disabled)) < 2:
        return None
    return f"it runs with all adapters or none, and those of {sum(disabled)} of {len(disabled)} layers are disabled"


def _why_not_plain_lora(name: str, module: nn.Module) -> str | None:
    names = _active_names(module)
    if module.merged_adapters:
        return f"it adds adapters itself, and {name}'s is merged into the base already (unmerge_adapter() undoes it)"
    if len(names) > 1:
        return f"it runs one adapter a layer, and {name} has {len(names)} active: {', '.join(names)}"
    for adapter in names:
        # PEFT's registry of DoRA, aLoRA and what else is LoRA by another formula.
        if variant := module.lora_variant.get(adapter):
            return f"its adapters are plain LoRA, and {name} has {type(variant).__name__}"
        if hasattr(module, "parameter_name") or not isinstance(module.lora_A[adapter], nn.Linear):
            return f"its adapters are plain LoRA, and {name} has {class_path(module)}"
        if module.lora_B[adapter].bias is not None:
            return f"its adapters have no bias, and {name}'s has (lora_bias=True)"
    return None


def _has_lora(module: nn.Module) -> bool:
    return hasattr(module, "lora_A")


def _active_names(module: nn.Module) -> tuple[str, ...]:
    """An active adapter need not be one of every layer."""
    return tuple(name for name in module.active_adapters if name in module.lora_A) if _has_lora(module) else ()


def _probability(module: nn.Module, name: str) -> float:
    return getattr(module.lora_dropout[name], "p", 0.0)
