"""That the replacement runs: a trial forward in which the calls of attention are counted, layer by layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from packloop.kernels.attention import CountedAttention, DocumentLayout
from packloop.kernels.patch import packed_loss_sum

_NUM_SLOTS = 64


def check_forward(llama: nn.Module, attention: str) -> None:
    """Runs 64 slots through the Llama that `patched` yields and counts: each layer calls `attention` once, stock never.

    ValueError with the first layer where it is otherwise. No gradient is made, generators and everything else stay as
    they were; the model's mode, and so dropout, is the training's own.
    """
    run_layers = getattr(llama.model.forward, "run_layers", None)
    if run_layers is None:
        raise ValueError(
            f"kernels.attention={attention} is not what runs: LlamaModel.forward is the stock one; {_REMEDY}"
        )
    layers = llama.model.layers
    counters = run_layers.attentions(llama.model)
    before = [_calls_of(counter) for counter in counters]
    # The hooks see a module's call whichever forward it has.
    module_calls = [0] * len(layers)
    handles = [
        layer.self_attn.register_forward_pre_hook(lambda *_, index=index: _count(module_calls, index))
        for index, layer in enumerate(layers)
    ]
    device = llama.lm_head.weight.device
    try:
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            packed_loss_sum(llama, *_trial_batch(llama.config.vocab_size, device))
    finally:
        for handle in handles:
            handle.remove()
    for index, (counter, start) in enumerate(zip(counters, before, strict=True)):
        num_calls = _calls_of(counter) - start if getattr(counter, "name", None) == attention else 0
        num_stock = module_calls[index] - (num_calls if run_layers.calls_attention_modules else 0)
        if (num_calls, num_stock) != (1, 0):
            raise ValueError(
                f"kernels.attention={attention} is not what runs: in a trial forward, layer {index} called it "
                f"{num_calls} times and another attention {num_stock} times instead of once and never; {_REMEDY}"
            )


_REMEDY = "something else edits the model, or undid the replacement: leave that out"


def _calls_of(counter: CountedAttention | None) -> int:
    return getattr(counter, "calls", 0)


def _count(calls: list[int], index: int) -> None:
    calls[index] += 1


def _trial_batch(vocabulary: int, device: torch.device) -> tuple[Tensor, Tensor, DocumentLayout, Tensor, Tensor]:
    """One row of one document, which every backend takes; one label."""
    positions = torch.arange(_NUM_SLOTS, device=device)[None]
    bounds = torch.tensor([0, _NUM_SLOTS], dtype=torch.int32)
    layout = DocumentLayout(
        torch.zeros(1, _NUM_SLOTS, dtype=torch.int32, device=device),
        bounds.to(device),
        _NUM_SLOTS,
        is_packed=False,
        cu_seqlens_cpu=bounds,
    )
    first = positions[0, :1]
    return positions % vocabulary, positions, layout, first, first
