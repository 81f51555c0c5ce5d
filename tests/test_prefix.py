"""`kernels.prefix_reuse`: what documents begin with goes through the model once, for the same losses and gradients."""

from __future__ import annotations

import re
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from small_job import read_steps, small_config
from test_data_loader import PAD, documents_of, loader_of
from test_engine_packed import hidden_and_gradient, load_model

from packloop.bench.synthetic import shape_config
from packloop.config import load_config
from packloop.data import layout as layout_module
from packloop.data import prefix
from packloop.data.layout import most_shared_slots, share_prefixes, without_padding
from packloop.data.loader import build_data, make_batch
from packloop.data.packing import epoch_packs
from packloop.data.prefix import CommonPrefix
from packloop.data.tokenize import Documents
from packloop.engine import plan
from packloop.engine.batch import Micro
from packloop.engine.loop import train
from packloop.engine.model import load_tokenizer
from packloop.engine.optim import FlatParameters
from packloop.engine.planner import layout as planned_layout
from packloop.engine.run import make_loader
from packloop.errors import ConfigError
from packloop.kernels.attention import FLAT, CountedAttention
from packloop.kernels.linear_cross_entropy import cross_entropy_, linear_cross_entropy
from packloop.kernels.patch import packed_loss_sum, patched

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("short_beginnings")


def batch_of(documents: Documents, packing: str = "bfd", max_length: int = 24):
    packs, order = epoch_packs(documents.lengths, packing, max_length, seed=0, epoch=0, shuffle=False)
    return make_batch(documents, packs, order, packing=packing, max_length=max_length, pad_token_id=PAD)


def templated(seed: int = 0, num_documents: int = 9) -> Documents:
    """Documents of two templates, 12 and 7 tokens long, one of neither, and one that is cut off within its template.

    The first template's targets are its own second half, the second's none, so that weights differ.
    """
    rng = np.random.default_rng(seed)
    templates = [rng.integers(3, 300, 12), rng.integers(3, 300, 7)]
    texts, counts = [], []
    for number in range(num_documents):
        beginning, own = templates[number % 2], rng.integers(3, 300, rng.integers(2, 9))
        texts.append([*beginning, *own])
        counts.append([number % 2 == 0 and at > 5 for at in range(len(beginning))] + [True] * len(own))
    texts += [rng.integers(3, 300, 11).tolist(), [*templates[0][:8]]]
    counts += [[True] * 11, [True] * 8]
    return documents_of(*[[int(token) for token in text] for text in texts], counts=counts)


def test_a_beginning_lies_before_its_documents_once():
    documents = documents_of(
        [1, 7, 8, 9, 5, 20, 21],
        [40, 41],
        [1, 7, 8, 9, 5, 30],
        counts=[[0, 0, 0, 1, 1, 1, 1], [0, 1], [0, 0, 1, 1, 1, 1]],
    )
    packed = batch_of(documents)
    batch = share_prefixes(packed)
    assert batch.input_ids.tolist() == [[1, 7, 8, 9, 5, 20, 21, 5, 30, 40, 41, 1, 1, 1, 1, 1]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 6, 4, 5, 0, 1, 0, 1, 2, 3, 4]]
    assert batch.document_ids.tolist() == [[0] * 4 + [1] * 3 + [2] * 2 + [3] * 2 + [-1] * 5]
    assert batch.cu_seqlens.tolist() == [0, 4, 7, 9, 11, 16]
    assert batch.prefix_of.tolist() == [-1, 0, 0, -1, -1]
    # Token 8 counts in one document, 9 in both; the last common one, 5, is a target of the beginning's last slot.
    assert batch.label_index.tolist() == [1, 2, 3, 4, 5, 7, 9]
    assert batch.label_ids.tolist() == [8, 9, 5, 20, 21, 30, 41]
    assert batch.label_weights.tolist() == [1, 2, 2, 1, 1, 1, 1]
    assert (batch.num_slots, batch.num_real_tokens, batch.num_label_tokens) == (16, 15, 9)
    assert batch.num_label_tokens == packed.num_label_tokens == batch.label_weights.sum()
    assert batch.row_ids == packed.row_ids


