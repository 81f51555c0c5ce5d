"""`train` against a loop that shares no code with it: stock transformers, stock PEFT, one document at a time.

Only the token ids come from the package. The gradient's independence of how a batch is split is shown in float64.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from small_job import read_steps, small_config
from tiny_run import save_base
from transformers import LlamaForCausalLM

from packloop.data.loader import PackLoader, build_data
from packloop.data.tokenize import Documents
from packloop.engine.batch import Windows
from packloop.engine.loop import train, train_step
from packloop.engine.model import load_tokenizer
from packloop.engine.optim import AdamW, FlatParameters
from packloop.kernels.patch import patched

NUM_STEPS, LEARNING_RATE, CLIP, ACCUMULATION = 100, 2e-3, 0.5, 2


def sequences_of_steps(config) -> list[list[torch.Tensor]]:
    """The token sequences of each step: rows as they are for wrapped, each document by itself for bfd."""
    tokenizer = load_tokenizer(config.model)
    loader = PackLoader(
        build_data(config.data, tokenizer, seed=0).train,
        packing=config.data.packing,
        max_length=config.data.max_length,
        per_device_batch_size=1,
        gradient_accumulation_steps=ACCUMULATION,
        rank=0,
        world_size=1,
        seed=0,
        shuffle=True,
        pad_token_id=tokenizer.pad_token_id,
    )
    steps = []
    for _ in range(NUM_STEPS):
        sequences = []
        for batch in loader.next_window():
            ids, numbers = batch.input_ids[0], batch.document_ids[0]
            sequences += [ids[numbers == number] for number in range(int(numbers.max()) + 1)]
        steps.append(sequences)
    return steps


def plain_losses(base, steps: list[list[torch.Tensor]]) -> list[float]:
    torch.manual_seed(0)
    llama = LlamaForCausalLM.from_pretrained(base, attn_implementation="eager")
    names = ["q_proj", "v_proj", "down_proj"]
    adapter = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=names, task_type="CAUSAL_LM")
    model = get_peft_model(llama, adapter).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    losses = []
    for step, sequences in enumerate(steps):
        num_targets = sum(len(ids) - 1 for ids in sequences)
        total = 0.0
        for ids in sequences:
            logits = model(input_ids=ids[None]).logits[0, :-1]
            loss_sum = F.cross_entropy(logits, ids[1:], reduction="sum")
            (loss_sum / num_targets).backward()
            total += loss_sum.item()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, step / math.ceil(0.03 * NUM_STEPS))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total / num_targets)
    return losses


@pytest.mark.parametrize(("packing", "layer"), [("wrapped", "fused"), ("bfd", "fused"), ("bfd", "stock")])
def test_100_steps_equal_a_plain_loop(packing, layer, small_base, small_rows, tmp_path):
    settings = {"max_steps": NUM_STEPS, "learning_rate": LEARNING_RATE, "max_grad_norm": CLIP}
    sections = {"train": settings, "data": {"packing": packing}, "kernels": {"layer": layer}}
    config = small_config(small_base, small_rows, tmp_path / "run", **sections)
    train(config)
    ours = [values["loss"] for values in read_steps(tmp_path / "run")]
    plain = plain_losses(small_base, sequences_of_steps(config))
    difference = np.abs(np.array(ours) - np.array(plain))
    print(
        f"{packing}, {layer} layer: loss differs by at most {difference.max():.1e}, {difference.mean():.1e} in the mean"
    )
    assert plain[-1] < plain[0] - 0.5, "nothing was learnt, so the comparison shows nothing"
    assert difference.max() < 1e-4
    assert difference.mean() < 1e-6


@pytest.mark.parametrize("fused", [False, True], ids=["stock", "fused"])
def test_row01_gradient_does_not_depend_on_the_micro_batches(tmp_path, fused):
    """Documents of 1, 7 and 500 label tokens and a few more, as eight micro-batches of one and as one of eight."""
    base = save_base(tmp_path / "base", vocab_size=300)
    lengths = np.array([2, 8, 501, 2, 8, 64, 3, 30])
    rng = np.random.default_rng(0)
    documents = Documents(
        token_ids=rng.integers(3, 300, lengths.sum()).astype(np.int32),
        counts=np.ones(lengths.sum(), dtype=bool),
        offsets=np.concatenate([[0], lengths.cumsum()]),
        row_ids=np.arange(len(lengths)),
    )
    gradients, losses = {}, {}
    for batch_size in (1, 8):
        gradients[batch_size], losses[batch_size] = float64_gradient(base, documents, batch_size, fused=fused)
    assert gradients[8].abs().max() > 0
    assert (gradients[1] - gradients[8]).norm() < 1e-12 * gradients[8].norm()
    assert abs(losses[1] - losses[8]) < 1e-12 * losses[8]


def float64_gradient(base, documents: Documents, batch_size: int, *, fused: bool) -> tuple[torch.Tensor, float]:
    """(flat gradient of one step over all documents, its loss) at a random adapter, everything in float64."""
    torch.manual_seed(1)
    llama = LlamaForCausalLM.from_pretrained(base, attn_implementation="eager")
    model = get_peft_model(llama, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    model.double()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    flat = FlatParameters(model)
    loader = PackLoader(
        documents,
        packing="none",
        max_length=501,
        per_device_batch_size=batch_size,
        gradient_accumulation_steps=8 // batch_size,
        rank=0,
        world_size=1,
        seed=0,
        shuffle=False,
        pad_token_id=0,
    )
    with patched(model, attention="eager", recompute_layers=1, fused=fused) as llama:
        report = train_step(
            llama,
            flat,
            AdamW(flat, name="adamw_32bit", betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0),
            Windows(loader, torch.device("cpu")).take(),
            accelerator=Accelerator(cpu=True),
            learning_rate=0.0,
            max_grad_norm=1e9,
        )
    return flat.gradient.clone(), report.loss
