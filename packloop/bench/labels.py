"""Names for what a training step does, put into a profiler's trace while one is taken and at no other time.

`labelled()` wraps the functions that a layer, the head and the optimizer are made of in `record_function`, and hooks
the stock modules; on leaving, everything is as it was. A label says its class of work, the bytes that the work has to
move if each operand is read once and each result written once, and, where adapters ride in a base product, their share
of its FLOPs. What the autograd engine runs for a labelled forward function is led back to it by sequence numbers.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.profiler import record_function
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

from packloop.bench import kernel_classes as classes
from packloop.engine import batch, loop, optim
from packloop.kernels import (
    adapters,
    attention,
    decoder_layer,
    document_attention,
    extended_weight,
    flash_attention,
    gated,
    lora_linear,
    nf4,
    patch,
    rms_norm,
)

# What tells phases apart: the loss of a micro-batch, and within it, or again in backward, the forward pass of a layer.
LOSS, LAYER = "loss", "layer"
# Functions that do products of the base and of the adapters: in the first the adapters' are its `addmm_`, in the second
# those over the adapters' ranks.
GROUP_PRODUCTS, INPUT_GRADIENT = "lora_group_forward", "lora_input_gradient"
# In backward, the norm of a layer's input is made again where it was not kept.
NORM_FORWARD = "add_rms_norm_forward"

_TEXT = re.compile(r"packloop (\S+) \[(.*); (\d+) B; (\d+) B backward; (\S+) LoRA; (\d+) ranks\]")


@dataclass(frozen=True)
class Label:
    """what: a function or module; cls: its class of work, None for a range that only tells the phase.

    moved_bytes: by the function itself; backward_bytes: by what autograd runs for it. lora_share: of its product.
    ranks: of the adapters in it, where its products are to be told apart by them.
    """

    what: str
    cls: str | None = None
    moved_bytes: int = 0
    backward_bytes: int = 0
    lora_share: float = 0.0
    ranks: int = 0

    def __str__(self) -> str:
        return (
            f"packloop {self.what} [{self.cls or ''}; {self.moved_bytes} B; {self.backward_bytes} B backward; "
            f"{self.lora_share:.6f} LoRA; {self.ranks} ranks]"
        )

    @classmethod
    def parse(cls, text: str) -> Label | None:
        """The label that `str` made this text of; None for any other text."""
        match = _TEXT.fullmatch(text)
        if match is None:
            return None
        what, kind, moved, backward, share, ranks = match.groups()
        return cls(what, kind or None, int(moved), int(backward), float(share), int(ranks))


@contextmanager
def labelled() -> Iterator[None]:
    """Inside, every training step of this process leaves labels in the trace of an active profiler."""
    with ExitStack() as stack:
        for owner, name, describe in _functions():
            stack.enter_context(_wrapped(owner, name, describe))
        stack.enter_context(_module_labels())
        yield


@contextmanager
def _wrapped(owner: Any, name: str, describe: Callable[..., Label]) -> Iterator[None]:
    original = vars(owner)[name]

    @functools.wraps(original)
    def with_label(*args, **kwargs):
        with record_function(str(describe(*args, **kwargs))):
            return original(*args, **kwargs)

    setattr(owner, name, with_label)
    try:
        yield
    finally:
        setattr(owner, name, original)


def _functions() -> list[tuple[Any, str, Callable[..., Label]]]:
    """(module or class, attribute, its label for given arguments)."""
    lora = [("lora_project", _project), ("lora_b_gradients", _b_gradients), ("lora_a_gradient", _a_gradient)]
    found = [
        (loop, "packed_loss_sum", _plain(LOSS, None)),
        (decoder_layer, "_forward", _plain(LAYER, None)),
        (nf4.Nf4Group, "dequantize", _dequantize),
        (adapters.AdapterCopies, "refresh", _plain("refresh", classes.LORA)),
        (extended_weight.ExtendedWeight, "write_adapters", _plain("write_adapters", classes.LORA)),
        (decoder_layer, "extended_group_forward", _extended_forward),
        (decoder_layer, "extended_input_gradient", _extended_input_gradient),
        (decoder_layer, "lora_group_forward", _plain(GROUP_PRODUCTS, classes.BASE_GEMM)),
        (decoder_layer, INPUT_GRADIENT, _input_gradient),
        (lora_linear, "dropout_add_input_gradient_", _add_input_gradient),
        (lora_linear, "dropout_apply", _plain("dropout_apply", classes.LORA)),
        (decoder_layer, NORM_FORWARD, _norm_forward),
        (decoder_layer, "add_rms_norm_backward", _norm_backward),
        (rms_norm, NORM_FORWARD, _norm_forward),
        (rms_norm, "add_rms_norm_backward", _norm_backward),
        (decoder_layer, "rope_", _rope),
        (patch, "apply_rope", _apply_rope),
        (patch, "rope_tables", _plain("rope_tables", classes.ROPE)),
        (decoder_layer, "spread", _plain("spread", classes.COPIES)),
        (decoder_layer, "gated_group_forward", _gated_forward),
        (decoder_layer, "gated_group_gradient_", _gated_gradient),
        (decoder_layer, "swiglu_forward", _swiglu_forward),
        (decoder_layer, "swiglu_backward", _swiglu_backward),
        (patch, "linear_cross_entropy", _head),
        (optim.AdamW, "step", _optimizer_step),
        (optim.FlatParameters, "zero_gradient", _zero_gradient),
        (batch, "to_device", _plain("to_device", classes.COPIES)),
    ]
    found += [(owner, name, describe) for owner in (decoder_layer, lora_linear) for name, describe in lora]
    found += [(owner, "lora_project", _project) for owner in (extended_weight, gated)]
    backends = [attention.DifferentiatedAttention, document_attention.DocumentAttention]
    backends += list(flash_attention.BACKENDS.values())
    for backend in backends:
        for name in ("forward", "backward"):
            found.append((backend, name, _plain(f"attention.{name}", classes.ATTENTION)))
    found.append((attention.DifferentiatedAttention, "__call__", _plain("attention", classes.ATTENTION)))
    return found


def _bytes(*tensors: Tensor | None) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def _plain(what: str, cls: str | None) -> Callable[..., Label]:
    return lambda *_args, **_kwargs: Label(what, cls)


def _dequantize(group: nf4.Nf4Group, out: Tensor, **_options) -> Label:
    # Half a byte a weight, one byte of scale a block of 64, and what is written.
    return Label("dequantize", classes.DEQUANTISATION, round(out.numel() * (1 / 2 + 1 / 64)) + _bytes(out))


def _project(x_TH, group, *_rest, **_options) -> Label:
    written = x_TH.shape[0] * group.a_RH.shape[0] * x_TH.element_size()
    return Label("lora_project", classes.LORA, _bytes(x_TH, group.a_RH) + written)


def _b_gradients(dy_TO, projected_TR, group, *_rest, **_options) -> Label:
    if projected_TR is None:
        return Label("lora_b_gradients")
    present = [b_Or for b_Or in group.b_Or if b_Or is not None]
    read = projected_TR.shape[0] * sum(b_Or.shape[0] for b_Or in present) * projected_TR.element_size()
    # Gradients are fp32 and added to: read and written.
    return Label(
        "lora_b_gradients",
        classes.LORA,
        read + 2 * _bytes(projected_TR) + 8 * sum(b_Or.numel() for b_Or in present),
    )


def _a_gradient(d_projected_TR, x_TH, group, *_rest, **_options) -> Label:
    return Label("lora_a_gradient", classes.LORA, _bytes(d_projected_TR, x_TH) + 8 * group.a_RH.numel())


def _input_gradient(dy_TO, d_projected_TR, *_rest, **_options) -> Label:
    ranks = 0 if d_projected_TR is None else d_projected_TR.shape[1]
    return Label(INPUT_GRADIENT, classes.BASE_GEMM, ranks=ranks)


def _add_input_gradient(dx_TH, d_projected_TR, a_RH, *_rest, **_options) -> Label:
    return Label("dropout_add_input_gradient", classes.LORA, 2 * _bytes(dx_TH) + _bytes(d_projected_TR, a_RH))


def _extended_forward(x_extended, weight, *_rest, **_options) -> Label:
    share = 1 - weight.num_features / x_extended.shape[1]
    return Label("extended_group_forward", classes.BASE_GEMM, lora_share=share)


def _extended_input_gradient(dy_extended, weight, *_rest, **_options) -> Label:
    share = 1 - sum(weight.out_features) / dy_extended.shape[1]
    return Label("extended_input_gradient", classes.BASE_GEMM, lora_share=share)


def _gated_forward(x_wide, weight, *_rest, **_options) -> Label:
    share = 1 - weight.num_features / x_wide.shape[1] if hasattr(weight, "num_features") else 0.0
    return Label("gated_forward", classes.BASE_GEMM, lora_share=share)


def _gated_gradient(dy_wide, weight, *_rest, **_options) -> Label:
    share = 1 - sum(weight.out_features) / dy_wide.shape[1] if hasattr(weight, "out_features") else 0.0
    return Label("gated_backward", classes.BASE_GEMM, lora_share=share)


def _norm_forward(residual_TH, update_TH, *_rest, **_options) -> Label:
    return Label(NORM_FORWARD, classes.NORMS, (2 if update_TH is None else 4) * _bytes(residual_TH))


def _norm_backward(d_normed_TH, d_residual_out_TH, residual_out_TH, *_rest, **_options) -> Label:
    passes = 3 if d_residual_out_TH is None else 4
    return Label("add_rms_norm_backward", classes.NORMS, passes * _bytes(residual_out_TH))


def _rope(q_TQD, k_TKD, *_rest, **_options) -> Label:
    return Label("rope", classes.ROPE, 2 * _bytes(q_TQD, k_TKD))


def _apply_rope(x_BHLD, *_rest, **_options) -> Label:
    return Label("apply_rope", classes.ROPE, 2 * _bytes(x_BHLD), 2 * _bytes(x_BHLD))


def _swiglu_forward(gate_TI, *_rest, **_options) -> Label:
    return Label("swiglu_forward", classes.ACTIVATION, 3 * _bytes(gate_TI))


def _swiglu_backward(d_hidden_TI, gate_TI, *_rest, hidden_out=None, **_options) -> Label:
    return Label("swiglu_backward", classes.ACTIVATION, 5 * _bytes(gate_TI) + _bytes(hidden_out))


def _head(hidden_TH, *_rest, **_options) -> Label:
    return Label("linear_cross_entropy", classes.HEAD, 0, 2 * _bytes(hidden_TH))


def _optimizer_step(optimizer: optim.AdamW, *_rest, **_options) -> Label:
    # AdamW reads weight, gradient and two moments and writes all but the gradient: seven passes. Before it the loop
    # reads the gradient for its norm and scales it in place: three.
    return Label("optimizer_step", classes.OPTIMIZER, 10 * _bytes(optimizer.flat.weight))


def _zero_gradient(flat: optim.FlatParameters, *_rest, **_options) -> Label:
    return Label("zero_gradient", classes.OPTIMIZER, _bytes(flat.gradient))


@contextmanager
def _module_labels() -> Iterator[None]:
    """Labels around the modules of stock layers, as they are called."""
    entered: list[tuple[nn.Module, record_function | None]] = []

    def before(module: nn.Module, args: tuple) -> None:
        outer = next((one for one, _ in reversed(entered) if hasattr(one, "base_layer")), None)
        label = _module_label(module, args, outer)
        scope = None if label is None else record_function(str(label))
        if scope is not None:
            scope.__enter__()
        entered.append((module, scope))

    def after(module: nn.Module, args: tuple, output: Any) -> None:
        while entered:
            one, scope = entered.pop()
            if scope is not None:
                scope.__exit__(None, None, None)
            if one is module:
                return

    hooks = [register_module_forward_pre_hook(before), register_module_forward_hook(after, always_call=True)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _module_label(module: nn.Module, args: tuple, adapted: nn.Module | None) -> Label | None:
    """adapted: the PEFT layer that this module is called in, if any."""
    x = next((value for value in args if isinstance(value, Tensor)), None)
    size = 0 if x is None else _bytes(x)
    name = type(module).__name__
    if isinstance(module, LlamaDecoderLayer):
        # Its own two operations are the residual sums, which fused layers leave to the norms: four and two tensors more
        # than the norms move by themselves.
        return Label(LAYER, classes.NORMS, 4 * size, 2 * size)
    if isinstance(module, LlamaRMSNorm):
        return Label(name, classes.NORMS, 2 * size, 3 * size)
    if isinstance(module, LlamaRotaryEmbedding):
        return Label(name, classes.ROPE)
    if isinstance(module, LlamaAttention):
        return Label(name, classes.ATTENTION)
    if isinstance(module, LlamaMLP):
        wide = 0 if x is None else size // x.shape[-1] * module.config.intermediate_size
        return Label(name, classes.ACTIVATION, 3 * wide, 5 * wide)
    if hasattr(module, "base_layer"):
        return Label(name, classes.LORA)
    if adapted is not None and module is not adapted.base_layer:
        return Label(name, classes.LORA)
    if isinstance(module, nn.Linear):
        return Label(name, classes.BASE_GEMM)
    return None