@pytest.mark.parametrize("packing", ["bfd", "none"])
def test_every_document_is_there_whole(packing):
    documents = templated()
    packed = batch_of(documents, packing)
    batch = share_prefixes(packed)
    assert batch.num_slots < without_padding(packed).num_slots
    bounds, tokens = batch.cu_seqlens.tolist(), batch.input_ids.flatten().tolist()
    runs = [range(*span) for span in pairwise(bounds)]
    found = []
    weights = dict(zip(batch.label_index.tolist(), batch.label_weights.tolist()))
    labels = dict(zip(batch.label_index.tolist(), batch.label_ids.tolist()))
    is_beginning = set(batch.prefix_of.tolist()) - {-1}
    assert len(is_beginning) == 2
    for number, run in enumerate(runs):
        if number in is_beginning or int(batch.document_ids[0, run[0]]) < 0:
            continue
        before = int(batch.prefix_of[number])
        slots = [*(runs[before] if before >= 0 else []), *run]
        assert batch.position_ids[0, slots].tolist() == list(range(len(slots)))
        found.append([tokens[slot] for slot in slots])
        assert all(labels[slot] == tokens[after] for slot, after in pairwise(slots) if slot in labels)
    assert sorted(found) == sorted(documents.token_ids[a:b].tolist() for a, b in pairwise(documents.offsets))
    assert sum(weights.values()) == batch.num_label_tokens == packed.num_label_tokens
    assert len(batch.label_index.unique()) == len(batch.label_index) < packed.num_label_tokens


def test_groups_save_much(monkeypatch):
    def groups(*documents):
        found = prefix.group_by_prefix([np.array(document) for document in documents])
        return sorted((length, members.tolist()) for length, members in found)

    long, short = list(range(10, 20)), list(range(10, 15))
    # Nine tokens of one document are more than four of two, and less than four of three.
    assert groups([*long, 1], [*short, 2], [*long, 3]) == [(9, [0, 2])]
    assert groups([*long, 1], [*short, 2], [*long, 3], [*short, 4], [*short, 5]) == [(4, [1, 3, 4]), (9, [0, 2])]
    nearly = [*short, 90, 91]
    assert groups([*nearly, 1], [*short, 2], [*nearly, 3]) == [(4, [0, 1, 2])]
    # A template, and two documents that go on alike: each of both kinds is in the group that saves more.
    pair, others = [[*long, *range(30, 60), n] for n in (1, 2)], [[*long, n] for n in (3, 4, 5)]
    assert groups(*pair, *others) == [(9, [2, 3, 4]), (39, [0, 1])]
    # The same document twice still leaves each a token of its own.
    assert groups(long, long) == [(9, [0, 1])]
    assert groups(long, [1, *long]) == groups(long) == groups() == []
    monkeypatch.setattr(prefix, "LEAST_PREFIX", 10)
    assert groups(long, long) == []


def test_groups_of_documents_each_a_token_longer_end():
    nested = [np.arange(length + 1) for length in range(3, 700)]
    found = prefix.group_by_prefix([np.append(document, -1) for document in nested])
    assert sum(length * (len(members) - 1) for length, members in found) > 0
    assert len({number for _, members in found for number in members}) == sum(len(members) for _, members in found)


@pytest.mark.parametrize("packing", ["bfd", "none"])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("multiple", [1, 8, 128])
def test_no_micro_batch_has_more_slots_than_memory_is_planned_for(packing, seed, multiple, monkeypatch):
    monkeypatch.setattr(layout_module, "SLOT_MULTIPLE", multiple)
    documents = templated(seed, num_documents=40)
    common = CommonPrefix.of(documents)
    assert common.length == 7  # of the document that is cut off after 8; the last common token stays with each
    begins = documents.token_ids[documents.offsets[0] : documents.offsets[0] + 8]
    wholes = [documents.token_ids[a:b] for a, b in pairwise(documents.offsets)]
    assert common.has_it.tolist() == [np.array_equal(tokens[:8], begins) for tokens in wholes]
    loader = loader_of(documents, packing, max_length=40, per_device_batch_size=3, world_size=2)
    others = loader_of(documents, packing, max_length=40, per_device_batch_size=3, world_size=2, rank=1)
    found = []
    while loader.state()["epoch"] < 3:
        found += [share_prefixes(micro).num_slots for one in (loader, others) for micro in one.next_window()]
    bound = most_shared_slots(common, map(loader.micro_batches, range(3)))
    assert (
        max(found) <= bound < max(found) + 40 + 2 * multiple
    )  # the second template's savings, among others, are not in the bound
    micros = [len(chosen) for epoch in range(3) for chosen in loader.micro_batches(epoch)[1]]
    assert sum(micros) == 3 * loader.num_packs


