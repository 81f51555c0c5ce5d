"""The floor of a step is of the step's own precision."""

from __future__ import annotations

import pytest
import torch
from small_job import small_config, write_rows
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from packloop.bench.cell import _floor, load_subject
from packloop.bench.floor import Floor
from packloop.bench.probe import probe
from packloop.bench.synthetic import shape_config
from packloop.kernels.attention import DocumentLayout

CPU = torch.device("cpu")


class Precisions(TorchDispatchMode):
    """dtypes of all that matrix products and attention are given while it is entered."""

    def __init__(self):
        super().__init__()
        self.seen: dict[str, set[torch.dtype]] = {"products": set(), "attention": set()}

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.overloadpacket.__name__
        kind = "products" if name in ("mm", "addmm") else "attention" if "attention" in name else None
        if kind is not None:
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
            # The log of a row's sum of exponentials is fp32 whatever the inputs are.
            self.seen[kind] |= {
                x.dtype for x in tensors if x.is_floating_point() and (kind == "products" or x.dim() == 4)
            }
        return operator(*args, **kwargs or {})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_products_and_attention_run_in_the_given_dtype(dtype):
    bounds = torch.tensor([0, 20, 32], dtype=torch.int32)
    ids = torch.repeat_interleave(torch.arange(2, dtype=torch.int32), bounds.diff().long())[None]
    layout = DocumentLayout(ids, bounds, 20, True, bounds)
    with Precisions() as precisions:
        floor = Floor(shape_config("tiny", 300), num_slots=32, num_labels=30, dtype=dtype, device=CPU)
        assert floor.step_ms([layout]) > 0
    assert precisions.seen == {"products": {dtype}, "attention": {dtype}}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_cells_floor_has_the_dtype_of_its_configuration(tmp_path, dtype):
    config = small_config(
        "bundled",
        write_rows(tmp_path / "rows.jsonl", 40),
        tmp_path / "run",
        model={"dtype": dtype, "quantization": "none"},
        lora={"r": 8, "dropout": 0.0},
    )
    subject = load_subject(config, "tiny", None)
    data = subject.data(config)
    taken = probe(config, subject.base, data, subject.tokenizer.pad_token_id, warmup_steps=0, timed_steps=1)
    with Precisions() as precisions:
        assert _floor(taken, subject).ms > 0
    expected = getattr(torch, dtype)
    assert precisions.seen == {"products": {expected}, "attention": {expected}}
