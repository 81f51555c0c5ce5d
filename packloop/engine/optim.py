"""The trained parameters as views of one flat fp32 buffer, and the optimizer that steps it.

One buffer makes one optimizer call, one norm, one all-reduce and one `zero_` of what PEFT spreads over hundreds of
small tensors, and makes bitsandbytes' paging, which skips small tensors, apply to all of the state.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

# Views start at multiples of this many elements, so that every one is 128-byte aligned.
_ALIGNMENT = 32


class FlatParameters:
    """Moves every trainable parameter of `model` (and its gradient) into one flat buffer.

    weight, gradient: fp32 [num_elements]. Each parameter's `.data` and `.grad` become views of them, in the order of
    `_side_by_side`; alignment gaps stay zero. float64 models keep float64 (for tests of exactness). Raises
    ValueError where a trainable parameter is kept in fewer than 32 bits: updates of 1e-4 of a bf16 weight would be
    rounded away.
    """

    def __init__(self, model: nn.Module):
        self.named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self.named:
            raise ValueError("the model has no trainable parameter")
        low = [name for name, p in self.named.items() if p.dtype not in (torch.float32, torch.float64)]
        if low:
            raise ValueError(f"trained weights are kept in float32; {low[0]} is {self.named[low[0]].dtype}")
        first = next(iter(self.named.values()))
        self.offsets: dict[str, int] = {}
        size = 0
        for name in _side_by_side(list(self.named)):
            self.offsets[name] = size
            size += -(-self.named[name].numel() // _ALIGNMENT) * _ALIGNMENT
        self.weight = nn.Parameter(torch.zeros(size, dtype=first.dtype, device=first.device))
        self.gradient = torch.zeros_like(self.weight, requires_grad=False)
        self.weight.grad = self.gradient
        for name, parameter in self.named.items():
            view = self.view(self.weight.data, name)
            view.copy_(parameter.data)
            parameter.data = view
            parameter.grad = self.view(self.gradient, name)

    def view(self, flat: Tensor, name: str) -> Tensor:
        """The part of a flat tensor that belongs to the parameter `name`, in its shape."""
        parameter, start = self.named[name], self.offsets[name]
        return flat[start : start + parameter.numel()].view(parameter.shape)

    def zero_gradient(self) -> None:
        """Zeroes the buffer in place; `zero_grad()` would unlink the views."""
        self.gradient.zero_()

    def check_linked(self) -> None:
        """AssertionError unless every parameter and gradient still is a view of the flat buffers."""
        for name, parameter in self.named.items():
            assert parameter.data_ptr() == self.view(self.weight.data, name).data_ptr(), f"{name} left the flat buffer"
            assert parameter.grad is not None, f"{name} lost its gradient buffer"
            assert parameter.grad.data_ptr() == self.view(self.gradient, name).data_ptr(), f"{name}.grad left it"


def _side_by_side(names: list[str]) -> list[str]:
    """The names with adapters of one module's layers together, all A before all B.

    Layers that share an input then have their A's gradients in one piece, which one product can add to.
    """
    blocks = {name: name.partition(".lora_")[0].rpartition(".")[0] for name in names}
    first = {}
    for index, name in enumerate(names):
        first.setdefault(blocks[name], index)
    return sorted(names, key=lambda name: (first[blocks[name]], ".lora_B" in name))


class AdamW:
    """AdamW in 32 bits over one flat buffer: bitsandbytes' (paged on request) on CUDA, PyTorch's elsewhere.

    Decoupled weight decay, bias correction, update lr * m / (sqrt(v) + eps) (Loshchilov and Hutter, 2019).
    bitsandbytes' CPU path goes through torch.compile, which recompiles as its step argument changes: the same step
    would round differently after a resume, so the CPU takes PyTorch's.
    """

    def __init__(
        self,
        flat: FlatParameters,
        *,
        name: str,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ):
        self.flat = flat
        self.is_bitsandbytes = flat.weight.device.type == "cuda"
        arguments = {"lr": 0.0, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        if self.is_bitsandbytes:
            import bitsandbytes as bnb

            cls = bnb.optim.PagedAdamW32bit if name == "paged_adamw_32bit" else bnb.optim.AdamW32bit
            self.optimizer = cls([flat.weight], **arguments)
            # State is allocated now, so that memory is decided before the first step and a resume can fill it in place.
            self.optimizer.init_state(self.optimizer.param_groups[0], flat.weight, 0, 0)
            # Its step would call the driver for this while the device waits; `prefetch` does so before.
            self._prefetch_state, self.optimizer.prefetch_state = self.optimizer.prefetch_state, lambda parameter: None
        else:
            if name == "paged_adamw_32bit":
                logger.info("train.optim=paged_adamw_32bit pages on CUDA only; on this device its state is not paged")
            self.optimizer = torch.optim.AdamW([flat.weight], foreach=False, fused=False, **arguments)
            self.optimizer.state[flat.weight] = {
                "step": torch.zeros((), dtype=torch.float32),
                "exp_avg": torch.zeros_like(flat.weight.data),
                "exp_avg_sq": torch.zeros_like(flat.weight.data),
            }

    @property
    def is_paged(self) -> bool:
        """Whether the moments live in managed memory that the driver may move to the host."""
        return getattr(self._moments()[0], "is_paged", False)

    @property
    def paged_bytes(self) -> int:
        """Managed memory of the moments, in bytes; 0 where they are not paged."""
        return sum(moment.nbytes for moment in self._moments()) if self.is_paged else 0

    def prefetch(self) -> None:
        """Asks for paged moments on the device, before `step` and while the device is still busy: host work."""
        if self.is_paged:
            self._prefetch_state(self.flat.weight)

    def step(self, learning_rate: float) -> None:
        """One update of the flat weight from the flat gradient at `learning_rate`."""
        self.optimizer.param_groups[0]["lr"] = learning_rate
        self.optimizer.step()

    def state_tensors(self) -> dict[str, Tensor]:
        """Per parameter `NAME.exp_avg` and `NAME.exp_avg_sq`, fp32 on the CPU, independent of the flat layout."""
        if self.is_bitsandbytes:
            torch.cuda.synchronize()
        first, second = self._moments()
        tensors = {}
        for name in self.flat.named:
            tensors[f"{name}.exp_avg"] = self.flat.view(first, name).to("cpu", copy=True)
            tensors[f"{name}.exp_avg_sq"] = self.flat.view(second, name).to("cpu", copy=True)
        return tensors

    def load_state_tensors(self, tensors: dict[str, Tensor], num_steps: int) -> None:
        """Fills the moments in place (paged memory stays paged) and sets the number of steps taken."""
        first, second = self._moments()
        for name in self.flat.named:
            self.flat.view(first, name).copy_(tensors[f"{name}.exp_avg"])
            self.flat.view(second, name).copy_(tensors[f"{name}.exp_avg_sq"])
        state = self.optimizer.state[self.flat.weight]
        state["step"] = num_steps if self.is_bitsandbytes else torch.tensor(float(num_steps))

    def _moments(self) -> tuple[Tensor, Tensor]:
        state = self.optimizer.state[self.flat.weight]
        return (state["state1"], state["state2"]) if self.is_bitsandbytes else (state["exp_avg"], state["exp_avg_sq"])