def test_a_long_template_is_shared_whole():
    documents = documents_of(*[[*range(10, 710), 1000 + number, number] for number in range(4)])
    batch = share_prefixes(batch_of(documents, max_length=800))
    assert batch.cu_seqlens.tolist()[1] == CommonPrefix.of(documents).length == 699
    packs, order = epoch_packs(documents.lengths, "bfd", 800, seed=0, epoch=0, shuffle=False)
    assert most_shared_slots(CommonPrefix.of(documents), [(packs, [order])]) == batch.num_slots == 699 + 4 * 3 + 1


def test_a_data_set_without_a_template_has_none():
    documents = documents_of([1, 2, 3, 4, 5], [6, 7, 8, 9], [1, 2])
    common = CommonPrefix.of(documents)
    assert (common.length, common.has_it.tolist()) == (0, [False] * 3)


def test_filling_up_adds_no_position_that_rows_have_not():
    packed = batch_of(templated())
    plain, filled = share_prefixes(packed), share_prefixes(packed, least_slots=200)
    assert filled.num_slots == 200
    assert torch.equal(filled.input_ids[:, : plain.num_slots], plain.input_ids)
    assert int(filled.position_ids.max()) < 24
    assert int(filled.cu_seqlens.diff().max()) <= 24
    assert len(filled.prefix_of) == len(filled.cu_seqlens) - 1
    assert filled.cu_seqlens[-1] == 200
    assert torch.equal(filled.label_index, plain.label_index)


def test_memory_is_planned_for_the_largest_micro_batch(small_base, small_rows, tmp_path):
    config = small_config(
        small_base,
        small_rows,
        tmp_path / "run",
        train={"per_device_train_batch_size": 6},
        kernels={"prefix_reuse": "none"},
    )
    data = build_data(config.data, load_tokenizer(config.model), seed=0)
    loader = make_loader(config, data, 0, Accelerator(cpu=True))
    first = planned_layout.largest_micro(config, loader)
    assert first.prefix_of is None
    config = config.model_copy(update={"kernels": config.kernels.model_copy(update={"prefix_reuse": "micro_batch"})})
    micro = planned_layout.largest_micro(config, loader)
    assert loader.state()["cursor"] == 0
    sizes = []
    while loader.state()["epoch"] < 3:
        sizes += [share_prefixes(batch).num_slots for batch in loader.next_window()]
    assert max(sizes) <= micro.num_slots < first.num_slots
    # Of a run too long to look through, all slots of packs.
    for num_epochs, is_looked_through in ((500, True), (800, False)):
        train_config = config.train.model_copy(update={"num_train_epochs": num_epochs})
        micro = planned_layout.largest_micro(config.model_copy(update={"train": train_config}), loader)
        assert (micro.num_slots < first.num_slots) == is_looked_through


def test_memory_is_planned_for_a_larger_one_where_the_first_shares_nothing():
    documents = documents_of(list(range(10, 20)), list(range(30, 50)), list(range(60, 84)))
    packs, order = epoch_packs(documents.lengths, "bfd", 24, seed=0, epoch=0, shuffle=False)
    smallest = order[np.argmin(packs.pack_tokens[order])]
    first = make_batch(documents, packs, np.array([smallest]), packing="bfd", max_length=24, pad_token_id=PAD)
    bound = most_shared_slots(CommonPrefix.of(documents), [(packs, [np.array([number]) for number in order])])
    assert bound == 24
    planned = share_prefixes(first, least_slots=bound)
    assert planned.num_slots == 24 > share_prefixes(first).num_slots
    assert planned.num_real_tokens == first.num_real_tokens
    assert planned.prefix_of is None


def test_little_or_nothing_to_share_is_without_padding():
    documents = documents_of([1, 2, 3, 4, 9, 9], [5, 6, 7, 8, 9])
    packed = batch_of(documents)
    assert share_prefixes(packed).prefix_of is None
    assert share_prefixes(packed).label_weights is None
    assert share_prefixes(packed).num_slots == 16 < packed.num_slots
    empty = make_batch(documents, None, np.array([], dtype=int), packing="bfd", max_length=8, pad_token_id=PAD)
    assert share_prefixes(empty) is empty


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("packing", ["bfd", "none"])
def test_prefix_weights_losses_and_gradients_are_those_of_whole_documents(small_base, packing, fused, attention):
    packed = batch_of(templated(), packing)
    found, expected = [], []
    for batch, results in ((share_prefixes(packed), found), (packed, expected)):
        results += step_of(small_base, batch, attention=attention, fused=fused)
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    assert (found[1] - expected[1]).norm() < 1e-5 * expected[1].norm()
    # Their weights matter: with one each the gradient is another.
    unweighted = step_of(small_base, share_prefixes(packed), attention=attention, fused=fused, weighted=False)
    assert (unweighted[1] - expected[1]).norm() > 1e-2 * expected[1].norm()


