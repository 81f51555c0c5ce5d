"""The floor of a step is of the step's own precision and of its micro-batches' own sizes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from small_job import small_config, write_rows
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from packloop.bench import floor as floors
from packloop.bench import profile_floor
from packloop.bench.cell import _floor, load_subject
from packloop.bench.floor import Floor
from packloop.bench.probe import probe
from packloop.bench.synthetic import shape_config
from packloop.data.loader import Batch
from packloop.engine.batch import Micro
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


class Products(TorchDispatchMode):
    """How often products of so many rows ran while it is entered, by (rows, columns in, columns out)."""

    def __init__(self):
        super().__init__()
        self.shapes: Counter[tuple[int, int, int]] = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.overloadpacket.__name__ == "mm":
            self.shapes[args[0].shape[0], args[0].shape[1], args[1].shape[1]] += 1
        return operator(*args, **kwargs or {})


def micro_of(*lengths: int, num_labels: int, **counted: object) -> Micro:
    """Documents end to end in one row, of which so many slots have a target. counted: further fields of the batch."""
    bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).int()
    numbers = torch.arange(len(lengths), dtype=torch.int32).repeat_interleave(torch.tensor(lengths))[None]
    batch = Batch(
        input_ids=torch.ones_like(numbers).long(),
        position_ids=torch.zeros_like(numbers).long(),
        document_ids=numbers,
        cu_seqlens=bounds,
        max_seqlen=max(lengths),
        label_index=torch.arange(num_labels),
        label_ids=torch.ones(num_labels, dtype=torch.int64),
        row_ids=[0],
        num_slots=sum(lengths),
        num_real_tokens=sum(lengths),
        num_label_tokens=num_labels,
    )
    layout = DocumentLayout(numbers, bounds, max(lengths), True, bounds)
    return Micro(replace(batch, **counted), (batch.input_ids, batch.position_ids, layout))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_products_and_attention_run_in_the_given_dtype(dtype):
    with Precisions() as precisions:
        floor = Floor(shape_config("tiny", 300), num_slots=32, num_labels=30, dtype=dtype, device=CPU)
        assert floor.step_ms([micro_of(20, 12, num_labels=30)]) > 0
    assert precisions.seen == {"products": {dtype}, "attention": {dtype}}


@pytest.mark.parametrize("before", [False, True])
def test_products_have_the_rows_of_each_micro_batch(before):
    """Of slots in the layers, of distinct targets in the head, whatever size the layouts were chosen at."""
    config, dtype = shape_config("tiny", 300), torch.float32
    micros = [micro_of(20, 12, num_labels=30), micro_of(30, 17, num_labels=40, num_label_tokens=200)]
    floor = Floor.of(config, micros, dtype, CPU)
    if before:
        floor.step_ms(micros)
    with Products() as products:
        floor.step_ms(micros)
    of_head = {shape: times for shape, times in products.shapes.items() if config.vocab_size in shape[1:]}
    assert set(of_head.values()) == {2}, "once to get ready, once timed"
    assert Counter(rows for rows, *_ in of_head) == {30: 2, 40: 2}, "forward and input gradient"
    of_layers = products.shapes - Counter(of_head)
    assert {rows for rows, *_ in of_layers} == {32, 47}
    assert of_layers.total() > 0
    for (rows, *product), times in of_layers.items():
        assert of_layers[32 if rows == 47 else 47, *product] == times
    floor.step_ms([micro_of(9, num_labels=0)])


def test_buffers_with_room_do_not_grow(monkeypatch):
    micros = [micro_of(20, 12, num_labels=30), micro_of(30, 17, num_labels=40)]
    floor = Floor.of(shape_config("tiny", 300), micros, torch.float32, CPU)
    floor.make_room(47, 40)
    monkeypatch.setattr(floors, "_normal", None)
    assert floor.step_ms(micros) > 0


def test_only_document_attention_sees_a_shared_beginning(monkeypatch):
    asked = []

    def choose(requested, *, among, **_):
        asked.append(among)
        return "sdpa", "stands in"

    monkeypatch.setattr(floors, "choose_backend", choose)
    plain = micro_of(8, 4, num_labels=3)
    ids, positions, layout = plain.inputs
    shared = replace(plain, inputs=(ids, positions, replace(layout, prefix_of=torch.tensor([-1, 0]))))
    for micros in ([plain, plain], [plain, shared]):
        Floor.of(shape_config("tiny", 300), micros, torch.float32, CPU).step_ms(micros)
    assert asked == [None, ("document",)]


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
    sizes = {(micro.num_slots, micro.label_index.numel()) for micro in taken.micros}
    assert len(sizes) > 1, "micro-batches of sizes that differ"
    with Precisions() as precisions:
        assert _floor(taken, subject).ms > 0
    expected = getattr(torch, dtype)
    assert precisions.seen == {"products": {expected}, "attention": {expected}}


@pytest.mark.parametrize(
    ("prefix_of", "expected"), [(None, ["document", "varlen"]), (torch.tensor([-1, 0]), ["document"])]
)
def test_attention_that_sees_no_shared_beginning_is_no_floor(monkeypatch, prefix_of, expected):
    monkeypatch.setattr(profile_floor, "usable_backends", lambda **_: dict.fromkeys(("eager", "varlen", "document")))
    times = {"varlen": (2.0, 3.0, 0.5), "document": (1.0, 2.0, 0.0)}
    monkeypatch.setattr(profile_floor, "_time_backend", lambda name, *_: times[name])
    bounds = torch.tensor([0, 4, 9], dtype=torch.int32)
    ids = torch.arange(2, dtype=torch.int32).repeat_interleave(bounds.diff().long())[None]
    layout = DocumentLayout(ids, bounds, 5, True, bounds, prefix_of=prefix_of)
    found = profile_floor.measure_attention(
        shape_config("tiny"), [layout], num_steps=1, dtype=torch.bfloat16, device=torch.device("cpu")
    )
    assert [one.name for one in found] == expected
