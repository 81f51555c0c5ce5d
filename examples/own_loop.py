"""Training rebuilt from the package's parts, for those who want every line of the loop in their own hands.

    python examples/own_loop.py recipes/demo.yaml train.max_steps=20

One process, no checkpoints; the losses are those of `packloop train`, to the last bit on the CPU.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator

import torch
from accelerate.utils import set_seed

from packloop.config import RunConfig, load_config
from packloop.data.loader import PackLoader, build_data
from packloop.engine import schedule
from packloop.engine.batch import to_device
from packloop.engine.model import load_model, load_tokenizer
from packloop.engine.optim import AdamW, FlatParameters
from packloop.errors import InputError
from packloop.kernels.patch import packed_loss_sum, patched, why_not_fused


def own_loop(config: RunConfig) -> Iterator[float]:
    """Trains as `config` says and yields the loss of each optimizer step, in nats per label token."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer(config.model)
    data = build_data(config.data, tokenizer, seed=config.train.seed)
    set_seed(config.train.seed)  # draws the adapter
    model = load_model(config.model, config.lora, device)
    set_seed(config.train.seed)  # draws the dropout
    flat = FlatParameters(model)
    betas = (config.train.adam_beta1, config.train.adam_beta2)
    eps, decay = config.train.adam_epsilon, config.train.weight_decay
    optimizer = AdamW(flat, name=config.train.optim, betas=betas, eps=eps, weight_decay=decay)
    loader = PackLoader(
        data.train,
        packing=config.data.packing,
        max_length=config.data.max_length,
        per_device_batch_size=config.train.per_device_train_batch_size,
        gradient_accumulation_steps=config.train.gradient_accumulation_steps,
        rank=0,
        world_size=1,
        seed=config.train.seed,
        shuffle=config.data.shuffle,
        pad_token_id=tokenizer.pad_token_id,
    )
    num_steps = config.train.max_steps or math.ceil(config.train.num_train_epochs * loader.steps_per_epoch)
    warmup = schedule.num_warmup_steps(config.train.warmup_ratio, num_steps)
    model.train()
    with patched(model, attention="sdpa", fused=why_not_fused(model) is None) as llama:
        for step in range(num_steps):
            flat.zero_gradient()
            loss_sum, num_labels = 0.0, 0
            for batch in loader.next_window():  # the micro-batches of one optimizer step
                loss = packed_loss_sum(llama, *to_device(batch, device))
                loss.backward()
                loss_sum, num_labels = loss_sum + loss.item(), num_labels + batch.num_label_tokens
            # Losses are summed and divided once, by the labels of the whole step; then the gradient is clipped.
            grad_norm = flat.gradient.norm().item() / num_labels
            if not math.isfinite(loss_sum + grad_norm):
                raise SystemExit(f"step {step + 1}: the loss or its gradient is not finite")
            flat.gradient.mul_(min(1.0, config.train.max_grad_norm / (grad_norm + 1e-6)) / num_labels)
            rate = schedule.multiplier(
                config.train.lr_scheduler_type, step, num_steps=num_steps, num_warmup_steps=warmup
            )
            optimizer.step(config.train.learning_rate * rate)
            yield loss_sum / num_labels


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python examples/own_loop.py CONFIG [SECTION.KEY=VALUE]...")
    try:
        for number, loss in enumerate(own_loop(load_config(sys.argv[1], sys.argv[2:])), start=1):
            print(f"step {number}  loss {loss:.4f}")
    except InputError as error:  # ConfigError is one
        sys.exit(f"error: {error}")