def step_of(
    small_base, batch, *, attention: str, fused: bool, weighted: bool = True, dropout: float = 0.0, **options
) -> list:
    model = load_model(small_base, dropout).train()
    flat = FlatParameters(model)
    inputs = Micro.of(batch, CPU).inputs
    torch.manual_seed(7)  # dropout masks
    with patched(model, attention=attention, fused=fused, **options) as llama:
        loss = packed_loss_sum(llama, *(inputs if weighted else inputs[:5]))
        loss.backward()
    return [loss.item(), flat.gradient.clone()]


def test_what_comes_after_a_beginning_does_not_change_it(small_base):
    before, after = (share_prefixes(batch_of(templated())) for _ in range(2))
    own = (before.document_ids == 1).nonzero()[:, 1]
    after.input_ids[0, own] += 1
    every = torch.ones_like(before.label_index, dtype=torch.bool)
    hidden = [
        hidden_and_gradient(load_model(small_base), batch, every, attention="sdpa", fused=True)[0]
        for batch in (before, after)
    ]
    changed = torch.zeros(before.num_slots, dtype=torch.bool)
    changed[own] = True
    assert torch.equal(hidden[0][~changed], hidden[1][~changed])
    assert not torch.isclose(hidden[0][changed], hidden[1][changed]).all()


def test_attention_that_knows_no_beginnings_refuses(small_base):
    class Plain:
        def __call__(self, *_):
            raise AssertionError("it must not be asked")

        forward = __call__

    layout = Micro.of(share_prefixes(batch_of(templated())), CPU).layout
    for call in (CountedAttention("varlen", Plain()), CountedAttention("varlen", Plain()).forward):
        with pytest.raises(
            ValueError, match="attention 'varlen' knows no beginnings that documents share; use document"
        ):
            call(None, None, None, layout, 1.0)


def test_a_run_that_shares_learns_the_same(small_base, small_rows, tmp_path, monkeypatch):
    """With a backend that takes documents by a mask, which a CPU has."""
    monkeypatch.setattr(planned_layout, "FLAT", (*FLAT, "sdpa"))
    monkeypatch.setattr(planned_layout, "SHARING", ("sdpa",))
    template = {"prompt": "Write, in one line, what this answers. {instruction}\n", "response": "{response}"}
    found = {}
    for reuse in ("none", "micro_batch"):
        run_dir = tmp_path / reuse
        data = {"template": template, "loss_on": "all", "on_long_row": "split"}
        settings = {
            "data": data,
            "train": {"max_steps": 4, "per_device_train_batch_size": 6},
            "kernels": {"prefix_reuse": reuse},
        }
        train(small_config(small_base, small_rows, run_dir, **settings))
        resolved = load_config(run_dir / "config.resolved.yaml").kernels
        assert (resolved.prefix_reuse, resolved.padding) == (reuse, "drop" if reuse == "micro_batch" else "keep")
        found[reuse] = read_steps(run_dir)
    assert len(found["none"]) == 4
    for plain, shared in zip(found["none"], found["micro_batch"]):
        assert shared["loss"] == pytest.approx(plain["loss"], rel=1e-5)
        assert shared["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-4)
        assert shared["slot_tokens"] < shared["real_tokens"] == plain["real_tokens"]
        assert shared["label_tokens"] == plain["label_tokens"]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"data": {"packing": "wrapped"}},
            "under data.packing=wrapped documents see those before them; use data.packing",
        ),
        (
            {"kernels": {"padding": "keep"}},
            "kernels.padding=keep gives every pack a row of its own; use kernels.padding",
        ),
        (
            {},
            "kernels.attention=sdpa knows no beginnings that documents share, and no other can run here (docu",
        ),
    ],
)
def test_what_cannot_share_is_refused(small_base, small_rows, tmp_path, sections, message, monkeypatch):
    monkeypatch.setattr(planned_layout, "FLAT", (*FLAT, "sdpa"))
    kernels = {"prefix_reuse": "micro_batch", **sections.pop("kernels", {})}
    with pytest.raises(ConfigError, match=r"kernels\.prefix_reuse=micro_batch: " + re.escape(message)):
        train(small_config(small_base, small_rows, tmp_path / "run", kernels=kernels, **sections))


