"""The micro-batches that predictions are made for: laid out as a run under the same attention lays them out."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from small_job import small_config
from test_data_loader import PAD, documents_of, loader_of
from test_prefix import DIFFERENT, EQUAL, EVERY, TEMPLATED

from packloop.bench.flops import work_of
from packloop.bench.plan import attentions, plan
from packloop.bench.plan_loads import Loads, attended_squares, load_from
from packloop.bench.synthetic import shape_config
from packloop.config import load_config
from packloop.data import layout, prefix
from packloop.data.layout import share_prefixes
from packloop.data.loader import PackLoader, build_data
from packloop.engine import plan as trainers
from packloop.engine.model import load_tokenizer
from packloop.engine.planner import layout as planned_layout
from packloop.engine.planner.layout import largest_micro
from packloop.engine.planner.rates import ATTENTION_RATES
from packloop.errors import InputError
from packloop.gpus import find_gpu

RECIPE = "recipes/llama2-7b-dolly.yaml"


@pytest.fixture(autouse=True)
def _few_slots(monkeypatch):
    monkeypatch.setattr(layout, "SLOT_MULTIPLE", 8)
    monkeypatch.setattr(prefix, "LEAST_PREFIX", 4)


@pytest.fixture(params=["bfd", "none"])
def job(request, small_base, small_rows, tmp_path):
    """(configuration with these settings of kernels) -> it, its data and the token that pads."""

    def make(**kernels):
        config = small_config(
            small_base, small_rows, tmp_path / "run", data={"packing": request.param}, kernels=kernels
        )
        tokenizer = load_tokenizer(config.model)
        return config, build_data(config.data, tokenizer, seed=0), tokenizer.pad_token_id

    return make


def test_predictions_count_no_padding_and_a_shared_beginning_once(job):
    loads = Loads(*job())
    padded, dropped, shared = (loads.of(3, name) for name in ("sdpa", "varlen", "document"))
    assert dropped.real_tokens == padded.real_tokens <= dropped.slots < padded.slots
    assert shared.slots < shared.real_tokens == pytest.approx(dropped.real_tokens, rel=0.2)
    assert shared.labels < dropped.labels, "a target of the beginning is one row of the head"
    assert shared.squared_lengths < dropped.squared_lengths
    assert shared.slots <= shared.most_slots < dropped.most_slots == padded.most_slots
    assert [one.attention for one in (padded, dropped, shared)] == ["sdpa", "varlen", "document"]


NEARLY_EQUAL = [list(range(100 * number, 100 * number + 30 - number % 3)) for number in range(12)]
ASKED = [[], ["kernels.padding=keep"], ["kernels.padding=drop"], ["kernels.prefix_reuse=none"]]


@pytest.mark.parametrize("asked", ASKED, ids=lambda overrides: "".join(overrides) or "auto")
@pytest.mark.parametrize("texts", [TEMPLATED, DIFFERENT, EQUAL, NEARLY_EQUAL], ids=range(4))
@pytest.mark.parametrize("packing", ["bfd", "none", "wrapped"])
def test_predictions_lay_documents_out_as_a_run_does(packing, texts, asked, monkeypatch):
    """On a GPU that is stood in for, with every attention; of `auto`, too, whichever turns out to be the fastest."""
    among = []

    def fastest(config, model, micro, device, among_these):
        among.append(among_these)
        return taken

    monkeypatch.setattr(trainers, "usable_backends", lambda **_: dict.fromkeys(EVERY))
    monkeypatch.setattr(trainers, "_resolve_attention", fastest)
    documents, model = documents_of(*texts), SimpleNamespace(config=shape_config("tiny"))
    for batch in (1, 2, 6):
        loader = loader_of(documents, packing, max_length=60, per_device_batch_size=batch)
        for taken in ("document", "varlen", "sdpa"):
            for named in ("auto", taken):
                if taken == "sdpa" and "kernels.padding=drop" in asked:
                    continue  # refused by both
                settings = [f"data.packing={packing}", "data.max_length=60", "train.seed=3"]
                config = load_config(RECIPE, [*settings, f"kernels.attention={named}", *asked])
                found = trainers._resolve_layout(config, model, loader, torch.device("cuda"))
                loads = Loads(config, SimpleNamespace(train=documents), PAD)
                choice = loads.layout(batch, EVERY if named == "auto" else [taken])
                settled = {name: found[name] for name in ("padding", "prefix_reuse")}
                assert (choice.among, choice.under(taken)) == (among[-1], settled), (batch, named, taken)


def test_rows_without_much_padding_are_predicted_with_it():
    """As `train` keeps it there, below a twentieth of the slots."""
    config = load_config(RECIPE, ["data.packing=none", "data.max_length=60", "data.shuffle=false"])
    little, more = (
        Loads(config, SimpleNamespace(train=documents_of(*texts)), PAD) for texts in (NEARLY_EQUAL, DIFFERENT)
    )
    for attention in ("document", "varlen", "sdpa"):
        assert little.of(6, attention).slots == 6 * 30 > little.of(6, attention).real_tokens
    padded, dropped = more.of(6, "sdpa"), more.of(6, "varlen")
    assert padded.slots > dropped.slots >= dropped.real_tokens == padded.real_tokens


def test_a_load_with_sharing_is_of_whole_micro_batches(job):
    """Of the first packs of the epoch, three at a time: what is shared between packs of a micro-batch counts."""
    config, data, pad_token_id = job()
    loader = PackLoader(
        data.train, packing=config.data.packing, max_length=config.data.max_length, per_device_batch_size=3,
        gradient_accumulation_steps=1, rank=0, world_size=1, seed=config.train.seed, shuffle=config.data.shuffle,
        pad_token_id=pad_token_id,
    )  # fmt: skip
    micros = [share_prefixes(loader.next_window()[0]) for _ in range(loader.num_packs // 3)]
    expected, found = load_from(micros), Loads(config, data, pad_token_id).of(3, "document")
    for name in ("slots", "real_tokens", "labels", "squared_lengths"):
        assert getattr(found, name) == getattr(expected, name)
    assert any(micro.prefix_of is not None for micro in micros)


def test_squares_are_of_what_attention_multiplies(job):
    assert attended_squares([3, 4, 2], None) == 9 + 16 + 4
    assert attended_squares(torch.tensor([5, 2, 1, 3]), torch.tensor([-1, 0, 0, -1])) == 25 + 4 + 20 + 1 + 10 + 9
    config, data, pad_token_id = job()
    loader = PackLoader(
        data.train, packing=config.data.packing, max_length=config.data.max_length, per_device_batch_size=4,
        gradient_accumulation_steps=1, rank=0, world_size=1, seed=0, shuffle=True, pad_token_id=pad_token_id,
    )  # fmt: skip
    micro = share_prefixes(loader.next_window()[0])
    pairs = work_of([micro], "document").visited_pairs
    assert attended_squares(micro.cu_seqlens.diff(), micro.prefix_of) == 2 * pairs - micro.num_slots


def test_the_attention_that_can_share_is_planned_for_where_sharing_is_asked_for():
    gpu = find_gpu("NVIDIA A10G")

    def of(*overrides: str) -> list[str]:
        return attentions(load_config(RECIPE, ["kernels.prefix_reuse=micro_batch", *overrides]), gpu, 128)

    assert of("data.packing=bfd") == of("data.packing=bfd", "kernels.padding=drop") == ["document"]
    with pytest.raises(InputError, match=r"prefix_reuse=micro_batch: kernels\.attention=varlen knows no beginnings"):
        of("data.packing=bfd", "kernels.attention=varlen")
    for contradiction in (["data.packing=wrapped"], ["data.packing=bfd", "kernels.padding=keep"]):
        with pytest.raises(InputError, match=r"kernels\.prefix_reuse=micro_batch: "):
            of(*contradiction)


def test_each_attention_is_predicted_on_its_own_layout():
    def best(*overrides: str):
        config = load_config(RECIPE, ["data.packing=bfd", *overrides])
        return plan(config, gpu="h200", budget="20GiB", synthetic="tiny").best[0]

    shared, plain, padded = best(), best("kernels.prefix_reuse=none"), best("kernels.padding=keep")
    assert shared.attention == "document"
    assert shared.time.parts_ms["base GEMM"] < plain.time.parts_ms["base GEMM"] < padded.time.parts_ms["base GEMM"]
    other = best("kernels.attention=varlen")
    assert other.time.parts_ms["base GEMM"] == pytest.approx(plain.time.parts_ms["base GEMM"], rel=1e-6)


@pytest.mark.parametrize("packing", ["bfd", "none"])
def test_as_configured_takes_the_attention_that_auto_takes(packing, monkeypatch):
    """For the sake of slots that are left out, however fast another is; settings that are found may name another."""
    slow, fast = ({"ns_per_element": factor, "ns_per_score": factor} for factor in (1e3, 1e-9))
    for name, rate in ATTENTION_RATES.items():
        monkeypatch.setitem(ATTENTION_RATES, name, replace(rate, **(slow if name == "document" else fast)))
    config = load_config(RECIPE, [f"data.packing={packing}"])
    forecast = plan(config, gpu="h200", budget="20GiB", synthetic="tiny")
    assert forecast.configured.attention == "document"
    assert forecast.best[0].attention != "document"


@pytest.mark.parametrize("is_looked_through", [True, False])
def test_the_largest_micro_batch_is_that_of_a_run_with_the_settings_that_are_found(
    small_base, small_rows, tmp_path, monkeypatch, is_looked_through
):
    """Each size of micro-batch has its own accumulation, and with it the epochs that so many steps take."""
    train = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 60}
    config = small_config(
        small_base, small_rows, tmp_path / "run", train=train, kernels={"prefix_reuse": "micro_batch"}
    )
    data = build_data(config.data, load_tokenizer(config.model), seed=0)
    options = {"max_length": 96, "seed": config.train.seed, "shuffle": config.data.shuffle}
    num_packs = loader_of(data.train, **options).num_packs
    num_epochs = math.ceil(60 / math.ceil(num_packs / 4))
    monkeypatch.setattr(planned_layout, "_LEAST_PACKS", 1)
    allowed = num_epochs * (num_packs + planned_layout._EPOCH_PACKS)
    monkeypatch.setattr(planned_layout, "_MOST_PACKS", allowed if is_looked_through else allowed - 1)
    loads = Loads(config, data, PAD)
    for batch, accumulation in ((1, 4), (2, 2), (4, 1)):
        settings = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        found = config.model_copy(update={"train": config.train.model_copy(update=settings)})
        loader = loader_of(data.train, **options, per_device_batch_size=batch, gradient_accumulation_steps=accumulation)
        largest = largest_micro(found, loader)
        assert loads.of(batch, "document").most_slots == largest.num_slots
        assert batch == 1 or (largest.num_slots < batch * 96) == is_looked_through