TEMPLATED, DIFFERENT, EQUAL = (
    [[*range(10, 20), 100 + number, *range(200, 200 + number)] for number in range(12)],
    [list(range(100 * number, 100 * number + 3 + number)) for number in range(12)],
    [list(range(100 * number, 100 * number + 9)) for number in range(12)],
)
EVERY = ("eager", "sdpa", "cudnn", "flash_attn", "varlen", "flash_attn_4", "document")


@pytest.mark.parametrize(
    ("packing", "texts", "attention", "usable", "expected"),
    [
        ("bfd", TEMPLATED, "auto", EVERY, ("drop", "micro_batch", ("document",))),
        ("bfd", TEMPLATED, "varlen", EVERY, ("drop", "none", FLAT)),
        ("bfd", TEMPLATED, "auto", ("sdpa", "varlen"), ("drop", "none", FLAT)),
        ("bfd", DIFFERENT, "auto", EVERY, ("drop", "micro_batch", FLAT)),  # document happens to be the fastest
        ("bfd", TEMPLATED, "auto", ("eager", "sdpa"), ("keep", "none", None)),
        ("bfd", TEMPLATED, "sdpa", EVERY, ("keep", "none", None)),
        ("none", TEMPLATED, "auto", EVERY, ("drop", "micro_batch", ("document",))),
        ("none", DIFFERENT, "auto", EVERY, ("drop", "micro_batch", FLAT)),
        ("none", EQUAL, "auto", EVERY, ("keep", "none", None)),  # rows of one document each, and nothing to leave out
        ("none", TEMPLATED, "cudnn", EVERY, ("keep", "none", None)),
        ("wrapped", TEMPLATED, "auto", EVERY, ("keep", "none", None)),
    ],
)
def test_what_auto_makes_of_a_gpus_layout(packing, texts, attention, usable, expected, monkeypatch):
    """On a GPU that is stood in for: which attention may be taken, and how documents then lie."""
    config = load_config("recipes/llama2-7b-dolly.yaml", [f"data.packing={packing}", f"kernels.attention={attention}"])
    reasons = {name: None if name in usable else "is not there" for name in EVERY}
    monkeypatch.setattr(plan, "usable_backends", lambda **_: reasons)
    asked = []

    def resolve(config, model, micro, device, among):
        asked.append(among)
        found = [name for name in ("document", *usable) if name in usable and (among is None or name in among)]
        return attention if attention != "auto" else found[0]

    monkeypatch.setattr(plan, "_resolve_attention", resolve)
    loader = loader_of(documents_of(*texts), packing, max_length=60, per_device_batch_size=6)
    model = SimpleNamespace(config=shape_config("tiny"))
    found = plan._resolve_layout(config, model, loader, torch.device("cuda"))
    assert (found["padding"], found["prefix_reuse"], *asked) == expected
    assert loader.state()["cursor"] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_targets_weight_multiplies_its_loss_and_gradient(dtype):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 40, generator=generator).to(dtype)
    labels, weights = torch.tensor([3, 0, 39, 7, 7]), torch.tensor([1.0, 3.0, 2.0, 1.0, 17.0])
    plain_gradient, gradient = logits.clone(), logits.clone()
    plain = cross_entropy_(plain_gradient, labels, needs_gradient=True)
    loss = cross_entropy_(gradient, labels, weights, needs_gradient=True)
    torch.testing.assert_close(loss, plain * weights)
    wide = logits.to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    expected = torch.nn.functional.cross_entropy(wide, labels, reduction="none") * weights
    (exact,) = torch.autograd.grad(expected.sum(), wide)
    torch.testing.assert_close(gradient, exact.to(dtype))
    hidden, head = torch.randn(9, 8, generator=generator), torch.randn(40, 8, generator=generator)
    hidden.requires_grad_(), head.requires_grad_()
    index = torch.tensor([8, 1, 0, 4, 5])
    repeats = weights.long()
    whole = torch.nn.functional.cross_entropy(
        (hidden @ head.T)[index.repeat_interleave(repeats)], labels.repeat_interleave(repeats), reduction="sum"
    )
    ours = linear_cross_entropy(hidden, head, index, labels, weights)
    torch.testing.assert_close(ours, whole)
    for one, other in zip(torch.autograd.grad(ours, (hidden, head)), torch.autograd.grad(whole, (hidden, head))):
        torch.testing.assert_close(one, other)
